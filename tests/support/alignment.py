"""What may sit between teacher and student, perturbed one thing at a time, and what the command line answers.

A case changes one world (images in memory, image files, packed text, chats) after its cache was made; `attempt` then runs
`softcache train-student` on it, as a user would, and keeps what came out. `tests/reader/test_alignment.py` holds every case to what is
expected, `python -m tests.support.alignment_table` prints the table of docs/reliability.md.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from softcache.config.load import load_config
from softcache.config.run import RunConfig
from softcache.data.sources.images.base import InMemorySource
from softcache.data.sources.text.source import load_tokenizer
from softcache.hashing.digests import digest_bytes
from softcache.runs import capture_labels, open_data, open_teacher
from softcache.stages.cli import main
from softcache.student.loop import Trainer
from tests.data.test_text_source import CHAT, save_tokenizer
from tests.support.text_caches import write_texts

Tables = dict[str, dict[str, Any]]
CPU = {"batch_size": 10, "epochs": 2, "device": "cpu"}


class Samples(NamedTuple):
    """A dataset in memory: keys, classes and images [N, 1, 8, 8]."""

    keys: list[str]
    targets: list[int]
    images: torch.Tensor

    def taken(self, order: list[int]) -> Samples:
        return Samples(
            [self.keys[n] for n in order], [self.targets[n] for n in order], self.images[torch.tensor(order)]
        )


MEMORY: dict[str, Samples] = {}


def memory_source(split: str) -> InMemorySource:
    """`source.name = "tests.support.alignment:memory_source"`: whatever MEMORY holds."""
    samples = MEMORY[split]
    return InMemorySource(
        f"own/{split}", samples.images, samples.targets, samples.keys, [str(n) for n in range(10)]
    )


class World:
    """A folder with a config, a dataset and its cache, and what a case changes of them.

    Attributes:
        tables: of the config.
        cache: where the student is to look for it.
        patch: undone when the attempt is over.
    """

    def __init__(self, kind: str, folder: Path, tables: Tables, patch: pytest.MonkeyPatch) -> None:
        self.kind, self.folder, self.tables, self.patch = kind, folder, tables, patch
        self.cache = "cache"

    def set(self, table: str, **values: Any) -> None:
        self.tables[table] = {**self.tables.get(table, {}), **values}

    def capture(self, url: str) -> None:
        """Makes a cache of the world as it is."""
        with contextlib.redirect_stderr(io.StringIO()):
            config = load_config(_write_config(self.folder, self.tables))
            data = open_data(config)
            capture_labels(config, data, open_teacher(config, data), url)

    # -- images in memory --

    @property
    def samples(self) -> Samples:
        return MEMORY["train"]

    @samples.setter
    def samples(self, samples: Samples) -> None:
        MEMORY["train"] = samples

    # -- files --

    def files(self) -> list[Path]:
        return sorted((self.folder / "images/train").rglob("*.bmp"))

    def pixels(self, path: Path) -> np.ndarray:
        return np.array(Image.open(path))

    # -- text --

    def documents(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "texts.jsonl").read_text().splitlines()]

    def write(self, documents: list[dict[str, Any]]) -> None:
        (self.folder / "texts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents))


# -- worlds ------------------------------------------------------------------------------------------------


@cache
def _all_digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return np.rint(data.images * (255 / 16)).astype(np.uint8), data.target


def digits(count: int, first: int = 0) -> Samples:
    all_images, targets = _all_digits()
    images = all_images[first : first + count, None].copy()
    keys = [f"s{number:03d}" for number in range(first, first + count)]
    return Samples(keys, targets[first : first + count].tolist(), torch.from_numpy(images))


VIEWS = {"crop": "padded", "padding": 1, "flip": 0.5, "mean": [0.3], "std": [0.4], "seed": 7}
IMAGES: Tables = {
    "views": VIEWS,
    "teacher": {"model": "tests.fakes:known"},
    "labels": {"k": 4, "num_views": 2},
    "capture": {"unit_samples": 16, "chunk_samples": 8, "device": "cpu"},
    "student": {"model": "linear"},
    "train": CPU,
}
TEXT: Tables = {
    "teacher": {"model": "tests.fakes_language:known"},
    "labels": {"k": 6},
    "capture": {"unit_samples": 8, "chunk_samples": 4, "batch_size": 4, "device": "cpu"},
    "student": {"model": "llama?width=8&depth=1&heads=2"},
    "train": {**CPU, "epochs": 1},
}
TEXT_SOURCE = {
    "modality": "text",
    "name": "hf",
    "path": "texts.jsonl",
    "key_column": "id",
    "tokenizer": "tokenizer",
    "seq_len": 32,
    "eval_share": 0.2,
    "data_dir": "data",
}


def _make_images(folder: Path) -> Tables:
    return {"source": {"name": "tests.support.alignment:memory_source"}, **IMAGES}


def _make_files(folder: Path) -> Tables:
    samples = digits(48)
    for number, (target, image) in enumerate(zip(samples.targets, samples.images, strict=True)):
        for split in ("train", "eval"):
            place = folder / "images" / split / f"class{target}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(place / f"{number:03d}.bmp")
    return {"source": {"name": "imagefolder", "root": "images"}, **IMAGES}


def _make_text(folder: Path) -> Tables:
    write_texts(folder / "texts.jsonl", num_documents=40)
    for number, name in enumerate(("tokenizer", "tokenizer2")):
        write_texts(folder / "train.jsonl", num_documents=40, seed=number)
        made = {**TEXT_SOURCE, "path": str(folder / "train.jsonl"), "data_dir": str(folder / "made")}
        source = RunConfig.model_validate(
            {"name": "t", "source": {**made, "tokenizer": "bpe?vocab_size=300"}}
        )
        load_tokenizer(source.source).save_pretrained(folder / name)
    return {"source": TEXT_SOURCE, **TEXT}


def _make_chats(folder: Path) -> Tables:
    draw = np.random.default_rng(3)

    def words(count: int) -> str:
        return " ".join(f"w{number}" for number in draw.integers(3, 100, count))

    with (folder / "texts.jsonl").open("w") as file:
        for number in range(24):
            turns = [("user", words(5)), ("assistant", words(7)), ("user", words(3)), ("assistant", words(4))]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"id": f"chat{number:02d}", "messages": messages}) + "\n")
    save_tokenizer(folder / "tokenizer", chat_template=CHAT)
    return {"source": {**TEXT_SOURCE, "messages_column": "messages"}, **TEXT}


_MAKERS: dict[str, Callable[[Path], Tables]] = {
    "images": _make_images,
    "files": _make_files,
    "text": _make_text,
    "chats": _make_chats,
}


class Worlds:
    """Each kind of world is made once below a folder, and copied for every case."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tables: dict[str, Tables] = {}

    def _made(self, kind: str) -> Tables:
        if kind not in self._tables:
            place = self._folder / "made" / kind
            place.mkdir(parents=True)
            tables = _MAKERS[kind](place)
            _reset_memory()
            with contextlib.chdir(place), pytest.MonkeyPatch.context() as patch:
                World(kind, place, tables, patch).capture("cache")
            self._tables[kind] = tables
        return {name: dict(table) for name, table in self._tables[kind].items()}

    @contextlib.contextmanager
    def copy(self, kind: str) -> Iterator[World]:
        """Yields a fresh world; its folder is the current one meanwhile, and is removed in the end."""
        tables = self._made(kind)
        place = self._folder / "copy"
        shutil.copytree(self._folder / "made" / kind, place)
        _reset_memory()
        try:
            with contextlib.chdir(place), pytest.MonkeyPatch.context() as patch:
                yield World(kind, place, tables, patch)
        finally:
            shutil.rmtree(place)


def _reset_memory() -> None:
    MEMORY.update(train=digits(48), eval=digits(24, first=100))


def _write_config(folder: Path, tables: Tables) -> str:
    lines = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items()), ""]
    staged = folder / f"run-{os.getpid()}.toml"  # another process of the run may be reading it
    staged.write_text("\n".join(lines))
    staged.replace(folder / "run.toml")
    return "run.toml"


# -- an attempt --------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """A step of the student: of which epoch and view, and for each sample its key and digests of content and labels."""

    epoch: int
    view: int
    samples: list[tuple[str, int, str]]


class Found(NamedTuple):
    """What came of an attempt: exit code, stderr, and what the student was trained on."""

    code: int
    err: str
    steps: list[Step]

    @property
    def trained(self) -> set[str]:
        """The keys of the samples that were trained on."""
        return {key for step in self.steps for key, _, _ in step.samples}

    @property
    def epochs(self) -> dict[tuple[int, int], list[tuple[str, int, str]]]:
        """What was seen in each (epoch, view), in no order."""
        seen: dict[tuple[int, int], list[tuple[str, int, str]]] = {}
        for step in self.steps:
            seen.setdefault((step.epoch, step.view), []).extend(step.samples)
        return {key: sorted(samples) for key, samples in seen.items()}

    @property
    def messages(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("softcache: ")]


def attempt(world: World, *options: str) -> Found:
    """Runs `softcache train-student` in the world's folder, in this process."""
    steps: list[Step] = []
    update = Trainer._update

    def spy(loop: Trainer, batch: Any) -> None:
        update(loop, batch)
        keys = [loop.feed.dataset._data.source.key(int(sample)) for sample in batch.samples]
        samples = list(zip(keys, batch.fingerprints.tolist(), _labels(batch), strict=True))
        if loop.feed.order.share(loop.feed.order.step - 1)[0]:
            steps.append(Step(loop.feed.order.epoch, batch.view, samples))

    world.patch.setattr(Trainer, "_update", spy)
    config = _write_config(world.folder, world.tables)
    arguments = ["train-student", "--config", config, "--cache", world.cache, "--out", "out"]
    world.patch.setattr(sys, "argv", ["softcache", *arguments, "--no-baseline", *options])
    world.patch.setenv("SOFTCACHE_MEMMAP_DIR", str(world.folder / "thaw"))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    assert (code == 0) == os.path.exists("out/metrics.json")
    return Found(code, err.getvalue(), steps)


def _labels(batch: Any) -> list[str]:
    """A digest of each sample's labels."""
    counts = getattr(batch, "label_counts", None)
    ends = np.cumsum(batch.row_counts if counts is None else counts)
    arrays = [getattr(batch.labels, name) for name in ("ids", "log_probs", "log_tail", "target_log_prob")]
    return [
        digest_bytes(b"".join(array[start:end].numpy().tobytes() for array in arrays))[:16]
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]


def attempt_elsewhere(rank: int, worlds: list[tuple[str, Path, Tables]]) -> list[Found]:
    """The same for processes of their own, one world after the other."""
    found = []
    for kind, folder, tables in worlds:
        _reset_memory()
        with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
            found.append(attempt(World(kind, folder, tables, patch)))
    return found


if __name__ == "__main__":  # a process with another environment: worlds on stdin, what was found to a file
    from tests.support import alignment

    worlds, result = pickle.loads(sys.stdin.buffer.read())
    Path(result).write_bytes(pickle.dumps(alignment.attempt_elsewhere(0, worlds)))
