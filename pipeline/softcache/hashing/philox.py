"""Philox 4x64 with ten rounds (Salmon et al. 2011), as numpy.random.Philox has it.

Shape suffixes: `B` samples, `S` random numbers.
"""

from __future__ import annotations

import numpy as np

from softcache.hashing.xxh3 import product
from softcache.runtime.jit import compiled

__all__ = ["uniforms"]

_0 = np.uint64(0)
_M1, _M2 = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
_W1, _W2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)


@compiled
def _uniforms(seed, keys_B, view, first, blocks):  # type: ignore[no-untyped-def]
    out_BS = np.empty((len(keys_B), 4 * blocks))
    for row in range(len(keys_B)):
        for block in range(blocks):
            c1, c2, c3, c4 = np.uint64(first + block + 1), view, _0, _0
            k1, k2 = seed, keys_B[row]
            for _ in range(10):
                first_high, first_low = product(_M1, c1)
                second_high, second_low = product(_M2, c3)
                c1, c2, c3, c4 = second_high ^ c2 ^ k1, second_low, first_high ^ c4 ^ k2, first_low
                k1, k2 = k1 + _W1, k2 + _W2
            slot = 4 * block
            out_BS[row, slot] = np.float64(c1 >> np.uint64(11)) * 2.0**-53
            out_BS[row, slot + 1] = np.float64(c2 >> np.uint64(11)) * 2.0**-53
            out_BS[row, slot + 2] = np.float64(c3 >> np.uint64(11)) * 2.0**-53
            out_BS[row, slot + 3] = np.float64(c4 >> np.uint64(11)) * 2.0**-53
    return out_BS


def uniforms(seed: int, keys_B: np.ndarray, view: int, num_slots: int, *, first_slot: int = 0) -> np.ndarray:
    """Returns numbers in [0, 1), float64 [B, S]: of the stream of Philox of (seed, key) at counter (0, view).

    Args:
        keys_B: [B] uint64.
        num_slots: S, a multiple of 4.
        first_slot: where in the stream the first of them is, a multiple of 4.
    """
    return _uniforms(np.uint64(seed), keys_B, np.uint64(view), first_slot // 4, num_slots // 4)
