"""A dry run of a capture: its bytes against a real run's, what is left of a part that is done, and that nothing is written."""

import json
import os

import pytest
from click.testing import CliRunner

from softcache.cache.storage.open import open_objects
from softcache.errors import ConfigError, IdentityError
from softcache.runs import capture_estimate, capture_labels, open_data, open_teacher
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
    told = estimate(tmp_path / "cache", **tables)
    assert not (tmp_path / "cache").exists()
    cache, _ = captured(tmp_path / "cache", **tables)
    assert (told.units, told.units_left, told.rows, told.rows_left) == (4, 4, 2400, 2400)
    # Parquet's footer, some 3 kB, is counted once per chunk that was measured and is once per unit in the cache.
    assert told.num_bytes == pytest.approx(size_of(cache), rel=0.03 if store == "zarr" else 0.12)
    assert told.num_bytes_done == 0
    assert told.seconds > told.evaluate_seconds > 0


def extrapolated(config, url, num_chunks=2):
    """Returns what is told of a capture of many chunks from two of them, and the cache that the run then makes."""
    data = open_data(config)
    teacher = open_teacher(config, data)
    told = estimate_capture(
        open_objects(str(url)),
        data=data.train,
        evaluation=data.evaluation,
        teacher=teacher,
        labels=config.labels,
        settings=config.capture,
        measure_seconds=0.0,
    )
    assert told.measured_chunks == num_chunks
    rest = told.rows_left * told.measured_seconds / told.measured_rows
    assert told.seconds == pytest.approx(told.evaluate_seconds + rest)
    cache, _ = capture_labels(config, data, teacher, str(url))
    assert told.rows == told.rows_left == sum(marker.num_rows for marker in cache.markers.values())
    return told, cache


@pytest.mark.parametrize("store", ["zarr", "parquet"])
def test_two_chunks_of_sixty_tell_the_bytes_of_all(tmp_path, store):
    capture = {"store": store, "unit_samples": 1000, "chunk_samples": 100, "device": "cpu", "batch_size": 100}
    config = digits_config(
        source={"max_train_samples": None}, labels={"k": 4, "num_views": 4}, capture=capture
    )
    told, cache = extrapolated(config, tmp_path / "cache")
    assert told.rows == 1501 * 4 > 25 * 2 * 100
    if store == "zarr":
        assert told.num_bytes == pytest.approx(size_of(cache), rel=0.04)
    else:  # a file's footer is that of a unit of ten chunks, and is counted for each chunk
        assert size_of(cache) < told.num_bytes < 1.3 * size_of(cache)


def test_two_chunks_of_ragged_documents_tell_the_rows_and_bytes_of_all(tmp_path):
    write_texts(tmp_path / "texts.jsonl", num_documents=1000)
    config = text_config(
        tmp_path,
        source={"packing": "documents", "seq_len": 64},
        capture={"unit_samples": 200, "chunk_samples": 20, "batch_size": 20},
    )
    told, cache = extrapolated(config, tmp_path / "cache")
    assert told.rows > 40 * told.measured_rows
    assert told.num_bytes == pytest.approx(size_of(cache), rel=0.05)


def test_what_is_done_is_not_estimated_again_and_stays_as_it_is(tmp_path):
    cache, _ = captured(tmp_path / "cache")
    whole = size_of(cache)
    for number in (0, 4):
        os.remove(tmp_path / f"cache/units/{number:05d}.json")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    told = estimate(tmp_path / "cache")
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    unit_4 = 300 - 4 * 64  # the last unit of a view is shorter
    assert (told.units_done, told.units_left) == (8, 2)
    assert (told.rows_left, told.rows_done) == (64 + unit_4, 600 - 64 - unit_4)
    assert told.num_bytes_done < whole < told.num_bytes * 1.1
    assert told.evaluate_seconds == 0, "the manifest that is there has the teacher's score"


def test_a_complete_cache_leaves_nothing(tmp_path):
    captured(tmp_path / "cache")
    told = estimate(tmp_path / "cache")
    assert (told.units_left, told.rows_left, told.num_bytes_left, told.seconds) == (0, 0, 0, 0)


def test_a_cache_of_something_else_is_refused(tmp_path):
    captured(tmp_path / "cache")
    with pytest.raises(IdentityError, match=r"labels\.k"):
        estimate(tmp_path / "cache", labels={"k": 3})


def test_a_teacher_without_weights_is_refused(tmp_path):
    teacher = {"model": "linear", "weights": str(tmp_path / "none.safetensors")}
    with pytest.raises(ConfigError, match="softcache train-teacher"):
        estimate(tmp_path / "cache", teacher=teacher, train_teacher={"epochs": 1})


def test_the_command_tells_the_cost_and_writes_nothing(in_tmp):
    (in_tmp / "small.toml").write_text(CONFIG)
    arguments = ["teacher-logits", "--config", "small.toml", "--dry-run", "--price-per-hour", "3600"]
    shown = CliRunner().invoke(softcache, [*arguments, "--json"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert found["cost"] == pytest.approx(found["seconds"])
    assert os.listdir(in_tmp) == ["small.toml"]
    assert "nothing was written" in CliRunner().invoke(softcache, arguments).stdout


@pytest.mark.parametrize(
    ("options", "told"),
    [(("--dry-run", "--dask", "auto"), "--dask"), (("--price-per-hour", "1"), "--dry-run")],
)
def test_options_that_do_not_go_together_are_told(in_tmp, options, told):
    (in_tmp / "small.toml").write_text(CONFIG)
    shown = CliRunner().invoke(softcache, ["teacher-logits", "--config", "small.toml", *options])
    assert isinstance(shown.exception, ConfigError)
    assert told in str(shown.exception)
