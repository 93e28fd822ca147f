"""The mass of the dropped classes at any temperature.

Shape suffixes: `P` positions, `G` grid of temperatures.

With beta = 1/T, a record stores F(beta) = log sum of p_j^beta over the dropped classes, at the grid. F is
smooth, convex and falling; F(0), the log of the number of dropped classes, costs nothing; F'(0) and F'(1)
follow from the record's stats. Between two nodes F is a rational quadratic through both values and slopes
(Gregory and Delbourgo 1982), which falls whatever the slopes. Inner slopes are those of the polynomial
through all nodes, clipped between the neighbouring chords. The value is clipped to what convexity allows:
not above its chord, not below the neighbouring chords extended. So it cannot ring, and it is exact at the
grid.

Worst absolute error of the tail's mass after normalisation; T in [1, 50], V = 10 to 262144, K = 1 to 256,
default grid, eight seeds. bimodal: two clusters of classes, that many logits apart; t(2): Student's t. The
last two are there to show where it breaks: what happens there in beta is narrower than the grid's gaps.

| interpolant         | flat | Zipf   | peaky  | one-hot | bimodal 5-15 | N(0, 8²) | bimodal 20-40 | t(2) |
|---------------------|------|--------|--------|---------|--------------|----------|---------------|------|
| this one            | 6e-8 | 1.2e-3 | 2.4e-3 | 1.6e-6  | 3.1e-3       | 3.1e-3   | 3.7e-2        | 0.76 |
| this one, no stats  | 1e-7 | 1.2e-3 | 5.1e-3 | 2.0e-6  | 5.0e-3       | 8.1e-3   | 1.1e-1        | 0.95 |
| polynomial, clipped | 1e-7 | 1.2e-3 | 4.4e-3 | 1.6e-6  | 5.9e-3       | 9.4e-3   | 1.2e-1        | 0.95 |
| polynomial          | 1e-7 | 2.7e-3 | 4.4e-3 | 1.6e-6  | 5.9e-3       | 9.4e-3   | 1.2e-1        | 0.95 |
| PCHIP               | 6e-6 | 4.2e-3 | 6.6e-3 | 1.0e-4  | 7.9e-3       | 2.0e-2   | 6.6e-2        | 0.98 |
| natural cubic       | 3e-5 | 1.3e-3 | 6.3e-3 | 4.8e-4  | 5.5e-3       | 3.2e-2   | 9.3e-2        | 0.98 |

Clipping to the bounds changes nothing for PCHIP and the natural cubic. A ninth draw gave 1.9e-3 on Zipf
(V = 262144). Unlike this one, the polynomials and the natural cubic may rise.
"""

from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from array_api_compat import array_namespace, is_numpy_array, is_torch_array

from pipeline.errors import TemperatureError

__all__ = [
    "check_temperatures",
    "interpolate_log_tail",
    "inverse_temperature",
    "log_sum_exp",
    "working_dtype",
]

Array = Any  # a NumPy array or a torch tensor

# Of the polynomial that gives a slope: all nodes of the default grid, and no higher degree for long grids.
_MAX_NODES = 9


def check_temperatures(temperatures: tuple[float, ...]) -> None:
    """Checks a grid: 1 first (the record's own temperature), strictly increasing, finite.

    Raises:
        TemperatureError: the grid is anything else.
    """
    increasing = all(low < high for low, high in pairwise(temperatures))
    if not temperatures or temperatures[0] != 1.0 or not increasing or not np.isfinite(temperatures[-1]):
        raise TemperatureError(
            f"temperatures: expected 1.0 first, then strictly increasing finite numbers; "
            f"found {list(temperatures)}; the default grid is pipeline.labels.DEFAULT_TEMPERATURES"
        )


def inverse_temperature(T: Any, temperatures: tuple[float, ...], *, like: Array) -> Any:
    """beta = 1 / T, checked.

    Args:
        T: a number, or an array [], [1] or [P] of the kind of `like`.
        temperatures: the grid; its first is the lowest T allowed.
        like: [P, ...] array.

    Returns:
        A Python float for a number, an array [1] or [P] for an array, in (0, 1 / temperatures[0]].

    Raises:
        TemperatureError: T below the grid, not finite, of another kind or of another shape.
    """
    lowest = temperatures[0]
    if isinstance(T, int | float | np.number):
        if not lowest <= T < float("inf"):
            raise _out_of_range(float(T), lowest)
        return 1.0 / float(T)
    same_kind = is_torch_array(T) if is_torch_array(like) else is_numpy_array(T)
    if not same_kind or tuple(T.shape) not in ((), (1,), (like.shape[0],)):
        shape = list(getattr(T, "shape", ()))
        raise TemperatureError(
            f"temperature: expected a number, or {type(like).__name__} of shape [] or [{like.shape[0]}]; "
            f"found {type(T).__name__} of shape {shape}; give one temperature, or one per position"
        )
    xp = array_namespace(T)
    values = xp.reshape(T, (-1,))
    bad = ~((values >= lowest) & (values < xp.inf))
    if bool(xp.any(bad)):
        raise _out_of_range(float(values[bad][0]), lowest)
    return 1.0 / values


def working_dtype(*arrays: Any) -> Any:
    """float64 when any of the arrays is, else float32; Python numbers do not count."""
    arrays = tuple(x for x in arrays if not isinstance(x, float))
    xp = array_namespace(*arrays)
    return xp.float64 if any(x.dtype == xp.float64 for x in arrays) else xp.float32


def log_sum_exp(x: Array) -> Array:
    """log(sum(exp(x))) over the last axis; a row of -inf gives -inf with gradient 0 (torch: NaN)."""
    xp = array_namespace(x)
    values = x.detach() if is_torch_array(x) else x
    peak = xp.max(values, axis=-1, keepdims=True)
    peak = xp.where(peak == -xp.inf, 0.0, peak)
    total = xp.sum(xp.exp(x - peak), axis=-1)
    return xp.where(total > 0, xp.log(xp.where(total > 0, total, 1.0)) + peak[..., 0], -xp.inf + 0 * total)


def interpolate_log_tail(
    log_tail_PG: Array,
    temperatures: tuple[float, ...],
    T: Any,
    *,
    log_support_P: Array,
    end_slopes_P: tuple[Array, Array] | None = None,
) -> Array:
    """Log of the sum over the dropped classes of p_j^(1/T).

    Args:
        log_tail_PG: [P, G] float, its values at the grid temperatures; a row of -inf where nothing was
            dropped.
        temperatures: G grid temperatures.
        T: a number, or an array [] or [P], in [temperatures[0], inf).
        log_support_P: [P] float, log of the number of dropped classes with p > 0 (the value at beta = 0). Not
            read in rows where nothing was dropped.
        end_slopes_P: [P] float each, the slopes at beta = 0 and 1, or None to estimate them: the means of log
            p over the dropped classes with p > 0, plain and weighted by p.

    Returns:
        [P] float32, or float64 if any input is. Non-increasing in 1/T; equal to the stored value at the grid;
        differentiable in T and the arrays when they are torch. Rows with nothing dropped give -inf, with
        gradients of 0.

    Raises:
        TemperatureError: T below the grid, not finite, or of another kind or shape.

    References:
        Gregory, Delbourgo 1982, "Piecewise rational quadratic interpolation to monotonic data", IMA J. Numer.
        Anal. 2.
    """
    xp = array_namespace(log_tail_PG)
    beta = inverse_temperature(T, temperatures, like=log_tail_PG)
    dtype = working_dtype(log_tail_PG, log_support_P, beta)
    stored_PG = xp.astype(log_tail_PG, dtype)
    alive = xp.all(stored_PG != -xp.inf, axis=1)  # a NaN stays visible
    stored_PG = xp.where(alive[:, None], stored_PG, 0.0)
    support_P = xp.where(alive, xp.astype(log_support_P, dtype), 0.0)
    last_P = stored_PG[:, -1]
    values = [xp.where(support_P > last_P, support_P, last_P)]
    values += [stored_PG[:, g] for g in reversed(range(len(temperatures)))]
    ends = [xp.where(alive, xp.astype(x, dtype), 0.0) for x in end_slopes_P or ()]
    beta = beta if isinstance(beta, float) else xp.astype(beta, dtype)
    return xp.where(alive, _convex_falling(values, temperatures, beta, ends), -xp.inf)


def _convex_falling(
    values: list[Array], temperatures: tuple[float, ...], beta: Any, ends: list[Array]
) -> Array:
    """The interpolant at beta, from the values [P] at the nodes 0 < 1/T_G < ... < 1/T_1."""
    xp = array_namespace(values[0])
    nodes, weights = _nodes_and_slope_weights(temperatures)
    last = len(nodes) - 2
    chords = [
        xp.clip((values[j + 1] - values[j]) / (nodes[j + 1] - nodes[j]), max=0.0) for j in range(last + 1)
    ]

    @cache  # two segments share each
    def slope(j: int) -> Array:
        if ends and j in (0, last + 1):
            free = ends[0 if j == 0 else 1]
        else:
            free = sum(w * (values[k] - values[j]) for k, w in enumerate(weights[j]) if w != 0.0)
        right = chords[j] if j <= last else 0.0 * chords[last]
        return xp.minimum(free, right) if j == 0 else xp.minimum(xp.maximum(free, chords[j - 1]), right)

    def segment(j: int) -> Array:
        """On (nodes[j], nodes[j + 1]]; anchored at its right end, which is therefore exact."""
        width, chord = nodes[j + 1] - nodes[j], chords[j]
        below = nodes[j + 1] - beta
        u = below / width
        low, high = slope(j), slope(j + 1)
        denominator = chord + (low + high - 2.0 * chord) * (u * (1.0 - u))
        denominator = xp.where(denominator < 0, denominator, -1.0)
        risen = chord * below * (chord * u + high * (1.0 - u)) / denominator
        value = values[j + 1] - risen
        floor = values[j + 1] - (chords[j + 1] * below if j < last else 0.0 * chord)
        if j > 0:
            floor = xp.maximum(floor, values[j] + chords[j - 1] * (beta - nodes[j]))
        ceiling = values[j + 1] - chord * below
        return xp.minimum(xp.maximum(value, floor), ceiling)

    if isinstance(beta, float):
        return segment(next(j for j in range(last + 1) if beta <= nodes[j + 1] or j == last))
    result = segment(last)
    for j in reversed(range(last)):
        result = xp.where(beta <= nodes[j + 1], segment(j), result)
    return result


@lru_cache(maxsize=64)
def _nodes_and_slope_weights(temperatures: tuple[float, ...]) -> tuple[list[float], list[list[float]]]:
    """Nodes in beta, ascending from 0, and for each the weights of all values in its slope."""
    nodes = [0.0, *(1.0 / t for t in reversed(temperatures))]
    size = min(len(nodes), _MAX_NODES)
    weights = []
    for j, node in enumerate(nodes):
        start = min(max(j - size // 2, 0), len(nodes) - size)
        window = range(start, start + size)
        row = [0.0] * len(nodes)
        for k in window:
            if k != j:
                others = [nodes[m] for m in window if m not in (j, k)]
                row[k] = float(np.prod([(node - x) / (nodes[k] - x) for x in others])) / (nodes[k] - node)
        weights.append(row)
    return nodes, weights


def _out_of_range(found: float, lowest: float) -> TemperatureError:
    return TemperatureError(
        f"temperature: expected a finite number of at least {lowest}, the first of the labels' grid; "
        f"found {found}; raise the temperature"
    )
