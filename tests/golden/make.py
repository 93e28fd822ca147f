"""Freeze tiny caches and the numbers in them, for tests/cache/test_golden*.py.

    .venv/bin/python -m tests.golden.make
    .venv/bin/python -m tests.golden.make packed
    .venv/bin/python -m tests.golden.make cells
    .venv/bin/python -m tests.golden.make bernoulli

Run once per format version and codec, never to refresh a failing test: if today's code no longer reads what is frozen,
users' caches are no longer read either, and the code is at fault. The caches go to tests/golden/vN, where N is
the format version, or tests/golden/vN-packed, and a folder that exists is never written to. The expected numbers are taken from the files
by zarr-python and pyarrow, not by softcache; packed records are decoded by tests/support/plain_packed.py.

Two label the first 24 digits with a teacher whose answers are known. Between them they use every step of a
view, both stores and both dtypes of the values. Those of cells label 6 scenes with detectors that were never trained: one
of sigmoids in Zarr, one with a softmax in Parquet.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import zarr
from safetensors.torch import save_file

from softcache.cache.manifest import FORMAT_VERSION
from softcache.config.run import RunConfig
from softcache.models.detection.build import build_detector
from softcache.runs import capture_labels, open_data, open_teacher
from tests.support.plain_packed import decode

ARRAYS = ("ids", "log_probs", "log_tail", "target_log_prob", "stats")
COLUMNS = (*ARRAYS, "fingerprint")
PACKED_COLUMNS = ("record", "fingerprint")
NUM_SAMPLES, NUM_VIEWS, K = 24, 2, 3

# Nothing here is shared with the other tests, whose settings may change.
VIEWS = {
    "zarr": {"crop": "padded", "padding": 1, "flip": 0.5, "mean": [0.3], "std": [0.4]},
    "parquet": {
        "seed": 7,
        "size": 12,
        "crop": "resized",
        "scale": [0.5, 1.0],
        "flip": 0.5,
        "augment": "randaugment",
        "color_jitter": [0.4, 0.4, 0.4, 0.1],
        "erase": 0.5,
        "mean": [0.3],
        "std": [0.4],
    },
}
VALUES = {"zarr": "float16", "parquet": "float32"}
TEMPERATURES = [1.0, 1.1, 1.25, 1.5, 1.8, 2.5, 4.0, 8.0]
STEP = 1 / 64


def config(store: str, **capture) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": f"golden-{store}",
            "source": {"name": "digits", "max_train_samples": NUM_SAMPLES, "max_eval_samples": 6},
            "views": VIEWS[store],
            "teacher": {"model": "tests.fakes:known"},
            "labels": {"k": K, "num_views": NUM_VIEWS, "temperatures": TEMPERATURES},
            "capture": {
                "store": store,
                "codec": {"values": VALUES[store]},
                "unit_samples": 16,
                "chunk_samples": 8,
                "device": "cpu",
                **capture,
            },
            "student": {"model": "linear"},
            "train": {"epochs": 2, "batch_size": 8, "device": "cpu"},
        }
    )


def packed_config(store: str) -> RunConfig:
    return config(store, codec={"name": "packed", "step": STEP})


def read_plainly(url: Path, names: tuple[str, ...] = COLUMNS) -> dict[str, np.ndarray]:
    """Returns columns [view, sample, …] of a cache, read without softcache."""
    if (url / "labels.zarr").exists():
        group = zarr.open_group(url / "labels.zarr", mode="r")
        return {name: np.asarray(group[name]) for name in names}
    table = pq.read_table(url / "parquet").sort_by([("view", "ascending"), ("sample", "ascending")])
    columns = {}
    for name in names:
        rows = table[name].combine_chunks()
        if name == "record":
            joined = np.frombuffer(b"".join(rows.to_pylist()), np.uint8)
            columns[name] = joined.reshape(NUM_VIEWS, NUM_SAMPLES, -1)
            continue
        inner = rows.flatten() if hasattr(rows, "flatten") else rows
        columns[name] = inner.to_numpy(zero_copy_only=False).reshape(NUM_VIEWS, NUM_SAMPLES, -1)
        if inner is rows or len(inner) == len(rows):
            columns[name] = columns[name][..., 0]
    return columns


def decode_plainly(url: Path) -> dict[str, np.ndarray]:
    """Returns what the records [view, sample] of a packed cache say, read and decoded without softcache."""
    described = json.loads((url / "manifest.json").read_text())["codec"]
    records = read_plainly(url, PACKED_COLUMNS)["record"]
    rows = [decode(described, bytes(record)) for record in records.reshape(-1, records.shape[-1])]
    return {
        name: np.array([row[name] for row in rows], "uint16" if name == "ids" else "float32").reshape(
            NUM_VIEWS, NUM_SAMPLES, *np.shape(rows[0][name])
        )
        for name in ARRAYS
    }


def capture(run: RunConfig, url: Path) -> None:
    data = open_data(run)
    capture_labels(run, data, open_teacher(run, data), str(url))
    shutil.rmtree(url / ".staging")


def freeze_open(folder: Path) -> None:
    expected = {}
    for store in VIEWS:
        capture(config(store), folder / store)
        expected |= {f"{store}/{name}": values for name, values in read_plainly(folder / store).items()}
    np.savez_compressed(folder / "expected.npz", **expected)


def freeze_packed(folder: Path) -> None:
    """STORE/NAME are the columns and what they say; STORE/whole/NAME the labels, in float32, that were packed."""
    expected = {}
    for store in VIEWS:
        capture(packed_config(store), folder / store)
        found = read_plainly(folder / store, PACKED_COLUMNS) | decode_plainly(folder / store)
        with tempfile.TemporaryDirectory() as whole:
            capture(config(store, codec={"values": "float32"}), Path(whole) / "cache")
            found |= {f"whole/{n}": v for n, v in read_plainly(Path(whole) / "cache", ARRAYS).items()}
        expected |= {f"{store}/{name}": values for name, values in found.items()}
    np.savez_compressed(folder / "expected_packed.npz", **expected)


CELL_SPECS = {"zarr": "fcos?width=8&depth=0&convs=1", "parquet": "ssdlite?width=8&depth=0"}
NUM_SCENES, NUM_CELLS = 6, 9


def cell_config(store: str, weights: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": f"golden-cells-{store}",
            "source": {
                "modality": "detection",
                "name": "scenes",
                "train_scenes": NUM_SCENES,
                "eval_scenes": 2,
            },
            "views": {"crop": "padded", "padding": 4, "flip": 0.5, "mean": [0.2], "std": [0.22]},
            "teacher": {"model": CELL_SPECS[store], "weights": str(weights)},
            "labels": {"k": K, "num_views": NUM_VIEWS, "positions": {"policy": "cells", "top": NUM_CELLS}}
            | ({} if store == "zarr" else {"temperatures": TEMPERATURES}),
            "capture": {
                "store": store,
                "codec": {"values": VALUES[store]},
                "unit_samples": 4,
                "chunk_samples": 2,
                "device": "cpu",
                "evaluate": False,
            },
            "student": {"model": CELL_SPECS[store]},
            "loss": {"temperature": 1},
            "train": {"epochs": 1, "batch_size": 3, "device": "cpu"},
        }
    )


def read_cells(url: Path) -> dict[str, np.ndarray]:
    """Returns columns [view, sample, cell, …] of a cache of cells, read without softcache."""
    manifest = json.loads((url / "manifest.json").read_text())
    if (url / "parquet").exists():
        table = pq.read_table(url / "parquet").sort_by(
            [("view", "ascending"), ("sample", "ascending"), ("position", "ascending")]
        )
        shape = (NUM_VIEWS, NUM_SCENES, NUM_CELLS, -1)
        return {
            name: np.array(table[name].to_pylist()).reshape(shape)
            for name in table.column_names
            if name not in ("view", "sample", "num_rows", "fingerprint", "position")
        }
    group = zarr.open_group(url / "labels.zarr", mode="r")
    samples = pq.read_table(url / "samples.parquet")
    per_view = -(-NUM_SCENES // manifest["plan"]["unit_samples"]) * manifest["rows"]["shard_rows"]
    firsts = [first.as_py() for first in samples["first_row"]]
    columns = {}
    for name, array in group.arrays():
        if name in ("fingerprint", "num_rows", "position", "temperature"):
            continue
        rows = [
            [array[view * per_view + first : view * per_view + first + NUM_CELLS] for first in firsts]
            for view in range(NUM_VIEWS)
        ]
        columns[name] = np.asarray(rows).reshape(NUM_VIEWS, NUM_SCENES, NUM_CELLS, -1)
    return columns


def freeze_cells(folder: Path) -> None:
    expected = {}
    for store, spec in CELL_SPECS.items():
        torch.manual_seed(0)
        model = build_detector(spec, num_classes=10, input_shape=(1, 64, 64))
        with tempfile.TemporaryDirectory() as place:
            save_file(model.state_dict(), Path(place) / "weights.safetensors")
            capture(cell_config(store, Path(place) / "weights.safetensors"), folder / store)
        expected |= {f"{store}/{name}": values for name, values in read_cells(folder / store).items()}
    np.savez_compressed(folder / "expected_cells.npz", **expected)


BERNOULLI_COLUMNS = ("ids", "logits", "dropped_bound", "dropped_mass", "fingerprint")


def bernoulli_config(store: str) -> RunConfig:
    run = config(store).model_dump(mode="json", exclude_unset=True)
    del run["labels"]["temperatures"]
    run["source"] = {"modality": "multi_label", "name": "tests.support.multi_label:digits"}
    return RunConfig.model_validate(run)


def freeze_bernoulli(folder: Path) -> None:
    expected = {}
    for store in VIEWS:
        capture(bernoulli_config(store), folder / store)
        found = read_plainly(folder / store, BERNOULLI_COLUMNS)
        expected |= {f"{store}/{name}": values for name, values in found.items()}
    np.savez_compressed(folder / "expected_bernoulli.npz", **expected)


def main(arguments: list[str]) -> None:
    ways = {
        (): (freeze_open, ""),
        ("packed",): (freeze_packed, "-packed"),
        ("cells",): (freeze_cells, "-cells"),
        ("bernoulli",): (freeze_bernoulli, "-bernoulli"),
    }
    freeze, suffix = ways[tuple(arguments)]
    folder = Path(__file__).parent / f"v{FORMAT_VERSION}{suffix}"
    if folder.exists():
        sys.exit(f"{folder} exists and is never written again; see the docstring of {__file__}")
    freeze(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
