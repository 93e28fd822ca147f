"""XXH3 of short inputs: the 64-bit variant with the default secret and seed 0 (xxhash 0.8).

Above `LONGEST` bytes XXH3 is another algorithm, and `xxhash`, with its vector instructions, the faster one, which is used
then.

Shape suffixes: `B` samples, `N` bytes of all names together, `L` bytes of a sample's content.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from softcache.runtime.jit import compiled

__all__ = ["LONGEST", "fingerprints", "hashes", "joined_names", "product"]

LONGEST = 240
"""Bytes of the longest input."""


def joined_names(names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the names' UTF-8 one after the other, uint8 [N], and where each ends, int64 [B]."""
    whole = "".join(names)
    if whole.isascii():
        lengths, data = map(len, names), whole.encode()
    else:
        encoded = [name.encode() for name in names]
        lengths, data = map(len, encoded), b"".join(encoded)
    return np.frombuffer(data, np.uint8), np.fromiter(lengths, np.int64, len(names)).cumsum()


# Numbers of another kind than uint64 in an expression would make it a float; hence the constants.
_0, _1, _8, _16, _24, _32 = (np.uint64(x) for x in (0, 1, 8, 16, 24, 32))
_LOW = np.uint64(0xFFFFFFFF)
_P64_1, _P64_2, _P64_3 = (np.uint64(x) for x in (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9))
_MX1, _MX2 = np.uint64(0x165667919E3779F9), np.uint64(0x9FB21C651E98DF25)
_SECRET_BYTES = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
# The eight bytes from each place on, as numbers: a word of the secret is then one load.
_SECRET = np.array([int.from_bytes(_SECRET_BYTES[at : at + 8], "little") for at in range(185)], np.uint64)


@compiled
def _word(data, start):  # type: ignore[no-untyped-def]
    """Eight bytes as a little-endian number; the compiler makes one load of it."""
    value = _0
    for byte in range(8):
        value |= np.uint64(data[start + byte]) << np.uint64(8 * byte)
    return value


@compiled
def _half(data, start):  # type: ignore[no-untyped-def]
    value = _0
    for byte in range(4):
        value |= np.uint64(data[start + byte]) << np.uint64(8 * byte)
    return value


@compiled
def _swapped(x):  # type: ignore[no-untyped-def]
    value = _0
    for _ in range(8):
        value = (value << _8) | (x & np.uint64(255))
        x >>= _8
    return value


def _multiplied(typing, a, b):  # type: ignore[no-untyped-def]
    def generate(context, build, signature, args):  # type: ignore[no-untyped-def]
        wide, word = ir.IntType(128), ir.IntType(64)
        whole = build.mul(build.zext(args[0], wide), build.zext(args[1], wide))
        high = build.trunc(build.lshr(whole, ir.Constant(wide, 64)), word)
        return context.make_tuple(build, signature.return_type, (high, build.trunc(whole, word)))

    return types.UniTuple(types.uint64, 2)(types.uint64, types.uint64), generate


product: Any = intrinsic(_multiplied)
"""The high and the low 64 bits of a * b, uint64."""


@compiled
def _folded(a, b):  # type: ignore[no-untyped-def]
    high, low = product(a, b)
    return high ^ low


@compiled
def _avalanche(x):  # type: ignore[no-untyped-def]
    x = (x ^ (x >> np.uint64(37))) * _MX1
    return x ^ (x >> _32)


@compiled
def _avalanche_64(x):  # type: ignore[no-untyped-def]
    x = (x ^ (x >> np.uint64(33))) * _P64_2
    x = (x ^ (x >> np.uint64(29))) * _P64_3
    return x ^ (x >> _32)


@compiled
def _mixed(low, high, secret, at):  # type: ignore[no-untyped-def]
    return _folded(low ^ secret[at], high ^ secret[at + 8])


@compiled
def _xxh3_short(data, length, secret):  # type: ignore[no-untyped-def]
    """Up to 16 bytes."""
    size = np.uint64(length)
    if length > 8:
        low = _word(data, 0) ^ (secret[24] ^ secret[32])
        high = _word(data, length - 8) ^ (secret[40] ^ secret[48])
        return _avalanche(size + _swapped(low) + high + _folded(low, high))
    if length >= 4:
        keyed = (_half(data, length - 4) + (_half(data, 0) << _32)) ^ (secret[8] ^ secret[16])
        x = keyed ^ ((keyed << np.uint64(49)) | (keyed >> np.uint64(15)))
        x = (x ^ ((keyed << _24) | (keyed >> np.uint64(40)))) * _MX2
        x = (x ^ ((x >> np.uint64(35)) + size)) * _MX2
        return x ^ (x >> np.uint64(28))
    if length > 0:
        first, middle, last = np.uint64(data[0]), np.uint64(data[length >> 1]), np.uint64(data[length - 1])
        combined = (first << _16) | (middle << _24) | last | (size << _8)
        return _avalanche_64(combined ^ ((secret[0] & _LOW) ^ (secret[0] >> _32)))
    return _avalanche_64(secret[56] ^ secret[64])


@compiled
def _xxh3_middle(data, words, length, secret):  # type: ignore[no-untyped-def]
    """17 to 240 bytes."""
    total = np.uint64(length) * _P64_1
    if length <= 128:
        for pair in range((length - 1) // 32 + 1):
            end = length - 16 * (pair + 1)
            total += _mixed(words[2 * pair], words[2 * pair + 1], secret, 32 * pair)
            total += _mixed(_word(data, end), _word(data, end + 8), secret, 32 * pair + 16)
        return _avalanche(total)
    for part in range(8):
        total += _mixed(words[2 * part], words[2 * part + 1], secret, 16 * part)
    rest = _mixed(_word(data, length - 16), _word(data, length - 8), secret, 136 - 17)
    for part in range(8, length // 16):
        rest += _mixed(words[2 * part], words[2 * part + 1], secret, 16 * (part - 8) + 3)
    return _avalanche(_avalanche(total) + rest)


@compiled
def _xxh3(words, length, secret):  # type: ignore[no-untyped-def]
    """Of the first `length` bytes, at most `LONGEST`, of an array of words."""
    data = words.view(np.uint8)
    if length <= 16:
        return _xxh3_short(data, length, secret)
    return _xxh3_middle(data, words, length, secret)


@compiled
def _longest(ends_B):  # type: ignore[no-untyped-def]
    longest, start = 0, 0
    for end in ends_B:
        longest, start = max(longest, end - start), end
    return longest


@compiled
def _hashes(names_N, ends_B, secret):  # type: ignore[no-untyped-def]
    out_B, start = np.empty(len(ends_B), np.uint64), 0
    words = np.empty(_longest(ends_B) // 8 + 1, np.uint64)
    data = words.view(np.uint8)
    for row in range(len(ends_B)):
        for place in range(start, ends_B[row]):
            data[place - start] = names_N[place]
        out_B[row] = _xxh3(words, ends_B[row] - start, secret)
        start = ends_B[row]
    return out_B


def hashes(names: Sequence[str]) -> np.ndarray:
    """Returns xxh3_64 of the UTF-8 of every name, uint64 [B]."""
    names_N, ends_B = joined_names(names)
    if _longest(ends_B) > LONGEST:
        return np.array([xxhash.xxh3_64_intdigest(name.encode()) for name in names], np.uint64)
    return _hashes(names_N, ends_B, _SECRET)


@compiled
def _fingerprints(names_N, ends_B, fixed, content_BL, secret):  # type: ignore[no-untyped-def]
    out_B = np.empty(len(ends_B), np.uint64)
    size = content_BL.shape[1]
    words = np.empty((4 + _longest(ends_B) + len(fixed) + size) // 8 + 1, np.uint64)
    data, start = words.view(np.uint8), 0
    for row in range(len(ends_B)):
        length = ends_B[row] - start
        for byte in range(4):
            data[byte] = (length >> 8 * byte) & 255
        for place in range(length):
            data[4 + place] = names_N[start + place]
        for place in range(len(fixed)):
            data[4 + length + place] = fixed[place]
        first = 4 + length + len(fixed)
        for place in range(size):
            data[first + place] = content_BL[row, place]
        out_B[row] = _xxh3(words, first + size, secret)
        start = ends_B[row]
    return out_B


def fingerprints(names: Sequence[str], fixed: bytes, content_BL: np.ndarray) -> np.ndarray:
    """Returns xxh3_64 of every sample's len(name) uint32 | name | fixed | content, uint64 [B].

    Args:
        names: of the samples.
        fixed: what stands between name and content, the same in all.
        content_BL: [B, L] uint8, C-contiguous.
    """
    names_N, ends_B = joined_names(names)
    if 4 + _longest(ends_B) + len(fixed) + content_BL.shape[1] <= LONGEST:
        return _fingerprints(names_N, ends_B, np.frombuffer(fixed, np.uint8), content_BL, _SECRET)
    digest, size, whole = xxhash.xxh3_64_intdigest, content_BL.shape[1], content_BL.tobytes()
    heads = [len(name).to_bytes(4, "little") + name + fixed for name in (name.encode() for name in names)]
    found = [digest(head + whole[row * size : (row + 1) * size]) for row, head in enumerate(heads)]
    return np.array(found, np.uint64)
