"""The losses by name, with what each reads and where its maths holds.

>>> make_loss("jsd", beta=0.3).name
'jsd'
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor

from softcache.errors import LabelError
from softcache.labels import SoftLabels
from softcache.losses import log_space as formulas

__all__ = [
    "KINDS",
    "PARAMETERS",
    "TAILS",
    "Loss",
    "LossName",
    "LossSpec",
    "Tail",
    "as_loss",
    "check_parameter",
    "make_loss",
]

Tail = Literal["bucket", "uniform", "ignore", "renormalize"]
TAILS: tuple[str, ...] = get_args(Tail)
LossName = Literal[
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_kl",
    "skew_reverse_kl",
    "adaptive_kl",
    "total_variation",
    "dkd",
    "nkd",
    "cross_entropy",
    "uld",
]


@dataclass(frozen=True)
class LossSpec:
    """What the maths of a loss is, and allows.

    Attributes:
        formula: of `softcache.losses.formulas`: (log_p_PB, log_s_PB, **parameters) to [P], or, where the loss is
            `linear`, log p and log s to the bucket's term. None: it compares ranks, not classes.
        defaults: its parameters.
        tails: what may become of the dropped classes.
        temperature_power: the loss counts times T to this power.
        linear: a sum of terms that are linear in log s. Such a loss can be estimated without bias from classes drawn
            at random, and its slopes are known: -p.
        needs_target: it reads the ground-truth class, which is a bucket of its own then, the last but one.
        weighs_truth: it holds, beside the formula, the cross-entropy at T=1 times the teacher's probability of the
            ground-truth class at T=1.
    """

    formula: Callable[..., Tensor] | None
    defaults: Mapping[str, float] = field(default_factory=dict)
    tails: tuple[str, ...] = TAILS
    temperature_power: int = 2
    linear: bool = False
    needs_target: bool = False
    weighs_truth: bool = False


_WITH_TEACHERS_MASS = (
    "bucket",
    "uniform",
    "ignore",
)  # a renormalised teacher has none beyond the kept classes
_WHOLE = ("bucket", "uniform")  # what they normalise by is no sum over the kept classes

KINDS: dict[str, LossSpec] = {
    "forward_kl": LossSpec(formulas.forward_kl_terms, linear=True),
    "reverse_kl": LossSpec(formulas.reverse_kl, tails=_WITH_TEACHERS_MASS),
    "jsd": LossSpec(formulas.jsd, {"beta": 0.5}),
    "skew_kl": LossSpec(formulas.skew_kl, {"skew": 0.1}),
    "skew_reverse_kl": LossSpec(formulas.skew_reverse_kl, {"skew": 0.1}),
    "adaptive_kl": LossSpec(formulas.adaptive_kl, {"mu": 0.5}, tails=_WITH_TEACHERS_MASS),
    "total_variation": LossSpec(formulas.total_variation, temperature_power=0),
    "dkd": LossSpec(formulas.dkd, {"dkd_alpha": 1.0, "dkd_beta": 8.0}, tails=_WHOLE, needs_target=True),
    "nkd": LossSpec(formulas.nkd, {"nkd_gamma": 1.5}, tails=_WHOLE, needs_target=True, weighs_truth=True),
    "cross_entropy": LossSpec(formulas.cross_entropy_terms, linear=True),
    "uld": LossSpec(None, tails=("bucket",), temperature_power=0),
}

PARAMETERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "beta": ("a number in (0, 1)", lambda x: 0 < x < 1),
    "skew": ("a number in (0, 1)", lambda x: 0 < x < 1),
    "mu": ("a mass in (0, 1]", lambda x: 0 < x <= 1),
    "dkd_alpha": ("a number of at least 0", lambda x: 0 <= x < float("inf")),
    "dkd_beta": ("a number of at least 0", lambda x: 0 <= x < float("inf")),
    "nkd_gamma": ("a number of at least 0", lambda x: 0 <= x < float("inf")),
}
"""Every parameter of every loss: what is expected of it."""


@dataclass(frozen=True)
class Loss:
    """A loss with its parameters, as `distillation_loss` and `fused_distillation_loss` take it; see `make_loss`."""

    name: str = "forward_kl"
    tail: str = "bucket"
    standardize: bool = False
    parameters: Mapping[str, float] = field(default_factory=dict)

    @property
    def kind(self) -> LossSpec:
        return KINDS[self.name]

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


def make_loss(name: str, *, tail: str = "bucket", standardize: bool = False, **parameters: float) -> Loss:
    """A loss of the registry.

    Args:
        name: one of `KINDS`.
        tail: what becomes of the dropped classes, see `softcache.losses.tail_modes`.
        standardize: divide the logits of teacher and student by their standard deviation first, position by
            position, see `softcache.losses.standardize`.
        parameters: of that loss; those left out take its defaults.

    Raises:
        LabelError: an unknown name, a parameter that the loss does not read or that is out of range, or a tail mode
            that means nothing for it.
    """
    if name not in KINDS:
        raise LabelError(f"loss.name: expected one of {', '.join(KINDS)}; found {name!r}")
    kind = KINDS[name]
    for parameter, value in parameters.items():
        check_parameter(name, parameter, value)
    if tail not in kind.tails:
        expected = ", ".join(repr(x) for x in kind.tails)
        raise LabelError(
            f"loss.tail: expected {expected} for {name}; found {tail!r}; set tail = {kind.tails[0]!r}"
        )
    return Loss(name, tail, standardize, {**kind.defaults, **parameters})


def check_parameter(name: str, parameter: str, value: Any) -> None:
    """Raises LabelError unless the loss reads the parameter and the value is in its range."""
    if parameter not in KINDS[name].defaults:
        readers = [other for other, kind in KINDS.items() if parameter in kind.defaults]
        whose = f"it belongs to {' and '.join(readers)}" if readers else f"known: {', '.join(PARAMETERS)}"
        raise LabelError(f"loss.{parameter}: not read by {name}; {whose}; leave it out")
    wanted, is_good = PARAMETERS[parameter]
    if not is_good(value):
        raise LabelError(f"loss.{parameter}: expected {wanted}; found {value}")


def as_loss(loss: Loss | str) -> Loss:
    """The loss itself, or that of a name with its defaults."""
    return make_loss(loss) if isinstance(loss, str) else loss
