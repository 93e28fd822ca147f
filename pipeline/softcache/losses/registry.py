"""The losses by name: what each reads, and where its maths holds.

>>> make_loss("jsd", beta=0.3).parameters
{'beta': 0.3}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from pydantic import ValidationError
from torch import Tensor

from softcache.errors import LabelError, SpecError
from softcache.labels import SoftLabels
from softcache.runtime.registry import Registry
from softcache.settings import Settings

__all__ = ["LOSSES", "TAILS", "Loss", "LossSpec", "Tail", "as_loss", "check_tail", "divergence", "make_loss"]

Tail = Literal["bucket", "uniform", "ignore", "renormalize"]
TAILS: tuple[str, ...] = get_args(Tail)


@dataclass(frozen=True)
class LossSpec:
    """A loss, what its maths allows, and which fast paths implement it; made by `divergence`.

    Attributes:
        formula: (log_p_PB, log_s_PB, **parameters) to [P], from the log-masses of teacher and student in the same B
            buckets, of which the last is the tail; or, where the loss is `linear`, to each bucket's term [P, B].
            None: it compares ranks, not classes, or one class alone.
        settings: the model of its parameters, which are keys of `[loss]`.
        tails: what may become of the dropped classes.
        temperature_power: the loss counts times T to this power.
        linear: the sum over the buckets of p (o - log s), where o depends on p alone: log p, or 0 without
            `has_entropy`. Such a loss can be estimated without bias from classes drawn at random, and its derivatives
            by log s are known: -p.
        has_entropy: whether a linear loss is 0 at s = p (a divergence), or the teacher's entropy (a cross-entropy).
        classwise: the sum over the buckets of a function of p and s of each, which can be taken block by block of
            classes; such a loss is made of hidden states (`losses.fused.hidden`).
        needs_target: it reads the ground-truth class, which has a bucket of its own then, the last but one.
        weighs_truth: it holds, in addition to the formula, the cross-entropy at T=1 times the teacher's probability of
            the ground-truth class at T=1.
        fast_paths: the special implementations that are of this loss: "logits" (`losses.direct`) and "hidden"
            (`losses.fused.cpu`). They have the value and gradient of the formula, and are off with SOFTCACHE_COMPILED=0.
        of_logits: for a loss without a formula: (student_logits, labels, temperature=) to [P].
        of_samples: for a loss of the token that a policy sampled, which is the target: (log_s_P, log_p_P, log_q_P,
            **parameters) to [P], from its log-probability at T=1 by student, teacher and sampling policy; of log_q_P None
            where the rollouts lack it.

    Raises (from the constructor):
        SpecError: `settings` is no settings model.
    """

    formula: Callable[..., Tensor] | None
    settings: type[Settings] = Settings
    tails: tuple[str, ...] = TAILS
    temperature_power: int = 2
    linear: bool = False
    has_entropy: bool = True
    classwise: bool = False
    needs_target: bool = False
    weighs_truth: bool = False
    fast_paths: tuple[str, ...] = ()
    of_logits: Callable[..., Tensor] | None = None
    of_samples: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.settings, type) and issubclass(self.settings, Settings)):
            raise SpecError(
                f"settings of a loss: expected a subclass of softcache.settings.Settings; found {self.settings!r}; write "
                "@divergence() above the formula of a loss without parameters"
            )

    def __call__(self, log_p_PB: Tensor, log_s_PB: Tensor, **parameters: Any) -> Tensor:
        """The formula's value."""
        assert self.formula is not None
        return self.formula(log_p_PB, log_s_PB, **parameters)

    @property
    def compares_ranks(self) -> bool:
        """Whether it compares ranks and not classes, so that teacher and student may have different ones."""
        return self.of_logits is not None

    @property
    def parameters(self) -> list[str]:
        """The names of its parameters."""
        return list(self.settings.model_fields)


LOSSES: Registry[LossSpec] = Registry(
    "loss", package="softcache.losses.divergences", group="softcache.losses", instance_of=LossSpec
)


def divergence(
    settings: type[Settings] = Settings,
    *,
    tails: tuple[str, ...] = TAILS,
    temperature_power: int = 2,
    linear: bool = False,
    has_entropy: bool = True,
    classwise: bool = False,
    needs_target: bool = False,
    weighs_truth: bool = False,
    fast_paths: tuple[str, ...] = (),
) -> Callable[[Callable[..., Tensor]], LossSpec]:
    """Returns the decorator that makes a loss of a formula over buckets; arguments as the attributes of `LossSpec`."""
    spec = LossSpec(  # before the formula is known, so that @divergence without parentheses is refused
        None,
        settings,
        tails=tails,
        temperature_power=temperature_power,
        linear=linear,
        has_entropy=has_entropy,
        classwise=classwise,
        needs_target=needs_target,
        weighs_truth=weighs_truth,
        fast_paths=fast_paths,
    )
    return lambda formula: replace(spec, formula=formula)


@dataclass(frozen=True)
class Loss:
    """A loss with its parameters, as `distillation_loss` and `fused_distillation_loss` take it; see `make_loss`."""

    name: str = "forward_kl"
    tail: str = "bucket"
    standardize: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)
    max_tail_error: float | None = None

    @property
    def kind(self) -> LossSpec:
        return LOSSES.get(self.name)

    def check_labels(self, labels: SoftLabels) -> None:
        """Raises LabelError where the record's classes were drawn at random and this loss cannot be estimated so."""
        if labels.sampling is None:
            return
        policy = "sample" if labels.sampling.replacement else "hybrid"
        if not self.kind.linear:
            raise LabelError(
                f'loss {self.name}: not defined on labels of policy "{policy}", a random part of the classes, of '
                "which only sums that are linear in the student's log-probabilities can be estimated without bias; "
                'use forward_kl or cross_entropy, or labels of policy "top_k", "top_p" or "dense"'
            )
        if self.tail != "bucket":
            raise LabelError(
                f'loss.tail {self.tail!r}: labels of policy "{policy}" drop no class for good, the drawn ones stand '
                "for the others; leave out loss.tail"
            )


def make_loss(
    name: str,
    *,
    tail: str = "bucket",
    standardize: bool = False,
    max_tail_error: float | None = None,
    **parameters: Any,
) -> Loss:
    """A loss of the registry.

    Args:
        name: one of `LOSSES`, or `package.module:Name` of a custom one.
        tail: what becomes of the dropped classes, see `softcache.losses.tail_modes`.
        standardize: divide the logits of teacher and student by their standard deviation first, position by
            position, see `softcache.losses.standardize`.
        max_tail_error: refuse labels whose tail, at the temperature that is asked for, may be off by more in mass
            (`SoftLabels.tail_error`); None refuses none.
        parameters: of that loss; those left out take its defaults.

    Raises:
        LabelError: an unknown name, a parameter that the loss does not read or that is out of range, or a tail mode
            that means nothing for it.
    """
    try:
        spec = LOSSES.get(name)
    except SpecError as error:
        raise LabelError(f"loss.name: {error}") from error
    try:
        complete = spec.settings(**parameters).model_dump()
    except ValidationError as error:
        raise LabelError("; ".join(_explain(name, problem) for problem in error.errors())) from error
    check_tail(name, spec, tail)
    return Loss(name, tail, standardize, complete, max_tail_error)


def check_tail(name: str, spec: LossSpec, tail: str) -> None:
    """Raises LabelError unless the tail mode has a meaning for the loss."""
    if tail not in spec.tails:
        expected = ", ".join(repr(x) for x in spec.tails)
        raise LabelError(
            f"loss.tail: expected {expected} for {name}; found {tail!r}; set tail = {spec.tails[0]!r}"
        )


def _explain(name: str, problem: Any) -> str:
    """One line for one of pydantic's errors about a loss's parameter."""
    parameter = ".".join(map(str, problem["loc"]))
    if problem["type"] != "extra_forbidden":
        return f"loss.{parameter}: {problem['msg'].lower()}; found {problem['input']!r}"
    readers = [other for other, spec in LOSSES.items() if parameter in spec.parameters]
    known = ", ".join(LOSSES.get(name).parameters) or "none"
    hint = f"it belongs to {' and '.join(readers)}" if readers else f"known: {known}"
    return f"loss.{parameter}: not read by {name}; {hint}; leave it out"


def as_loss(loss: Loss | str) -> Loss:
    """The loss itself, or that of a name with its defaults."""
    return make_loss(loss) if isinstance(loss, str) else loss
