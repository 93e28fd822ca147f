"""A sweep from its config to its finished trials, by this process and the further ones of `--workers`.

    check the space; join the study in the folder; start the other processes
    until nothing is left to take: take a trial, run it
    wait for what other processes run, and take over the trials of crashed ones

Any other process that is started on the same folder, by hand or on a machine that shares it, works on the same trials.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from softcache.config.run import RunConfig
from softcache.config.sweep import to_json
from softcache.errors import IncompleteCacheError, RunError, SoftcacheError
from softcache.losses.settings import IDENTITY_PARAMETERS
from softcache.modalities import modality_of, open_data
from softcache.reader.alignment import check_alignment
from softcache.runs import with_cached_labels
from softcache.runs.sweep.space import Space, baseline_params, checked_space, format_params
from softcache.runs.sweep.study import SharedStudy
from softcache.runs.sweep.trial import TrialContext, run_trial
from softcache.runtime.distributed import num_ranks
from softcache.runtime.logging import log_info
from softcache.runtime.signals import Interrupted, handle_signals, raise_if_signalled
from softcache.student.settings import NON_IDENTITY_SETTINGS as NON_IDENTITY_SETTINGS_OF_TRAIN
from softcache.student.settings import drop_later_defaults

__all__ = ["Sweep", "open_sweep", "run_sweep"]

WAIT_SECONDS = 0.5
INTERRUPTED_EXIT_CODES = {128 + signal.SIGINT, 128 + signal.SIGTERM}
NON_IDENTITY_SETTINGS: Any = {  # what may differ when a sweep goes on
    "sweep": {"trials"},
    "train": NON_IDENTITY_SETTINGS_OF_TRAIN,
    "capture": True,
    "cache": True,
}


@dataclass
class Sweep:
    """A sweep in a folder: what its trials share, and the study."""

    bench: TrialContext
    study: SharedStudy
    space: Space


def open_sweep(config: RunConfig, url: str, path: Path) -> Sweep:
    """Returns the sweep of a folder; a new one where there is none.

    Raises:
        ConfigError: the space has a value that cannot be tried.
        IdentityError, IncompleteCacheError: the cache is of something else, or not finished.
        RunError: the folder holds another sweep, or this is one process of many that train one student.
    """
    if num_ranks() > 1:
        raise RunError(
            f"sweep {path}: started as {num_ranks()} processes of one run; a trial is trained by one process: start "
            "`softcache sweep --workers N` without a launcher"
        )
    cache = config.reader.open_cache(url)
    data = open_data(with_cached_labels(config, cache))
    check_alignment(cache, data.train)
    if not cache.is_complete:
        raise IncompleteCacheError(
            f"cache {url}: {cache.describe_missing()}; rerun "
            "`softcache teacher-logits` to finish it: trials are compared, so all of them learn from the whole cache"
        )
    score = modality_of(config).score
    bench = TrialContext(config, data, cache, path, score.metric, score.larger_is_better)
    space = checked_space(config, data, cache)
    study = SharedStudy(
        path,
        identity=_identity(bench, space),
        space=space,
        settings=config.sweep,
        epochs=config.train.epochs,
        maximize=bench.maximize,
        first=baseline_params(config, space, cache),
    )
    return Sweep(bench, study, space)


def _identity(bench: TrialContext, space: Space) -> dict[str, Any]:
    described = bench.config.model_dump(mode="json", exclude=NON_IDENTITY_SETTINGS)
    train = bench.config.train.with_default_exemption(modality_of(bench.config).weight_decay_exempt)
    described["train"]["weight_decay_exempt"] = train.weight_decay_exempt
    if described["student"]["lora"] is None:
        del described["student"]["lora"]
    described["train"] = drop_later_defaults(described["train"])
    described["loss"] = dict.fromkeys(IDENTITY_PARAMETERS) | described["loss"]
    described["sweep"]["space"] = {name: to_json(axis) for name, axis in space.items()}
    return described | {"cache": bench.cache.manifest_sha256, **bench.data.identity()}


def run_sweep(config: RunConfig, url: str, path: Path, *, trials: int, workers: int = 1) -> Sweep:
    """Runs trials until there are `trials` in total, those of earlier runs included.

    Args:
        url: of the cache.
        path: the sweep's folder.
        workers: processes of this machine, this one included.

    Raises:
        ConfigError, RunError: as `open_sweep`.
        SoftcacheError: a trial could not be run.
    """
    sweep = open_sweep(config, url, path)
    with _others(config, url, path, trials, workers) as others, sweep.study.worker():
        while True:
            # Asked before: a process that dies after the last look has left its trial to the next round.
            others_work = sweep.study.others_run() or any(other.is_alive() for other in others)
            ran = _work(sweep, trials)
            _raise_failures(others, path)
            if not (others_work or ran):
                return sweep
            raise_if_signalled()
            if not ran:
                time.sleep(WAIT_SECONDS)


def _work(sweep: Sweep, trials: int, wanted: Callable[[], bool] = lambda: True) -> int:
    """Takes trials and runs them until `trials` are finished or being run; returns how many it ran."""
    ran = 0
    while wanted() and (turn := sweep.study.take(trials)) is not None:
        number = turn.trial.number
        again = turn.trial.user_attrs.get("retry_of")
        goes_on = "" if again is None else f" (resumes trial {again}, whose process died)"
        log_info(f"trial {number}: {format_params(turn.trial.params)}{goes_on}")
        run_trial(sweep.bench, sweep.study, turn)
        done = sweep.study.trials()[number]
        score = "" if done.value is None else f", {sweep.bench.metric} {done.value:.4f}"
        log_info(f"trial {number}: {done.state.name.lower()}{score}")
        ran += 1
    return ran


# -- more processes ----------------------------------------------------------------------------------------


@contextmanager
def _others(
    config: RunConfig, url: str, path: Path, trials: int, workers: int
) -> Iterator[list[BaseProcess]]:
    """Starts workers - 1 processes; ends those that still run when the block is left."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // workers)
    others: list[BaseProcess] = []
    for number in range(1, workers):
        log = path / "workers" / f"{number}.txt"
        other: BaseProcess = context.Process(
            target=_worker, args=(config, url, path, trials, threads, log), daemon=False
        )
        other.start()
        others.append(other)
    before = torch.get_num_threads()
    if workers > 1:
        torch.set_num_threads(threads)
    try:
        yield others
    finally:
        torch.set_num_threads(before)
        for other in others:
            if other.is_alive():
                other.terminate()  # SIGTERM: it saves a checkpoint after its step
        for other in others:
            other.join()


def _worker(config: RunConfig, url: str, path: Path, trials: int, threads: int, log: Path) -> None:
    """A process of `--workers`; its stderr goes to a file, so that progress of several does not mix."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr = log.open("a", encoding="utf-8", buffering=1)
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None
    try:
        with handle_signals():
            sweep = open_sweep(config, url, path)
            with sweep.study.worker():
                _work(sweep, trials, wanted=parent.is_alive)
    except Interrupted as stopped:
        sys.exit(stopped.exit_code)
    except SoftcacheError as error:
        sys.stderr.write(f"softcache: {error}\n")
        sys.exit(1)


def _raise_failures(others: list[BaseProcess], path: Path) -> None:
    """Raises if a worker ended with an error; what one that was killed or stopped leaves is taken by the next."""
    for number, other in enumerate(others, start=1):
        if other.exitcode is None or other.exitcode <= 0 or other.exitcode in INTERRUPTED_EXIT_CODES:
            continue
        log = path / "workers" / f"{number}.txt"
        lines = log.read_text("utf-8").strip().splitlines() if log.exists() else []
        raise RunError(
            f"sweep {path}: worker {number} ended with exit code {other.exitcode}: {lines[-1] if lines else 'no output'}; "
            f"its output is in {log}; finished trials are kept, and the same command goes on"
        )
