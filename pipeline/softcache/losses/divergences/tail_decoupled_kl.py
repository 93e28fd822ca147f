"""Tail-decoupled Kullback-Leibler divergence."""

import torch
from pydantic import Field
from torch import Tensor

from softcache.labels.tail import log_sum_exp
from softcache.losses.log_space import kl_terms
from softcache.losses.registry import LOSSES, divergence
from softcache.settings import Settings


class TailDecoupledKlSettings(Settings):
    """`head`: classes apart from the tail, 10 in the paper; `tail_weight`: of the tail's shape, 1 in `forward_kl`."""

    head: int = Field(10, ge=1)
    tail_weight: float = Field(2.0, ge=0)


@LOSSES.register("tail_decoupled_kl")
@divergence(TailDecoupledKlSettings, tails=("bucket", "uniform"))
def tail_decoupled_kl(log_p_PB: Tensor, log_s_PB: Tensor, *, head: int, tail_weight: float) -> Tensor:
    r"""Forward divergence with the tail's shape weighed apart from the head; in nats.

    .. math:: KL([p_{1..h}, \alpha] \| [s_{1..h}, 1 - \sum s]) + w \alpha KL(\tilde p \| \tilde s)

    where 1..h are the teacher's h likeliest classes, alpha is its mass beyond them, and p-tilde and s-tilde are the classes
    beyond them, normalized among themselves. With w = 1 it is `forward_kl`. Of the classes beyond, a record has the kept
    ones and the others as one, so keep more than h; with h kept the second part is 0, at K = V it is the paper's.

    The paper divides its weight by the mean alpha of a sequence (beta = 2), because alpha differs between teachers; a row
    knows no sequence, so `tail_weight` is that quotient, for all rows: beta over the mean tail mass beyond h.

    References:
        Dasgupta, Cohn, Baldwin 2026, "Don't ignore the tail", arXiv 2602.20816, section 2.
    """
    # The head in front; the bucket of the dropped classes is never in it.
    order_PB = log_p_PB[:, :-1].argsort(dim=1, descending=True, stable=True)
    log_p_PK, log_s_PK = log_p_PB.gather(1, order_PB), log_s_PB.gather(1, order_PB)
    far_p_PB = torch.cat([log_p_PK[:, head:], log_p_PB[:, -1:]], dim=1)
    far_s_PB = torch.cat([log_s_PK[:, head:], log_s_PB[:, -1:]], dim=1)
    mass_P = kl_terms(log_sum_exp(far_p_PB), log_sum_exp(far_s_PB))
    head_P = kl_terms(log_p_PK[:, :head], log_s_PK[:, :head]).sum(dim=1)
    # alpha KL(p~ || s~) is what the forward divergence of the tail has beyond that of its mass.
    tail_P = kl_terms(far_p_PB, far_s_PB).sum(dim=1)
    shape_P = (tail_P - mass_P).where(
        mass_P < torch.inf, 0.0
    )  # a student that masks all of the tail has no shape there
    return head_P + tail_P + (tail_weight - 1.0) * shape_P
