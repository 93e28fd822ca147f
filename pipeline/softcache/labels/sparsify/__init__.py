"""From logits to soft labels: which classes are kept, and what is stored of the others."""

from softcache.labels.sparsify.bernoulli import bernoulli_faults, top_k_bernoulli
from softcache.labels.sparsify.detection import DenseOutputs, cell_faults, choose_cells, sparsify_cells
from softcache.labels.sparsify.policies.dense import Dense, dense, dense_labels_unsorted
from softcache.labels.sparsify.policies.hidden import Hidden
from softcache.labels.sparsify.policies.hybrid import Hybrid, hybrid
from softcache.labels.sparsify.policies.sample import Sample, sample
from softcache.labels.sparsify.policies.top_k import TopK, top_k
from softcache.labels.sparsify.policies.top_p import TopP, top_p
from softcache.labels.sparsify.sampled import row_seeds
from softcache.labels.sparsify.settings import POLICIES, AnyLabelSettings, LabelSettings, label_settings
from softcache.labels.sparsify.validate import describe_fault, logit_faults, record_faults

__all__ = [
    "POLICIES",
    "AnyLabelSettings",
    "Dense",
    "DenseOutputs",
    "Hidden",
    "Hybrid",
    "LabelSettings",
    "Sample",
    "TopK",
    "TopP",
    "bernoulli_faults",
    "cell_faults",
    "choose_cells",
    "dense",
    "dense_labels_unsorted",
    "describe_fault",
    "hybrid",
    "label_settings",
    "logit_faults",
    "record_faults",
    "row_seeds",
    "sample",
    "sparsify_cells",
    "top_k",
    "top_k_bernoulli",
    "top_p",
]
