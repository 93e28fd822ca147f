"""A smaller record from a bigger one: classes move from their slots into the tail.

Shape suffixes: `P` positions, `K` slots, `G` grid of temperatures.

A record of the K most likely classes knows everything that a record of fewer would: the slots in front are the same, and
each class that loses its slot adds p_j^(1/T) to the tail's sum at every grid temperature. So the smaller record is the
one that a capture would have made, its `ids` and `log_probs` to the bit and its `log_tail` to the rounding of float32
(done in float64 here). Where `log_probs` are float16, what moves is known to 2^-11 of its logarithm only.
"""

from dataclasses import replace
from typing import Any

from array_api_compat import array_namespace, is_numpy_array

from softcache.errors import LabelError, TemperatureError
from softcache.labels.soft_labels import Array, SoftLabels
from softcache.labels.tail import check_temperatures, log_sum_exp

__all__ = ["truncate_labels"]


def truncate_labels(
    labels: SoftLabels, k: int, *, p: float | None = None, temperatures: tuple[float, ...] | None = None
) -> SoftLabels:
    """The record that the first k slots would make.

    Args:
        labels: of kept classes, most likely first; none of them drawn.
        k: slots, 1 to `labels.k`.
        p: in (0, 1]; a row keeps no more of its slots than hold this mass at T=1, as `sparsify.top_p` does. None keeps
            all of them.
        temperatures: the grid; of `labels.temperatures`, and anything else only if no class is missing. None keeps it.

    Returns:
        A record of k slots; `log_tail` new, the other columns share memory where nothing changed.

    Raises:
        LabelError: classes were drawn (a draw of N is not the start of a draw of more), or k or p is out of range.
        TemperatureError: a temperature at which the tail is not known.

    Example:
        >>> import numpy as np
        >>> labels = SoftLabels(
        ...     ids=np.array([[2, 0, 1]]),
        ...     log_probs=np.log(np.array([[0.5, 0.25, 0.125]])),
        ...     log_tail=np.log(np.array([[0.125]])),
        ...     num_classes=4,
        ...     temperatures=(1.0,),
        ... )
        >>> np.exp(truncate_labels(labels, 1).log_tail).round(3).tolist()
        [[0.5]]
    """
    if labels.sampling is not None:
        raise LabelError(
            f"truncate: expected labels of the most likely classes; found classes drawn at random ({labels.sampling}); "
            "what fewer draws would have drawn is not in them: capture again, or shrink a cache of every class"
        )
    if not 1 <= k <= labels.k:
        raise LabelError(
            f"truncate: expected k from 1 to {labels.k}, the slots there are; found {k}; lower k"
        )
    if p is not None and not 0.0 < p <= 1.0:
        raise LabelError(f"truncate: expected a mass p in (0, 1]; found {p}; 0.9 keeps nine tenths of it")
    xp = array_namespace(labels.ids)
    grid = labels.temperatures if temperatures is None else temperatures
    log_tail_PG = _tail_at(labels, grid)
    ids_PK, log_probs_PK = labels.ids[:, :k], labels.log_probs[:, :k]
    dropped_PK = xp.arange(labels.k, device=labels.ids.device) >= k
    if p is not None:
        kept_PK = _holding(log_probs_PK, p)
        ids_PK = xp.where(kept_PK, ids_PK, xp.asarray(labels.num_classes, dtype=ids_PK.dtype))
        log_probs_PK = xp.where(kept_PK, log_probs_PK, xp.asarray(-xp.inf, dtype=log_probs_PK.dtype))
        rest_PK = xp.broadcast_to(dropped_PK[None, k:], (len(labels), labels.k - k))
        dropped_PK = xp.concat((~kept_PK, rest_PK), axis=1)
    moved_PK = xp.where(dropped_PK, xp.astype(labels.log_probs, xp.float64), -xp.inf)
    moved_PG = xp.stack([log_sum_exp(moved_PK * (1.0 / t)) for t in grid], axis=1)
    log_tail_PG = xp.logaddexp(xp.astype(log_tail_PG, xp.float64), moved_PG)
    return replace(
        labels,
        ids=ids_PK,
        log_probs=log_probs_PK,
        log_tail=xp.astype(log_tail_PG, labels.log_tail.dtype),
        temperatures=grid,
    )


def _tail_at(labels: SoftLabels, grid: tuple[float, ...]) -> Array:
    """The columns of `log_tail` at the temperatures of a grid."""
    check_temperatures(grid)
    xp = array_namespace(labels.log_tail)
    complete = bool(xp.all(labels.log_tail == -xp.inf))
    nothing_P = labels.log_tail[:, 0]  # -inf if every class is there, and then it is so at any temperature
    columns = []
    for t in grid:
        if t in labels.temperatures:
            columns.append(labels.log_tail[:, labels.temperatures.index(t)])
        elif complete:
            columns.append(nothing_P)
        else:
            raise TemperatureError(
                f"truncate: expected temperatures of the grid {list(labels.temperatures)}; found {t:g}, at which the mass "
                "of the dropped classes was not stored; leave it out, or capture with it in labels.temperatures"
            )
    return xp.stack(columns, axis=1)


def _holding(log_probs_PK: Array, p: float) -> Array:
    """Which slots a mass of p needs, by the very float32 steps of `sparsify.top_p`: torch's, for NumPy arrays too."""
    import torch

    is_numpy = is_numpy_array(log_probs_PK)
    probs_PK: Any = torch.from_numpy(log_probs_PK.astype("float32")) if is_numpy else log_probs_PK
    probs_PK = (probs_PK if probs_PK.dtype == torch.float64 else probs_PK.float()).contiguous().exp()
    kept_PK = probs_PK.cumsum(dim=1) - probs_PK < p
    kept_PK[:, 0] = True
    return kept_PK.numpy() if is_numpy else kept_PK
