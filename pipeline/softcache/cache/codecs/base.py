"""A codec from what a manifest says of it. Manifests are untrusted: every parameter is checked."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from softcache.cache.codecs.detection import CellCodec
from softcache.cache.codecs.packed.codec import PackedCodec
from softcache.cache.codecs.plain import OpenCodec
from softcache.errors import LabelError, ManifestError
from softcache.labels import Sampling

__all__ = ["AnyCodec", "Codec", "codec_from_dict"]

Codec = OpenCodec | PackedCodec
"""Of `SoftLabels`."""
AnyCodec = Codec | CellCodec
_KINDS: dict[str, type[AnyCodec]] = {kind.name: kind for kind in (OpenCodec, PackedCodec, CellCodec)}


def codec_from_dict(described: Mapping[str, Any]) -> AnyCodec:
    """Returns the codec that a manifest describes.

    Raises:
        ManifestError: unknown name, or parameters out of range.
    """
    parameters = dict(described)
    name = parameters.pop("name", None)
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ManifestError(
            f"codec.name {name!r}: unknown; this version reads: {', '.join(_KINDS)}; upgrade softcache"
        )
    if kind is CellCodec:
        try:
            return CellCodec.from_dict(described)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ManifestError(
                f"codec {name}: bad parameters: {error!r}; found {dict(described)}"
            ) from error
    highest, sampling = parameters.pop("max_temperature", None), parameters.pop("sampling", None)
    try:
        if not isinstance(parameters["temperatures"], list | tuple):
            raise TypeError("temperatures are no list")
        common: dict[str, Any] = {
            "num_classes": int(parameters.pop("num_classes")),
            "k": int(parameters.pop("k")),
            "temperatures": tuple(float(t) for t in parameters.pop("temperatures")),
            "stats": parameters.pop("stats", True),
            "max_temperature": None if highest is None else float(highest),
            "sampling": None if sampling is None else Sampling(**sampling),
        }
        codec = _open(common, parameters) if kind is OpenCodec else _packed(common, parameters)
        # Whatever could be taken in two ways ("10" for 10, 10.5 for 10) is refused, and the columns are made once.
        sound = _is_sound(codec) and codec.to_dict() == {
            **described,
            "temperatures": list(codec.temperatures),
        }
        _ = codec.columns if sound else None
    except (KeyError, TypeError, ValueError, OverflowError, LabelError) as error:
        raise ManifestError(f"codec {name}: bad parameters: {error!r}") from error
    if not sound or parameters:
        raise ManifestError(f"codec {name}: parameters out of range or unknown: {dict(described)}")
    return codec


def _open(common: dict[str, Any], parameters: dict[str, Any]) -> OpenCodec:
    codec = OpenCodec(**common, values=parameters.pop("values"))
    if codec.values not in ("float16", "float32"):
        raise ValueError(f"values {codec.values!r}")
    return codec


def _packed(common: dict[str, Any], parameters: dict[str, Any]) -> PackedCodec:
    step = parameters.pop("step", None)
    codec = PackedCodec(
        **common, step=None if step is None else float(step), tail=parameters.pop("tail", "fixed")
    )
    if step is None and parameters.pop("values") != "float16":
        raise ValueError("values other than float16 need a step")
    return codec


def _is_sound(codec: Codec) -> bool:
    grid, sampling = codec.temperatures, codec.sampling
    return (
        1 <= codec.k <= codec.num_classes <= 2**31
        and 1 <= len(grid) <= 64
        and grid[0] == 1.0
        and all(a < b < float("inf") for a, b in pairwise(grid))
        and isinstance(codec.stats, bool)
        and (codec.max_temperature is None or grid[-1] <= codec.max_temperature < float("inf"))
        and (
            sampling is None
            or (
                type(sampling.replacement) is bool
                and type(sampling.exact) is type(sampling.draws) is int
                and sampling.exact <= codec.k
            )
        )
    )
