"""Everything that writes a cache or a materialized view, each on a small source, to be interrupted and run again."""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import softcache.cache.units
import softcache.teacher.capture.run
from softcache.cache.storage.open import open_objects
from softcache.reader.memmap import MemmapSettings
from softcache.reader.open import open_cache
from softcache.runs import capture_labels, open_data, open_teacher
from softcache.tools.convert import convert_cache
from softcache.tools.fuse import FusionSettings, fuse_caches
from softcache.tools.garbage import GarbageReport, collect_garbage
from softcache.tools.import_logprobs import find_responses, import_labels
from softcache.tools.shrink import ShrinkSettings, shrink_cache
from softcache.tools.verify.teacher import verify_units
from tests.chaos.processes import Child
from tests.support.caches import digits_config
from tests.support.text_caches import text_config

__all__ = ["Scenario", "make_scenarios"]


@dataclass(frozen=True)
class Scenario:
    """One kind of work that writes under a folder.

    Attributes:
        name: of the work.
        work: does it, or what is left of it, into a folder.
        is_cache: whether it writes a cache; else materialized views.
    """

    name: str
    work: Callable[[Path], None]
    is_cache: bool = True

    def finish(self, root: Path, report: Path) -> None:
        """Does the work whole, collects what is stray, and verifies; in a child."""
        self.work(root)
        if self.is_cache:
            found: GarbageReport = collect_garbage(open_objects(str(root)), delete=True, older_than=0)
            assert not found.held, found
            assert not found.foreign, found
            faults = list(verify_units(open_cache(str(root))))
            assert not faults, faults
            report.write_text(str(len(found.stray)))
        else:
            report.write_text("0")


def _images(folder: Path, store: str, codec: str = "open", teacher: str = "known") -> Scenario:
    capture = {"unit_samples": 16, "chunk_samples": 8, "evaluate": False, "store": store, "codec": codec}
    config = digits_config(
        source={"max_train_samples": 40, "max_eval_samples": 20},
        capture=capture,
        teacher={"model": f"tests.fakes:{teacher}"},
    )
    data = open_data(config)

    def work(root: Path) -> None:
        capture_labels(config, data, open_teacher(config, data), str(root))

    return Scenario(f"capture, images, {store}{' packed' * (codec == 'packed')}", work)


def _texts(folder: Path, store: str) -> Scenario:
    config = text_config(
        folder, capture={"unit_samples": 12, "chunk_samples": 6, "evaluate": False, "store": store}
    )
    data = open_data(config)

    def work(root: Path) -> None:
        capture_labels(config, data, open_teacher(config, data), str(root))

    return Scenario(f"capture, text, {store}", work)


def _convert(made: Path, store: str) -> Scenario:
    def work(root: Path) -> None:
        convert_cache(open_cache(str(made)), str(root), store=store)

    return Scenario(f"convert to {store}", work)


def _shrink(made: Path) -> Scenario:
    def work(root: Path) -> None:
        shrink_cache(open_cache(str(made)), str(root), ShrinkSettings(k=2, codec="packed"))

    return Scenario("shrink", work)


def _fuse(made: Path, other: Path) -> Scenario:
    def work(root: Path) -> None:
        caches = [open_cache(str(place)) for place in (made, other)]
        fuse_caches(
            caches,
            str(root),
            FusionSettings(caches=(str(made), str(other)), rule="geometric", allow_weak_teachers=True),
        )

    return Scenario("fuse", work)


def _materialize(made: Path) -> Scenario:
    def work(root: Path) -> None:
        cache = open_cache(str(made), memmap=MemmapSettings(1 << 24, str(root), required=True))
        for view in range(cache.num_views):
            assert cache.memmap(view) is not None

    return Scenario("materialize", work, is_cache=False)


def _import(folder: Path) -> Scenario:
    config = text_config(
        folder, source={"packing": "documents", "max_train_samples": 20, "max_eval_samples": 8}
    )
    data = open_data(config)
    settings = config.capture.model_copy(update={"unit_samples": 4, "chunk_samples": 2})
    _write_answers(folder / "responses.jsonl", data)

    def work(root: Path) -> None:
        responses = find_responses([str(folder / "responses.jsonl")], data.train.source)
        import_labels(responses, data.train, str(root), k=4, settings=settings, model_name="a-server")

    return Scenario("import", work)


def _write_answers(path: Path, data: Any) -> None:
    """What a server would say of every sample, made up: five tokens in each place, the actual one among them."""
    source, draw, lines = data.train.source, np.random.default_rng(0), []
    for number, key in enumerate(source.keys()):
        tokens = source.sample(number).tokens.tolist()
        rows: list[dict[str, float] | None] = [None]
        for token in tokens[1:]:
            others = [int(t) for t in draw.permutation(source.vocab_size)[:5] if t != token][:4]
            likely = dict(zip(map(str, others), np.log([0.4, 0.2, 0.1, 0.05]).tolist(), strict=True))
            rows.append(likely | {str(token): float(np.log(0.02))})
        answer = {"key": key, "model": "a-server", "prompt_token_ids": tokens, "prompt_logprobs": rows}
        lines.append(json.dumps(answer) + "\n")
    path.write_text("".join(lines))


def _warm(folder: Path) -> None:
    """Does once, in Parquet, what children do: compiled code is then loaded, and modules are imported.

    Parquet alone: TensorStore must not be used before a fork, but it may be imported.
    """
    for module in ("tensorstore", "zarr.api.asynchronous", "zarr.storage", "zarr.codecs", "pyarrow.parquet"):
        importlib.import_module(module)
    for scenario in (
        _images(folder, "parquet"),
        _images(folder, "parquet", "packed"),
        _texts(folder, "parquet"),
    ):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            scenario.work(Path(place))
            verify = list(verify_units(open_cache(place)))
            assert not verify, verify


def make_scenarios(folder: Path, names: Collection[str] | None = None) -> list[Scenario]:
    """Returns those of these names, or all; caches that some start from are made in children, so that this process stays
    fit to fork."""
    softcache.teacher.capture.run.CLAIM_POLL_SECONDS = softcache.cache.units.WAIT_SECONDS = 0.02
    _warm(folder)
    makers: dict[str, Callable[[], Scenario]] = {
        "capture, images, parquet": lambda: _images(folder, "parquet"),
        "capture, images, zarr": lambda: _images(folder, "zarr"),
        "capture, images, zarr packed": lambda: _images(folder, "zarr", "packed"),
        "capture, text, parquet": lambda: _texts(folder, "parquet"),
        "capture, text, zarr": lambda: _texts(folder, "zarr"),
        "convert to parquet": lambda: _convert(_made(folder, "zarr"), "parquet"),
        "convert to zarr": lambda: _convert(_made(folder, "parquet"), "zarr"),
        "shrink": lambda: _shrink(_made(folder, "zarr")),
        "fuse": lambda: _fuse(_made(folder, "zarr"), _made(folder, "parquet", "known_scaled")),
        "import": lambda: _import(folder),
        "materialize": lambda: _materialize(_made(folder, "zarr")),
    }
    return [make() for name, make in makers.items() if names is None or name in names]


def _made(folder: Path, store: str, teacher: str = "known") -> Path:
    """Returns a whole cache of images."""
    place = folder / f"made-{store}-{teacher}"
    if not place.exists():
        scenario = _images(folder, store, teacher=teacher)
        child = Child(lambda: scenario.work(place), folder / "log")
        assert child.wait() == 0, child.log_text()
    return place
