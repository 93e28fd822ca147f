"""float32 numbers as a CPU sees them: their bits in order, powers of two, what may be added in any order; compiled."""

# numba gives these functions their types; by mypy's rules, which are Python's, every number would be another one.
# mypy: disable-error-code="no-untyped-def,assignment,call-arg,var-annotated,misc"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from softcache.runtime.jit import njit_in_subprocess, njit_inline

__all__ = [
    "BLOCK",
    "EIGHTHS",
    "FARTHEST",
    "LANES",
    "LN_2",
    "LOWEST_KEY",
    "above_bits",
    "exp2",
    "first_bit",
    "float_of",
    "key_of",
    "njit_fastmath",
    "num_bits",
    "reaching_bits",
    "vectorised_part",
]

# Sums may be taken in vectors; NaN and infinity keep their meaning.
_MATHS = {"reassoc", "contract", "nsz"}
LN_2 = 0.6931471805599453
EIGHTHS = 8
BLOCK = 1024
FARTHEST = np.float32(-126 * EIGHTHS * LN_2)
"""Of a logit from the largest: exp(x/8) is then 2^-126, which is as good as 0 next to the 1 of the largest."""
LOWEST_KEY = np.int32(-(2**31))
LANES = 32
"""How many keys `reaching_bits` compares at once."""
# Taylor coefficients of 2^r; on [-1/2, 1/2] the rest after the sixth power is below 2e-9 relative.
_C1, _C2, _C3, _C4, _C5, _C6 = (np.float32(c) for c in (
    LN_2, LN_2**2 / 2, LN_2**3 / 6, LN_2**4 / 24, LN_2**5 / 120, LN_2**6 / 720,
))  # fmt: skip


def njit_fastmath(function: Callable[..., Any]) -> Any:
    """Compiled, with sums in the order that suits vector instructions."""
    return njit_in_subprocess(function, error_model="numpy", fastmath=_MATHS)


def vectorised_part(function: Callable[..., Any], fastmath: Any = _MATHS) -> Any:
    """A part of `njit_fastmath` functions."""
    return njit_inline(function, error_model="numpy", fastmath=fastmath)


@intrinsic
def float_of(typing, bits):
    """The float32 of these 32 bits."""
    return types.float32(types.int32), lambda _c, build, _s, args: build.bitcast(args[0], ir.FloatType())


@intrinsic
def key_of(typing, value):
    """A float32 as an int32 that is ordered as the numbers are: -0.0 is 0.0, NaN is beyond the infinities."""

    def generate(_context, build, _signature, args):
        word = ir.IntType(32)
        bits = build.bitcast(args[0], word)
        flipped = build.and_(build.ashr(bits, ir.Constant(word, 31)), ir.Constant(word, 2**31 - 1))
        is_minus_0 = build.icmp_signed("==", bits, ir.Constant(word, -(2**31)))
        return build.select(is_minus_0, ir.Constant(word, 0), build.xor(bits, flipped))

    return types.int32(types.float32), generate


def _compared(relation: str) -> Any:
    """A comparison of LANES int32 keys, from a place of a contiguous array, with one key; a bit of the uint32 for each."""

    def generate(context: Any, build: Any, signature: Any, args: Any) -> Any:
        word, vector = ir.IntType(32), ir.VectorType(ir.IntType(32), LANES)
        data = context.make_array(signature.args[0])(context, build, args[0]).data
        found = build.load(build.bitcast(build.gep(data, [args[1]]), vector.as_pointer()), align=4)
        other = build.insert_element(ir.Constant(vector, ir.Undefined), args[2], ir.Constant(word, 0))
        other = build.shuffle_vector(other, other, ir.Constant(vector, [0] * LANES))
        return build.bitcast(build.icmp_signed(relation, found, other), word)

    return intrinsic(
        lambda typing, keys, start, key: (types.uint32(keys, types.int64, types.int32), generate)
    )


reaching_bits, above_bits = _compared(">="), _compared(">")


@intrinsic
def first_bit(typing, bits):
    """The place of the lowest bit that is set."""

    def generate(_context, build, _signature, args):
        return build.zext(build.cttz(args[0], ir.Constant(ir.IntType(1), 1)), ir.IntType(64))

    return types.int64(types.uint32), generate


@intrinsic
def num_bits(typing, bits):
    """How many bits are set."""

    def generate(_context, build, _signature, args):
        return build.zext(build.ctpop(args[0]), ir.IntType(64))

    return types.int64(types.uint32), generate


@vectorised_part
def exp2(y):
    """2^y of a float32 from -126 to 0."""
    whole = np.floor(y + np.float32(0.5))
    r = y - whole
    power = _C1 + r * (_C2 + r * (_C3 + r * (_C4 + r * (_C5 + r * _C6))))
    return (np.float32(1.0) + r * power) * float_of((np.int32(whole) + np.int32(127)) << np.int32(23))
