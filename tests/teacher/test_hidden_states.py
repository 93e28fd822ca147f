"""Hidden states from capture to verification: what the cache's head makes of them, interruptions, and refusals."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from softcache.config.run import RunConfig
from softcache.errors import ConfigError, LabelError
from softcache.runs import capture_labels, open_data, open_teacher
from softcache.runs.cache import capture_estimate, check_config_matches_cache
from softcache.teacher.capture.shared import leading_coordinates
from softcache.tools.fidelity.frontier import plan_state_points
from softcache.tools.verify.teacher import verify_against_teacher
from tests.support.caches import digits_config
from tests.support.text_caches import text_config, write_texts


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hidden")
    return *tables_of(folder, "cache"), folder


def tables_of(folder, name, teacher="tests.fakes_language:known", **labels):
    tables = {"labels": {"policy": "hidden", **labels}, "teacher": {"model": teacher}}
    config = text_config(folder, **tables)
    data = open_data(config)
    cache, _ = capture_labels(config, data, open_teacher(config, data), str(folder / name))
    return config, data, cache


def logits(config, data, samples):
    batch = data.train.load(samples, 0)
    return torch.cat(list(open_teacher(config, data).chunks(batch)))


def mean_kl(found, expected):
    log_p, log_q = expected.double().log_softmax(1), found.double().log_softmax(1)
    return float((log_p.exp() * (log_p - log_q)).sum(1).mean())


# A teacher of 16 numbers a state: seven of eight coordinates are most of it.
@pytest.mark.parametrize(
    ("labels", "bound"),
    [
        ({"values": "float32"}, 1e-9),
        ({"values": "bfloat16"}, 2e-5),
        ({"values": "int8"}, 2e-5),
        ({"values": "float8_e4m3"}, 2e-3),
        ({"values": "float32", "components": 16}, 1e-6),
        ({"values": "int8", "components": 12}, 0.1),
    ],
    ids=str,
)
def test_the_head_makes_the_teachers_distribution_of_stored_states(made, labels, bound):
    folder = made[3]
    name = "-".join(map(str, labels.values()))
    config, data, cache = tables_of(folder, name, **labels)
    samples = [3, 0, 7]
    found = cache.read(samples).to_torch().head_logits()
    assert mean_kl(found, logits(config, data, samples)) < bound
    check_config_matches_cache(config, cache)
    faults = list(
        verify_against_teacher(
            cache, data.train, open_teacher(config, data), num_rows=5, threshold_nats=1e-6, seed=0
        )
    )
    assert faults == []


@pytest.mark.parametrize("model", ["known", "masked_class", "padded"])
def test_bias_padding_and_masked_classes_are_those_of_the_head(made, model):
    config, data, cache = tables_of(made[3], model, teacher=f"tests.fakes_language:{model}")
    found, expected = cache.read([1, 2]).to_torch().head_logits(), logits(config, data, [1, 2])
    assert found.shape == expected.shape
    assert torch.equal(found == -torch.inf, expected == -torch.inf)
    torch.testing.assert_close(found.softmax(1), expected.softmax(1), atol=1e-2, rtol=0)


def test_another_teacher_is_recognized_by_its_head_or_its_states(made):
    config, data, cache, folder = made
    other = text_config(folder, teacher={"model": "tests.fakes_language:known_scaled"})
    how = {"num_rows": 3, "threshold_nats": 1e-3, "seed": 0}
    (fault,) = verify_against_teacher(cache, data.train, open_teacher(other, data), **how)
    assert "made with another head than this teacher's" in fault
    teacher = open_teacher(config, data)
    with torch.no_grad():
        next(p for n, p in teacher.model.named_parameters() if "mlp" in n).mul_(-3.0)
    faults = list(verify_against_teacher(cache, data.train, teacher, **how))
    assert len(faults) == 3
    assert all("the teacher disagrees with its record: KL" in fault for fault in faults)


@pytest.mark.parametrize("labels", [{}, {"values": "int8", "components": 6}], ids=["states", "coordinates"])
def test_killed_at_any_step_it_completes_what_is_missing_with_the_same_bytes(
    made, tmp_path, monkeypatch, labels
):
    """Coordinates are those of the cache, whatever a rerun's decomposition would be."""
    config, data, cache = tables_of(made[3], f"whole-{len(labels)}", **labels)
    url = str(tmp_path / "cache")
    for point in ("before_shards", "after_shard", "before_marker"):
        count = itertools.count()

        def dies(name, point=point, count=count):
            if name == point and next(count) == 1:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("softcache.cache.units._failpoint", dies)
            with pytest.raises(KeyboardInterrupt):
                capture_labels(config, data, open_teacher(config, data), url)
    with monkeypatch.context() as patch:
        patch.setattr(
            "softcache.teacher.capture.shared.leading_coordinates", lambda *_: pytest.fail("chosen anew")
        )
        again, _ = capture_labels(config, data, open_teacher(config, data), url)
    assert again.manifest_sha256 == cache.manifest_sha256
    for number, marker in cache.markers.items():
        assert [s.sha256 for s in again.markers[number].shards] == [s.sha256 for s in marker.shards]


def test_only_some_positions_and_the_estimate(made, tmp_path):
    config, _, cache = tables_of(made[3], "some", positions={"policy": "every", "every": 4}, components=5)
    whole = made[2]
    assert cache.manifest.total_rows < whole.manifest.total_rows
    stored, all_rows = cache.read_stored([2]), whole.read_stored([2])
    assert stored.positions.tolist() == all_rows.positions[::4].tolist()
    found = capture_estimate(config, open_data(config), str(tmp_path / "nothing"))
    assert (found.rows, found.units) == (cache.manifest.total_rows, cache.manifest.plan.num_units)
    assert not (tmp_path / "nothing").exists()


def test_coordinates_keep_what_the_head_sees():
    """States vary most where the head is blind: the first axis of the states' own variance would keep nothing."""
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(500, 6, generator=draw) * torch.tensor([50.0, 1.0, 1.0, 0.1, 0.1, 0.1]) + 3.0
    weight = torch.randn(40, 6, generator=draw) * torch.tensor([1e-4, 1.0, 1.0, 1.0, 1.0, 1.0])
    bias = torch.randn(40, generator=draw)
    head = SimpleNamespace(weight=weight, bias=bias, logit_scale=1.0, softcap=None)
    head._replace = lambda **changes: SimpleNamespace(**vars(head) | changes)
    expected = (states @ weight.T + bias).log_softmax(1)
    errors = []
    for size in (1, 2, 4, 6):
        small = leading_coordinates(states, head, size)
        logits_NV = (states - small.mean) @ small.encoder @ small.weight.T + small.bias
        errors.append(float((expected - logits_NV.log_softmax(1)).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.1 * errors[0]
    assert errors[3] < 1e-9
    few = head._replace(weight=weight[:4], bias=bias[:4])
    exact = leading_coordinates(states, few, 3)
    logits_NV = (states - exact.mean) @ exact.encoder @ exact.weight.T + exact.bias
    torch.testing.assert_close(logits_NV.log_softmax(1), (states @ weight[:4].T + bias[:4]).log_softmax(1))
    with pytest.raises(
        LabelError,
        match="expected at most 3, the directions of a hidden state of 6 numbers that a head of 4 classes",
    ):
        leading_coordinates(states, few, 4)


def test_points_of_hidden_states_are_no_more_than_the_head_reads():
    """A pretrained model of proteins has a state of 512 numbers for 33 classes."""
    sizes = [point.components for point in plan_state_points(33, 512) if point.components]
    assert sizes == [32]
    assert [point.components for point in plan_state_points(4096, 256) if point.components] == [
        128,
        64,
        32,
        16,
    ]


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ({"temperatures": [1.0, 2.0]}, 'temperatures: policy = "hidden" keeps no tail'),
        ({"statistics": "none"}, "statistics: policy"),
        ({"positions": {"policy": "entropy", "share": 0.5}}, 'positions.policy: "entropy" reads the teacher'),
        ({"values": "float16"}, r"labels\.values"),
        ({"components": 17}, "labels.components: expected at most 16, the width"),
    ],
)
def test_settings_that_mean_nothing_are_refused(made, labels, match):
    with pytest.raises((ValueError, LabelError), match=match):
        tables_of(made[3], "refused", **labels)


def test_what_has_no_states_refuses_them(made, tmp_path):
    def config_of(run):
        return RunConfig.model_validate(
            run.model_dump(mode="json", exclude_unset=True) | {"labels": {"policy": "hidden"}}
        )

    packed, digits = config_of(text_config(made[3], capture={"codec": "packed"})), config_of(digits_config())
    teacher, data = open_teacher(packed, made[1]), open_data(digits)
    with pytest.raises(ConfigError, match=r"capture.codec: 'packed' is of classes"):
        capture_labels(packed, made[1], teacher, str(tmp_path / "cache"))
    teacher = open_teacher(digits, data)
    with pytest.raises(
        ConfigError, match=r'"hidden" keeps the input of a language model.s head; teacher .* has none'
    ):
        capture_labels(digits, data, teacher, str(tmp_path / "images"))


def test_a_state_that_is_no_number_names_the_sample_and_the_position(tmp_path):
    write_texts(tmp_path / "texts.jsonl")
    with pytest.raises(
        LabelError, match=r"teacher state of sample '.*doc.*', position \d+, view 0 \(unit 0\): NaN or inf"
    ):
        tables_of(tmp_path, "cache", teacher="tests.fakes_language:nan_logits")
    assert not list((tmp_path / "cache/units").glob("*.json"))
