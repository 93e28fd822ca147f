"""Manifests of caches that no source stands behind, for tests and benchmarks of stores and markers; imports no torch."""

from typing import Any

from softcache.cache.codecs import Codec
from softcache.cache.manifest import Manifest, Plan


def bare_manifest(codec: Codec, plan: Plan, store: Any = "zarr") -> Manifest:
    """The manifest of images, whose digests are zeros."""
    nothing: dict[str, Any] = {"digest": "0" * 64}
    return Manifest(
        kind="image",
        identity={
            "teacher": {"spec": "x:y", "dtype": "float32"},
            "source": nothing | {"name": "x"},
            "views": nothing | {"settings": {}},
            "labels": {"policy": "top_k", "k": codec.k, "temperatures": list(codec.temperatures)},
        },
        num_classes=codec.num_classes,
        codec=codec.to_dict(),
        plan=plan,
        store=store,
        data="labels.zarr" if store == "zarr" else "parquet",
        samples_sha256="0" * 64,
        features=codec.features,
    )
