"""One pair of texts, and the base of the [source] tables of pairs: which tokenizer, how long a side may be."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from softcache.data.sources.base import SOURCES, SourceSettings, Split
from softcache.data.sources.images.custom import call_factory
from softcache.errors import SpecError

if TYPE_CHECKING:
    from softcache.data.sources.text.table import TokenSource

__all__ = ["CustomPairs", "Languages", "Pair", "TranslationSettings"]


@dataclass(frozen=True)
class Pair:
    """A source text and its translation; neither is empty.

    Attributes:
        key: stable, and its own.
        language: of the target, e.g. "de"; "" where a file names none.
        reference: a person's translation, where the target is a teacher's; else None.
    """

    key: str
    source: str
    target: str
    language: str
    reference: str | None = None


def _list_to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # TOML has lists only


Languages = Annotated[tuple[str, ...], BeforeValidator(_list_to_tuple)]


class TranslationSettings(SourceSettings):
    """[source] of an encoder-decoder model; a subclass has the origin of the pairs.

    Pairs with a side of more than `max_tokens` tokens are left out, and counted. `prefixes` gives what is put before a
    source text for a language, where the tokenizer has no token for it. `eval_share` of the source texts, chosen by a hash
    of the text, are held out, in all languages, unless the source has a split of its own.

    Attributes:
        languages: of the targets; empty: all that there are.
        tokenizer: name on the hub, or folder.
        data_dir: where tokenized pairs are kept, to be used again.
    """

    modality: Literal["translation"] = "translation"
    languages: Languages = ()
    tokenizer: str
    prefixes: dict[str, str] = Field(default_factory=dict)
    max_tokens: int = Field(64, ge=2)
    eval_share: float = Field(0.15, gt=0, lt=1)
    data_dir: str = "runs/data"

    @property
    def tokenizer_spec(self) -> str:
        """The tokenizer's folder, hub name or `bpe` spec."""
        return self.tokenizer

    @abstractmethod
    def read(self, split: Split) -> tuple[str, list[Pair], bool]:
        """Returns the name of the source, its pairs, and whether they are of the split already.

        Raises:
            SourceError: they cannot be read.
        """

    def open(self, split: Split) -> TokenSource:
        from softcache.data.sources.translation.source import open_translation

        return open_translation(self, split=split)

    @model_validator(mode="after")
    def _check_languages(self) -> Self:
        if len(set(self.languages)) != len(self.languages):
            raise ValueError("languages: one is named twice")
        return self


@SOURCES.register("translation/custom")
class CustomPairs(TranslationSettings):
    """A function of the user's: factory(split="train" | "eval") returns a list of `Pair`."""

    def read(self, split: Split) -> tuple[str, list[Pair], bool]:
        pairs = list(call_factory(self.name, split))
        if others := [pair for pair in pairs if not isinstance(pair, Pair)]:
            raise SpecError(
                f"source.name {self.name!r}: expected a list of softcache.data.sources.translation.settings.Pair for "
                f"split={split!r}; found {others[0]!r} in it"
            )
        return self.name, pairs, True
