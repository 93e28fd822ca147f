"""Several teachers' labels fused into one.

rules.py        how much each teacher counts
completing.py   all teachers on one set of classes, with estimates where a class was dropped
record.py       one record of several
bounds.py       how far the estimates can be off
"""

from pipeline.fusion.bounds import FusionBounds, fusion_bounds
from pipeline.fusion.record import fused_labels
from pipeline.fusion.rules import RULES, Rule, rule_weights

__all__ = ["RULES", "FusionBounds", "Rule", "fused_labels", "fusion_bounds", "rule_weights"]
