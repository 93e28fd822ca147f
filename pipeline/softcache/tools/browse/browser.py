"""What the page of a cache is made of, as JSON: an overview of many samples, and the details of a few."""

from __future__ import annotations

import html
import re
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.resources import files
from typing import Any

import numpy as np

from softcache.errors import IncompleteCacheError, LabelError
from softcache.reader.cache import Cache
from softcache.tools.browse.details import describe_sample
from softcache.tools.browse.overview import MAX_VIEWS, Overview, choose_samples, summarize
from softcache.tools.browse.samples import SourceSamples
from softcache.tools.page import content_policy, read_asset, to_page_json

__all__ = ["Browser", "browse"]

MAX_FOUND = 200
"""Samples that a search for a key returns."""
FILE_SAMPLES = 200
FILE_TEXTS = 40
"""Samples of a page that is one file: with images, and with texts."""
PER_PAGE = {"image": 24, "cells": 12, "tokens": 6}


class Browser:
    """A cache and its source, ready to be looked through; its methods may be called by several threads."""

    def __init__(self, cache: Cache, source: SourceSamples | None = None) -> None:
        """Args:
            source: images and texts; None: those of the source that the manifest describes, where it is there.

        Raises:
            LabelError: the cache holds vectors, which have no classes.
            IncompleteCacheError: no unit of view 0 is finished.
            CorruptionError: the stored bytes are not what was written.
        """
        if cache.manifest.codec["name"] == "vectors":
            raise LabelError(
                f"cache {cache.url}: expected labels with classes; found hidden states (codec 'vectors'), without "
                "class or entropy; `softcache inspect` has their lengths"
            )
        self.cache, self.source = cache, source or SourceSamples(cache)
        self._lock = threading.Lock()
        self._chosen = choose_samples(cache)
        if not len(self._chosen):
            raise IncompleteCacheError(
                f"cache {cache.url}: no unit of view 0 is finished, so there is nothing to look at; rerun "
                "`softcache teacher-logits`"
            )
        self._keys, self._targets = cache.keys, cache.samples.targets
        first = cache.read(self._chosen[:1], 0)
        self._first: Any = getattr(first, "labels", first)

    @cached_property
    def overview(self) -> Overview:
        with self._lock:
            return summarize(self.cache, self._chosen, self._targets)

    def details(self, samples: Sequence[int], first: int = 0) -> list[dict[str, Any]]:
        """Returns what is shown of samples, in that order.

        Raises:
            IndexError: there is no such sample.
        """
        with self._lock:
            return [describe_sample(self.cache, self.source, int(sample), first) for sample in samples]

    def find(self, text: str) -> dict[str, Any]:
        """Returns the numbers of finished samples whose key contains a text, of the first `MAX_FOUND` of all samples."""
        with self._lock:
            places = self._matches(text.casefold())
            found = np.fromiter((place for _, place in zip(range(MAX_FOUND), places, strict=False)), np.int64)
            found = found[np.isin(found, self.cache.samples_in(0))]
            return self._columns(summarize(self.cache, found, self._targets)) | {"most": MAX_FOUND}

    def _matches(self, text: str) -> Iterator[int]:
        return (place for place, key in enumerate(self._keys) if text in key.casefold())

    def _columns(self, found: Overview) -> dict[str, Any]:
        """Returns the overview as columns, with the names of the classes in it."""
        used = np.unique(np.concatenate([found.guess_S, found.target_S]))
        names = (
            {}
            if self.cache.manifest.kind == "tokens"
            else {int(n): self.source.class_name(int(n)) for n in used if n >= 0}
        )
        return {
            "names": names,
            "sample": found.sample_S.tolist(),
            "key": [self._keys[int(sample)] for sample in found.sample_S],
            "guess": found.guess_S.tolist(),
            "target": found.target_S.tolist(),
            "rows": found.rows_S.tolist(),
            **{
                name: [None if np.isnan(x) else round(float(x), 4) for x in values]
                for name, values in (
                    ("confidence", found.confidence_S),
                    ("doubt", found.doubt_S),
                    ("agrees", found.agrees_S),
                    ("same", found.same_S),
                )
            },
        }

    def _facts(self) -> list[tuple[str, str]]:
        manifest = self.cache.manifest
        identity, labels = manifest.identity, manifest.identity["labels"]
        kept = f"{labels['policy']}, K = {labels['k']}"
        views = f", {self.cache.num_views:,} views" if self.cache.num_views > 1 else ""
        rows = f", {self.cache.num_rows_done:,} rows" if manifest.rows else ""
        return [
            ("Teacher", str(identity["teacher"]["spec"])),
            ("Source", f"{identity['source']['name']}: {len(self.cache):,} samples{views}{rows}"),
            ("Labels", f"{self.cache.num_classes:,} classes; {kept}, codec {manifest.codec['name']}"),
            ("Finished", f"{len(self.cache.markers):,} of {self.cache.num_units:,} units"),
        ]

    def _notes(self, num_shown: int | None) -> dict[str, list[str]]:
        """Returns what was looked at (`notes`), and what cannot be shown (`missing`)."""
        manifest, count, total = self.cache.manifest, len(self._chosen), len(self.cache)
        missing: list[str] = []
        looked = (
            f"all {total:,} samples"
            if count == total
            else f"{count:,} of {total:,} samples, chunks spread evenly"
        )
        views = min(self.cache.num_views, MAX_VIEWS)
        if views < self.cache.num_views and manifest.rows is None:
            looked += f", in {views} of {self.cache.num_views:,} views"
        notes = [f"Looked at: {looked}. Order and filters are of these."]
        if num_shown is not None and num_shown < count:
            half = -(-num_shown // 2)
            notes[0] += (
                f" In this file are {num_shown:,} of them: the {half:,} with the highest entropy, and {num_shown - half:,} "
                "spread evenly over the others."
            )
        if self.source.reason:
            what = (
                "Images are not shown"
                if manifest.kind != "tokens"
                else "Texts are not shown, but the teacher's likeliest tokens"
            )
            missing.append(f"{what}: {self.source.reason}.")
        if manifest.codec.get("sampling"):
            notes.append("The classes of this cache were drawn at random: a likelier class may be missing.")
        if getattr(self._first, "dropped_bound", None) is not None:
            notes.append("Classes are independent: the entropy is the sum over the kept ones.")
        elif self._first.stats is None:
            notes.append(
                "The cache has no statistics: the entropy is that of the kept classes and of the rest as one class, "
                "at least so much."
            )
        return {"notes": notes, "missing": missing}

    def page(self, *, num_shown: int | None = None, served: bool = False) -> tuple[str, str]:
        """Returns the page as HTML, and its Content-Security-Policy.

        Args:
            num_shown: samples that a page which is one file has; None: `FILE_SAMPLES`, of texts `FILE_TEXTS`.
            served: the page asks the server that it came from for details; it has none itself.
        """
        kind = self.cache.manifest.kind
        overview = self.overview
        details: dict[str, Any] = {}
        if not served:
            overview = _few_of(overview, num_shown or (FILE_TEXTS if kind == "tokens" else FILE_SAMPLES))
            details = {str(one["sample"]): one for one in self.details(overview.sample_S.tolist())}
        data = {
            "kind": kind,
            "served": served,
            "perPage": PER_PAGE[kind],
            "total": len(self.cache),
            "facts": self._facts(),
            "maxEntropy": float(np.log(self.cache.num_classes)),
            "details": details,
        }
        data |= self._notes(None if served else len(overview.sample_S)) | self._columns(overview)
        script = read_asset("theme.js") + _file("page.js")
        style = read_asset("style.css") + _file("page.css")
        policy = content_policy(script=script, style=style, connect="'self'" if served else "'none'")
        parts = {
            "POLICY": policy,
            "TITLE": html.escape(f"Cache {self.cache.url}"),
            "STYLE": style,
            "SCRIPT": script,
            "DATA": to_page_json(data),
        }
        return re.sub("@([A-Z]+)@", lambda mark: parts[mark[1]], _file("page.html")), policy


def _few_of(overview: Overview, count: int) -> Overview:
    """Returns `count` samples: half of them those with the highest entropy, the others evenly spread."""
    total = len(overview.sample_S)
    if total <= count:
        return overview
    by_doubt = np.argsort(-np.nan_to_num(overview.doubt_S, nan=-1.0), kind="stable")
    first, others = by_doubt[: -(-count // 2)], np.sort(by_doubt[-(-count // 2) :])
    spread = others[np.linspace(0, len(others) - 1, count - len(first)).round().astype(np.int64)]
    chosen = np.sort(np.concatenate([first, spread]))
    return Overview(**{name: values[chosen] for name, values in vars(overview).items()})


def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


class Shown:
    """A page of a notebook: in a frame of its own, which may run its script and nothing else."""

    def __init__(self, page: str, height: int) -> None:
        self.page, self._height = page, height

    def _repr_html_(self) -> str:
        uri = html.escape(self.page, quote=True)
        return (
            f'<iframe srcdoc="{uri}" sandbox="allow-scripts" title="softcache" '
            f'style="width:100%;height:{self._height}px;border:0"></iframe>'
        )


def browse(cache: Cache, data: Any = None, *, num_shown: int | None = None, height: int = 800) -> Shown:
    """Returns a cache's samples as a page in a notebook: images or texts, the teacher's classes, entropy, agreement.

    Args:
        cache: `softcache.open_cache(PLACE)`.
        data: the splits of the config that made it (`softcache.modalities.open_data(config)`), for images and texts; without
            it those of the digits alone are shown.
        num_shown: samples in the page; None: 200, of texts 40.
        height: pixels.

    Raises:
        AlignmentError: the cache was made of other data.
        IncompleteCacheError: no unit of view 0 is finished.
    """
    return Shown(Browser(cache, SourceSamples(cache, data)).page(num_shown=num_shown)[0], height)
