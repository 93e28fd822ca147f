"""Small caches as bytes by path: changed at will, signed again as an attacker would, and put back on disk.

A cache's checksums protect it against accidents. Who makes a cache makes its checksums too, so behind them every
document and every shard is untrusted input: `signed` mends all digests after a change, and readers meet what is behind.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcache.cache.storage.open import open_objects
from softcache.errors import SoftcacheError
from softcache.hashing.digests import digest_bytes
from softcache.losses import forward_kl
from softcache.reader.dataset import SoftLabelDataset
from softcache.reader.memmap import MemmapSettings
from softcache.reader.open import open_cache
from softcache.runs import cache_is_ready
from softcache.stages.inspect import _identity, _labels, _storage
from softcache.tools.garbage import collect_garbage
from softcache.tools.shrink import ShrinkSettings, shrink_manifest
from softcache.tools.verify.teacher import verify_units
from tests.support.caches import make_cache
from tests.support.text_caches import make_text_cache

KINDS = ("images-zarr", "images-parquet", "images-packed", "tokens-zarr", "tokens-parquet")
MANIFEST, SAMPLES = "manifest.json", "samples.parquet"


class Files(dict[str, bytes]):
    """Bytes by path; its repr is short enough for a report."""

    def __repr__(self) -> str:
        return f"<{len(self)} files, {sum(map(len, self.values())):,} bytes>"


def make_small(kind: str, folder: Path, *, other_teacher: bool = False) -> tuple[Any, Any, Files]:
    """Returns (config, data, files) of a cache of a few units; what it is made from stays in `folder`."""
    modality, _, form = kind.partition("-")
    capture = {"evaluate": False, "store": "parquet" if form == "parquet" else "zarr"}
    if form == "packed":
        capture["codec"] = "packed"
    if modality == "tokens":
        capture |= {"unit_samples": 12, "chunk_samples": 6}
        teacher = {"model": f"tests.fakes_language:{'known_scaled' if other_teacher else 'known'}"}
        config, data, cache = make_text_cache(folder / kind, folder, capture=capture, teacher=teacher)
    else:
        capture |= {"unit_samples": 16, "chunk_samples": 8}
        source = {"max_train_samples": 40, "max_eval_samples": 20}
        teacher = {"model": f"tests.fakes:{'known_scaled' if other_teacher else 'known'}"}
        config, data, cache = make_cache(folder / kind, source=source, capture=capture, teacher=teacher)
    return config, data, read_files(Path(cache.url))


def read_files(root: Path) -> Files:
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def write_files(root: Path, files: Files, before: Files) -> None:
    """Makes a folder that holds `before` hold `files`."""
    for path in before.keys() - files.keys():
        (root / path).unlink(missing_ok=True)
    for path, data in files.items():
        if before.get(path) is not data:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)


def signed(files: Files) -> Files:
    """Mends every digest, as far as the documents can still be read: table -> manifest, shards and manifest -> markers."""
    out = Files(files)
    manifest = _document(out.get(MANIFEST, b""))
    if isinstance(manifest, dict) and SAMPLES in out:
        digest = digest_bytes(out[SAMPLES])
        if manifest.get("samples_sha256") != digest:
            out[MANIFEST] = json.dumps(manifest | {"samples_sha256": digest}).encode()
    for path in [path for path in out if path.startswith("units/") and path.endswith(".json")]:
        marker = _document(out[path])
        if not isinstance(marker, dict):
            continue
        if "manifest_sha256" in marker:
            marker["manifest_sha256"] = digest_bytes(out.get(MANIFEST, b""))
        shards = marker.get("shards")
        for shard in shards if isinstance(shards, list) else []:
            data = (
                out.get(shard.get("path"))
                if isinstance(shard, dict) and _is_text(shard.get("path"))
                else None
            )
            if data is not None and shard.get("sha256") != digest_bytes(data):
                shard |= {"sha256": digest_bytes(data), "num_bytes": len(data)}
        out[path] = json.dumps(marker).encode()
    return out


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _document(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def probe(root: Path, config: Any, data: Any, memmap_folder: Path) -> list[str]:
    """Does with a cache all that a reader does; returns the faults and errors of ours, and lets any other error out.

    A reader checks no more than numbers of the right shape, so these are looked at as well.
    """
    refusals: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # NumPy's overflows and invalid values are no way to meet bad input
        for use in (_verify, _read, _materialize, _inspect, _align, _train, _plan_shrink, _collect):
            try:
                refusals += use(root, config, data, memmap_folder) or []
            except SoftcacheError as error:
                refusals.append(f"{use.__name__}: {error}")
    for line in refusals:
        assert line.strip(), "an error without a message"
    return refusals


def _verify(root: Path, *_: Any) -> list[str]:
    return list(verify_units(open_cache(str(root))))


def _read(root: Path, config: Any, data: Any, memmap_folder: Path) -> None:
    cache = open_cache(str(root))
    _read_all(cache)
    assert not cache.missing_units or cache.markers is not None


def _read_all(cache: Any) -> None:
    for view in range(min(cache.num_views, 4)):
        samples = cache.samples_in(view)
        if not len(samples):
            continue
        stored = cache.read_stored(samples, view)
        ids = np.asarray(stored.labels.ids)
        assert ids.shape[0] == stored.counts.sum()
        assert not len(ids) or ids.max() <= cache.num_classes, (
            "an id that a loss would follow out of the logits"
        )
        assert not np.isnan(np.asarray(stored.labels.log_probs)).any()


def _materialize(root: Path, config: Any, data: Any, memmap_folder: Path) -> None:
    cache = open_cache(str(root), memmap=MemmapSettings(1 << 24, str(memmap_folder), required=True))
    _read_all(cache)


def _inspect(root: Path, *_: Any) -> None:
    cache = open_cache(str(root))
    json.dumps({**_identity(cache), **_storage(cache), **_labels(cache)})


def _align(root: Path, config: Any, data: Any, memmap_folder: Path) -> None:
    cache_is_ready(config, data, str(root))


def _train(root: Path, config: Any, data: Any, memmap_folder: Path) -> None:
    cache = open_cache(str(root))
    samples = cache.samples_in(0)[:20]
    if not len(samples):
        return
    batch = SoftLabelDataset(data.train, cache).fetch(samples)
    rows = len(batch.labels)
    loss_P = forward_kl(torch.zeros(rows, cache.num_classes), batch.labels, temperature=2.0, tail="drop")
    assert loss_P.shape == (rows,)


def _plan_shrink(root: Path, *_: Any) -> None:
    shrink_manifest(open_cache(str(root)), ShrinkSettings(k=1))


def _collect(root: Path, *_: Any) -> None:
    collect_garbage(open_objects(str(root)), delete=False, older_than=0)
