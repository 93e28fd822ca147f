"""Model specs: `FAMILY:NAME?ARGUMENTS` as a value."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from softcache.errors import SpecError
from softcache.hashing.digests import digest_json
from softcache.runtime.suggest import did_you_mean

__all__ = ["ModelSpec", "architecture_of", "is_path", "is_same_origin", "parse_spec", "unknown_name"]


@dataclass(frozen=True)
class ModelSpec:
    """A parsed spec: `family` is builtin, timm, torchvision or factory."""

    family: str
    name: str
    args: dict[str, Any] = field(default_factory=dict)


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def parse_spec(spec: str) -> ModelSpec:
    """Returns the parts of a model spec.

    Raises:
        SpecError: the spec is empty or has no model name.

    Examples:
        >>> parse_spec("timm:resnet18?drop_rate=0.1")
        ModelSpec(family='timm', name='resnet18', args={'drop_rate': 0.1})
        >>> parse_spec("mlp").family
        'builtin'
    """
    path, _, query = spec.partition("?")
    args = {key: _json_or_text(value) for key, value in parse_qsl(query, keep_blank_values=True)}
    family, colon, name = path.partition(":")
    if not colon:
        family, name = "builtin", path
    elif family not in ("timm", "torchvision"):
        family, name = "factory", path
    if not name or name.endswith(":"):
        raise SpecError(
            f"model spec {spec!r}: no model name; expected e.g. mlp, timm:resnet18, module:factory"
        )
    return ModelSpec(family, name, args)


def unknown_name(where: str, name: str, known: Iterable[str], *, others: str = "") -> SpecError:
    """Returns the error of a name that a library of models does not have: with the nearest ones, else with those it has.

    Args:
        where: what the name is of, such as "model 'timm:resnet81'".
        others: how models that the library does not have are written.
    """
    known = list(known)
    some = known if len(known) <= MOST_LISTED else [*known[:MOST_LISTED], "…"]
    hint = did_you_mean(name, known) or f"known: {', '.join(some)}"
    return SpecError(f"{where}: unknown name {name!r}; {hint}{others and f' (others are written {others})'}")


MOST_LISTED = 20


def is_path(name: str) -> bool:
    """Whether the name of a checkpoint or a data set can only be a local path; the hub has NAME and OWNER/NAME."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def is_same_origin(one: str, other: str) -> bool:
    """Whether two specs may be of one model: they are equal, but for arguments of loading, or one is a folder of that name.

    This is for where only specs are known; what a model is, its weights decide.
    """
    paths = [spec.partition("?")[0].rstrip("/") for spec in (one, other)]
    first, second = (
        {key: x for key, x in parse_spec(spec).args.items() if key not in LOADING_ARGUMENTS}
        for spec in (one, other)
    )
    is_local = any(is_path(path.partition(":")[2]) for path in paths)
    names = paths if not is_local else [re.split("[:/]", path)[-1] for path in paths]
    return first == second and names[0] == names[1]


LOADING_ARGUMENTS = frozenset(
    {"pretrained", "weights", "backbone_weights", "checkpoint_path", "cache_dir", "revision", "dtype"}
)
"""Arguments of a spec for where weights come from and their dtype; the digest of the weights covers both."""
VOLATILE_CONFIG = re.compile(
    r"_name_or_path|transformers_version|(torch_)?dtype|architectures|use_cache|_?attn_implementation.*|.*_token_id|distributed_config"
)
"""Keys of a transformers configuration that change no logit of a given text."""


def architecture_of(model: Any, spec: str) -> str:
    """Returns a name of the function that a model is, its weights aside.

    Two teachers with equal names and equal weights give equal labels, from whichever path or hub name they were loaded.

    Of a transformers model it is its class and a digest of its configuration, of others the spec without the arguments
    that say where weights come from.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_diff_dict"):
        kept = {key: x for key, x in config.to_diff_dict().items() if not VOLATILE_CONFIG.fullmatch(key)}
        return f"{type(model).__name__}:{digest_json(json.loads(json.dumps(kept, default=str), parse_constant=str))[:16]}"
    parsed = parse_spec(spec)
    args = {key: value for key, value in sorted(parsed.args.items()) if key not in LOADING_ARGUMENTS}
    name = parsed.name if parsed.family in ("builtin", "factory") else f"{parsed.family}:{parsed.name}"
    if parsed.family == "timm" and ":" in parsed.name:  # a folder or a repository
        name = f"timm:{model.pretrained_cfg['architecture']}"
    return name + ("?" + "&".join(f"{key}={value}" for key, value in args.items()) if args else "")
