"""The base of the [source] tables of texts: which tokenizer, how samples are cut."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from softcache.data.sources.base import SOURCES, SourceSettings, Split
from softcache.data.sources.images.custom import call_factory, check_members

if TYPE_CHECKING:
    from softcache.data.sources.text.documents import Documents
    from softcache.data.sources.text.table import TokenSource

__all__ = ["CustomTexts", "Split", "TextSettings"]


class TextSettings(SourceSettings):
    """[source] of a language model; a subclass has the origin of the documents.

    `max_train_samples` and `max_eval_samples` keep the first so many samples of a split; no more than these are
    tokenized. `cross_documents = true` lets the attention of teacher and student run over a whole packed sample, as if it
    were one document; it is part of a cache's identity.

    `bos`: the beginning-of-sequence token of each document. "auto": what the tokenizer does by default, and in a chat
    what its template writes; true: there is one, added where it is missing and never twice; false: there is none.

    Documents that are token ids already are read as they are: "auto" expects the tokenizer's prefix in front of each, true
    adds it where it is missing, false removes a BOS that is there.

    `tokenize_workers` processes tokenize, or with 0 this one; tokens do not depend on their number.

    `packing`: how documents become samples, see `softcache.data.sources.text.packing`; by default "packed" for texts and
    "best_fit" for what has a prompt, which is never cut from its answer.

    Attributes:
        tokenizer: name on the hub, folder, or `bpe?vocab_size=4096&min_frequency=2`, trained once on the documents.
        seq_len: tokens of a sample.
        chat_template: a file of a Jinja template, in place of that of the tokenizer.
        template_args: arguments of the template, such as `enable_thinking`.
        tools: a JSON file of the tools that all chats have.
        data_dir: where tokenized documents are kept, to be used again.
    """

    modality: Literal["text"] = "text"
    tokenizer: str
    seq_len: int = Field(256, ge=2)
    packing: Literal["packed", "documents", "best_fit"] | None = None
    bos: Literal["auto"] | bool = "auto"
    chat_template: str | None = None
    template_args: dict[str, Any] = Field(default_factory=dict)
    tools: str | None = None
    cross_documents: bool = False
    data_dir: str = "runs/data"
    tokenize_workers: int = Field(0, ge=0)

    @property
    def has_prompts(self) -> bool:
        """Whether documents are prompts with answers (chats, too): they are kept whole, and only answers are learned."""
        return False

    @property
    def has_tokens(self) -> bool:
        """Whether documents are token ids already."""
        return False

    @property
    def may_have_chats(self) -> bool:
        """Whether documents may be chats, for which there are keys of their own."""
        return self.has_prompts

    @model_validator(mode="after")
    def _chat_keys_are_read(self) -> Self:
        for name in () if self.may_have_chats else ("chat_template", "template_args", "tools"):
            if getattr(self, name):
                raise ValueError(f"source.{name}: for chats only, which this source does not have; drop it")
        return self

    @property
    def cut(self) -> Literal["packed", "documents", "best_fit"]:
        """How documents become samples, with its default."""
        return self.packing or ("best_fit" if self.has_prompts else "packed")

    @abstractmethod
    def documents(self, split: Split) -> Documents:
        """Returns the documents of a split.

        Raises:
            SourceError: the settings name no dataset; or, once its documents are asked for, it cannot be read, has
                no such column or split, or two documents have the same key.
        """

    def open(self, split: Split) -> TokenSource:
        from softcache.data.sources.text.source import open_text

        return open_text(self, split=split)


@SOURCES.register("text/custom")
class CustomTexts(TextSettings):
    """A function of the user's: factory(split="train" | "eval") returns `Documents`."""

    @property
    def has_tokens(self) -> bool:
        """Whether documents are token ids already."""
        return False

    @property
    def may_have_chats(self) -> bool:
        return True

    def documents(self, split: Split) -> Documents:
        documents: Documents = call_factory(self.name, split)
        check_members(documents, self.name, split, ("name", "digest", "__len__", "__iter__"), of="Documents")
        return documents
