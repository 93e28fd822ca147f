"""Views are a pure function of (seed, key, view): frozen numbers, every op against a slow reference, no side effects."""

import colorsys
import dataclasses
import hashlib
import json
import math
import os
import pickle
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import xxhash
from pydantic import ValidationError

from softcache.data.sources import open_source
from softcache.data.transforms import ViewParameters, Views, ViewSettings
from softcache.data.transforms import ops as view_ops
from softcache.data.transforms.parameters import AUTOAUGMENT, RANGES
from softcache.errors import SpecError
from tests.support.caches import ROOT
from tests.support.programs import run_program

EVERYTHING = {
    "seed": 7, "size": 24, "crop": "resized", "flip": 0.5, "augment": "randaugment", "num_ops": 2,
    "color_jitter": [0.4, 0.4, 0.4, 0.1], "erase": 0.5,
}  # fmt: skip


def views(**settings):
    return Views(ViewSettings.model_validate(settings))


def picture(channels=3, height=13, width=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, height, width), generator=generator, dtype=torch.uint8)


def photo(channels, height, width):
    """A smooth picture with a bright edge, large enough for torch to use several threads."""
    y, x = torch.arange(height)[:, None], torch.arange(width)[None]
    return torch.stack([(y * (k + 2) + x * 3) % 256 for k in range(channels)]).to(torch.uint8)


def pixel_hash(image):
    return hashlib.sha256(image.numpy().tobytes()).hexdigest()[:16]


# -- the stream ----------------------------------------------------------------------------------------------


def philox_by_the_book(key, counter):
    """Philox4x64-10 (Salmon et al. 2011): the first four outputs at a counter."""
    mask = 2**64 - 1
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(second >> 64) ^ c[1] ^ k[0], second & mask, (first >> 64) ^ c[3] ^ k[1], first & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return c


@pytest.mark.parametrize("view", [1, 2, 2**32 - 1])
def test_the_stream_can_be_reproduced_without_numpy(view):
    made = views(seed=2**63 + 5)._uniforms("digits/0017 é", view)
    key = [2**63 + 5, xxhash.xxh3_64_intdigest("digits/0017 é".encode())]
    blocks = [philox_by_the_book(key, [1 + block, view, 0, 0]) for block in range(16)]
    assert made == [(raw >> 11) / 2**53 for block in blocks for raw in block]


def test_parameters_never_change_between_versions():
    assert views(**EVERYTHING).parameters("digits/0017", 1, 40, 30) == ViewParameters(
        crop=(1, 2, 32, 27),
        flip=False,
        ops=(("shear_y", 0.09), ("translate_y", -0.13595166163141995)),
        jitter=(0.7266145685847754, 0.8386745185317965, 0.657474563743213, 0.09858537261807672),
        erase=None,
    )
    assert views(**EVERYTHING).parameters("digits/0017", 2, 40, 30) == ViewParameters(
        crop=(4, 0, 34, 29),
        flip=True,
        ops=(("sharpness", -0.27), ("shear_y", -0.09)),
        jitter=(0.9073388421106723, 0.9249689415317646, 0.7038782047547505, -0.045073816012149374),
        erase=None,
    )
    assert views(**EVERYTHING | {"erase": 1.0}).parameters("digits/0017", 1, 40, 30).erase == (15, 0, 7, 11)
    padded = views(crop="padded", padding=2, flip=0.5, augment="trivial")
    assert padded.parameters("digits/0017", 1, 8, 8) == ViewParameters(
        crop=(3, 1, 8, 8), flip=True, ops=(("equalize", 0.0),), jitter=None, erase=None
    )


def test_pixels_never_change_between_versions():
    image = open_source({"name": "digits"}, split="train").image(17)
    key = "digits/0017"
    found = {
        "plain": views(size=24).apply(image, key=key, view=0),
        "as torchvision": views(size=24, geometry="torchvision").apply(image, key=key, view=0),
        "bicubic": views(**EVERYTHING | {"interpolation": "bicubic"}).apply(
            photo(3, 40, 30), key=key, view=2
        ),
        "padded": views(crop="padded", padding=2, flip=0.5).apply(image, key=key, view=1),
        "everything": views(**EVERYTHING).apply(image, key=key, view=1),
        "rgb": views(**EVERYTHING).apply(photo(3, 40, 30), key=key, view=2),
        "trivial": views(augment="trivial").apply(photo(3, 40, 30), key=key, view=3),
    }
    assert {name: pixel_hash(out) for name, out in found.items()} == {
        "plain": "95c6a3f42f23b9ad",
        "as torchvision": "55dddcf5c02203c6",
        "bicubic": "be0e4b3a83910a6a",
        "padded": "7c2a39bb6e6b530a",
        "everything": "e80a9739056a4be0",
        "rgb": "b188e67b19b2f2d6",
        "trivial": "ab204c6924ff8dcf",
    }


def test_other_keys_views_and_seeds_give_other_views():
    base = views(**EVERYTHING)
    drawn = [base.parameters(key, view, 40, 30) for key in ("a", "b", "a ") for view in (1, 2, 3)]
    drawn.append(views(**EVERYTHING | {"seed": 8}).parameters("a", 1, 40, 30))
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"flip": 0.0}, {"flip"}),
        ({"flip": 1.0}, {"flip"}),
        ({"augment": "none"}, {"ops"}),
        ({"augment": "trivial"}, {"ops"}),
        ({"color_jitter": [0, 0, 0, 0]}, {"jitter"}),
        ({"erase": 0.0}, {"erase"}),
        ({"erase": 1.0}, {"erase"}),
        ({"crop": "none"}, {"crop"}),
        ({"crop": "padded", "padding": 3}, {"crop"}),
        ({"scale": [0.5, 0.6]}, {"crop"}),
        ({"magnitude": 20}, {"ops"}),
    ],
    ids=str,
)
def test_one_op_changes_no_other(change, fields):
    for view in range(1, 40):
        before = dataclasses.asdict(views(**EVERYTHING).parameters("a", view, 40, 30))
        after = dataclasses.asdict(views(**EVERYTHING | change).parameters("a", view, 40, 30))
        assert {name for name in before if before[name] != after[name]} <= fields


def test_more_ops_keep_the_first_ones():
    few, many = views(augment="randaugment", num_ops=2), views(augment="randaugment", num_ops=10)
    for view in range(1, 20):
        assert many.parameters("a", view, 8, 8).ops[:2] == few.parameters("a", view, 8, 8).ops


def test_parameters_follow_their_distributions():
    made = views(**EVERYTHING | {"scale": [0.2, 0.6], "ratio": [0.5, 2.0], "erase_scale": [0.1, 0.2]})
    drawn = [made.parameters(f"k{n}", 1, 100, 100) for n in range(2000)]
    assert np.mean([p.flip for p in drawn]) == pytest.approx(0.5, abs=0.05)
    assert np.mean([p.erase is not None for p in drawn]) == pytest.approx(0.5, abs=0.05)
    area = np.array([p.crop[2] * p.crop[3] / 100**2 for p in drawn])
    assert area.min() > 0.18
    assert area.max() < 0.62
    assert area.mean() == pytest.approx(0.4, abs=0.02)
    aspect = np.log([p.crop[3] / p.crop[2] for p in drawn])
    assert np.abs(aspect).max() <= math.log(2) + 0.1
    assert aspect.mean() == pytest.approx(0, abs=0.05)
    for side in (100, 24):
        boxes = [(p.crop if side == 100 else p.erase) for p in drawn]
        assert all(
            t >= 0 and t + h <= side and left >= 0 and left + w <= side
            for t, left, h, w in filter(None, boxes)
        )
    assert {name for p in drawn for name, _ in p.ops} == set(RANGES)
    factors = np.array([p.jitter for p in drawn])
    assert np.allclose(factors.min(0), [0.6, 0.6, 0.6, -0.1], atol=0.01)
    assert np.allclose(factors.max(0), [1.4, 1.4, 1.4, 0.1], atol=0.01)


def test_trivial_draws_one_op_of_any_strength():
    made = views(augment="trivial")
    drawn = [made.parameters(f"k{n}", 1, 8, 8).ops for n in range(8000)]
    assert {len(ops) for ops in drawn} == {1}
    rotations = {round(strength / 4.5) for ((name, strength),) in drawn if name == "rotate"}
    assert rotations == set(range(-30, 31))


def test_parameters_are_fit_for_json():
    drawn = views(**EVERYTHING).parameters("a", 1, 40, 30)
    assert json.loads(json.dumps(dataclasses.asdict(drawn)))["flip"] in (True, False)


# -- pixels --------------------------------------------------------------------------------------------------


def test_view_zero_is_the_image_or_its_scaled_centre():
    image = picture(3, 30, 41)
    assert views(crop="padded", padding=2, flip=1.0).apply(image, key="a", view=0) is image
    plain = views(size=16, eval_share=0.8).apply(image, key="a", view=0)
    weights = torch.nn.functional.interpolate(
        image[None].double(), (20, 27), mode="bilinear", antialias=True
    )[0]
    assert (plain.double() - weights[:, 2:18, 5:21]).abs().max() <= 1
    assert plain.shape == (3, 16, 16)
    ramp = torch.arange(32, dtype=torch.uint8).mul(8).repeat(1, 32, 1)
    halved = views(size=16, eval_share=1.0).apply(ramp, key="a", view=0)
    assert halved.shape == (1, 16, 16)
    assert bool((halved[0].diff(dim=1) >= 14).all())


def test_padded_crop_and_flip_move_pixels_and_nothing_else():
    image, made, seen = picture(1, 5, 4), views(crop="padded", padding=2, flip=0.5), set()
    for view in range(1, 500):
        drawn, out = made.parameters("a", view, 5, 4), made.apply(image, key="a", view=view)
        top, left, height, width = drawn.crop
        assert (height, width) == (5, 4)
        expected = torch.zeros_like(image)
        for y in range(5):
            for x in range(4):
                row, column = y + top - 2, x + left - 2
                if 0 <= row < 5 and 0 <= column < 4:
                    expected[0, y, 3 - x if drawn.flip else x] = image[0, row, column]
        assert torch.equal(out, expected)
        seen.add((top, left, drawn.flip))
    assert len(seen) == 50


def test_resized_crop_shows_the_rectangle():
    image, made = photo(3, 40, 30), views(crop="resized", size=12)
    for view in range(1, 10):
        top, left, height, width = made.parameters("a", view, 40, 30).crop
        cut = image[:, top : top + height, left : left + width]
        expected = torch.nn.functional.interpolate(
            cut[None].double(), (12, 12), mode="bilinear", antialias=True
        )[0]
        assert (made.apply(image, key="a", view=view).double() - expected).abs().max() <= 1
    own_size = views(crop="resized")
    assert own_size.apply(image, key="a", view=1).shape == image.shape


def test_without_a_random_crop_training_sees_the_plain_view():
    image = photo(3, 40, 30)
    made = views(size=16, flip=1.0)
    assert torch.equal(made.apply(image, key="a", view=1), made.apply(image, key="a", view=0).flip(-1))
    moved = views(size=16, crop="padded", padding=3)
    top, left, *_ = moved.parameters("a", 1, 40, 30).crop
    padded = torch.nn.functional.pad(moved.apply(image, key="a", view=0), [3] * 4)
    assert torch.equal(moved.apply(image, key="a", view=1), padded[:, top : top + 16, left : left + 16])


def test_erase_blanks_its_rectangle_and_spares_the_source():
    image = picture().clamp(min=1)
    before, made = image.clone(), views(erase=1.0)
    for view in range(1, 10):
        top, left, height, width = made.parameters("a", view, 13, 10).erase
        out = made.apply(image, key="a", view=view)
        inside = torch.zeros(13, 10, dtype=torch.bool)
        inside[top : top + height, left : left + width] = True
        assert torch.equal(out == 0, inside.expand(3, -1, -1))
        assert torch.equal(out[:, ~inside], image[:, ~inside])
    assert torch.equal(image, before)


def test_what_is_erased_is_black_the_mean_or_normal_noise():
    image, settings = photo(3, 60, 80), {"erase": 1.0, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.1, 0.15]}
    top, left, height, width = views(**settings).parameters("a", 1, 60, 80).erase
    for fill in ("black", "mean", "noise"):
        out = views(**settings, erase_fill=fill).apply(image, key="a", view=1)
        erased = out[:, top : top + height, left : left + width].double()
        out[:, top : top + height, left : left + width] = image[:, top : top + height, left : left + width]
        assert torch.equal(out, image)
        if fill == "noise":
            z = (erased / 255 - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor(
                [0.2, 0.1, 0.15]
            ).view(3, 1, 1)
            assert abs(float(z.mean())) < 4 / z.numel() ** 0.5
            assert abs(float(z.std()) - 1) < 0.05
            assert len(z.unique()) > 200
        else:
            expected = [0, 0, 0] if fill == "black" else [102, 128, 153]
            assert (erased == torch.tensor(expected).view(3, 1, 1)).all()
    assert views(erase=0.3).digest == views(erase=0.3, erase_fill="black").digest
    assert views(erase_fill="mean").digest == views().digest
    assert views(erase=0.3, erase_fill="mean").digest != views(erase=0.3).digest


def test_autoaugment_and_three_augment_draw_as_their_papers_have_them():
    drawn = Counter()
    for number in range(3000):
        ((name, strength),) = views(augment="three_augment").parameters(str(number), 1, 9, 9).ops
        drawn[name] += 1
        assert {"grayscale": 0, "solarize": 128}.get(name, strength) == strength
        assert 0.1 <= strength < 2 or name != "gaussian_blur"
    assert all(abs(drawn[name] / 3000 - 1 / 3) < 0.04 for name in ("grayscale", "solarize", "gaussian_blur"))
    ops = [views(augment="autoaugment").parameters(str(number), 1, 9, 9).ops for number in range(4000)]
    assert max(map(len, ops)) == 2
    mean = sum(map(len, ops)) / 4000
    pairs = [probability for pair in AUTOAUGMENT for _, probability, _ in pair]
    assert abs(mean - 2 * sum(pairs) / len(pairs)) < 0.05
    turns = [strength for pair in ops for name, strength in pair if name == "rotate"]
    assert set(turns) == {s * 30 * level / 9 for level in (3, 8, 9) for s in (-1, 1)}
    assert abs(np.mean(np.sign(turns))) < 0.1


def test_autoaugments_policy_is_torchvisions():
    transforms = pytest.importorskip("torchvision.transforms.v2")
    names = {name.replace("_", ""): name for name in (*RANGES, "invert")}
    theirs = transforms.AutoAugment()._policies
    assert [
        tuple((names[name.lower()], probability, level or 0) for name, probability, level in pair)
        for pair in theirs
    ] == list(AUTOAUGMENT)


def luma(pixel):
    return (299 * pixel[0] + 587 * pixel[1] + 114 * pixel[2]) // 1000 if len(pixel) == 3 else pixel[0]


def reference(name, image, strength):
    """The same op, one pixel at a time, in Python's own numbers; `None` where a pixel is too close to call."""
    pixels = image.permute(1, 2, 0).tolist()
    height, width, channels = len(pixels), len(pixels[0]), len(pixels[0][0])
    mean = sum(luma(p) for row in pixels for p in row) / (height * width)
    flat = [[p[c] for row in pixels for p in row] for c in range(channels)]
    counts = [[values.count(level) for level in range(256)] for values in flat]

    def looked_up(y, x):
        down, right = y - (height - 1) / 2, x - (width - 1) / 2
        radians = math.radians(strength)
        if name == "rotate":  # counter-clockwise: what is shown comes from clockwise of it
            row = down * math.cos(radians) + right * math.sin(radians)
            column = right * math.cos(radians) - down * math.sin(radians)
        elif name == "shear_x":
            row, column = down, right + strength * down
        elif name == "shear_y":
            row, column = down + strength * right, right
        elif name == "translate_x":
            row, column = down, right - round(strength * width)
        else:
            row, column = down - round(strength * height), right
        row, column = row + (height - 1) / 2, column + (width - 1) / 2
        if min(abs(row % 1 - 0.5), abs(column % 1 - 0.5)) < 2e-3:
            return [None] * channels
        row, column = round(row), round(column)
        return pixels[row][column] if 0 <= row < height and 0 <= column < width else [0] * channels

    def value(y, x, c):
        here = pixels[y][x][c]
        if name == "brightness":
            return here * (1 + strength)
        if name == "contrast":
            return here * (1 + strength) - mean * strength
        if name == "color":
            return here if channels == 1 else here * (1 + strength) - luma(pixels[y][x]) * strength
        if name == "sharpness":
            if y in (0, height - 1) or x in (0, width - 1):
                return here
            around = sum(pixels[y + i][x + j][c] for i in (-1, 0, 1) for j in (-1, 0, 1))
            return here * (1 + strength) - round((around + 4 * here) / 13) * strength
        if name == "posterize":
            return here & ~(2 ** (8 - round(strength)) - 1)
        if name == "solarize":
            return 255 - here if here >= strength else here
        if name == "autocontrast":
            low, high = min(flat[c]), max(flat[c])
            return here if low == high else (here - low) * 255 // (high - low)
        if name == "equalize":  # as PIL.ImageOps.equalize
            step = (height * width - [n for n in counts[c] if n][-1]) // 255
            return here if step == 0 else min(255, (sum(counts[c][:here]) + step // 2) // step)
        return here

    geometric = name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
    return [
        [looked_up(y, x) if geometric else [value(y, x, c) for c in range(channels)] for x in range(width)]
        for y in range(height)
    ]


@pytest.mark.parametrize("name", list(RANGES))
@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "rgb"])
@pytest.mark.parametrize("shape", [(8, 8), (28, 28), (23, 30)], ids=str)
def test_each_op_does_what_its_name_says(name, channels, shape):
    low, high, wide, signed = RANGES[name]
    strengths = {low, high, wide, low + (high - low) * 0.3}
    for strength in strengths | ({-s for s in strengths} if signed else set()):
        image = picture(channels, *shape, seed=len(name)) // 2 + 40
        before = image.clone()
        out = view_ops.OPS[name](image, strength)
        assert out.shape == image.shape
        assert out.dtype == torch.uint8
        assert torch.equal(image, before)
        undecided = 0
        for got, want in zip(
            out.permute(1, 2, 0).flatten().tolist(), np.ravel(reference(name, image, strength)), strict=True
        ):
            if want is None:
                undecided += 1
            else:
                assert abs(got - min(max(want, 0), 255)) <= 0.501, (name, strength)
        assert undecided <= out.numel() * 0.3


@pytest.mark.parametrize("name", list(RANGES))
def test_an_op_of_no_strength_changes_nothing(name):
    image = picture(3, 12, 9)
    image[:, 0, 0], image[:, 0, 1] = 0, 255
    if name != "equalize":
        assert torch.equal(view_ops.OPS[name](image, RANGES[name][0]), image)


def test_equal_ties_fall_to_one_side_whatever_the_rounding():
    # A slope of 0.1 puts the rows 5 away from the centre exactly between two pixels.
    image = picture(1, 11, 11)
    nudged = [view_ops.OPS["shear_x"](image, slope) for slope in (0.1, 0.1 + 1e-9, 0.1 - 1e-9)]
    assert torch.equal(nudged[0], nudged[1])
    assert torch.equal(nudged[0], nudged[2])


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.03, 0.25, 0.5])
def test_hue_turns_the_circle(shift):
    image = picture(3, 9, 9)
    image[:, 0] = 77  # grey has no hue
    out = view_ops.adjust_hue(image, shift)
    for pixel, got in zip(image.flatten(1).T.tolist(), out.flatten(1).T.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in pixel))
        expected = colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)
        assert max(abs(255 * e - g) for e, g in zip(expected, got, strict=True)) <= 0.51
    assert torch.equal(view_ops.adjust_hue(image[:1], shift), image[:1])


def test_jitter_is_brightness_contrast_saturation_hue_in_this_order():
    made, image = views(color_jitter=[0.4, 0.3, 0.2, 0.1]), picture()
    brightness, contrast, saturation, hue = made.parameters("a", 1, 13, 10).jitter
    out = image.double() * brightness
    out = out.clamp(0, 255).round()
    mean = np.mean([luma(p) for p in out.int().flatten(1).T.tolist()])
    out = (out * contrast + mean * (1 - contrast)).clamp(0, 255).round()
    grey = torch.tensor([luma(p) for p in out.int().flatten(1).T.tolist()]).view(1, 13, 10)
    out = (out * saturation + grey * (1 - saturation)).clamp(0, 255).round()
    out = view_ops.adjust_hue(out.to(torch.uint8), hue)
    assert (made.apply(image, key="a", view=1).int() - out.int()).abs().max() <= 2


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 1, 1), (3, 2, 5), (3, 40, 30)], ids=str)
@pytest.mark.parametrize("augment", ["randaugment", "trivial", "autoaugment", "three_augment"])
def test_tiny_and_odd_images_go_through_everything(shape, augment):
    for size in (None, 8, 33):
        made = views(**EVERYTHING | {"size": size, "augment": augment, "num_ops": 10, "erase": 1.0})
        for view in range(4):
            out = made.apply(picture(*shape), key="a", view=view)
            assert out.shape == (shape[0], *((size, size) if size else shape[1:]))
            assert out.dtype == torch.uint8
            assert out.is_contiguous()


# -- the same everywhere -------------------------------------------------------------------------------------

DIGEST_ALL = """
import hashlib, torch
from softcache.data.transforms import ops as view_ops
from softcache.data.transforms import Views, ViewSettings
from softcache.data.transforms.parameters import AUTOAUGMENT, RANGES
from tests.data.test_transforms import EVERYTHING, photo, views
digest = hashlib.sha256()
for image in (photo(3, 199, 301), photo(1, 407, 399), photo(3, 33, 47), photo(1, 8, 8)):
    for name, (low, high, wide, signed) in RANGES.items():
        for strength in (low, high, wide, -high if signed else high):
            digest.update(view_ops.OPS[name](image, strength).contiguous().numpy().tobytes())
    for sigma in (0.1, 0.77, 2.0):
        digest.update(view_ops.gaussian_blur(image, sigma).numpy().tobytes())
    made = views(size=24, crop="resized", mixup_alpha=0.3, erase=1.0, erase_fill="noise", augment="three_augment")
    for view in range(1, 4):
        digest.update(made.apply(image, key="a", view=view).numpy().tobytes())
    for size, interpolation in ((24, "bilinear"), (224, "bicubic"), ((40, 24), "bicubic"), (None, "bilinear")):
        made = views(**EVERYTHING | {"size": size, "interpolation": interpolation})
        for view in range(6):
            digest.update(made.apply(image, key="a", view=view).numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_pixels_are_the_same_on_a_plain_cpu_with_another_hash_seed():
    # ATen without its AVX2 kernels stands for a CPU of another make; the second process has a random hash seed.
    env = os.environ | {"PYTHONHASHSEED": "1", "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DIGEST_ALL]
    plain = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    here = run_program("import torch; torch.set_num_threads(3)\n" + DIGEST_ALL)
    assert plain == here.stdout, here.stderr
    assert len(plain.strip()) == 64


def test_pixels_do_not_depend_on_threads_or_strides():
    before, out = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            image = photo(3, 301, 401)
            made = views(**EVERYTHING | {"size": 224, "num_ops": 6})
            out.append([made.apply(image, key=str(n), view=1) for n in range(8)])
    finally:
        torch.set_num_threads(before)
    strided = photo(3, 301, 401).permute(1, 2, 0).contiguous().permute(2, 0, 1)
    out.append([made.apply(strided, key=str(n), view=1) for n in range(8)])
    for other in out[1:]:
        assert all(torch.equal(one, two) for one, two in zip(out[0], other, strict=True))


def global_states():
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002


@pytest.mark.parametrize(
    "settings",
    [EVERYTHING, {"transform": "tests.data.test_transforms:drawing_transform"}],
    ids=["ours", "own"],
)
def test_global_generators_are_neither_read_nor_moved(settings):
    made, image = views(**settings), picture()
    random.seed(1)
    before = global_states()
    first = made.apply(image, key="a", view=1)
    assert global_states() == before
    random.seed(2)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(2)
    assert torch.equal(made.apply(image, key="a", view=1), first)


@pytest.mark.parametrize(
    "settings",
    [EVERYTHING, {"transform": "tests.data.test_transforms:drawing_transform"}],
    ids=["ours", "own"],
)
def test_pickled_views_are_the_same_views(settings):
    made, image = views(**settings), picture()
    copy = pickle.loads(pickle.dumps(made))
    assert copy.digest == made.digest
    assert torch.equal(copy.apply(image, key="a", view=1), made.apply(image, key="a", view=1))


# -- the user's own transform --------------------------------------------------------------------------------


def drawing_transform():
    """Uses all three global generators and writes in place."""

    def transform(image):
        image += int(np.random.randint(50))  # noqa: NPY002
        image *= random.randrange(1, 5)
        return image ^ torch.randint(0, 256, image.shape, dtype=torch.uint8)

    return transform


def failing_transform():
    def transform(image):
        raise KeyError(torch.rand(1).item())

    return transform


not_a_factory = 3


def test_own_transform_is_replayed_and_leaves_view_zero_and_the_source_alone():
    made, image = views(transform="tests.data.test_transforms:drawing_transform"), picture()
    before = image.clone()
    outs = [made.apply(image, key=key, view=view) for key in "ab" for view in (1, 2)]
    assert torch.equal(image, before)
    assert all(not torch.equal(one, two) for n, one in enumerate(outs) for two in outs[n + 1 :])
    assert torch.equal(made.apply(image, key="a", view=2), outs[1])
    assert made.apply(image, key="a", view=0) is image
    other = views(seed=1, transform="tests.data.test_transforms:drawing_transform")
    assert not torch.equal(other.apply(image, key="a", view=1), outs[0])


def test_a_transform_that_fails_gives_the_generators_back():
    made, before = views(transform="tests.data.test_transforms:failing_transform"), global_states()
    with pytest.raises(
        SpecError, match=r"KeyError: .* \(.*test_transforms\.py:\d+\), of sample 'a'; .*begin with v2\.ToPIL"
    ):
        made.apply(picture(), key="a", view=1)
    assert global_states() == before


def transform_itself(image):
    return image


def wrong_transform():
    return 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "transform_itself",
            r"missing 1 required .*for a transform itself write one: def augment\(\): return transform",
        ),
        ("wrong_transform", r"returns int; expected a callable of uint8 \[C, H, W\]"),
    ],
)
def test_what_is_no_factory_of_transforms_is_named(name, message):
    with pytest.raises(SpecError, match=message):
        views(transform=f"{__name__}:{name}").apply(picture(), key="a", view=1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module:make", r"views.transform 'no_such_module:make': No module named 'no_such_module'"),
        ("tests.data.test_transforms:no_such", r"has no attribute 'no_such'"),
        ("tests.data.test_transforms:not_a_factory", r"found int; expected an importable module:factory"),
    ],
)
def test_a_missing_transform_is_named(spec, message):
    with pytest.raises(SpecError, match=message):
        views(transform=spec)


# -- settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flip": 1.5}, "flip"),
        ({"erase": -0.1}, "erase"),
        ({"scale": [0.0, 1.0]}, "scale must be two numbers"),
        ({"scale": [0.5, 1.2]}, "at most 1"),
        ({"scale": [0.8, 0.2]}, "scale must be two numbers"),
        ({"ratio": [1.0]}, "ratio must be two numbers"),
        ({"erase_ratio": [-1.0, 1.0]}, "erase_ratio must be two numbers"),
        ({"size": 0}, "size"),
        ({"crop": "random"}, "crop"),
        ({"crop": "padded"}, "needs padding"),
        ({"augment": "augmix"}, "augment"),
        ({"num_ops": 11}, "num_ops"),
        ({"magnitude": 31}, "magnitude"),
        ({"color_jitter": [0.1, 0.1, 0.1]}, "color_jitter must be"),
        ({"color_jitter": [0.1, 0.1, 0.1, 0.6]}, "color_jitter must be"),
        ({"mean": [0.5, 0.5], "std": [0.5] * 3}, "mean and std"),
        ({"mean": [], "std": []}, "mean and std"),
        ({"std": [0.0]}, "mean and std"),
        ({"seed": -1}, "seed"),
        ({"flip": "0.5"}, "flip"),
        ({"size": 8.0}, "size"),
        ({"scale": [float("nan"), 1.0]}, "scale"),
        ({"transform": "module"}, "transform"),
        ({"transform": "a:b", "flip": 0.5}, "takes the place of"),
        ({"colour": 1}, "colour"),
    ],
    ids=str,
)
def test_nonsense_is_rejected_by_name(settings, message):
    with pytest.raises(ValidationError, match=message):
        ViewSettings.model_validate(settings)


def test_settings_take_what_toml_gives():
    import tomllib

    table = tomllib.loads(
        'crop = "resized"\nscale = [0.5, 1]\nmean = [0, 0.5, 1]\nstd = [1, 1, 1]\nflip = 1\nsize = 8'
    )
    settings = ViewSettings.model_validate(table)
    assert settings.scale == (0.5, 1)
    assert ViewSettings.model_validate(settings.model_dump(mode="json")) == settings


def test_digest_names_the_policy_and_the_normalisation():
    base = views(**EVERYTHING)
    assert base.digest == views(**EVERYTHING).digest
    changes = [
        {"seed": 8},
        {"size": 25},
        {"flip": 0.4},
        {"mean": [0.4]},
        {"std": [0.4]},
        {"scale": [0.1, 1.0]},
    ]
    changes += [{"num_ops": 3}, {"erase": 0.1}, {"eval_share": 0.9}]
    digests = {views(**EVERYTHING | change).digest for change in changes} | {base.digest}
    assert len(digests) == len(changes) + 1
    own = {
        views(transform=f"tests.data.test_transforms:{name}").digest
        for name in ("drawing_transform", "failing_transform")
    }
    assert len(own) == 2
