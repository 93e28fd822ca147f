"""The [source] table of pairs of texts: which pairs, which tokenizer, how long a side may be."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from softcache.settings import Settings

__all__ = ["TranslationSettings"]


def _list_to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # TOML has lists only


class TranslationSettings(Settings):
    """[source] of an encoder-decoder model; see `softcache.data.sources.translation.pairs`.

    `eval_share` of the source texts, chosen by a hash of the text, are held out, in all languages; `eval_path` names
    pairs to be held out instead. Pairs with a side of more than `max_tokens` tokens are left out, and counted.
    `prefixes` says what is put before a source text for a language, where the tokenizer has no token for it.
    """

    modality: Literal["translation"]
    name: Literal["gettext", "files", "generated"]
    package: str | None = None
    languages: Annotated[tuple[str, ...], BeforeValidator(_list_to_tuple)] = ()
    path: str | None = None
    eval_path: str | None = None
    tokenizer: str | None = None
    prefixes: dict[str, str] = Field(default_factory=dict)
    max_tokens: int = Field(64, ge=2)
    eval_share: float = Field(0.15, gt=0, lt=1)
    max_train_samples: int | None = Field(None, ge=1)
    max_eval_samples: int | None = Field(None, ge=1)
    data_dir: str = "runs/data"

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        needed = {"gettext": ("package", "languages", "tokenizer"), "files": ("path", "tokenizer")}
        allowed = {"gettext": {"package"}, "files": {"path", "eval_path"}, "generated": {"path"}}[self.name]
        for key in needed.get(self.name, ("path",)):
            if not getattr(self, key):
                raise ValueError(f"{key} is missing for name = {self.name!r}")
        for key in {"package", "path", "eval_path"} - allowed:
            if getattr(self, key) is not None:
                raise ValueError(f"{key} is not for name = {self.name!r}")
        if len(set(self.languages)) != len(self.languages):
            raise ValueError("languages: one is named twice")
        return self
