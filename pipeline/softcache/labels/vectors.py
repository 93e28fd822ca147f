"""The record of vector labels: for each row a vector of numbers, such as the input of a teacher's head.

A vector is stored in few bits (`ENCODINGS`) and becomes float32 where it is used. With a head the vectors determine a
distribution over all V classes, at every temperature and without a tail:

    logits = softcap(logit_scale * (hidden @ weight.T + bias))          softcap(x) = c tanh(x / c), where there is one

Shape suffixes: `P` positions, `D` width of a vector, `V` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from array_api_compat import is_torch_array

from softcache.errors import LabelError
from softcache.labels.arrays import Array, as_numpy, as_pinned, as_torch, row_index, rows
from softcache.labels.validate import check_compatible, join_columns
from softcache.runtime.display import Displayed, Summary
from softcache.runtime.indexing import row_numbers

__all__ = [
    "ENCODINGS",
    "Encoding",
    "HeadHandle",
    "OutputHead",
    "VectorLabels",
    "encode_vectors",
    "scale_name",
]


class Encoding(NamedTuple):
    """How the numbers of a vector are stored.

    Attributes:
        dtype: of the column, NumPy's name; floats that NumPy has not are stored as their bits.
        largest: of encodings with a scale per row, the size that the largest number of a row gets; None without scales.
    """

    dtype: str
    largest: float | None


ENCODINGS: Mapping[str, Encoding] = MappingProxyType(
    {
        "float32": Encoding("float32", None),
        "bfloat16": Encoding("uint16", None),
        "float8_e4m3": Encoding("uint8", 448.0),
        "int8": Encoding("int8", 127.0),
    }
)
"""`float8_e4m3` is the finite one (4 bits of exponent, 3 of mantissa, no infinity), torch's `float8_e4m3fn`."""


def scale_name(name: str) -> str:
    """Returns the name of the column with the scales of a vector column."""
    return f"{name}_scale"


class OutputHead(NamedTuple):
    """What makes logits of vectors: torch tensors on one device.

    Attributes:
        weight: [V, D].
        bias: [V], or None.
        logit_scale: factor on the sum.
        softcap: c of c tanh(x / c), or None.
        mean, encoder: [D'] and [D', D] of coordinates: of a teacher's state h they are (h - mean) @ encoder; None where the
            vectors are the states themselves.
    """

    weight: Any
    bias: Any
    logit_scale: float
    softcap: float | None
    mean: Any = None
    encoder: Any = None


class HeadHandle(Protocol):
    """A head that is read when it is needed; equal handles are of equal heads."""

    def load(self, device: Any) -> OutputHead:
        """Returns the head on a device; read once for each."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class VectorLabels(Displayed):
    """Vectors of P positions.

    Attributes:
        arrays: the stored columns by name: of each vector its numbers [P, D] in the dtype of its encoding, and
            `NAME_scale` [P] float32 where that has scales.
        encodings: the encoding of each vector by name.
        num_classes: V of the head.
        head: of the vector `hidden`; None where there is none.

    Raises:
        LabelError: a column is missing, or of another dtype or shape.

    Example:
        >>> labels = VectorLabels({"hidden": np.array([[3, -6]], np.int8), "hidden_scale": np.ones(1, np.float32)},
        ...     {"hidden": "int8"}, num_classes=4)
        >>> labels.vectors().tolist()
        [[3.0, -6.0]]
    """

    arrays: Mapping[str, Array]
    encodings: Mapping[str, str]
    num_classes: int
    head: HeadHandle | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "arrays", MappingProxyType(dict(self.arrays)))
        num_rows = None
        for name, encoding in self.encodings.items():
            wanted = {name: (ENCODINGS[encoding].dtype, 2)}
            if ENCODINGS[encoding].largest is not None:
                wanted[scale_name(name)] = ("float32", 1)
            for column, (dtype, ndim) in wanted.items():
                array = self.arrays.get(column)
                found = None
                if array is not None:
                    num_rows = len(array) if num_rows is None else num_rows
                    found = (str(array.dtype).removeprefix("torch."), array.ndim, len(array))
                if found != (dtype, ndim, num_rows):
                    raise LabelError(
                        f"VectorLabels.{column}: expected dtype, axes and rows {(dtype, ndim, num_rows)} of encoding "
                        f"{encoding}; found {found}; encode vectors with encode_vectors"
                    )

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: Any) -> Self:
        """The record of the rows that an index chooses, as NumPy chooses them; an integer gives a record of one row."""
        return self.take(row_numbers(index, len(self), type(self).__name__))

    def summarize(self) -> Summary:
        facts = [
            (name, f"{self.arrays[name].shape[1]:,} numbers, {encoding}")
            for name, encoding in self.encodings.items()
        ]
        return Summary(f"{type(self).__name__}: {len(self):,} rows, {self.num_classes:,} classes", facts)

    @property
    def is_torch(self) -> bool:
        """True when the arrays are torch tensors, False when they are NumPy arrays."""
        return bool(is_torch_array(next(iter(self.arrays.values()))))

    def vectors(self, name: str = "hidden") -> Array:
        """Returns the vectors [P, D] of that name, float32."""
        numbers_PD, scale_P = self.numbers(name)
        is_torch = is_torch_array(numbers_PD)
        numbers_PD = numbers_PD.float() if is_torch else _as_float32(numbers_PD, self.encodings[name])
        return numbers_PD if scale_P is None else numbers_PD * scale_P[:, None]

    def numbers(self, name: str = "hidden") -> tuple[Array, Array | None]:
        """Returns the stored numbers [P, D], of a torch record in a dtype that computes, and the scales [P] or None."""
        numbers_PD = self.arrays[name]
        if is_torch_array(numbers_PD):
            import torch

            seen = {"bfloat16": torch.bfloat16, "float8_e4m3": torch.float8_e4m3fn}.get(self.encodings[name])
            if seen is not None:
                numbers_PD = numbers_PD.view(seen)
            if numbers_PD.dtype in (torch.int8, torch.float8_e4m3fn):
                numbers_PD = numbers_PD.to(torch.bfloat16)  # exact: at most 8 bits of mantissa
        return numbers_PD, self.arrays.get(scale_name(name))

    def head_logits(self) -> Any:
        """Returns what the head makes of the vectors `hidden` of a torch record, [P, V] float32: a few rows at a time.

        Raises:
            LabelError: there is no head.
            CorruptionError: the head's object is missing, or not what was written.
        """
        import torch

        from softcache.runtime.linear import linear_float32

        if self.head is None:
            raise LabelError(
                "VectorLabels.head_logits: expected a record with a head; found none; read it from a cache"
            )
        numbers_PD, scale_P = self.numbers()
        head = self.head.load(numbers_PD.device)
        with torch.autocast(numbers_PD.device.type, enabled=False):
            logits_PV = linear_float32(numbers_PD, head.weight)
            return finish_logits(logits_PV, scale_P, head.bias, head.logit_scale, head.softcap)

    def take(self, indices: Any) -> Self:
        """The record of some positions, in the order given; a slice shares memory."""
        index = row_index(indices, next(iter(self.arrays.values())))
        return self._mapped(lambda x: rows(x, index))

    def to_torch(self, device: Any = None, *, non_blocking: bool = False) -> Self:
        """The record as torch tensors; see `SoftLabels.to_torch`."""
        return self._mapped(lambda x: as_torch(x, device, non_blocking=non_blocking))

    def to_numpy(self) -> Self:
        """The record as NumPy arrays; see `SoftLabels.to_numpy`."""
        return self._mapped(as_numpy)

    def pin_memory(self) -> Self:
        """The record in page-locked memory."""
        return self._mapped(as_pinned)

    def with_arrays(self, arrays: Mapping[str, Array]) -> Self:
        """The same record of other positions, unchecked; see `SoftLabels.with_arrays`."""
        derived = object.__new__(type(self))
        derived.__dict__.update(self.__dict__)
        derived.__dict__["arrays"] = MappingProxyType({name: arrays[name] for name in self.arrays})
        return derived

    def _mapped(self, function: Callable[[Array], Array]) -> Self:
        return self.with_arrays({name: function(x) for name, x in self.arrays.items()})

    @classmethod
    def concat(cls, records: Sequence[VectorLabels]) -> VectorLabels:
        """One record of all positions, in order; the arrays are new.

        Raises:
            LabelError: no records, or records of other encodings or another head.
        """
        check_compatible("VectorLabels", records, ("num_classes", "encodings", "is_torch", "head"))
        return replace(
            records[0], arrays=join_columns("VectorLabels", [dict(record.arrays) for record in records])
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"arrays": dict(self.arrays)}  # a mapping proxy cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"arrays": MappingProxyType(state["arrays"])})


def encode_vectors(vectors_PD: Any, encoding: str, *, name: str = "hidden") -> dict[str, Any]:
    """Returns the columns of vectors in an encoding, by name: numbers, and scales where it has them.

    Numbers are rounded to nearest, ties to even. The scale of a row is its largest size over that which the encoding has
    for it; of a row of zeros it is 1.

    Args:
        vectors_PD: [P, D] torch, floating point.

    Returns:
        torch tensors on the same device. What is no finite number stays none, but for `int8`, where its row's scale is.
    """
    import torch

    dtype, largest = ENCODINGS[encoding]
    vectors_PD = vectors_PD.float()
    if largest is None:
        if encoding == "float32":
            return {name: vectors_PD.contiguous()}
        return {name: vectors_PD.to(getattr(torch, encoding)).view(getattr(torch, dtype))}
    scale_P = vectors_PD.abs().amax(1) / largest
    scale_P = scale_P.where(scale_P > 0, 1.0) if vectors_PD.numel() else scale_P
    scaled_PD = (vectors_PD / scale_P[:, None]).clamp(-largest, largest)
    if encoding == "int8":
        numbers_PD = scaled_PD.round().nan_to_num(0.0).to(torch.int8)
    else:
        numbers_PD = scaled_PD.to(torch.float8_e4m3fn).view(torch.uint8)
    return {name: numbers_PD, scale_name(name): scale_P}


def finish_logits(
    logits_PV: Any, scale_P: Any, bias_V: Any, logit_scale: float, softcap: float | None
) -> Any:
    """Returns logits of products of numbers and weight, in place: rows scaled, the bias added, scaled and capped."""
    if scale_P is not None:
        logits_PV.mul_(scale_P[:, None])
    if bias_V is not None:
        logits_PV.add_(bias_V)
    if logit_scale != 1.0:
        logits_PV.mul_(logit_scale)
    return logits_PV if softcap is None else logits_PV.div_(softcap).tanh_().mul_(softcap)


def _as_float32(stored: np.ndarray, encoding: str) -> np.ndarray:
    if encoding == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return float8_values()[stored] if encoding == "float8_e4m3" else stored.astype(np.float32)


@cache
def float8_values() -> np.ndarray:
    """Returns what the 256 bytes of `float8_e4m3` stand for, [256] float32: 1 bit of sign, 4 of exponent, 3 of mantissa."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    size[(exponent == 15) & (mantissa == 7)] = np.nan
    return np.where(byte < 128, size, -size).astype(np.float32)
