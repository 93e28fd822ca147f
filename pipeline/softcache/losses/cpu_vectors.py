"""Sums, maxima and exponentials of a row, compiled so that a CPU's vector instructions do them.

Exponentials are a polynomial (Cephes' expf, Moshier 1984; within 2e-7 of the true value). Importing this module takes
numba along, so import it where it is used.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from softcache.runtime.jit import njit_inline

__all__ = ["exp_shifted", "largest", "total"]

_NONE = np.float32(-np.inf)
_LEAST, _LOG2E, _HALF = np.float32(-87.0), np.float32(1.44269504), np.float32(0.5)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_C5, _C4, _C3 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_C2, _C1, _C0 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(0.5)
_ONE, _ZERO = np.float32(1), np.float32(0)


@njit_inline
def exp_shifted(x_V, shift, out_V):  # type: ignore[no-untyped-def]
    """Writes e^(x - shift), 0 below e^-87; x at most `shift`, or NaN."""
    for j in range(len(x_V)):
        t = x_V[j] - shift
        bounded = _LEAST if t < _LEAST else t
        whole = np.float32(np.floor(bounded * _LOG2E + _HALF))
        r = bounded - whole * _LN2_HIGH - whole * _LN2_LOW
        series = ((((_C5 * r + _C4) * r + _C3) * r + _C2) * r + _C1) * r + _C0
        power = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
        value = (series * r * r + r + _ONE) * power
        out_V[j] = _ZERO if t < _LEAST else value


@partial(njit_inline, fastmath={"reassoc"})
def total(x_V):  # type: ignore[no-untyped-def]
    """The sum, float64, in whatever order is fastest."""
    whole = 0.0
    for j in range(len(x_V)):
        whole += x_V[j]
    return whole


@njit_inline
def largest(x_V):  # type: ignore[no-untyped-def]
    """Of those that are numbers; -inf of none."""
    a = b = c = d = _NONE
    whole = len(x_V) // 4 * 4
    for j in range(0, whole, 4):
        a = x_V[j] if x_V[j] > a else a
        b = x_V[j + 1] if x_V[j + 1] > b else b
        c = x_V[j + 2] if x_V[j + 2] > c else c
        d = x_V[j + 3] if x_V[j + 3] > d else d
    for j in range(whole, len(x_V)):
        a = x_V[j] if x_V[j] > a else a
    return max(max(a, b), max(c, d))
