"""What is drawn on the image of a sample: boxes where the teacher has them, classes of a mask's cells; looked at in a browser."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from softcache.config.load import build_config
from softcache.models.segmentation import build_segmenter
from softcache.runs import capture_labels, open_data, open_teacher
from softcache.tools.browse import Browser, SourceSamples
from softcache.tools.browse.drawn import MAX_BOXES
from tests.support.cell_caches import SPEC, make_cells
from tests.support.pages import chromium, needs_chromium, page_opener

SPECS = (SPEC, "ssdlite?width=8&depth=0", "fcos?width=8&depth=0&convs=1&bins=4")
SIDE = 64


def decoded(data, spec, labels):
    """Boxes as shares of the image, by the formulas of FCOS and SSD."""
    left, top, right, bottom = (
        data.grid(spec).anchors[torch.as_tensor(labels.cells).long()].double().numpy().T
    )
    x, y, wide, high = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
    if "bins" in labels.columns:
        weights = np.exp(labels.columns["bins"].astype(np.float64))
        raw = (weights / weights.sum(-1, keepdims=True)) @ np.arange(weights.shape[-1])
    else:
        raw = labels.columns["boxes"].astype(np.float64)
    a, b, c, d = raw.T
    if spec.startswith("fcos"):
        boxes = [x - a * wide, y - b * high, x + c * wide, y + d * high]
    else:
        x, y, wide, high = x + a / 10 * wide, y + b / 10 * high, wide * np.exp(c / 5), high * np.exp(d / 5)
        boxes = [x - wide / 2, y - high / 2, x + wide / 2, y + high / 2]
    return np.clip(np.stack(boxes, 1) / SIDE, 0, 1)


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn-masks")
    torch.manual_seed(0)
    model = build_segmenter("unet?width=4&depth=1", num_classes=11, input_shape=(1, SIDE, SIDE))
    save_file(model.state_dict(), folder / "teacher.safetensors")
    tables = {
        "name": "masks",
        "source": {"modality": "segmentation", "name": "scenes", "train_scenes": 4, "eval_scenes": 2},
        "views": {"mean": [0.2], "std": [0.22]},
        "teacher": {"model": "unet?width=4&depth=1", "weights": str(folder / "teacher.safetensors")},
        "labels": {"k": 3, "positions": {"policy": "random", "share": 0.5, "stride": 4}},
        "capture": {"device": "cpu", "evaluate": False},
        "student": {"model": "unet?width=4&depth=1"},
    }
    config = build_config(tables, "test")
    data = open_data(config)
    return data, capture_labels(config, data, open_teacher(config, data), str(folder / "cache"))[0]


@pytest.mark.parametrize("spec", SPECS)
def test_boxes_are_where_the_teacher_has_them(tmp_path, spec):
    _, data, cache = make_cells(tmp_path, spec=spec)
    (one,) = Browser(cache, SourceSamples(cache, data)).details([3])
    labels, batch = cache.read([3], 0), data.train.load([3], 0)
    found, drawn = decoded(data, spec, labels), one["drawn"]
    assert 1 <= len(drawn["boxes"]) <= MAX_BOXES
    for *place, name, score, number in drawn["boxes"]:
        row = np.abs(found - place).max(1).argmin()
        np.testing.assert_allclose(place, found[row], atol=2e-3)
        assert name == str(number) == data.train.source.class_names[number]
        assert 0 < score <= 1
    assert [box[-2] for box in drawn["boxes"]] == sorted((box[-2] for box in drawn["boxes"]), reverse=True)
    true = [[*(box / SIDE).tolist(), int(n)] for box, n in zip(batch.boxes[0], batch.classes[0], strict=True)]
    assert [[*box[:4], box[-1]] for box in drawn["true_boxes"]] == [
        pytest.approx(box, abs=1e-3) for box in true
    ]
    assert one["why"] == ""


def test_a_detector_of_another_grid_draws_nothing_and_names_the_reason(tmp_path):
    _, data, cache = make_cells(tmp_path)
    data._outputs = lambda spec, found=data._outputs: found("retinanet?width=8&depth=0")
    (one,) = Browser(cache, SourceSamples(cache, data)).details([3])
    assert one["drawn"] == {}
    assert "cannot be drawn" in one["why"]
    assert "expected the grid" in one["why"]
    (one,) = Browser(cache).details([3])
    assert (one["drawn"], one["picture"]) == ({}, None)


def test_cells_of_a_mask_have_the_teachers_class(masks):
    data, cache = masks
    (one,) = Browser(cache, SourceSamples(cache, data)).details([2])
    drawn, stored, batch = one["drawn"], cache.read_stored([2], 0), data.train.load([2], 0)
    assert (drawn["height"], drawn["width"]) == (16, 16)
    assert drawn["true_mask"] == batch.targets.tolist()
    shown = np.array(drawn["mask"])
    np.testing.assert_array_equal(np.flatnonzero(shown >= 0), np.sort(stored.positions))
    np.testing.assert_array_equal(shown[stored.positions], np.asarray(stored.labels.ids)[:, 0])
    assert drawn["names"][0] == "background"
    (alone,) = Browser(cache).details([2])
    assert alone["drawn"]["mask"] == drawn["mask"]
    assert "true_mask" not in alone["drawn"]
    surest = min(range(len(one["views"][0]["cells"])), key=lambda n: one["views"][0]["cells"][n]["h"])
    assert surest == len(one["views"][0]["cells"]) - 1, "the least certain cells come first"


@needs_chromium
def test_a_browser_lays_them_on_the_image(masks, tmp_path):
    _, boxes, cells = make_cells(tmp_path)
    (tmp_path / "boxes.html").write_text(Browser(cells, SourceSamples(cells, boxes)).page()[0])
    (tmp_path / "masks.html").write_text(Browser(masks[1], SourceSamples(masks[1], masks[0])).page()[0])
    with chromium() as browser, page_opener(browser) as open_page:
        page, messages, _ = open_page((tmp_path / "boxes.html").as_uri())
        first = page.locator(".card").first
        image = first.locator("figure").last.locator("img").bounding_box()
        key = first.locator("h3").inner_text()
        sample = list(cells.keys).index(key)
        true = boxes.train.load([sample], 0).boxes[0].numpy() / SIDE
        shown = [one.bounding_box() for one in first.locator("figure").last.locator(".box").all()]
        assert len(shown) == len(true)
        for box, (left, top, right, bottom) in zip(shown, true.tolist(), strict=True):
            expected = [left * image["width"] + image["x"], top * image["height"] + image["y"]]
            expected += [(right - left) * image["width"], (bottom - top) * image["height"]]
            assert list(box.values()) == pytest.approx(expected, abs=1.5)
        page, messages, _ = open_page((tmp_path / "masks.html").as_uri())
        first = page.locator(".card").first
        over, image = first.locator("canvas").first, first.locator("img").first
        assert over.bounding_box() == pytest.approx(image.bounding_box(), abs=1)
        drawn = page.evaluate("[...seen.values()][0].drawn.true_mask.filter(number => number > 0).length")
        painted = over.page.evaluate(
            "[...document.querySelectorAll('.card canvas')].map(one => [...one.getContext('2d')"
            ".getImageData(0, 0, one.width, one.height).data].filter((x, n) => n % 4 === 3 && x).length)"
        )
        assert drawn in painted
        assert messages == []
