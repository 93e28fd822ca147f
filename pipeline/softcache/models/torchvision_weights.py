"""Weights that torchvision publishes: which of them a spec names, or a file has."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from softcache.errors import SpecError
from softcache.models.spec import ModelSpec

__all__ = ["published_weights"]


def published_weights(parsed: ModelSpec, file: str | None = None) -> Any:
    """Returns torchvision's published weights that a spec names (`?weights=`), or whose file a path is; None: neither.

    Such a file is known by its name, which ends in the first digits of its sha256, or under another name by these.

    Raises:
        SpecError: torchvision has none of that name.
    """
    if parsed.family != "torchvision":
        return None
    from torchvision import models

    if parsed.name not in models.list_models():
        return None
    known = models.get_model_weights(parsed.name)
    if isinstance(named := parsed.args.get("weights"), str):
        if (short := named.rpartition(".")[2]) not in known.__members__:
            raise SpecError(
                f"model 'torchvision:{parsed.name}': weights = {named}; torchvision has {', '.join(known.__members__)}"
            )
        return known[short]
    names = {Path(weights.url).name: weights for weights in known}
    if file is None or not (path := Path(file.partition("#")[0])).is_file() or path.name in names:
        return names.get(Path(file or "").name)
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return next(
        (one for name, one in names.items() if digest.startswith(name[-12:].removesuffix(".pth"))), None
    )
