"""The usual loss in one operation of autograd: forward divergence with the tail as a bucket, and cross-entropy.

With p the teacher's and s the student's masses at T in the K kept buckets and the tail, q the student's at 1, y the
target, and s_j the student's mass of class j:

    loss = mean of (1 - alpha) (-log q_y) + alpha T^2 sum p log(p / s)
    d loss / d z_j = (1 - alpha) (q_j - [j = y]) + alpha T (s_j - p_j)                        j kept
                     (1 - alpha) (q_j - [j = y]) + alpha T (s_tail - p_tail) s_j / s_tail     j dropped

over the number of positions. The gradient is made with the value; backward only scales it. For small batches it is the
number of operations that takes the time, not the numbers in them: about 30 here, where autograd over the parts of
`losses.distillation` needs 130, and one for few classes on a CPU (`losses.cpu_kernel`). The value is the one of those
parts, and so is the gradient, to rounding (tests).

Shape suffixes: `P` positions, `V` classes, `K` kept classes, `B` buckets: K and the tail.
"""

from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from softcache.errors import LabelError
from softcache.labels import SoftLabels
from softcache.losses.buckets import check_student, promote_dtype
from softcache.losses.registry import Loss
from softcache.runtime.jit import compiled_is_on

__all__ = ["direct_loss", "is_fast_path"]

_MOST_CLASSES = 256  # for `losses.cpu_kernel`; beyond, torch with several threads catches up
_SUM = 2  # ATen's number for that reduction
_IGNORED = -100
_NO_TARGETS = np.zeros(0, np.int64)


def is_fast_path(loss: Loss, logits_PV: Tensor, labels: SoftLabels, temperature: Any) -> bool:
    """Whether `direct_loss` is this loss: a divergence that it implements with the tail as a bucket, at one constant
    temperature, of a student with the labels' classes and labels that are constants and were not drawn."""
    return (
        "logits" in loss.kind.fast_paths
        and compiled_is_on()
        and loss.tail == "bucket"
        and not loss.standardize
        and isinstance(temperature, int | float)
        and labels.sampling is None
        and logits_PV.ndim == 2
        and len(logits_PV) > 0
        and logits_PV.shape[1] == labels.num_classes
        and not (labels.is_torch and (labels.log_probs.requires_grad or labels.log_tail.requires_grad))
    )


def direct_loss(
    logits_PV: Tensor, labels: SoftLabels, targets_P: Tensor | None, *, temperature: float, alpha: float
) -> Tensor:
    """Mean of (1 - alpha) * cross-entropy + alpha * T^2 * forward divergence, where `is_fast_path`.

    Args:
        logits_PV: [P, V] floating point, P > 0.
        labels: torch record of the P positions.
        targets_P: [P] integer classes, -100 for none; may be None when alpha is 1.
        temperature: a number.
        alpha: weight of the soft part, in (0, 1].

    Returns:
        Scalar, float32, or float64 if logits or labels are. Not twice differentiable.

    Raises:
        LabelError, TemperatureError: as `forward_kl` raises.
    """
    check_student(logits_PV, labels)
    if targets_P is not None:
        targets_P = targets_P.long()
    T = float(temperature)
    if _is_small(logits_PV, labels):
        return cast(Tensor, _Small.apply(logits_PV, labels, targets_P, T, alpha))
    return cast(Tensor, _Direct.apply(logits_PV, labels.buckets_at(T), labels.ids, targets_P, T, alpha))


def _is_small(logits_PV: Tensor, labels: SoftLabels) -> bool:
    on_cpu = logits_PV.device.type == labels.ids.device.type == "cpu"
    is_double = torch.float64 in (logits_PV.dtype, labels.log_probs.dtype, labels.log_tail.dtype)
    return on_cpu and not is_double and labels.num_classes <= _MOST_CLASSES


class _Scaled(torch.autograd.Function):
    """A value whose gradient was made with it, and is the one thing that was saved."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_PV,) = ctx.saved_tensors
        return (gradient_PV * grad_output).to(ctx.dtype), *(None,) * ctx.num_constants


class _Small(_Scaled):
    """By `losses.cpu_kernel`."""

    @staticmethod
    def forward(
        ctx: Any, logits_PV: Tensor, labels: SoftLabels, targets_P: Tensor | None, T: float, alpha: float
    ) -> Tensor:
        from softcache.losses.cpu_kernel import mixed_loss

        z_PV = promote_dtype(logits_PV.detach()).contiguous()
        log_masses_PK, log_tail_P = labels.masses_at(T)
        targets = _NO_TARGETS if targets_P is None or alpha == 1.0 else targets_P.contiguous().numpy()
        if len(targets) not in (0, len(z_PV)):
            raise LabelError(
                f"targets: expected [{len(z_PV)}], one per row of logits; found {list(targets.shape)}"
            )
        gradient_PV = torch.empty_like(z_PV)
        value, bad = mixed_loss(
            z_PV.numpy(),
            log_masses_PK.contiguous().numpy(),
            log_tail_P.contiguous().numpy(),
            labels.ids.contiguous().numpy(),
            targets,
            T,
            alpha,
            gradient_PV.numpy(),
        )
        if bad >= 0:
            raise _bad_row(bad, labels, targets)
        ctx.save_for_backward(gradient_PV)
        ctx.dtype, ctx.num_constants = logits_PV.dtype, 4
        return torch.tensor(value, dtype=z_PV.dtype)


def _bad_row(row: int, labels: SoftLabels, targets: np.ndarray) -> LabelError:
    found = labels.ids[row].long().tolist()
    if any(not 0 <= number <= labels.num_classes for number in found):
        return LabelError(
            f"labels.ids, position {row}: expected classes in [0, {labels.num_classes}), or {labels.num_classes} in "
            f"unused slots; found {found}; check the cache with `softcache verify`",
            position=row,
        )
    return LabelError(
        f"targets, position {row}: expected a class in [0, {labels.num_classes}) or -100; found {int(targets[row])}; "
        "check that targets are in the student's vocabulary",
        position=row,
    )


class _Direct(_Scaled):
    """By torch's operations."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_PV: Tensor,
        log_p_PB: Tensor,
        ids_PK: Tensor,
        targets_P: Tensor | None,
        T: float,
        alpha: float,
    ) -> Tensor:
        with torch.autocast(logits_PV.device.type, enabled=False):
            z_PV = promote_dtype(logits_PV)
            z_PV = z_PV.to(torch.promote_types(z_PV.dtype, log_p_PB.dtype))
            value, gradient_PV = _soft_part(z_PV, log_p_PB.to(z_PV.dtype), ids_PK.long(), T, alpha)
            if alpha < 1.0:
                assert targets_P is not None
                hard, hard_PV = _hard_part(z_PV, targets_P, (1.0 - alpha) / len(z_PV))
                value, gradient_PV = value + hard, gradient_PV.add_(hard_PV)
        ctx.save_for_backward(gradient_PV)
        ctx.dtype, ctx.num_constants = logits_PV.dtype, 5
        return value


def _soft_part(
    z_PV: Tensor, log_p_PB: Tensor, ids_PK: Tensor, T: float, alpha: float
) -> tuple[Tensor, Tensor]:
    """alpha * T^2 * mean divergence, and its gradient by the logits [P, V]."""
    # One column more than classes, of no mass, for unused slots (id V) to read and to write.
    wide_PV = F.pad(z_PV if T == 1.0 else z_PV / T, (0, 1), value=-torch.inf)
    kept_PK = wide_PV.gather(1, ids_PK)
    rest_PV = wide_PV.scatter_(1, ids_PK, -torch.inf)
    tail_P1 = rest_PV.logsumexp(dim=1, keepdim=True)
    log_s_PB = torch.cat([kept_PK, tail_P1], dim=1).log_softmax(dim=1)
    p_PB = log_p_PB.exp()
    more_PB = torch.where(p_PB > 0, log_p_PB - log_s_PB, 0.0)
    value = torch.dot(p_PB.flatten(), more_PB.flatten()) * (alpha * T**2 / len(z_PV))
    slope_PB = log_s_PB.exp_().sub_(p_PB).mul_(alpha * T / len(z_PV))
    # Shares of nothing are 0 / 0; a NaN of the student's is one in its slope, too, and stays.
    share_PV = rest_PV.softmax(dim=1).nan_to_num_(nan=0.0)
    gradient_PV = share_PV.mul_(slope_PB[:, -1:]).scatter_add_(1, ids_PK, slope_PB[:, :-1])
    return value, gradient_PV[:, :-1]


def _hard_part(z_PV: Tensor, targets_P: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """weight * sum of cross-entropy, and its gradient by the logits [P, V]."""
    log_q_PV = z_PV.log_softmax(dim=1)
    total, count = torch.ops.aten.nll_loss_forward(log_q_PV, targets_P, None, _SUM, _IGNORED)
    one = torch.full_like(total, weight)
    by_log_q_PV = torch.ops.aten.nll_loss_backward(one, log_q_PV, targets_P, None, _SUM, _IGNORED, count)
    gradient_PV = torch.ops.aten._log_softmax_backward_data(by_log_q_PV, log_q_PV, 1, z_PV.dtype)
    return total * weight, gradient_PV
