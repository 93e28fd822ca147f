"""Several teachers' labels fused into one.

rules.py        how much each teacher counts
completing.py   all teachers on one set of classes, with estimates where a class was dropped
record.py       one record of several
bounds.py       how far the estimates can be off
agreement.py    whether caches can be fused
settings.py     [fusion]
cache.py        one cache of several
"""

from pipeline.fusion.bounds import FusionBounds, fusion_bounds
from pipeline.fusion.cache import fuse_caches, fused_manifest
from pipeline.fusion.record import fused_labels
from pipeline.fusion.rules import RULES, Rule, rule_weights
from pipeline.fusion.settings import FusionSettings

__all__ = [
    "RULES",
    "FusionBounds",
    "FusionSettings",
    "Rule",
    "fuse_caches",
    "fused_labels",
    "fused_manifest",
    "fusion_bounds",
    "rule_weights",
]
