"""A mixture of text sources, by weights of tokens."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from softcache.data.sources.base import SOURCES, Split
from softcache.data.sources.text.interleave import LabeledDocuments, MixtureDocuments, OnEnd
from softcache.data.sources.text.nested import nested_source
from softcache.data.sources.text.settings import TextSettings
from softcache.errors import SourceError

__all__ = ["MixtureTexts"]

OWN_KEYS = {"weight", "label"}


@SOURCES.register("text/mixture")
class MixtureTexts(TextSettings):
    """Several text sources in one.

    Each table of `sources` is that of a text source, without the keys that all of them share (`tokenizer`, `seq_len`,
    `packing` and so on are the mixture's), with its `weight`: its share of the tokens, where 2 is twice as much as 1.
    `label` is in front of its documents' keys; by default, its number. `on_end`: "stop" where the first source ends, so
    that the weights hold; "continue" with the others until all documents are taken, each once.
    """

    name: str = "mixture"
    sources: list[dict[str, Any]] = Field(min_length=1)
    on_end: OnEnd = "stop"

    @model_validator(mode="after")
    def _sources_are_sources(self) -> Self:
        labels = [self._label(number) for number in range(len(self.sources))]
        if len(set(labels)) < len(labels):
            raise ValueError(f"source.sources: labels {labels}; expected a label of its own for each")
        for number in range(len(self.sources)):
            self._part(number)
        return self

    def _label(self, number: int) -> str:
        return str(self.sources[number].get("label", number))

    def _weight(self, number: int) -> float:
        weight = self.sources[number].get("weight", 1)
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < float("inf"):
            raise ValueError(f"source.sources[{number}].weight: {weight!r}; expected a number above 0")
        return float(weight)

    def _part(self, number: int) -> TextSettings:
        """Returns the settings of one source.

        Raises:
            ValueError: its table has a key that it must not have, or is no table of a text source.
        """
        self._weight(number)
        table = {key: value for key, value in self.sources[number].items() if key not in OWN_KEYS}
        return nested_source(self, table, f"source.sources[{number}]")

    @property
    def _parts(self) -> list[TextSettings]:
        return [self._part(number) for number in range(len(self.sources))]

    @property
    def has_prompts(self) -> bool:
        return any(part.has_prompts for part in self._parts)

    @property
    def may_have_chats(self) -> bool:
        return any(part.may_have_chats for part in self._parts)

    @property
    def has_tokens(self) -> bool:
        return any(part.has_tokens for part in self._parts)

    def documents(self, split: Split) -> MixtureDocuments:
        parts = [
            LabeledDocuments(self._label(number), part.documents(split))
            for number, part in enumerate(self._parts)
        ]
        for part in parts:
            if not len(part):
                raise SourceError(
                    f"source.sources, {part.name}: no documents in this split; raise its eval_share, or give it a "
                    "split for evaluation"
                )
        weights = [self._weight(number) for number in range(len(parts))]
        return MixtureDocuments(f"mixture/{split}", parts, weights, on_end=self.on_end)
