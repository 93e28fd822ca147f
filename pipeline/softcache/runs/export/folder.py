"""An export's directory: whose student it is, which files are finished, and that they are what was written.

    OUT/export.json        written first: the student's identity; then each finished file with its bytes and sha256
    OUT/student.pt2, student.onnx, student.int8.onnx
    OUT/distill.json       all figures, written when everything is measured
    OUT/README.md          the card

Each file is written under a temporary name, flushed, and renamed; a kill leaves finished files, and a rerun makes the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from softcache.errors import CorruptionError, RunError, SoftcacheError, StorageError
from softcache.runtime.files import read_json, to_json, try_lock
from softcache.student.checkpoint import diff_settings

__all__ = ["ExportFolder", "sha256_of"]

STATE = "export.json"
LEAST_FREE = 2**20
"""Bytes of a disk below which, or below two files of the folder, an error of a writer is taken to be that it is full."""


def sha256_of(path: Path) -> str:
    """Returns the sha256 of a file, as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ExportFolder:
    """A directory of one student's exported files.

    Raises (from the constructor):
        RunError: it holds another student's, or files that no export wrote; each key that differs is named.
        CorruptionError: a finished file is gone, or differs from what was written.
        StorageError: it cannot be written.
    """

    def __init__(self, path: str | Path, identity: dict[str, Any]) -> None:
        self.path = Path(path)
        identity = json.loads(json.dumps(identity))
        state = self.path / STATE
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not state.exists():
                self._refuse_foreign_files()
                self._state: dict[str, Any] = {"identity": identity, "files": {}}
                self._put(STATE, json.dumps(self._state, indent=2))
                return
            self._state = read_json(state, "remove the export, and export again", error=RunError)
            if not all(isinstance(self._state.get(part), dict) for part in ("identity", "files")):
                raise RunError(
                    f"export {state}: expected identity and files; found neither; remove the export, and export again"
                )
            there = self._state["identity"]
        except OSError as error:
            raise StorageError(
                f"export {self.path}: cannot be written: {error}; choose another --out"
            ) from error
        except RunError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptionError(
                f"{state}: cannot be read ({error}); remove the folder to export anew, or restore it from a copy"
            ) from error
        if differing := diff_settings(there, identity):
            raise RunError(
                f"export {self.path}: holds another student (there; this one): {'; '.join(differing)}; choose another "
                "--out, or remove the old export if it is not needed"
            )
        for name in self._state["files"]:
            self._verify(name)

    def _refuse_foreign_files(self) -> None:
        names = ("student.onnx", "student.pt2", "student.int8.onnx", "distill.json", "README.md")
        found = [name for name in names if (self.path / name).exists()]
        if found:
            raise RunError(
                f"export {self.path}: holds {', '.join(found)}, but no {STATE}: no export wrote them; choose "
                "another --out"
            )

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """The finished files: name -> bytes and sha256."""
        return dict(self._state["files"])

    def _verify(self, name: str) -> None:
        path, recorded = self.path / name, self._state["files"][name]
        found = sha256_of(path) if path.is_file() else None
        if found != recorded["sha256"]:
            raise CorruptionError(
                f"{path}: {'sha256 ' + found[:12] + '…' if found else 'gone'}; {STATE} has sha256 "
                f"{recorded['sha256'][:12]}…, {recorded['bytes']:,} bytes; restore it, or remove the folder to export anew"
            )

    def make(self, name: str, write: Callable[[Path], Any]) -> Path:
        """Returns a file's path; `write` makes it, unless it is finished."""
        final = self.path / name
        if name not in self._state["files"]:
            with self._staged(name) as staged:
                write(staged)
            self._state["files"][name] = {"bytes": final.stat().st_size, "sha256": sha256_of(final)}
            self._put(STATE, json.dumps(self._state, indent=2))
        return final

    def make_json(self, name: str, content: Any) -> Path:
        """Returns the path of a JSON file, written unless it is finished."""
        return self.make(name, lambda path: path.write_text(to_json(content), encoding="utf-8"))

    def read_json(self, name: str) -> Any:
        """Returns what a finished JSON file holds, else None."""
        return (
            read_json(self.path / name, "remove the export, and export again", error=RunError)
            if name in self._state["files"]
            else None
        )

    def _put(self, name: str, text: str) -> None:
        with self._staged(name) as staged:
            staged.write_text(text + "\n", encoding="utf-8")

    @contextmanager
    def _staged(self, name: str) -> Iterator[Path]:
        """A temporary name in the folder, which becomes `name` if nothing is raised; gone afterwards."""
        staged = self.path / f".{os.getpid()}.{name}"
        try:
            yield staged
            with staged.open("rb") as file:
                os.fsync(file.fileno())
            staged.replace(self.path / name)
        except OSError as error:
            raise StorageError(f"export {self.path / name}: cannot be written: {error}") from error
        except SoftcacheError:
            raise
        except Exception as error:  # torch's and onnxruntime's writers have many for a disk that is full
            free = shutil.disk_usage(self.path).free
            if free > max(LEAST_FREE, *(2 * path.stat().st_size for path in self.path.iterdir())):
                raise
            raise StorageError(
                f"export {self.path / name}: cannot be written: {error}; the disk has {free:,} bytes left: free some space, "
                "and run the command again: what is finished is kept"
            ) from error
        finally:
            staged.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for this process; the kernel releases it when the process ends.

        Raises:
            RunError: another process exports into it.
        """
        with (self.path / ".lock").open("wb") as file:
            try:
                is_free = try_lock(file.fileno())
            except OSError as error:
                raise StorageError(
                    f"export {self.path}: cannot be locked: {error.strerror}; export to another place, and copy it"
                ) from error
            if not is_free:
                raise RunError(f"export {self.path}: another process writes it now; wait for it to end")
            for left in self.path.glob(".[0-9]*.*"):  # of killed processes: this one holds the lock
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield
