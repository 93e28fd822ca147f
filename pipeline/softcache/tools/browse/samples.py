"""Images, texts and names of a cache's samples, from the source that it was made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from softcache.errors import SoftcacheError
from softcache.labels import DetectionLabels
from softcache.reader.alignment import check_alignment
from softcache.reader.cache import Cache
from softcache.tools.page import encode_picture

__all__ = ["SourceSamples", "group_tokens"]

PICTURE_PIXELS = 160
UNFINISHED = "\ufffd"
"""What stands for bytes that are no letter yet."""
LONGEST_LETTER = 4
"""Bytes, and so tokens, of a letter at most."""
BUILT_IN = "digits/train"
"""The source that its name describes whole: it needs no setting, no file and no network."""


class SourceSamples:
    """The samples of a cache's source, each made when it is shown.

    Attributes:
        reason: why nothing of the samples can be shown; empty where it can.
        tokenizes: whether the text of tokens is known.
    """

    def __init__(self, cache: Cache, data: Any = None) -> None:
        """Args:
            data: the two splits of the config that made the cache (`softcache.modalities.open_data`); None: the source that
                the manifest describes, where its name alone does.

        Raises:
            AlignmentError: the cache was made of other data.
        """
        self._names, self.reason = cache.manifest.class_names, ""
        self._what = "token" if cache.manifest.kind == "tokens" else "class"
        self._picture: Callable[[int], Any] = lambda sample: None
        self._source: Any = None
        self._data = data
        self._seen: tuple[int, Any] | None = None
        if data is not None:
            check_alignment(cache, data.train)
            self._source, self._picture = data.train.source, data.train.picture
        elif (name := cache.manifest.identity["source"]["name"]) == BUILT_IN:
            self._open_built_in(cache)
        else:
            self.reason = (
                f"the manifest names the source {name!r} and not where it is; give the config that made the cache "
                "(--config)"
            )
        self.tokenizes = hasattr(data, "decode_tokens")

    def _open_built_in(self, cache: Cache) -> None:
        try:
            self._source = cache.source({"name": "digits", "max_train_samples": len(cache)})
        except (ImportError, SoftcacheError) as error:
            self.reason = str(error)
        else:
            self._picture = self._source.image

    def class_name(self, number: int) -> str:
        """Returns the name of a class, or its number."""
        if number < len(self._names):
            return self._names[number]
        if self._data is None:
            return f"{self._what} {number}"
        try:
            return str(self._data.class_name(number))
        except (IndexError, KeyError, OverflowError):  # a padded vocabulary has more ids than names
            return f"{self._what} {number}"

    def picture(self, sample: int, *, as_seen: bool = False) -> tuple[str | None, str]:
        """Returns a data URI of a sample's image or None, and why there is none; `as_seen`: as view 0 shows it, larger."""
        if self.reason:
            return None, ""
        try:
            seen = self.seen(sample) if as_seen else None
            if seen is not None:
                return encode_picture(seen.images[0].numpy(), 2 * PICTURE_PIXELS), ""
            image = self._picture(sample)
            return (None, "") if image is None else (encode_picture(image, PICTURE_PIXELS), "")
        except (SoftcacheError, ImportError, OSError, ValueError, TypeError) as error:
            return None, f"its image cannot be shown: {error}"

    def seen(self, sample: int) -> Any:
        """Returns a batch of one: image and ground truth as the teacher saw them in view 0; None where it is not known."""
        if self._data is None:
            return None
        if self._seen is None or self._seen[0] != sample:
            self._seen = (sample, self._data.train.load([sample], 0, fingerprints=False))
        return self._seen[1]

    def true_names(self) -> Sequence[str]:
        """Returns the names of the source's classes."""
        return self._source.class_names

    def decode_boxes(self, cache: Cache, labels: DetectionLabels) -> Any:
        """Returns the boxes [P, 4] of labels in pixels of view 0, float32; see `DetectionData.decode_boxes`."""
        return self._data.decode_boxes(cache, labels)

    def tokens(self, sample: int) -> Any:
        """Returns the token ids of a text, or None."""
        return self._source.sample(sample).tokens if self.tokenizes else None

    def decode(self, numbers: Sequence[int]) -> str:
        return str(self._data.decode_tokens(*numbers))

    def truth(self, sample: int) -> str:
        """Returns the ground truth that only the source has: several classes, boxes; empty where there is none."""
        if (hot := getattr(self._source, "multi_hot", None)) is not None:
            return (
                ", ".join(self.class_name(number) for number in hot[sample].nonzero()[0].tolist())
                or "no class"
            )
        if hasattr(self._source, "truth"):
            classes = Counter(self._source.truth(sample).classes.tolist())
            names = self._source.class_names
            return ", ".join(f"{count} × {names[number]}" for number, count in classes.items()) or "no box"
        return ""


def group_tokens(
    decode: Callable[[Sequence[int]], str], tokens: Sequence[int]
) -> list[tuple[str, list[int]]]:
    """Returns texts with the places of their tokens; tokens that only together make a letter are one text."""
    found: list[tuple[str, list[int]]] = []
    part: list[int] = []
    for place in range(len(tokens)):
        part.append(place)
        text = decode([tokens[at] for at in part])
        if UNFINISHED in text and len(part) < LONGEST_LETTER and place + 1 < len(tokens):
            continue
        found.append((text, part))
        part = []
    return found
