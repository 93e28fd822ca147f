"""The ground truth of mixed images: two classes each, and the share of the first.

Shape suffixes: `P` label rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["MixedTargets"]


@dataclass(frozen=True, eq=False)
class MixedTargets:
    """Targets of rows of which each is a mixture: `shares` of class `first`, the rest of class `second`.

    It stands where a tensor of classes does, and is none: what reads one class per row fails on it instead of taking the
    first for the truth. `cross_entropy` and `distillation_loss` take it.

    Attributes:
        first: [P] int64, the class of each sample itself.
        second: [P] int64, the class of the sample that is mixed in.
        shares: [P] float32 in [0, 1], of `first`.
    """

    first: Tensor
    second: Tensor
    shares: Tensor

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, rows: Any) -> MixedTargets:
        return MixedTargets(self.first[rows], self.second[rows], self.shares[rows])

    def to(self, device: torch.device, *, non_blocking: bool = False) -> MixedTargets:
        """Returns the targets on a device."""
        moved = (
            part.to(device, non_blocking=non_blocking) for part in (self.first, self.second, self.shares)
        )
        return MixedTargets(*moved)

    def pin_memory(self) -> MixedTargets:
        return MixedTargets(self.first.pin_memory(), self.second.pin_memory(), self.shares.pin_memory())

    @staticmethod
    def own_classes(targets: Any) -> Any:
        """Returns [P] the classes of the samples themselves, of targets of either kind."""
        return targets.first if isinstance(targets, MixedTargets) else targets

    @classmethod
    def of_single(cls, classes_P: Tensor) -> MixedTargets:
        """Returns the targets of rows that are not mixed."""
        import torch

        return cls(classes_P, classes_P, torch.ones(len(classes_P), device=classes_P.device))

    @classmethod
    def concat(cls, parts: Sequence[Tensor | MixedTargets]) -> Tensor | MixedTargets:
        """Returns all rows in order; a tensor where no part is mixed, else those of a tensor as mixtures of one class."""
        import torch

        if not any(isinstance(part, MixedTargets) for part in parts):
            return torch.cat([part for part in parts if isinstance(part, torch.Tensor)])
        mixed = [part if isinstance(part, MixedTargets) else cls.of_single(part) for part in parts]
        return cls(
            *(torch.cat([getattr(part, name) for part in mixed]) for name in ("first", "second", "shares"))
        )
