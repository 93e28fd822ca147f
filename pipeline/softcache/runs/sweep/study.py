"""The study that all processes of a sweep share: its trials, which process runs them, and which trial is next.

    OUT/config.json        what is swept; a folder with another sweep is refused
    OUT/study.db           Optuna's SQLite storage
    OUT/study.lock         held while a process looks at the trials and takes the next one
    OUT/workers/ID.lock    held by a process as long as it lives

Claiming a trial is one step under the study's lock: mark the trials of crashed processes as failed and queue their
settings again, count, ask the sampler, record the process of the trial. So there are never more trials than requested, and
a crashed trial is detected at once, without a heartbeat. The sampler's random numbers are a function of (seed, number of
settings that were tried before): a process that is stopped, killed or not, and restarted draws the same.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from softcache.config.sweep import SEARCH_PARAMETERS, Range, SweepSettings
from softcache.errors import MissingExtraError, RunError, StorageError
from softcache.runs.sweep.space import Space
from softcache.runtime.files import read_json, replace_file, to_json
from softcache.runtime.signals import pending_signal, raise_if_signalled
from softcache.student.checkpoint import diff_settings

if TYPE_CHECKING:
    import optuna

__all__ = ["ClaimedTrial", "SharedStudy", "load_optuna"]

RETRIES = 2  # of one trial's settings after their process died; then they are taken for the reason
LOCK_POLL_SECONDS = 0.02
BUSY_SECONDS = 60.0  # that SQLite waits for another process


class ClaimedTrial(NamedTuple):
    """A trial to run.

    Attributes:
        trial: Optuna's.
        place: the run's directory under OUT; that of an earlier trial whose process died, where this one goes on.
        twin: a finished trial of the same settings, whose result holds for this one, too.
    """

    trial: optuna.Trial
    place: str
    twin: optuna.trial.FrozenTrial | None


def load_optuna() -> Any:
    """Returns the module, silent but for warnings.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("sweep: optuna is not installed; pip install 'softcache[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class SharedStudy:
    """One process's hold on the study in a folder.

    Args:
        path: the folder; made if it is not there.
        identity: what is swept, in JSON's types.
        space: what each parameter may be.
        settings: of the config.
        epochs: of a full trial.
        maximize: whether a larger metric is better.
        first: the settings of the first trial; None: the sampler's.

    Raises:
        RunError: the folder holds another sweep; what differs is named.
    """

    def __init__(
        self,
        path: Path,
        *,
        identity: dict[str, Any],
        space: Space,
        settings: SweepSettings,
        epochs: int,
        maximize: bool,
        first: dict[str, Any] | None,
    ) -> None:
        self.path, self._space, self._settings = path, space, settings
        self._optuna = optuna = load_optuna()
        self._worker: str | None = None
        median = optuna.pruners.MedianPruner(
            n_startup_trials=settings.startup_trials, n_warmup_steps=max(1, epochs // 5)
        )
        with _locked(path / "study.lock"), _readable(path):
            _check_identity(path / "config.json", identity)
            storage = optuna.storages.RDBStorage(
                f"sqlite:///{path / 'study.db'}", engine_kwargs={"connect_args": {"timeout": BUSY_SECONDS}}
            )
            self._study = optuna.create_study(
                storage=storage,
                study_name="sweep",
                direction="maximize" if maximize else "minimize",
                load_if_exists=True,
                pruner=median if settings.pruner == "median" else optuna.pruners.NopPruner(),
            )
            waiting = optuna.trial.TrialState.WAITING
            if first is not None and not any(
                _was_taken(one) or one.state == waiting for one in self.trials()
            ):
                self._study.enqueue_trial(first)

    @property
    def optuna_study(self) -> optuna.Study:
        return self._study

    @contextmanager
    def worker(self) -> Iterator[None]:
        """Around the trials of this process: as long as it lasts, they are known to be alive."""
        name = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        lock = self.path / "workers" / f"{name}.lock"
        with _locked(lock):
            self._worker = name
            try:
                yield
            finally:
                self._worker = None
                lock.unlink(missing_ok=True)

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """Returns all trials, by number."""
        return self._study.get_trials(deepcopy=False)

    def take(self, total: int) -> ClaimedTrial | None:
        """Returns this process's next trial; None if `total` are finished or being run."""
        assert self._worker is not None, "only within `worker`"
        states = self._optuna.trial.TrialState
        with _locked(self.path / "study.lock"):
            self._requeue_orphans()
            trials = self.trials()
            if (
                sum(trial.state in (states.COMPLETE, states.PRUNED, states.RUNNING) for trial in trials)
                >= total
            ):
                return None
            # Settings that are taken again are no further ones; those of a process that died before it had them never were.
            tried = sum(_was_taken(trial) and "retry_of" not in trial.user_attrs for trial in trials)
            self._study.sampler = self._sampler(tried)
            trial = self._study.ask()
            trial.set_user_attr("worker", self._worker)
            for name, axis in self._space.items():
                _suggest(trial, name, axis)
            place = trial.user_attrs.get("place", f"trials/{trial.number:04d}")
            trial.set_user_attr("place", place)
            finished = [past for past in trials if past.state in (states.COMPLETE, states.PRUNED)]
            twin = next((past for past in finished if past.params == trial.params), None)
            return ClaimedTrial(trial, place, twin)

    def others_run(self) -> bool:
        """Returns whether a trial is with another process that lives."""
        running = self._optuna.trial.TrialState.RUNNING
        return any(trial.state == running and self._lives(trial) for trial in self.trials())

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        seed = np.random.SeedSequence([self._settings.seed, number]).generate_state(1)[0]
        return self._optuna.samplers.TPESampler(
            seed=int(seed), n_startup_trials=self._settings.startup_trials
        )

    def _lives(self, trial: optuna.trial.FrozenTrial) -> bool:
        worker = trial.user_attrs.get("worker")
        return worker is not None and _is_locked(self.path / "workers" / f"{worker}.lock")

    def _requeue_orphans(self) -> None:
        """Marks the trials of crashed processes as failed, and queues their settings again; under the study's lock."""
        states = self._optuna.trial.TrialState
        for trial in self.trials():
            if trial.state != states.RUNNING or self._lives(trial):
                continue
            self._study.tell(trial.number, state=states.FAIL)
            (self.path / "workers" / f"{trial.user_attrs.get('worker')}.lock").unlink(missing_ok=True)
            retries = trial.user_attrs.get("retries", 0)
            if _was_taken(trial) and retries < RETRIES:
                attributes = {
                    "place": trial.user_attrs["place"],
                    "retry_of": trial.number,
                    "retries": retries + 1,
                    "reported": {str(step): value for step, value in trial.intermediate_values.items()},
                }
                # Of settings that were taken again by a process that died before it had them all, those that it was given.
                params = trial.system_attrs.get("fixed_params", trial.params)
                self._study.enqueue_trial(params, user_attrs=attributes)


def _was_taken(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a process had all settings of a trial; the place is what it records last."""
    return "place" in trial.user_attrs and "worker" in trial.user_attrs


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Names the unreadable file of a sweep in the error."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, load_optuna().exceptions.OptunaError, json.JSONDecodeError) as error:
        name = "config.json" if isinstance(error, json.JSONDecodeError) else "study.db"
        raise RunError(
            f"sweep {path}: {name} cannot be read: {str(error).splitlines()[0]}; restore it from a copy, or choose "
            "another --out: the runs under trials/ are whole without it"
        ) from error


def _suggest(trial: optuna.Trial, name: str, axis: Any) -> None:
    if not isinstance(axis, Range):
        trial.suggest_categorical(name, axis)
    elif SEARCH_PARAMETERS[name].kind is int:
        trial.suggest_int(name, int(axis.low), int(axis.high), log=axis.log)
    else:
        trial.suggest_float(name, axis.low, axis.high, log=axis.log)


def _check_identity(stored: Path, identity: dict[str, Any]) -> None:
    """Writes what the sweep is, or compares it with what is there."""
    identity = json.loads(json.dumps(identity))
    if not stored.exists():
        replace_file(stored, to_json(identity))
        return
    if differing := diff_settings(
        read_json(stored, "restore it from a copy, or choose another --out", error=RunError), identity
    ):
        raise RunError(
            f"sweep {stored.parent}: holds another sweep (there; this one): {'; '.join(differing)}; choose another "
            "--out, or remove the old sweep if it is not needed"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock of a file, which the kernel releases when the process ends, however it ends.

    Raises:
        StorageError: the folder cannot be written.
        Interrupted: a signal came while another process held it.
    """
    lock = FileLock(path, poll_interval=LOCK_POLL_SECONDS, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = lock.acquire(cancel_check=lambda: pending_signal() is not None)
    except Timeout:
        raise_if_signalled()
        raise
    except OSError as error:
        raise StorageError(
            f"sweep {path.parent}: cannot be written: {error}; choose another --out"
        ) from error
    with held:
        yield


def _is_locked(path: Path) -> bool:
    """Returns whether a live process holds the lock of a file."""
    if not path.exists():
        return False
    try:
        with FileLock(path, blocking=False, fallback_to_soft=False):
            return False
    except Timeout:
        return True
