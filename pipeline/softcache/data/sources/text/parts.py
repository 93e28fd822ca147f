"""A corpus in parts: each is packed, labeled and stored by itself, and a student reads all of them as one."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from softcache.data.sources.base import SOURCES, Split
from softcache.data.sources.text.documents import Documents
from softcache.data.sources.text.nested import INHERITED, nested_source
from softcache.data.sources.text.sequence import TokenSequence
from softcache.data.sources.text.settings import TextSettings
from softcache.data.sources.text.table import TokenSource
from softcache.errors import SourceError

__all__ = ["PartsTexts"]

SHARED = (
    *INHERITED,
    *("chat_template", "template_args", "tools", "tokenize_workers", "max_train_samples", "max_eval_samples"),
)


@SOURCES.register("text/parts")
class PartsTexts(TextSettings):
    """`num_parts` text sources, one after the other, each packed by itself.

    `each` is the table of one of them, without the keys that all share; `{part}` in its texts is the number of the part,
    from 0 (`{part:03d}` with leading zeros). `part = 2` is that part alone, exactly as if `each` were [source]: with it a
    teacher labels one part, in a cache of its own; without it, all of them, and a student reads all. `cache` has the
    {part}, too, or names all of their caches.
    `max_train_samples` and `max_eval_samples` are of each part.
    """

    name: str = "parts"
    num_parts: int = Field(ge=1)
    part: int | None = Field(None, ge=0)
    each: dict[str, Any]

    @model_validator(mode="after")
    def _parts_are_sources(self) -> Self:
        if self.part is not None and self.part >= self.num_parts:
            raise ValueError(
                f"source.part: {self.part}; expected 0 to {self.num_parts - 1} (source.num_parts)"
            )
        if self.num_parts > 1 and self.table(0) == self.table(1):
            raise ValueError("source.each: the same for all parts; expected {part} in a path of it")
        self.settings_of(0)
        return self

    def table(self, number: int) -> dict[str, Any]:
        """Returns the table of a part."""
        try:
            return {
                key: value.format(part=number) if isinstance(value, str) else value
                for key, value in self.each.items()
            }
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"source.each: {error}; expected {{part}} or {{part:03d}}, and {{{{ for a brace"
            ) from error

    def settings_of(self, number: int) -> TextSettings:
        """Returns the settings of a part."""
        inherited = tuple(key for key in SHARED if key in INHERITED or key in self.model_fields_set)
        return nested_source(self, self.table(number), "source.each", inherited=inherited)

    @property
    def part_numbers(self) -> list[int]:
        return list(range(self.num_parts)) if self.part is None else [self.part]

    @property
    def has_prompts(self) -> bool:
        return self.settings_of(0).has_prompts

    @property
    def may_have_chats(self) -> bool:
        return self.settings_of(0).may_have_chats

    @property
    def has_rollouts(self) -> bool:
        return self.settings_of(0).has_rollouts

    @property
    def has_tokens(self) -> bool:
        return self.settings_of(0).has_tokens

    def documents(self, split: Split) -> Documents:
        raise SourceError("source parts: documents are those of a part; open a part's settings")

    def open(self, split: Split) -> TokenSource:
        if self.part is not None:
            return self.settings_of(self.part).open(split)
        return TokenSequence([self.settings_of(number).open(split) for number in range(self.num_parts)])
