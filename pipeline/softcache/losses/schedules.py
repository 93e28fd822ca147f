"""Temperature and alpha that change over a run: what a schedule is, and its value at a step.

With u the share of the run's optimizer steps that lie behind (0 at the first step, 1 at the last), x = min(1, u / until),
and a, b its first and last value:

    constant   a
    linear     a + (b - a) x
    cosine     a + (b - a) (1 - cos(pi x)) / 2
    stall      a, times `factor` (but never below b) whenever `patience` epochs in a row brought no held-out loss that is
               below the lowest so far by more than `min_delta`; the count then starts anew

The first three are functions of the step alone, the last of the held-out losses of the finished epochs, which are in the
checkpoint as the run's history. So a schedule has no state of its own, and a resumed run goes on exactly.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor

from softcache.losses.standardize import MAX_TEMPERATURE
from softcache.settings import Settings

__all__ = ["AlphaSchedule", "LossMix", "Schedule", "TemperatureSchedule", "scheduled"]

_ONLY_FOR = {
    "until": ("linear", "cosine"),
    "factor": ("stall",),
    "patience": ("stall",),
    "min_delta": ("stall",),
}


class LossMix(NamedTuple):
    """How the two parts of one step's loss are mixed.

    Attributes:
        temperature: T; a tensor [] where it is learnt, with a gradient.
        alpha: weight of the soft part.
    """

    temperature: float | Tensor
    alpha: float


class Schedule(Settings):
    """How a setting of [loss] moves from its own value, the first, to `end`.

    Attributes:
        kind: see the module.
        end: the last value; of "stall" the lowest.
        until: the share of the run after which `end` is reached.
        factor: of "stall": by which the value is multiplied.
        patience: of "stall": epochs in a row without a lower held-out loss.
        min_delta: of "stall": by how much, in nats, a loss must be lower to count.
    """

    kind: Literal["constant", "linear", "cosine", "stall"]
    end: float | None = None
    until: float = Field(1.0, gt=0, le=1)
    factor: float = Field(0.5, gt=0, lt=1)
    patience: int = Field(2, ge=1)
    min_delta: float = Field(0.0, ge=0)

    @field_validator(*_ONLY_FOR)
    @classmethod
    def _is_read(cls, value: Any, info: ValidationInfo) -> Any:
        kind, name = info.data.get("kind"), info.field_name
        assert name is not None
        if kind is not None and kind not in _ONLY_FOR[name]:
            raise ValueError(
                f"not read by kind {kind!r}, only by {' and '.join(_ONLY_FOR[name])}; leave it out"
            )
        return value

    @model_validator(mode="after")
    def _check_end(self) -> Self:
        if (self.end is None) != (self.kind == "constant"):
            wanted = "leave it out" if self.kind == "constant" else "it is the last value"
            raise ValueError(f"end: expected one for linear, cosine and stall, none for constant; {wanted}")
        return self


class TemperatureSchedule(Schedule):
    """[loss.temperature_schedule]: from loss.temperature to `end`, both at least 1."""

    end: float | None = Field(None, ge=1, le=MAX_TEMPERATURE)


class AlphaSchedule(Schedule):
    """[loss.alpha_schedule]: from loss.alpha to `end`, both in [0, 1]."""

    end: float | None = Field(None, ge=0, le=1)


def scheduled(
    schedule: Schedule | None, start: float, *, step: int, num_steps: int, losses: Sequence[float]
) -> float:
    """The value at a step.

    Args:
        schedule: None: the value never changes.
        start: the first value.
        step: optimizer steps that lie behind.
        num_steps: of the whole run.
        losses: held-out losses of the epochs that lie behind, nats.

    Examples:
        >>> schedule = TemperatureSchedule(kind="linear", end=1.0)
        >>> [scheduled(schedule, 4.0, step=step, num_steps=4, losses=[]) for step in range(4)]
        [4.0, 3.0, 2.0, 1.0]
        >>> schedule = AlphaSchedule(kind="stall", end=0.1, patience=1)
        >>> scheduled(schedule, 0.8, step=9, num_steps=10, losses=[2.0, 1.0, 1.5, 0.5])
        0.4
    """
    if schedule is None or schedule.end is None:
        return start
    if schedule.kind == "stall":
        return _after_stalls(schedule, start, schedule.end, losses)
    share = min(1.0, step / max(1, num_steps - 1) / schedule.until)
    if schedule.kind == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    # At its ends exactly the numbers of the config: a last step at T = 0.9999999 would be refused.
    return schedule.end if share == 1 else start + (schedule.end - start) * share


def _after_stalls(schedule: Schedule, start: float, lowest: float, losses: Sequence[float]) -> float:
    value, best, waited = start, math.inf, 0
    for loss in losses:
        if loss < best - schedule.min_delta:
            best, waited = loss, 0
            continue
        waited += 1
        if waited == schedule.patience:
            value, waited = max(lowest, value * schedule.factor), 0
    return value
