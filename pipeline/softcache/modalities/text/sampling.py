"""Whether the log-probabilities of a file of rollouts are those that its tokens were sampled with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from softcache.data.tokens import TokenData
from softcache.errors import SourceError
from softcache.losses import LossSettings
from softcache.models.language import split

__all__ = ["check_sampling"]

CHECKED_TOKENS, MAX_RATIO = 2048, 4.0
"""Sampled tokens whose log-probabilities are compared with a student's, and the most that the ratio of one counts."""


def check_sampling(data: TokenData, loss: LossSettings, spec: str, student: Any) -> None:
    """Raises where log-probabilities of a file cannot be those that its tokens were sampled with.

    The mean of s / q over tokens that q sampled is 1 for any student's s, and that of ratios that are cut at `MAX_RATIO` at
    most 1. By Hoeffding's inequality it exceeds what is accepted once in 22,000 times.

    Args:
        loss: one that reads rollouts.
        spec: of the student, for messages.
        student: as it begins.

    Raises:
        SourceError: the mean is higher: logarithms to base 2, or of a policy that was far less sure; or all are 0.
    """
    how = loss.loss.parameters
    if not (how["importance"] or how["advantage"] == "sampling") or next(student.parameters()).is_meta:
        return
    was_training = student.training
    student.eval()
    try:
        ratios, all_certain = _ratios(data, student)
    finally:
        student.train(was_training)
    if len(ratios) == 0:
        return  # without log-probabilities, which the loss asks for
    if all_certain:
        raise SourceError(
            f"source {data.source.name}: the log_probs of {len(ratios):,} sampled tokens are all 0, as of a policy that had "
            "no other token to choose; expected those that the tokens were sampled with: ask the engine for them, or set "
            "loss.importance = false"
        )
    mean, most = float(ratios.mean()), 1 + MAX_RATIO * (5 / len(ratios)) ** 0.5
    if mean > most:
        raise SourceError(
            f"source {data.source.name}: student {spec} gives {len(ratios):,} sampled tokens {mean:.3g} times the "
            f"probability of their log_probs, in the mean; expected at most {most:.3g}, as of any student where tokens were "
            "sampled with these; write natural logarithms of the policy's own probabilities, one for each token of a "
            "response, or set loss.importance = false"
        )


@torch.no_grad()
def _ratios(data: TokenData, student: Any) -> tuple[torch.Tensor, bool]:
    """Returns min(s / q, `MAX_RATIO`) of some samples' tokens, flat, and whether each q is 1; none where there is no q."""
    parts, device, ratios, num_tokens = split(student), next(student.parameters()).device, [], 0
    all_certain = True
    for sample in np.random.default_rng(0).permutation(len(data)).tolist():
        batch = data.load([sample])
        log_q_P, batch = batch.sampling_log_probs, batch.to(device)
        if log_q_P is None or log_q_P.isnan().any():
            return torch.zeros(0), False
        all_certain &= bool((log_q_P == 0).all())
        hidden_BLD = parts.hidden(batch.tokens, batch.segments, cross_documents=data.cross_documents)
        hidden_PD = hidden_BLD.flatten(0, 1)[batch.rows]
        log_s_P = parts.logits(hidden_PD).log_softmax(1).gather(1, batch.targets[:, None])[:, 0]
        ratios.append((log_s_P - log_q_P.to(device)).exp().clamp(max=MAX_RATIO))
        num_tokens += len(log_s_P)
        if num_tokens >= CHECKED_TOKENS:
            break
    return torch.cat(ratios) if ratios else torch.zeros(0), all_certain
