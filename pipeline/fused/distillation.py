"""The losses that a student learns by: cross-entropy and a soft part, mixed, as a weighted mean over positions.

Shape suffixes: `P` positions, `D` width of the hidden state, `V` classes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import LabelError
from pipeline.fused.gradients import HeadLoss
from pipeline.fused.head import Head
from pipeline.fused.mixture import BucketKl, Mixture, Soft, Uld
from pipeline.fused.rows import Rows
from pipeline.labels import SoftenedLabels, SoftLabels
from pipeline.losses import check_alpha, check_vocabulary

__all__ = ["fused_distillation_loss", "fused_uld_loss"]


def fused_distillation_loss(
    hidden_PD: Tensor,
    weight_VD: Tensor,
    labels: SoftLabels | None,
    targets_P: Tensor | None,
    *,
    temperature: Any,
    alpha: float,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    weights_P: Tensor | None = None,
    padded_vocabulary: bool = False,
    chunk_positions: int | None = None,
) -> Tensor:
    """Weighted mean of (1 - alpha) * cross-entropy + alpha * T^2 * forward KL, without the logits.

    Equal to `losses.distillation_loss` of logits = (hidden @ weight.T + bias) * logit_scale, then softcap *
    tanh(logits / softcap), with weights_P for a mask. A position of weight 0 is not computed at all, so it
    may hold anything and costs nothing. Gradients are computed in the forward pass, for whichever of
    hidden_PD, weight_VD and bias_V need one; labels, temperature and weights are constants. Not twice
    differentiable.

    Args:
        hidden_PD: [P, D] floating point, the input of the head.
        weight_VD: [V, D] floating point, the head's weight; may be the input embedding too (tied).
        labels: torch record of the P positions on the same device; may be None when alpha is 0.
        targets_P: [P] integer classes; a position with -100 has no cross-entropy, but counts in the mean, and
            so does its forward KL. May be None when alpha is 1.
        temperature: a number or a tensor [P] that needs no gradient; not read when alpha is 0.
        alpha: weight of the soft part, in [0, 1].
        bias_V: [V], or None.
        softcap: bound on the logits, above 0, or None.
        logit_scale: factor on the logits, before the softcap.
        weights_P: [P] bool or non-negative weights; None counts every position once.
        padded_vocabulary: accept a head of another number of classes than the labels'; what that means is in
            `losses.fit_vocabulary`.
        chunk_positions: rows of logits held at once; None picks 2^23 / V. Only rounding depends on it.

    Returns:
        Scalar, float32 (float64 for float64 hidden states); 0 with zero gradients where nothing has weight.
        The matrix products run in the inputs' dtype, under autocast in autocast's; the loss and the sums in
        float32. Gradients have their inputs' dtypes.

    Raises:
        LabelError: shapes, dtypes or settings do not fit, labels or targets are missing where needed, or a
            target or kept class is out of range (with `position`). On a GPU that costs one synchronisation
            in all, which also counts the positions with weight; a tensor temperature costs one more.
        TemperatureError: the labels cannot serve this temperature.

    Examples:
        >>> import torch
        >>> from pipeline.losses import distillation_loss
        >>> from pipeline.sparsify import top_k
        >>> hidden, weight, targets = torch.randn(6, 4), torch.randn(9, 4), torch.arange(6)
        >>> how = {"temperature": 2.0, "alpha": 0.5}
        >>> labels = top_k(torch.randn(6, 9), k=3)
        >>> found = fused_distillation_loss(hidden, weight, labels, targets, **how)
        >>> torch.testing.assert_close(found, distillation_loss(hidden @ weight.T, labels, targets, **how))

    References:
        Hinton, Vinyals, Dean 2015, arXiv 1503.02531, eq. (1) and section 2.1 (T^2).
        Hsu et al. 2024, "Liger Kernel", arXiv 2410.10989, section 3.2 (gradients in the forward pass).
    """
    if labels is not None and alpha > 0.0:
        check_vocabulary(labels.num_classes, weight_VD.shape[0], padded_vocabulary=padded_vocabulary)

    def divergence(softened: SoftenedLabels) -> Soft:
        assert labels is not None
        return BucketKl(softened, labels.num_classes, weight_VD.shape[0])

    head = Head(hidden_PD, weight_VD, bias_V, softcap, logit_scale, chunk_positions)
    return _mean_loss(head, labels, targets_P, weights_P, temperature, alpha, divergence)


def fused_uld_loss(
    hidden_PD: Tensor,
    weight_VD: Tensor,
    labels: SoftLabels | None,
    targets_P: Tensor | None,
    *,
    temperature: Any,
    alpha: float,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    weights_P: Tensor | None = None,
    chunk_positions: int | None = None,
) -> Tensor:
    """Weighted mean of (1 - alpha) * cross-entropy + alpha * `losses.uld`, without the logits.

    The paper's CE + lambda * ULD is this at alpha = lambda / (1 + lambda), times 1 + lambda. Targets are
    classes of the student's own vocabulary; that of the labels may be another.

    Args:
        hidden_PD: [P, D] floating point, the input of the head.
        weight_VD: [V, D] floating point, the head's weight.
        labels: torch record of the P positions, of any number of classes; may be None when alpha is 0.
        targets_P: [P] integer classes of the student; -100 has no cross-entropy. May be None when alpha is 1.
        temperature: a number or a tensor [P] that needs no gradient; not read when alpha is 0.
        alpha: weight of the soft part, in [0, 1].
        bias_V: [V], or None.
        softcap: bound on the logits, above 0, or None.
        logit_scale: factor on the logits, before the softcap.
        weights_P: [P] bool or non-negative weights; None counts every position once.
        chunk_positions: rows of logits held at once; None picks 2^23 / V.

    Returns:
        Scalar, as in `fused_distillation_loss`.

    Raises:
        LabelError: as in `fused_distillation_loss`.
        TemperatureError: the labels cannot serve this temperature.

    References:
        Boizard, El Haddad, Hudelot, Colombo 2024, arXiv 2402.12030, eqs. (4) and (5).
    """
    head = Head(hidden_PD, weight_VD, bias_V, softcap, logit_scale, chunk_positions)
    return _mean_loss(head, labels, targets_P, weights_P, temperature, alpha, Uld)


def _checked_parts(
    alpha: float, labels: SoftLabels | None, targets_P: Tensor | None, temperature: Any, num_positions: int
) -> tuple[SoftLabels | None, Tensor | None]:
    """Labels and targets, each None where alpha leaves it out."""
    check_alpha(alpha)
    if alpha < 1.0 and targets_P is None:
        raise LabelError("fused loss: expected targets for alpha below 1; found None; pass them or alpha=1")
    if alpha == 0.0:
        return None, targets_P
    if labels is None:
        raise LabelError("fused loss: expected labels for alpha above 0; found None; pass them or alpha=0")
    if not labels.is_torch:
        raise LabelError(
            "labels: expected torch tensors; found NumPy arrays; call labels.to_torch(device) first"
        )
    if len(labels) != num_positions:
        raise LabelError(
            f"labels: expected {num_positions} positions, one per row of hidden states; "
            f"found {len(labels)}; flatten batch and positions as the hidden states are"
        )
    if isinstance(temperature, Tensor) and temperature.requires_grad:
        raise LabelError(
            "loss.temperature: expected a constant; found a tensor that requires a gradient; "
            "detach it, or use losses.distillation_loss, which differentiates in the temperature"
        )
    return labels, targets_P if alpha < 1.0 else None


def _mean_loss(
    head: Head,
    labels: SoftLabels | None,
    targets_P: Tensor | None,
    weights_P: Tensor | None,
    temperature: Any,
    alpha: float,
    soft_loss: Callable[[SoftenedLabels], Soft],
) -> Tensor:
    hidden_PD, weight_VD, bias_V = head.tensors
    labels, targets_P = _checked_parts(alpha, labels, targets_P, temperature, len(hidden_PD))
    rows = Rows(head, labels, targets_P, weights_P)
    soft, T = None, 1.0
    if labels is not None:
        with torch.no_grad():
            soft = soft_loss(rows.softened(labels, temperature, head.dtype))
        T = rows.temperature(temperature, head.dtype)
    needs = tuple(
        x is not None and x.requires_grad and torch.is_grad_enabled() for x in (hidden_PD, weight_VD, bias_V)
    )
    loss: Tensor = HeadLoss.apply(
        hidden_PD, weight_VD, bias_V, head, rows, Mixture(rows, alpha, soft, T), needs
    )
    return loss
