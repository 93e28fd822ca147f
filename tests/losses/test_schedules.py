"""Schedules, the learnt temperature and weights of rows: against slow references, one by one."""

import math
import tomllib

import pytest
import torch
from pydantic import ValidationError

from softcache.config.load import load_config
from softcache.errors import ConfigError, LabelError
from softcache.labels.sparsify import dense, top_k
from softcache.losses import LossSettings, cross_entropy, distillation_loss, make_loss, row_weights, scheduled
from softcache.losses.curriculum import CurriculumSettings
from softcache.losses.sample_weights import WeightSettings
from softcache.losses.schedules import AlphaSchedule, TemperatureSchedule
from tests.support.caches import ROOT


def along(schedule, start, num_steps, losses=()):
    return [
        scheduled(schedule, start, step=step, num_steps=num_steps, losses=losses) for step in range(num_steps)
    ]


# -- schedules ---------------------------------------------------------------------------------------------


def test_a_linear_schedule_takes_equal_steps_from_its_first_value_to_its_last():
    assert along(TemperatureSchedule(kind="linear", end=1.0), 4.0, 7) == [4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0]
    assert along(AlphaSchedule(kind="linear", end=1.0), 0.5, 3) == [0.5, 0.75, 1.0], "upwards too"


def test_a_cosine_schedule_is_slow_at_both_ends():
    found = along(TemperatureSchedule(kind="cosine", end=1.0), 4.0, 5)
    assert found == pytest.approx([1 + 3 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(5)])
    assert (found[0], found[-1]) == (4.0, 1.0), "the ends are the numbers of the config, unrounded"


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_schedule_reaches_its_end_where_until_says_and_stays(kind):
    found = along(TemperatureSchedule(kind=kind, end=1.1, until=0.5), 4.0, 9)
    assert found[3] > 1.1
    assert found[4:] == [1.1] * 5


@pytest.mark.parametrize("schedule", [None, TemperatureSchedule(kind="constant")])
def test_a_constant_schedule_is_the_number_itself(schedule):
    assert along(schedule, 3.7, 3) == [3.7, 3.7, 3.7]
    assert along(TemperatureSchedule(kind="linear", end=1.0), 3.7, 1) == [3.7], "a run of one step"


def slow_stall(schedule, start, losses):
    """As the definition reads: the lowest loss, and how many epochs since."""
    value, since, best = start, 0, None
    for epoch, loss in enumerate(losses):
        if best is None or best - loss > schedule.min_delta:
            best, since = loss, epoch
        elif epoch - since == schedule.patience:
            value, since = max(value * schedule.factor, schedule.end), epoch
    return value


@pytest.mark.parametrize("patience", [1, 2, 3])
@pytest.mark.parametrize("min_delta", [0.0, 0.15])
def test_a_stalled_held_out_loss_lowers_the_value(patience, min_delta):
    schedule = TemperatureSchedule(kind="stall", end=1.2, factor=0.6, patience=patience, min_delta=min_delta)
    generator = torch.Generator().manual_seed(patience)
    losses = (
        2 - torch.rand(12, generator=generator).cumsum(0) / 6 + torch.randn(12, generator=generator) / 5
    ).tolist()
    values = [scheduled(schedule, 5.0, step=0, num_steps=1, losses=losses[:epoch]) for epoch in range(13)]
    assert values == [slow_stall(schedule, 5.0, losses[:epoch]) for epoch in range(13)]
    assert values[0] == 5.0
    assert values == sorted(values, reverse=True)
    assert values[-1] < 5.0


# -- the learnt temperature --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "dkd", "total_variation"])
@pytest.mark.parametrize("kept", [3, 9])
@pytest.mark.parametrize("standardize", [False, True])
def test_theta_gets_the_numerical_gradient_with_its_sign_reversed(name, kept, standardize):
    torch.manual_seed(1)
    teacher = 3 * torch.randn(8, 9, dtype=torch.float64)
    student, targets = torch.randn(8, 9, dtype=torch.float64), torch.arange(8)
    labels = dense(teacher) if kept == 9 else top_k(teacher, k=kept, targets_P=targets)
    settings = CurriculumSettings(growth_epochs=4, max_strength=0.7)

    def loss(T):
        how = make_loss(name, standardize=standardize)
        return distillation_loss(student, labels, targets, temperature=T, alpha=0.8, loss=how)

    def at(theta):
        return float(loss(torch.tensor(1.0 + 20.0 / (1 + math.exp(-theta)), dtype=torch.float64)))

    theta = torch.tensor(settings.theta(3.3), dtype=torch.float64, requires_grad=True)
    loss(settings.temperature(theta, epoch=1)).backward()
    strength = 0.7 * (1 - math.cos(math.pi / 4)) / 2
    numerical = (at(theta.item() + 1e-3) - at(theta.item() - 1e-3)) / 2e-3
    assert theta.grad.item() == pytest.approx(-strength * numerical, rel=1e-3)
    assert abs(numerical) > 1e-3


def test_the_reversal_grows_by_half_a_cosine_and_then_stays():
    settings = CurriculumSettings(growth_epochs=10)
    assert [settings.strength(epoch) for epoch in (0, 5, 10, 40)] == pytest.approx([0, 0.5, 1, 1])
    assert [settings.strength(epoch) for epoch in range(12)] == sorted(
        settings.strength(epoch) for epoch in range(12)
    )


@pytest.mark.parametrize("temperature", [1.01, 4.0, 20.9])
def test_the_learnt_temperature_begins_at_the_configs(temperature):
    settings = CurriculumSettings()
    theta = torch.tensor(settings.theta(temperature), dtype=torch.float64)
    assert float(settings.temperature(theta, epoch=0)) == pytest.approx(temperature)


# -- weights of rows ---------------------------------------------------------------------------------------


@pytest.fixture(params=[3, 9], ids=["top 3", "all"])
def rows(request):
    """A record of rows of very different certainty, its teacher's probabilities, a student's logits, targets."""
    torch.manual_seed(0)
    teacher = torch.randn(40, 9) * torch.linspace(0.1, 6, 40)[:, None]
    targets = torch.randint(0, 9, (40,))
    labels = dense(teacher) if request.param == 9 else top_k(teacher, k=3, targets_P=targets)
    return labels, teacher.double().softmax(-1), torch.randn(40, 9), targets


def slow_score(by, p, q, target):
    if by == "teacher_entropy":
        return sum(-x * math.log(x) for x in p.tolist()) / math.log(len(p))
    return float(p[target] if by == "teacher_correctness" else abs(p[target] - q[target]))


@pytest.mark.parametrize("by", ["teacher_entropy", "teacher_correctness", "gap"])
@pytest.mark.parametrize("prefer", [None, "low", "high"])
@pytest.mark.parametrize(("power", "floor"), [(1.0, 0.0), (2.5, 0.3), (0.0, 0.0)])
def test_a_rows_weight_is_its_score_as_defined(rows, by, prefer, power, floor):
    labels, p_PV, student, targets = rows
    q_PV = student.double().softmax(-1)
    found = row_weights(
        WeightSettings(by=by, prefer=prefer, power=power, floor=floor),
        labels,
        targets,
        student_log_probs_P=-cross_entropy(student, targets),
        num_student_classes=9,
    )
    expected = []
    for p, q, target in zip(p_PV, q_PV, targets.tolist(), strict=True):
        score = slow_score(by, p, q, target)
        if prefer == "low" or (prefer is None and by == "teacher_entropy"):
            score = 1 - score
        expected.append(floor + (1 - floor) * score**power)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "dkd"])
def test_weights_are_factors_of_the_soft_part_in_a_mean_over_all_rows(rows, name):
    labels, _, student, targets = rows
    weights = torch.rand(len(student))
    how = {"temperature": 2.0, "loss": name}
    found = distillation_loss(student, labels, targets, alpha=0.7, soft_weights=weights, **how)
    total = 0.0
    for row, weight in enumerate(weights.tolist()):
        one = student[row : row + 1], labels.take(torch.tensor([row])), targets[row : row + 1]
        total += 0.3 * cross_entropy(one[0], one[2]).item()
        total += 0.7 * weight * distillation_loss(*one, alpha=1.0, **how).item()
    assert found.item() == pytest.approx(total / len(student), rel=1e-5)


def test_weights_of_one_change_nothing(rows):
    labels, _, student, targets = rows
    student.requires_grad_()
    how = {"temperature": 2.0, "alpha": 0.7}
    plain = distillation_loss(student, labels, targets, **how)
    (expected,) = torch.autograd.grad(plain, student)
    weighted = distillation_loss(student, labels, targets, soft_weights=torch.ones(40), **how)
    (found,) = torch.autograd.grad(weighted, student)
    torch.testing.assert_close(weighted, plain)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_a_row_without_a_ground_truth_counts_in_full(rows):
    labels, _, _, targets = rows
    targets = targets.where(torch.arange(40) % 2 == 0, -100)
    found = row_weights(WeightSettings(by="teacher_correctness"), labels, targets, num_student_classes=9)
    assert (found[1::2] == 1).all()
    assert (found[::2] < 1).any()


def test_labels_that_do_not_know_the_score_are_refused():
    labels = top_k(torch.randn(5, 9), k=2)
    arrays = {name: getattr(labels, name) for name in ("ids", "log_probs", "log_tail")}
    bare = type(labels)(**arrays, num_classes=9, temperatures=labels.temperatures)
    with pytest.raises(LabelError, match="teacher_entropy needs labels with stats"):
        row_weights(WeightSettings(by="teacher_entropy"), bare, None, num_student_classes=9)
    with pytest.raises(LabelError, match="teacher_correctness reads the ground-truth classes; found none"):
        row_weights(WeightSettings(by="teacher_correctness"), bare, None, num_student_classes=9)
    dropped = torch.tensor([next(c for c in range(9) if c not in row) for row in bare.ids.tolist()])
    with pytest.raises(
        LabelError, match=r"position 0: the ground-truth class .* weights by correctness or gap"
    ):
        row_weights(WeightSettings(by="teacher_correctness"), bare, dropped, num_student_classes=9)


# -- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (['loss.temperature_schedule={kind="linear",end=0.5}'], r"loss\.temperature_schedule\.end: .*greater than or equal to 1"),
        (['loss.temperature_schedule={kind="linear",end=400}'], r"loss\.temperature_schedule\.end: .*less than or equal to 100"),
        (['loss.alpha_schedule={kind="cosine",end=1.5}'], r"loss\.alpha_schedule\.end: .*less than or equal to 1"),
        (['loss.alpha_schedule={kind="step",end=0.5}'], r"loss\.alpha_schedule\.kind: .*'constant', 'linear', 'cosine' or 'stall'"),
        (['loss.alpha_schedule={kind="linear"}'], r"loss\.alpha_schedule: .*end: expected one for linear"),
        (['loss.alpha_schedule={kind="constant",end=0.5}'], r"loss\.alpha_schedule: .*none for constant"),
        (['loss.alpha_schedule={kind="linear",end=0.5,patience=2}'], r"loss\.alpha_schedule\.patience: .*not read by kind 'linear', only by stall"),
        (['loss.alpha_schedule={kind="stall",end=0.5,until=0.2}'], r"loss\.alpha_schedule\.until: .*not read by kind 'stall'"),
        (['loss.alpha_schedule={kind="linear",end=0.5,ende=1}'], r"loss\.alpha_schedule\.ende: unknown key; did you mean end"),
        (['loss.alpha_schedule={kind="stall",end=0.95}'], r"alpha_schedule\.end: stall lowers loss\.alpha from 0\.9; .* found 0\.95"),
        (["loss.curriculum.range=3"], r"curriculum: begins at loss\.temperature, .* below 4; found 4"),
        (["loss.curriculum.range=99.0", "loss.curriculum.lowest=2"], r"curriculum\.range: expected lowest \+ range of at most 100; found 101"),
        (["loss.curriculum.lowest=0.5"], r"loss\.curriculum\.lowest: .*greater than or equal to 1"),
        (["loss.curriculum.lr=0.1", 'loss.temperature_schedule={kind="linear",end=1}'], r"curriculum: learns the temperature that temperature_schedule"),
        (["loss.curriculum.lr=0.1", "train.precision=fp16"], r'loss\.curriculum: .*use "bf16"'),
        (["loss.weights.by=age"], r"loss\.weights\.by: .*'teacher_entropy', 'teacher_correctness' or 'gap'"),
        (["loss.weights.power=2"], r"loss\.weights\.by: missing"),
        (["loss.weights.by=gap", "loss.weights.floor=2"], r"loss\.weights\.floor: .*less than or equal to 1"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_by_their_dotted_name(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(ROOT / "configs/digits.toml", overrides)


def test_the_config_of_the_documentation_loads_with_each_of_its_tables():
    path = ROOT / "configs/adaptive-digits.toml"
    loss = load_config(path).loss
    assert (loss.temperature_schedule.kind, loss.temperature_schedule.end) == ("linear", 1.0)
    assert (loss.alpha_schedule.end, loss.highest_temperature, loss.highest_alpha) == (0.5, 4.0, 0.9)
    learnt = path.read_text().replace("# [loss.curriculum]", "[loss.curriculum]").replace("# range", "range")
    learnt = learnt.replace("# [loss.weights]", "[loss.weights]").replace("# by", "by")
    loss = tomllib.loads(learnt)["loss"]
    del loss["temperature_schedule"]
    found = LossSettings.model_validate(loss)
    assert found.curriculum.range == 20
    assert found.weights.by == "teacher_entropy"


def test_scores_of_the_truth_are_refused_for_another_tokenizer():
    with pytest.raises(ValidationError, match=r"weights\.by: gap reads the teacher's probability"):
        LossSettings(name="uld", weights=WeightSettings(by="gap"))


def test_a_loss_without_these_tables_is_the_run_that_it_was_before_they_were():
    """What finished runs have in config.json, by which they are found."""
    assert LossSettings(temperature=2.0).identity() == {
        "name": "forward_kl",
        "temperature": 2.0,
        "alpha": 0.9,
        "tail": "bucket",
        "standardize": False,
        "beta": None,
        "skew": None,
        "mu": None,
        "dkd_alpha": None,
        "dkd_beta": None,
        "nkd_gamma": None,
    }
    changed = LossSettings(weights=WeightSettings(by="gap")).identity()
    assert changed["weights"]["by"] == "gap"
    assert "curriculum" not in changed
