"""The benchmarks of reading run, and every contender does the same work: the same labels of the same samples."""

import importlib
import json
import subprocess
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import __main__ as everything
from benchmarks import reading, scale
from benchmarks.codecs import labels_of
from benchmarks.made_labels import varied
from benchmarks.raw_files import drop_from_memory, resident_share
from benchmarks.synthetic_logits import text_logits
from softcache.labels.tail import log_sum_exp
from softcache.reader.open import open_cache
from softcache.teacher.capture.plan import CaptureSettings

PACKED = 1 / 256 + 1 / 256  # half a step of its own, and float16 of what it is compared with
NEAR = {  # nats: the precision that each stores
    "cache, packed, block-shuffled": PACKED,
    "cache, packed, memory map": PACKED,
    "DistillKit": 0.5,
    "TinyViT": 2e-3,
    "FKD": 2e-3,
}
LOWEST = -9.0  # of log-probabilities that are compared: peers' float16 probabilities run out of bits below


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    settings = CaptureSettings(unit_samples=128, chunk_samples=32)
    made = reading.made_images(tmp_path_factory.mktemp("images"), 300, num_classes=64, k=4, settings=settings)
    return replace(made, batch_samples=40)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    settings = {"unit_samples": 8, "chunk_samples": 2}
    folder = tmp_path_factory.mktemp("text")
    made = reading.made_text(folder, 21, num_classes=256, k=24, rows=8, settings=settings)
    return replace(made, batch_samples=4)


def contenders(made):
    return [*reading.direct_contenders(made), *reading.loader_contenders(made, 0)]


@pytest.mark.parametrize("kind", ["images", "text"])
def test_all_contenders_give_the_same_labels_of_the_same_samples(kind, request):
    made = request.getfixturevalue(kind)
    cache = open_cache(made.caches["open"])
    names = set()
    for contender in contenders(made):
        seen, near = [], NEAR.get(contender.name, PACKED if "Loader" in contender.name else 1e-6)
        for batch in contender.epoch(3):
            samples, ids, log_probs = contender.labels(batch)
            expected = cache.read(samples)
            assert contender.rows(batch) == len(expected), contender.name
            assert np.array_equal(ids, expected.ids), contender.name
            compared = expected.log_probs > LOWEST
            error = np.abs(log_probs.astype(np.float64) - expected.log_probs.astype(np.float64))[compared]
            assert error.max() <= near, contender.name
            seen += samples.tolist()
        contender.close()
        assert sorted(seen) == list(range(len(seen))), contender.name
        assert len(seen) == (made.peer_samples if contender.name in ("FKD", "DistillKit") else len(cache))
        names.add(contender.name)
    peers = {"TinyViT", "FKD"} if kind == "images" else {"Megatron-LM, in order", "DistillKit"}
    assert names > {reading.LIMIT, "memory map, column by column", "memory map", *peers}
    assert sum("memory map" in name for name in names) >= 3


def test_an_order_changes_from_epoch_to_epoch(images):
    for contender in contenders(images):
        first, second = (
            np.concatenate([contender.labels(batch).samples for batch in contender.epoch(n)]) for n in (1, 2)
        )
        contender.close()
        assert not np.array_equal(first, second), contender.name


def test_a_race_has_the_baseline_at_one_and_everybody_in_it(images):
    figures = reading.race(reading.direct_contenders(images), 1)
    assert [figure.ratio for figure in figures if figure.name == reading.LIMIT] == [1.0]
    assert len(figures) == 4
    assert all(figure.per_second > 0 for figure in figures)


def test_made_rows_are_distributions_and_all_different():
    base = labels_of(text_logits(32, 256, bfloat16=False), 24)
    labels = varied(base, 500, seed=1)
    total = log_sum_exp(np.concatenate([labels.log_probs, labels.log_tail[:, :1]], axis=1))
    assert np.abs(total).max() < 1e-5
    assert (np.diff(labels.log_probs, axis=1) <= 1e-6).all()
    assert all(len(set(row)) == 24 for row in labels.ids.tolist())
    assert labels.ids.min() >= 0
    assert labels.ids.max() < 256
    assert len(np.unique(labels.log_probs, axis=0)) == 500
    assert np.array_equal(varied(base, 500, seed=1).log_probs, labels.log_probs)


def test_files_dropped_from_memory_are_told(tmp_path):
    path = tmp_path / "some"
    path.write_bytes(bytes(1 << 20))
    assert path.read_bytes()
    assert resident_share([path]) == 1.0
    assert 0.0 <= drop_from_memory([tmp_path]) <= 1.0


def test_opening_counts_what_is_there_and_epochs_are_read_to_their_end(images):
    url = images.caches["open"]
    steps = scale.open_everything(url)
    assert set(steps) == {*scale.STEPS, "seconds", "held_bytes"}
    assert steps["seconds"] == pytest.approx(sum(steps[step] for step in scale.STEPS[:3]))
    keys = images.peers / "tinyvit" / "keys.txt"
    assert scale.parse_everything(str(keys))["keys"] == 300
    for how in ("chunks", "memmap"):
        assert scale.epoch_of(url, how, str(images.folder / "memmap"))["anonymous_bytes"] > 0


def test_reading_benchmark_writes_figures_and_a_plot(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "WORKERS", (0,))
    how = ["--quick", "--rounds", "1", "--images", "100", "--only", "images"]
    files = ["--json", str(tmp_path / "figures.json"), "--plot", str(tmp_path / "figures.svg")]
    done = CliRunner().invoke(reading.main, [*how, *files])
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert {"images, warm", "images, through a loader, 0 workers"} <= set(results)
    assert "cold: " in done.output
    assert all(rows[0]["ratio"] == 1.0 for rows in results.values())
    assert (tmp_path / "figures.svg").read_text().startswith("<?xml")


def test_all_benchmarks_run_and_a_failing_one_is_named(tmp_path, monkeypatch):
    commands = []

    def run(command, check):
        commands.append(command)
        return subprocess.CompletedProcess(command, returncode=int("benchmarks.reading" in command))

    monkeypatch.setattr(subprocess, "run", run)
    done = CliRunner().invoke(everything.main, ["--quick", "--out", str(tmp_path / "out")])
    assert [command[2] for command in commands] == [f"benchmarks.{name}" for name in everything.NAMES]
    assert all(find_spec(command[2]) for command in commands)
    assert all("--quick" in command and str(tmp_path / "out") in command[4] for command in commands)
    assert done.exit_code == 1
    assert "failed: reading" in done.output


@pytest.mark.parametrize("module", ["chunked", "buckets"])
def test_reading_by_chunks_is_measured_for_every_codec(module, tmp_path):
    path = tmp_path / "figures.json"
    main = importlib.import_module(f"benchmarks.{module}").main
    done = CliRunner().invoke(main, ["--quick", "--rounds", "1", "--json", str(path)])
    assert done.exit_code == 0, done.output
    results = json.loads(path.read_text())["results"]
    assert {title.split(",")[0] for title in results} == {"images", "text"}
    assert all(
        figures[0]["ratio"] == 1 and all(one["per_second"] > 0 for one in figures)
        for figures in results.values()
    )
