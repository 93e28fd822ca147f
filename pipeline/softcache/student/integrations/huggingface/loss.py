"""`[loss]` inside the Trainer: what of it can be had there, and its temperature and alpha at a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from transformers import TrainerState, TrainingArguments

from softcache.errors import ConfigError
from softcache.losses import LOSSES, LossMix, scheduled
from softcache.student.tasks import LossSettings

if TYPE_CHECKING:
    from softcache.reader.cache import Cache

__all__ = ["check_loss", "check_stall", "loss_of", "mix_at"]


def loss_of(loss: LossSettings | None, temperature: float | None, alpha: float | None) -> LossSettings:
    """Returns the loss that a trainer's arguments say: a whole one, or the plain one of a temperature and an alpha.

    Raises:
        ConfigError: both are given, or one is out of range.
    """
    given = [name for name, value in (("temperature", temperature), ("alpha", alpha)) if value is not None]
    if loss is not None:
        if not isinstance(loss, LossSettings):
            raise ConfigError(
                f"DistillTrainer: loss: expected LossSettings; found {loss!r}; pass LossSettings(name=…, temperature=…)"
            )
        if given:
            raise ConfigError(
                f"DistillTrainer: {' and '.join(given)} beside loss, which has its own; expected one of the two; leave out "
                f"{' and '.join(given)}, or put them into loss"
            )
        return loss
    try:
        return LossSettings(
            temperature=1.0 if temperature is None else temperature, alpha=0.9 if alpha is None else alpha
        )
    except ValidationError as error:
        problems = "; ".join(
            f"{problem['loc'][0]}: {problem['msg'].lower()}; found {problem['input']!r}"
            for problem in error.errors()
        )
        raise ConfigError(f"DistillTrainer: {problems}") from error


def check_loss(loss: LossSettings, cache: Cache) -> None:
    """Raises for what the Trainer cannot do of a loss, and for what these labels cannot serve.

    Raises:
        ConfigError: the loss is uld or of rollouts, learns its temperature, is not estimated from drawn classes, or
            leaves the temperatures that imported labels are known at.
    """
    if loss.compares_ranks:
        raise ConfigError(
            f"DistillTrainer: loss.name {loss.name} is for a student of another tokenizer, whose samples are not read here; "
            "use a loss that compares class by class, or `softcache train-student` with student.tokenizer"
        )
    if loss.reads_rollouts:
        raise ConfigError(
            f"DistillTrainer: loss.name {loss.name} is of tokens that a policy sampled, whose teacher and log-probabilities "
            "are not read here; use `softcache train-student` with a source of rollouts"
        )
    if loss.curriculum is not None:
        raise ConfigError(
            "DistillTrainer: loss.curriculum learns a temperature, which no checkpoint of the Trainer holds; use "
            "loss.temperature_schedule, or `softcache train-student`"
        )
    codec = cache.manifest.build_codec()
    if codec.sampling is not None and loss.highest_alpha > 0 and not LOSSES.get(loss.name).linear:
        able = ", ".join(sorted(name for name, kind in LOSSES.items() if kind.linear))
        raise ConfigError(
            f"DistillTrainer: loss.name {loss.name} cannot be estimated from classes drawn at random, which cache "
            f"{cache.url} holds; use one of {able}, or a cache whose labels.policy draws none"
        )
    if codec.max_temperature is not None and loss.highest_temperature > codec.max_temperature:
        raise ConfigError(
            f"DistillTrainer: loss reaches T = {loss.highest_temperature:g}; expected at most {codec.max_temperature:g} for "
            f"cache {cache.url}, whose labels were imported and are known no further; keep T there"
        )


def check_stall(loss: LossSettings, args: TrainingArguments, eval_dataset: Any) -> None:
    """Raises where a schedule waits for held-out losses that the Trainer will not have.

    Raises:
        ConfigError: "stall", but no loss of one held-out source after every epoch.
    """
    for name in ("temperature_schedule", "alpha_schedule"):
        schedule = getattr(loss, name)
        if schedule is None or schedule.kind != "stall":
            continue
        strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
        if strategy != "epoch" or eval_dataset is None or isinstance(eval_dataset, dict):
            found = f"eval_strategy {strategy!r} and {_described(eval_dataset)}"
            raise ConfigError(
                f'DistillTrainer: loss.{name} of kind "stall" waits for held-out losses, one after every epoch; expected '
                f'eval_strategy "epoch" and one eval_dataset; found {found}; set these, or use "linear" or "cosine"'
            )


def _described(eval_dataset: Any) -> str:
    if eval_dataset is None:
        return "no eval_dataset"
    return f"{len(eval_dataset)} of them" if isinstance(eval_dataset, dict) else "one eval_dataset"


def mix_at(loss: LossSettings, state: TrainerState) -> LossMix:
    """Returns temperature and alpha of the step that is being made: functions of what the Trainer's own checkpoints hold."""
    how: dict[str, Any] = {
        "step": state.global_step,
        "num_steps": state.max_steps,
        "losses": _epoch_losses(state),
    }
    return LossMix(
        scheduled(loss.temperature_schedule, loss.temperature, **how),
        scheduled(loss.alpha_schedule, loss.alpha, **how),
    )


def _epoch_losses(state: TrainerState) -> list[float]:
    """The held-out loss at the end of each epoch; of an epoch that was evaluated twice, the later one."""
    found = {
        row["epoch"]: float(row["eval_loss"])
        for row in state.log_history
        if "eval_loss" in row and row["epoch"] > 0 and float(row["epoch"]).is_integer()
    }
    return [found[epoch] for epoch in sorted(found)]
