"""A causal language model as a student: from tokens and labels to the mean loss, without logits where it can be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from softcache.data.tokens import TokenBatch
from softcache.errors import LabelError, SpecError
from softcache.labels import SoftLabels, VectorLabels
from softcache.labels.sparsify import dense_labels_unsorted
from softcache.losses import LossSettings, cross_entropy, distillation_loss, kl_terms, row_weights
from softcache.losses.buckets import MAX_LACKING_MASS
from softcache.losses.fused import fused_distillation_loss, fused_hidden_loss, token_scores
from softcache.models.language import check_context, check_loss, check_split, split
from softcache.models.language.backbone_head import CausalParts
from softcache.student.tasks.base import OnlineTeacher

__all__ = ["TokenStudent"]

MAX_DENSE_ELEMENTS = 2**26
"""Elements of an online teacher's logits up to which a batch is compared at once: 256 MiB in float32."""


class TokenStudent(nn.Module):
    """A causal language model whose forward pass is its loss, so that no caller ever sees logits.

    Args:
        context: tokens that the student attends over; longer samples are cut into windows of so many, each of which
            starts anew. No label is lost: row t needs the tokens up to t, and its target is known.
        padding_free: runs the samples of a batch as one row without padding, whose positions start anew at each document;
            None: where attention has a kernel for that (flash_attention_*). The loss is the same.

    Raises:
        SpecError: the model cannot be cut into backbone and head, or `padding_free` is true and it does not keep documents
            apart by their positions.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossSettings,
        *,
        context: int,
        cross_documents: bool = False,
        padding_free: bool | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self._loss, self._context, self._cross_documents = loss, context, cross_documents
        self._parts = split(model)
        check_split(model, self._parts)
        check_loss(model)
        check_context(self._parts, context, "student")
        parts = self._parts
        can = isinstance(parts, CausalParts) and parts.packing == "positions"
        if padding_free and not can:
            raise SpecError(
                f"student {type(model).__name__}: padding_free: expected a model that keeps documents apart by positions "
                "that start anew; found one that does not; leave it out"
            )
        if padding_free is None:
            padding_free = isinstance(parts, CausalParts) and can and parts.has_varlen_attention
        self._padding_free = padding_free

    @property
    def num_classes(self) -> int:
        """Rows of the head."""
        return self._parts.vocab_size

    def head_parameters(self) -> list[nn.Parameter]:
        """Returns what the loss reads of the head: its weight, and its bias if it has one."""
        head: Any = getattr(self._parts.head, "_layer", self._parts.head)  # type: ignore[attr-defined]
        return list(head.parameters())

    def run_even_passes(self, agree: Callable[[int], int]) -> None:
        """Has each process run as many passes of a batch as the one with the most, as gathering weights needs.

        Args:
            agree: returns the largest of a number over all processes.
        """
        if isinstance(self._parts, CausalParts):
            self._parts = replace(self._parts, agree=agree)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles what runs below the head; the fused loss has kernels of its own."""
        for body in self._parts.bodies:
            body.compile(*args, **kwargs)

    def forward(
        self,
        batch: TokenBatch,
        labels: SoftLabels | VectorLabels | None,
        alpha: float,
        label_share: float | None = None,
        temperature: Any = None,
        teacher: OnlineTeacher | None = None,
    ) -> torch.Tensor:
        """Returns the mean loss of the batch's rows; `teacher` labels them where it is given.

        Cross-entropy is the mean over all rows, the soft part that over the rows with a label: of the batch, or with
        `label_share` of the step that the batch is a piece of (`Task.loss`). `temperature` is a number, or a tensor []
        where it is learnt; None is the one of the settings.
        """
        T = self._loss.temperature if temperature is None else temperature
        if teacher is not None:
            return self._online_loss(batch, teacher, alpha, T)
        if labels is None or (batch.labeled is None and label_share is None):
            return self._mixed(self._hidden(batch), labels, batch.targets, alpha, T, batch.sampling_log_probs)
        return self._sparse_loss(batch, labels, alpha, label_share or batch.num_labeled / batch.num_rows, T)

    def _sparse_loss(
        self, batch: TokenBatch, labels: SoftLabels | VectorLabels, alpha: float, label_share: float, T: Any
    ) -> torch.Tensor:
        """Mean over all rows of (1 - alpha) * CE + (alpha / label_share) * soft part, which unlabeled_dataset rows lack.

        Labeled and unlabeled_dataset rows go through the head apart, so that each goes once.
        """
        hidden_PD, targets_P, log_q_P = self._hidden(batch), batch.targets, batch.sampling_log_probs
        soft = alpha / label_share if label_share else alpha  # without any label, the soft part is 0 anyway
        weight = 1 - alpha + soft
        if batch.labeled is None:
            return weight * self._mixed(hidden_PD, labels, targets_P, soft / weight, T, log_q_P)
        # A stable sort and not nonzero, which would wait for a GPU.
        is_bare_P = torch.ones(batch.num_rows, dtype=torch.int8, device=hidden_PD.device)
        is_bare_P[batch.labeled] = 0
        bare = is_bare_P.argsort(descending=True, stable=True)[: batch.num_rows - batch.num_labeled]
        share = batch.num_labeled / batch.num_rows
        log_q_P = None if log_q_P is None else log_q_P[batch.labeled]
        loss = self._mixed(
            hidden_PD[batch.labeled], labels, targets_P[batch.labeled], soft / weight, T, log_q_P
        )
        loss = share * weight * loss
        if alpha == 1:
            return loss
        return loss + (1 - share) * (1 - alpha) * self._mixed(hidden_PD[bare], None, targets_P[bare], 0.0, T)

    def _mixed(
        self,
        hidden_PD: torch.Tensor,
        labels: SoftLabels | VectorLabels | None,
        targets_P: torch.Tensor,
        alpha: float,
        T: Any,
        log_q_P: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean of (1 - alpha) * CE + alpha * weight * T^2 * soft loss, fused unless T is learnt.

        Rows with weights of their own go through the head once for each part: fused, a row has one weight.
        """
        if labels is None or alpha == 0:
            return self._fused(hidden_PD, None, targets_P, 0.0, T)
        if isinstance(labels, VectorLabels):
            return self._fused(hidden_PD, labels, targets_P, alpha, T)
        self._check_padding(labels)
        weights_P = self._row_weights(hidden_PD, labels, targets_P)
        if isinstance(T, torch.Tensor) and T.requires_grad:
            return self._unfused(hidden_PD, labels, targets_P, alpha, T, weights_P)
        if weights_P is None:
            return self._fused(hidden_PD, labels, targets_P, alpha, T, log_q_P=log_q_P)
        share = weights_P.sum() / max(1, len(weights_P))  # a piece may have no label
        soft = share * self._fused(hidden_PD, labels, targets_P, 1.0, T, weights_P, log_q_P)
        if alpha == 1:
            return soft
        return (1 - alpha) * self._fused(hidden_PD, None, targets_P, 0.0, T) + alpha * soft

    def _check_padding(self, labels: SoftLabels) -> None:
        """Raises LabelError where classes that the student lacks have more of a label than a vocabulary's padding."""
        if self._has_classes(labels.num_classes):
            return
        lacks_PK = labels.ids.long() >= self.num_classes  # unused slots have no mass
        self._check_lacking(
            labels.log_probs.float().exp().masked_fill(~lacks_PK, 0.0).sum(1), labels.num_classes
        )

    def _shared_classes(self, teacher_PV: torch.Tensor) -> torch.Tensor:
        """Returns an online teacher's logits of the classes that the student has, too; the others must be padding."""
        num_classes = teacher_PV.shape[1]
        shared_PV = teacher_PV[:, : self.num_classes]
        if not self._has_classes(num_classes):
            self._check_lacking(-(shared_PV.logsumexp(1) - teacher_PV.logsumexp(1)).expm1(), num_classes)
        return shared_PV

    def _has_classes(self, num_classes: int) -> bool:
        return num_classes <= self.num_classes or self._loss.compares_ranks or self._loss.reads_rollouts

    def _check_lacking(self, lacking_P: torch.Tensor, num_classes: int) -> None:
        if len(lacking_P) == 0 or float(most := lacking_P.max()) <= MAX_LACKING_MASS:
            return
        row = int(lacking_P.argmax())
        raise LabelError(
            f"student: its head has {self.num_classes} classes, the teacher's {num_classes}; labeled row {row} gives "
            f"{float(most):.2g} to classes that the student lacks; expected at most {MAX_LACKING_MASS:g}, as of a "
            f"vocabulary's padding; build the student with {num_classes} classes",
            position=row,
        )

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
        if rows * classes > MAX_DENSE_ELEMENTS:
            raise SpecError(
                f"loss.curriculum: a learnt temperature needs the student's logits at once, {rows:,} rows of {classes:,} "
                f"classes; expected at most {MAX_DENSE_ELEMENTS:,} elements; raise train.accumulation_steps, lower "
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
        labels: SoftLabels | VectorLabels | None,
        targets_P: torch.Tensor,
        alpha: float,
        T: Any,
        weights_P: torch.Tensor | None = None,
        log_q_P: torch.Tensor | None = None,
    ) -> torch.Tensor:
        how: dict[str, Any] = {
            "temperature": T,
            "alpha": alpha,
            "weights_P": weights_P,
            "bias_V": self._parts.bias,
            "softcap": self._parts.softcap,
            "logit_scale": self._parts.logit_scale,
            "padded_vocabulary": True,
            "loss": self._loss.loss,
        }
        weight_VD = self._parts.weight
        if isinstance(labels, VectorLabels):
            return fused_hidden_loss(hidden_PD, weight_VD, labels, targets_P, **how)
        return fused_distillation_loss(
            hidden_PD, weight_VD, labels, targets_P, sampling_log_probs_P=log_q_P, **how
        )

    def _online_loss(self, batch: TokenBatch, teacher: OnlineTeacher, alpha: float, T: Any) -> torch.Tensor:
        """Mean loss against the full distributions of an online teacher.

        A batch of at most MAX_DENSE_ELEMENTS is compared at once; of a larger one, each chunk of the teacher's rows goes
        through the fused loss, so that memory holds one chunk of logits, and one gradient of the head per chunk.
        """
        hidden_PD, start, terms, log_q_P = self._hidden(batch), 0, [], batch.sampling_log_probs
        # Of two heads of other sizes (one tokenizer, padded otherwise), the classes that both have are compared.
        chunks = map(self._shared_classes, teacher.chunks(batch))
        if batch.num_rows * teacher.num_classes <= MAX_DENSE_ELEMENTS:
            return self._dense_loss(hidden_PD, torch.cat(list(chunks)), batch.targets, alpha, T, log_q_P)
        for teacher_PV in chunks:
            rows = slice(start, start + len(teacher_PV))
            term = self._mixed(
                hidden_PD[rows],
                dense_labels_unsorted(teacher_PV),
                batch.targets[rows],
                alpha,
                T,
                None if log_q_P is None else log_q_P[rows],
            )
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
        log_q_P: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean of (1 - alpha) * CE + alpha * T^2 * soft loss of whole distributions."""
        loss, logits_PV = self._loss.loss, self._parts.logits(hidden_PD)
        if loss.name != "forward_kl" or loss.standardize or self._loss.weights is not None:
            record = dense_labels_unsorted(teacher_PV)
            return distillation_loss(
                logits_PV,
                record,
                targets_P,
                temperature=T,
                alpha=alpha,
                padded_vocabulary=True,
                loss=loss,
                soft_weights=self._row_weights(hidden_PD, record, targets_P),
                sampling_log_probs=log_q_P,
            )
        log_s_PV = (logits_PV / T).log_softmax(-1)[:, : teacher_PV.shape[1]]
        log_p_PV = (teacher_PV / T).log_softmax(-1)
        soft = alpha * T**2 * kl_terms(log_p_PV, log_s_PV).sum(1).mean()
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

    def logits(self, batch: TokenBatch) -> torch.Tensor:
        """Returns float32 logits [P, V] of all rows of the batch; for who looks at a few, not for training."""
        return self._parts.logits(self._hidden(batch))

    def _hidden(self, batch: TokenBatch) -> torch.Tensor:
        """Returns the hidden states [P, D] of the rows."""
        tokens_BL, segments_BL, rows = batch.tokens, batch.segments, batch.rows
        length = tokens_BL.shape[1]
        if self._padding_free and length <= self._context:
            return self._hidden_without_padding(batch)
        if length > self._context:
            # Padded to whole windows, a window is a row of the reshaped batch.
            added = -length % self._context
            rows = rows + rows // length * added
            tokens_BL = nn.functional.pad(tokens_BL, (0, added)).view(-1, self._context)
            segments_BL = nn.functional.pad(segments_BL, (0, added), mode="replicate").view(-1, self._context)
        hidden_BLD = self._parts.hidden(tokens_BL, segments_BL, cross_documents=self._cross_documents)
        return hidden_BLD.flatten(0, 1)[rows]

    def _hidden_without_padding(self, batch: TokenBatch) -> torch.Tensor:
        """Returns the hidden states [P, D] of the rows, of all samples' tokens as one row of documents."""
        tokens_BL, device = batch.tokens, batch.tokens.device
        lengths_B = torch.from_numpy(batch.lengths).to(device)
        kept_BL = torch.arange(tokens_BL.shape[1], device=device) < lengths_B[:, None]
        first_B1 = torch.arange(len(tokens_BL), device=device)[:, None] * tokens_BL.shape[1]
        # Numbers of documents that no two samples share; whole samples where attention crosses documents.
        segments_BL = first_B1 + (0 if self._cross_documents else batch.segments)
        segments_1N = segments_BL.expand_as(tokens_BL)[kept_BL][None]
        place_P = (kept_BL.flatten().cumsum(0) - 1)[batch.rows]
        return self._parts.hidden(tokens_BL[kept_BL][None], segments_1N)[0, place_P]
