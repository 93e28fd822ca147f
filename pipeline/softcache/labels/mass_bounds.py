"""Bounds of the mass of the dropped classes from T = 1 up, between the grid's temperatures and beyond its last.

Shape suffixes: `P` positions, `G` grid of temperatures, `N` nodes of beta = 1/T, or moments.

F(beta), the log of the sum of p_j^beta over the dropped classes, is convex: it is below the chord of its two nodes,
and above the chords next to it, drawn on. Between nodes at equal distances h, F is more: the log of E[u^s] with u =
e^(h (x - highest)) in [0, 1], x = log p, s = (beta - first node) / h, of which E[1], E[u], ... E[u^(N-1)] are stored.
The polynomial that meets u^s, slope included, at N/2 points lies on one side of it, and the one that meets it at 0,
at 1 and, slope included, at N/2 - 1 points on the other, because the derivative after the last that they match has
one sign. Their means are bounds; they are narrowest where the points are the nodes of Gauss's and Lobatto's
quadratures. Bounds are true whatever the points, and so rounded points cost no truth; what rounded moments can change
is added. NumPy, float64.

References:
    Karlin, Studden 1966, "Tchebycheff Systems", chapters III and IV (principal representations).
    Golub, Meurant 2010, "Matrices, Moments and Quadrature with Applications", chapter 6 (Gauss, Lobatto as bounds).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

__all__ = ["log_tail_bounds"]


def log_tail_bounds(
    log_tail_PG: np.ndarray,
    temperatures: tuple[float, ...],
    T: float,
    *,
    log_support_P: np.ndarray,
    highest_log_prob_P: np.ndarray,
    rounding: tuple[float, float] = (0.0, 0.0),
    support_is_exact: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bound of the log of the sum over the dropped classes of p_j^(1/T), from T = 1 up.

    Args:
        log_tail_PG: [P, G] float, its values at the grid; a row of -inf where nothing was dropped.
        temperatures: G grid temperatures.
        T: a number of at least 1.
        log_support_P: [P] float, log of the number of dropped classes with p > 0.
        highest_log_prob_P: [P] float, nats, of which no dropped log p at T = 1 is above.
        rounding: how far values of the grid may be off, at T = 1 and above, nats, besides float32.
        support_is_exact: False: `log_support_P` may count classes with p = 0; it is then a bound, and no value of F.

    Returns:
        (lower, upper), [P] float64; -inf where nothing was dropped.
    """
    alive_P = np.all(log_tail_PG > -np.inf, axis=1)
    grid_PG = np.where(alive_P[:, None], log_tail_PG, 0.0).astype(np.float64)
    support_P = np.where(alive_P, log_support_P, 0.0).astype(np.float64)
    beta, nodes = 1.0 / float(T), np.array([0.0, *(1.0 / t for t in reversed(temperatures))])
    values_PN = np.concatenate([np.maximum(support_P, grid_PG[:, -1])[:, None], grid_PG[:, ::-1]], axis=1)
    off_PN = np.abs(values_PN) * np.finfo(np.float32).eps
    off_PN += np.where(nodes == 0, 0.0, np.where(nodes == 1, *rounding))
    low_PN, high_PN = values_PN - off_PN, values_PN + off_PN
    at = np.flatnonzero(np.isclose(nodes, beta, rtol=1e-12, atol=0.0))
    if at.size:
        lower_P, upper_P = low_PN[:, at[0]], high_PN[:, at[0]]
    else:
        j = int(np.searchsorted(nodes, beta)) - 1
        first = 0 if support_is_exact else 1
        lower_P, upper_P = _chord_bounds(nodes, low_PN, high_PN, j, beta, first)
        highest_P = np.minimum(np.where(alive_P, highest_log_prob_P, 0.0), high_PN[:, -1]).astype(np.float64)
        for window in _equal_windows(nodes, j, first):
            lower, upper = _moment_bounds(
                nodes[window], values_PN[:, window], off_PN[:, window], highest_P, beta
            )
            lower_P, upper_P = np.fmax(lower_P, lower), np.fmin(upper_P, upper)
    return np.where(alive_P, np.minimum(lower_P, upper_P), -np.inf), np.where(alive_P, upper_P, -np.inf)


def _chord_bounds(
    nodes: np.ndarray, low_PN: np.ndarray, high_PN: np.ndarray, j: int, beta: float, first: int
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds by convexity of a falling curve, between nodes j and j + 1."""
    share = (beta - nodes[j]) / (nodes[j + 1] - nodes[j])
    upper_P = (1.0 - share) * high_PN[:, j] + share * high_PN[:, j + 1]
    lower_P = low_PN[:, j + 1]
    if j - 1 >= first:
        ratio = (beta - nodes[j]) / (nodes[j] - nodes[j - 1])
        lower_P = np.maximum(lower_P, (1.0 + ratio) * low_PN[:, j] - ratio * high_PN[:, j - 1])
    if j + 2 < len(nodes):
        ratio = (nodes[j + 1] - beta) / (nodes[j + 2] - nodes[j + 1])
        lower_P = np.maximum(lower_P, (1.0 + ratio) * low_PN[:, j + 1] - ratio * high_PN[:, j + 2])
    return lower_P, upper_P


def _equal_windows(nodes: np.ndarray, j: int, first: int) -> Iterator[slice]:
    """Runs of 4, 6 and 8 nodes at equal distances around segment j, as near their middle as the grid allows."""
    for size in (4, 6, 8):
        starts = range(max(first, j + 2 - size), min(j, len(nodes) - size) + 1)
        for start in sorted(starts, key=lambda start: abs(2 * (j - start) + 2 - size)):
            gaps = np.diff(nodes[start : start + size])
            if np.allclose(gaps, gaps[0], rtol=1e-9, atol=0.0):
                yield slice(start, start + size)
                break


def _moment_bounds(
    nodes: np.ndarray, values_PN: np.ndarray, off_PN: np.ndarray, highest_P: np.ndarray, beta: float
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds by polynomials in u, see `log_tail_bounds`; NaN where numbers are too far apart for them."""
    h, degree = nodes[1] - nodes[0], len(nodes) - 1
    s, steps = (beta - nodes[0]) / h, np.arange(degree + 1)
    with np.errstate(all="ignore"):
        m_PN = np.exp(values_PN - values_PN[:, :1] - steps * h * highest_P[:, None])
        slack_PN = m_PN * np.expm1(off_PN)
        inner_PN = m_PN[:, 1:-1] - m_PN[:, 2:]  # of the measure times u (1 - u)
        ends_PN = np.broadcast_to([0.0, 1.0], (len(m_PN), 2))
        sides = []
        for atoms, ends in ((_gauss_nodes(m_PN), ends_PN[:, :0]), (_gauss_nodes(inner_PN), ends_PN)):
            a_PN = _interpolating(np.concatenate([ends, np.repeat(atoms, 2, axis=1)], axis=1), s)
            mean_P, error_P = (a_PN * m_PN).sum(axis=1), (np.abs(a_PN) * slack_PN).sum(axis=1)
            sides.append((mean_P - error_P, mean_P + error_P))
        positive = (
            np.prod(s - steps) > 0
        )  # the sign of the derivative of u^s after the last that the polynomials match
        low, high = (sides[0][0], sides[1][1]) if positive else (sides[1][0], sides[0][1])
        scale_P = values_PN[:, 0] + s * h * highest_P
        usable_P = (m_PN > 1e-200).all(axis=1)
        lower_P = np.where(usable_P & (low > 0), np.log(low) + scale_P, np.nan)
        upper_P = np.where(usable_P & (high > 0), np.log(high) + scale_P, np.nan)
    return lower_P, upper_P


def _gauss_nodes(m_PN: np.ndarray) -> np.ndarray:
    """Nodes [P, N/2] in (0, 1), apart from each other, of Gauss's quadrature for moments [P, N], or something like them."""
    count = m_PN.shape[1] // 2
    places = np.arange(count)
    hankel = m_PN[:, places[:, None] + places[None, :]]
    right = m_PN[:, count + places]
    scale = np.sqrt(np.maximum(m_PN[:, 2 * places], 1e-300))
    scaled = hankel / (scale[:, :, None] * scale[:, None, :])
    solvable = np.isfinite(scaled).all(axis=(1, 2))
    scaled = np.where(solvable[:, None, None], scaled, np.eye(count))
    inverse = np.linalg.pinv(scaled, rcond=1e-14, hermitian=True)  # of a single atom the matrix has rank 1
    c = (inverse @ np.where(solvable[:, None], right / scale, 1.0)[:, :, None])[:, :, 0] / scale
    companion = np.zeros((len(m_PN), count, count))
    companion[:, places[1:], places[:-1]] = 1.0
    companion[:, :, -1] = np.where(np.isfinite(c), c, 0.0)
    nodes = np.sort(np.clip(np.linalg.eigvals(companion).real, 1e-6, 1.0), axis=1)
    for k in range(count - 2, -1, -1):  # from the top down
        nodes[:, k] = np.minimum(nodes[:, k], nodes[:, k + 1] * (1.0 - 1e-2))
    return nodes * (1.0 - 1e-6)


def _interpolating(x_PN: np.ndarray, s: float) -> np.ndarray:
    """Coefficients [P, N], by powers, of the polynomial that meets u^s at points [P, N]; equal neighbors: and its slope."""
    n = x_PN.shape[1]
    column = [x_PN[:, k] ** s for k in range(n)]
    newton = [column[0]]
    for order in range(1, n):
        gaps = [x_PN[:, k + order] - x_PN[:, k] for k in range(n - order)]
        column = [
            s * x_PN[:, k] ** (s - 1.0)
            if order == 1 and (gaps[k] == 0).all()
            else (column[k + 1] - column[k]) / gaps[k]
            for k in range(n - order)
        ]
        newton.append(column[0])
    a_PN = np.zeros_like(x_PN)
    for k in reversed(range(n)):  # Horner
        a_PN[:, 1:], a_PN[:, 0] = a_PN[:, :-1] - x_PN[:, k, None] * a_PN[:, 1:], -x_PN[:, k] * a_PN[:, 0]
        a_PN[:, 0] += newton[k]
    return a_PN
