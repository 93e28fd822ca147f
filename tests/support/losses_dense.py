"""Every loss written out over whole distributions, for tests: the papers' formulas, plainly, in float64.

Each takes probabilities p and s, [P, V], V buckets of which the teacher's order is by class, and gives [P].
"""

import torch

from softcache import losses
from softcache.losses import LOSSES, functional

P, V = 5, 12
TARGETS = torch.tensor([3, 0, 11, 7, 3])
COMPARING = [
    name for name, kind in LOSSES.items() if kind.of_samples is None
]  # distributions, not sampled tokens
NEEDS_TARGET = [name for name in COMPARING if LOSSES.get(name).needs_target]


def _plogq(p, q):
    return torch.where(p > 0, p * torch.where(p > 0, q, 1.0).log(), 0.0)


def kl(p, s):
    return (_plogq(p, p) - _plogq(p, s)).sum(1)


def forward_kl(p, s, targets):
    return kl(p, s)


def reverse_kl(p, s, targets):
    return kl(s, p)


def jsd(p, s, targets, beta=0.5):
    m = beta * p + (1 - beta) * s
    return beta * kl(p, m) + (1 - beta) * kl(s, m)


def skew_kl(p, s, targets, skew=0.1):
    return kl(p, skew * p + (1 - skew) * s)


def skew_reverse_kl(p, s, targets, skew=0.1):
    return kl(s, (1 - skew) * p + skew * s)


def adaptive_kl(p, s, targets, mu=0.5):
    """The last column is the tail, and never in the head."""
    out = []
    for p_row, s_row in zip(p, s, strict=True):
        ranked, held, head = sorted(range(len(p_row) - 1), key=lambda j: -p_row[j].item()), 0.0, []
        for j in ranked:
            if held >= mu:
                break
            head.append(j)
            held += p_row[j].item()
        gap = (p_row - s_row).abs().detach()
        share = gap[head].sum() / gap.sum()
        out.append(share * kl(p_row[None], s_row[None])[0] + (1 - share) * kl(s_row[None], p_row[None])[0])
    return torch.stack(out)


def total_variation(p, s, targets):
    return (p - s).abs().sum(1) / 2


def cross_entropy(p, s, targets):
    return -_plogq(p, s).sum(1)


def _split(x, targets):
    at = x.gather(1, targets[:, None])
    rest = x.scatter(1, targets[:, None], 0.0)
    return at[:, 0], rest.sum(1), rest / rest.sum(1, keepdim=True)


def dkd(p, s, targets, dkd_alpha=1.0, dkd_beta=8.0):
    (p_t, p_rest, p_hat), (s_t, s_rest, s_hat) = _split(p, targets), _split(s, targets)
    binary = kl(torch.stack([p_t, p_rest], 1), torch.stack([s_t, s_rest], 1))
    return dkd_alpha * binary + dkd_beta * kl(p_hat, s_hat)


def nkd(p, s, targets, nkd_gamma=1.5):
    """The part at T; the other, -p_t log s_t at T=1, is for the test to add."""
    return -nkd_gamma * _plogq(_split(p, targets)[2], _split(s, targets)[2]).sum(1)


def tail_decoupled_kl(p, s, targets, head=10, tail_weight=2.0):
    """The last column is the tail, and never in the head."""
    out = []
    for p_row, s_row in zip(p, s, strict=True):
        ranked = sorted(range(len(p_row) - 1), key=lambda j: -p_row[j].item())
        near, far = ranked[:head], [*ranked[head:], len(p_row) - 1]
        coarse = [torch.cat([x[near], x[far].sum()[None]])[None] for x in (p_row, s_row)]
        alpha, rest = p_row[far].sum(), s_row[far].sum()
        within = kl((p_row[far] / alpha)[None], (s_row[far] / rest)[None])[0] if alpha > 0 else 0.0
        out.append(kl(*coarse)[0] + tail_weight * alpha * within)
    return torch.stack(out)


def pld(p, s, targets):
    """The last column is the tail, and chosen last."""
    out = []
    for p_row, s_row, target in zip(p, s, targets.tolist(), strict=True):
        others = [j for j in range(len(p_row) - 1) if j != target and p_row[j] > 0]
        order = [target, *sorted(others, key=lambda j: -p_row[j].item())]
        left, value = s_row.sum(), 0.0
        for j in order:
            value = value - p_row[j] * (s_row[j].log() - left.log())
            left = left - s_row[j]
        out.append(value)
    return torch.stack(out)


DENSE = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "adaptive_kl": adaptive_kl,
    "total_variation": total_variation,
    "dkd": dkd,
    "nkd": nkd,
    "cross_entropy": cross_entropy,
    "tail_decoupled_kl": tail_decoupled_kl,
    "pld": pld,
}
WITH_TAIL = ("adaptive_kl", "tail_decoupled_kl", "pld")
"""Of whose formulas the last column is a tail."""


def plain(name, student, labels, targets=TARGETS, *, temperature, tail="bucket", padded=False, **parameters):
    """The function of a name, public where there is one, as the loss without its target-class part at T=1."""
    how = {"temperature": temperature, "tail": tail, "padded_vocabulary": padded, **parameters}
    make = functional._make_target_function if name in NEEDS_TARGET else functional._make_function
    function = getattr(losses, "soft_cross_entropy" if name == "cross_entropy" else name, None) or make(name)
    return (
        function(student, labels, targets, **how)
        if name in NEEDS_TARGET
        else function(student, labels, **how)
    )


def truth_part(name, teacher, student, targets=TARGETS):
    if name != "nkd":
        return 0.0
    p_t = teacher.softmax(1).gather(1, targets[:, None])[:, 0]
    return -p_t * student.log_softmax(1).gather(1, targets[:, None])[:, 0]


def written_out(name, teacher, student, targets=TARGETS, *, temperature, **parameters):
    """The papers' formula over whole distributions."""
    p, s = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    if name in WITH_TAIL:
        p, s = (torch.cat([x, torch.zeros(len(x), 1)], 1) for x in (p, s))
    value = DENSE[name](p, s, targets, **parameters)
    return value * (temperature**2 if name == "nkd" else 1) + truth_part(name, teacher, student, targets)
