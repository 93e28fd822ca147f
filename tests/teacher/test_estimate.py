"""A dry run of a capture: its bytes against a real run's, what is left of a part that is done, and that nothing is written."""

import json
import os

import pytest
from click.testing import CliRunner

from softcache.cache.storage.open import open_objects
from softcache.errors import ConfigError, IdentityError
from softcache.runs import capture_estimate, capture_labels, open_data, open_teacher
from softcache.runs.teacher import untrained_teacher
from softcache.stages.cli import softcache
from softcache.teacher.capture.estimate import estimate_capture
from tests.stages.test_cli import CONFIG
from tests.support.caches import digits_config
from tests.support.text_caches import text_config, write_texts


def estimate(url, **tables):
    config = digits_config(**tables)
    return capture_estimate(config, open_data(config), str(url))


def captured(url, **tables):
    config = digits_config(**tables)
    data = open_data(config)
    return capture_labels(config, data, open_teacher(config, data), str(url))


def size_of(cache):
    return sum(shard.num_bytes for marker in cache.markers.values() for shard in marker.shards)


@pytest.mark.parametrize("store", ["zarr", "parquet"])
@pytest.mark.parametrize("codec", ["open", "packed"])
def test_the_estimated_bytes_are_those_of_the_run(tmp_path, store, codec):
    capture = {
        "store": store,
        "codec": codec,
        "unit_samples": 600,
        "chunk_samples": 300,
        "device": "cpu",
        "batch_size": 100,
    }
    tables = {"source": {"max_train_samples": 1200}, "capture": capture}
    found = estimate(tmp_path / "cache", **tables)
    assert not (tmp_path / "cache").exists()
    cache, _ = captured(tmp_path / "cache", **tables)
    assert (found.units, found.units_left, found.rows, found.rows_left) == (4, 4, 2400, 2400)
    # Parquet's footer, some 3 kB, is counted once per chunk that was measured and is once per unit in the cache.
    assert found.num_bytes == pytest.approx(size_of(cache), rel=0.03 if store == "zarr" else 0.12)
    assert found.num_bytes_done == 0
    assert found.seconds > found.evaluate_seconds > 0


def extrapolated(config, url, num_chunks=2):
    """Returns the estimate for a capture of many chunks from two of them, and the cache that the run then makes."""
    data = open_data(config)
    teacher = open_teacher(config, data)
    found = estimate_capture(
        open_objects(str(url)),
        data=data.train,
        evaluation=data.evaluation,
        teacher=teacher,
        labels=config.labels,
        settings=config.capture,
        measure_seconds=0.0,
    )
    assert found.measured_chunks == num_chunks
    rest = found.rows_left * found.measured_seconds / found.measured_rows
    assert found.seconds == pytest.approx(found.evaluate_seconds + rest)
    cache, _ = capture_labels(config, data, teacher, str(url))
    assert found.rows == found.rows_left == sum(marker.num_rows for marker in cache.markers.values())
    return found, cache


@pytest.mark.parametrize("store", ["zarr", "parquet"])
def test_two_chunks_of_sixty_give_the_bytes_of_all(tmp_path, store):
    capture = {"store": store, "unit_samples": 1000, "chunk_samples": 100, "device": "cpu", "batch_size": 100}
    config = digits_config(
        source={"max_train_samples": None}, labels={"k": 4, "num_views": 4}, capture=capture
    )
    found, cache = extrapolated(config, tmp_path / "cache")
    assert found.rows == 1501 * 4 > 25 * 2 * 100
    if store == "zarr":
        assert found.num_bytes == pytest.approx(size_of(cache), rel=0.04)
    else:  # a file's footer is that of a unit of ten chunks, and is counted for each chunk
        assert size_of(cache) < found.num_bytes < 1.3 * size_of(cache)


def test_two_chunks_of_ragged_documents_give_the_rows_and_bytes_of_all(tmp_path):
    write_texts(tmp_path / "texts.jsonl", num_documents=1000)
    config = text_config(
        tmp_path,
        source={"packing": "documents", "seq_len": 64},
        capture={"unit_samples": 200, "chunk_samples": 20, "batch_size": 20},
    )
    found, cache = extrapolated(config, tmp_path / "cache")
    assert found.rows > 40 * found.measured_rows
    assert found.num_bytes == pytest.approx(size_of(cache), rel=0.05)


def test_what_is_done_is_not_estimated_again_and_stays_as_it_is(tmp_path):
    cache, _ = captured(tmp_path / "cache")
    whole = size_of(cache)
    for number in (0, 4):
        os.remove(tmp_path / f"cache/units/{number:05d}.json")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    found = estimate(tmp_path / "cache")
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    unit_4 = 300 - 4 * 64  # the last unit of a view is shorter
    assert (found.units_done, found.units_left) == (8, 2)
    assert (found.rows_left, found.rows_done) == (64 + unit_4, 600 - 64 - unit_4)
    assert found.num_bytes_done < whole < found.num_bytes * 1.1
    assert found.evaluate_seconds == 0, "the manifest that is there has the teacher's score"


def test_a_complete_cache_leaves_nothing(tmp_path):
    captured(tmp_path / "cache")
    found = estimate(tmp_path / "cache")
    assert (found.units_left, found.rows_left, found.num_bytes_left, found.seconds) == (0, 0, 0, 0)


def test_a_cache_of_something_else_is_refused(tmp_path):
    captured(tmp_path / "cache")
    with pytest.raises(IdentityError, match=r"labels\.k"):
        estimate(tmp_path / "cache", labels={"k": 3})


def test_a_teacher_that_is_yet_to_be_trained_is_measured_untrained(tmp_path, capsys):
    teacher = {"model": "linear", "weights": str(tmp_path / "none.safetensors")}
    tables = {
        "teacher": teacher,
        "train_teacher": {"epochs": 1},
        "capture": {"codec": "open", "device": "cpu"},
    }
    found = estimate(tmp_path / "cache", **tables)
    assert "none.safetensors yet; measured untrained" in capsys.readouterr().err
    assert os.listdir(tmp_path) == [], "nothing is written"
    config = digits_config(**tables)
    data = open_data(config)
    with untrained_teacher(config, data) as untrained:
        cache, _ = capture_labels(untrained, data, open_teacher(untrained, data), str(tmp_path / "cache"))
    assert (found.units, found.rows) == (cache.manifest.plan.num_units, cache.manifest.total_rows)
    assert found.num_bytes == pytest.approx(size_of(cache), rel=0.1)
    with pytest.raises(ConfigError, match=r"there is a cache at .*put them there again"):
        estimate(tmp_path / "cache", **tables)


def test_a_language_model_that_is_yet_to_be_trained_is_measured_untrained(tmp_path):
    write_texts(tmp_path / "texts.jsonl")
    config = text_config(
        tmp_path,
        teacher={"model": "gpt2?width=16&depth=1&heads=2", "weights": str(tmp_path / "none.safetensors")},
        train_teacher={"epochs": 1},
    )
    found = capture_estimate(config, open_data(config), str(tmp_path / "cache"))
    assert found.rows_left == found.rows > 0
    assert found.num_bytes > 0
    assert not (tmp_path / "cache").exists()


def test_the_command_prints_the_cost_and_writes_nothing(in_tmp):
    (in_tmp / "small.toml").write_text(CONFIG)
    arguments = ["teacher-logits", "--config", "small.toml", "--dry-run", "--price-per-hour", "3600"]
    shown = CliRunner().invoke(softcache, [*arguments, "--json"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert found["cost"] == pytest.approx(found["seconds"])
    assert os.listdir(in_tmp) == ["small.toml"]
    assert "nothing was written" in CliRunner().invoke(softcache, arguments).stdout


@pytest.mark.parametrize(
    ("options", "expected"),
    [(("--dry-run", "--dask", "auto"), "--dask"), (("--price-per-hour", "1"), "--dry-run")],
)
def test_options_that_do_not_go_together_are_refused(in_tmp, options, expected):
    (in_tmp / "small.toml").write_text(CONFIG)
    shown = CliRunner().invoke(softcache, ["teacher-logits", "--config", "small.toml", *options])
    assert isinstance(shown.exception, ConfigError)
    assert expected in str(shown.exception)
