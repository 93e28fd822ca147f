"""Logits into label records: which classes are kept, and what is remembered of the rest.

settings.py    `[labels]`: the policy and its numbers
selection.py   the policies that look at the distribution alone: top-k, top-p, dense
draws.py       the policies that draw: random sampling, and top-k with a drawn tail
cells.py       a detector's outputs: which cells are kept, and their records
checks.py      what is wrong with logits and targets
"""

from pipeline.sparsify.cells import DenseOutputs, cell_faults, choose_cells, sparsify_cells
from pipeline.sparsify.checks import describe_fault, logit_faults
from pipeline.sparsify.draws import hybrid, row_seeds, sample
from pipeline.sparsify.policies import sparsify
from pipeline.sparsify.selection import dense, top_k, top_p, whole_record
from pipeline.sparsify.settings import LabelSettings

__all__ = [
    "DenseOutputs",
    "LabelSettings",
    "cell_faults",
    "choose_cells",
    "dense",
    "describe_fault",
    "hybrid",
    "logit_faults",
    "row_seeds",
    "sample",
    "sparsify",
    "sparsify_cells",
    "top_k",
    "top_p",
    "whole_record",
]
