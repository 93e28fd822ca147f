"""The caches of a corpus in parts, made one after the other: while one part is labeled, the next is tokenized.

A part's cache is complete before the next one is begun, so that parts are restarted, checked and deleted one by one. The
tables of the next part are made by a process of its own, which ends with this one; where it fails, this process meets the
same error when that part's turn comes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context

from softcache.config.run import RunConfig
from softcache.errors import SoftcacheError, SourceError
from softcache.modalities import Data, open_data
from softcache.reader.cache import Cache
from softcache.reader.open import open_cache
from softcache.runs.cache import cache_is_ready, capture_labels
from softcache.runs.teacher import make_teacher, open_teacher, teacher_is_missing
from softcache.runtime.distributed import is_rank_zero, num_ranks
from softcache.runtime.logging import log_info
from softcache.runtime.signals import follow_parent
from softcache.teacher.base import Teacher
from softcache.teacher.capture.run import CaptureReport

__all__ = ["capture_parts"]


def capture_parts(
    config: RunConfig,
    *,
    reuse: bool = False,
    dask: str | None = None,
    workers: int | None = None,
    stall_seconds: float | None = None,
) -> Iterator[tuple[str, Cache, CaptureReport | None]]:
    """Labels the parts of a corpus in their order; yields each one's place, cache and what was done, None where
    a complete cache was left as it is (`reuse`).

    The teacher is loaded once (on a Dask cluster, `dask`, `workers` and `stall_seconds` of `capture_on_dask`, once a part).
    A script that calls this has its `if __name__ == "__main__":`.

    Raises:
        SourceError: a part is made with another tokenizer than the first one.
    """
    parts = config.parts()
    if teacher_is_missing(config):
        make_teacher(config, open_data(config))
    teacher: Teacher | None = None
    first: Data | None = None
    for number, part in enumerate(parts):
        url, data = part.cache_url, open_data(part)
        first = first or data
        _check_part(first, data, number)
        log_info(f"part {number + 1} of {len(parts)}: cache {url}")
        is_ready = cache_is_ready(part, data, url)
        if is_ready and reuse and num_ranks() == 1:  # the ranks of one teacher have to do the same
            yield url, open_cache(url), None
            continue
        with _opened_meanwhile([] if is_ready else parts[number + 1 : number + 2]):
            if dask is not None:
                from softcache.runs.dask import capture_on_dask

                report = capture_on_dask(part, url, dask, workers=workers, stall_seconds=stall_seconds)
                yield url, open_cache(url), report
            else:
                teacher = teacher or open_teacher(part, data)
                yield url, *capture_labels(part, data, teacher, url)


def _check_part(first: Data, data: Data, number: int) -> None:
    expected, found = (of.identity().get("tokenizer") for of in (first, data))
    if found != expected:
        raise SourceError(
            f"source parts: part {number} has the tokenizer {found}; expected {expected} as in the first one: parts of one "
            "corpus are made with the same settings"
        )


@contextmanager
def _opened_meanwhile(parts: list[RunConfig]) -> Iterator[None]:
    """Has another process open the data of `parts`, and waits for it when the block has ended without an error."""
    if not parts or not is_rank_zero():
        yield
        return
    process = get_context("spawn").Process(target=_open, args=(os.getpid(), parts))
    process.start()
    try:
        yield
        process.join()
    finally:
        process.kill()
        process.join()


def _open(parent: int, parts: list[RunConfig]) -> None:
    follow_parent(parent)
    with open(os.devnull, "w", encoding="utf-8") as sys.stderr:  # bars and errors are the parent's
        try:
            for part in parts:
                open_data(part)
        except SoftcacheError:
            sys.exit(1)
