"""Freeze tiny caches and the numbers in them, for tests/cache/test_golden*.py.

    .venv/bin/python -m tests.golden.make
    .venv/bin/python -m tests.golden.make packed
    .venv/bin/python -m tests.golden.make cells
    .venv/bin/python -m tests.golden.make bins
    .venv/bin/python -m tests.golden.make bernoulli
    .venv/bin/python -m tests.golden.make drawn
    .venv/bin/python -m tests.golden.make tokens
    .venv/bin/python -m tests.golden.make wide
    .venv/bin/python -m tests.golden.make folded
    .venv/bin/python -m tests.golden.make hidden

Run once per format version and codec, never to refresh a failing test: if today's code no longer reads what is frozen,
users' caches are no longer read either, and the code is at fault. The caches go to tests/golden/vN, where N is
the format version, or tests/golden/vN-packed, and a folder that exists is never written to. The expected numbers are taken from the files
by zarr-python and pyarrow, not by softcache; packed records are decoded by tests/support/plain_packed.py.

Two label the first 24 digits with a teacher whose answers are known. Between them they use every step of a
view, both stores and both dtypes of the values. Those of cells label 6 scenes with detectors that were never trained: one
of sigmoids in Zarr, one with a softmax in Parquet; of bins both have distributions over the edges of boxes.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import zarr
from safetensors.torch import save_file

from softcache.cache import finished, folding
from softcache.cache.codecs import OpenCodec, PackedCodec
from softcache.cache.create import create_cache
from softcache.cache.manifest import FORMAT_VERSION, Manifest, Plan, marker_path
from softcache.cache.samples import encode_samples
from softcache.cache.storage.open import open_objects
from softcache.cache.units import open_index, open_store, publish_unit
from softcache.config.run import RunConfig
from softcache.hashing.digests import digest_bytes
from softcache.labels import SoftLabels
from softcache.labels.sparsify import top_k
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
BIN_SPECS = dict.fromkeys(CELL_SPECS, "fcos?width=8&depth=0&convs=1&bins=3")
NUM_SCENES, NUM_CELLS = 6, 9


def cell_config(store: str, weights: Path, specs: dict[str, str] = CELL_SPECS) -> RunConfig:
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
            "teacher": {"model": specs[store], "weights": str(weights)},
            "labels": {"k": K, "num_views": NUM_VIEWS, "positions": {"policy": "cells", "top": NUM_CELLS}}
            | ({} if specs[store].startswith("fcos") else {"temperatures": TEMPERATURES}),
            "capture": {
                "store": store,
                "codec": {"values": VALUES[store]},
                "unit_samples": 4,
                "chunk_samples": 2,
                "device": "cpu",
                "evaluate": False,
            },
            "student": {"model": specs[store]},
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


def freeze_cells(folder: Path, specs: dict[str, str] = CELL_SPECS) -> None:
    expected = {}
    for store, spec in specs.items():
        torch.manual_seed(0)
        model = build_detector(spec, num_classes=10, input_shape=(1, 64, 64))
        with tempfile.TemporaryDirectory() as place:
            save_file(model.state_dict(), Path(place) / "weights.safetensors")
            capture(cell_config(store, Path(place) / "weights.safetensors", specs), folder / store)
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


# -- caches of which `expected.npz` holds the columns, named by store: CACHE/NAME --------------------------------------

DRAWN = {
    "zarr": {"policy": "sample", "num_samples": 12, "seed": 5, "temperatures": [1.0, 2.0, 4.0]},
    "parquet": {"policy": "hybrid", "k": 2, "num_samples": 3, "seed": 5, "temperatures": [1.0, 2.0, 4.0]},
}
TEXT_LABELS = {
    "zarr": {"k": K},
    "parquet": {"k": K, "positions": {"policy": "every", "every": 3}},
}
WIDE_CLASSES = 70_000
"""More than fit into uint16."""


def read_columns(url: Path) -> dict[str, np.ndarray]:
    """Returns the columns of a cache as they are stored: whole arrays, or the rows of all files one after the other."""
    if (url / "labels.zarr").exists():
        group = zarr.open_group(url / "labels.zarr", mode="r")
        return {name: np.asarray(array) for name, array in group.arrays() if name != "temperature"}
    columns: dict[str, list[np.ndarray]] = {}
    for path in sorted((url / "parquet").iterdir()):
        table = pq.ParquetFile(path).read()
        for name in table.column_names:
            values = table[name].combine_chunks()
            if name == "record":
                part = np.stack([np.frombuffer(row, np.uint8) for row in values.to_pylist()])
            else:
                part = np.stack([np.asarray(row) for row in values.to_numpy(zero_copy_only=False)])
            columns.setdefault(name, []).append(part)
    return {name: np.concatenate(parts) for name, parts in columns.items()}


HIDDEN = {
    "zarr": {"values": "bfloat16"},
    "parquet": {"values": "int8", "positions": {"policy": "every", "every": 3}},
    "zarr-coordinates": {"values": "float8_e4m3", "components": 6},
    "parquet-float32": {"values": "float32", "components": 4},
}


def hidden_config(name: str, texts: Path, work: Path) -> RunConfig:
    """Of the texts that are frozen with the caches of tokens."""
    run = text_config(name.partition("-")[0], texts, work).model_dump(mode="json", exclude_unset=True)
    run["labels"] = {"policy": "hidden", **HIDDEN[name]}
    del run["capture"]["codec"]
    return RunConfig.model_validate(run)


def drawn_config(store: str) -> RunConfig:
    run = config(store, codec={"values": VALUES[store]}).model_dump(mode="json", exclude_unset=True)
    run["labels"] = {"num_views": NUM_VIEWS, **DRAWN[store]}
    return RunConfig.model_validate(run)


def text_config(store: str, texts: Path, work: Path) -> RunConfig:
    """Of documents in a file that is frozen too; the tokenizer is trained on them."""
    return RunConfig.model_validate(
        {
            "name": f"golden-tokens-{store}",
            "source": {
                "modality": "text",
                "name": "hf",
                "path": str(texts),
                "key_column": "id",
                "tokenizer": "bpe?vocab_size=300",
                "packing": "documents",
                "seq_len": 24,
                "eval_share": 0.2,
                "data_dir": str(work),
            },
            "teacher": {"model": "tests.fakes_language:known"},
            "labels": {"temperatures": TEMPERATURES, **TEXT_LABELS[store]},
            "capture": {
                "store": store,
                "codec": {"values": VALUES[store]},
                "unit_samples": 6,
                "chunk_samples": 3,
                "device": "cpu",
                "evaluate": False,
            },
            "student": {"model": "llama?width=16&depth=1&heads=2"},
            "train": {"epochs": 1, "batch_size": 4, "device": "cpu"},
        }
    )


def wide_labels(num_samples: int = 12) -> SoftLabels:
    """Labels of a teacher with more classes than fit into uint16; some rows have fewer possible ones than slots."""
    random = np.random.default_rng(0)
    logits = torch.from_numpy((random.normal(size=(num_samples, WIDE_CLASSES)) * 4).astype(np.float32))
    logits[3] = logits[3].bfloat16().float()
    logits[5, 2:] = -torch.inf
    targets = torch.arange(num_samples) * 6_000
    return top_k(logits, k=5, targets_P=targets, temperatures=tuple(TEMPERATURES)).to_numpy()


def wide_codecs() -> dict[str, OpenCodec | PackedCodec]:
    grid = tuple(TEMPERATURES)
    return {
        "zarr": OpenCodec(WIDE_CLASSES, 5, grid),
        "parquet": OpenCodec(WIDE_CLASSES, 5, grid, values="float32"),
        "zarr-packed": PackedCodec(WIDE_CLASSES, 5, grid, step=None, tail="float32"),
        "parquet-packed": PackedCodec(WIDE_CLASSES, 5, grid, step=STEP),
    }


def step_codecs() -> dict[str, PackedCodec]:
    return dict.fromkeys(
        VIEWS, PackedCodec(WIDE_CLASSES, 5, tuple(TEMPERATURES), step=STEP, tail="steps", level=16)
    )


def write_wide(url: Path, name: str, codec: OpenCodec | PackedCodec) -> None:
    """A cache that no source stands behind, of labels that are given."""
    labels, store = wide_labels(), name.partition("-")[0]
    samples = encode_samples([f"sample {n}" for n in range(len(labels))], np.arange(len(labels)) * 6_000)
    manifest = Manifest(
        softcache_version="golden",
        kind="image",
        identity={
            "teacher": {"spec": "random numbers", "dtype": "float32"},
            "source": {"name": "none", "digest": "0" * 64, "num_samples": len(labels)},
            "views": {"digest": "0" * 64, "num_views": 1, "settings": {}},
            "labels": {"policy": "top_k", "k": 5, "temperatures": TEMPERATURES},
            "codec": codec.to_dict(),
        },
        num_classes=WIDE_CLASSES,
        codec=codec.to_dict(),
        plan=Plan(num_samples=len(labels), num_views=1, unit_samples=8, chunk_samples=4),
        store=store,
        data="labels.zarr" if store == "zarr" else "parquet",
        samples_sha256=digest_bytes(samples),
        features=codec.features,
        attributes={"note": "uint32 ids"},
    )
    objects = open_objects(str(url), create=True)
    manifest, digest = create_cache(objects, manifest, samples)
    columns = codec.encode(labels) | {"fingerprint": np.arange(1, len(labels) + 1, dtype=np.uint64)}
    for unit in manifest.plan.units():
        part = {column: values[unit.start : unit.stop] for column, values in columns.items()}
        publish_unit(objects, open_store(manifest, objects), digest, unit, part)
    shutil.rmtree(url / ".staging")


def freeze_drawn(folder: Path) -> None:
    for store in VIEWS:
        capture(drawn_config(store), folder / store)
    _freeze_columns(folder)


def freeze_tokens(folder: Path) -> None:
    folder.mkdir()
    random, words = (
        np.random.default_rng(3),
        ["a", "cache", "of", "what", "the", "teacher", "knows", "and", "a", "student", "learns"],
    )
    lines = [
        {"id": f"text {n}", "text": " ".join(random.choice(words, int(random.integers(2, 12))))}
        for n in range(14)
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for store in VIEWS:
        with tempfile.TemporaryDirectory() as work:
            texts = (folder / "texts.jsonl").relative_to(Path.cwd())  # its name is in the manifest
            capture(text_config(store, texts, Path(work)), folder / store)
    _freeze_columns(folder)


def freeze_hidden(folder: Path) -> None:
    texts = (folder.parent / f"v{FORMAT_VERSION}-tokens/texts.jsonl").relative_to(Path.cwd())
    for name in HIDDEN:
        with tempfile.TemporaryDirectory() as work:
            capture(hidden_config(name, texts, Path(work)), folder / name)
    _freeze_columns(folder)


def freeze_wide(folder: Path, codecs: Mapping[str, OpenCodec | PackedCodec]) -> None:
    for name, codec in codecs.items():
        write_wide(folder / name, name, codec)
    _freeze_columns(folder)


def _freeze_columns(folder: Path) -> None:
    caches = sorted(path for path in folder.iterdir() if path.is_dir())
    found = {f"{url.name}/{name}": values for url in caches for name, values in read_columns(url).items()}
    np.savez_compressed(folder / "expected.npz", **found)


def freeze_folded(folder: Path) -> None:
    """The first caches again, units 0 and 2 in two generations of a block of folded markers."""
    finished.MIN_FOLDED_UNITS = folding.MIN_LOOSE = 1
    for store in ("zarr", "parquet"):
        shutil.copytree(folder.parent / f"v{FORMAT_VERSION}" / store, folder / store)
        objects = open_objects(str(folder / store))
        manifest = Manifest.parse(objects.get("manifest.json"), where=store)
        index = open_index(objects, manifest, digest_bytes(manifest.to_bytes()))
        for number in (0, 2):
            others = [marker_path(other) for other in range(4) if other != number]
            kept = {path: objects.get(path) for path in others if objects.size(path) is not None}
            for path in kept:
                objects.delete(path)
            folding.KEPT_LOOSE = 0
            folding.fold_markers(index)
            for path, data in kept.items():
                objects.put(path, data)
        shutil.rmtree(folder / store / ".staging", ignore_errors=True)


def main(arguments: list[str]) -> None:
    ways = {
        (): (freeze_open, ""),
        ("packed",): (freeze_packed, "-packed"),
        ("cells",): (freeze_cells, "-cells"),
        ("bins",): (partial(freeze_cells, specs=BIN_SPECS), "-bins"),
        ("bernoulli",): (freeze_bernoulli, "-bernoulli"),
        ("drawn",): (freeze_drawn, "-drawn"),
        ("tokens",): (freeze_tokens, "-tokens"),
        ("wide",): (partial(freeze_wide, codecs=wide_codecs()), "-wide"),
        ("steps",): (partial(freeze_wide, codecs=step_codecs()), "-steps"),
        ("folded",): (freeze_folded, "-folded"),
        ("hidden",): (freeze_hidden, "-hidden"),
    }
    freeze, suffix = ways[tuple(arguments)]
    folder = Path(__file__).parent / f"v{FORMAT_VERSION}{suffix}"
    if folder.exists():
        sys.exit(f"{folder} exists and is never written again; see the docstring of {__file__}")
    freeze(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
