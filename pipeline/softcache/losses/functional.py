"""The losses as functions of a student's logits and soft labels: pure, per position, in nats.

Shape suffixes: `P` positions, `V` classes.

Each is made of its formula in `softcache.losses.divergences`. All of them take the same arguments and raise the same errors,
and none holds the factor T^2 (but nkd's second term), which is `distillation_loss`'s.
"""

from __future__ import annotations

import inspect
import re
from typing import Any, Protocol

from torch import Tensor

from softcache.labels import SoftLabels
from softcache.losses.bucketed import bucketed_loss
from softcache.losses.distillation import add_truth_part
from softcache.losses.registry import LOSSES, LossSpec, make_loss

__all__ = [
    "adaptive_kl",
    "dkd",
    "forward_kl",
    "jsd",
    "nkd",
    "pld",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "soft_cross_entropy",
    "tail_decoupled_kl",
    "total_variation",
]

_ARGUMENTS = """
Args:
    student_logits: [P, V] floating point; half precision is promoted to float32. -inf masks a class.
    labels: torch record of the same P positions and V classes, on the same device.{targets}
    temperature: a number or a tensor [P], at least the first grid temperature of the labels.{parameters}
    tail: {tails}; what they mean and cost is in `softcache.losses.tail_modes`.
    padded_vocabulary: accept a student of another number of classes, where the two differ in unused ids
        at the end only; what that means is in `fit_vocabulary`.

Returns:
    [P] float32 or float64; of a divergence at least 0 up to rounding (but with "ignore"). There is no factor T^2: see
    `distillation_loss`. Differentiable in the logits and in a tensor temperature.

Raises:
    LabelError: shapes, classes or kinds differ, a parameter is out of range, or `tail` means nothing here.{unknown}
    TemperatureError: the labels cannot serve this temperature.
"""
_TARGETS = """
    targets: [P] integer classes of the student; a position with -100 has a loss of 0."""
_UNKNOWN = """ Also where a
        target is out of range, or the record lacks the teacher's probability of it (with `position`); a wait for a GPU."""


class LossFunction(Protocol):
    """A loss of logits and labels, [P]; parameters are the loss's own."""

    __name__: str

    def __call__(
        self,
        student_logits: Tensor,
        labels: SoftLabels,
        *,
        temperature: Any,
        tail: str = "bucket",
        padded_vocabulary: bool = False,
        **parameters: float,
    ) -> Tensor: ...


class TargetLossFunction(Protocol):
    """The same of a loss that reads the ground-truth class."""

    __name__: str

    def __call__(
        self,
        student_logits: Tensor,
        labels: SoftLabels,
        targets: Tensor,
        *,
        temperature: Any,
        tail: str = "bucket",
        padded_vocabulary: bool = False,
        **parameters: float,
    ) -> Tensor: ...


def _make_function(name: str) -> LossFunction:
    def function(
        student_logits: Tensor,
        labels: SoftLabels,
        *,
        temperature: Any,
        tail: str = "bucket",
        padded_vocabulary: bool = False,
        **parameters: Any,
    ) -> Tensor:
        loss = make_loss(name, tail=tail, **parameters)
        return bucketed_loss(
            loss, student_logits, labels, None, temperature=temperature, padded_vocabulary=padded_vocabulary
        )

    return _documented(function, LOSSES.get(name))


def _make_target_function(name: str) -> TargetLossFunction:
    def function(
        student_logits: Tensor,
        labels: SoftLabels,
        targets: Tensor,
        *,
        temperature: Any,
        tail: str = "bucket",
        padded_vocabulary: bool = False,
        **parameters: Any,
    ) -> Tensor:
        loss = make_loss(name, tail=tail, **parameters)
        value_P = bucketed_loss(
            loss,
            student_logits,
            labels,
            targets,
            temperature=temperature,
            padded_vocabulary=padded_vocabulary,
        )
        if not loss.kind.weighs_truth:
            return value_P
        return add_truth_part(temperature**2 * value_P, student_logits, labels, targets)

    return _documented(function, LOSSES.get(name))


def _documented(function: Any, spec: LossSpec) -> Any:
    """The function with the name, signature and docstring that the formula and its parameters give it."""
    formula, fields = spec.formula, spec.settings.model_fields
    assert formula is not None
    function.__name__ = function.__qualname__ = formula.__name__
    signature = inspect.signature(function)
    own = [
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=x.default, annotation=x.annotation)
        for key, x in fields.items()
    ]
    common = list(signature.parameters.values())[:-1]
    function.__signature__ = signature.replace(parameters=[*common, *own])
    maths, *rest = re.split(
        r"\n(?=Examples:|References:)", inspect.cleandoc(formula.__doc__ or ""), maxsplit=1
    )
    described = " ".join((spec.settings.__doc__ or "").replace("`", "").split())
    arguments = _ARGUMENTS.format(
        targets=_TARGETS if spec.needs_target else "",
        parameters=f"\n    {described}" if fields else "",
        tails=" or ".join(f'"{tail}"' for tail in spec.tails),
        unknown=_UNKNOWN if spec.needs_target else "",
    )
    function.__doc__ = "\n".join([maths + arguments, *rest])
    return function


forward_kl = _make_function("forward_kl")
reverse_kl = _make_function("reverse_kl")
jsd = _make_function("jsd")
skew_kl = _make_function("skew_kl")
skew_reverse_kl = _make_function("skew_reverse_kl")
adaptive_kl = _make_function("adaptive_kl")
total_variation = _make_function("total_variation")
soft_cross_entropy = _make_function("cross_entropy")
tail_decoupled_kl = _make_function("tail_decoupled_kl")
dkd = _make_target_function("dkd")
nkd = _make_target_function("nkd")
pld = _make_target_function("pld")
