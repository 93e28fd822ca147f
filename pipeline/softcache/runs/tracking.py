"""Trackers: the figures and the config of every run in TensorBoard, Weights & Biases, MLflow and what else accelerate knows.

A tracker listens to the events that a run logs (`softcache.runtime.logging.event`); the loops know nothing of it. The
steps of its axis are the run's optimizer steps, or the units that a capture published.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from softcache.cache.storage.base import is_bucket
from softcache.errors import MissingExtraError, RunError, SpecError
from softcache.runtime.logging import listen, log_info

__all__ = ["TRACKERS", "tracking"]

TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
"""By their names in accelerate, which are those of their packages."""
_ARGUMENTS: dict[str, Callable[[str, str, str], tuple[str, dict[str, Any]]]] = {
    "aim": lambda project, run, folder: (run, {"experiment": project}),
    "clearml": lambda project, run, folder: (project, {"project_name": project, "task_name": run}),
    "dvclive": lambda project, run, folder: (project, {"exp_name": run, "dir": f"{folder}/dvclive"}),
    "mlflow": lambda project, run, folder: (project, {"run_name": run}),
    "swanlab": lambda project, run, folder: (project, {"experiment_name": run}),
    "trackio": lambda project, run, folder: (project, {"name": run}),
    "wandb": lambda project, run, folder: (project, {"name": run, "dir": folder}),
}
"""What accelerate's class of a tracker takes, of a project, a run's name and its folder; others: the project alone."""
_DESCRIPTION = ("epoch", "step", "run", "labels", "out")


@contextmanager
def tracking(names: str) -> Iterator[None]:
    """Sends the figures of all runs in the block to trackers.

    Args:
        names: of trackers, with commas between them, each with a project of its own after a colon where it is not
            `softcache`: `tensorboard`, `wandb:my-project`, `mlflow,trackio`.

    Raises:
        SpecError: there is no such tracker.
        MissingExtraError: its package is not installed.
    """
    with ExitStack() as stack:
        for given in names.split(","):
            name, _, project = given.strip().partition(":")
            if name not in TRACKERS:
                raise SpecError(f"tracker {name!r}: unknown; choose of {', '.join(TRACKERS)}")
            if not _is_installed(name):
                extra = "'softcache[track]'" if name == "tensorboard" else name.replace("_", "-")
                raise MissingExtraError(f"--track {name}: {name} is not installed; pip install {extra}")
            follower = _Follower(name, project or "softcache")
            stack.enter_context(listen(follower))
            stack.callback(follower.close)
        yield


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # its import is blocked
        return False


class _Logger(logging.Logger):
    def warning_once(self, text: str) -> None:
        log_info(f"--track: {text}")


class _Follower:
    """Follows one run after the other."""

    def __init__(self, name: str, project: str) -> None:
        self._name, self._project = name, project
        self._tracker: Any = None
        self._started: dict[str, Any] = {}
        self._units = self._rows = 0

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        """Follows an event.

        Raises:
            RunError: the tracker failed, as without its network or its account.
        """
        try:
            self._follow(event, fields)
        except Exception as error:  # of whatever library the tracker is
            raise RunError(
                f"--track {self._name}: {type(error).__name__}: {error}; mend it, or leave out --track, and run again: "
                "checkpoints and finished units are kept"
            ) from error

    def _follow(self, event: str, fields: dict[str, Any]) -> None:
        if event in ("run_started", "run_finished"):
            self.close()
            self._started = fields  # opened with the first figures: a finished run has none
        elif event in ("step", "evaluation", "epoch"):
            prefix = {"epoch": "", "step": "train/"}.get(event, f"{event}/")
            self._log({f"{prefix}{key}": value for key, value in fields.items()}, fields["step"])
        elif event == "unit_done":
            self._units, self._rows = self._units + 1, self._rows + fields["rows"]
            shown = ("rows_per_second", "bytes_per_second", "teacher_share", "queue_depth")
            row = {f"capture/{key}": fields[key] for key in shown} | {"capture/rows": self._rows}
            self._log(row, self._units)

    def _open(self, fields: dict[str, Any]) -> None:
        from accelerate import tracking as accelerate_tracking

        # Its logger needs the state of a student's processes, which a capture has none of.
        accelerate_tracking.logger = _Logger(accelerate_tracking.__name__)
        place = str(fields.get("out") or fields["cache"])
        path = Path(place.rpartition("://")[2])
        folder, run = path, path.name
        if "cache" in fields:  # nothing but a cache lies in its folder
            run = f"{path.parent.name}-{path.name}"
            folder = path.parent / "track" / path.name
        if is_bucket(place):
            folder = Path("runs/track") / path
        if self._name in ("aim", "dvclive", "tensorboard", "wandb"):
            folder.mkdir(parents=True, exist_ok=True)
        base = accelerate_tracking.LOGGER_TYPE_TO_CLASS[self._name]
        kind = type(base.__name__, (base,), {"main_process_only": False})  # events are of rank 0 alone
        first, others = _ARGUMENTS.get(self._name, lambda project, run, folder: (project, {}))(
            self._project, run, str(folder)
        )
        place_of_logs = (str(folder),) if base.requires_logging_directory else ()
        tracker = kind(first, *place_of_logs, **others)
        getattr(tracker, "start", lambda: None)()
        if self._name == "comet_ml":
            tracker.tracker.set_name(run)
        tracker.store_init_configuration(dict(_flat(fields["config"])))
        self._tracker = tracker

    def _log(self, row: dict[str, Any], step: int) -> None:
        if self._tracker is None:
            self._open(self._started)
        numbers = {
            key: value
            for key, value in row.items()
            if isinstance(value, int | float) and key.rpartition("/")[2] not in _DESCRIPTION
        }
        self._tracker.log(numbers, step=step)

    def close(self) -> None:
        tracker, self._tracker = self._tracker, None
        self._units = self._rows = 0
        if tracker is not None:
            tracker.finish()


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str | float | bool]]:
    """Yields the settings by dotted names; what is no number and no text as text."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str | int | float) else str(value)
