"""torchvision's small datasets, held in memory; downloaded only with `source.download`.

Of the MNIST family, idx files are taken as distributions ship them too: flat in a folder, gzipped or not. They are
checked against their headers and laid out as torchvision expects them.
"""

from __future__ import annotations

import gzip
import math
import os
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcache.data.sources.base import SOURCES
from softcache.data.sources.images.base import ImageSourceSettings, InMemorySource, Source, Split
from softcache.errors import SourceError
from softcache.runtime.files import staged_file

__all__ = ["TORCHVISION", "Torchvision"]

# source.name: class in torchvision.datasets
TORCHVISION = {
    "fashion-mnist": "FashionMNIST",
    "mnist": "MNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}
_IDX_FILES = {  # of the MNIST family: name -> (magic number, axes)
    "train-images-idx3-ubyte": (2051, 3),
    "train-labels-idx1-ubyte": (2049, 1),
    "t10k-images-idx3-ubyte": (2051, 3),
    "t10k-labels-idx1-ubyte": (2049, 1),
}


class Torchvision(ImageSourceSettings):
    """A dataset of torchvision's; `root` is where its files are read, `data_dir` where they are unpacked or downloaded.

    Attributes:
        download: fetch the dataset where it is not there.
    """

    root: str | None = None
    data_dir: str = "runs/data"
    download: bool = False

    def open(self, split: Split) -> Source:
        return _open(self, split, self.max_samples(split))


for _name in TORCHVISION:
    SOURCES.register(f"image/{_name}")(Torchvision)


def _open(settings: Torchvision, split: Split, limit: int | None) -> Source:
    from torchvision import datasets

    kind = getattr(datasets, TORCHVISION[settings.name])
    data_dir = Path(settings.data_dir).expanduser()
    root = Path(settings.root).expanduser() if settings.root else data_dir
    if "MNIST" in kind.__name__:
        root = _lay_out_idx(root, data_dir, kind.__name__)
    train = split == "train"
    try:
        data = kind(root, train=train, download=False)
    except RuntimeError as missing:  # torchvision's "not found or corrupted"
        if not settings.download:
            raise SourceError(_where_to_get(settings, kind, root)) from missing
        try:
            data = kind(data_dir, train=train, download=True)
        except Exception as error:  # a download fails in many ways
            raise SourceError(
                f"{_where_to_get(settings, kind, root)}; the download failed: {error}"
            ) from error
    images, targets = torch.as_tensor(data.data), np.asarray(data.targets, np.int64)
    if (
        len(images) != len(targets)
        or not len(images)
        or not 0 <= targets.min() <= targets.max() < len(data.classes)
    ):
        raise SourceError(
            f"source {root}: {len(images)} images, {len(targets)} labels of {len(data.classes)} classes in the "
            f"{split} split; expected a label below that for every image; fetch the files again"
        )
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    count = min(limit or len(images), len(images))
    keys = [f"{settings.name}/{split}/{number:05d}" for number in range(count)]
    # A copy, so that a small part does not hold (or pickle) the whole.
    return InMemorySource(
        f"{settings.name}/{split}", images[:count].clone(), targets[:count], keys, data.classes
    )


def _where_to_get(settings: Torchvision, kind: Any, root: Path) -> str:
    if "MNIST" in kind.__name__:
        files = (
            f"{', '.join(_IDX_FILES)} (each may end in .gz), or the same unpacked under {kind.__name__}/raw"
        )
    else:
        files = kind.base_folder
    ways = ["set source.download = true", "point source.root at the folder that has them"]
    if settings.name == "fashion-mnist":
        ways.insert(
            1,
            "apt install dataset-fashion-mnist (Debian) and point source.root at the folder that "
            "`dpkg -L dataset-fashion-mnist` shows",
        )
    return f"source {settings.name}: no complete dataset in {root}; looked for {files}; {', or '.join(ways)}"


def _lay_out_idx(root: Path, data_dir: Path, folder: str) -> Path:
    """Lays idx files that lie flat in `root` (gzipped or not) out as torchvision expects; returns its root.

    Files that torchvision's layout already has are checked where they are.
    """
    found = {
        name: path for name in _IDX_FILES for path in (root / f"{name}.gz", root / name) if path.is_file()
    }
    if not found:
        for path in (root / folder / "raw" / name for name in _IDX_FILES):
            if path.is_file():
                _check_idx(path, path.name, path)
        return root
    lost = [name for name in _IDX_FILES if name not in found]
    if lost:
        raise SourceError(
            f"source {root}: {', '.join(lost)} (or .gz) missing, next to {sorted(found)}; copy all four"
        )
    raw = data_dir / folder / "raw"
    for name, path in found.items():
        try:
            raw.mkdir(parents=True, exist_ok=True)
            if not _is_unpacked(path, raw / name):
                _unpack(path, raw / name)
        except (OSError, EOFError, zlib.error) as error:
            raise SourceError(
                f"source file {path}: cannot be unpacked into {raw} (source.data_dir): {error}; fetch the file again, "
                "or set source.data_dir to a folder that can be written"
            ) from error
    return data_dir


def _is_unpacked(packed: Path, target: Path) -> bool:
    """Whether `target` already holds the contents of `packed`, by size and CRC-32 (which gzip files end with)."""
    if not target.is_file():
        return False
    content = target.read_bytes()
    if packed.suffix != ".gz":
        return packed.stat().st_size == len(content) and zlib.crc32(packed.read_bytes()) == zlib.crc32(
            content
        )
    with packed.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        return struct.unpack("<II", file.read()) == (zlib.crc32(content), len(content) % 2**32)


def _unpack(packed: Path, target: Path) -> None:
    """Writes `target` at once or not at all, and only if its content matches its name."""
    with staged_file(target) as staged:
        with (
            gzip.open(packed) if packed.suffix == ".gz" else packed.open("rb") as file,
            staged.open("wb") as out,
        ):
            shutil.copyfileobj(file, out)
        _check_idx(staged, target.name, packed)


def _check_idx(path: Path, name: str, origin: Path) -> None:
    magic, axes = _IDX_FILES[name]
    size = path.stat().st_size
    with path.open("rb") as file:
        head = np.frombuffer(file.read(4 + 4 * axes).ljust(4 + 4 * axes, b"\0"), ">u4").tolist()
    expected = 4 + 4 * axes + math.prod(head[1:])
    if head[0] != magic or size != expected:
        raise SourceError(
            f"source file {origin}: expected idx magic {magic} and {expected} bytes for shape {head[1:]}; found magic "
            f"{head[0]} and {size} bytes; fetch it again"
        )
