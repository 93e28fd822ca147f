"""`[labels]`: which classes of each distribution are kept."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from softcache.labels import DEFAULT_TEMPERATURES, Sampling
from softcache.labels.positions import PositionSettings
from softcache.labels.tail import check_temperatures
from softcache.settings import Settings

__all__ = ["LabelSettings"]


SAMPLING_PARAMETERS = {"draws", "proposal_exponent", "seed"}
POLICY_PARAMETERS: dict[str, set[str]] = {
    "top_k": {"k"},
    "top_p": {"k", "p"},
    "dense": set(),
    "sample": SAMPLING_PARAMETERS,
    "hybrid": {"k"} | SAMPLING_PARAMETERS,
}


def _list_to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # TOML has lists only


class LabelSettings(Settings):
    """`[labels]`: what is kept of each distribution.

    Attributes:
        policy: "top_k" keeps the k most likely classes; "top_p" as many of them as hold the mass p, at most k; "dense"
            keeps all. "sample" draws `draws` classes at random, with replacement (random-sampling distillation);
            "hybrid" keeps the k most likely and `draws` of the others, each at most once.
        k: number of kept classes, at most the number of classes; not read by "dense" and "sample".
        p: mass that "top_p" keeps.
        draws: of "sample" and "hybrid".
        proposal_exponent: they draw a class of probability q in proportion to q^proposal_exponent; below 1 its inverse
            must be one of the temperatures.
        seed: of the draws.
        temperatures: the grid on which the mass of the dropped classes is stored; 1 first, increasing.
        num_views: labelled views per sample.
        positions: which positions of a text get a label row.
    """

    policy: Literal["top_k", "top_p", "dense", "sample", "hybrid"] = "top_k"
    k: int = Field(default=10, ge=1)
    p: float = Field(default=0.9, gt=0, le=1)
    draws: int = Field(default=32, ge=1, le=65535)
    proposal_exponent: float = Field(default=1.0, gt=0, le=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    temperatures: Annotated[tuple[float, ...], BeforeValidator(_list_to_tuple)] = DEFAULT_TEMPERATURES
    num_views: int = Field(default=1, ge=1)
    positions: PositionSettings = PositionSettings()

    @field_validator("temperatures")
    @classmethod
    def _check_grid(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        check_temperatures(value)
        return value

    @model_validator(mode="after")
    def _check_proposal(self) -> Self:
        if (sampling := self.sampling) is not None:
            sampling.proposal_index(self.temperatures)
        return self

    @property
    def read_fields(self) -> set[str]:
        """Names of the settings that the policy reads."""
        always = set(type(self).model_fields) - {"k", "p", "draws", "proposal_exponent", "seed"}
        return always | POLICY_PARAMETERS[self.policy]

    @property
    def sampling(self) -> Sampling | None:
        """How classes are drawn; None for the policies that draw none."""
        if self.policy == "sample":
            return Sampling(exact=0, draws=self.draws, exponent=self.proposal_exponent, replacement=True)
        if self.policy == "hybrid":
            return Sampling(
                exact=self.k, draws=self.draws, exponent=self.proposal_exponent, replacement=False
            )
        return None

    def num_slots(self, num_classes: int) -> int:
        """Slots of a record's row for V classes."""
        if self.policy == "dense":
            return num_classes
        if self.policy == "sample":
            return min(self.draws, num_classes)
        return self.k + (self.draws if self.policy == "hybrid" else 0)

    def identity(self, num_classes: int) -> dict[str, Any]:
        """Returns what a cache's identity says of its labels."""
        said: dict[str, Any] = {"policy": self.policy, "k": self.k, "temperatures": list(self.temperatures)}
        if self.policy in ("dense", "sample"):
            said["k"] = self.num_slots(num_classes)
        if self.policy == "top_p":
            said["p"] = self.p
        if self.sampling is not None:
            said |= {"draws": self.draws, "proposal_exponent": self.proposal_exponent, "seed": self.seed}
        if self.positions.policy != "all":
            said["positions"] = self.positions.identity()
        return said
