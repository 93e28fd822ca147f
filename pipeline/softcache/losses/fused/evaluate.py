"""How well the true tokens are predicted, for evaluation.

Shape suffixes: `P` positions, `D` width of the hidden state, `V` classes.
"""

import torch
from torch import Tensor

from softcache.losses.fused.head import Head
from softcache.losses.fused.rows import Rows

__all__ = ["token_scores"]


@torch.no_grad()
def token_scores(
    hidden_PD: Tensor,
    weight_VD: Tensor,
    targets_P: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_positions: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood and correctness of each target, for evaluation: no gradients, no [P, V] logits.

    Args:
        hidden_PD: [P, D] floating point, the input of the head.
        weight_VD: [V, D] floating point, the head's weight.
        targets_P: [P] integer classes; a position with -100 scores 0 and is not correct.
        bias_V: [V], or None.
        softcap: bound on the logits, above 0, or None.
        logit_scale: factor on the logits, before the softcap.
        chunk_positions: rows of logits held at once; None picks 2^23 / V.

    Returns:
        [P] float32, nats, and [P] bool, whether the target has the largest logit.

    Raises:
        LabelError: shapes, dtypes or settings do not fit, or a target is out of range (with `position`).

    Examples:
        >>> nats, correct = token_scores(torch.eye(3), torch.eye(3), torch.tensor([0, 1, 0]))
        >>> correct.tolist()
        [True, True, False]
    """
    head = Head(hidden_PD, weight_VD, bias_V, softcap, logit_scale, chunk_positions)
    rows = Rows(head, None, targets_P, None)
    assert rows.targets_P is not None
    nats_P = torch.zeros(len(hidden_PD), dtype=torch.float32, device=hidden_PD.device)
    correct_P = torch.zeros_like(nats_P, dtype=torch.bool)
    everywhere_P = torch.arange(len(hidden_PD), device=hidden_PD.device)
    with torch.autocast(hidden_PD.device.type, enabled=False):
        for part, hidden_cD in head.chunks(rows.take(hidden_PD)):
            logits_PV = head.logits(hidden_cD)
            target_P1 = rows.targets_P[part][:, None]
            best_P1 = logits_PV.argmax(dim=1, keepdim=True)
            above_P1 = logits_PV.gather(1, best_P1) - logits_PV.gather(1, target_P1)
            share_P1 = torch.softmax(logits_PV, dim=1, out=logits_PV).gather(1, best_P1)
            index_P = rows.take(everywhere_P)[part]
            nats_P[index_P] = (above_P1 - share_P1.log())[:, 0].float()
            correct_P[index_P] = (best_P1 == target_P1)[:, 0]
    return nats_P, correct_P
