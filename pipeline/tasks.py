"""What a student learns and how it is scored, by modality: everything that the training loop leaves open.

A task builds the student, gives the mean loss of a batch's label rows, and evaluates on the plain view of the
held-out split. The loop (`pipeline.student`) knows nothing of images or tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from pipeline.batches import Dataset, ImageBatch
from pipeline.errors import SpecError
from pipeline.fused import fused_distillation_loss, token_scores
from pipeline.labels import SoftLabels
from pipeline.language import check_context, check_split, split
from pipeline.losses import (
    LossSettings,
    Mix,
    cross_entropy,
    distillation_loss,
    row_weights,
    weighted_difference,
)
from pipeline.models import Normalize
from pipeline.sparsify import dense, whole_record
from pipeline.teacher import ImageTeacher, LanguageTeacher
from pipeline.token_batches import TokenBatch, TokenData

__all__ = ["ImageTask", "LossSettings", "Task", "TokenStudent", "TokenTask", "my_share"]

LIVE_ELEMENTS = (
    2**26
)  # of a live teacher's logits, up to which a batch is compared at once: 256 MiB in float32


class Task(Protocol):
    """What the training loop needs to know.

    Attributes:
        metric: the row of an epoch's results by which epochs are compared.
        larger_is_better: of that metric.
        evaluation: the held-out split.
    """

    @property
    def metric(self) -> str: ...
    @property
    def larger_is_better(self) -> bool: ...
    @property
    def evaluation(self) -> Dataset: ...

    def build(self) -> nn.Module:
        """Returns a fresh student; called after the seed is set."""
        ...

    def loss(
        self, model: nn.Module, batch: Any, *, label_share: float | None = None, mix: Mix | None = None
    ) -> torch.Tensor:
        """Returns the mean loss of the batch's rows, a scalar.

        Args:
            label_share: of all rows of the optimizer step that the batch is a piece of, the share with a label: summed
                by their rows, the pieces' losses are then the step's. None: the batch is the step, or each row has one.
            mix: this step's temperature and alpha; given where [loss] has them change over the run. None: those of [loss].
        """
        ...

    def evaluate(self, model: nn.Module, accelerator: Accelerator, batch_size: int) -> dict[str, float]:
        """Returns `eval_loss` (nats), `accuracy` and what else there is, over all ranks."""
        ...

    def weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Returns what a weights file of the (unwrapped) model holds."""
        ...

    def export(self, model: nn.Module, out: Path) -> None:
        """Writes the finished (unwrapped) model in the form that its users load, where there is one."""
        ...


@dataclass(frozen=True)
class ImageTask:
    """Classification of images.

    Attributes:
        build_model: makes the student.
        num_classes: V.
        teacher: labels the batch on the spot (`labels = "online"`); None otherwise.
    """

    build_model: Callable[[], nn.Module]
    evaluation: Dataset
    normalize: Normalize
    num_classes: int
    loss_settings: LossSettings
    teacher: ImageTeacher | None = None

    metric = "accuracy"
    larger_is_better = True

    def build(self) -> nn.Module:
        return self.build_model()

    def loss(
        self, model: nn.Module, batch: ImageBatch, *, label_share: float | None = None, mix: Mix | None = None
    ) -> torch.Tensor:
        labels, how = batch.labels, self.loss_settings
        if self.teacher is not None:
            labels = dense(self.teacher.logits(batch.images)).to_torch(batch.images.device)
        temperature, alpha = mix or (how.temperature, how.alpha)
        logits_PV, weights_P = self._forward(model, batch.images), None
        if how.weights is not None and labels is not None:
            weights_P = row_weights(
                how.weights,
                labels,
                batch.targets,
                student_log_probs_P=-cross_entropy(logits_PV.detach(), batch.targets),
                num_student_classes=self.num_classes,
            )
        return distillation_loss(
            logits_PV,
            labels,
            batch.targets,
            temperature=temperature,
            alpha=alpha if labels is not None else 0.0,
            loss=how.loss,
            soft_weights=weights_P,
        )

    def _forward(self, model: nn.Module, images_BCHW: torch.Tensor) -> torch.Tensor:
        logits = model(self.normalize.to(images_BCHW.device)(images_BCHW))
        expected = (len(images_BCHW), self.num_classes)
        if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != expected:
            found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise SpecError(
                f"student: expected logits of shape {expected} (batch, classes of the labels); found {found}; "
                f"pass --student with {self.num_classes} outputs, or rebuild the cache for its classes"
            )
        return logits

    @torch.no_grad()
    def evaluate(self, model: nn.Module, accelerator: Accelerator, batch_size: int) -> dict[str, float]:
        device = accelerator.device
        # Not through DistributedDataParallel, whose ranks would have to call it equally often.
        model = accelerator.unwrap_model(model)
        accuracy = MulticlassAccuracy(self.num_classes, average="micro").to(device)
        mean_loss = MeanMetric().to(device)
        for samples in my_share(len(self.evaluation), batch_size, accelerator):
            batch = self.evaluation.load(samples, 0, fingerprints=False).to(device)
            logits_PV = self._forward(model, batch.images).float()
            accuracy.update(logits_PV, batch.targets)
            mean_loss.update(cross_entropy(logits_PV, batch.targets))
        return {"accuracy": float(accuracy.compute()), "eval_loss": float(mean_loss.compute())}

    def weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return model.state_dict()

    def export(self, model: nn.Module, out: Path) -> None:
        """Nothing: `model.safetensors` and the spec are all that is needed."""


class TokenStudent(nn.Module):
    """A causal language model whose forward pass is its loss, so that no caller ever sees logits.

    Args:
        context: tokens that the student attends over; longer samples are cut into windows of so many, each of which
            starts anew. No label is lost: row t needs the tokens up to t, and its target is known.
    """

    def __init__(
        self, model: nn.Module, loss: LossSettings, *, context: int, cross_documents: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self._loss, self._context, self._cross_documents = loss, context, cross_documents
        self._parts = split(model)
        check_split(model, self._parts)
        check_context(self._parts, context, "student")

    def forward(
        self,
        batch: TokenBatch,
        labels: SoftLabels | LanguageTeacher | None,
        alpha: float,
        label_share: float | None = None,
        temperature: Any = None,
    ) -> torch.Tensor:
        """Returns the mean loss of the batch's rows; a teacher in place of labels is asked on the spot.

        Cross-entropy is the mean over all rows, the soft part that over the rows with a label: of the batch, or with
        `label_share` of the step that the batch is a piece of (`Task.loss`). `temperature` is a number, or a tensor []
        where it is learnt; None is the one of the settings.
        """
        T = self._loss.temperature if temperature is None else temperature
        if isinstance(labels, LanguageTeacher):
            return self._live_loss(batch, labels, alpha, T)
        if labels is None or (batch.labelled is None and label_share is None):
            return self._mixed(self._hidden(batch), labels, batch.targets, alpha, T)
        return self._sparse_loss(batch, labels, alpha, label_share or batch.num_labelled / batch.num_rows, T)

    def _sparse_loss(
        self, batch: TokenBatch, labels: SoftLabels, alpha: float, label_share: float, T: Any
    ) -> torch.Tensor:
        """Mean over all rows of (1 - alpha) * CE + (alpha / label_share) * soft part, which unlabelled rows lack.

        Labelled and unlabelled rows go through the head apart, so that each goes once.
        """
        hidden_PD, targets_P = self._hidden(batch), batch.targets
        soft = alpha / label_share if label_share else alpha  # without any label, the soft part is 0 anyway
        weight = 1 - alpha + soft
        if batch.labelled is None:
            return weight * self._mixed(hidden_PD, labels, targets_P, soft / weight, T)
        # A stable sort and not nonzero, which would wait for a GPU.
        is_bare_P = torch.ones(batch.num_rows, dtype=torch.int8, device=hidden_PD.device)
        is_bare_P[batch.labelled] = 0
        bare = is_bare_P.argsort(descending=True, stable=True)[: batch.num_rows - batch.num_labelled]
        share = batch.num_labelled / batch.num_rows
        loss = self._mixed(hidden_PD[batch.labelled], labels, targets_P[batch.labelled], soft / weight, T)
        loss = share * weight * loss
        if alpha == 1:
            return loss
        return loss + (1 - share) * (1 - alpha) * self._mixed(hidden_PD[bare], None, targets_P[bare], 0.0, T)

    def _mixed(
        self,
        hidden_PD: torch.Tensor,
        labels: SoftLabels | None,
        targets_P: torch.Tensor,
        alpha: float,
        T: Any,
    ) -> torch.Tensor:
        """Mean of (1 - alpha) * CE + alpha * weight * T^2 * soft loss, fused unless T is learnt.

        Rows with weights of their own go through the head once for each part: fused, a row has one weight.
        """
        if labels is None or alpha == 0:
            return self._fused(hidden_PD, None, targets_P, 0.0, T)
        weights_P = self._row_weights(hidden_PD, labels, targets_P)
        if isinstance(T, torch.Tensor) and T.requires_grad:
            return self._unfused(hidden_PD, labels, targets_P, alpha, T, weights_P)
        if weights_P is None:
            return self._fused(hidden_PD, labels, targets_P, alpha, T)
        share = weights_P.sum() / max(1, len(weights_P))  # a piece may have no label
        soft = share * self._fused(hidden_PD, labels, targets_P, 1.0, T, weights_P)
        if alpha == 1:
            return soft
        return (1 - alpha) * self._fused(hidden_PD, None, targets_P, 0.0, T) + alpha * soft

    def _row_weights(
        self, hidden_PD: torch.Tensor, labels: SoftLabels, targets_P: torch.Tensor
    ) -> torch.Tensor | None:
        how, student_P = self._loss.weights, None
        if how is None:
            return None
        if how.by == "gap":
            student_P = -self._token_scores(hidden_PD.detach(), targets_P)[0]
        return row_weights(
            how,
            labels,
            targets_P,
            student_log_probs_P=student_P,
            num_student_classes=self._parts.weight.shape[0],
        )

    def _unfused(
        self,
        hidden_PD: torch.Tensor,
        labels: SoftLabels,
        targets_P: torch.Tensor,
        alpha: float,
        T: torch.Tensor,
        weights_P: torch.Tensor | None,
    ) -> torch.Tensor:
        """With logits, for a T that needs a gradient, which the fused loss has none of."""
        rows, classes = len(hidden_PD), self._parts.weight.shape[0]
        if rows * classes > LIVE_ELEMENTS:
            raise SpecError(
                f"loss.curriculum: a learnt temperature needs the student's logits at once, {rows:,} rows of {classes:,} "
                f"classes; expected at most {LIVE_ELEMENTS:,} elements; raise train.accumulation_steps, lower "
                "train.batch_size, or use loss.temperature_schedule, which needs no logits"
            )
        return distillation_loss(
            self._parts.logits(hidden_PD),
            labels,
            targets_P,
            temperature=T,
            alpha=alpha,
            padded_vocabulary=True,
            loss=self._loss.loss,
            soft_weights=weights_P,
        )

    def _fused(
        self,
        hidden_PD: torch.Tensor,
        labels: SoftLabels | None,
        targets_P: torch.Tensor,
        alpha: float,
        T: Any,
        weights_P: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return fused_distillation_loss(
            hidden_PD,
            self._parts.weight,
            labels,
            targets_P,
            temperature=T,
            alpha=alpha,
            weights_P=weights_P,
            bias_V=self._parts.bias,
            softcap=self._parts.softcap,
            logit_scale=self._parts.logit_scale,
            padded_vocabulary=True,
            loss=self._loss.loss,
        )

    def _live_loss(self, batch: TokenBatch, teacher: LanguageTeacher, alpha: float, T: Any) -> torch.Tensor:
        """The same with the teacher's whole distributions, made on the spot.

        A small batch (LIVE_ELEMENTS) is compared at once; of a larger one, each chunk of the teacher's rows goes through
        the fused loss, so that one chunk of logits is held, and for each a gradient of the head.
        """
        hidden_PD, start, terms = self._hidden(batch), 0, []
        # Of two heads of other sizes (one tokenizer, padded otherwise), the classes that both have are compared.
        chunks = (logits_PV[:, : self._parts.weight.shape[0]] for logits_PV in teacher.chunks(batch))
        if batch.num_rows * teacher.num_classes <= LIVE_ELEMENTS:
            return self._dense_loss(hidden_PD, torch.cat(list(chunks)), batch.targets, alpha, T)
        for teacher_PV in chunks:
            rows = slice(start, start + len(teacher_PV))
            term = self._mixed(hidden_PD[rows], whole_record(teacher_PV), batch.targets[rows], alpha, T)
            terms.append(term * (len(teacher_PV) / batch.num_rows))
            start = rows.stop
        return torch.stack(terms).sum()

    def _dense_loss(
        self,
        hidden_PD: torch.Tensor,
        teacher_PV: torch.Tensor,
        targets_P: torch.Tensor,
        alpha: float,
        T: Any,
    ) -> torch.Tensor:
        """Mean of (1 - alpha) * CE + alpha * T^2 * soft loss of whole distributions."""
        loss, logits_PV = self._loss.loss, self._parts.logits(hidden_PD)
        if loss.name != "forward_kl" or loss.standardize or self._loss.weights is not None:
            record = whole_record(teacher_PV)
            return distillation_loss(
                logits_PV,
                record,
                targets_P,
                temperature=T,
                alpha=alpha,
                padded_vocabulary=True,
                loss=loss,
                soft_weights=self._row_weights(hidden_PD, record, targets_P),
            )
        log_s_PV = (logits_PV / T).log_softmax(-1)[:, : teacher_PV.shape[1]]
        log_p_PV = (teacher_PV / T).log_softmax(-1)
        soft = alpha * T**2 * weighted_difference(log_p_PV, log_s_PV).sum(1).mean()
        return (1 - alpha) * cross_entropy(logits_PV, targets_P).mean() + soft if alpha < 1 else soft

    @torch.no_grad()
    def scores(self, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the rows' negative log-likelihoods [P] (nats), and whether the first guess is right [P]."""
        return self._token_scores(self._hidden(batch), batch.targets)

    @torch.no_grad()
    def _token_scores(
        self, hidden_PD: torch.Tensor, targets_P: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return token_scores(
            hidden_PD,
            self._parts.weight,
            targets_P,
            bias_V=self._parts.bias,
            softcap=self._parts.softcap,
            logit_scale=self._parts.logit_scale,
        )

    def _hidden(self, batch: TokenBatch) -> torch.Tensor:
        """Returns the hidden states [P, D] of the rows."""
        tokens_BL, segments_BL, rows = batch.tokens, batch.segments, batch.rows
        length = tokens_BL.shape[1]
        if length > self._context:
            # Padded to whole windows, a window is a row of the reshaped batch.
            added = -length % self._context
            rows = rows + rows // length * added
            tokens_BL = nn.functional.pad(tokens_BL, (0, added)).view(-1, self._context)
            segments_BL = nn.functional.pad(segments_BL, (0, added), mode="replicate").view(-1, self._context)
        hidden_BLD = self._parts.hidden(tokens_BL, segments_BL, cross_documents=self._cross_documents)
        return hidden_BLD.flatten(0, 1)[rows]


@dataclass(frozen=True)
class TokenTask:
    """Next-token prediction.

    Attributes:
        build_model: makes the student.
        context: tokens that it attends over.
        cross_documents: whether attention crosses the documents of a packed sample, as the config says.
        save_tokenizer: writes the tokenizer beside an exported model.
        teacher: labels the batch on the spot (`labels = "online"`); None otherwise.
    """

    build_model: Callable[[], nn.Module]
    evaluation: TokenData
    loss_settings: LossSettings
    context: int
    cross_documents: bool = False
    save_tokenizer: Callable[[Path], None] = lambda folder: None
    teacher: LanguageTeacher | None = None

    metric = "eval_loss"
    larger_is_better = False

    def build(self) -> nn.Module:
        return TokenStudent(
            self.build_model(),
            self.loss_settings,
            context=self.context,
            cross_documents=self.cross_documents,
        )

    def loss(
        self, model: nn.Module, batch: TokenBatch, *, label_share: float | None = None, mix: Mix | None = None
    ) -> torch.Tensor:
        temperature, alpha = mix or (self.loss_settings.temperature, self.loss_settings.alpha)
        if self.teacher is not None:
            return model(batch, self.teacher, alpha, temperature=temperature)
        alpha = alpha if batch.labels is not None else 0.0
        return model(batch, batch.labels, alpha, label_share, temperature)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, accelerator: Accelerator, batch_size: int) -> dict[str, float]:
        student = accelerator.unwrap_model(model)
        assert isinstance(student, TokenStudent)
        accuracy, mean_loss = MeanMetric().to(accelerator.device), MeanMetric().to(accelerator.device)
        for samples in my_share(len(self.evaluation), batch_size, accelerator):
            batch = self.evaluation.load(samples, 0, fingerprints=False).to(accelerator.device)
            with accelerator.autocast():
                loss_P, correct_P = student.scores(batch)
            mean_loss.update(loss_P.double())
            accuracy.update(correct_P.double())
        loss = float(mean_loss.compute())
        return {"eval_loss": loss, "perplexity": math.exp(loss), "accuracy": float(accuracy.compute())}

    def weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        assert isinstance(model, TokenStudent)
        return model.model.state_dict()

    def export(self, model: nn.Module, out: Path) -> None:
        """Writes OUT/hf, which `AutoModelForCausalLM.from_pretrained` loads, with the tokenizer."""
        assert isinstance(model, TokenStudent)
        save: Any = getattr(model.model, "save_pretrained", None)
        if save is not None:
            from transformers.utils import logging

            logging.disable_progress_bar()
            save(out / "hf")
            self.save_tokenizer(out / "hf")


def my_share(num_samples: int, batch_size: int, accelerator: Accelerator) -> list[range]:
    """Returns this rank's batches of an evaluation split, as even a share as whole batches allow."""
    batch_size = min(batch_size, max(1, -(-num_samples // accelerator.num_processes)))
    step = accelerator.num_processes * batch_size
    starts = range(accelerator.process_index * batch_size, num_samples, step)
    return [range(start, min(start + batch_size, num_samples)) for start in starts]
