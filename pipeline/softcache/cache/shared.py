"""Objects that all rows of a cache share: written before the manifest, which names their sizes and sha256.

The object `head` is the output layer of a teacher whose hidden states the rows are: a safetensors file with `weight` [V, D]
and `bias` [V]; of states that are kept as coordinates also `mean` [D'] and `encoder` [D', D], which a writer needs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from softcache.cache.codecs.vectors import VectorCodec
from softcache.cache.manifest import Manifest, SharedObject
from softcache.cache.storage.base import Objects
from softcache.cache.storage.open import open_objects
from softcache.errors import CorruptionError, LabelError
from softcache.hashing.digests import digest_bytes
from softcache.labels.vectors import OutputHead

__all__ = ["OBJECT_PATH", "SharedHead", "get_shared", "parse_head", "put_shared", "shared_head"]

OBJECT_PATH = re.compile(r"objects/[A-Za-z0-9._-]+-[0-9a-f]{16}\.[a-z0-9]+")


def put_shared(objects: Objects, contents: Mapping[str, bytes]) -> dict[str, SharedObject]:
    """Writes objects under names that hold their digest, so that two runs that begin at once do not meet."""
    found = {}
    for name, data in contents.items():
        digest = digest_bytes(data)
        path = f"objects/{name}-{digest[:16]}.safetensors"
        objects.put_if_absent(path, data)
        found[name] = SharedObject(path=path, num_bytes=len(data), sha256=digest)
    return found


def get_shared(objects: Objects, described: SharedObject) -> bytes:
    """Returns an object that a manifest names.

    Raises:
        CorruptionError: it is missing, or not what was written.
    """
    where = f"cache {objects.url}, {described.path}"
    what_next = "restore it from a copy (it cannot be made again), or make the cache anew"
    found = next(iter(objects.get_sized({described.path: described.num_bytes})))
    if not isinstance(found, bytes):
        state = "missing" if found is None else f"{found} bytes; {described.num_bytes} bytes expected"
        raise CorruptionError(f"{where}: {state}; {what_next}")
    if (digest := digest_bytes(found)) != described.sha256:
        raise CorruptionError(
            f"{where}: sha256 {digest[:12]}…; {described.sha256[:12]}… expected; {what_next}"
        )
    return found


@dataclass(frozen=True)
class SharedHead:
    """The head of a cache's hidden states, read when it is needed; see `HeadHandle`. Equal heads of two caches are equal."""

    url: str = field(compare=False)
    described: SharedObject = field(compare=False)
    sha256: str
    num_classes: int
    size: int
    logit_scale: float
    softcap: float | None

    def load(self, device: Any) -> OutputHead:
        """Returns the head on a device; the last two heads are kept.

        Raises:
            CorruptionError: the object is missing, or not what was written.
        """
        return _load(self, str(device))


def shared_head(url: str, manifest: Manifest) -> SharedHead | None:
    """Returns the head of a cache's hidden states; None of other labels."""
    codec = manifest.build_codec()
    if not isinstance(codec, VectorCodec) or codec.head is None:
        return None
    described = manifest.objects["head"]
    return SharedHead(
        url,
        described,
        described.sha256,
        codec.num_classes,
        dict(codec.vectors)["hidden"].size,
        codec.head.logit_scale,
        codec.head.softcap,
    )


@lru_cache(maxsize=2)
def _load(head: SharedHead, device: str) -> OutputHead:
    where = f"cache {head.url}, {head.described.path}"
    tensors = parse_head(get_shared(open_objects(head.url), head.described), where=where)
    found = tuple(tensors["weight"].shape)
    if found != (head.num_classes, head.size):
        raise CorruptionError(
            f"{where}: a weight of shape {found}; expected {(head.num_classes, head.size)}; restore it from a copy"
        )
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    return OutputHead(
        moved["weight"],
        moved.get("bias"),
        head.logit_scale,
        head.softcap,
        moved.get("mean"),
        moved.get("encoder"),
    )


def parse_head(data: bytes, *, where: str) -> dict[str, Any]:
    """Returns the tensors of a head's file by name.

    Raises:
        CorruptionError: it is no safetensors file, has no weight, or numbers that are not finite.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CorruptionError(f"{where}: no safetensors file: {error}; restore it from a copy") from error
    if "weight" not in tensors or tensors["weight"].ndim != 2:
        raise CorruptionError(
            f"{where}: expected a matrix `weight`; found {sorted(tensors)}; restore it from a copy"
        )
    for name, tensor in tensors.items():
        # A bias of -inf masks a class, which the teacher never predicts.
        is_known = torch.isfinite(tensor) | (torch.isneginf(tensor) if name == "bias" else False)
        if not (tensor.is_floating_point() and bool(is_known.all())):
            raise LabelError(
                f"{where}, tensor {name}: expected finite floating-point numbers; found others; check the teacher's weights"
            )
    return tensors
