"""Students of boxes: the loss that mixes ground truth and cells, and mean average precision."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from softcache.config.load import build_config
from softcache.errors import ConfigError, LabelError, SpecError
from softcache.labels import BernoulliLabels, DetectionLabels
from softcache.losses.detection import CellLossSettings
from softcache.modalities import open_data
from softcache.models.detection.mean_average_precision import new_metric, score_batch
from softcache.reader.loader import SoftLabelLoader
from softcache.runs import train_teacher
from softcache.runs.batches import hard_label_batches
from softcache.student.loop import Trainer
from softcache.student.tasks import LossSettings
from softcache.student.tasks.object_detection import DetectionTask

SPEC = "fcos?width=8&depth=0&convs=1"


def config(tmp_path, **tables):
    source = {"modality": "detection", "name": "scenes", "train_scenes": 16, "eval_scenes": 8}
    base = {
        "name": "boxes",
        "source": source,
        "views": {"crop": "padded", "padding": 4, "flip": 0.5},
        "teacher": {"model": SPEC, "weights": "runs/boxes/teacher/model.safetensors"},
        "train_teacher": {"epochs": 1, "batch_size": 8, "device": "cpu"},
    }
    return build_config(base | tables, "test")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_data(config(tmp_path_factory))


@pytest.fixture(scope="module")
def parts(data):
    """A student, another detector's outputs on a batch, and the record of all its cells."""
    torch.manual_seed(0)
    task = data.task(config(None), SPEC)
    student, teacher = task.build().eval(), task.build().eval()
    batch = data.train.load([0, 1], 1, fingerprints=False)
    with torch.no_grad():
        answer, _ = teacher(task.normalize(batch.images))
    return task, student, batch, answer


def record(answer, cells):
    """The record of some cells of each image, all classes kept."""
    image = torch.arange(2).repeat_interleave(len(cells))
    cell = torch.tensor(cells).repeat(2)
    top = answer.class_logits[image, cell].sort(1, descending=True)
    coins = BernoulliLabels(
        ids=top.indices,
        logits=top.values,
        dropped_bound=torch.full((len(cell),), -torch.inf),
        num_classes=top.values.shape[1],
    )
    columns = {"boxes": answer.boxes[image, cell], "centerness": answer.centerness[image, cell]}
    return DetectionLabels(coins, cell.int(), columns)


def test_the_soft_loss_reaches_the_labeled_cells_alone(parts):
    task, student, batch, answer = parts
    outputs, _ = student(task.normalize(batch.images))
    for leaf in (outputs.class_logits, outputs.boxes, outputs.centerness):
        leaf.retain_grad()
    task.soft(student, outputs, record(answer, [3, 270]), 2.0).backward()
    for leaf in (outputs.class_logits, outputs.boxes, outputs.centerness):
        touched = leaf.grad.flatten(2).abs().sum(-1) if leaf.ndim == 3 else leaf.grad.abs()
        assert set(touched.nonzero()[:, 1].tolist()) <= {3, 270}
    assert outputs.class_logits.grad.abs().sum() > 0
    assert outputs.centerness.grad.abs().sum() > 0


def test_a_student_that_is_the_teacher_has_no_class_and_box_loss(parts):
    task, _, _, answer = parts
    alone = DetectionTask(
        task.build_model,
        task.evaluation,
        task.normalize,
        task.loss_settings,
        CellLossSettings(centerness_weight=0, box="l1"),
    )
    teacher = task.build()
    assert float(alone.soft(teacher, answer, record(answer, [3, 40, 270]), 1.0)) < 1e-5
    with pytest.raises(LabelError, match="as many cells for each of 2 images; found 3 rows"):
        alone.soft(teacher, answer, record(answer, [3, 40, 270]).take(slice(0, 3)), 1.0)


def test_alpha_mixes_the_modules_own_loss_with_the_soft_one(parts):
    task, student, batch, answer = parts
    labeled = batch.__class__(
        **{name: getattr(batch, name) for name in ("images", "boxes", "classes", "samples", "view")},
        fingerprints=batch.fingerprints,
        rows_per_sample=2,
        labels=record(answer, [3, 270]),
    )

    def loss(alpha):
        settings = LossSettings(temperature=1, alpha=alpha)
        mixing = DetectionTask(
            task.build_model, task.evaluation, task.normalize, settings, CellLossSettings()
        )
        with torch.no_grad():
            return float(mixing.loss(student, labeled))

    assert loss(0.25) == pytest.approx(0.75 * loss(0.0) + 0.25 * loss(1.0), rel=1e-5)
    assert loss(0.0) != pytest.approx(loss(1.0))
    with torch.no_grad():
        _, own = student(task.normalize(batch.images), batch.targets)
    assert loss(0.0) == pytest.approx(float(sum(own.values())), rel=1e-5)


def test_detections_that_are_the_truth_score_one_and_crowds_do_not_count(data, monkeypatch):
    from softcache.data.sources.detection.base import BoxAnnotations
    from softcache.models.detection.detector import Detector

    task = data.task(config(None), SPEC)
    truths = [data.evaluation.source.truth(sample) for sample in range(4)]
    answer = [
        {
            "boxes": torch.from_numpy(truth.boxes),
            "scores": torch.ones(len(truth)),
            "labels": torch.from_numpy(truth.classes),
        }
        for truth in truths
    ]
    monkeypatch.setattr(Detector, "detections", lambda self, outputs, size: answer)

    def score(found):
        metric = new_metric()
        monkeypatch.setattr(type(data.evaluation), "in_original", lambda self, samples, boxes: (boxes, found))
        score_batch(
            task.build().eval(), data.evaluation, range(4), task.normalize, metric, torch.device("cpu")
        )
        return float(metric.compute()["map"])

    assert score(truths) == pytest.approx(1.0)
    crowded = BoxAnnotations(truths[0].boxes, truths[0].classes, np.arange(len(truths[0])) == 0)
    assert score([crowded, *truths[1:]]) == pytest.approx(1.0)
    gone = [truth.take(np.zeros(len(truth), bool)) for truth in truths[:1]]
    assert score([*gone, *truths[1:]]) < 1.0


def test_a_detector_is_trained_and_scored_by_the_loop_of_all_students(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = config(tmp_path, views={"size": 64, "flip": 0.5})
    data = open_data(run)
    assert data.views.settings.letterboxed
    metrics, weights = train_teacher(run, data)
    assert weights.exists()
    resolved = json.loads((weights.parent / "resolved.json").read_text())
    assert open_data(build_config(resolved, "resolved.json")).views.digest == data.views.digest
    assert 0 <= metrics["map"] <= metrics["map50"] <= 1
    assert metrics["history"][0]["eval_loss"] > 0


def test_a_step_goes_along_the_gradient_of_its_loss_whatever_the_number_of_cells(data):
    train = {
        "optimizer": "sgd",
        "lr": 0.01,
        "weight_decay": 0,
        "warmup_share": 0,
        "batch_size": 8,
        "device": "cpu",
    }
    run = config(None, train=train)
    task, feed = data.task(run, SPEC), hard_label_batches(run, data)
    batch = next(iter(SoftLabelLoader(feed.dataset, hard_label_batches(run, data).order)))
    torch.manual_seed(0)
    model = task.build().train()
    task.loss(model, batch).backward()
    expected = {
        name: p.detach() - 0.01 * (0 if p.grad is None else p.grad) for name, p in model.named_parameters()
    }
    torch.manual_seed(0)
    trainer = Trainer(Accelerator(cpu=True), task, feed, run.train)
    next(trainer.epoch())
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], msg=name)


def test_evaluation_needs_no_more_than_a_detector(data):
    task = data.task(config(None), SPEC)
    with pytest.raises(SpecError, match="expected a detector; found Identity"):
        score_batch(
            _Says(task.build().eval()), data.evaluation, range(2), task.normalize, None, torch.device("cpu")
        )
    found = task.evaluate(task.build().eval(), Accelerator(cpu=True), 4)
    assert set(found) == {"map", "map50", "eval_loss"}


class _Says(torch.nn.Identity):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images, targets):
        return self.inner(images, targets)


_Says.__name__ = "Identity"


def test_another_file_of_the_backbone_is_another_student(data, tmp_path):
    found = []
    for value in (0.0, 1.0):
        save_file({"conv1.weight": torch.full((2,), value)}, tmp_path / "backbone.safetensors")
        found.append(
            data.model_identity(
                f"torchvision:fcos_resnet50_fpn?backbone_weights={tmp_path}/backbone.safetensors"
            )
        )
    assert found[0] != found[1]
    assert data.model_identity(SPEC) == {}


def test_a_student_of_boxes_reads_the_teachers_images(tmp_path):
    run = config(tmp_path, student={"model": SPEC, "views": {"size": 32}})
    with pytest.raises(ConfigError, match="a detector's student sees the teacher's images"):
        open_data(run).task(run, SPEC)
