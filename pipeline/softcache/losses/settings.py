"""`[loss]`: what a student learns by."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import Annotated, Any, Self

from pydantic import (
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    SerializeAsAny,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from softcache.errors import LabelError, SpecError
from softcache.losses.curriculum import CurriculumSettings
from softcache.losses.registry import LOSSES, Loss, LossSpec, Tail, check_tail, make_loss
from softcache.losses.sample_weights import WeightSettings
from softcache.losses.schedules import AlphaSchedule, TemperatureSchedule
from softcache.losses.standardize import MAX_TEMPERATURE
from softcache.runtime.registry import variant
from softcache.settings import Settings

__all__ = ["IDENTITY_PARAMETERS", "AnyLoss", "LossSettings"]

DEFAULT = "forward_kl"
# Younger than the runs that are on disk: a run that does not use them is the run that it was before.
OPTIONAL_IDENTITY_KEYS = ("temperature_schedule", "alpha_schedule", "curriculum", "weights")
IDENTITY_PARAMETERS = ("beta", "skew", "mu", "dkd_alpha", "dkd_beta", "nkd_gamma")
"""Parameters that the identity of every run lists, with null where its loss does not read them."""


class LossSettings(Settings):
    """[loss]: (1 - alpha) * CE(ground truth) + alpha * T^2 * soft loss, the soft one at temperature T.

    The parameters of the chosen loss are keys of the table, too: an instance is always of a subclass with those of `name`,
    and a key that the loss does not read is refused.

    Attributes:
        name: the soft loss. "uld" is for a language student with another tokenizer (Boizard et al. 2024, arXiv
            2402.12030). A custom loss is `package.module:name`.
        temperature: T, at least 1.
        alpha: weight of the soft part.
        tail: what becomes of the dropped classes (`softcache.losses.tail_modes`).
        standardize: divide the logits by their standard deviation first (`softcache.losses.standardize`).
        max_tail_error: refuse labels whose tail may be off by more than this in mass at the temperature that is asked for
            (`SoftLabels.tail_error`); left out, none are refused.
        temperature_schedule, alpha_schedule: how T and alpha change over the run (`softcache.losses.schedules`).
        curriculum: T is learnt by gradient reversal (`softcache.losses.curriculum`).
        weights: how much each row counts in the soft part (`softcache.losses.sample_weights`).

    Examples:
        >>> LossSettings(name="jsd", beta=0.3).parameters
        {'beta': 0.3}
    """

    name: str = DEFAULT
    temperature: float = Field(1.0, ge=1, le=MAX_TEMPERATURE)
    alpha: float = Field(0.9, ge=0, le=1)
    tail: Tail = "bucket"
    standardize: bool = False
    max_tail_error: float | None = Field(None, gt=0, le=1)
    temperature_schedule: TemperatureSchedule | None = None
    alpha_schedule: AlphaSchedule | None = None
    curriculum: CurriculumSettings | None = None
    weights: WeightSettings | None = None

    def __new__(cls, *_: Any, **values: Any) -> Self:
        if cls is LossSettings:
            with suppress(SpecError, TypeError):  # __init__ refuses such a name
                cls = settings_of(LOSSES.get(values.get("name", DEFAULT)))  # type: ignore[assignment]
        return super().__new__(cls)

    def __reduce__(self) -> Any:  # the subclasses are no attributes of a module
        return LossSettings.model_validate, (self.model_dump(exclude_unset=True),)

    @model_validator(mode="wrap")
    @classmethod
    def _choose_subclass(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if cls is not LossSettings:
            return handler(data)
        if not isinstance(data, Mapping | LossSettings):
            raise ValueError(f"expected a table; found {data!r}")
        found: Self = _READ_TABLE(_drop_nulls(data))
        return found

    @field_validator("tail")
    @classmethod
    def _check_tail(cls, value: Tail, info: ValidationInfo) -> Tail:
        if (name := info.data.get("name")) is not None:
            try:
                check_tail(name, LOSSES.get(name), value)
            except LabelError as error:
                raise ValueError(str(error)) from error
        return value

    @model_validator(mode="after")
    def _check_adaptation(self) -> Self:
        starts = {"temperature": self.temperature, "alpha": self.alpha}
        for name, schedule in (("temperature", self.temperature_schedule), ("alpha", self.alpha_schedule)):
            if schedule is None or schedule.end is None or schedule.kind != "stall":
                continue
            if schedule.end > starts[name]:
                raise ValueError(
                    f"{name}_schedule.end: stall lowers loss.{name} from {starts[name]:g}; expected at most that, found "
                    f"{schedule.end:g}"
                )
        if self.curriculum is not None:
            lowest, highest = self.curriculum.lowest, self.curriculum.lowest + self.curriculum.range
            if self.temperature_schedule is not None:
                raise ValueError(
                    "curriculum: learns the temperature that temperature_schedule would set; drop one of the tables"
                )
            if highest > MAX_TEMPERATURE:
                raise ValueError(
                    f"curriculum.range: expected lowest + range of at most {MAX_TEMPERATURE:g}; found {highest:g}"
                )
            if not lowest < self.temperature < highest:
                raise ValueError(
                    f"curriculum: begins at loss.temperature, which has to be above {lowest:g} and below {highest:g}; found "
                    f"{self.temperature:g}"
                )
        if self.weights is not None and self.weights.needs_truth and self.compares_ranks:
            raise ValueError(
                f"weights.by: {self.weights.by} reads the teacher's probability of the ground truth, which has other tokens "
                f'for the student of {self.name}; use "teacher_entropy"'
            )
        return self

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        if not self.reads_rollouts:
            return self
        wrong = {
            "temperature": self.temperature != 1,
            "alpha": self.alpha != 1,
            "standardize": self.standardize,
            "temperature_schedule, alpha_schedule, curriculum": self.adapts,
        }
        if found := next((key for key, is_wrong in wrong.items() if is_wrong), None):
            raise ValueError(
                f"{found}: {self.name} is of tokens that were sampled at temperature 1, and cross-entropy with these would "
                "train the student on its own samples; expected temperature = 1, alpha = 1, and neither standardize nor "
                "schedules"
            )
        return self

    @property
    def reads_rollouts(self) -> bool:
        """Whether the loss is of sampled tokens, which a source of rollouts has."""
        return LOSSES.get(self.name).of_samples is not None

    @property
    def compares_ranks(self) -> bool:
        """Whether the loss is for a student whose classes are others than the teacher's."""
        return LOSSES.get(self.name).compares_ranks

    @property
    def adapts(self) -> bool:
        """Whether T or alpha may change over a run."""
        tables = (self.temperature_schedule, self.alpha_schedule, self.curriculum)
        return any(table is not None for table in tables)

    def state_fault(self) -> str | None:
        """Returns what of these settings cannot be had of a teacher's hidden states, and what can; None where all can."""
        if self.highest_alpha == 0:
            return None
        if not LOSSES.get(self.name).classwise:
            able = ", ".join(sorted(name for name, kind in LOSSES.items() if kind.classwise))
            return f"name: {self.name} is no sum over classes, as hidden states are compared by; use one of {able}"
        if self.standardize:
            return "standardize: reads the deviation of all logits of a row, which are never there at once; drop it"
        if self.weights is not None:
            return "weights: read the entropy or the ground truth of soft labels, which these have not; drop the table"
        if self.curriculum is not None:
            return "curriculum: learns a temperature, which needs all logits at once; use loss.temperature_schedule"
        return None

    @property
    def highest_temperature(self) -> float:
        """The highest T that a run may ask labels for."""
        if self.curriculum is not None:
            return self.curriculum.lowest + self.curriculum.range
        return max(self.temperature, (self.temperature_schedule and self.temperature_schedule.end) or 1.0)

    @property
    def highest_alpha(self) -> float:
        """The largest weight that the soft part has in a run."""
        return max(self.alpha, (self.alpha_schedule and self.alpha_schedule.end) or 0.0)

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of the chosen loss."""
        return {key: getattr(self, key) for key in LOSSES.get(self.name).parameters}

    def identity(self) -> dict[str, Any]:
        """Returns what distinguishes runs of this loss from others."""
        found = dict.fromkeys(IDENTITY_PARAMETERS) | self.model_dump(mode="json")
        return {
            key: value
            for key, value in found.items()
            if (key not in OPTIONAL_IDENTITY_KEYS or value is not None) and key != "max_tail_error"
        }

    @property
    def loss(self) -> Loss:
        """The soft loss that these settings name."""
        return make_loss(
            self.name,
            tail=self.tail,
            standardize=self.standardize,
            max_tail_error=self.max_tail_error,
            **self.parameters,
        )


@cache
def settings_of(spec: LossSpec) -> type[LossSettings]:
    """Returns the model of `[loss]` for a loss: the common keys and its parameters.

    Raises:
        SpecError: a parameter has the name of a common key.
    """
    if shared := sorted(spec.settings.model_fields.keys() & LossSettings.model_fields.keys()):
        raise SpecError(
            f"{spec.settings.__name__}.{shared[0]}: every [loss] has this key; give the loss's parameter another name"
        )
    bases: Any = LossSettings if spec.settings is Settings else (spec.settings, LossSettings)
    # Cross-entropy with tokens that the student sampled would train it on its own samples.
    changed: Any = {} if spec.of_samples is None else {"alpha": (float, Field(1.0, ge=0, le=1))}
    return create_model("LossSettings", __base__=bases, __module__=__name__, **changed)


def _drop_nulls(table: Any) -> Any:
    """Returns a table without the nulls that resolved configs of earlier runs hold for parameters that are not read."""
    if not isinstance(table, dict):
        return table
    return {key: x for key, x in table.items() if x is not None or key not in IDENTITY_PARAMETERS}


_VARIANT = variant(LOSSES, settings_of, key="name", default=DEFAULT)
_READ_TABLE: Any = _VARIANT.func
AnyLoss = Annotated[SerializeAsAny[LossSettings], _VARIANT, BeforeValidator(_drop_nulls)]
"""The field `[loss]` of a config."""
