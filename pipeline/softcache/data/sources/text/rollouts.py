"""Rollouts: prompts and the responses that a policy sampled, with its log-probability of each token of them.

They are a table of any kind that `text/hf` reads, or the folder of `softcache teacher-generate`:

    manifest.json          who sampled them and how, and the digest of every part; written last
    train/00000.jsonl ...  key, prompt, response (token ids), log_probs, finished, text (of the response)
    eval.jsonl             the held-out documents as they are: key, prompt, response
    tokenizer/             the one that made the ids; the source's own unless source.tokenizer names another

Who sampled them and which teacher that policy was fine-tuned on is in the manifest or in `source.sft_teacher`; a student's
run compares it with the teacher of the labels (`softcache.runs.rollouts`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from softcache.data.sources.base import SOURCES, Split
from softcache.data.sources.generated_parts import check_part
from softcache.data.sources.text.documents import Document
from softcache.data.sources.text.hugging_face import HfDocuments, HuggingFaceTexts
from softcache.errors import SourceError
from softcache.runtime.files import parse_json

__all__ = ["ROLLOUTS_KIND", "ROLLOUTS_VERSION", "RolloutTexts", "read_manifest"]

ROLLOUTS_KIND, ROLLOUTS_VERSION = "softcache rollouts", 1
NOT_READ = (
    "text_column",
    "messages_column",
    "tools_column",
    "input_ids_column",
    "labels_column",
    "mask_column",
)


@SOURCES.register("text/rollouts")
class RolloutTexts(HuggingFaceTexts):
    """Prompts and sampled responses, each as text or as token ids; the responses are learned.

    `path` is a file, glob, folder or hub name as of the source "hf", or a folder that `softcache teacher-generate` wrote.
    A response has one log-probability for each of its tokens in `log_probs_column`, in nats, of the policy that sampled it;
    `has_log_probs = false` where there are none. A text is tokenized prompt and response apart, and has as many tokens as
    log-probabilities: with its end token written out where the policy sampled one.

    `eval_path` holds prompts with responses to score the student on, of people or a teacher, in the same columns; without
    it, a folder's own are taken, or `eval_share` of the rollouts.

    `sft_teacher` is the teacher that the sampling policy was fine-tuned on: its spec or weights digest, or "none"; of
    a folder that names it by itself, leave it out. `other_sft_teacher` accepts labels of another teacher than that one,
    and names that one as the error does. `other_policy = true` accepts a student that does not start as the sampling policy.
    """

    name: str = "rollouts"
    path: str
    prompt_column: str = "prompt"
    completion_column: str = "response"
    log_probs_column: str = "log_probs"
    has_log_probs: bool = True
    eval_path: str | None = None
    sft_teacher: str | None = Field(None, min_length=1)
    other_sft_teacher: str | None = Field(None, min_length=1)
    other_policy: bool = False
    tokenizer: str = ""

    @model_validator(mode="before")
    @classmethod
    def _tokenizer_of_folder(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("tokenizer") and isinstance(values.get("path"), str):
            folder = Path(values["path"]).expanduser() / "tokenizer"
            if not folder.is_dir():
                raise ValueError(
                    f"source.tokenizer: missing, and {folder} is no folder; name the tokenizer of the policy"
                )
            values = {**values, "tokenizer": str(folder)}
        return values

    @model_validator(mode="after")
    def _keys_are_read(self) -> Self:
        if found := sorted(set(NOT_READ) & self.model_fields_set):
            raise ValueError(
                f"source.{found[0]}: not read of rollouts, which have source.prompt_column, source.completion_column and "
                "source.log_probs_column; drop it"
            )
        if self.streaming:
            raise ValueError(
                "source.streaming: not of rollouts; drop it, and bound them by max_train_samples"
            )
        return self

    @property
    def has_rollouts(self) -> bool:
        return True

    @property
    def may_have_chats(self) -> bool:
        return False

    @property
    def manifest(self) -> dict[str, Any] | None:
        """The manifest of a folder of `softcache teacher-generate`; None of any other path."""
        return read_manifest(self.path)

    def documents(self, split: Split) -> RolloutDocuments:
        return RolloutDocuments(self, split)


class RolloutDocuments(HfDocuments):
    """Rows of a table of rollouts, under their `key_column`, or SPLIT/NUMBER."""

    _settings: RolloutTexts

    def __init__(self, settings: RolloutTexts, split: Split) -> None:
        manifest, path = settings.manifest, settings.path
        self._is_split = settings.eval_path is not None or manifest is not None
        update: dict[str, Any] = {}
        if manifest is not None:
            _check_parts(Path(path).expanduser(), manifest)
            update = {"key_column": settings.key_column or "key"}
            path = str(Path(path).expanduser() / ("train/*.jsonl" if split == "train" else "eval.jsonl"))
        if split == "eval" and settings.eval_path is not None:
            if settings.eval_path == settings.path:
                raise SourceError(
                    f"source.eval_path: {settings.eval_path!r} is what is trained on; give another file, or none to hold "
                    "out source.eval_share of the rollouts"
                )
            path, update = settings.eval_path, {}
        self._has_log_probs = settings.has_log_probs and not (split == "eval" and self._is_split)
        super().__init__(settings.model_copy(update={**update, "path": path}), split)
        self.name = f"{settings.path}/{split}"
        if self._has_log_probs:
            self._columns.append(settings.log_probs_column)

    @property
    def _eval_share(self) -> float | None:
        return None if self._is_split else super()._eval_share

    def _document(self, number: int, key: str, values: list[Any]) -> Document:
        prompt, response, *more = values
        log_probs = np.asarray(self._checked(number, 2, more[0], list), np.float64) if more else None
        if isinstance(prompt, str) and isinstance(response, str):
            return Document(key, prompt + response, num_given=len(prompt), log_probs=log_probs)
        ids = [self._ids(number, place, values[place]) for place in (0, 1)]
        learnt = np.arange(len(ids[0]) + len(ids[1])) >= len(ids[0])
        return Document(key, tokens=np.concatenate(ids), learnt=learnt, log_probs=log_probs)

    def _ids(self, number: int, place: int, value: Any) -> np.ndarray:
        value = [] if value is None else value
        if not isinstance(value, list) or not all(type(one) is int for one in value):
            raise SourceError(
                f"source.path {self._settings.path!r}, row {number}: {type(value).__name__} in column "
                f"{self._columns[place]!r}; expected prompt and response both as text, or both as lists of token ids; write "
                "a chat's prompt as its template does (apply_chat_template with add_generation_prompt)"
            )
        return np.array(value, np.int64)


def read_manifest(path: str) -> dict[str, Any] | None:
    """Returns the manifest of a folder of rollouts; None where `path` is none that `softcache teacher-generate` began.

    Raises:
        SourceError: it is not complete, or of another version.
    """
    folder = Path(path).expanduser()
    if not (folder / "generation.json").is_file():
        return None
    try:
        manifest: dict[str, Any] = parse_json((folder / "manifest.json").read_text("utf-8"))
        found = manifest["kind"], manifest["version"]
        if found != (ROLLOUTS_KIND, ROLLOUTS_VERSION) or not isinstance(manifest["parts"], dict):
            raise ValueError(f"kind and version {found}")
    except FileNotFoundError as error:
        raise SourceError(
            f"source.path {path}: no manifest.json, so nothing complete; run `softcache teacher-generate` to the end"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"source.path {path}: manifest.json: expected {ROLLOUTS_KIND!r} of version {ROLLOUTS_VERSION}; found {error}; "
            "give the folder of rollouts, or generate it again"
        ) from error
    return manifest


def _check_parts(folder: Path, manifest: dict[str, Any]) -> None:
    """Raises SourceError unless the parts are those of the manifest, byte by byte."""
    for name, digest in manifest["parts"].items():
        check_part(folder, name, digest)
    if more := sorted(
        {f"train/{path.name}" for path in folder.glob("train/*.jsonl")} - manifest["parts"].keys()
    ):
        raise SourceError(f"source {folder}: {more[0]} is not in manifest.json; remove it")
