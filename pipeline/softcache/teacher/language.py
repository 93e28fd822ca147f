"""A frozen causal language model or encoder-decoder as a teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from softcache.data.tokens import TokenBatch
from softcache.errors import ConfigError, LabelError
from softcache.hashing.digests import digest_weights
from softcache.labels import OutputHead
from softcache.models.language import CausalParts, build_language_model, check_split, plain_logits, split
from softcache.models.language.placement import WholeState, is_placed
from softcache.models.spec import parse_spec
from softcache.models.weight_files import load_weights
from softcache.runtime.distributed import num_ranks
from softcache.teacher.base import Dtype, Teacher, TeacherSettings
from softcache.teacher.group import HIDDEN, PLAIN, TeacherGroup, join_teacher_group

__all__ = ["LanguageTeacher", "load_language_teacher"]

MAX_CHECKED_TOKENS = 512
CHUNK_ELEMENTS = 2**23  # of one chunk of a language model's logits: 32 MiB in float32
# On a GPU the head's weight is read anew for every chunk: 64 positions, at V = 131,072, take as long as the whole model.
CUDA_CHUNK_ELEMENTS = 2**26


def default_chunk(device: torch.device, num_classes: int) -> int:
    """Returns how many positions' logits a head makes at once."""
    return max(1, (CUDA_CHUNK_ELEMENTS if device.type == "cuda" else CHUNK_ELEMENTS) // num_classes)


class LanguageTeacher(Teacher):
    """A causal language model: its backbone runs once per batch, its head on a chunk of positions at a time.

    Memory besides the weights: the backbone's own for B x L tokens, hidden states of 4 B L D bytes, and for one chunk
    about 4 * 6 * chunk_positions * V bytes (the logits, their log-softmax, and what top-k and the tail's sums need).
    At the default chunk that is 200 MB, whatever B, L and V; on a GPU 300 MB, of which 256 MiB are the logits.
    """

    group: TeacherGroup | None = None
    has_states = True

    def __init__(
        self,
        model: nn.Module,
        *,
        chunk_positions: int | None = None,
        cross_documents: bool = False,
        group: TeacherGroup | None = None,
        **common: Any,
    ) -> None:
        digest = digest_weights(WholeState(model))  # before the first pass, which `split` makes
        self.parts = split((model if is_placed(model) else model.to(common["device"])).eval())
        check_split(model, self.parts)
        self.group = group
        if is_placed(model):
            common["device"] = self.parts.weight.device  # where logits are made
        super().__init__(model, num_classes=self.parts.vocab_size, weights_digest=digest, **common)
        self._chunk_positions = chunk_positions or default_chunk(self.device, self.num_classes)
        self._cross_documents = cross_documents

    @torch.inference_mode()
    def chunks(self, batch: TokenBatch) -> Iterator[torch.Tensor]:
        hidden_PD = self._hidden_rows(batch)
        for start in range(0, max(1, len(hidden_PD)), self._chunk_positions):
            with self.autocast():
                logits_PV = self.parts.logits(
                    hidden_PD[start : start + self._chunk_positions].to(self.device)
                )
            yield logits_PV

    @torch.inference_mode()
    def states(self, batch: TokenBatch) -> Iterator[torch.Tensor]:
        hidden_PD = self._hidden_rows(batch)
        rows = max(1, CHUNK_ELEMENTS // hidden_PD.shape[1])
        for start in range(0, max(1, len(hidden_PD)), rows):
            yield hidden_PD[start : start + rows].to(self.device)

    def output_head(self) -> OutputHead:
        parts, dtype = self.parts, self.parts.weight.dtype
        if self.dtype != "float32" and dtype == torch.float32:  # autocast rounds it before it is multiplied
            dtype = getattr(torch, self.dtype)
        bias = None if parts.bias is None else parts.bias.detach()
        return OutputHead(parts.weight.detach().to(dtype), bias, parts.logit_scale, parts.softcap)

    def _hidden_rows(self, batch: TokenBatch) -> torch.Tensor:
        """Returns the hidden states [P, D] of a batch's rows."""
        batch = batch.to(self.device)
        if self.group is not None:
            self.group.share(HIDDEN, batch.tokens, batch.segments)
        return self._hidden(batch.tokens, batch.segments).flatten(0, 1)[batch.rows]

    def _hidden(self, tokens_BL: torch.Tensor, segments_BL: torch.Tensor | None) -> torch.Tensor:
        with self.autocast():
            return self.parts.hidden(tokens_BL, segments_BL, cross_documents=self._cross_documents)

    @torch.inference_mode()
    def follow(self) -> None:
        """Runs this process's share of the passes of the first one, until that has ended.

        Raises:
            LostProcessError: the first process has failed or is gone.
        """
        assert self.group is not None
        for what, tokens_BL, segments_BL in self.group.passes():
            if what == HIDDEN:
                self._hidden(tokens_BL, segments_BL)
            else:
                self._plain_logits(self.model, tokens_BL)

    def _plain_logits(self, model: nn.Module, tokens_BL: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            return plain_logits(model, tokens_BL)

    def describe_score(self, accuracy: float, perplexity: float) -> str:
        return f"perplexity {perplexity:.4g}, {accuracy:.1%} of tokens right"

    def check_forward(self, batch: TokenBatch) -> None:
        """Compares a few documents with the model's own forward pass on each of them alone.

        Raises:
            LabelError: their mean negative log-likelihoods differ by more than rounding.
        """
        if isinstance(self.parts, CausalParts) and not self._cross_documents:
            self._compare_with(self.model, batch.to(self.device))

    @torch.inference_mode()
    def _compare_with(self, model: nn.Module, batch: TokenBatch) -> None:
        """Compares a few documents with a model's own forward pass on the batch's device; see `check_forward`."""
        ours_P = self._row_losses(batch).to(batch.tokens.device)
        row_L, column_L = batch.rows // batch.tokens.shape[1], batch.rows % batch.tokens.shape[1]
        ours, plain, used = 0.0, 0.0, 0
        for row, segment in _documents(batch):
            inside_L = batch.segments[row] == segment
            tokens_L = batch.tokens[row][inside_L]
            chosen_P = (row_L == row) & inside_L[column_L]
            if len(tokens_L) > MAX_CHECKED_TOKENS or not chosen_P.any():
                continue
            if self.group is not None:
                self.group.share(PLAIN, tokens_L[None], None)
            logits_LV = self._plain_logits(model, tokens_L[None])[0].float().to(tokens_L.device)
            # Positions in the document of its rows.
            position_P = column_L[chosen_P] - int(inside_L.nonzero()[0])
            targets_P = batch.targets[chosen_P]
            plain += float(nn.functional.cross_entropy(logits_LV[position_P], targets_P, reduction="sum"))
            ours, used = ours + float(ours_P[chosen_P].sum()), used + len(targets_P)
            if used >= MAX_CHECKED_TOKENS:
                break
        rounded = self.dtype != "float32" or self.parts.weight.dtype in (torch.bfloat16, torch.float16)
        allowed = (0.02 if rounded else 1e-3) * max(1.0, plain / max(1, used))
        if math.isfinite(plain) and used and not abs(ours - plain) / used <= allowed:
            raise LabelError(
                f"teacher {self.spec}: its labels are not those of its own forward pass: {ours / used:.4f} nats of "
                f"{used} rows of documents packed together, {plain / used:.4f} of each document alone; the model does not "
                'keep documents apart, or does more than softcache knows; set source.packing = "documents", or use '
                "another architecture"
            )

    def _row_losses(self, batch: TokenBatch) -> torch.Tensor:
        """Returns the negative log-likelihoods [P] of a batch's rows, with one chunk of logits at a time."""
        losses, start = [], 0
        for logits_PV in self.chunks(batch):
            targets_P = batch.targets[start : start + len(logits_PV)].to(logits_PV.device)
            losses.append(nn.functional.cross_entropy(logits_PV, targets_P, reduction="none"))
            start += len(logits_PV)
        return torch.cat(losses)


def _documents(batch: TokenBatch) -> Iterator[tuple[int, int]]:
    """Yields (sample, segment) of the batch's documents, in order."""
    for row in range(len(batch)):
        for segment in batch.segments[row].unique_consecutive().tolist():
            yield row, segment


def load_language_teacher(
    settings: TeacherSettings,
    *,
    vocab_size: int,
    seq_len: int,
    chunk_positions: int | None,
    cross_documents: bool,
    device: torch.device,
    dtype: Dtype,
    build: Callable[..., nn.Module] = build_language_model,
) -> LanguageTeacher:
    """Returns the language model of a config, its weights loaded.

    Raises:
        ConfigError: no weights are named, for a model that would otherwise be random.
        SpecError: the model or its weights cannot be loaded, its context is shorter than `seq_len`, its head has fewer
            classes than the tokenizer has tokens, or it cannot be split into backbone and head.
    """
    if settings.weights is None and not (settings.model.startswith("hf:") or ":" in settings.model):
        raise ConfigError(
            f"teacher.weights: missing, and {settings.model} would be random; give a weights file "
            "(safetensors or a state dict), or a pretrained model: hf:NAME_OR_PATH"
        )
    group, more = None, {}
    if (placement := getattr(settings.engine, "placement", None)) is not None:
        if build is not build_language_model:
            raise ConfigError(
                "teacher.engine.device_map, teacher.engine.tp_plan: are of a causal language model (source.modality = "
                '"text"); drop them'
            )
        more = {"placement": placement}
        if placement.tp_plan is not None:
            described = settings.model_dump(mode="json") | {"vocab_size": vocab_size, "seq_len": seq_len}
            described |= {"dtype": dtype, "cross_documents": cross_documents, "files": _files(settings.model)}
            group, device = join_teacher_group(described, device)
        elif num_ranks() > 1:
            raise ConfigError(
                f"teacher.engine.device_map: spreads the teacher over the devices of one process; found {num_ranks()} "
                'processes of one launch; start it without torchrun, or use teacher.engine.tp_plan = "auto"'
            )
    model = build(settings.model, vocab_size=vocab_size, context=seq_len, **more)
    if settings.weights is not None:
        load_weights(model, settings.weights)
    return LanguageTeacher(
        model,
        group=group,
        spec=settings.model,
        chunk_positions=chunk_positions,
        cross_documents=cross_documents,
        device=device,
        dtype=dtype,
    )


def _files(spec: str) -> dict[str, int]:
    """Returns name and size of each file of weights of a local folder; nothing of a hub's model."""
    folder = Path(parse_spec(spec).name.partition(":")[2]).expanduser()
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
