"""Variants of a user's own in the registries of this process."""

import sys
from pathlib import Path

from softcache.cache.codecs import CODECS
from softcache.data import SOURCES
from softcache.labels.sparsify import POLICIES
from softcache.losses import LOSSES
from softcache.modalities import MODALITIES

REGISTRIES = {registry.group: registry for registry in (LOSSES, POLICIES, CODECS, SOURCES, MODALITIES)}


def forget_modules_of(folder: Path) -> None:
    """Removes the modules of a folder, and the variants that they have, as if they had never been imported."""
    names = {path.stem for path in folder.glob("*.py")}
    for name in names:
        sys.modules.pop(name, None)
    for registry in REGISTRIES.values():
        for path in [path for path in registry._custom if path.partition(":")[0] in names]:
            del registry._custom[path]
