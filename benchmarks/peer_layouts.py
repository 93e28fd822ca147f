"""What peers write, made again from what is known of it: bytes out, ids and log-probabilities back.

Every layout packs a batch of rows at once. None keeps a tail: the mass outside is what is left of 1, at T = 1 only.
"""

from __future__ import annotations

import gzip
import pickle

import numpy as np
from numcodecs import Zstd

__all__ = ["DistillKit", "Megatron", "MlDr", "TinyViT"]

_ZSTD = Zstd(level=3)


def pack_bits(ids: np.ndarray, bits: int) -> np.ndarray:
    """[P, K] -> [P, ceil(K * bits / 8)] uint8."""
    split = (ids[:, :, None] >> np.arange(bits)) & 1
    return np.packbits(split.astype(np.uint8).reshape(len(ids), -1), axis=1, bitorder="little")


def unpack_bits(packed: np.ndarray, bits: int, k: int) -> np.ndarray:
    split = np.unpackbits(packed, axis=1, bitorder="little", count=k * bits).reshape(-1, k, bits)
    return split @ (1 << np.arange(bits, dtype=np.int32))


class Megatron:
    """NVIDIA/Megatron-LM: float16 log-probabilities and ids of 17 bits (here ceil(log2 V)), zstd over a batch."""

    def __init__(self, num_classes: int, k: int) -> None:
        self.name, self.k, self.bits = "Megatron-LM", k, (num_classes - 1).bit_length()

    def pack(self, ids: np.ndarray, log_probs: np.ndarray) -> bytes:
        values = log_probs.astype(np.float16).view(np.uint8).reshape(len(ids), -1)
        return _ZSTD.encode(np.concatenate([values.ravel(), pack_bits(ids, self.bits).ravel()]))

    def unpack(self, data: bytes, rows: int) -> tuple[np.ndarray, np.ndarray]:
        raw = np.frombuffer(_ZSTD.decode(data), np.uint8)
        values = raw[: rows * self.k * 2].view(np.float16).reshape(rows, self.k).astype(np.float32)
        return unpack_bits(raw[rows * self.k * 2 :].reshape(rows, -1), self.bits, self.k), values


class DistillKit:
    """arcee-ai/DistillKit: ids of ceil(log2 V) bits, and values as a polynomial and what is left of it.

    Its 192 bytes at K = 64 and 17 bits leave 56 for values. How they are spent is our guess: the first 16 as float16,
    a parabola in the log of the rank through the others (three float32), a float16 range and 2 bits for each of them.
    """

    BITS, EXACT = 2, 16

    def __init__(self, num_classes: int, k: int) -> None:
        self.name, self.k, self.bits = "DistillKit", k, (num_classes - 1).bit_length()
        self._powers = np.log1p(np.arange(self.EXACT, k))[:, None] ** np.arange(3)

    def records(self, ids: np.ndarray, log_probs: np.ndarray) -> np.ndarray:
        """Returns the bytes [P, R] of rows, not compressed."""
        exact, others = log_probs[:, : self.EXACT].astype(np.float16), log_probs[:, self.EXACT :]
        found = np.linalg.lstsq(self._powers, others.T.astype(np.float64), rcond=None)[0]
        coefficients = np.ascontiguousarray(found.T, np.float32)
        rest = others - coefficients @ self._powers.T
        scale = np.maximum(np.abs(rest).max(axis=1, keepdims=True), 1e-4).astype(np.float16)
        steps = np.clip(np.floor((rest / scale + 1) * 2), 0, 3).astype(np.int64)
        numbers = [exact.view(np.uint8), coefficients.view(np.uint8), scale.view(np.uint8)]
        return np.concatenate([*numbers, pack_bits(steps, self.BITS), pack_bits(ids, self.bits)], axis=1)

    def pack(self, ids: np.ndarray, log_probs: np.ndarray) -> bytes:
        return _ZSTD.encode(self.records(ids, log_probs))

    def unpack(self, data: bytes, rows: int) -> tuple[np.ndarray, np.ndarray]:
        return self.unpack_records(np.frombuffer(_ZSTD.decode(data), np.uint8).reshape(rows, -1))

    def unpack_records(self, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids and log-probabilities [P, K] of such bytes."""
        others = self.k - self.EXACT
        sizes = [2 * self.EXACT, 12, 2, -(-others * self.BITS // 8)]
        exact, coefficients, scale, steps, ids = map(
            np.ascontiguousarray, np.split(raw, np.cumsum(sizes), axis=1)
        )
        rest = (unpack_bits(steps, self.BITS, others) + 0.5) / 2 - 1
        curve = coefficients.view(np.float32) @ self._powers.T.astype(np.float32)
        values = [exact.view(np.float16).astype(np.float32), curve + rest * scale.view(np.float16)]
        return unpack_bits(ids, self.bits, self.k), np.concatenate(values, axis=1)


class TinyViT:
    """microsoft/Cream TinyViT: K int16 ids and K float16 probabilities, and an int32 seed; not compressed."""

    def __init__(self, num_classes: int, k: int) -> None:
        self.name, self.k = "TinyViT", k

    def pack(self, ids: np.ndarray, log_probs: np.ndarray) -> bytes:
        probs = np.exp(log_probs).astype(np.float16)
        rows = [np.zeros((len(ids), 4), np.uint8), ids.astype(np.int16).view(np.uint8), probs.view(np.uint8)]
        return np.concatenate(rows, axis=1).tobytes()

    def unpack(self, data: bytes, rows: int) -> tuple[np.ndarray, np.ndarray]:
        raw, cut = np.frombuffer(data, np.uint8).reshape(rows, -1), 4 + 2 * self.k
        probs = np.ascontiguousarray(raw[:, cut:]).view(np.float16).astype(np.float32)
        with np.errstate(divide="ignore"):
            return np.ascontiguousarray(raw[:, 4:cut]).view(np.int16).astype(np.int32), np.log(probs)


class MlDr:
    """apple/ml-dr: one gzipped pickle for each image (here: of 10 views) with ids and probabilities of every view.

    Its parameters of the augmentations, most of the 65 bytes that were measured of it, are left out.
    """

    VIEWS = 10

    def __init__(self, num_classes: int, k: int) -> None:
        self.name, self.k = "ml-dr, labels alone", k

    def pack(self, ids: np.ndarray, log_probs: np.ndarray) -> bytes:
        files = []
        for start in range(0, len(ids), self.VIEWS):
            part = slice(start, start + self.VIEWS)
            kept = (ids[part].astype(np.int16), np.exp(log_probs[part]).astype(np.float16))
            files.append(gzip.compress(pickle.dumps(kept)))
        self._sizes = [len(file) for file in files]
        return b"".join(files)

    def unpack(self, data: bytes, rows: int) -> tuple[np.ndarray, np.ndarray]:
        parts, start = [], 0
        for size in self._sizes:
            parts.append(pickle.loads(gzip.decompress(data[start : start + size])))  # our own bytes
            start += size
        ids, probs = (np.concatenate(column) for column in zip(*parts, strict=True))
        with np.errstate(divide="ignore"):
            return ids.astype(np.int32), np.log(probs.astype(np.float32))
