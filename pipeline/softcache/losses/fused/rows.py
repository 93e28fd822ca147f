"""The positions that count: which they are, what belongs to them, and how much each counts.

Shape suffixes: `P` positions, `K` kept classes.

Targets and labels are checked here, before anything is computed: on a GPU the checks and the number of active
positions together are one wait.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from softcache.errors import LabelError
from softcache.labels import SoftenedLabels, SoftLabels
from softcache.losses.fused.head import Head
from softcache.losses.target_class import IGNORED, unknown_target, unknown_targets

__all__ = ["Rows", "kept_out_of_range"]


class Rows:
    """The positions with weight: which they are, what belongs to them, and how much each counts.

    Attributes:
        index_P: their places, or None where all have weight.
        active_P: [P] bool, the same over all positions.
        num_active: how many they are.
        targets_P: their targets, or None; checked, with `needs_truth` also against what the labels know.
        share_P: their weights over the largest one, or None where all are alike.
        scale: the largest weight over the sum of all.

    `checks_ids`: whether the kept classes' range is checked here, or by their reader.
    """

    def __init__(
        self,
        head: Head,
        labels: SoftLabels | None,
        targets_P: Tensor | None,
        weights_P: Tensor | None,
        *,
        needs_truth: bool = False,
        checks_ids: bool = True,
    ) -> None:
        num_positions, device = len(head.tensors[0]), head.tensors[0].device
        active_P = torch.ones(num_positions, dtype=torch.bool, device=device)
        self.share_P: Tensor | None = None
        self.scale: Any = 1.0 / max(1, num_positions)
        if weights_P is not None and num_positions > 0:
            weights_P = _per_position("weights", weights_P, num_positions).to(device, head.dtype)
            active_P, largest, total = weights_P > 0, weights_P.amax(), weights_P.sum()
            self.scale = largest / total.where(total > 0, 1.0)
            self.share_P = weights_P / largest
        if targets_P is not None:
            targets_P = _per_position("targets", targets_P, num_positions).to(device).long()
            if labels is None:
                active_P = active_P & (targets_P != IGNORED)
        checked = labels if checks_ids else None
        self.num_active = _check_and_count(active_P, targets_P, checked, head.num_classes, needs_truth)
        self.active_P = active_P
        self.index_P: Tensor | None = None
        if self.num_active < num_positions:  # a stable sort, not nonzero, which would wait for the GPU again
            self.index_P = active_P.byte().argsort(descending=True, stable=True)[: self.num_active]
        self.share_P = None if self.share_P is None else self.take(self.share_P)
        self.targets_P = None if targets_P is None else self.take(targets_P)

    def take(self, x: Tensor) -> Tensor:
        """The active rows of an array over all positions."""
        return x if self.index_P is None else x.index_select(0, self.index_P)

    def of(self, softened: SoftenedLabels, dtype: torch.dtype) -> SoftenedLabels:
        """The active rows of labels at one temperature."""
        softened = replace(softened, ids=softened.ids.long())
        return softened.map_arrays(lambda x: self.take(x).to(dtype if x.is_floating_point() else x.dtype))

    def temperature(self, temperature: Any, dtype: torch.dtype) -> Any:
        """A number, or a tensor over the active rows."""
        if not isinstance(temperature, Tensor):
            return float(temperature)
        temperature = temperature.detach().to(self.active_P.device, dtype).reshape(-1)
        return self.take(temperature.expand(len(self.active_P)))


def _check_and_count(
    active_P: Tensor,
    targets_P: Tensor | None,
    labels: SoftLabels | None,
    num_student_classes: int,
    needs_truth: bool,
) -> int:
    """Number of active rows; raises if one has an id out of range. All of it is one wait for the GPU."""
    if len(active_P) == 0:
        return 0
    bad_P = torch.zeros_like(active_P)
    if targets_P is not None:
        outside_P = (targets_P < 0) | (targets_P >= num_student_classes)
        bad_P |= outside_P & (targets_P != IGNORED)
    bad_label_P = torch.zeros_like(active_P)
    if labels is not None:
        ids_PK = labels.ids.long()
        empty_PK = (ids_PK == labels.num_classes) & (labels.log_probs == -torch.inf)
        bad_label_P = ((ids_PK < 0) | ((ids_PK >= labels.num_classes) & ~empty_PK)).any(dim=1)
    unknown_P = torch.zeros_like(active_P)
    if needs_truth and labels is not None and targets_P is not None:
        unknown_P = unknown_targets(labels, targets_P)
    firsts = [(bad & active_P).int() for bad in (bad_P, bad_label_P, unknown_P)]
    figures = [active_P.sum(), *(x for bad in firsts for x in (bad.amax(), bad.argmax()))]
    found = torch.stack([x.long() for x in figures]).tolist()
    count, any_target, first_target, any_label, first_label, any_unknown, first_unknown = found
    if any_target:
        assert targets_P is not None
        raise LabelError(
            f"targets, position {first_target}: expected a class in [0, {num_student_classes}) or -100; "
            f"found {int(targets_P[first_target])}; check that targets are in the student's vocabulary",
            position=first_target,
        )
    if any_label:
        assert labels is not None
        raise kept_out_of_range(labels, first_label)
    if any_unknown:
        assert targets_P is not None
        raise unknown_target(first_unknown, int(targets_P[first_unknown]))
    return count


def kept_out_of_range(labels: SoftLabels, position: int) -> LabelError:
    """The error of a record whose kept classes at a position are none of its classes."""
    return LabelError(
        f"labels.ids, position {position}: expected classes in [0, {labels.num_classes}), or "
        f"{labels.num_classes} with log_prob -inf in unused slots; found "
        f"{labels.ids[position].long().tolist()}; check the cache with `softcache verify`",
        position=position,
    )


def _per_position(name: str, x: Tensor, num_positions: int) -> Tensor:
    if tuple(x.shape) != (num_positions,):
        raise LabelError(
            f"{name}: expected [{num_positions}], one per row of hidden states; found {list(x.shape)}; "
            "flatten batch and positions as the hidden states are"
        )
    return x
