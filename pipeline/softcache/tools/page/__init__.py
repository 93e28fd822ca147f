"""What softcache's HTML pages share: one style, light and dark; data inside a page; a policy that forbids every request."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from softcache.errors import StorageError
from softcache.runtime.files import finite, replace_file

__all__ = [
    "check_is_page",
    "content_policy",
    "encode_picture",
    "escape_json",
    "read_asset",
    "to_page_json",
    "write_whole",
]

SHARP = 64
"""Pixels of a picture's longer side up to which it is stored without loss."""


def read_asset(name: str) -> str:
    """Returns a file of this package: style.css, theme.js."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def escape_json(text: str) -> str:
    """Returns JSON that cannot end the <script> that it stands in, whatever its strings are."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def to_page_json(value: Any) -> str:
    """Returns a value as JSON for the inside of a <script>; null stands for NaN and infinities."""
    return escape_json(json.dumps(finite(value), allow_nan=False, ensure_ascii=False, separators=(",", ":")))


def content_policy(*, script: str, style: str, connect: str = "'none'") -> str:
    """Returns the Content-Security-Policy of a page with one script and one style: no other runs, and nothing is loaded."""
    allowed = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "img-src": "data:",
        "connect-src": connect,
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{what} {where}" for what, where in allowed.items())


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def encode_picture(image_CHW: Any, size: int) -> str:
    """Returns a data URI of an image, made anew of its pixels.

    Args:
        image_CHW: uint8 [C, H, W], a tensor or an array; of more than three channels the first three are shown.
        size: pixels of the longer side, at most.
    """
    from PIL import Image

    array = np.asarray(image_CHW)
    array = array[:3] if len(array) >= 3 else array[:1]
    picture = Image.fromarray(array[0] if len(array) == 1 else np.moveaxis(array, 0, 2))
    picture.thumbnail((size, size))
    kind = "PNG" if max(picture.size) <= SHARP else "JPEG"
    file = io.BytesIO()
    picture.save(file, format=kind, quality=85)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def check_is_page(out: str | Path, what: str) -> None:
    """Checks that what a page would take the place of is a page, or nothing.

    Raises:
        StorageError: it is another file, or a folder.
    """
    try:
        with Path(out).open("rb") as file:
            found = file.read(64)
    except IsADirectoryError:
        raise StorageError(f"{what} {out}: is a folder; expected a file; give --out a name in it") from None
    except OSError:
        return  # there is none, or writing says why not
    if found and not found.lstrip().lower().startswith(b"<!doctype html"):
        raise StorageError(
            f"{what} {out}: there is a file that is no page, and would be lost; choose another --out"
        )


def write_whole(out: str | Path, html: str, what: str) -> int:
    """Writes a page, whole or not at all; returns its bytes.

    Raises:
        StorageError: it cannot be written, or would take the place of a file that is no page.
    """
    check_is_page(out, what)
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, html)
    except OSError as error:
        raise StorageError(f"{what} {out}: cannot be written: {error}; choose another --out") from error
    return out.stat().st_size
