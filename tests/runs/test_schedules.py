"""Runs whose temperature, alpha or weights change: nothing new where nothing changes, exact resume, ranks and pieces."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from benchmarks import adaptive
from softcache.cache.manifest import Manifest
from softcache.errors import ConfigError, RunError, SpecError
from softcache.labels.sparsify import top_k
from softcache.losses import LossSettings, distillation_loss, row_weights, scheduled
from softcache.models.image import build_model
from softcache.reader.open import open_cache
from softcache.runs import open_data, open_teacher, train_student
from softcache.student.loop import Trainer
from softcache.student.tasks import TokenStudent
from tests.fakes_language import known
from tests.student.test_many_processes import SAMPLES, TEXT, assert_same_student
from tests.student.test_run import Killed, assert_same_run, dies_at, distance, fit, watched, weights
from tests.support.caches import make_cache
from tests.support.process_groups import run_ranks
from tests.support.text_caches import make_text_cache, text_config

MOVING = {
    "temperature_schedule": {"kind": "linear", "end": 1.0},
    "alpha_schedule": {"kind": "stall", "end": 0.2, "patience": 1, "min_delta": 10.0},
    "weights": {"by": "gap", "floor": 0.1},
}
LEARNT = {"curriculum": {"growth_epochs": 1, "lr": 2.0}, "weights": {"by": "teacher_entropy"}}
KINDS = pytest.mark.parametrize("loss", [MOVING, LEARNT], ids=["schedules", "curriculum"])


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A cache of documents, of which every second position has a label, and its folder."""
    folder = tmp_path_factory.mktemp("texts")
    return make_text_cache(folder / "cache", folder, **TEXT)[2], folder


def fit_tokens(tokens, out, *, labels="cache", **tables):
    cache, folder = tokens
    config = text_config(folder, **TEXT, **tables)
    data = open_data(config)
    teacher = open_teacher(config, data) if labels == "online" else None
    return train_student(
        config, data, model=config.student.model, labels=labels, cache=cache, teacher=teacher, out=out
    )


def column(metrics, name):
    return [row[name] for row in metrics["history"]]


# -- nothing changes where nothing is asked for ------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [
        {"temperature_schedule": {"kind": "constant"}, "alpha_schedule": {"kind": "constant"}},
        {"temperature_schedule": {"kind": "linear", "end": 4.0}},
    ],
    ids=["constant", "from 4 to 4"],
)
def test_a_schedule_that_stands_still_trains_the_same_bytes(tmp_path, shared_cache, loss):
    plain = fit(shared_cache[2], tmp_path / "plain")
    still = fit(shared_cache[2], tmp_path / "still", tables={"loss": loss})
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "still"))
    assert one == other
    assert column(still, "train_loss") == column(plain, "train_loss")
    assert column(still, "temperature") == [4.0] * 3
    assert column(still, "alpha") == [0.9] * 3
    assert "temperature" not in plain["history"][0], "a plain run's history is as it was"


def test_hard_labels_have_no_temperature(tmp_path, shared_cache):
    plain = fit(shared_cache[2], tmp_path / "plain", labels="ground_truth")
    moving = fit(shared_cache[2], tmp_path / "moving", labels="ground_truth", tables={"loss": MOVING})
    assert distance(tmp_path / "plain", tmp_path / "moving") == 0
    assert moving["history"] == plain["history"]


# -- what is trained ---------------------------------------------------------------------------------------


def test_every_step_has_the_schedules_temperature_and_every_epoch_says_its_last(
    tmp_path, shared_cache, monkeypatch
):
    seen, real = [], Trainer._mix
    monkeypatch.setattr(Trainer, "_mix", lambda loop: seen.append(real(loop)["mix"]) or {"mix": seen[-1]})
    metrics = fit(shared_cache[2], tmp_path, tables={"loss": MOVING})
    settings = LossSettings.model_validate(MOVING)
    how = {"num_steps": 18, "losses": []}
    expected = [scheduled(settings.temperature_schedule, 4.0, step=step, **how) for step in range(18)]
    assert [mix.temperature for mix in seen] == expected
    assert expected[-1] == 1.0
    assert column(metrics, "temperature") == expected[5::6]
    assert column(metrics, "alpha") == [0.9, 0.9, 0.45], "min_delta is out of reach: the second epoch stalled"
    assert metrics["temperature"] == 1.0


def test_the_learnt_temperature_makes_the_loss_larger(tmp_path, shared_cache):
    """In the first epoch it stands still; then it goes where the loss at the student's weights is larger."""
    tables = {"train": {"epochs": 4}, "loss": {"curriculum": {"growth_epochs": 1, "lr": 2.0}}}
    metrics = fit(shared_cache[2], tmp_path, tables=tables)
    temperatures = column(metrics, "temperature")
    assert temperatures[0] == pytest.approx(4.0)
    assert len(set(temperatures)) == 4

    seen = {}

    def slope(T):
        T = torch.tensor(T, requires_grad=True)
        labels, logits, targets = seen["labels"], seen["logits"], seen["targets"]
        distillation_loss(logits, labels, targets, temperature=T, alpha=0.9).backward()
        return float(T.grad)

    _, data, cache = shared_cache
    student = build_model("mlp?width=8", num_classes=10, input_shape=data.input_shape)
    student.load_state_dict(weights(tmp_path))
    batch = data.train.load(range(300), 0)
    seen["labels"] = cache.read(range(300)).to_torch()
    seen["logits"], seen["targets"] = student(data.normalize()(batch.images)).detach(), batch.targets
    rising = temperatures[-1] > temperatures[-2]
    assert (slope(temperatures[-1]) > 0) == rising


@pytest.mark.parametrize("by", ["teacher_entropy", "teacher_correctness", "gap"])
@pytest.mark.parametrize("learnt", [False, True], ids=["fused", "unfused"])
def test_tokens_are_weighed_as_the_unfused_loss_weighs_them(by, learnt):
    settings = LossSettings.model_validate({"temperature": 2.0, "alpha": 0.7, "weights": {"by": by}})
    student = TokenStudent(known(40, 8), settings, context=8)
    torch.manual_seed(0)
    hidden, targets = torch.randn(7, 16, requires_grad=True), torch.arange(7)
    labels = top_k(3 * torch.randn(7, 40), k=4, targets_P=targets)
    T = torch.tensor(2.0, requires_grad=True) if learnt else 2.0
    found = student._mixed(hidden, labels, targets, 0.7, T)
    logits = student._parts.logits(hidden)
    weights_P = row_weights(
        settings.weights,
        labels,
        targets,
        student_log_probs_P=logits.log_softmax(-1)[torch.arange(7), targets],
        num_student_classes=40,
    )
    expected = distillation_loss(logits, labels, targets, temperature=2.0, alpha=0.7, soft_weights=weights_P)
    torch.testing.assert_close(found, expected)
    one, other = (torch.autograd.grad(x, hidden, retain_graph=True)[0] for x in (found, expected))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    if learnt:
        assert torch.autograd.grad(found, T)[0].abs() > 1e-6


@KINDS
def test_pieces_of_a_batch_add_up_to_the_batch(tmp_path, shared_cache, loss):
    found = []
    for pieces in (1, 3):
        tables = {"loss": loss, "train": {"accumulation_steps": pieces}}
        found.append(fit(shared_cache[2], tmp_path / f"{pieces}", tables=tables))
    assert distance(tmp_path / "1", tmp_path / "3") < 1e-5
    assert column(found[0], "temperature") == pytest.approx(column(found[1], "temperature"), rel=1e-5)


# -- kills, and many processes -----------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["cache", "online"])
@KINDS
def test_killed_in_the_middle_of_a_schedule_it_ends_with_the_same_weights(
    tmp_path, shared_cache, monkeypatch, loss, labels
):
    tables = {"loss": loss}
    fit(shared_cache[2], tmp_path / "whole", labels=labels, tables=tables)
    for step in (1, 4, 6, 3, 5, 4, 2):
        with watched(monkeypatch, dies_at(step)), pytest.raises(Killed):
            fit(shared_cache[2], tmp_path / "broken", labels=labels, tables=tables)
    fit(shared_cache[2], tmp_path / "broken", labels=labels, tables=tables)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    history = json.loads((tmp_path / "broken/metrics.json").read_text())["history"]
    assert len({row["temperature"] for row in history}) == 3


@pytest.mark.parametrize("labels", ["cache", "online"])
def test_tokens_learn_at_a_learnt_temperature(tokens, tmp_path, labels):
    learnt = {"curriculum": {"growth_epochs": 1, "lr": 50.0}, "weights": {"by": "teacher_correctness"}}
    metrics = fit_tokens(tokens, tmp_path, labels=labels, loss=learnt)
    first, second = column(metrics, "temperature")
    assert first == pytest.approx(4.0)
    assert abs(second - 4.0) > 1e-3
    assert column(metrics, "eval_loss")[1] < column(metrics, "eval_loss")[0]


def _trains(rank, images, tokens, out):
    found = {}
    for name, loss in (("schedules", MOVING), ("curriculum", LEARNT)):
        tables = {"loss": loss, **SAMPLES}
        found[name] = fit(open_cache(images), out / name, tables=tables)["history"]
        found[f"text {name}"] = fit_tokens(tokens, out / f"text {name}", loss=loss)["history"]
    return found


def test_two_processes_hold_the_temperature_and_train_the_student_of_one(tmp_path, shared_cache, tokens):
    images = make_cache(tmp_path / "cache", **SAMPLES)[2].url
    ended = run_ranks(tmp_path / "ranks", 2, _two, images, tokens[1], tmp_path / "two")
    assert [end.code for end in ended] == [0, 0], ended
    assert ended[0].value == ended[1].value, "the same figures, T and alpha on both"
    alone = _trains(0, images, tokens, tmp_path / "one")
    for name, history in alone.items():
        assert_same_student(tmp_path / "two" / name, tmp_path / "one" / name)
        for row, other in zip(history, ended[0].value[name], strict=True):
            assert row["temperature"] == pytest.approx(other["temperature"], rel=1e-5), name
            assert row["alpha"] == other["alpha"], name


def _two(rank, images, folder, out):
    return _trains(rank, images, (open_cache(folder / "cache"), folder), out)


# -- what is refused ---------------------------------------------------------------------------------------


def test_a_learnt_temperature_with_more_logits_than_fit_is_refused(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr("softcache.student.tasks.token_student.MAX_DENSE_ELEMENTS", 1000)
    with pytest.raises(SpecError, match=r"loss\.curriculum: .* rows of 300 classes; expected at most 1,000"):
        fit_tokens(tokens, tmp_path, loss={"curriculum": {}})


def test_labels_known_at_one_temperature_refuse_a_schedule_before_the_first_step(
    tmp_path, shared_cache, monkeypatch
):
    real = Manifest.build_codec
    monkeypatch.setattr(Manifest, "build_codec", lambda self: replace(real(self), max_temperature=8.0))
    fit(shared_cache[2], tmp_path / "low", tables={"train": {"epochs": 1}})
    up = {"temperature_schedule": {"kind": "linear", "end": 9.0}}
    with pytest.raises(ConfigError, match=r"loss\.temperature_schedule: reaches T = 9; expected at most 8"):
        fit(shared_cache[2], tmp_path / "high", tables={"loss": up})
    with pytest.raises(ConfigError, match=r"loss\.curriculum: reaches T = 21"):
        fit(shared_cache[2], tmp_path / "learnt", tables={"loss": LEARNT})
    assert not (tmp_path / "high").exists()


def test_a_schedule_is_another_run_and_a_finished_one_is_found(tmp_path, shared_cache):
    first = fit(shared_cache[2], tmp_path, tables={"loss": MOVING})
    assert fit(shared_cache[2], tmp_path, tables={"loss": MOVING}) == first
    with pytest.raises(RunError, match=r"loss\.temperature_schedule"):
        fit(shared_cache[2], tmp_path)


@pytest.mark.parametrize("by", ["teacher_entropy", "teacher_correctness", "gap"])
@pytest.mark.parametrize("learnt", [False, True], ids=["fused", "unfused"])
def test_a_piece_without_a_label_weighs_nothing(by, learnt):
    settings = LossSettings.model_validate({"weights": {"by": by}})
    student = TokenStudent(known(40, 8), settings, context=8)
    labels = top_k(torch.randn(1, 40), k=4, targets_P=torch.tensor([3])).take(torch.arange(0))
    hidden = torch.randn(0, 16, requires_grad=True)
    T = torch.tensor(2.0, requires_grad=True) if learnt else 2.0
    loss = student._mixed(hidden, labels, torch.arange(0), 0.7, T)
    loss.backward()
    assert loss.item() == 0
    assert not learnt or float(T.grad) == 0


# -- the benchmark -----------------------------------------------------------------------------------------


def test_the_benchmark_trains_every_way_once_and_compares_by_seed(tmp_path):
    config = tmp_path / "digits.toml"
    config.write_text(
        """
        [source]
        name = "digits"
        max_eval_samples = 40
        [teacher]
        model = "tests.fakes:known"
        [labels]
        policy = "dense"
        [student]
        model = "linear"
        [train]
        epochs = 2
        """
    )
    how = [
        "--config",
        str(config),
        "--out",
        str(tmp_path / "out"),
        "--seeds",
        "0,1",
        "--train-samples",
        "100",
    ]
    done = CliRunner().invoke(adaptive.main, how, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert [(row["way"], row["seed"]) for row in rows] == [
        (way, seed) for seed in (0, 1) for way in (*adaptive.WAYS, adaptive.HARD)
    ]
    ends = {row["way"]: row["temperature"] for row in rows}
    assert (ends["T linear, 4 to 1"], ends["T linear, 1 to 4"], ends["T = 4"]) == (1.0, 4.0, None)
    assert len(open_cache(tmp_path / "out/cache")) == 100
    again = CliRunner().invoke(adaptive.main, [*how, "--table"], env={"COLUMNS": "200"})
    assert again.stdout == done.stdout
    assert len((tmp_path / "out/results.jsonl").read_text().splitlines()) == len(rows)


def test_the_benchmark_names_the_ways_that_it_knows():
    done = CliRunner().invoke(adaptive.main, ["--way", "magic"])
    assert done.exit_code == 2
    assert "'magic'; one of T = 4," in done.output
