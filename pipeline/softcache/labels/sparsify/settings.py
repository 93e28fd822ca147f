"""`[labels]`: the label policies by name, and the settings that all of them share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from softcache.errors import LabelError
from softcache.labels.positions import PositionSettings
from softcache.labels.sampling import Sampling
from softcache.labels.tail import DEFAULT_TEMPERATURES, check_temperatures
from softcache.runtime.registry import Registry, variant
from softcache.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from softcache.labels.soft_labels import SoftLabels

__all__ = ["POLICIES", "AnyLabelSettings", "LabelSettings", "SampledSettings", "label_settings"]


def _list_to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # TOML has lists only


def _inverse(exponent: float) -> float:
    """Returns the temperature T with 1 / T = exponent to the last bit, where there is one."""
    nearest = 1.0 / exponent
    close = (round(nearest, 12), nearest, math.nextafter(nearest, 0.0), math.nextafter(nearest, math.inf))
    return next((t for t in close if 1.0 / t == exponent), nearest)


class LabelSettings(Settings):
    """`[labels]`: a label policy with its settings; each policy is a subclass in `softcache.labels.sparsify.policies`.

    Attributes:
        policy: the name of the policy.
        temperatures: the grid on which the mass of the dropped classes is stored; 1 first, increasing.
        num_views: labeled views per sample.
        positions: which positions of a text get a label row.
        statistics: "all": entropy, mean, deviation and support of each row are kept, which `loss.standardize`,
            `loss.weights.by = "teacher_entropy"` and fusion read, and by which the tail is known better above the grid.
            "none": five bytes a row less in codec `packed`, sixteen in `open`.
    """

    policy: str
    temperatures: Annotated[tuple[float, ...], BeforeValidator(_list_to_tuple)] = DEFAULT_TEMPERATURES
    num_views: int = Field(default=1, ge=1)
    positions: PositionSettings = PositionSettings()
    statistics: Literal["all", "none"] = "all"

    labels_detections: ClassVar[bool] = False
    """Whether the policy also keeps the classes of a detector's anchors."""
    of_states: ClassVar[bool] = False
    """Whether labels are made of the inputs of the teacher's head (`policies.hidden`), and not of its logits."""

    @field_validator("temperatures")
    @classmethod
    def _check_grid(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        check_temperatures(value)
        return value

    @abstractmethod
    def apply(
        self,
        logits_PV: Tensor,
        *,
        targets_P: Tensor | None = None,
        seeds_P: Tensor | None = None,
        check: bool = True,
    ) -> SoftLabels:
        """Returns the soft labels of logits.

        Args:
            logits_PV: [P, V] floating-point logits.
            targets_P: [P] integer classes, or None.
            seeds_P: [P] int64, from `row_seeds`; for the policies that sample.
            check: as in `top_k`, which documents the result and the errors.
        """

    @abstractmethod
    def num_slots(self, num_classes: int) -> int:
        """Returns the slots K of a label row for V classes."""

    @property
    def sampling(self) -> Sampling | None:
        """How classes are sampled; None for the policies that sample none."""
        return None

    def row_seeds(
        self, fingerprints_B: np.ndarray, row_counts_B: np.ndarray, positions_P: np.ndarray
    ) -> Tensor | None:
        """Returns the seeds [P] of a batch's rows (`sampled.row_seeds`); None for the policies that sample none."""
        return None

    def truncate(self, labels: SoftLabels) -> SoftLabels:
        """Returns the labels that this policy keeps of labels with more classes.

        Raises:
            LabelError: the policy cannot be applied to labels, only to logits.
        """
        raise LabelError(
            f"labels.policy {self.policy!r}: cannot be made from a larger cache; capture with this policy"
        )

    def identity(self, num_classes: int) -> dict[str, Any]:
        """Returns the labels' part of a cache's identity."""
        found: dict[str, Any] = {
            "policy": self.policy,
            "k": self.num_slots(num_classes),
            "temperatures": list(self.temperatures),
        }
        if self.positions.policy != "all":
            found["positions"] = self.positions.identity()
        if self.statistics != "all":
            found["statistics"] = self.statistics
        return found

    @classmethod
    def keys_of_identity(cls, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the labels' part of an identity by the keys of `[labels]`."""
        return {"statistics": "all", **identity, "temperatures": tuple(identity["temperatures"])}


POLICIES: Registry[type[LabelSettings]] = Registry(
    "label policy",
    package="softcache.labels.sparsify.policies",
    group="softcache.policies",
    subclass_of=LabelSettings,
)

AnyLabelSettings = Annotated[
    SerializeAsAny[LabelSettings], variant(POLICIES, lambda policy: policy, key="policy", default="top_k")
]
"""The type of a field that holds `[labels]` of any policy."""


def label_settings(policy: str = "top_k", **settings: Any) -> LabelSettings:
    """Returns the settings of a policy by its name.

    Raises:
        SpecError: there is no such policy.
        pydantic.ValidationError: a setting that the policy does not read, or one out of range.

    Example:
        >>> label_settings("top_p", p=0.5).num_slots(100)
        10
    """
    return POLICIES.get(policy).model_validate({"policy": policy, **settings})


class SampledSettings(LabelSettings):
    """Settings of the policies that sample classes at random.

    Attributes:
        num_samples: classes drawn for a row.
        proposal_temperature: T at least 1; a class of probability q is drawn in proportion to q^(1/T).
        seed: of the samples.
    """

    num_samples: int = Field(default=32, ge=1, le=65535)
    proposal_temperature: float = Field(default=1.0, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _check_proposal(self) -> Self:
        if self.sampling is not None:
            self.sampling.proposal_index(self.temperatures)
        return self

    @property
    def proposal_exponent(self) -> float:
        return 1.0 / self.proposal_temperature

    def required_seeds(self, seeds_P: Tensor | None) -> Tensor:
        """Returns the seeds; raises LabelError where there are none."""
        if seeds_P is None:
            raise LabelError(
                f"labels.policy {self.policy!r}: expected seeds of the rows; found none; see row_seeds"
            )
        return seeds_P

    def row_seeds(
        self, fingerprints_B: np.ndarray, row_counts_B: np.ndarray, positions_P: np.ndarray
    ) -> Tensor:
        from softcache.labels.sparsify.sampled import row_seeds

        return row_seeds(fingerprints_B, row_counts_B, positions_P, self.seed)

    def identity(self, num_classes: int) -> dict[str, Any]:
        return super().identity(num_classes) | {
            "draws": self.num_samples,
            "proposal_exponent": self.proposal_exponent,
            "seed": self.seed,
        }

    @classmethod
    def keys_of_identity(cls, identity: Mapping[str, Any]) -> dict[str, Any]:
        found = super().keys_of_identity(identity)
        if "draws" in found:
            found["num_samples"] = found.pop("draws")
        if "proposal_exponent" in found:
            found["proposal_temperature"] = _inverse(found.pop("proposal_exponent"))
        return found
