"""Counter-based random numbers: a function of a seed and of what is drawn for, not of what was drawn before.

So a rerun, another worker, another order or another device draws the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SPLITMIX64_GAMMA", "splitmix64"]

_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64

SPLITMIX64_GAMMA = 0x9E3779B97F4A7C15 - 2**64
"""Between the counters of one seed; odd, as a signed 64-bit number."""


def splitmix64(counters: Tensor) -> Tensor:
    """The output of splitmix64 (Steele, Lea, Flood 2014) for each counter, int64 for 64 bits, modulo 2^64.

    >>> import torch
    >>> splitmix64(torch.tensor([1, 2]) * SPLITMIX64_GAMMA).tolist()  # of seed 0: 0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4
    [-2152535657050944081, 7960286522194355700]
    """
    # Shifts of signed numbers are arithmetic; the masks make them logical.
    x = (counters ^ ((counters >> 30) & (2**34 - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _MIX_2
    return x ^ ((x >> 31) & (2**33 - 1))
