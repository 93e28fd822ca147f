"""Small real caches of the embedded digits, labeled by a teacher whose answers are known."""

from contextlib import ExitStack
from pathlib import Path

from softcache.cache import units
from softcache.config.run import RunConfig
from softcache.runs import capture_labels, open_data, open_teacher
from tests.support.tables import merged

ROOT = Path(__file__).parent.parent.parent


def digits_config(**tables) -> RunConfig:
    """The digits with the known teacher; tables are merged key by key."""
    base = {
        "name": "test",
        "source": {"name": "digits", "max_train_samples": 300, "max_eval_samples": 100},
        "views": {"crop": "padded", "padding": 1, "mean": [0.3], "std": [0.4]},
        "teacher": {"model": "tests.fakes:known"},
        "labels": {"k": 4, "num_views": 2},
        "capture": {"unit_samples": 64, "chunk_samples": 32, "batch_size": 40, "device": "cpu"},
        "student": {"model": "mlp?width=8"},
        "loss": {"temperature": 4.0},
        "train": {"epochs": 2, "batch_size": 50, "device": "cpu"},
    }
    return RunConfig.model_validate(merged(base, tables))


def make_cache(url, **tables):
    """Returns (config, data, cache) of a freshly captured cache."""
    config = digits_config(**tables)
    data = open_data(config)
    cache, _ = capture_labels(config, data, open_teacher(config, data), str(url))
    return config, data, cache


def hold_unit(cache, number, monkeypatch):
    """Has another process hold a unit that is not made yet, until the first wait for it; returns the list of waits."""
    (Path(cache.url) / "units" / f"{number:05d}.json").unlink()
    other, waits = ExitStack(), []
    assert other.enter_context(cache._objects.claim(f"units/{number:05d}.lock"))

    def wait(seconds):
        waits.append(seconds)
        other.close()  # it dies

    monkeypatch.setattr(units.time, "sleep", wait)
    return waits
