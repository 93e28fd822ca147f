"""What is wrong with logits and targets, found out without waiting for the device where that can be."""

import torch
from torch import Tensor

from softcache.errors import LabelError
from softcache.labels.soft_labels import SoftLabels

__all__ = [
    "CELL_FAULT",
    "check_arguments",
    "checked_targets",
    "describe_fault",
    "logit_faults",
    "raise_on_fault",
    "record_faults",
]

CELL_FAULT = 4  # of a detector's outputs, see `cell_faults`
_FAULTS = (
    "no fault",
    "a NaN logit",
    "a +inf logit",
    "all logits -inf",
    "a box output or centerness that is not finite",
)


def logit_faults(logits_PV: Tensor) -> Tensor:
    """What is wrong with each row of logits, without waiting for the device.

    Args:
        logits_PV: [P, V] floating-point logits.

    Returns:
        [P] uint8 on the same device: 0 fine, 1 NaN, 2 +inf, 3 all -inf (`describe_fault` puts it in words).
        Some -inf logits are fine: those classes are masked.
    """
    peak = logits_PV.amax(dim=-1)  # carries a NaN along, is +inf or -inf exactly in the other two cases
    return (1 * peak.isnan() + 2 * peak.isposinf() + 3 * peak.isneginf()).to(torch.uint8)


def record_faults(labels: SoftLabels, logits_PV: Tensor) -> Tensor:
    """The codes [P] uint8 of `logit_faults` of the rows that labels were made of on a GPU, without reading those again.

    A label policy of softcache writes the code of a row with a fault, negative, in the place of its support. Labels of
    other policies without statistics are looked up in the logits; a NaN entropy of theirs counts as a NaN logit.
    """
    if labels.stats is None:
        return logit_faults(logits_PV)
    entropy_P, support_P = labels.stats[:, 0], labels.stats[:, 3]
    code_P = torch.where(support_P < 0, -support_P, entropy_P.isnan().to(support_P.dtype))
    return code_P.to(torch.uint8)


def describe_fault(code: int) -> str:
    """A code of `logit_faults` or `cell_faults` in words, such as 'no fault' or 'a NaN logit'."""
    return _FAULTS[code]


def check_arguments(logits_PV: Tensor, k: int, targets_P: Tensor | None) -> None:
    if logits_PV.ndim != 2 or not logits_PV.is_floating_point():
        raise LabelError(
            f"logits: expected floating-point [P, V]; found {logits_PV.dtype} {list(logits_PV.shape)}; "
            "flatten batch and positions into one dimension"
        )
    if not 1 <= k <= logits_PV.shape[1]:
        raise LabelError(
            f"labels.k: expected 1 to {logits_PV.shape[1]}, the number of classes; found {k}; "
            "lower k, or use policy = 'dense' to keep every class"
        )
    if targets_P is not None and (targets_P.shape != logits_PV.shape[:1] or targets_P.is_floating_point()):
        raise LabelError(
            f"targets: expected {list(logits_PV.shape[:1])} integers, one per row of logits; "
            f"found {targets_P.dtype} {list(targets_P.shape)}; give one class per position"
        )


def checked_targets(targets_P: Tensor, logits_PV: Tensor, *, check: bool) -> Tensor:
    num_classes = logits_PV.shape[1]
    targets_P = targets_P.to(torch.int64)
    if check or targets_P.device.type == "cpu":
        bad = (targets_P < 0) | (targets_P >= num_classes)
        if bool(bad.any()):
            position = int(bad.nonzero()[0, 0])
            raise LabelError(
                f"targets, position {position}: expected a class in [0, {num_classes}); "
                f"found {int(targets_P[position])}; check that teacher and source have the same classes",
                position=position,
            )
    return targets_P.to(logits_PV.device, non_blocking=True)


def raise_on_fault(logits_PV: Tensor) -> None:
    faults = logit_faults(logits_PV).cpu()
    if bool(faults.any()):
        position = int(faults.nonzero()[0, 0])
        raise LabelError(
            f"logits, position {position}: expected finite logits or -inf, not all -inf; "
            f"found {describe_fault(int(faults[position]))}"
            "; check the teacher's weights, dtype and input there",
            position=position,
        )
