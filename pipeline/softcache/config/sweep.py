"""`[sweep]`: what a sweep tries, a range, a log range or a list for each parameter, checked before anything runs.

[sweep.space]
temperature = { low = 1, high = 8, log = true }
alpha = { low = 0.1, high = 1 }
loss = ["forward_kl", "reverse_kl"]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, ValidationInfo, field_serializer, field_validator, model_validator
from pydantic_core import PydanticCustomError

from softcache.errors import SpecError
from softcache.losses import LOSSES
from softcache.settings import Settings

__all__ = ["SEARCH_PARAMETERS", "Axis", "Parameter", "Range", "SpaceSettings", "SweepSettings", "to_json"]


class Parameter(NamedTuple):
    """One parameter of a sweep: the config's key, the type of its values, and which are allowed."""

    key: str
    kind: type
    expected: str
    allows: Callable[[Any], bool]


def _is_loss(name: str) -> bool:
    try:
        LOSSES.get(name)
    except SpecError:
        return False
    return True


SEARCH_PARAMETERS: dict[str, Parameter] = {
    "temperature": Parameter("loss.temperature", float, "numbers from 1 to 100", lambda x: 1 <= x <= 100),
    "alpha": Parameter("loss.alpha", float, "numbers from 0 to 1", lambda x: 0 <= x <= 1),
    "loss": Parameter("loss.name", str, f"some of {', '.join(LOSSES.names())}", _is_loss),
    "k": Parameter("labels.k", int, "whole numbers of at least 1", lambda x: x >= 1),
    "lr": Parameter("train.lr", float, "numbers above 0", lambda x: x > 0),
    "student": Parameter("student.model", str, "model specs", lambda x: bool(x.strip())),
}
"""What can be swept, in the order of the tables."""


@dataclass(frozen=True)
class Range:
    """All numbers from low to high, both included; `log`: as many between 1 and 2 as between 2 and 4."""

    low: float
    high: float
    log: bool = False


Axis = Range | tuple[Any, ...]


def to_json(axis: Axis) -> Any:
    """Returns a parameter's values as TOML and JSON have them."""
    return list(axis) if isinstance(axis, tuple) else asdict(axis)


class SpaceSettings(Settings):
    """[sweep.space]: what each parameter may be; one that is not named stays as the config has it.

    Attributes:
        temperature, alpha, loss, k, lr, student: values to choose among, a list, or a range `{low, high, log}`.
    """

    temperature: Axis | None = None
    alpha: Axis | None = None
    loss: Axis | None = None
    k: Axis | None = None
    lr: Axis | None = None
    student: Axis | None = None

    @field_validator(*SEARCH_PARAMETERS, mode="plain")
    @classmethod
    def _parse(cls, value: Any, info: ValidationInfo) -> Axis | None:
        assert info.field_name is not None
        return None if value is None else _parsed(SEARCH_PARAMETERS[info.field_name], value)

    @field_serializer(*SEARCH_PARAMETERS)
    def _written(self, axis: Axis | None) -> Any:
        return None if axis is None else to_json(axis)

    @model_validator(mode="after")
    def _check_any(self) -> Self:
        if not list(self.named()):
            raise _error(f"names no parameter; expected some of {', '.join(SEARCH_PARAMETERS)}")
        return self

    def named(self) -> Iterator[tuple[str, Axis]]:
        """Yields the parameters that are swept, with what they may be."""
        for name in SEARCH_PARAMETERS:
            if (axis := getattr(self, name)) is not None:
                yield name, axis


class SweepSettings(Settings):
    """[sweep]: how many trials, of what.

    Attributes:
        trials: how many settings are tried in total.
        pruner: "median" ends a trial whose metric after some epoch is below the median of the earlier trials' at that
            epoch; "never" ends none.
        startup_trials: so many are drawn at random, and not pruned, before the sampler and the pruner learn from them.
        seed: of the sampler. Each student is trained with `train.seed`.
        space: None: `softcache.runs.sweep.space.default_space`.
    """

    trials: int = Field(20, ge=1)
    pruner: Literal["median", "never"] = "median"
    startup_trials: int = Field(6, ge=1)
    seed: int = Field(0, ge=0)
    space: SpaceSettings | None = None


def _parsed(parameter: Parameter, value: Any) -> Axis:
    if isinstance(value, Range):
        value = {"low": value.low, "high": value.high, "log": value.log}
    if isinstance(value, dict):
        return _range(parameter, value)
    if not isinstance(value, list | tuple):
        raise _error(f"expected a list or {{ low = …, high = …, log = true }} of {parameter.expected}")
    values = tuple(_checked(parameter, item) for item in value)
    if not values:
        raise _error(f"the list is empty; expected {parameter.expected}")
    if len(set(values)) < len(values):
        raise _error("the list has a value twice; give each once")
    return values


def _range(parameter: Parameter, value: dict[str, Any]) -> Range:
    if parameter.kind is str:
        raise _error(f"names have no range; expected a list of {parameter.expected}")
    if not {"low", "high"} <= value.keys() <= {"low", "high", "log"}:
        raise _error("a range has the keys low, high and, if it shall be logarithmic, log = true")
    low, high, log = (
        _checked(parameter, value["low"]),
        _checked(parameter, value["high"]),
        value.get("log", False),
    )
    if not isinstance(log, bool):
        raise _error("log of a range is true or false")
    if low >= high:
        raise _error("low of a range is less than high; for one value give a list of it")
    if log and low <= 0:
        raise _error("a logarithmic range begins above 0")
    return Range(low, high, log)


def _checked(parameter: Parameter, value: Any) -> Any:
    kinds = (int, float) if parameter.kind is float else (parameter.kind,)
    is_one = isinstance(value, kinds) and not isinstance(value, bool)
    if is_one and parameter.kind is not str:
        is_one = math.isfinite(value)
    if not is_one or not parameter.allows(value):
        raise _error(f"expected {parameter.expected}, not {value!r}")
    return parameter.kind(value)


def _error(text: str) -> PydanticCustomError:
    return PydanticCustomError("sweep_space", "{text}", {"text": text})
