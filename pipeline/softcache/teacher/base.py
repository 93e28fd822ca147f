"""A frozen teacher: batches in, float32 logits out chunk by chunk, label records at the end.

A chunk is as many rows of logits as are held at once: for images a whole batch, for tokens a part of one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

from softcache.data.batch import Dataset, ImageBatch
from softcache.data.tokens import TokenBatch
from softcache.errors import ConfigError, LabelError
from softcache.hashing.digests import digest_weights
from softcache.labels import SoftLabels, collect
from softcache.labels.sparsify import LabelSettings, logit_faults
from softcache.models.image import Normalize, build_model
from softcache.models.language import build_language_model, check_split, split
from softcache.models.spec import parse_spec
from softcache.models.weights import count_parameters, load_weights
from softcache.settings import Settings

__all__ = [
    "Dtype",
    "ImageTeacher",
    "LanguageTeacher",
    "Teacher",
    "TeacherSettings",
    "load_image_teacher",
    "load_language_teacher",
]

CHUNK_ELEMENTS = 2**23  # of one chunk of a language model's logits: 32 MiB in float32

Dtype = Literal["float32", "bfloat16", "float16"]


class TeacherSettings(Settings):
    """[teacher]: what labels the data."""

    model: str
    weights: str | None = None


class Teacher(ABC):
    """A module in evaluation mode with its device and autocast dtype.

    Attributes:
        spec: the model spec it was built from.
        num_classes: V.
        num_parameters: scalars in its parameters.
        weights_digest: sha256 over its state dict, independent of the file format.
    """

    def __init__(
        self, model: nn.Module, *, spec: str, num_classes: int, device: torch.device, dtype: Dtype
    ) -> None:
        self.spec, self.num_classes, self.device, self.dtype = spec, num_classes, device, dtype
        self.num_parameters = count_parameters(model)
        self.weights_digest = digest_weights(model.state_dict())
        self.model = model.to(device).eval().requires_grad_(False)

    def autocast(self) -> AbstractContextManager:
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.dtype))

    @abstractmethod
    def chunks(self, batch: Any) -> Iterator[torch.Tensor]:
        """Yields float32 logits [p, V] on the teacher's device, which together cover the batch's rows in order.

        Raises:
            LabelError: the model returns something of another shape.
        """

    @torch.inference_mode()
    def label(
        self, batch: Any, settings: LabelSettings, *, chunks: Iterable[torch.Tensor] | None = None
    ) -> tuple[SoftLabels, torch.Tensor]:
        """Returns the batch's record and the faults [P] uint8 of its logits, on the device, waiting for nothing.

        Args:
            chunks: the logits, where another thread runs the model; None runs it here.
        """
        targets_P = batch.targets.to(self.device, non_blocking=True)
        faults_P = torch.zeros(batch.num_rows, dtype=torch.uint8, device=self.device)
        seeds_P = settings.row_seeds(batch.fingerprints, batch.row_counts, batch.positions)

        def records() -> Iterator[SoftLabels]:
            start = 0
            for logits_PV in self.chunks(batch) if chunks is None else chunks:
                rows = slice(start, start + len(logits_PV))
                seeds = None if seeds_P is None else seeds_P[rows]
                record = settings.apply(logits_PV, targets_P=targets_P[rows], seeds_P=seeds, check=False)
                # A bad logit makes its row's statistics NaN; what it was is asked only then, where asking waits for nothing.
                if logits_PV.device.type != "cpu" or bool(record.stats.isnan().any()):  # type: ignore[union-attr]
                    faults_P[rows] = logit_faults(logits_PV)
                yield record
                start = rows.stop

        return collect(records(), batch.num_rows), faults_P

    @torch.inference_mode()
    def score(self, batch: Any) -> tuple[float, int]:
        """Returns the sum of the rows' negative log-likelihoods (nats), and how many are right at the first guess."""
        targets_P = batch.targets.to(self.device, non_blocking=True)
        loss, correct, start = 0.0, 0, 0
        for logits_PV in self.chunks(batch):
            wanted = targets_P[start : start + len(logits_PV)]
            loss += float(nn.functional.cross_entropy(logits_PV, wanted, reduction="sum"))
            correct += int((logits_PV.argmax(-1) == wanted).sum())
            start += len(logits_PV)
        return loss, correct

    def scores(
        self,
        data: Dataset,
        *,
        batches: Iterable[range],
        progress: Callable[[int], None] = lambda samples: None,
    ) -> dict[str, Any]:
        """Returns what a cache's manifest tells of the teacher: here, its accuracy and loss on a split's plain view.

        Args:
            batches: the samples to score, a batch each.
            progress: called with the number of samples of each batch.
        """
        loss, correct, rows = 0.0, 0, 0
        for samples in batches:
            batch = data.load(samples, 0, fingerprints=False)
            batch_loss, batch_correct = self.score(batch)
            loss, correct, rows = loss + batch_loss, correct + batch_correct, rows + batch.num_rows
            progress(len(batch.samples))
        # A masked class that is the truth costs +inf, and a faulty teacher is refused when it labels.
        return {"eval_accuracy": correct / rows, "eval_loss": loss / rows if math.isfinite(loss) else None}


class ImageTeacher(Teacher):
    """A classifier of images, with its normalisation."""

    def __init__(self, model: nn.Module, *, normalize: Normalize, **common: Any) -> None:
        super().__init__(model, **common)
        self._normalize = normalize.to(self.device)

    @torch.inference_mode()
    def chunks(self, batch: ImageBatch) -> Iterator[torch.Tensor]:
        yield self.logits(batch.images)

    @torch.inference_mode()
    def logits(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Returns float32 logits [B, V] on the teacher's device.

        Raises:
            LabelError: the model returns something else than [B, V].
        """
        images = images_BCHW.to(self.device, non_blocking=True)
        with self.autocast():
            logits = self.model(self._normalize(images))
        expected = (len(images), self.num_classes)
        if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != expected:
            found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise LabelError(
                f"teacher {self.spec}: expected logits of shape {expected} (batch, classes); found {found}; "
                "the teacher's head must have one output per class of the source"
            )
        return logits.float()


class LanguageTeacher(Teacher):
    """A causal language model: its backbone runs once per batch, its head on a chunk of positions at a time.

    Memory beside the weights: the backbone's own for B x L tokens, hidden states of 4 B L D bytes, and for one chunk
    about 4 * 6 * chunk_positions * V bytes (the logits, their log-softmax, and what top-k and the tail's sums need).
    At the default chunk that is 200 MB, whatever B, L and V.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        chunk_positions: int | None = None,
        cross_documents: bool = False,
        **common: Any,
    ) -> None:
        self.parts = split(model.to(common["device"]).eval())
        check_split(model, self.parts)
        super().__init__(model, num_classes=self.parts.vocab_size, **common)
        self._chunk_positions = chunk_positions or max(1, CHUNK_ELEMENTS // self.num_classes)
        self._cross_documents = cross_documents

    @torch.inference_mode()
    def chunks(self, batch: TokenBatch) -> Iterator[torch.Tensor]:
        batch = batch.to(self.device)
        with self.autocast():
            hidden_BLD = self.parts.hidden(
                batch.tokens, batch.segments, cross_documents=self._cross_documents
            )
        hidden_PD = hidden_BLD.flatten(0, 1)[batch.rows]
        for start in range(0, max(1, len(hidden_PD)), self._chunk_positions):
            with self.autocast():
                logits_PV = self.parts.logits(hidden_PD[start : start + self._chunk_positions])
            yield logits_PV


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
    model = build(settings.model, vocab_size=vocab_size, context=seq_len)
    if settings.weights is not None:
        load_weights(model, settings.weights)
    return LanguageTeacher(
        model,
        spec=settings.model,
        chunk_positions=chunk_positions,
        cross_documents=cross_documents,
        device=device,
        dtype=dtype,
    )


def load_image_teacher(
    settings: TeacherSettings,
    *,
    num_classes: int,
    input_shape: tuple[int, int, int],
    normalize: Normalize,
    device: torch.device,
    dtype: Dtype,
) -> ImageTeacher:
    """Returns the teacher of a config, its weights loaded.

    Raises:
        ConfigError: no weights are named, for a model that would otherwise be random.
        SpecError: the model or its weights cannot be loaded.
    """
    parsed = parse_spec(settings.model)
    pretrained = parsed.args.get("pretrained") or parsed.args.get("weights") or parsed.family == "factory"
    if settings.weights is None and not pretrained:
        raise ConfigError(
            f"teacher.weights: missing, and {settings.model} would be random; give a weights file "
            "(safetensors or a state dict), or a pretrained model such as timm:NAME?pretrained=true"
        )
    model = build_model(settings.model, num_classes=num_classes, input_shape=input_shape)
    if settings.weights is not None:
        load_weights(model, settings.weights)
    return ImageTeacher(
        model, spec=settings.model, num_classes=num_classes, normalize=normalize, device=device, dtype=dtype
    )
