"""Tables of the datasets library: of the hub, of a folder that `save_to_disk` wrote, or of local files; also streamed.

A stream becomes a local table, once:

    documents.arrow     an Arrow stream of the columns that are read, memory-mapped afterwards
    stream.json         its size, digest and number of rows; written last

It lies under `data_dir`, in streams/DIGEST, and is used until it is removed: the hub is not asked again. Memory stays flat:
a batch of rows is written before the next one is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from softcache.data.sources.build_cache import BuildSettings, build_dir_path, build_folder
from softcache.data.sources.files import CorpusFiles, file_digest
from softcache.errors import SourceError
from softcache.runtime.files import parse_json
from softcache.runtime.logging import progress_bar
from softcache.runtime.optional import text_library

__all__ = [
    "HubSettings",
    "is_saved",
    "load_arguments",
    "loading_error",
    "quiet_datasets",
    "saved_split",
    "stream_table",
]

BATCH_ROWS = 512


class HubSettings(BuildSettings, Protocol):
    """What the settings of a table have in common."""

    @property
    def path(self) -> str | None: ...
    @property
    def subset(self) -> str | None: ...
    @property
    def train_split(self) -> str: ...
    @property
    def eval_split(self) -> str | None: ...
    @property
    def revision(self) -> str | None: ...


@contextmanager
def quiet_datasets() -> Iterator[Any]:
    """Yields the datasets library, silenced; the user's own setting comes back afterwards."""
    datasets = text_library("datasets")
    if datasets.are_progress_bars_disabled():
        yield datasets
        return
    datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        datasets.enable_progress_bars()


def is_saved(files: CorpusFiles) -> bool:
    """Whether a folder is one that `save_to_disk` wrote."""
    names = {files.name(path) for path in files.paths}
    return files.is_folder and ("dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= names)


def saved_split(settings: HubSettings, root: Path, split: str, *, datasets: Any, of: str) -> Any:
    """Returns a split of a folder that `save_to_disk` wrote.

    Args:
        of: what its rows are, for messages.
    """
    found = datasets.load_from_disk(str(root), keep_in_memory=False)
    if settings.subset is not None:
        raise SourceError(
            f"source.subset: {settings.subset!r} of a folder that save_to_disk wrote, which has none; drop it"
        )
    if isinstance(found, datasets.DatasetDict):
        return found[split]
    if settings.eval_split is not None or settings.train_split != "train":
        key = "train_split" if settings.eval_split is None else "eval_split"
        raise SourceError(
            f"source.{key}: {getattr(settings, key)!r}, and {settings.path!r} is one table without splits; "
            f"drop it, and source.eval_share of the {of} are held out"
        )
    return found


def load_arguments(
    settings: HubSettings, files: CorpusFiles | None, digest: str, kinds: Mapping[str, str]
) -> dict[str, Any]:
    """Returns what load_dataset is called with.

    The library knows local files by name and time, so its cache lies under the digest of their contents.

    Args:
        digest: of local files.
        kinds: the library's name of what a file holds, by its suffix.
    """
    subset = settings.subset
    if files is None:
        revision = {} if settings.revision is None else {"revision": settings.revision}
        return {"path": settings.path, "name": subset, **revision}
    cache_dir = Path(settings.data_dir).expanduser() / "datasets" / digest[:16]
    files = files.unpacked(settings)
    arguments: dict[str, Any] = {"path": str(files.root), "name": subset}
    if not files.is_folder:
        paths = [str(path) for path in files.paths]
        # One file is given as one: the library's own name of its cache depends on it.
        arguments |= {
            "path": kinds[files.paths[0].suffix],
            "data_files": paths[0] if len(paths) == 1 else paths,
        }
    suffixes = {path.suffix for path in files.paths}
    if suffixes == {".txt"}:
        arguments |= {"sample_by": "paragraph", "encoding": "utf-8-sig"}  # without a byte order mark
    elif (separated := suffixes & kinds.keys()) in ({".csv"}, {".tsv"}):
        arguments |= {"keep_default_na": False, "sep": "\t" if separated == {".tsv"} else ","}
    return arguments | {"cache_dir": str(cache_dir.resolve())}


def loading_error(settings: HubSettings, split: str, error: Exception) -> SourceError:
    """Returns the error of a name that the library cannot serve, for which it raises many kinds."""
    # "An error occurred while generating the dataset" is all that the library reports of a damaged line.
    cause = f" ({type(error.__cause__).__name__}: {error.__cause__})" if error.__cause__ else ""
    return SourceError(
        f"source.path {settings.path!r}, split {split!r}: cannot be loaded: {type(error).__name__}: {error}{cause}; "
        "check source.path, its files, source.subset and the names of the splits"
    )


def stream_table(
    settings: HubSettings,
    arguments: Mapping[str, Any],
    *,
    datasets: Any,
    split: str,
    columns: Sequence[str],
    made_from: Mapping[str, Any],
    keep: Callable[[pa.Table], tuple[pa.Table, int, bool]],
    bound: int,
    unit: str,
    typed: bool = False,
) -> tuple[Any, str]:
    """Returns a table of the first rows of a split, streamed now if it was not before, and the digest of its contents.

    Args:
        arguments: what `load_dataset` is called with.
        made_from: names the folder.
        keep: from a batch to the rows that are kept, how much of the bound they are, and whether it is reached.
        bound, unit: for the progress.
        typed: the features of the stream are kept, such as `Image` and `ClassLabel`.

    Raises:
        SourceError: there is no such column, or rows differ in their type.
        StorageError: `data_dir` cannot be written.
    """
    folder = build_dir_path(settings, "streams", made_from)
    described = _described(folder)
    if described is None:
        with build_folder(folder, lambda made: _described(made) is not None) as staged:
            stream = datasets.load_dataset(**arguments, split=split, streaming=True)
            path, schema = staged / "documents.arrow", None
            if typed:
                features = stream.features or stream._resolve_features().features
                _check_columns(columns, list(features), settings)
                schema = datasets.Features({name: features[name] for name in columns}).arrow_schema
            with progress_bar(f"stream {settings.path}", bound, unit) as advance:
                num_rows = _write(stream, path, settings, columns, schema, keep, advance)
            described = {
                "num_documents": num_rows,
                "num_bytes": path.stat().st_size,
                "digest": file_digest(path),
                "made_from": dict(made_from),
            }
            (staged / "stream.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return datasets.Dataset.from_file(str(folder / "documents.arrow")), described["digest"]


def _described(folder: Path) -> dict[str, Any] | None:
    """Returns stream.json, or None where the table is not whole."""
    try:
        described: dict[str, Any] = parse_json((folder / "stream.json").read_text("utf-8"))
        is_whole = (folder / "documents.arrow").stat().st_size == described["num_bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return described if is_whole else None


def _write(
    stream: Any,
    path: Path,
    settings: HubSettings,
    columns: Sequence[str],
    schema: pa.Schema | None,
    keep: Callable[[pa.Table], tuple[pa.Table, int, bool]],
    advance: Callable[[int], None],
) -> int:
    """Writes rows until the bound is reached; returns how many."""
    num_rows, writer = 0, None
    try:
        for batch in stream.with_format("arrow").iter(batch_size=BATCH_ROWS):
            _check_columns(columns, batch.column_names, settings)
            table, amount, is_full = keep(batch.select(list(columns)))
            schema = table.schema if schema is None else schema
            writer = writer or pa.ipc.new_stream(str(path), schema)
            writer.write_table(_cast(table, schema, num_rows, settings))
            num_rows += len(table)
            advance(amount)
            if is_full:
                break
    finally:
        if writer is not None:
            writer.close()
    if not num_rows:
        raise SourceError(f"source.path {settings.path!r}: no rows in the stream; check the split")
    return num_rows


def _check_columns(columns: Sequence[str], found: Sequence[str], settings: HubSettings) -> None:
    for name in columns:
        if name not in found:
            raise SourceError(f"source.path {settings.path!r}: no column {name!r}; it has {', '.join(found)}")


def _cast(table: pa.Table, schema: pa.Schema, number: int, settings: HubSettings) -> pa.Table:
    try:
        return table.cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise SourceError(
            f"source.path {settings.path!r}, rows from {number:,} on: {error}; expected the type of those before"
        ) from error
