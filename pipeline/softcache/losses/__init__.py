"""Distillation losses between a student's logits and cached soft labels: pure, per position, the caller
reduces.

A loss over the kept classes alone is not a divergence: it goes negative, and the mass that the student puts
elsewhere is free. So all dropped classes count as one more bucket, on both sides. The result is a true divergence
(of the two distributions over K + 1 buckets), a lower bound of the full one, and equal to it at K = V. Each loss costs
a few [P, V] temporaries in addition to the student's logits; `softcache.losses.fused` computes the same without logits.

    divergences/        the losses, one file each: formula, parameters, references
    registry.py         `LOSSES`, the losses by name, and what a loss is
    functional.py       each as a function of logits and labels

    distillation.py     a student's loss: cross-entropy and a soft part
    binary.py           the same of independent classes
    direct.py           the usual case in one operation of autograd, compiled for few classes on a CPU
    settings.py         `[loss]`
    schedules.py        temperature and alpha that change over a run
    curriculum.py       a temperature that is learnt, by gradient reversal
    sample_weights.py   weights of single rows in the soft part
    standardize.py      z-scores in place of logits, for every loss

    buckets.py          a student's logits in the buckets of soft labels, also where it has more classes or fewer
    tail_modes.py       what becomes of the dropped classes
    target_class.py     the ground-truth class as a bucket of its own
    bucketed.py         all of that together
    log_space.py        sums and mixtures of distributions in log-space
"""

from softcache.losses.binary import binary_distillation_loss, binary_kl
from softcache.losses.buckets import check_vocabulary, fit_vocabulary
from softcache.losses.distillation import check_alpha, cross_entropy, distillation_loss
from softcache.losses.divergences.uld import uld
from softcache.losses.functional import (
    adaptive_kl,
    dkd,
    forward_kl,
    jsd,
    nkd,
    pld,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    soft_cross_entropy,
    tail_decoupled_kl,
    total_variation,
)
from softcache.losses.log_space import kl_terms
from softcache.losses.registry import LOSSES, Loss, LossSpec, divergence, make_loss
from softcache.losses.sample_weights import row_weights
from softcache.losses.schedules import LossMix, scheduled
from softcache.losses.settings import AnyLoss, LossSettings
from softcache.losses.standardize import standardized

__all__ = [
    "LOSSES",
    "AnyLoss",
    "Loss",
    "LossMix",
    "LossSettings",
    "LossSpec",
    "adaptive_kl",
    "binary_distillation_loss",
    "binary_kl",
    "check_alpha",
    "check_vocabulary",
    "cross_entropy",
    "distillation_loss",
    "divergence",
    "dkd",
    "fit_vocabulary",
    "forward_kl",
    "jsd",
    "kl_terms",
    "make_loss",
    "nkd",
    "pld",
    "reverse_kl",
    "row_weights",
    "scheduled",
    "skew_kl",
    "skew_reverse_kl",
    "soft_cross_entropy",
    "standardized",
    "tail_decoupled_kl",
    "total_variation",
    "uld",
]
