"""`hidden`: the teacher's hidden states, of which its head makes the whole distribution.

Shape suffixes: `P` positions, `D` width of a state, `R` coordinates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from softcache.errors import LabelError
from softcache.labels.sparsify.settings import POLICIES, LabelSettings
from softcache.labels.tail import DEFAULT_TEMPERATURES
from softcache.labels.vectors import OutputHead, VectorLabels, encode_vectors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Hidden"]


@POLICIES.register("hidden")
class Hidden(LabelSettings):
    """Keeps the input of the teacher's head; the head itself is kept once.

    Attributes:
        values: how a state's numbers are stored: "bfloat16" (2 bytes), "float8_e4m3" and "int8" (1 byte, and a scale per
            row), or "float32".
        components: keep so many leading coordinates of the state in place of all of its numbers: those that carry most of
            the variance of the logits; None keeps the state.
    """

    policy: Literal["hidden"] = "hidden"
    values: Literal["float32", "bfloat16", "float8_e4m3", "int8"] = "bfloat16"
    components: int | None = Field(None, ge=1)

    of_states: ClassVar[bool] = True

    @model_validator(mode="after")
    def _check_unread(self) -> Self:
        for key, default in (("temperatures", DEFAULT_TEMPERATURES), ("statistics", "all")):
            if getattr(self, key) != default:
                raise ValueError(
                    f'{key}: policy = "hidden" keeps no tail and no statistics: the whole distribution follows from the '
                    "state, at every temperature; drop the setting"
                )
        if self.positions.policy == "entropy":
            raise ValueError(
                'positions.policy: "entropy" reads the teacher\'s distribution, for which policy = "hidden" runs no head; '
                'use "all", "every" or "random"'
            )
        return self

    def apply(self, logits_PV: Tensor, **how: Any) -> Any:
        """Raises: it is made of hidden states.

        Raises:
            LabelError: always.
        """
        raise LabelError(
            'labels.policy "hidden": is made of hidden states, not of logits; use `apply_states`'
        )

    def apply_states(self, states_PD: Tensor, head: OutputHead | None = None) -> VectorLabels:
        """Returns the labels of hidden states.

        Args:
            states_PD: [P, D] floating-point inputs of the teacher's head.
            head: of the cache; read where `components` is set.
        """
        if self.components is not None:
            if head is None or head.encoder is None:
                raise LabelError(
                    "labels.components: expected a head with the coordinates' `encoder`; found none; give the cache's head"
                )
            states_PD = (states_PD.float() - head.mean) @ head.encoder
        return VectorLabels(encode_vectors(states_PD, self.values), {"hidden": self.values}, num_classes=1)

    def num_slots(self, num_classes: int) -> int:
        return num_classes

    def size(self, width: int) -> int:
        """Returns how many numbers are kept of a state.

        Raises:
            LabelError: more coordinates than the state has numbers.
        """
        if self.components is not None and self.components > width:
            raise LabelError(
                f"labels.components: expected at most {width}, the width of the teacher's hidden state; found "
                f"{self.components}; lower it, or drop it to keep the state"
            )
        return self.components or width

    def identity(self, num_classes: int) -> dict[str, Any]:
        found = super().identity(num_classes) | {"temperatures": [], "values": self.values}
        return found if self.components is None else found | {"components": self.components}

    @classmethod
    def keys_of_identity(cls, identity: Mapping[str, Any]) -> dict[str, Any]:
        kept = {"components": None, **identity, "temperatures": DEFAULT_TEMPERATURES}
        return {"statistics": "all", **kept}
