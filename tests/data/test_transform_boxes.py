"""A box drawn as pixels moves like the box."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softcache.data.transforms import Views, ViewSettings
from softcache.data.transforms.boxes import MIN_VISIBLE
from softcache.errors import SpecError

POLICIES = {
    "padded": {"crop": "padded", "padding": 9, "flip": 0.5},
    "padded-sized": {"crop": "padded", "padding": 5, "flip": 0.5, "size": 32, "eval_share": 0.8},
    "resized": {"crop": "resized", "size": 48, "scale": (0.3, 1.0), "flip": 0.5},
    "resized-own-size": {"crop": "resized", "scale": (0.3, 1.0), "flip": 0.5},
    "plain-sized": {"size": 40, "eval_share": 0.75},
    "letterbox": {
        "size": 40,
        "fit": "letterbox",
        "mean": (0.0,),
        "crop": "padded",
        "padding": 4,
        "flip": 0.5,
    },
    "letterbox-tall": {"size": (90, 40), "fit": "letterbox", "mean": (0.0,), "flip": 0.5},
}


@pytest.mark.parametrize("policy", POLICIES)
@given(
    box=st.tuples(st.integers(0, 60), st.integers(0, 40), st.integers(6, 30), st.integers(6, 30)),
    view=st.integers(0, 6),
    key=st.text("abc", min_size=1, max_size=3),
)
def test_a_box_drawn_as_pixels_moves_like_the_box(policy, box, view, key):
    height, width = 56, 80
    left, top = box[:2]
    right, bottom = min(left + box[2], width), min(top + box[3], height)
    image = torch.zeros(1, height, width, dtype=torch.uint8)
    image[:, top:bottom, left:right] = 255
    views = Views(ViewSettings(**POLICIES[policy]))
    (moved,), (kept,) = views.apply_boxes(
        np.array([[left, top, right, bottom]]), key=key, view=view, height=height, width=width
    )
    seen = views.apply(image, key=key, view=view)[0].numpy()
    rows, columns = np.flatnonzero(seen.max(1) >= 128), np.flatnonzero(seen.max(0) >= 128)
    if not kept:  # at most a quarter of it may have been in sight
        grown = seen.size / (height * width) / 0.3
        assert (seen >= 128).sum() <= MIN_VISIBLE * (right - left) * (bottom - top) * grown + 4 * sum(
            seen.shape
        )
        return
    if min(moved[2] - moved[0], moved[3] - moved[1]) < 2:
        return  # a sliver: antialiasing leaves it no bright pixel to measure
    assert len(rows)
    found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert np.abs(np.array(found) - moved).max() <= 1.0


def test_a_letterbox_shows_the_whole_image_and_the_mean():
    views = Views(ViewSettings(size=(40, 32), fit="letterbox", mean=(0.2, 0.4, 0.6)))
    image = torch.full((3, 30, 60), 255, dtype=torch.uint8)
    seen = views.apply(image, key="a", view=0)
    assert seen.shape == (3, 40, 32)
    assert bool((seen[:, :16] == 255).all())  # 60 x 30 in 32 x 40: 32 x 16
    assert seen[:, 16:].unique(dim=1).flatten().unique().tolist() == [51, 102, 153]
    boxes = np.array([[0, 0, 60, 30], [3, 6, 30, 9.5]])
    moved, kept = views.apply_boxes(boxes, key="a", view=0, height=30, width=60)
    assert bool(kept.all())
    np.testing.assert_allclose(moved, boxes * (32 / 60), rtol=1e-6)
    np.testing.assert_allclose(views.original_boxes(moved, height=30, width=60), boxes, rtol=1e-6)
    stretched = Views(ViewSettings(size=(40, 32), fit="stretch"))
    moved, kept = stretched.apply_boxes(boxes, key="a", view=0, height=30, width=60)
    assert bool(kept.all())
    np.testing.assert_allclose(moved[0], [0, 0, 32, 40])
    np.testing.assert_allclose(stretched.original_boxes(moved, height=30, width=60), boxes, rtol=1e-6)


def test_a_crop_keeps_the_identity_that_it_had_before_letterboxes():
    cropped = ViewSettings(size=32)
    assert "fit" not in cropped.identity()
    assert "fit" not in ViewSettings(fit="letterbox").identity()  # without a size the image stays as it is
    boxed = ViewSettings(size=32, fit="letterbox")
    assert boxed.identity()["fit"] == "letterbox"
    assert Views(boxed).digest != Views(cropped).digest


def test_boxes_stay_as_they_are_in_a_plain_view_and_out_of_sight_they_are_dropped():
    boxes = np.array([[1.5, 2, 9, 20], [-30, 0, 4, 8]], np.float32)
    moved, kept = Views(ViewSettings()).apply_boxes(boxes, key="a", view=0, height=32, width=32)
    assert moved.dtype == np.float32
    assert moved.tolist() == [[1.5, 2, 9, 20], [0, 0, 4, 8]]
    assert kept.tolist() == [True, False]
    none, kept = Views(ViewSettings()).apply_boxes(np.zeros((0, 4)), key="a", view=0, height=32, width=32)
    assert none.shape == (0, 4)
    assert not len(kept)


def test_a_box_that_is_erased_is_dropped():
    views = Views(ViewSettings(erase=1.0, erase_scale=(0.2, 0.2)))
    top, left, rows, columns = views.parameters("a", 1, 32, 32).erase
    gone = [left, top, left + columns, top + rows]
    boxes = np.array([gone, [0, 0, 32, 32]], np.float32)
    moved, kept = views.apply_boxes(boxes, key="a", view=1, height=32, width=32)
    assert moved.tolist() == boxes.tolist()
    assert kept.tolist() == [False, True]


def test_views_that_boxes_cannot_follow_are_refused():
    views = Views(ViewSettings(augment="trivial"))
    with pytest.raises(SpecError, match=r"views.augment: 'trivial' with boxes: .* use crop, flip"):
        views.apply_boxes(np.zeros((0, 4)), key="a", view=1, height=8, width=8)
    views = Views(ViewSettings(transform="torch.nn:Identity"))
    with pytest.raises(SpecError, match=r"views.transform: 'torch.nn:Identity' with boxes"):
        views.apply_boxes(np.zeros((0, 4)), key="a", view=1, height=8, width=8)
