"""Logits into label records: which classes are kept, and what is remembered of the rest.

settings.py        `[labels]`: the policy and its numbers
policies/top_k.py  the policies that look at the distribution alone: top-k, top-p, dense
policies/sample.py the policies that draw: random sampling, and top-k with a drawn tail
detection.py       a detector's outputs: which cells are kept, and their records
validate.py        what is wrong with logits and targets
"""

from softcache.labels.sparsify.detection import DenseOutputs, cell_faults, choose_cells, sparsify_cells
from softcache.labels.sparsify.policies.top_k import dense, dense_labels_unsorted, top_k, top_p
from softcache.labels.sparsify.registry import apply_policy
from softcache.labels.sparsify.policies.sample import hybrid, row_seeds, sample
from softcache.labels.sparsify.settings import LabelSettings
from softcache.labels.sparsify.validate import describe_fault, logit_faults

__all__ = [
    "DenseOutputs",
    "LabelSettings",
    "apply_policy",
    "cell_faults",
    "choose_cells",
    "dense",
    "dense_labels_unsorted",
    "describe_fault",
    "hybrid",
    "logit_faults",
    "row_seeds",
    "sample",
    "sparsify_cells",
    "top_k",
    "top_p",
]
