"""`[loss]`: what a student learns by."""

from typing import Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pipeline.errors import LabelError
from pipeline.losses.registry import KINDS, PARAMETERS, Loss, LossName, Tail, check_parameter, make_loss
from pipeline.settings import Settings

__all__ = ["LossSettings"]


class LossSettings(Settings):
    """[loss]: (1 - alpha) * CE(ground truth) + alpha * T^2 * soft loss, the soft one at temperature T.

    Attributes:
        name: the soft loss. "uld" is for a language student with another tokenizer (Boizard et al. 2024, arXiv
            2402.12030).
        temperature: T, at least 1.
        alpha: weight of the soft part.
        tail: what becomes of the dropped classes (`pipeline.losses.tails`).
        standardize: divide the logits by their standard deviation first (`pipeline.losses.standardize`).
        beta: of "jsd": weight of the teacher in the mixture; 0.5.
        skew: of "skew_kl" and "skew_reverse_kl"; 0.1.
        mu: of "adaptive_kl": the teacher's mass in the head; 0.5.
        dkd_alpha: of "dkd": weight of the target part; 1.
        dkd_beta: of "dkd": weight of the other part; 8.
        nkd_gamma: of "nkd": weight of the non-target part; 1.5.
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
