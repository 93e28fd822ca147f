"""A run's directory on disk: its config, its checkpoint (replaced atomically) and its results.

    OUT/config.json           what the run is; a directory that holds another run is refused
    OUT/resolved.json         every setting that it ran with, defaults included; to read, not compared
    OUT/checkpoint/           the last state that can be resumed exactly (accelerate's layout + progress.json; of a student
                              that is cut over processes with shards/, of torch.distributed.checkpoint)
    OUT/best.safetensors      the weights of the best epoch so far, by the task's metric
    OUT/model.safetensors     the weights at the end
    OUT/hf/                   language models: the best epoch's model with its tokenizer, as transformers loads it
    OUT/adapter/              language models with LoRA: the best epoch's adapter, as peft loads it
    OUT/metrics.json          one JSON object, written last: a run with it is finished

A kill or a power cut between any two steps leaves the old checkpoint or the new one, never half of one: files and folders
are flushed to the disk, and the old checkpoint goes when the new one has been found whole in its place. One run works on
OUT at a time: it holds OUT/.lock, and of a bucket the lease there. Of many processes the first one writes (each adds its
random state to the checkpoint), so OUT must be a place that all of them see; another number of processes can go on from it.
"""

from __future__ import annotations

import json
import logging
import shutil
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import xxhash
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError

from softcache.cache.storage.local import LocalObjects
from softcache.errors import RunError, SoftcacheError, StorageError
from softcache.models.weight_files import load_weights
from softcache.models.weights import is_adapted, trained_state
from softcache.runtime.distributed import (
    broadcast_from_rank0,
    describe_independence,
    is_rank_zero,
    num_ranks,
    rank,
)
from softcache.runtime.files import (
    give_mode,
    read_json,
    replace_file,
    staged_file,
    sync_file,
    sync_folder,
    to_json,
)
from softcache.student.bucket_sync import BucketSync, hold_lease

if TYPE_CHECKING:
    import torch

__all__ = ["RunDirectory", "diff_settings", "hold_run", "store_unwrapped"]

CHECKSUMS = "checksums"

_UNREADABLE = (
    *(RuntimeError, OSError, ValueError, TypeError, LookupError, AttributeError, EOFError),
    *(UnpicklingError, SafetensorError, struct.error),
)
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container")  # in what torch.save raises where it cannot write
_WHAT_NEXT = "remove the folder to begin this run anew, or restore it from a copy"


@contextmanager
def hold_run(path: str | Path, mirror: BucketSync | None) -> Iterator[None]:
    """Holds a run's directory for this run, with its place in a bucket, and makes the one what the other is.

    All processes of a run call this. A finished run is held only while it is fetched: nothing of it is written.

    Raises:
        RunError: another run holds it.
        StorageError: the directory cannot be written, or the bucket does not answer.
    """
    group, path = PartialState(), Path(path)
    with ExitStack() as held:
        if mirror is None:
            if group.is_main_process and not (path / "metrics.json").exists():
                held.enter_context(_locked(path))
        elif group.is_local_main_process:
            held.enter_context(_locked(path))
            if group.is_main_process and not mirror.is_finished:
                held.enter_context(mirror.lease())
            mirror.fetch()
        group.wait_for_everyone()
        yield


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    objects = LocalObjects(path)
    try:
        with objects.claim(".lock") as is_ours:
            if is_ours:
                yield
                return
        if objects.locks().kind == "flock":
            raise RunError(
                f"run {path}: another run works on it on this machine; wait for its end, stop it, or choose another --out"
                + describe_independence()
            )
        with hold_lease(objects, ".lock", f"run {path}"):
            yield
    finally:
        with suppress(OSError):
            (path / ".staging").rmdir()


class RunDirectory:
    """One training run's directory, and its mirror in a bucket, if it has one.

    Raises (from the constructor):
        RunError: the directory holds a run of another config; each key that differs is named.
        StorageError: it cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        config: dict[str, Any],
        resolved: dict[str, Any] | None = None,
        *,
        mirror: BucketSync | None = None,
    ) -> None:
        self.path, self._mirror = Path(path), mirror
        config = json.loads(json.dumps(config))
        if not is_rank_zero():
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            stored = self.path / "config.json"
            if stored.exists():
                differing = diff_settings(read_json(stored, _WHAT_NEXT, error=RunError), config)
                if differing:
                    raise RunError(
                        f"run {self.path}: holds another run (there; this run): {'; '.join(differing)}; "
                        "choose another --out, or remove the old run if nobody needs it"
                    )
            else:
                if resolved is not None:
                    self._write_json("resolved.json", resolved)
                self._write_json("config.json", config)
        except OSError as error:
            raise StorageError(
                f"run {self.path}: cannot be written: {error}; choose another --out"
            ) from error

    def _write_json(self, name: str, content: Any) -> None:
        replace_file(self.path / name, to_json(content))

    @property
    def metrics(self) -> dict[str, Any] | None:
        """The results of a finished run, else None; as the first process finds them."""
        path = self.path / "metrics.json"
        return broadcast_from_rank0(
            read_json(path, _WHAT_NEXT, error=RunError) if is_rank_zero() and path.exists() else None
        )

    def checkpoint_epoch(self) -> tuple[int, int] | None:
        """Returns epoch and step within it of the last checkpoint; None without one."""
        if not (self.path / "checkpoint" / "progress.json").exists():
            return None
        progress = _read_progress(self.path / "checkpoint")
        epoch, step = (_integer(progress, name, self.path / "checkpoint") for name in ("epoch", "step"))
        return epoch, step

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        with _writing(self.path):
            self._write_json("metrics.json", metrics)
        if self._mirror is not None:
            self._mirror.finish()

    def save_checkpoint(
        self,
        accelerator: Accelerator,
        progress: dict[str, Any],
        more: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        """Saves model, optimizer and random states of all ranks, and where the run stands.

        Args:
            more: writes what accelerate does not into the checkpoint's folder; all ranks call it.

        Raises:
            StorageError: it cannot be written; the checkpoint before it is kept.
        """
        with _writing(self.path):
            self._save_checkpoint(accelerator, progress, more)
        if accelerator.is_main_process and self._mirror is not None:
            self._mirror.send()
        accelerator.wait_for_everyone()

    def _save_checkpoint(
        self, accelerator: Accelerator, progress: dict[str, Any], more: Callable[[Path], None]
    ) -> None:
        staged, final, old = (self.path / name for name in ("checkpoint.new", "checkpoint", "checkpoint.old"))
        self._settle(accelerator)
        if accelerator.is_main_process and staged.exists():
            shutil.rmtree(staged)
        accelerator.wait_for_everyone()
        # Tied weights are stored once, and loaded as they are tied; accelerate would tell the user each time.
        logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
        accelerator.save_state(str(staged), safe_serialization=True)
        more(staged)
        accelerator.wait_for_everyone()
        checksums = _shared_checksums(staged, flush=True)
        if accelerator.is_main_process:
            written = list(staged.rglob("*"))
            replace_file(staged / "progress.json", to_json(progress | {CHECKSUMS: checksums}))
            mode = stat.S_IMODE((staged / "progress.json").stat().st_mode)
            for path in written:
                if path.is_file():
                    give_mode(path, mode)  # safetensors writes for its user alone
            for folder in {staged, *(path for path in written if path.is_dir())}:
                sync_folder(folder)
            if old.exists():
                shutil.rmtree(old)
            if final.exists():
                final.rename(old)
            staged.rename(final)
            sync_folder(self.path)
            try:
                _check_whole(final, set(checksums))
            except StorageError:
                if old.exists():
                    shutil.rmtree(final)
                    old.rename(final)
                raise
            if old.exists():
                shutil.rmtree(old)

    def _settle(self, accelerator: Accelerator) -> None:
        """Puts the old checkpoint back if a kill came between the two renames of a save."""
        final, old = self.path / "checkpoint", self.path / "checkpoint.old"
        if accelerator.is_main_process and old.exists() and not final.exists():
            old.rename(final)
        accelerator.wait_for_everyone()

    def load_checkpoint(
        self,
        accelerator: Accelerator,
        before: Callable[[dict[str, Any]], None] = lambda progress: None,
        more: Callable[[Path], None] = lambda folder: None,
    ) -> dict[str, Any] | None:
        """Restores the last checkpoint; returns its progress, or None if there is none.

        Args:
            more: reads what `more` of `save_checkpoint` wrote.
            before: called with the progress before random states are restored; a process that the checkpoint has none
                of keeps the one that it leaves.

        Raises:
            RunError: a file of it is damaged, missing, or no checkpoint's.
            StorageError: the first process has a checkpoint here, and this one does not see it.
        """
        final = self.path / "checkpoint"
        self._settle(accelerator)
        file = final / "progress.json"
        progress = broadcast_from_rank0(_read_progress(final) if is_rank_zero() and file.exists() else None)
        if progress is None:
            return None
        if not file.exists():
            raise StorageError(
                f"run {self.path}: process 0 has a checkpoint here, this one sees none; put --out on storage that all "
                "processes share"
            )
        with _readable(final):
            # Files are compared with their checksums; checkpoints of older versions have none.
            if (expected := progress.pop(CHECKSUMS, None)) is not None and expected != _shared_checksums(
                final
            ):
                raise RunError(f"run {final}: a file differs from what was saved; {_WHAT_NEXT}")
        with _readable(final):
            before(progress)
            more(final)
            accelerator.load_state(str(final))
        return progress

    def save_weights(self, state: Mapping[str, torch.Tensor], name: str) -> None:
        """Writes a state dict as NAME.safetensors, atomically."""
        from safetensors.torch import save_file

        tensors = {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}
        with _writing(self.path), staged_file(self.path / f"{name}.safetensors") as staged:
            save_file(tensors, staged)

    def load_weights(self, state: Mapping[str, torch.Tensor], name: str) -> None:
        """Overwrites the tensors of a state dict by those of NAME.safetensors."""
        import torch
        from safetensors.torch import load_file

        with _readable(self.path / f"{name}.safetensors"), torch.no_grad():
            stored = load_file(self.path / f"{name}.safetensors")
            for key, value in state.items():
                value.copy_(stored[key])


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns what a full or failing disk raises into a `StorageError`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, SoftcacheError) or (
            isinstance(error, RuntimeError) and not any(sign in str(error) for sign in _TORCH_WRITER)
        ):
            raise
        raise StorageError(
            f"run {path}: cannot be written: {error}; free some space or choose another --out; the last checkpoint is kept"
        ) from error


def _shared_checksums(folder: Path, *, flush: bool = False) -> dict[str, str]:
    """Returns the xxh3 of every file of a checkpoint, each rank having read, and flushed to the disk, some of them.

    What accelerate cannot read it may pass over without a word.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "progress.json")
    found = {}
    for path in paths[rank() :: num_ranks()]:
        digest = xxhash.xxh3_128()
        if flush:
            sync_file(path)
        with path.open("rb") as file:
            while data := file.read(1 << 24):
                digest.update(data)
        found[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return dict(sorted(item for part in gather_object([found]) for item in part.items()))


def _check_whole(folder: Path, names: set[str]) -> None:
    """Raises StorageError unless a checkpoint has these files, and those of tensors and states are whole."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    damaged = sorted(names - set(found))
    for name, path in found.items():
        if name.endswith(".safetensors") and not _is_safetensors(path):
            damaged.append(name)
        if name.endswith((".bin", ".pt", ".pth")) and not zipfile.is_zipfile(path):
            damaged.append(name)
    if damaged:
        raise StorageError(
            f"run {folder}: {', '.join(damaged)} is not as it was written a moment ago: the storage loses data; the "
            "checkpoint before it is kept; check the file system, or choose another --out"
        )


def _is_safetensors(path: Path) -> bool:
    """Whether a file's header can be read and fits its size."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _read_progress(folder: Path) -> dict[str, Any]:
    """Returns where a checkpoint's run stands, and the checksums of its files."""
    return read_json(folder / "progress.json", _WHAT_NEXT, error=RunError)


def _integer(progress: Mapping[str, Any], name: str, folder: Path) -> int:
    found = progress.get(name)
    if isinstance(found, bool) or not isinstance(found, int):
        raise RunError(
            f"run {folder}: progress.json: {name}: expected an integer; found {found!r}; {_WHAT_NEXT}"
        )
    return found


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        if isinstance(error, SoftcacheError):
            raise
        raise RunError(
            f"run {folder}: cannot be loaded: {type(error).__name__}: {error}; {_WHAT_NEXT}"
        ) from error


def store_unwrapped(accelerator: Accelerator) -> None:
    """Has the accelerator save and load models without what it wraps them in, which differs by number of processes.

    Of a model with adapters, a checkpoint holds what is trained.
    """

    def save(models: list[Any], weights: list[Any], place: str) -> None:
        weights[:] = [trained_state(accelerator.unwrap_model(model)) for model in models]

    def load(models: list[Any], place: str) -> None:
        models[:] = [accelerator.unwrap_model(model) for model in models]
        for model in [model for model in models if is_adapted(model)]:
            load_weights(model, Path(place) / "model.safetensors")
            models.remove(model)  # it is loaded; accelerate would miss the frozen weights

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def diff_settings(there: Any, here: Any, prefix: str = "") -> list[str]:
    """Returns a line for each key whose value differs: its dotted name, what is there, what is here."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted(set(there) | set(here))
        return [
            line for key in keys for line in diff_settings(there.get(key), here.get(key), f"{prefix}{key}.")
        ]
    return [] if there == here else [f"{prefix.rstrip('.')}: {there!r}; {here!r}"]
