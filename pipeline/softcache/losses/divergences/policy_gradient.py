"""Policy gradient on sampled tokens: on-policy distillation from stored rollouts.

Shape suffixes: `P` positions, each of one sampled token.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from softcache.errors import LabelError
from softcache.losses.log_space import LOG_PROB_FLOOR
from softcache.losses.registry import LOSSES, LossSpec
from softcache.settings import Settings

__all__ = ["PolicyGradientSettings", "policy_gradient"]


class PolicyGradientSettings(Settings):
    """How the advantage and the ratio of a sampled token are taken.

    Attributes:
        advantage: "student": log p - log s, at the student as it is now; "sampling": log p - log q, for a single step.
        importance: whether a token counts s / q; without it, rollouts count as if the student had sampled them now.
        clip: e of the clipped ratio of PPO, within [1 - e, 1 + e]; None: not clipped.
    """

    advantage: Literal["student", "sampling"] = "student"
    importance: bool = True
    clip: float | None = Field(None, gt=0, lt=1)

    @model_validator(mode="after")
    def _clip_has_a_ratio(self) -> Self:
        if self.clip is not None and not self.importance:
            raise ValueError("clip: bounds the ratio, which is 1 with importance = false; drop it")
        return self


def policy_gradient(
    log_s_P: Tensor,
    log_p_P: Tensor,
    log_q_P: Tensor | None,
    *,
    advantage: str = "student",
    importance: bool = True,
    clip: float | None = None,
) -> Tensor:
    r"""Negative advantage of a sampled token times its ratio, in nats; an estimate of KL(student || teacher).

    .. math:: -r A, \quad r = s / q, \quad A = \log p - \log s

    where s, p and q are the probabilities of the token y that the policy q sampled, by student, teacher and policy. The
    advantage is a constant, so the gradient is -r A grad log s; its mean over y ~ q is the sum of grad s (log s - log p),
    the gradient of the exact KL(s || p), with the value of it. With `importance = false`, log s without a gradient
    replaces log q in r, which is then 1 with the gradient of log s: exact at s = q, and the update of Lightning OPD's
    code, which reads no q. With `advantage = "sampling"`, log q replaces log s in A: the usual form of reinforcement
    learning, exact at s = q, too, but linear in s, so that its minimum is all mass on one token; it is for few steps
    from each rollout, and for `clip`: the larger of -r A and -A times r within [1 - e, 1 + e].

    A token whose teacher's probability is 0 has log p = -100. The return of a token is its own advantage alone (discount
    0): how it changes the later tokens' divergence is left out, as in both references.

    Args:
        log_s_P: the student's log-probability of the token at T=1.
        log_p_P: the teacher's at T=1, `target_log_prob` of the record.
        log_q_P: the sampling policy's, kept in the source; None where the rollouts lack it.
        advantage, importance, clip: see `PolicyGradientSettings`.

    Raises:
        LabelError: `log_q_P` is None, and is read.

    References:
        Thinking Machines Lab 2025, "On-Policy Distillation" (reverse KL per token as a negative advantage, discount 0).
        Wu, Han, Cai 2026, "Lightning OPD", arXiv 2604.13010 (the teacher's log-probabilities stored once over the rollouts
        of the fine-tuned student).
        Schulman et al. 2017, "Proximal policy optimization", arXiv 1707.06347, eq. (7) (clip).
    """
    now_P = log_s_P.detach()
    if log_q_P is None and (advantage == "sampling" or importance):
        raise LabelError(
            "loss policy_gradient: expected the sampling policy's log-probability of each token; found rollouts without; "
            'store it in the source (log_probs), or set loss.importance = false with loss.advantage = "student"'
        )
    sampled_P = now_P if log_q_P is None else log_q_P
    advantage_P = log_p_P.clamp(min=LOG_PROB_FLOOR) - (sampled_P if advantage == "sampling" else now_P)
    ratio_P = (log_s_P - (sampled_P if importance else now_P)).exp()
    loss_P = -ratio_P * advantage_P
    if clip is None:
        return loss_P
    return loss_P.maximum(-ratio_P.clamp(1.0 - clip, 1.0 + clip) * advantage_P)


LOSSES.register("policy_gradient")(
    LossSpec(
        None,
        PolicyGradientSettings,
        tails=("bucket",),
        temperature_power=0,
        needs_target=True,
        of_samples=policy_gradient,
    )
)
