"""The policy of the settings, applied."""

from typing import Any

from torch import Tensor

from softcache.errors import LabelError
from softcache.labels import SoftLabels
from softcache.labels.sparsify.policies.top_k import dense, top_k, top_p
from softcache.labels.sparsify.policies.sample import hybrid, sample
from softcache.labels.sparsify.settings import LabelSettings

__all__ = ["apply_policy"]


def apply_policy(
    logits_PV: Tensor,
    settings: LabelSettings,
    *,
    targets_P: Tensor | None = None,
    seeds_P: Tensor | None = None,
    check: bool = True,
) -> SoftLabels:
    """Turns logits into a record by the policy of the settings.

    Args:
        logits_PV: [P, V] floating-point logits.
        settings: `[labels]`.
        targets_P: [P] integer classes, or None.
        seeds_P: [P] int64, from `row_seeds`; for the policies that draw.
        check: as in `top_k`, which says what is returned and raised, too.
    """
    how: dict[str, Any] = {"temperatures": settings.temperatures, "targets_P": targets_P, "check": check}
    if settings.policy == "dense":
        return dense(logits_PV, **how)
    if settings.policy == "top_k":
        return top_k(logits_PV, k=settings.k, **how)
    if settings.policy == "top_p":
        return top_p(logits_PV, p=settings.p, max_k=settings.k, **how)
    if seeds_P is None:
        raise LabelError(
            f"labels.policy {settings.policy!r}: expected seeds of the rows; found none; see row_seeds"
        )
    drawn: dict[str, Any] = {
        "draws": settings.draws,
        "exponent": settings.proposal_exponent,
        "seeds_P": seeds_P,
    }
    if settings.policy == "sample":
        return sample(logits_PV, **drawn, **how)
    return hybrid(logits_PV, k=settings.k, **drawn, **how)
