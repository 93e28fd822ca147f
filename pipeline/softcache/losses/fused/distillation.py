"""The losses that a student learns by: cross-entropy and a soft part, mixed, as a weighted mean over positions.

Shape suffixes: `P` positions, `D` width of the hidden state, `V` classes.
"""

from typing import Any

import torch
from torch import Tensor

from softcache.errors import LabelError
from softcache.labels import SoftLabels
from softcache.losses import Loss, check_vocabulary
from softcache.losses.distillation import check_needs
from softcache.losses.fused.autograd import HeadLoss
from softcache.losses.fused.chunk import ChunkObjective
from softcache.losses.fused.cpu import CompiledMixture, RecordMixture, is_compiled, is_record
from softcache.losses.fused.gpu import TritonObjective, is_triton
from softcache.losses.fused.head import Head
from softcache.losses.fused.rows import Rows
from softcache.losses.fused.sampled import SampledObjective
from softcache.losses.fused.soft import Buckets, ChunkLoss, Uld
from softcache.losses.registry import as_loss
from softcache.losses.sampled import check_samples
from softcache.losses.standardize import check_tails, teacher_temperature
from softcache.losses.target_class import dropped_log_probs, teacher_log_probs

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
    loss: Loss | str = "forward_kl",
    sampling_log_probs_P: Tensor | None = None,
) -> Tensor:
    """Weighted mean of (1 - alpha) * cross-entropy + alpha * T^2 * soft loss, without the logits.

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
            so does its soft loss (dkd and nkd have none there). May be None when alpha is 1, but for dkd and nkd.
        temperature: a number or a tensor [P] that needs no gradient; not read when alpha is 0.
        alpha: weight of the soft part, in [0, 1].
        bias_V: [V], or None.
        softcap: bound on the logits, above 0, or None.
        logit_scale: factor on the logits, before the softcap.
        weights_P: [P] bool or non-negative weights; None counts every position once.
        padded_vocabulary: accept a head of another number of classes than the labels'; what that means is in
            `losses.fit_vocabulary`.
        chunk_positions: rows of logits held at once; None picks 2^23 / V. Only rounding depends on it.
        loss: the soft part: a name, or what `losses.make_loss` gives; all of them, with every tail mode. "uniform"
            and labels of all classes need about ten chunks' memory; `standardize` one more, and one more wait for a
            GPU.
        sampling_log_probs_P: [P] of the targets by the policy that sampled them; for "policy_gradient".

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
        >>> from softcache.losses import distillation_loss
        >>> from softcache.labels.sparsify import top_k
        >>> hidden, weight, targets = torch.randn(6, 4), torch.randn(9, 4), torch.arange(6)
        >>> how = {"temperature": 2.0, "alpha": 0.5}
        >>> labels = top_k(torch.randn(6, 9), k=3)
        >>> found = fused_distillation_loss(hidden, weight, labels, targets, **how)
        >>> torch.testing.assert_close(found, distillation_loss(hidden @ weight.T, labels, targets, **how))

    References:
        Hinton, Vinyals, Dean 2015, arXiv 1503.02531, eq. (1) and section 2.1 (T^2).
        Hsu et al. 2024, "Liger Kernel", arXiv 2410.10989, section 3.2 (gradients in the forward pass).
    """
    head = Head(hidden_PD, weight_VD, bias_V, softcap, logit_scale, chunk_positions)
    loss = as_loss(loss)
    if labels is not None and alpha > 0.0 and not loss.kind.compares_ranks:
        check_vocabulary(labels.num_classes, head.num_classes, padded_vocabulary=padded_vocabulary)
    return _mean_loss(head, loss, labels, targets_P, weights_P, temperature, alpha, sampling_log_probs_P)


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
    return _mean_loss(head, as_loss("uld"), labels, targets_P, weights_P, temperature, alpha)


def _checked_parts(
    loss: Loss,
    alpha: float,
    labels: SoftLabels | None,
    targets_P: Tensor | None,
    temperature: Any,
    num_positions: int,
) -> tuple[SoftLabels | None, Tensor | None]:
    """Labels and targets, each None where the mixture leaves it out."""
    check_needs(loss, labels, targets_P, alpha, "fused loss")
    if alpha == 0.0 or labels is None:
        return None, targets_P
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
    loss.check_labels(labels)
    return labels, targets_P if alpha < 1.0 or loss.kind.needs_target else None


def _mean_loss(
    head: Head,
    loss: Loss,
    labels: SoftLabels | None,
    targets_P: Tensor | None,
    weights_P: Tensor | None,
    temperature: Any,
    alpha: float,
    log_q_P: Tensor | None = None,
) -> Tensor:
    hidden_PD, weight_VD, bias_V = head.tensors
    labels, targets_P = _checked_parts(loss, alpha, labels, targets_P, temperature, len(hidden_PD))
    if labels is not None:
        check_tails(loss, labels, temperature, active_P=None if weights_P is None else weights_P > 0)
    as_it_is = labels is not None and is_record(head, loss, labels, temperature)
    rows = Rows(
        head, labels, targets_P, weights_P, needs_truth=loss.kind.needs_target, checks_ids=not as_it_is
    )
    with torch.no_grad():
        run: ChunkObjective | CompiledMixture | RecordMixture | SampledObjective | TritonObjective
        if labels is not None and loss.kind.of_samples is not None:
            run = _sampled(loss, labels, targets_P, log_q_P, rows, head, temperature, alpha)
        elif labels is not None and as_it_is:
            run = RecordMixture(loss, labels, rows, float(temperature), alpha)
        else:
            run = ChunkObjective(rows.targets_P, 0.0, None, 1.0)
            if labels is not None:
                run = _mixture(loss, labels, targets_P, rows, head, temperature, alpha)
            if is_triton(head, run):
                run = TritonObjective(head, run)
            elif is_compiled(head, run):
                run = CompiledMixture(run)
    needs = tuple(
        x is not None and x.requires_grad and torch.is_grad_enabled() for x in (hidden_PD, weight_VD, bias_V)
    )
    given = (hidden_PD, weight_VD, bias_V, head, rows, run, needs)
    if isinstance(run, TritonObjective) and torch.compiler.is_compiling():
        # Between two graphs: torch.compile would trace the launches of kernels, chunk by chunk.
        return torch.compiler.disable(_apply)(*given)
    return _apply(*given)


def _apply(*given: Any) -> Tensor:
    value: Tensor = HeadLoss.apply(*given)
    return value


def _sampled(
    loss: Loss,
    labels: SoftLabels,
    targets_P: Tensor | None,
    log_q_P: Tensor | None,
    rows: Rows,
    head: Head,
    temperature: Any,
    alpha: float,
) -> SampledObjective:
    """The loss of the active rows' sampled tokens, which are their targets."""
    assert targets_P is not None
    assert rows.targets_P is not None
    targets_P = targets_P.to(rows.active_P.device).long()
    log_q_P = None if log_q_P is None else log_q_P.to(rows.active_P.device)
    log_q_P = check_samples(loss, temperature, log_q_P, targets_P, active_P=rows.active_P)
    log_p_P = rows.take(teacher_log_probs(labels, targets_P)).to(head.dtype)
    log_q_P = None if log_q_P is None else rows.take(log_q_P).to(head.dtype)
    return SampledObjective(loss, rows.targets_P, log_p_P, log_q_P, alpha)


def _mixture(
    loss: Loss,
    labels: SoftLabels,
    targets_P: Tensor | None,
    rows: Rows,
    head: Head,
    temperature: Any,
    alpha: float,
) -> ChunkObjective:
    """The loss of a chunk of the active rows, where there is a soft part."""
    T, dtype = temperature, head.dtype
    if loss.standardize:
        T = teacher_temperature(labels, temperature, active_P=rows.active_P)
    softened = labels.at_temperature(T)
    log_dropped_P = truth_P = None
    if loss.kind.needs_target:
        assert targets_P is not None
        log_dropped_P = rows.take(dropped_log_probs(labels, softened, T)).to(dtype)
        if loss.kind.weighs_truth:
            targets_P = targets_P.to(softened.ids.device).long()
            truth_P = rows.take(teacher_log_probs(labels, targets_P)).to(dtype).exp()
    soft: ChunkLoss = (
        Uld(rows.of(softened, dtype))
        if loss.kind.formula is None
        else Buckets(
            loss,
            rows.of(softened, dtype),
            (labels.num_classes, head.num_classes),
            rows.targets_P,
            log_dropped_P,
        )
    )
    return ChunkObjective(
        rows.targets_P if alpha < 1.0 or loss.kind.weighs_truth else None,
        alpha,
        soft,
        rows.temperature(temperature, dtype),
        standardize=loss.standardize,
        truth_P=truth_P,
    )
