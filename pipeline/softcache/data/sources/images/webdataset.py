"""Tar files of samples, as WebDataset writes them: KEY.jpg next to KEY.cls or KEY.json.

They are not unpacked: the place of each picture is looked up once, and it is read from there in any order. The list lies
under `data_dir`, in tar/DIGEST/index.arrow, and is made anew when a file changes. Files in a bucket are copied whole.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from softcache.data.sources.base import SOURCES
from softcache.data.sources.build_cache import build_dir_path, build_folder
from softcache.data.sources.files import CorpusFiles
from softcache.data.sources.images.base import Split
from softcache.data.sources.images.classes import read_labels
from softcache.data.sources.images.image_folder import SUFFIXES
from softcache.data.sources.images.pictures import PictureSource
from softcache.data.sources.images.split_files import SplitFiles, file_facts
from softcache.errors import SourceError
from softcache.runtime.files import parse_json
from softcache.runtime.logging import progress_bar

__all__ = ["TarSource", "WebDataset"]

VERSION = 1


@SOURCES.register("image/webdataset")
class WebDataset(SplitFiles):
    """Tar files, such as `train-{000000..000146}.tar`; keys are FILE/KEY.

    The class of a sample is the text of its member `label_extension`, a whole number or a name; with `json_key`, what its
    JSON has under that key. A sample has one picture, or `image_extension` chooses it.
    """

    name: str = "webdataset"
    label_extension: str = "cls"
    json_key: str | None = None
    image_extension: str | None = None

    def pictures(self, split: Split) -> TarSource:
        files = self.files(split, (".tar",))
        where, table = f"source {files.given}", self._index(files)
        labels = read_labels(table.column("label").to_pylist(), self.class_names)
        train_labels = labels
        if split == "eval" and self.eval_path is not None:
            train = self._index(self.files("train", (".tar",))).column("label").to_pylist()
            train_labels = read_labels(train, self.class_names)
        classes = self.classes(train_labels, where)
        keys = table.column("key").to_pylist()
        numbers = self.chosen(keys, split)
        keys = [keys[number] for number in numbers.tolist()]
        if not keys:
            raise SourceError(
                f"{where}: no samples of the {split} split; check source.path and source.eval_share"
            )
        targets = classes.targets([labels[number] for number in numbers.tolist()], keys, where)
        columns = [table.column(name).to_numpy()[numbers] for name in ("file", "offset", "size")]
        return TarSource(
            f"webdataset/{split}",
            keys,
            targets,
            classes.names,
            np.stack(columns, axis=1),
            files=files,
            order_is_guessed=classes.is_guessed,
        )

    def _index(self, files: CorpusFiles) -> pa.Table:
        """Returns key, label and place of each sample, looked up now if they were not before."""
        facts = [self.label_extension, self.json_key, self.image_extension]
        made_from = {"version": VERSION, "files": file_facts(files), "members": facts}
        folder = build_dir_path(self, "tar", made_from)
        path = folder / "index.arrow"
        if not path.is_file():
            with (
                build_folder(folder, lambda made: (made / "index.arrow").is_file()) as staged,
                progress_bar(f"index {files.given}", len(files.paths), "files") as advance,
            ):
                rows: list[tuple[str, str, int, int, int]] = []
                for number, file in enumerate(files.paths):
                    for key, label, offset, size in self._samples(file):
                        rows.append((f"{files.name(file)}/{key}", label, number, offset, size))
                    advance(1)
                names = ("key", "label", "file", "offset", "size")
                columns = zip(*rows, strict=True) if rows else [[]] * len(names)
                table = pa.table({name: list(column) for name, column in zip(names, columns, strict=True)})
                with pa.ipc.new_file(str(staged / "index.arrow"), table.schema) as writer:
                    writer.write_table(table)
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()

    def _samples(self, path: Path) -> Iterator[tuple[str, str, int, int]]:
        """Yields key, label, and the place of the picture of each sample of a file.

        Raises:
            SourceError: it is no tar file, or a sample has no picture, several, or no class.
        """
        members: dict[str, dict[str, tarfile.TarInfo]] = {}
        labels: dict[str, str] = {}
        wanted = "json" if self.json_key is not None else self.label_extension.lstrip(".")
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    stem, _, extension = name.partition(".")
                    if not member.isfile() or not stem or folder.startswith("__MACOSX"):
                        continue
                    key, extension = f"{folder}/{stem}".lstrip("/"), extension.lower()
                    if extension in members.setdefault(key, {}):
                        raise SourceError(
                            f"source {path}: {member.name!r} comes twice; expected keys that differ"
                        )
                    members[key][extension] = member
                    if extension == wanted:
                        labels[key] = self._label(tar.extractfile(member), f"source {path}, {member.name}")
        except (tarfile.TarError, OSError) as error:
            raise SourceError(
                f"source {path}: {error}; expected a whole tar file (.tar, or .tar.gz, which is unpacked first); fetch it "
                "again"
            ) from error
        pictures = {key: self._pictures(found) for key, found in members.items()}
        for fault, keys in (
            ("no picture", [key for key, found in pictures.items() if not found]),
            ("several pictures", [key for key, found in pictures.items() if len(found) > 1]),
            (f"no .{wanted}", [key for key in members if key not in labels]),
        ):
            if keys:
                raise SourceError(
                    f"source {path}: {fault} for {len(keys):,} of {len(members):,} samples, the first is {keys[0]!r} with "
                    f"{', '.join(f'.{name}' for name in members[keys[0]])}; set source.image_extension, label_extension or "
                    "json_key"
                )
        for key, (found,) in pictures.items():
            yield key, labels[key], found.offset_data, found.size

    def _pictures(self, members: Mapping[str, tarfile.TarInfo]) -> list[tarfile.TarInfo]:
        if self.image_extension is not None:
            found = members.get(self.image_extension.lstrip(".").lower())
            return [] if found is None else [found]
        return [member for name, member in members.items() if f".{name}" in SUFFIXES]

    def _label(self, stream: Any, where: str) -> str:
        try:
            text = stream.read().decode().strip()
            label = text if self.json_key is None else parse_json(text)[self.json_key]
        except (ValueError, KeyError, TypeError) as error:
            raise SourceError(
                f"{where}: {type(error).__name__}: {error}; expected a class as text"
                + (f", in JSON under {self.json_key!r}" if self.json_key else "")
            ) from error
        if isinstance(label, bool) or not isinstance(label, str | int):
            raise SourceError(f"{where}: a {type(label).__name__}; expected a whole number, or a name")
        return str(label)


class TarSource(PictureSource):
    """Pictures inside of tar files; `places` [N, 3] are file, offset and size."""

    def __init__(self, *arguments: Any, files: CorpusFiles, **options: Any) -> None:
        self._files, self._facts = files, file_facts(files)
        self._open: dict[int, int] = {}
        super().__init__(*arguments, **options)

    def content_facts(self) -> Mapping[str, Any]:
        return {"file_sizes": hashlib.sha256(self.places[:, 2].astype("<i8").tobytes()).hexdigest()}

    def stamp(self) -> Any:
        return self._facts

    @property
    def location(self) -> str:
        return str(self._files.root)

    def place_name(self, sample: int) -> str:
        return f"{self._files.root}/{self._keys[sample]}"

    def file_bytes(self, sample: int) -> bytes:
        """Returns a picture as it is in its tar file.

        Raises:
            SourceError: the file is gone, or shorter than it was.
        """
        file, offset, size = self.places[sample].tolist()
        try:
            if file not in self._open:
                self._open[file] = os.open(self._files.paths[file], os.O_RDONLY)
            content = os.pread(self._open[file], size, offset)
        except OSError as error:
            raise self.read_error(sample, error) from error
        if len(content) != size:
            raise self.read_error(sample, OSError(f"{len(content)} bytes of {size}, the file was cut"))
        return content

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def __copy__(self) -> TarSource:
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__getstate__())
        return copied

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)
