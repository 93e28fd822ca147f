"""One trial: an ordinary student run in a directory of its own, evaluated after every epoch, and pruned early if it is bad.

The run's directory is OUT/trials/NUMBER; its cache is the sweep's, or one that was shrunk from it to fewer classes, made
once under OUT/caches and shared by all trials. A trial that is pruned leaves its checkpoint, as one that was interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softcache.config.run import RunConfig
from softcache.errors import DivergedError, RunError, SoftcacheError
from softcache.modalities import Data
from softcache.reader.cache import Cache
from softcache.runs import train_student
from softcache.runs.sweep.space import candidate, num_kept_classes
from softcache.runs.sweep.study import ClaimedTrial, SharedStudy, load_optuna
from softcache.runtime.files import read_json
from softcache.runtime.logging import log_info
from softcache.tools.shrink import ShrinkSettings, shrink_cache

__all__ = ["TrialContext", "run_trial"]


@dataclass
class TrialContext:
    """The settings, data and cache that all trials of a process share.

    Attributes:
        config: what the sweep starts from.
        data: of the config.
        cache: as it was given.
        path: the sweep's folder.
        metric: of the table.
        maximize: whether a larger one is better.
    """

    config: RunConfig
    data: Data
    cache: Cache
    path: Path
    metric: str
    maximize: bool
    _smaller: dict[int, Cache] = field(default_factory=dict)

    def cache_of(self, params: dict[str, Any]) -> Cache:
        """Returns the cache with the trial's number of classes; shrunk from the given one if it does not exist yet."""
        k = params.get("k", num_kept_classes(self.cache))
        if k == num_kept_classes(self.cache):
            return self.cache
        if k not in self._smaller:
            url = str(self.path / "caches" / f"k-{k}")
            shrink_cache(self.cache, url, ShrinkSettings(k=k))
            self._smaller[k] = self.config.reader.open_cache(url)
        return self._smaller[k]

    def train(
        self,
        params: dict[str, Any],
        out: Path,
        *,
        seed: int | None = None,
        on_epoch: Callable[[dict[str, Any]], None] = lambda row: None,
    ) -> dict[str, Any]:
        """Trains a student with a trial's settings; returns its metrics."""
        settings = candidate(self.config, params, self.cache)
        if seed is not None:
            settings = settings.model_copy(update={"train": settings.train.model_copy(update={"seed": seed})})
        return train_student(
            settings,
            self.data,
            model=settings.student.model,
            labels="cache",
            cache=self.cache_of(params),
            out=out,
            on_epoch=on_epoch,
        )


def run_trial(bench: TrialContext, study: SharedStudy, turn: ClaimedTrial) -> None:
    """Runs a trial to its end, its pruning or an error, and reports to the study.

    Raises:
        SoftcacheError: the run could not be made; the trial is marked as failed.
    """
    optuna = load_optuna()
    states = optuna.trial.TrialState
    trial, tell = turn.trial, study.optuna_study.tell
    if turn.twin is not None:
        _report_twin(study, turn)
        return
    seen = {int(step): value for step, value in trial.user_attrs.get("reported", {}).items()}
    for step, value in seen.items():
        trial.report(value, step)

    def on_epoch(row: dict[str, Any]) -> None:
        epoch, value = row["epoch"], row[bench.metric]
        if epoch not in seen:
            seen[epoch] = value
            trial.report(value, epoch)
        if not math.isfinite(value) or (epoch + 1 < bench.config.train.epochs and trial.should_prune()):
            raise optuna.TrialPruned

    out = bench.path / turn.place
    try:
        metrics = bench.train(trial.params, out, on_epoch=on_epoch)
    except (optuna.TrialPruned, DivergedError) as ended:
        if isinstance(ended, DivergedError):
            log_info(f"trial {trial.number}: {ended}")
        _note(trial, {"epochs": max(seen, default=-1) + 1, "seconds": _seconds(out)})
        tell(trial, state=states.PRUNED)
        return
    except Exception as error:
        message = str(error) if isinstance(error, SoftcacheError) else f"{type(error).__name__}: {error}"
        trial.set_user_attr("error", message)
        tell(trial, state=states.FAIL)
        raise
    for row in metrics["history"]:  # those of a run that was finished before its trial was
        if row["epoch"] not in seen:
            trial.report(row[bench.metric], row["epoch"])
    _note(trial, {name: metrics[name] for name in ("epochs", "seconds", "num_parameters")})
    tell(trial, metrics[bench.metric])


def _note(trial: Any, found: dict[str, Any]) -> None:
    for name, value in found.items():
        trial.set_user_attr(name, value)


def _report_twin(study: SharedStudy, turn: ClaimedTrial) -> None:
    """Gives a trial the result of an earlier one with the same settings, seed included."""
    twin, trial = turn.twin, turn.trial
    assert twin is not None
    log_info(f"trial {trial.number}: the settings of trial {twin.number} once more; its result holds")
    for step, value in twin.intermediate_values.items():
        trial.report(value, step)
    same = {name: twin.user_attrs[name] for name in ("epochs", "num_parameters") if name in twin.user_attrs}
    origin = {"place": twin.user_attrs["place"], "same_as": twin.user_attrs.get("same_as", twin.number)}
    _note(trial, same | origin | {"seconds": 0.0})
    if twin.value is not None and twin.state.name == "COMPLETE":
        study.optuna_study.tell(trial, twin.value)
    else:
        study.optuna_study.tell(trial, state=twin.state)


def _seconds(out: Path) -> float:
    """Returns what a run has taken up to its last checkpoint, over all processes that worked on it."""
    file = out / "checkpoint" / "progress.json"
    if not file.exists():  # it diverged before its first
        return 0.0
    return round(float(read_json(file, "remove the trial's folder", error=RunError)["seconds"]), 3)
