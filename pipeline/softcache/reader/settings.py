"""The config table [reader]."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from softcache.reader.cache import DEFAULT_WINDOW_BLOCKS, Cache
from softcache.reader.memmap import MemmapSettings
from softcache.reader.open import open_cache
from softcache.settings import Settings

__all__ = ["ReaderSettings"]


class ReaderSettings(Settings):
    """[reader]: how a student reads the cache.

    `fingerprint_fraction` is the fraction of (sample, view) pairs whose content is compared with the fingerprint taken at
    capture; the first `fingerprint_first` samples of every loader process always are. `verify` compares each unit with
    its marker's sha256 the first time that a process reads from it.

    With `memmap` "auto" a view is decoded once into a memory map in `memmap_dir` (see `softcache.reader.memmap`), if the
    whole cache takes at most `memmap_limit_bytes` there. The order is then a full shuffle, otherwise a shuffle within
    windows of 16 chunks; `window_blocks` and `block_samples` override that.

    Attributes:
        workers: processes that read batches; 0: a thread of this process.
        num_views: the first so many views of the cache are used; none: all.
        several_teachers: whether caches that are read as one may be of different teachers.
    """

    workers: int = Field(0, ge=0)
    block_samples: int | None = Field(None, ge=1)
    window_blocks: int | None = Field(None, ge=1)
    memmap: Literal["auto", "never"] = "auto"
    memmap_limit_bytes: int = Field(8 << 30, ge=0)
    memmap_dir: str | None = None
    fingerprint_fraction: float = Field(1.0, ge=0, le=1)
    fingerprint_first: int = Field(1024, ge=0)
    verify: bool = True
    num_views: int | None = Field(None, ge=1)
    several_teachers: bool = False

    @property
    def fingerprint_checks(self) -> dict[str, Any]:
        """The arguments of a dataset that compares fingerprints (`softcache.reader.dataset.SoftLabelDataset`)."""
        return {
            "fingerprint_fraction": self.fingerprint_fraction,
            "fingerprint_first": self.fingerprint_first,
        }

    def open_cache(self, url: str | list[str]) -> Cache:
        """Returns the cache at a path or URL, or those at several places as one, to be read as these settings say.

        Raises as `softcache.reader.open.open_cache`.
        """
        memmap = MemmapSettings(self.memmap_limit_bytes, self.memmap_dir) if self.memmap == "auto" else None
        window = self.window_blocks or DEFAULT_WINDOW_BLOCKS
        return open_cache(
            url,
            window_blocks=window,
            verify=self.verify,
            memmap=memmap,
            several_teachers=self.several_teachers,
        )
