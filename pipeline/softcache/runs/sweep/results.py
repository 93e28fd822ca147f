"""Results of a sweep: the ranked trials, the best one as a config, and repeats with other seeds.

The trials are compared by the held-out samples, each with one seed: the best of many is partly the luckiest. `repeat_best`
trains the best ones again with other seeds, together with the config's own settings.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, NamedTuple

from softcache.errors import MissingExtraError, RunError
from softcache.runs.sweep.run import Sweep
from softcache.runs.sweep.space import baseline_params, candidate
from softcache.runtime.files import replace_file, to_json

__all__ = ["Repeated", "Result", "best_trial", "ranked_trials", "repeat_best", "write_best", "write_json"]

STATES = ("complete", "pruned", "running", "fail", "waiting")


class Result(NamedTuple):
    """A trial, as tables and sweep.json show it.

    Attributes:
        value: the metric at its end; of a pruned trial, after its last epoch; None if it has none.
        place: its run's directory, under the sweep's.
        same_as: the trial whose settings these are once more, and whose result this is.
    """

    number: int
    state: str
    value: float | None
    params: dict[str, Any]
    epochs: int
    seconds: float
    num_parameters: int | None
    place: str | None
    same_as: int | None
    error: str | None


class Repeated(NamedTuple):
    """The metrics of one trial's settings under other seeds than the sweep's; `number` None: the config as it was."""

    number: int | None
    params: dict[str, Any]
    values: list[float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def std(self) -> float | None:
        return statistics.stdev(self.values) if len(self.values) > 1 else None


def ranked_trials(sweep: Sweep) -> list[Result]:
    """Returns all trials: the finished ones best first, then the pruned, then the rest."""
    defaults: dict[str, Any] = {
        "epochs": 0,
        "seconds": 0.0,
        "num_parameters": None,
        "place": None,
        "same_as": None,
        "error": None,
    }
    results = [
        Result(
            trial.number,
            trial.state.name.lower(),
            trial.value,
            trial.params,
            **{name: trial.user_attrs.get(name, default) for name, default in defaults.items()},
        )
        for trial in sweep.study.trials()
    ]
    sign = -1 if sweep.bench.maximize else 1

    def order(result: Result) -> tuple[int, float, int]:
        value = float("inf") if result.value is None else sign * result.value
        return STATES.index(result.state), value, result.number

    return sorted(results, key=order)


def best_trial(sweep: Sweep) -> Result:
    """Returns the best finished trial.

    Raises:
        RunError: none is finished.
    """
    first = next(iter(ranked_trials(sweep)), None)
    if first is None or first.state != "complete":
        raise RunError(
            f"sweep {sweep.bench.path}: no trial is finished; run `softcache sweep` with more --trials, or with "
            'sweep.pruner = "never"'
        )
    return first


def write_best(sweep: Sweep) -> Path:
    """Writes OUT/best.toml, the best trial as a config of its own; returns its path.

    Raises:
        RunError: no trial is finished.
    """
    try:
        import tomli_w
    except ImportError as error:
        raise MissingExtraError("sweep: tomli-w is not installed; pip install 'softcache[sweep]'") from error
    best, bench = best_trial(sweep), sweep.bench
    settings = candidate(bench.config, best.params, bench.cache)
    # The cache is named: a [fusion] table would ask for one of other caches.
    tables = settings.model_dump(exclude_unset=True, exclude_none=True, exclude={"fusion"})
    tables = {"name": tables.pop("name"), **tables, "cache": bench.cache_of(best.params).url}
    head = f"# Trial {best.number} of the sweep in {bench.path}: {bench.metric} {best.value:.6g}.\n"
    path = bench.path / "best.toml"
    replace_file(path, head + tomli_w.dumps(tables))
    return path


def write_json(sweep: Sweep, found: dict[str, Any]) -> Path:
    """Writes OUT/sweep.json: all trials, and what else was found; returns its path."""
    path = sweep.bench.path / "sweep.json"
    trials = [result._asdict() for result in ranked_trials(sweep)]
    content = {
        "metric": sweep.bench.metric,
        "larger_is_better": sweep.bench.maximize,
        "trials": trials,
        **found,
    }
    replace_file(path, to_json(content))
    return path


def repeat_best(sweep: Sweep, *, seeds: int, best: int = 3) -> list[Repeated]:
    """Trains the best trials' settings, and the config's own, with other seeds than the sweep's; best mean first.

    Args:
        seeds: how many: train.seed + 1 and on.
        best: how many trials.
    """
    bench = sweep.bench
    finished = [r for r in ranked_trials(sweep) if r.state == "complete" and r.same_as is None][:best]
    own = baseline_params(bench.config, sweep.space, bench.cache)
    chosen: list[tuple[int | None, dict[str, Any]]] = [(r.number, r.params) for r in finished]
    if all(params != own for _, params in chosen):
        chosen.append((None, {}))
    found: dict[int | None, Repeated] = {number: Repeated(number, params, []) for number, params in chosen}
    for seed in range(1, seeds + 1):  # seeds outside, so that a drift of the machine touches all alike
        for number, params in chosen:
            name = "config" if number is None else f"{number:04d}"
            out = bench.path / "repeats" / f"{name}-seed-{seed}"
            metrics = bench.train(params, out, seed=bench.config.train.seed + seed)
            found[number].values.append(metrics[bench.metric])
    return sorted(found.values(), key=lambda row: row.mean, reverse=bench.maximize)
