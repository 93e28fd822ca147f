"""Pictures that cannot be decoded: all of them found in one pass, and left out where the settings want that.

`source.skip_unreadable = true` keeps the list of a split in `data_dir`, in unreadable/DIGEST/unreadable.json; the digest is
of keys, sizes and times of the files and of the decoder, so that a file that is repaired is looked at again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from softcache.data.sources.build_cache import build_dir_path, build_folder
from softcache.errors import SourceError
from softcache.runtime.files import parse_json
from softcache.runtime.logging import log_info, progress_bar

if TYPE_CHECKING:
    from softcache.data.sources.images.pictures import PictureSettings, PictureSource

__all__ = ["find_unreadable", "leave_out_unreadable", "unreadable_error"]

MAX_SHOWN, VERSION = 100, 1
PIECE = 1024


def find_unreadable(
    source: PictureSource, sample: int | None = None, error: Exception | None = None
) -> dict[int, str]:
    """Returns the reason for each sample of a source that cannot be decoded; decodes them all, on every core.

    Args:
        sample, error: one that is known already.

    Raises:
        SourceError: a file is missing, or may not be read: it is not the picture that is broken.
    """
    found = {} if sample is None else {sample: _reason(error)}

    def look(number: int) -> tuple[int, str] | None:
        try:
            source.decode(number)
        except SourceError:
            raise
        except Exception as why:  # decoders meet broken bytes with errors of every kind
            return number, _reason(why)
        return None

    numbers = [number for number in range(len(source)) if number != sample]
    label = f"check the pictures of {source.name}"
    with (
        ThreadPoolExecutor(os.cpu_count()) as threads,
        progress_bar(label, len(source), "pictures") as advance,
    ):
        for start in range(0, len(numbers), PIECE):
            piece = numbers[start : start + PIECE]
            found.update(filter(None, threads.map(look, piece)))
            advance(len(piece))
    return dict(sorted(found.items()))


def _reason(error: Exception | None) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def unreadable_error(source: PictureSource, reasons: Mapping[int, str]) -> SourceError:
    """Returns the error that names the samples which cannot be decoded."""
    skip = ", or leave it out by source.skip_unreadable = true" if source.can_skip else ""
    if len(reasons) == 1:
        (sample, reason), *_ = reasons.items()
        return SourceError(
            f"image {source.place_name(sample)}: cannot be decoded: {reason}; repair it, or take it out{skip}"
        )
    shown = [f"{source.place_name(sample)}: {reason}" for sample, reason in reasons.items()][:MAX_SHOWN]
    more = [f"and {len(reasons) - MAX_SHOWN:,} more"] if len(reasons) > MAX_SHOWN else []
    return SourceError(
        f"source {source.name}: {len(reasons):,} of {len(source):,} images cannot be decoded:\n  "
        + "\n  ".join([*shown, *more])
        + f"\nRepair them, or take them out{skip.replace('leave it', 'leave them')}"
    )


def leave_out_unreadable(source: PictureSource, settings: PictureSettings) -> PictureSource:
    """Returns a source without its samples that cannot be decoded; their number and the first names are logged.

    Raises:
        SourceError: none can be decoded, or a file cannot be read at all.
        StorageError: `data_dir` cannot be written.
    """
    from PIL import features

    made_from = {
        "version": VERSION,
        "source": source.digest,
        "stamp": source.stamp(),
        "decoder": ["Pillow", features.version("pil")],
    }
    folder = build_dir_path(settings, "unreadable", made_from)
    keys = _stored(folder)
    if keys is None:
        keys = {source.key(sample): reason for sample, reason in find_unreadable(source).items()}
        with build_folder(folder, lambda made: _stored(made) is not None) as staged:
            (staged / "unreadable.json").write_text(json.dumps(keys, indent=2) + "\n", encoding="utf-8")
    if not keys:
        return source
    if len(keys) == len(source):
        numbers = {sample: keys[source.key(sample)] for sample in range(len(source))}
        raise unreadable_error(source, numbers)
    names = ", ".join(list(keys)[:3]) + (", …" if len(keys) > 3 else "")
    log_info(
        f"source {source.name}: {len(keys):,} of {len(source):,} images cannot be decoded and are left out: {names} (all in "
        f"{folder / 'unreadable.json'})"
    )
    return source.without([sample for sample in range(len(source)) if source.key(sample) in keys])


def _stored(folder: Any) -> dict[str, str] | None:
    try:
        found = parse_json((folder / "unreadable.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
