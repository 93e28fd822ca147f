"""Mean average precision of letterboxed photos is what pycocotools gives for the same detections in the original images."""

import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from softcache.data.boxes import ViewedScenes
from softcache.data.sources.detection.base import BoxAnnotations
from softcache.data.transforms import Views, ViewSettings
from softcache.models.detection import mean_average_precision as scoring
from softcache.models.detection.build import build_detector
from softcache.models.detection.detector import Detector
from softcache.models.detection.mean_average_precision import new_metric, score_batch
from softcache.models.image import Normalize

PYCOCOTOOLS = {"map": 0.29581601, "map_50": 0.59941201}
"""Of pycocotools 2.0.11; the test computes them anew where it is installed."""


class Photos:
    """Black photos of many sizes, their boxes, some of which are crowds, and detections near them."""

    name, num_classes, class_names = "photos", 3, ("a", "b", "c")

    def __init__(self):
        draw = np.random.RandomState(5)
        self.sizes = [(int(draw.randint(30, 120)), int(draw.randint(30, 120))) for _ in range(16)]
        self.truths, self.found = [], []
        for height, width in self.sizes:
            count = draw.randint(0, 6)
            corner = draw.rand(count, 2) * 0.6
            boxes = np.concatenate([corner, corner + 0.1 + draw.rand(count, 2) * 0.3], 1)
            boxes = boxes * [width, height, width, height]
            classes = draw.randint(0, 3, count)
            self.truths.append(BoxAnnotations.of(boxes, classes, draw.rand(count) < 0.15))
            near = boxes + draw.randn(count, 4) * 0.015 * max(height, width)
            more = np.array([[0, 0, 0.4, 0.3], [0.3, 0.4, 0.9, 1]]) * [width, height, width, height]
            labels = np.concatenate([classes, draw.randint(0, 3, 2)])
            placed = np.concatenate([near, more]).clip(0, [width, height, width, height])
            self.found.append((placed, draw.rand(len(labels)), labels))

    def __len__(self):
        return len(self.sizes)

    def key(self, sample):
        return f"{sample}.jpg"

    def image(self, sample):
        return torch.zeros(3, *self.sizes[sample], dtype=torch.uint8)

    def targets(self):
        return np.array([len(truth) for truth in self.truths])

    def truth(self, sample):
        return self.truths[sample]


def by_pycocotools(photos):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def listed(boxes):
        return [[float(x0), float(y0), float(x1 - x0), float(y1 - y0)] for x0, y0, x1, y1 in boxes]

    truth, coco = [], COCO()
    for image, annotations in enumerate(photos.truths):
        rows = zip(listed(annotations.boxes), annotations.classes, annotations.crowd, strict=True)
        for box, label, crowd in rows:
            entry = {"image_id": image, "category_id": int(label), "bbox": box, "iscrowd": int(crowd)}
            truth.append(entry | {"id": len(truth) + 1, "area": box[2] * box[3]})
    images = [{"id": number, "height": h, "width": w} for number, (h, w) in enumerate(photos.sizes)]
    coco.dataset = {"images": images, "annotations": truth, "categories": [{"id": c} for c in range(3)]}
    coco.createIndex()
    found = [
        {"image_id": image, "category_id": int(label), "bbox": box, "score": float(score)}
        for image, (boxes, scores, labels) in enumerate(photos.found)
        for box, score, label in zip(listed(boxes), scores, labels, strict=True)
    ]
    scored = COCOeval(coco, coco.loadRes(found), "bbox")
    scored.evaluate()
    scored.accumulate()
    scored.summarize()
    return {"map": scored.stats[0], "map_50": scored.stats[1]}


def test_the_score_is_cocos(monkeypatch):
    photos, size = Photos(), 64
    data = ViewedScenes(photos, Views(ViewSettings(size=size, fit="letterbox")), rows_per_sample=4)
    metric, batch = new_metric(), []

    def detections(self, outputs, viewed):
        assert viewed == (size, size)
        answer = []
        for sample in batch[-1]:
            height, width = photos.sizes[sample]
            shown = data.views.settings.scaled(height, width)
            assert max(shown) == size
            boxes, scores, labels = photos.found[sample]
            seen = boxes * [shown[1] / width, shown[0] / height, shown[1] / width, shown[0] / height]
            values = {"boxes": torch.tensor(seen).float(), "scores": torch.tensor(scores).float()}
            answer.append(values | {"labels": torch.tensor(labels)})
        return answer

    monkeypatch.setattr(Detector, "detections", detections)
    model = build_detector("fcos?width=8&depth=0&convs=1", num_classes=3, input_shape=(3, size, size)).eval()
    for start in range(0, len(photos), 8):
        batch.append(range(start, start + 8))
        score_batch(model, data, batch[-1], Normalize((0.5,), (0.5,)), metric, torch.device("cpu"))
    found = metric.compute()
    for name, value in PYCOCOTOOLS.items():
        assert float(found[name]) == pytest.approx(value, abs=1e-6)
    if find_spec("pycocotools"):
        assert by_pycocotools(photos) == pytest.approx(PYCOCOTOOLS, abs=1e-6)


def test_batches_count_by_their_images_and_a_split_without_a_box_has_no_precision(monkeypatch):
    def scored(model, data, samples, normalize, metric, device):
        nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        for _ in samples:
            metric.update([nothing | {"scores": torch.zeros(0)}], [nothing])
        return torch.tensor(float(samples.start))

    monkeypatch.setattr(scoring, "score_batch", scored)
    batches, cpu = [range(3), range(3, 4)], torch.device("cpu")
    found = scoring.mean_average_precision(None, None, None, device=cpu, batches=batches)
    assert found["eval_loss"] == pytest.approx(3 / 4)
    assert math.isnan(found["map"])
    assert math.isnan(found["map50"])
