"""Parts of e^x for compiled loops, in operations that become vector instructions; a call of the C library does not.

The functions are plain Python: each module compiles them with its own rules of arithmetic (`runtime.jit.njit_inline`).
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

__all__ = ["exp_parts"]

_LOG2E, _HALF = np.float32(1.44269504), np.float32(0.5)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_C5, _C4, _C3 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_C2, _C1, _C0 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(0.5)


def exp_parts(x):
    """Returns float32 m and p with e^x = (1 + m) p, p a power of 2; x float32 from -87 to 88, or NaN.

    The polynomial is Cephes' expf (Moshier 1984).
    """
    whole = np.float32(np.floor(x * _LOG2E + _HALF))
    r = x - whole * _LN2_HIGH - whole * _LN2_LOW
    series = ((((_C5 * r + _C4) * r + _C3) * r + _C2) * r + _C1) * r + _C0
    power = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
    return series * r * r + r, power
