"""`[loss]`: what a student learns by."""

from typing import Any, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from softcache.errors import LabelError
from softcache.losses.curriculum import CurriculumSettings
from softcache.losses.registry import KINDS, PARAMETERS, Loss, LossName, Tail, check_parameter, make_loss
from softcache.losses.sample_weights import WeightSettings
from softcache.losses.schedules import AlphaSchedule, TemperatureSchedule
from softcache.settings import Settings

__all__ = ["LossSettings"]

# Younger than the runs that are on disk: a run that does not use them is the run that it was before.
OPTIONAL_IDENTITY_KEYS = ("temperature_schedule", "alpha_schedule", "curriculum", "weights")


class LossSettings(Settings):
    """[loss]: (1 - alpha) * CE(ground truth) + alpha * T^2 * soft loss, the soft one at temperature T.

    Attributes:
        name: the soft loss. "uld" is for a language student with another tokenizer (Boizard et al. 2024, arXiv
            2402.12030).
        temperature: T, at least 1.
        alpha: weight of the soft part.
        tail: what becomes of the dropped classes (`softcache.losses.tail_modes`).
        standardize: divide the logits by their standard deviation first (`softcache.losses.standardize`).
        beta: of "jsd": weight of the teacher in the mixture; 0.5.
        skew: of "skew_kl" and "skew_reverse_kl"; 0.1.
        mu: of "adaptive_kl": the teacher's mass in the head; 0.5.
        dkd_alpha: of "dkd": weight of the target part; 1.
        dkd_beta: of "dkd": weight of the other part; 8.
        nkd_gamma: of "nkd": weight of the non-target part; 1.5.
        temperature_schedule, alpha_schedule: how T and alpha change over the run (`softcache.losses.schedules`).
        curriculum: T is learnt by gradient reversal (`softcache.losses.curriculum`).
        weights: how much each row counts in the soft part (`softcache.losses.sample_weights`).
    """

    name: LossName = "forward_kl"
    temperature: float = Field(4.0, ge=1, le=100)  # beyond, T^2 only magnifies the rounding of the divergence
    alpha: float = Field(0.9, ge=0, le=1)
    tail: Tail = "bucket"
    standardize: bool = False
    beta: float | None = None
    skew: float | None = None
    mu: float | None = None
    dkd_alpha: float | None = None
    dkd_beta: float | None = None
    nkd_gamma: float | None = None
    temperature_schedule: TemperatureSchedule | None = None
    alpha_schedule: AlphaSchedule | None = None
    curriculum: CurriculumSettings | None = None
    weights: WeightSettings | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """Gives a loss's parameters their defaults, so that a resolved config says them."""
        name = data.get("name", "forward_kl") if isinstance(data, dict) else None
        return {**KINDS[name].defaults, **data} if isinstance(name, str) and name in KINDS else data

    @field_validator(*PARAMETERS)
    @classmethod
    def _check_parameter(cls, value: float | None, info: ValidationInfo) -> float | None:
        name = info.data.get("name")
        if value is not None and name is not None:
            assert info.field_name is not None
            _as_value_error(check_parameter, name, info.field_name, value)
        return value

    @field_validator("tail")
    @classmethod
    def _check_tail(cls, value: Tail, info: ValidationInfo) -> Tail:
        if (name := info.data.get("name")) is not None:
            _as_value_error(make_loss, name, tail=value)
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
            if highest > 100:
                raise ValueError(
                    f"curriculum.range: expected lowest + range of at most 100; found {highest:g}"
                )
            if not lowest < self.temperature < highest:
                raise ValueError(
                    f"curriculum: begins at loss.temperature, which has to be above {lowest:g} and below {highest:g}; found "
                    f"{self.temperature:g}"
                )
        if self.weights is not None and self.weights.needs_truth and self.name == "uld":
            raise ValueError(
                f"weights.by: {self.weights.by} reads the teacher's probability of the ground truth, which uld's student "
                'tells in other tokens; use "teacher_entropy"'
            )
        return self

    @property
    def adapts(self) -> bool:
        """Whether T or alpha may change over a run."""
        tables = (self.temperature_schedule, self.alpha_schedule, self.curriculum)
        return any(table is not None for table in tables)

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

    def identity(self) -> dict[str, Any]:
        """Returns what tells runs of this loss from others."""
        found = self.model_dump(mode="json")
        return {
            key: value
            for key, value in found.items()
            if key not in OPTIONAL_IDENTITY_KEYS or value is not None
        }

    @property
    def loss(self) -> Loss:
        """The soft loss that these settings name."""
        given = {name: value for name in PARAMETERS if (value := getattr(self, name)) is not None}
        return make_loss(self.name, tail=self.tail, standardize=self.standardize, **given)


def _as_value_error(check: Any, *args: Any, **kwargs: Any) -> None:
    try:
        check(*args, **kwargs)
    except LabelError as error:
        raise ValueError(str(error)) from error
