"""Pictures of every kind, as a folder of images shows them."""

import numpy as np
import pytest
from PIL import Image

from softcache.data.sources import open_source
from softcache.errors import SourceError

RAMP = np.linspace(0, 1, 256)
GREY = np.arange(256, dtype=np.uint8)


def read(folder, name, save):
    path = folder / "train/only" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path)
    source = open_source({"name": "imagefolder", "root": str(folder)}, split="train")
    return source.image(0)


def row(values):
    return np.repeat(values[None], 4, axis=0)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("16.png", lambda: Image.fromarray(row(np.rint(RAMP * 65535).astype(np.uint16)))),
        ("16.tif", lambda: Image.fromarray(row(np.rint(RAMP * 65535).astype(np.uint16)))),
        ("32.tif", lambda: Image.fromarray(row(np.rint(RAMP * 65535).astype(np.int32)))),
        ("float.tif", lambda: Image.fromarray(row(RAMP.astype(np.float32)))),
        ("8.png", lambda: Image.fromarray(row(GREY))),
        ("rgb.png", lambda: Image.fromarray(np.repeat(row(GREY)[..., None], 3, 2))),
        ("opaque.png", lambda: Image.fromarray(np.dstack([*[row(GREY)] * 3, np.full((4, 256), 255, np.uint8)]))),
        ("palette.png", lambda: Image.fromarray(row(GREY)).convert("P")),
    ],
)  # fmt: skip
def test_a_ramp_is_a_ramp_whatever_holds_it(tmp_path, name, made):
    image = read(tmp_path, name, made().save)
    assert image.shape == (3, 4, 256)
    assert np.array_equal(image.numpy(), np.broadcast_to(GREY, (3, 4, 256)))


def test_what_is_transparent_is_white(tmp_path):
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[:, :, 3] = [255, 0, 128]
    image = read(tmp_path, "alpha.png", Image.fromarray(pixels).save)
    assert image[:, 0].tolist() == [[0, 255, 127]] * 3
    grey = np.zeros((2, 2, 2), np.uint8)
    assert read(tmp_path, "alpha.png", Image.fromarray(grey, "LA").save)[0].tolist() == [[255, 255]] * 2


def test_photos_are_turned_as_their_camera_says(tmp_path):
    pixels = np.zeros((2, 3), np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image = read(tmp_path, "turned.png", lambda path: Image.fromarray(pixels).save(path, exif=exif))
    assert image.shape == (3, 3, 2)
    assert image[0].tolist() == [[0, 255], [0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("high.tif", np.array([[0.0, 1.5]], np.float32)),
        ("nan.tif", np.array([[0.0, np.nan]], np.float32)),
        ("low.tif", np.array([[-1, 5]], np.int32)),
    ],
)
def test_a_scale_that_is_not_known_is_refused(tmp_path, name, values):
    with pytest.raises(SourceError, match=rf"{name}: cannot be decoded: pixels of .* expected 0 to"):
        read(tmp_path, name, Image.fromarray(values).save)


def test_32_bits_that_hold_8_are_refused(tmp_path):
    with pytest.raises(SourceError, match=r"from 0 to 255: white may be 255 or 65535"):
        read(tmp_path, "int.tif", Image.fromarray(row(GREY).astype(np.int32)).save)
    assert not read(tmp_path, "black.tif", Image.fromarray(np.zeros((2, 2), np.int32)).save).any()
