"""Caches fused into one: what is in it, that it is a cache as any other, and what is refused."""

import json
import shutil
from itertools import count

import numpy as np
import pytest
from click.testing import CliRunner

from softcache import open_cache
from softcache.config.load import load_config
from softcache.errors import (
    AlignmentError,
    ConfigError,
    CorruptionError,
    IdentityError,
    IncompleteCacheError,
    LabelError,
)
from softcache.runs import open_data, open_labels, open_teacher, train_student
from softcache.stages.cli import softcache
from softcache.tools.fuse import RULES, FusionSettings, fuse_caches, fused_labels
from softcache.tools.shrink import ShrinkSettings, shrink_cache
from softcache.tools.verify.teacher import verify_against_teacher, verify_units
from tests.support.caches import digits_config, make_cache
from tests.support.text_caches import make_text_cache, text_config

OTHER = {"teacher": {"model": "tests.fakes:known_scaled"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fusion")


@pytest.fixture(scope="module")
def images(folder):
    """Two teachers' caches of the same images: other units, another K, another store."""
    one = make_cache(folder / "one")[2]
    other = make_cache(
        folder / "other",
        **OTHER,
        labels={"k": 6},
        capture={"unit_samples": 100, "chunk_samples": 50, "store": "parquet", "codec": "packed"},
    )[2]
    return [one, other]


@pytest.fixture(scope="module")
def texts(folder):
    how = {"labels": {"k": 12, "positions": {"policy": "every", "every": 3}}}
    return [
        make_text_cache(folder / name, folder, teacher={"model": model}, **how)[2]
        for name, model in (
            ("text-one", "tests.fakes_language:known"),
            ("text-other", "tests.fakes_language:known_scaled"),
        )
    ]


def asked(rule="mean", **how):
    return FusionSettings(
        caches=("a", "b"), rule=rule, allow_weak_teachers=True, **how
    )  # theirs are untrained


@pytest.mark.parametrize("rule", RULES)
def test_every_row_is_the_fusion_of_its_rows(images, tmp_path, rule):
    found = fuse_caches(images, tmp_path / "fused", asked(rule, values="float32"))
    assert list(verify_units(found)) == []
    assert found.manifest.plan == images[0].manifest.plan
    assert found.manifest.codec["k"] == 6
    targets = images[0].samples_table().targets
    for view in range(2):
        samples = np.random.default_rng(0).permutation(300)
        stored = found.read_stored(samples, view)
        parts = [cache.read_stored(samples, view) for cache in images]
        np.testing.assert_array_equal(stored.fingerprints, parts[0].fingerprints)
        expected = fused_labels([part.labels for part in parts], rule, 6, targets=targets[samples])
        for name in ("ids", "log_probs", "log_tail", "target_log_prob", "stats"):
            np.testing.assert_array_equal(getattr(stored.labels, name), getattr(expected, name))


def test_the_identity_names_caches_and_rule(images, tmp_path):
    found = fuse_caches(images, tmp_path / "fused", asked("confidence", k=8))
    fusion = found.manifest.identity["fusion"]
    assert fusion["caches"] == [cache.manifest_sha256 for cache in images]
    assert (fusion["rule"], found.manifest.identity["labels"]["k"]) == ("confidence", 8)
    with pytest.raises(IdentityError, match=r"fusion\.rule"):
        fuse_caches(images, tmp_path / "fused", asked("mean", k=8))
    with pytest.raises(IdentityError, match=r"fusion\.caches"):
        fuse_caches(images[::-1], tmp_path / "fused", asked("confidence", k=8))


def test_texts_are_fused_row_by_row(texts, tmp_path):
    found = fuse_caches(texts, tmp_path / "fused", asked("geometric", values="float32"))
    assert list(verify_units(found)) == []
    samples = np.arange(len(found))
    stored, parts = found.read_stored(samples), [cache.read_stored(samples) for cache in texts]
    for name in ("positions", "counts", "fingerprints"):
        np.testing.assert_array_equal(getattr(stored, name), getattr(parts[0], name))
    expected = fused_labels([part.labels for part in parts], "geometric", 12)
    np.testing.assert_array_equal(stored.labels.ids, expected.ids)
    np.testing.assert_array_equal(stored.labels.log_tail, expected.log_tail)
    assert found.skips_positions


def test_a_student_reads_fused_texts(texts, folder, tmp_path):
    fused = fuse_caches(texts, tmp_path / "fused", asked())
    config = text_config(folder, labels={"positions": {"policy": "every", "every": 3}})
    dataset = open_data(config).train_dataset(config, fused)[0]
    batch = dataset.fetch([0, 3, 5])  # every token is compared with its fingerprint
    assert len(batch.labels) == batch.label_counts.sum() > 0


def test_killed_anywhere_and_run_again_it_has_the_same_bytes(images, tmp_path, monkeypatch):
    def files(cache):
        return {name: [s.sha256 for s in m.shards] for name, m in cache.markers.items()}

    whole = fuse_caches(images, tmp_path / "whole", asked())
    for place in (1, 8, 15, 4, 20, 9):
        steps = count()

        def stop(name, steps=steps, place=place):
            if next(steps) == place:
                raise KeyboardInterrupt

        monkeypatch.setattr("softcache.cache.units._failpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            fuse_caches(images, tmp_path / "torn", asked())
    monkeypatch.undo()
    done = []
    found = fuse_caches(images, tmp_path / "torn", asked(), progress=done.append)
    assert sum(done) == 600
    assert files(found) == files(whole)
    assert (tmp_path / "torn/manifest.json").read_bytes() == (tmp_path / "whole/manifest.json").read_bytes()


def test_a_fused_cache_is_slimmed_inspected_and_trained_from(images, tmp_path):
    fused = fuse_caches(images, tmp_path / "fused", asked())
    small = shrink_cache(fused, tmp_path / "small", ShrinkSettings(k=2))
    np.testing.assert_array_equal(small.read([5]).ids, fused.read([5]).ids[:, :2])
    shown = CliRunner().invoke(softcache, ["inspect", str(tmp_path / "fused")])
    assert "rule mean" in shown.output
    assert "tests.fakes:known + tests.fakes:known_scaled" in shown.output
    config = digits_config(train={"epochs": 1})
    data = open_data(config)
    result = train_student(
        config, data, model="linear", labels="cache", cache=fused, out=tmp_path / "student"
    )
    assert 0 <= result["accuracy"] <= 1
    with pytest.raises(IdentityError, match="no single one confirms it"):
        next(
            verify_against_teacher(
                fused, data.train, open_teacher(config, data), num_rows=4, threshold_nats=1e-3, seed=0
            )
        )


def test_a_config_fuses_by_itself_and_once(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = digits_config(
        fusion={"caches": [cache.url for cache in images], "rule": "geometric", "allow_weak_teachers": True}
    )
    cache = open_labels(config)
    assert cache.manifest.identity["fusion"]["rule"] == "geometric"
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / cache.url).rglob("*.json"))
    again = open_labels(config)
    assert again.url == cache.url
    assert before == sorted(
        (path, path.stat().st_mtime_ns) for path in (tmp_path / cache.url).rglob("*.json")
    )
    assert open_labels(digits_config(), images[0].url).url == images[0].url
    (tmp_path / "run.toml").write_text('[source]\nname = "digits"\n[fusion]\ncaches = ["a"]\n')
    with pytest.raises(ConfigError, match=r"fusion\.caches: .*at least 2"):
        load_config(tmp_path / "run.toml")


def test_the_command_fuses(images, tmp_path):
    urls = [cache.url for cache in images]
    out = str(tmp_path / "fused")
    done = CliRunner().invoke(softcache, ["fuse", *urls, "--rule", "best", "--out", out, "--k", "3"])
    assert "--allow-weak-teachers" in str(done.exception)  # untrained teachers
    done = CliRunner().invoke(
        softcache, ["fuse", *urls, "--rule", "best", "--out", out, "--k", "3", "--allow-weak-teachers"]
    )
    assert done.exit_code == 0, done.output
    assert "2 teachers by rule best, 10 of 10 units, K=3 of 10 classes" in done.output
    assert open_cache(out).manifest.identity["labels"]["k"] == 3


def test_a_teacher_whose_outputs_are_in_another_order_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("softcache.runs.cache.try_teacher", lambda *_, **__: None)  # which refuses it, too
    one = make_cache(tmp_path / "one", teacher={"model": "tests.fakes:nearest_mean"})[2]
    other = make_cache(tmp_path / "other", teacher={"model": "tests.fakes:nearest_mean_reversed"})[2]
    sure = FusionSettings(caches=("a", "b"))
    with pytest.raises(
        LabelError, match=r"/other: its teacher is right on \d\.\d% .* above 19\.0%.* best one's 91\.0%"
    ):
        fuse_caches([one, other], tmp_path / "no", sure)
    smaller = make_cache(tmp_path / "scaled", teacher={"model": "tests.fakes:nearest_mean"}, labels={"k": 3})[
        2
    ]
    assert len(fuse_caches([one, smaller], tmp_path / "fused", sure).markers) == 10


def test_caches_of_other_labels_are_refused(images, texts, folder, tmp_path):
    def refused(other, error, message, first=images[0]):
        with pytest.raises(error, match=message):
            fuse_caches([first, other], tmp_path / "no", asked())

    refused(images[0], LabelError, "are the same cache")
    refused(texts[0], AlignmentError, "labels of kind 'tokens'")
    other = make_text_cache(
        tmp_path / "padded",
        folder,
        teacher={"model": "tests.fakes_language:padded"},
        labels={"positions": {"policy": "every", "every": 3}},
    )[2]
    refused(other, LabelError, "fuse teachers of the same classes or vocabulary", first=texts[0])
    whole = make_text_cache(tmp_path / "whole", folder)[2]
    refused(whole, AlignmentError, "labels are of other positions", first=texts[0])
    drawn = make_cache(tmp_path / "drawn", labels={"policy": "sample", "num_samples": 3})[2]
    refused(drawn, LabelError, "drawn at random")
    grid = make_cache(tmp_path / "grid", labels={"temperatures": [1.0, 2.0]})[2]
    refused(grid, LabelError, r"stored at the temperatures \[1.0, 2.0\]")
    with pytest.raises(LabelError, match="1 cache given; at least two"):
        fuse_caches(images[:1], tmp_path / "no", asked())
    with pytest.raises(LabelError, match=r"keep 4 \+ 6 of 10, so there are at most 10"):
        fuse_caches(images, tmp_path / "no", asked(k=11))
    assert not (tmp_path / "no/manifest.json").exists()


def test_caches_of_other_samples_are_refused(images, tmp_path):
    def refused(message, **tables):
        other = make_cache(tmp_path / str(len(list(tmp_path.iterdir()))), **OTHER | tables)[2]
        with pytest.raises(AlignmentError, match=message):
            fuse_caches([images[0], other], tmp_path / "no", asked())

    refused(r"299 samples, .* has 300 \(in one of them only: ", source={"max_train_samples": 299})
    refused("1 views, .* has 2", labels={"num_views": 1})
    refused("seen through another transform", views={"padding": 2})


def test_an_unfinished_and_a_damaged_cache_are_refused(images, tmp_path):
    torn = tmp_path / "torn"
    shutil.copytree(images[1].url, torn)
    (torn / "units/00001.json").unlink()
    with pytest.raises(IncompleteCacheError, match="1 of 6 units are missing; finish it"):
        fuse_caches([images[0], open_cache(torn)], tmp_path / "no", asked())
    shutil.copytree(images[1].url, tmp_path / "damaged")
    part = sorted((tmp_path / "damaged/parquet").rglob("*.parquet"))[2]
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptionError, match="unit"):
        fuse_caches([images[0], open_cache(tmp_path / "damaged")], tmp_path / "no", asked())


def test_a_sample_whose_content_changed_is_named(images, tmp_path, monkeypatch):
    other = open_cache(images[1].url)
    read = other.read_stored

    def changed(samples, view=0):
        stored = read(samples, view)
        return stored._replace(fingerprints=np.where((samples == 77) & (view == 1), 5, stored.fingerprints))

    monkeypatch.setattr(other, "read_stored", changed)
    key = images[0].samples_table().keys[77]
    with pytest.raises(
        AlignmentError, match=rf"sample '{key}', view 1: another content \(0000000000000005, not"
    ):
        fuse_caches([images[0], other], tmp_path / "fused", asked())
    assert len(open_cache(tmp_path / "fused").markers) < 10


def test_another_source_digest_names_the_sample(images, tmp_path, monkeypatch):
    """As of a folder of images in which one file was written anew."""
    copy = tmp_path / "copy"
    shutil.copytree(images[1].url, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["identity"]["source"]["digest"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    digest = open_cache(copy).manifest_sha256
    for marker in (copy / "units").glob("*.json"):
        content = json.loads(marker.read_text()) | {"manifest_sha256": digest}
        marker.write_text(json.dumps(content))
    other = open_cache(copy)
    with pytest.raises(AlignmentError, match="another digest than that of"):
        fuse_caches([images[0], other], tmp_path / "no", asked())
    read = other.read_stored
    monkeypatch.setattr(
        other, "read_stored", lambda samples: read(samples)._replace(fingerprints=np.arange(len(samples)))
    )
    with pytest.raises(AlignmentError, match=f"sample '{other.samples_table().keys[0]}': another content"):
        fuse_caches([images[0], other], tmp_path / "no", asked())
