"""`fused.mixture` by compiled rows (`fused.kernels`), where a CPU computes in float32: for losses that are linear in the
student's log-masses, at one temperature, with a tail that is a bucket or nothing.

torch takes about fifteen passes over a chunk for the same; the chunk does not fit a core's cache, a row does.

Shape suffixes: `P` positions, `V` classes, `K` kept classes.
"""

from __future__ import annotations

import itertools
import threading

import torch
from torch import Tensor

from pipeline.fused.head import Head
from pipeline.fused.mixture import Mixture
from pipeline.fused.soft import Buckets
from pipeline.losses.truth import IGNORED

__all__ = ["CompiledMixture", "is_compiled"]


def is_compiled(head: Head, mixture: Mixture) -> bool:
    """Whether `CompiledMixture` can take the place of a mixture."""
    return (
        head.dtype == torch.float32
        and head.weight_VD.device.type == "cpu"
        and isinstance(mixture.soft, Buckets)
        and mixture.soft.is_linear
        and isinstance(mixture.T, float)
        and not mixture.standardize
        and mixture.truth_P is None
    )


class CompiledMixture:
    """The same loss and gradient as the mixture that it is made of."""

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture

    def __call__(
        self, head: Head, logits_PV: Tensor, part: slice, needs_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """The loss [P] and the gradient [P, V], which overwrites the logits, needed or not."""
        mixture = self._mixture
        soft, T, num_rows = mixture.soft, mixture.T, len(logits_PV)
        assert isinstance(soft, Buckets)
        ids_PK = soft.kept(logits_PV, part)
        targets_P = torch.zeros(num_rows, dtype=torch.int64)
        hard_P = torch.zeros(num_rows)
        if mixture.targets_P is not None:
            targets_P = mixture.targets_P[part]
            hard_P = (1.0 - mixture.alpha) * (targets_P != IGNORED).to(torch.float32)
        factor = mixture.alpha * T**soft.temperature_power
        loss_P = torch.empty(num_rows)
        _mix((logits_PV, ids_PK, *soft.linear_terms(), factor, T, hard_P, targets_P, loss_P))
        return loss_P, logits_PV


def _mix(arguments: tuple[Tensor | float, ...]) -> None:
    """Runs the kernel over the rows, shared out over as many threads as torch would take."""
    from pipeline.fused.kernels import mix_rows

    arrays = [x.contiguous().numpy() if isinstance(x, Tensor) else x for x in arguments]
    num_rows = len(arrays[0])  # type: ignore[arg-type]
    count = max(1, min(torch.get_num_threads(), num_rows))
    bounds = [num_rows * number // count for number in range(count + 1)]
    threads = [
        threading.Thread(target=mix_rows, args=(*arrays, first, stop))
        for first, stop in itertools.pairwise(bounds[1:])
    ]
    for thread in threads:
        thread.start()
    mix_rows(*arrays, 0, bounds[1])
    for thread in threads:
        thread.join()
