"""The cost of a sweep from the cache, and of the same sweep with an online teacher.

    measured     seconds of every trial, as it ran
                 seconds of an epoch of one trial's settings from the cache, and with an online teacher (labels = "online"):
                 the two in turns, the fastest epoch of each, which is the one that was disturbed least
    multiplied   difference of the two epochs x epochs of all trials = what an online teacher would have added
                 difference of the two epochs x views of the cache   = what the one teacher pass took

The teacher's time depends on the batch, not on the student, so one trial's difference serves for all.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from softcache.runs import open_teacher, teacher_is_missing, train_student
from softcache.runs.sweep.results import best_trial, ranked_trials
from softcache.runs.sweep.run import Sweep
from softcache.runs.sweep.space import candidate

__all__ = ["Cost", "measure_cost", "unmeasured_reason"]

EPOCHS = 3  # of each measured run, at most; the first, which opens and compiles, does not count
ROUNDS = 3  # at most; and no more epochs from either than a trial has


class Cost(NamedTuple):
    """All in seconds of one process; see the module for what is measured.

    Attributes:
        trials: how many were trained.
        epochs: of all trials together.
        cached_seconds: of all trials, from the cache; measured.
        cached_epoch_seconds, online_epoch_seconds: of one epoch of the best trial's settings; measured.
        teacher_pass_seconds: of filling the cache; multiplied.
        online_seconds: of all trials with an online teacher; multiplied.
    """

    trials: int
    epochs: int
    cached_seconds: float
    cached_epoch_seconds: float
    online_epoch_seconds: float
    teacher_pass_seconds: float
    online_seconds: float

    @property
    def ratio(self) -> float:
        """Online over cached, the cache being there."""
        return self.online_seconds / self.cached_seconds

    @property
    def ratio_with_pass(self) -> float:
        """Online over cached, the cache being made for this sweep alone."""
        return self.online_seconds / (self.cached_seconds + self.teacher_pass_seconds)


def unmeasured_reason(sweep: Sweep) -> str | None:
    """Returns the reason why no online teacher can be measured; None if one can."""
    config, cache = sweep.bench.config, sweep.bench.cache
    if cache.manifest.identity["labels"]["policy"] == "imported":
        return "the labels were imported"
    if config.teacher is None:
        return "the config has no [teacher]"
    if teacher_is_missing(config):
        return f"there are no weights at {config.teacher.weights}"
    if config.student.tokenizer is not None:
        return "the student has another tokenizer"
    return None


def measure_cost(sweep: Sweep) -> Cost:
    """Trains the best trial's settings for a few epochs from the cache and with an online teacher.

    Raises:
        RunError: no trial is finished.
        SoftcacheError: the teacher cannot be loaded.
    """
    bench = sweep.bench
    trained = [r for r in ranked_trials(sweep) if r.state in ("complete", "pruned") and r.same_as is None]
    params = best_trial(sweep).params
    teacher = open_teacher(bench.config, bench.data)
    kinds: dict[str, dict[str, Any]] = {
        "cache": {"cache": bench.cache_of(params)},
        "online": {"teacher": teacher},
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory(dir=bench.path, prefix=".cost-") as folder:
        for number in range(max(1, min(ROUNDS, bench.config.train.epochs // EPOCHS))):
            for name, how in kinds.items():
                seconds[name] += _epoch_seconds(
                    sweep, params, Path(folder) / f"{name}-{number}", labels=name, **how
                )
    cached, online = min(seconds["cache"]), min(seconds["online"])
    spent, epochs = sum(r.seconds for r in trained), sum(r.epochs for r in trained)
    return Cost(
        trials=len(trained),
        epochs=epochs,
        cached_seconds=spent,
        cached_epoch_seconds=cached,
        online_epoch_seconds=online,
        teacher_pass_seconds=(online - cached) * bench.cache.num_views,
        online_seconds=spent + (online - cached) * epochs,
    )


def _epoch_seconds(sweep: Sweep, params: dict[str, Any], out: Path, **how: Any) -> list[float]:
    bench = sweep.bench
    settings = candidate(bench.config, params, bench.cache)
    epochs = min(EPOCHS, settings.train.epochs)
    train = settings.train.model_copy(update={"epochs": epochs, "target_metric": None})
    ends: list[float] = []
    metrics = train_student(
        settings.model_copy(update={"train": train}),
        bench.data,
        model=settings.student.model,
        out=out,
        on_epoch=lambda row: ends.append(time.monotonic()),
        **how,
    )
    if len(ends) < 2:
        return [float(metrics["seconds"])]
    return [end - start for start, end in itertools.pairwise(ends)]
