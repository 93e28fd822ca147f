"""A frozen causal language model whose backbone a serving engine runs (`teacher.engine`)."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from softcache.data.tokens import TokenBatch
from softcache.errors import ConfigError, EngineError
from softcache.models.language import build_language_model
from softcache.models.language.checkpoint import Checkpoint
from softcache.runtime.logging import log_info
from softcache.teacher.base import Dtype, TeacherFacts, TeacherSettings
from softcache.teacher.engines import Engine
from softcache.teacher.language import LanguageTeacher, default_chunk

__all__ = ["EngineTeacher", "load_engine_teacher"]

MAX_COMPARED_BYTES = 4 * 2**30
"""Of the weights of a model that transformers loads, too, to compare the engine's labels with its own."""


class EngineTeacher(LanguageTeacher):
    """A causal language model in parts: an engine runs the backbone on whole documents, this process the head on chunks.

    Packed samples are cut at the boundaries of their documents, so that none sees another, whatever the engine does. A
    document ends for the engine at its last position that gets a label.

    Memory of this process: the head's weights, the hidden states of a batch's labeled positions, one chunk of logits.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        identity: dict[str, Any],
        chunk_positions: int | None,
        cross_documents: bool,
        device: torch.device,
        dtype: Dtype,
    ) -> None:
        """Starts the engine.

        Args:
            identity: settings of the engine that change labels by more than rounding.

        Raises:
            EngineError: it cannot run the model.
            SpecError: the model's head cannot be found.
        """
        checkpoint = engine.checkpoint
        weight, bias = engine.head()
        TeacherFacts.__init__(self, checkpoint.spec, len(weight))
        self.device, self.dtype = device, dtype
        self.parts = checkpoint.with_head(weight.to(device), None if bias is None else bias.to(device))
        self.num_parameters = checkpoint.num_parameters
        self.weights_digest = checkpoint.weights_digest
        self.architecture = checkpoint.architecture
        if identity:
            self.architecture += "?" + "&".join(f"{key}={value}" for key, value in sorted(identity.items()))
        self._chunk_positions = chunk_positions or default_chunk(self.device, self.num_classes)
        self._cross_documents = cross_documents
        self._engine = engine
        self._backbone_dtype = _backbone_dtype(checkpoint, dtype)
        engine.start()
        self._stop = weakref.finalize(self, engine.stop)

    @property
    def model(self) -> Any:  # type: ignore[override]
        raise ConfigError(
            f"teacher {self.spec}: an engine runs it, so that there is no module in this process, which is needed here; set "
            'teacher.engine = "transformers"'
        )

    def close(self) -> None:
        """Stops the engine."""
        self._stop()

    def check_forward(self, batch: TokenBatch) -> None:
        """Compares a few documents with the model that transformers loads, where its weights are below `MAX_COMPARED_BYTES`.

        Raises:
            LabelError: their mean negative log-likelihoods differ by more than rounding.
        """
        if self._cross_documents:
            return
        checkpoint = self._engine.checkpoint
        if checkpoint.num_bytes > MAX_COMPARED_BYTES:
            log_info(
                f"teacher {self.spec}: not compared with transformers' own forward pass, for its size "
                f"({checkpoint.num_bytes / 2**30:.1f} GiB); a small model of this architecture is"
            )
            return
        model = build_language_model(self.spec, vocab_size=1, context=1)
        self._compare_with(model.eval(), batch)

    def _hidden_rows(self, batch: TokenBatch) -> torch.Tensor:
        documents = list(_labeled_documents(batch, self._cross_documents))
        states = self._run([document.tokens for document in documents], batch)
        rows = [
            states_LD[torch.from_numpy(document.positions)].to(self._backbone_dtype)
            for document, states_LD in zip(documents, states, strict=True)
        ]
        width = self.parts.weight.shape[1]
        hidden_PD = torch.cat(rows) if rows else torch.zeros(0, width, dtype=self._backbone_dtype)
        divisor = self._engine.checkpoint.parts.hidden_divisor
        return hidden_PD if divisor == 1.0 else hidden_PD / divisor

    def _run(self, rows: list[list[int]], batch: TokenBatch) -> list[torch.Tensor]:
        """Returns the engine's hidden states of some rows; an engine that fails is started again, once.

        Raises:
            EngineError: it fails again, on the whole batch and then row by row; the first such row is named.
        """
        try:
            return self._checked(rows, self._engine.hidden_states(rows)) if rows else []
        except EngineError as error:
            log_info(f"{error}; starting the engine again, once")
        states, row = [], rows[0]
        try:
            self._engine.stop()
            self._engine.start()
            for row in rows:
                states += self._checked([row], self._engine.hidden_states([row]))
        except EngineError as error:
            where = "" if batch.unit is None else f", unit {batch.unit}"
            raise EngineError(
                f"{error}; twice, the second time on one row of {len(row)} tokens (samples {batch.samples[0]} to "
                f"{batch.samples[-1]}{where}); finished units are kept, and the same command goes on; lower "
                "teacher.engine.max_num_batched_tokens, gpu_memory_utilization or source.seq_len if memory is short"
            ) from error
        return states

    def _checked(self, rows: list[list[int]], states: list[torch.Tensor]) -> list[torch.Tensor]:
        """Raises EngineError unless each row has the hidden states of all of its tokens."""
        expected = [(len(row), self.parts.weight.shape[1]) for row in rows]
        found = [tuple(one.shape) for one in states]
        if found != expected:
            at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), 0)
            raise EngineError(
                f"teacher {self.spec}: the engine gives hidden states of shape {found[at] if found else None}; expected "
                f"{expected[at]} (tokens, the head's input); does it run another model?"
            )
        return states


@dataclass(frozen=True)
class _Document:
    """A document of a batch, up to its last labeled position.

    Attributes:
        tokens: its token ids.
        positions: int64, those in it whose hidden states are wanted, ascending.
    """

    tokens: list[int]
    positions: np.ndarray


def _labeled_documents(batch: TokenBatch, cross_documents: bool) -> Iterator[_Document]:
    """Yields the documents that have labeled positions, in the order of the batch's rows."""
    length = batch.tokens.shape[1]
    tokens_BL, segments_BL = batch.tokens.cpu().numpy(), batch.segments.cpu().numpy()
    rows_P = batch.rows.cpu().numpy()
    sample_P = rows_P // max(1, length)
    for sample in range(len(batch)):
        positions = rows_P[sample_P == sample] - sample * length
        segments_L = np.zeros(length) if cross_documents else segments_BL[sample]
        starts = np.flatnonzero(np.diff(segments_L, prepend=-1))
        document_of = np.searchsorted(starts, positions, side="right") - 1
        for number in np.unique(document_of):
            inside = positions[document_of == number] - starts[number]
            start = int(starts[number])
            yield _Document(tokens_BL[sample, start : start + int(inside[-1]) + 1].tolist(), inside)


def _backbone_dtype(checkpoint: Checkpoint, dtype: Dtype) -> torch.dtype:
    """Returns the dtype that the engine runs in: that of the weights, or capture.dtype where it is a narrower one."""
    return checkpoint.dtype if dtype == "float32" else getattr(torch, dtype)


def load_engine_teacher(
    settings: TeacherSettings,
    *,
    vocab_size: int,
    seq_len: int,
    chunk_positions: int | None,
    cross_documents: bool,
    device: torch.device,
    dtype: Dtype,
) -> EngineTeacher:
    """Returns the language model of a config, its engine running.

    Raises:
        ConfigError: `teacher.weights` is given, or settings of the engine do not fit.
        SpecError: the model is no saved model, its context is shorter than `seq_len`, its head cannot be found or has fewer
            classes than the tokenizer has tokens.
        MissingExtraError: the engine is not installed.
        EngineError: the engine cannot run the model.
    """
    if settings.weights is not None:
        raise ConfigError(
            f"teacher.weights: {settings.weights!r} with teacher.engine = {settings.engine.name!r}, which runs saved "
            "models: save_pretrained(...) one with these weights, set teacher.model to hf:FOLDER, and drop teacher.weights"
        )
    if not settings.model.startswith("hf:"):
        raise ConfigError(
            f"teacher.model: {settings.model!r} with teacher.engine = {settings.engine.name!r}, which runs saved models; "
            "expected hf:NAME_OR_PATH"
        )
    checkpoint = Checkpoint(settings.model, vocab_size=vocab_size, context=seq_len)
    engine = settings.engine.make(checkpoint, context=seq_len, dtype=_backbone_dtype(checkpoint, dtype))
    return EngineTeacher(
        engine,
        identity=settings.engine.identity(),
        chunk_positions=chunk_positions,
        cross_documents=cross_documents,
        device=device,
        dtype=dtype,
    )
