"""Labels at some positions only: which ones, against a slow reference, the same again, and what they cost."""

import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
import torch
import xxhash
from click.testing import CliRunner

from softcache.config.load import load_config
from softcache.errors import ConfigError, IdentityError
from softcache.labels.positions import PositionSettings, chosen_rows, highest_rows
from softcache.reader.dataset import SoftLabelDataset
from softcache.runs import capture_labels, open_teacher, train_student
from softcache.stages.cli import softcache
from softcache.teacher.capture.plan import plan_manifest
from softcache.teacher.language import LanguageTeacher
from softcache.tools.convert import convert_cache
from tests.modalities.test_text_runs import distributions
from tests.support.caches import digits_config
from tests.support.position_caches import POLICIES, STUDENT, Made, chat_source


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    return Made(folder, chat_source(folder))


@pytest.fixture(params=["packed", "chats"])
def made(request):
    return request.getfixturevalue(request.param)


# -- which rows --------------------------------------------------------------------------------------------


def slow_choice(settings, key, positions, entropy):
    """The numbers of the chosen rows of one sample, with Python's own integers and fractions."""
    num_rows = len(positions)
    if settings.policy == "every":
        return [row for row in range(num_rows) if row % settings.every == 0]
    exact = Fraction(str(settings.share)) * num_rows
    wanted = -(-exact.numerator // exact.denominator)

    def number(position):
        z = xxhash.xxh3_64_intdigest(key.encode(), settings.seed) + (position + 1) * 0x9E3779B97F4A7C15
        z %= 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    score = entropy if settings.policy == "entropy" else [number(position) for position in positions]
    return sorted(sorted(range(num_rows), key=lambda row: (-score[row], row))[:wanted])


@pytest.mark.parametrize("policy", POLICIES)
def test_the_rows_are_those_of_the_policy_and_hold_the_teachers_distribution_there(made, policy):
    settings = PositionSettings(**POLICIES[policy])
    whole, cache, source = made.cache(), made.cache(policy), made.data.train.source
    teacher = open_teacher(made.config(), made.data)
    for sample in range(len(cache)):
        positions = source.sample(sample).rows.tolist()
        rows = slow_choice(settings, source.key(sample), positions, whole.read([sample]).stats[:, 0].tolist())
        stored = cache.read_stored([sample])
        assert stored.positions.tolist() == [positions[row] for row in rows]
        assert len(stored.labels) == settings.counts(np.array([len(positions)]))[0]
        if sample % 5:
            continue
        expected = distributions(teacher.model, source, sample)
        for place, row in enumerate(rows):
            log_probs, target = expected[row]
            ids = stored.labels.ids[place].astype(int)
            assert stored.labels.target_log_prob[place] == pytest.approx(float(log_probs[target]), abs=1e-4)
            np.testing.assert_allclose(stored.labels.log_probs[place], log_probs[ids], atol=4e-3)


def test_how_many_rows_are_known_before_the_teacher_runs():
    for share in (0.07, 0.1, 0.25, 0.3, 0.55, 1 / 3, 0.7, 1.0, 1e-12):
        settings, n = PositionSettings(policy="entropy", share=share), np.arange(1, 2000)
        exact = [Fraction(str(share)) * number for number in n.tolist()]
        np.testing.assert_array_equal(
            settings.counts(n), [-(-wanted.numerator // wanted.denominator) for wanted in exact]
        )
    assert PositionSettings(policy="random", share=0.5).counts(np.array([0, 1, 2])).tolist() == [0, 1, 1]


def test_random_rows_are_a_fair_draw_of_the_share():
    settings = PositionSettings(policy="random", share=0.25)
    keys, row_counts = [f"document {n}@0" for n in range(2000)], np.full(2000, 16)
    positions = np.tile(np.arange(16), 2000)
    rows = chosen_rows(settings, keys, row_counts, positions)
    assert np.bincount(rows // 16).tolist() == [4] * 2000
    by_position = np.bincount(rows % 16) / 2000
    assert np.abs(by_position - 0.25).max() < 5 * (0.25 * 0.75 / 2000) ** 0.5
    other = chosen_rows(settings.model_copy(update={"seed": 1}), keys, row_counts, positions)
    assert 0.2 < np.isin(other, rows).mean() < 0.3
    half = rows[rows < 16 * 1000]
    np.testing.assert_array_equal(
        chosen_rows(settings, keys[:1000], row_counts[:1000], positions[:16000]), half
    )


def test_of_equal_scores_the_earlier_row_is_taken():
    scores = torch.tensor([1.0, 3.0, 3.0, 3.0, 2.0, 2.0, 2.0, 9.0])
    found = highest_rows(scores, np.array([4, 3, 1]), np.array([2, 1, 1]))
    assert found.tolist() == [1, 2, 4, 7]
    assert highest_rows(scores[:0], np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []
    assert highest_rows(scores, np.array([4, 0, 3, 1]), np.array([0, 0, 3, 1])).tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("policy", ["every", "random"])
def test_the_teachers_head_runs_on_the_chosen_rows_alone(packed, tmp_path, monkeypatch, policy):
    seen, real = [], LanguageTeacher.chunks

    def spy(self, batch):
        for logits_PV in real(self, batch):
            seen.append(len(logits_PV))
            yield logits_PV

    monkeypatch.setattr(LanguageTeacher, "chunks", spy)
    monkeypatch.setattr("softcache.runs.cache.try_teacher", lambda *_, **__: None)
    config = packed.config(policy, capture={"evaluate": False})
    cache, report = capture_labels(
        config, packed.data, open_teacher(config, packed.data), str(tmp_path / "c")
    )
    assert sum(seen) == report.rows == cache.manifest.rows.num_rows
    assert sum(seen) < 0.45 * packed.data.train.source.num_rows().sum()


# -- the same rows again -----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_killed_and_run_again_it_has_the_same_bytes(packed, tmp_path, monkeypatch, policy):
    config, data, url = packed.config(policy), packed.data, str(tmp_path / "cache")
    for point in ("after_shard", "before_marker"):
        count = itertools.count()

        def dies(name, point=point, count=count):
            if name == point and next(count) == 1:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("softcache.cache.units._failpoint", dies)
            with pytest.raises(KeyboardInterrupt):
                capture_labels(config, data, open_teacher(config, data), url)
    again, report = capture_labels(config, data, open_teacher(config, data), url)
    assert report.units_found >= 1
    for number, marker in packed.cache(policy).markers.items():
        assert [s.sha256 for s in again.markers[number].shards] == [s.sha256 for s in marker.shards]


@pytest.mark.parametrize("policy", ["every", "random"])
def test_other_batches_units_and_processes_choose_the_same_rows(packed, tmp_path, policy):
    layout = {"unit_samples": 6, "chunk_samples": 2, "batch_size": 5, "chunk_positions": 100, "workers": 2}
    config = packed.config(policy, capture=layout)
    other, _ = capture_labels(config, packed.data, open_teacher(config, packed.data), str(tmp_path / "cache"))
    cache = packed.cache(policy)
    everything = np.arange(len(cache))
    one, two = cache.read_stored(everything), other.read_stored(everything)
    np.testing.assert_array_equal(one.positions, two.positions)
    np.testing.assert_allclose(one.labels.target_log_prob, two.labels.target_log_prob, atol=1e-4)


# -- bytes and identity ------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["zarr", "parquet"])
@pytest.mark.parametrize("policy", ["random", "entropy", "every"])
def test_a_quarter_of_the_rows_is_about_a_quarter_of_the_bytes(packed, tmp_path, store, policy):
    def num_bytes(positions, name):
        labels = {"policy": "dense", "positions": positions}
        config = packed.config(
            labels=labels, capture={"store": store, "unit_samples": 1000, "batch_size": 16}
        )
        teacher = open_teacher(config, packed.data)
        cache, _ = capture_labels(config, packed.data, teacher, str(tmp_path / name))
        return sum(shard.num_bytes for marker in cache.markers.values() for shard in marker.shards)

    policy_settings = {"policy": policy} | ({"every": 4} if policy == "every" else {"share": 0.25})
    assert 0.22 < num_bytes(policy_settings, "some") / num_bytes({"policy": "all"}, "all") < 0.32


def test_the_policy_is_in_the_identity_only_where_rows_are_skipped(packed):
    assert packed.cache().manifest.identity["labels"].keys() == {"policy", "k", "temperatures"}
    assert not packed.cache().skips_positions
    for policy, policy_settings in POLICIES.items():
        assert packed.cache(policy).manifest.identity["labels"]["positions"] == policy_settings
        assert packed.cache(policy).skips_positions


@pytest.mark.parametrize(
    "labels",
    [{}, {"positions": {"policy": "every", "every": 2}}, {"positions": {"policy": "random", "share": 0.3}}],
)
def test_a_capture_of_other_positions_does_not_go_into_the_cache(packed, labels):
    config = packed.config(labels=labels or {"positions": {"policy": "all"}})
    teacher = open_teacher(config, packed.data)
    with pytest.raises(IdentityError, match=r"made from something else[\s\S]*labels\.positions"):
        capture_labels(config, packed.data, teacher, packed.cache("every").url)


def test_a_run_that_asks_for_other_positions_is_refused(packed, tmp_path):
    def train(policy, cache):
        config = packed.config(policy, train={"epochs": 1})
        return train_student(
            config, packed.data, model=STUDENT, labels="cache", cache=cache, out=tmp_path / policy
        )

    with pytest.raises(IdentityError, match=r"labels\.positions: .*'all'.* in the config, .*'every'"):
        train("all", packed.cache("every"))
    with pytest.raises(IdentityError, match=r"labels\.positions: .*'every'.* in the config, .*'all'"):
        train("every", packed.cache())


def test_a_copy_in_the_other_store_is_the_same(packed, tmp_path):
    cache = packed.cache("random")
    copy = convert_cache(cache, str(tmp_path / "copy"), store="parquet")
    everything = np.arange(len(cache))
    one, two = cache.read_stored(everything), copy.read_stored(everything)
    for name in ("positions", "fingerprints", "counts"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    np.testing.assert_array_equal(one.labels.log_probs, two.labels.log_probs)
    batch = SoftLabelDataset(packed.data.train, copy).fetch([3, 1])
    assert batch.num_labeled == len(batch.labels) < batch.num_rows


# -- the config and the commands ---------------------------------------------------------------------------

TEXT = '[source]\nmodality = "text"\nname = "stdlib"\ntokenizer = "bpe"\n'
BAD = {
    "an image": (
        '[source]\nname = "digits"\n[labels.positions]\npolicy = "every"\n',
        r"labels\.positions: 'every' chooses among the positions of a text; an image has one row",
    ),
    "no policy": (TEXT + "[labels.positions]\nshare = 0.5\n", r"labels\.positions: .*share without a policy"),
    "an unknown policy": (TEXT + '[labels.positions]\npolicy = "first"\n', r"labels\.positions\.policy: "),
    "no share": (TEXT + '[labels.positions]\npolicy = "random"\nshare = 0.0\n', r"labels\.positions\.share"),
    "an unknown key": (
        TEXT + '[labels.positions]\npolicy = "every"\nn = 3\n',
        r"labels\.positions\.n: unknown key; known keys: policy, every, share, seed",
    ),
}


@pytest.mark.parametrize(("text", "match"), BAD.values(), ids=BAD)
def test_a_bad_table_is_refused_by_its_dotted_name(tmp_path, text, match):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ConfigError, match=match):
        load_config(tmp_path / "run.toml")


def test_positions_of_images_are_refused_without_a_config_too(shared_cache):
    config, data, _ = shared_cache
    labels = config.labels.model_copy(update={"positions": PositionSettings(policy="every")})
    with pytest.raises(ConfigError, match=r"labels\.positions: 'every', but samples of source .* are images"):
        plan_manifest(data.train, open_teacher(config, data), labels, config.capture)
    assert digits_config().labels.positions.policy == "all"


def test_the_commands_know_such_a_cache(packed, tmp_path):
    cache = packed.cache("entropy")
    run = CliRunner().invoke(softcache, ["inspect", cache.url], catch_exceptions=False)
    assert "positions entropy share 0.3" in run.output
    assert f"of {cache.manifest.rows.num_rows:,} rows" in run.output
    run = CliRunner().invoke(softcache, ["inspect", cache.url, "--json"], catch_exceptions=False)
    assert json.loads(run.output)["identity"]["labels"]["positions"] == POLICIES["entropy"]


def test_an_import_of_some_positions_is_refused(tmp_path):
    (tmp_path / "run.toml").write_text(TEXT + '[labels.positions]\npolicy = "every"\n')
    (tmp_path / "answers.jsonl").write_text("")
    arguments = ["import", str(tmp_path / "answers.jsonl"), "--config", str(tmp_path / "run.toml")]
    run = CliRunner().invoke(softcache, arguments)
    assert run.exit_code != 0
    assert "labels.positions: 'every'; an import takes every position" in run.output + str(run.exception)
