"""Files of torch.save and of pickle, read without running code: plain containers, numbers, texts, NumPy arrays and tensors.

torch.load reads its own files with `weights_only`, which has such a list, but pickles of protocol 2 only. What holds builtin
containers, numbers and texts alone (`plain`) is read by an unpickler that finds no class at all, whether torch.save, pickle
or joblib wrote it.
"""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from softcache.errors import SourceError

__all__ = ["load_file"]

MAX_BYTES = 2**30
"""Of an unpacked pickle: more is not one sample's labels."""
NUMPY_CORES = ("numpy.core.multiarray", "numpy._core.multiarray")


class _Plain(pickle.Unpickler):
    """Builtin containers, numbers and texts only."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code")


def load_file(path: Path, *, of: str, plain: bool = False) -> Any:
    """Returns what a file of torch.save or, with `plain`, of pickle holds.

    Args:
        of: the format, for messages.
        plain: whether it holds neither arrays nor tensors.

    Raises:
        SourceError: it is missing, cut off, or holds anything else than numbers, texts, arrays and containers.
    """
    try:
        content = path.read_bytes()
        return _load_plain(content) if plain else _load_torch(content)
    except OSError as error:
        raise SourceError(f"{of}, {path}: {error.strerror}; restore it") from error
    except Exception as error:  # a damaged or malicious file raises whatever its opcodes lead to
        reason = str(error).strip().splitlines()
        raise SourceError(
            f"{of}, {path}: cannot be read as numbers and arrays: {reason[0] if reason else type(error).__name__}; "
            "restore the file"
        ) from error


def _load_plain(content: bytes) -> Any:
    if content[:2] == b"PK":  # torch.save's archive: the pickle, and storages of which there are none
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            member = next(info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
            if member.file_size > MAX_BYTES:
                raise ValueError("too large")
            content = archive.read(member)
    elif content[:1] == b"\x78":
        content = _unpack(content)
    return _Plain(io.BytesIO(content)).load()


def _unpack(content: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    unpacked = unpacker.decompress(content, MAX_BYTES)
    if unpacker.unconsumed_tail or not unpacker.eof:
        raise ValueError("cut off, or too large")
    return unpacked


def _load_torch(content: bytes) -> Any:
    import torch

    multiarray: Any = np._core.multiarray  # type: ignore[attr-defined]
    dtypes = {
        type(np.dtype(name))
        for name in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")
    }
    named = [
        (getattr(multiarray, name), f"{core}.{name}")
        for core in NUMPY_CORES
        for name in ("_reconstruct", "scalar")
    ]
    with torch.serialization.safe_globals([np.ndarray, np.dtype, *named, *dtypes]):
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
