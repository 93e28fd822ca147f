"""What a loss of sampled tokens reads, and its gradient by the logits of a chunk.

The loss of a row is a function of log s, the student's log-probability of the row's target at T=1; with u its derivative

    dL / dz_j = u ([j = target] - s_j)

Shape suffixes: `P` positions, `V` classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softcache.errors import LabelError
from softcache.losses.registry import Loss
from softcache.losses.target_class import IGNORED

__all__ = ["check_samples", "value_and_slope"]

MAX_LOG_PROB = 1e-4  # what rounding makes of 0


def check_samples(
    loss: Loss,
    temperature: Any,
    log_q_P: Tensor | None,
    targets_P: Tensor,
    *,
    active_P: Tensor | None = None,
) -> Tensor | None:
    """The sampling policy's log-probabilities [P] of the targets, checked. Waits for a GPU.

    Raises:
        LabelError: the temperature is not 1, the loss is to be standardized, or a row with weight has no log-probability.
    """
    if isinstance(temperature, Tensor) or temperature != 1 or loss.standardize:
        found = "standardize = true" if loss.standardize else f"temperature {temperature}"
        raise LabelError(
            f"loss {loss.name}: expected temperature 1, at which tokens were sampled and labels hold the teacher's "
            f"log-probability of them; found {found}; set loss.temperature = 1 and loss.standardize = false"
        )
    if log_q_P is None:
        return None
    if log_q_P.shape != targets_P.shape:
        raise LabelError(
            f"sampling_log_probs: expected {list(targets_P.shape)}, one per target; found {list(log_q_P.shape)}"
        )
    bad_P = (~(log_q_P <= MAX_LOG_PROB) | log_q_P.isneginf()) & (targets_P != IGNORED)
    if active_P is not None:
        bad_P = bad_P & active_P
    if bool(bad_P.any()):
        position = int(bad_P.int().argmax())
        raise LabelError(
            f"sampling_log_probs, position {position}: expected a finite log-probability of at most 0; found "
            f"{float(log_q_P[position])}; give those of the policy that sampled the target, in nats",
            position=position,
        )
    return log_q_P


def value_and_slope(
    loss: Loss, log_s_P: Tensor, log_p_P: Tensor, log_q_P: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The loss [P] and its derivative by the student's log-probability [P]; without a graph."""
    assert loss.kind.of_samples is not None
    with torch.enable_grad():
        leaf_P = log_s_P.detach().requires_grad_()
        value_P: Tensor = loss.kind.of_samples(leaf_P, log_p_P, log_q_P, **loss.parameters)
        (slope_P,) = torch.autograd.grad(value_P.sum(), leaf_P)
    return value_P.detach(), slope_P
