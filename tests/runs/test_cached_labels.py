"""A student takes [labels] from its cache; what is set for its run and is something else there is refused."""

import pytest

from softcache.config.load import load_config
from softcache.errors import ConfigError, IdentityError
from softcache.reader import open_cache
from softcache.runs import open_data, train_student, with_cached_labels
from tests.support.caches import ROOT, digits_config

TEXT = """
[source]
name = "digits"
max_train_samples = 300
max_eval_samples = 100
[views]
crop = "padded"
padding = 1
mean = [0.3]
std = [0.4]
[teacher]
model = "tests.fakes:known"
[labels]
k = 3
num_views = 8
temperatures = [1.0, 3.0]
[capture]
store = "parquet"
[train]
epochs = 1
device = "cpu"
"""
GOLDEN = sorted(path.parent for path in (ROOT / "tests/golden").glob("v1*/*/manifest.json"))


@pytest.fixture
def path(tmp_path):
    (tmp_path / "run.toml").write_text(TEXT)
    return tmp_path / "run.toml"


def test_the_file_describes_a_capture_and_the_student_takes_what_is_there(
    shared_cache, path, tmp_path, capsys
):
    config, cache = load_config(path), shared_cache[2]
    taken = with_cached_labels(config, cache)
    assert (taken.labels.k, taken.labels.num_views) == (4, 2)
    assert taken.labels.identity(10) == cache.manifest.identity["labels"]
    assert "was made with labels.k = 4 (3 in the config), " in capsys.readouterr().err
    assert with_cached_labels(taken, cache) == taken
    assert capsys.readouterr().err == ""
    run = train_student(
        config, open_data(config), model="linear", labels="cache", cache=cache, out=tmp_path / "run"
    )
    assert run["accuracy"] > 0
    assert '"k": 4' in (tmp_path / "run/resolved.json").read_text()


@pytest.mark.parametrize("override", ["labels.k=3", "labels={k = 3}"])
def test_what_is_set_for_the_run_and_is_something_else_is_refused(shared_cache, path, override):
    with pytest.raises(IdentityError, match=r"labels\.k: 3 in the config, 4 in the cache") as caught:
        with_cached_labels(load_config(path, [override]), shared_cache[2])
    assert "capture.store" not in str(caught.value)
    with_cached_labels(load_config(path, ["labels.k=4", "train.epochs=2"]), shared_cache[2])


def test_another_teacher_is_refused_also_in_the_file(shared_cache, path):
    path.write_text(TEXT.replace("fakes:known", "fakes:other"))
    with pytest.raises(IdentityError, match=r"teacher\.model: 'tests\.fakes:other' in the config"):
        with_cached_labels(load_config(path), shared_cache[2])


def test_a_loss_that_the_labels_do_not_allow_is_refused(path):
    path.write_text(TEXT.replace('[teacher]\nmodel = "tests.fakes:known"\n', ""))
    config = load_config(path, ["loss.name=reverse_kl"])
    with pytest.raises(ConfigError, match=r"cache .*v1-drawn.*: loss\.name: reverse_kl cannot be estimated"):
        with_cached_labels(
            config.model_copy(update={"teacher": None}), open_cache(ROOT / "tests/golden/v1-drawn/zarr")
        )


@pytest.mark.parametrize("url", GOLDEN, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_labels_of_every_cache_are_settings_again(url):
    cache = open_cache(url)
    config = digits_config().with_overrides([]).model_copy(update={"teacher": None})
    found = with_cached_labels(config, cache).labels
    identity, again = cache.manifest.identity["labels"], found.identity(cache.num_classes)
    assert again == identity | {
        "temperatures": identity["temperatures"] or again["temperatures"]
    }  # none of coins
    assert found.num_views == cache.num_views
