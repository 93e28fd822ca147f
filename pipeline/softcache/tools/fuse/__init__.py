"""Several teachers' labels fused into one.

weights.py         how much each teacher counts
align_classes.py   all teachers on one set of classes, with estimates where a class was dropped
labels.py          one record of several
compatibility.py   whether caches can be fused
settings.py        [fusion]
cache.py           one cache of several
"""

from softcache.tools.fuse.cache import fuse_caches, fused_manifest
from softcache.tools.fuse.labels import fused_labels
from softcache.tools.fuse.settings import FusionSettings
from softcache.tools.fuse.weights import RULES, Rule, rule_weights

__all__ = [
    "RULES",
    "FusionSettings",
    "Rule",
    "fuse_caches",
    "fused_labels",
    "fused_manifest",
    "rule_weights",
]
