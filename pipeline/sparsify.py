"""Logits into label records: which classes are kept, and what is remembered of the rest.

Shape suffixes: `P` positions, `V` classes, `K` kept classes, `G` grid of temperatures.

The mass of the dropped classes is summed from those classes themselves, at every grid temperature; 1 -
sum(kept) would lose all its digits on confident rows. Positions are worked on in chunks, so beside the logits
about 20 bytes times chunk x V are held (at the default chunk under 100 MB, whatever P). Nothing here waits
for a GPU unless `check` is on.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, field_validator
from torch import Tensor

from pipeline.errors import LabelError
from pipeline.labels import DEFAULT_TEMPERATURES, SoftLabels, collect
from pipeline.settings import Settings
from pipeline.tail import check_temperatures

__all__ = [
    "LabelSettings",
    "dense",
    "describe_fault",
    "logit_faults",
    "sparsify",
    "top_k",
    "whole_record",
]

_CHUNK_ELEMENTS = 2**22
_FAULTS = ("no fault", "a NaN logit", "a +inf logit", "all logits -inf")


def _list_to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # TOML has lists only


class LabelSettings(Settings):
    """`[labels]`: what is kept of each distribution.

    Attributes:
        policy: "top_k" keeps the k most likely classes, "dense" keeps all.
        k: number of kept classes, at most the number of classes; not read by "dense".
        temperatures: the grid on which the mass of the dropped classes is stored; 1 first, increasing.
        num_views: labelled views per sample.
    """

    policy: Literal["top_k", "dense"] = "top_k"
    k: int = Field(default=10, ge=1)
    temperatures: Annotated[tuple[float, ...], BeforeValidator(_list_to_tuple)] = DEFAULT_TEMPERATURES
    num_views: int = Field(default=1, ge=1)

    @field_validator("temperatures")
    @classmethod
    def _check_grid(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        check_temperatures(value)
        return value


def logit_faults(logits_PV: Tensor) -> Tensor:
    """What is wrong with each row of logits, without waiting for the device.

    Args:
        logits_PV: [P, V] floating-point logits.

    Returns:
        [P] uint8 on the same device: 0 fine, 1 NaN, 2 +inf, 3 all -inf (`describe_fault` puts it in words).
        Some -inf logits are fine: those classes are masked.
    """
    peak = logits_PV.amax(dim=-1)  # carries a NaN along, is +inf or -inf exactly in the other two cases
    return (1 * peak.isnan() + 2 * peak.isposinf() + 3 * peak.isneginf()).to(torch.uint8)


def describe_fault(code: int) -> str:
    """A code of `logit_faults` in words: 'no fault', 'a NaN logit', 'a +inf logit' or 'all logits -inf'."""
    return _FAULTS[code]


def top_k(
    logits_PV: Tensor,
    *,
    k: int,
    temperatures: tuple[float, ...] = DEFAULT_TEMPERATURES,
    targets_P: Tensor | None = None,
    chunk_positions: int | None = None,
    check: bool = True,
) -> SoftLabels:
    """Keeps the k most likely classes; among equal logits the lower id wins, on every device.

    Args:
        logits_PV: [P, V] floating-point logits of the teacher. -inf masks a class.
        k: 1 to V.
        temperatures: grid of the tail.
        targets_P: [P] integer ground-truth classes in [0, V), or None.
        chunk_positions: rows worked on at once; None picks 2^22 / V. The result does not depend on it.
        check: raise on faulty logits, and on faulty targets on a GPU; this waits for the GPU. With False,
            look at `logit_faults` yourself: a faulty row gives NaN, and so does the log-probability of a
            faulty target. Targets on the CPU are always checked.

    Returns:
        A torch record on the logits' device, without gradients: ids int64, everything else float32 (float64
        logits stay float64).

    Raises:
        LabelError: k out of range, wrong shapes or dtypes, faulty logits or targets (with `position`).
        TemperatureError: a malformed grid.
    """
    _check_arguments(logits_PV, k, targets_P)
    targets = None if targets_P is None else _checked_targets(targets_P, logits_PV, check=check)
    if check:
        _raise_on_fault(logits_PV)
    num_positions, num_classes = logits_PV.shape
    rows = chunk_positions or max(1, _CHUNK_ELEMENTS // num_classes)
    with torch.no_grad():
        return collect(
            (
                _top_k_chunk(
                    logits_PV[i : i + rows],
                    k,
                    temperatures,
                    None if targets is None else targets[i : i + rows],
                )
                for i in range(0, max(num_positions, 1), rows)
            ),
            num_positions,
        )


def dense(
    logits_PV: Tensor,
    *,
    temperatures: tuple[float, ...] = DEFAULT_TEMPERATURES,
    targets_P: Tensor | None = None,
    chunk_positions: int | None = None,
    check: bool = True,
) -> SoftLabels:
    """Keeps every class, most likely first (K = V); the tail is empty. Arguments and errors: `top_k`."""
    return top_k(
        logits_PV,
        k=logits_PV.shape[-1],
        temperatures=temperatures,
        targets_P=targets_P,
        chunk_positions=chunk_positions,
        check=check,
    )


def whole_record(logits_PV: Tensor) -> SoftLabels:
    """A record of all classes in their own order: nothing is dropped, so nothing need be sorted; [P, V] logits."""
    log_probs_PV = logits_PV.float().log_softmax(-1)
    num_positions, num_classes = log_probs_PV.shape
    return SoftLabels(
        ids=torch.arange(num_classes, device=logits_PV.device).expand(num_positions, -1),
        log_probs=log_probs_PV,
        log_tail=log_probs_PV.new_full((num_positions, 1), -torch.inf),
        num_classes=num_classes,
        temperatures=(1.0,),
    )


def sparsify(
    logits_PV: Tensor, settings: LabelSettings, *, targets_P: Tensor | None = None, check: bool = True
) -> SoftLabels:
    """Turns logits into a record by the policy of the settings. Arguments, result and errors: `top_k`."""
    if settings.policy == "dense":
        return dense(logits_PV, temperatures=settings.temperatures, targets_P=targets_P, check=check)
    return top_k(
        logits_PV, k=settings.k, temperatures=settings.temperatures, targets_P=targets_P, check=check
    )


def _top_k_chunk(
    logits_PV: Tensor, k: int, temperatures: tuple[float, ...], targets_P: Tensor | None
) -> SoftLabels:
    dtype = torch.float64 if logits_PV.dtype == torch.float64 else torch.float32
    logits_PV = logits_PV.to(dtype)
    num_classes = logits_PV.shape[1]
    ids_PK = _largest(logits_PV, k)
    log_probs_PV = logits_PV.log_softmax(dim=-1)
    log_probs_PK = log_probs_PV.gather(1, ids_PK)
    target_log_prob = None
    if targets_P is not None:
        valid = (targets_P >= 0) & (targets_P < num_classes)
        picked = log_probs_PV.gather(1, targets_P.clamp(0, num_classes - 1)[:, None])[:, 0]
        target_log_prob = picked.where(valid, torch.nan)
    stats = _stats(log_probs_PV)
    dropped_PV = log_probs_PV.scatter_(1, ids_PK, -torch.inf)
    log_tail_PG = torch.stack([(dropped_PV * (1.0 / t)).logsumexp(dim=-1) for t in temperatures], dim=1)
    return SoftLabels(
        ids=ids_PK,
        log_probs=log_probs_PK,
        log_tail=log_tail_PG,
        num_classes=num_classes,
        temperatures=temperatures,
        target_log_prob=target_log_prob,
        stats=stats,
    )


def _largest(values_PV: Tensor, k: int) -> Tensor:
    """Ids of the k largest values, descending; equal values by ascending id (`topk` leaves ties open)."""
    if values_PV.dtype == torch.float64:
        return values_PV.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    # Unique sort keys: the float's bits, made monotone, above the reversed id. Adding 0 turns -0.0 into 0.0.
    bits = (values_PV + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    reversed_ids = torch.arange(values_PV.shape[1] - 1, -1, -1, device=values_PV.device)
    return ((ordered << 32) | reversed_ids).topk(k, dim=-1).indices


def _stats(log_probs_PV: Tensor) -> Tensor:
    """[P, 4], the columns of `pipeline.labels.STATS`."""
    alive = log_probs_PV > -torch.inf
    support = alive.sum(dim=-1).to(log_probs_PV.dtype)
    finite = log_probs_PV.where(alive, 0.0)
    entropy = -(log_probs_PV.exp() * finite).sum(dim=-1)
    mean = finite.sum(dim=-1) / support
    variance = (finite - mean[:, None]).where(alive, 0.0).square().sum(dim=-1) / support
    return torch.stack([entropy, mean, variance.sqrt(), support], dim=1)


def _check_arguments(logits_PV: Tensor, k: int, targets_P: Tensor | None) -> None:
    if logits_PV.ndim != 2 or not logits_PV.is_floating_point():
        raise LabelError(
            f"logits: expected floating-point [P, V]; found {logits_PV.dtype} {list(logits_PV.shape)}; "
            "flatten batch and positions into one dimension"
        )
    if not 1 <= k <= logits_PV.shape[1]:
        raise LabelError(
            f"labels.k: expected 1 to {logits_PV.shape[1]}, the number of classes; found {k}; "
            "lower k, or use policy = 'dense' to keep every class"
        )
    if targets_P is not None and (targets_P.shape != logits_PV.shape[:1] or targets_P.is_floating_point()):
        raise LabelError(
            f"targets: expected {list(logits_PV.shape[:1])} integers, one per row of logits; "
            f"found {targets_P.dtype} {list(targets_P.shape)}; give one class per position"
        )


def _checked_targets(targets_P: Tensor, logits_PV: Tensor, *, check: bool) -> Tensor:
    num_classes = logits_PV.shape[1]
    targets_P = targets_P.to(torch.int64)
    if check or targets_P.device.type == "cpu":
        bad = (targets_P < 0) | (targets_P >= num_classes)
        if bool(bad.any()):
            position = int(bad.nonzero()[0, 0])
            raise LabelError(
                f"targets, position {position}: expected a class in [0, {num_classes}); "
                f"found {int(targets_P[position])}; check that teacher and source have the same classes",
                position=position,
            )
    return targets_P.to(logits_PV.device, non_blocking=True)


def _raise_on_fault(logits_PV: Tensor) -> None:
    faults = logit_faults(logits_PV).cpu()
    if bool(faults.any()):
        position = int(faults.nonzero()[0, 0])
        raise LabelError(
            f"logits, position {position}: expected finite logits or -inf, not all -inf; "
            f"found {describe_fault(int(faults[position]))}"
            "; check the teacher's weights, dtype and input there",
            position=position,
        )
