"""Freeze two tiny caches and the numbers in them, for tests/test_golden.py.

    .venv/bin/python -m tests.golden.make

Run once per format version, never to refresh a failing test: if today's code no longer reads what is frozen,
users' caches are no longer read either, and the code is at fault. The caches go to tests/golden/vN, where N is
the format version, and a folder that exists is never written to. The expected numbers are taken from the files
by zarr-python and pyarrow, not by softcache.

Both label the first 24 digits with a teacher whose answers are known. Between them they use every step of a
view, both stores and both dtypes of the values.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import zarr

from pipeline.config import RunConfig
from pipeline.manifest import FORMAT_VERSION
from pipeline.runs import capture_labels, open_data, open_teacher

COLUMNS = ("ids", "log_probs", "log_tail", "target_log_prob", "stats", "fingerprint")
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


def config(store: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": f"golden-{store}",
            "source": {"name": "digits", "max_train_samples": NUM_SAMPLES, "max_eval_samples": 6},
            "views": VIEWS[store],
            "teacher": {"model": "tests.fakes:known"},
            "labels": {"k": K, "num_views": NUM_VIEWS},
            "capture": {
                "store": store,
                "values": VALUES[store],
                "unit_samples": 16,
                "chunk_samples": 8,
                "device": "cpu",
            },
            "student": {"model": "linear"},
            "train": {"epochs": 2, "batch_size": 8, "device": "cpu"},
        }
    )


def read_plainly(url: Path) -> dict[str, np.ndarray]:
    """Returns every column [view, sample, …] of a cache, read without softcache."""
    if (url / "labels.zarr").exists():
        group = zarr.open_group(url / "labels.zarr", mode="r")
        return {name: np.asarray(group[name]) for name in COLUMNS}
    table = pq.read_table(url / "parquet").sort_by([("view", "ascending"), ("sample", "ascending")])
    columns = {}
    for name in COLUMNS:
        rows = table[name].combine_chunks()
        inner = rows.flatten() if hasattr(rows, "flatten") else rows
        columns[name] = inner.to_numpy(zero_copy_only=False).reshape(NUM_VIEWS, NUM_SAMPLES, -1)
        if inner is rows or len(inner) == len(rows):
            columns[name] = columns[name][..., 0]
    return columns


def main() -> None:
    folder = Path(__file__).parent / f"v{FORMAT_VERSION}"
    if folder.exists():
        sys.exit(f"{folder} exists and is never written again; see the docstring of {__file__}")
    expected = {}
    for store in VIEWS:
        run = config(store)
        data = open_data(run)
        capture_labels(run, data, open_teacher(run, data), str(folder / store))
        shutil.rmtree(folder / store / ".staging")
        expected |= {f"{store}/{name}": values for name, values in read_plainly(folder / store).items()}
    np.savez_compressed(folder / "expected.npz", **expected)


if __name__ == "__main__":
    main()
