"""Losses that tell the ground-truth class from the others: DKD and NKD, per position, in nats.

Shape suffixes: `P` positions, `V` classes.

The ground-truth class is a bucket of its own, whether the teacher kept it or not (`softcache.losses.target_class`). A
position
without a target (-100) has a loss of 0.
"""

from typing import Any

from torch import Tensor

from softcache.labels import SoftLabels
from softcache.losses.bucketed import bucketed_loss
from softcache.losses.distillation import cross_entropy
from softcache.losses.registry import make_loss
from softcache.losses.target_class import teacher_log_probs

__all__ = ["dkd", "nkd"]


def dkd(
    student_logits: Tensor,
    labels: SoftLabels,
    targets: Tensor,
    *,
    temperature: Any,
    dkd_alpha: float = 1.0,
    dkd_beta: float = 8.0,
    tail: str = "bucket",
    padded_vocabulary: bool = False,
) -> Tensor:
    r"""Decoupled distillation: how sure of the ground truth, and how the rest is shared out; in nats.

    .. math:: \alpha KL([p_t, 1 - p_t] \| [s_t, 1 - s_t]) + \beta KL(\hat p \| \hat s)

    where p-hat and s-hat are the other classes, normalised among themselves; 1 - p_t is summed over them. With alpha =
    1 and beta = 1 - p_t it is the forward divergence. There is no factor T^2 here, the paper's is in
    `distillation_loss`. (The paper raises the weight of this loss over the first 20 epochs; that is a schedule, and
    not done here.)

    Args:
        targets: [P] integer classes of the student, or -100.
        dkd_alpha: weight of the target part.
        dkd_beta: weight of the other part; the paper's is 8 on CIFAR-100, 0.5 on ImageNet, and depends on the teacher.
        tail: "bucket" or "uniform". The others, Returns: as `forward_kl`.

    Raises:
        LabelError: as `forward_kl`, or a target is out of range, or the record does not say how likely the teacher
            finds it (with `position`). That costs one wait for a GPU.

    References:
        Zhao, Cui, Song, Qiu, Liang 2022, "Decoupled knowledge distillation", arXiv 2203.08679, eq. (7).
    """
    loss = make_loss("dkd", tail=tail, dkd_alpha=dkd_alpha, dkd_beta=dkd_beta)
    return bucketed_loss(
        loss, student_logits, labels, targets, temperature=temperature, padded_vocabulary=padded_vocabulary
    )


def nkd(
    student_logits: Tensor,
    labels: SoftLabels,
    targets: Tensor,
    *,
    temperature: Any,
    nkd_gamma: float = 1.5,
    tail: str = "bucket",
    padded_vocabulary: bool = False,
) -> Tensor:
    r"""Normalised distillation: the teacher's trust in the ground truth, and the others' shares; in nats.

    .. math:: -p_t \log s_t - \gamma T^2 \sum_{j \ne t} \hat p_j \log \hat s_j

    where p_t and s_t are at T=1, and p-hat and s-hat are the other classes at T, normalised among themselves. The
    factor T^2 belongs to one of two terms, so it is here, and `distillation_loss` adds none.

    Args:
        targets: [P] integer classes of the student, or -100.
        nkd_gamma: weight of the second term; the paper's is 1.5, at T = 1.
        tail: "bucket" or "uniform". The others, Returns: as `forward_kl`. Raises: as `dkd`.

    References:
        Yang, Zeng, Li, Zhang, Yuan, Li 2023, "From knowledge distillation to self-knowledge distillation", arXiv
        2303.13005, the definition of L_nkd. (Copies of the code are about whose mask of the other classes is all
        ones, so that the ground-truth class stays among them; this follows the paper.)
    """
    loss = make_loss("nkd", tail=tail, nkd_gamma=nkd_gamma)
    others_P = bucketed_loss(
        loss, student_logits, labels, targets, temperature=temperature, padded_vocabulary=padded_vocabulary
    )
    truth_P = teacher_log_probs(labels, targets.long()).exp()
    return truth_P * cross_entropy(student_logits, targets) + temperature**2 * others_P
