"""A dataset card next to a manifest: a README.md by which the datasets library and the hub read a Parquet cache.

    write_card("runs/digits/parquet")
    datasets.load_dataset("runs/digits/parquet")              # the labels, a row per label
    datasets.load_dataset("runs/digits/parquet", "samples")   # keys and ground truth

No checksum covers the card, and nothing of softcache reads it.
"""

from __future__ import annotations

import json

from softcache.cache.storage.open import open_objects
from softcache.errors import StorageError
from softcache.reader.open import open_cache
from softcache.runtime.display import printable

__all__ = ["CARD", "write_card"]

CARD = "README.md"


def write_card(url: str) -> str:
    """Writes the card of a cache; returns its text. The same card may be there already.

    Raises:
        StorageError: the cache is of Zarr, which datasets does not read; or another README.md is there.
    """
    cache = open_cache(url)
    manifest = cache.manifest
    if manifest.store != "parquet":
        raise StorageError(
            f"cache {cache.url}: its store is {manifest.store}, which the datasets library does not read; copy it first: "
            "`softcache convert CACHE OUT --store parquet --card`, or use datasets.Dataset(cache.to_arrow())"
        )
    configs = {"labels": f"{manifest.data}/*.parquet", "samples": manifest.samples}
    teacher = printable(str(manifest.identity.get("teacher", {}).get("spec", "?"))).replace("`", "'")
    lines = ["---", "configs:"]
    for number, (name, files) in enumerate(configs.items()):
        lines += [f"- config_name: {name}", f"  data_files: {json.dumps(files)}"]
        lines += ["  default: true"] * (number == 0)
    lines += [
        *("tags:", "- soft-labels", "- knowledge-distillation", "---", "", "# A cache of soft labels", ""),
        f"{len(cache):,} samples, {cache.num_views} views, {cache.num_classes:,} classes; teacher `{teacher}`.",
        "",
        "`softcache.open_cache` reads it with its checksums; `labels` and `samples` are the Parquet files inside.",
        "",
    ]
    text, objects = "\n".join(lines), open_objects(url)
    if not objects.put_if_absent(CARD, text.encode()) and objects.get(CARD) != text.encode():
        raise StorageError(f"cache {cache.url}: another {CARD} is there; move it, and run this again")
    return text
