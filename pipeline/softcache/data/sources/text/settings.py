"""The [source] table of a text: which documents, which tokenizer, how samples are cut."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from softcache.settings import Settings

__all__ = ["Split", "TextSettings"]

Split = Literal["train", "eval"]


class TextSettings(Settings):
    """[source] of a language model.

    `eval_share` of the documents, chosen by a hash of their key, are held out where the dataset has no split of
    its own (`eval_split`). Documents come in the order of another hash of their key, or with
    `shuffle_documents = false` in that of the dataset. `max_train_samples` and `max_eval_samples` keep the first
    so many samples of a split; no more than these are tokenised. `cross_documents = true` lets the attention of teacher
    and student run over a whole packed sample, as if it were one document; it is part of a cache's identity.
    """

    modality: Literal["text"]
    name: Literal["stdlib", "hf"]
    path: str | None = None
    subset: str | None = None
    train_split: str = "train"
    eval_split: str | None = None
    text_column: str = "text"
    messages_column: str | None = None
    key_column: str | None = None
    tokenizer: str
    seq_len: int = Field(256, ge=2)
    packing: Literal["packed", "documents"] = "packed"
    cross_documents: bool = False
    eval_share: float = Field(0.1, gt=0, lt=1)
    shuffle_documents: bool = True
    max_train_samples: int | None = Field(None, ge=1)
    max_eval_samples: int | None = Field(None, ge=1)
    data_dir: str = "runs/data"
