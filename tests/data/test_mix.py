"""Mixup and CutMix: parameters, pixels and ground truth against slow references, and against timm's arithmetic."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
import xxhash

from softcache.data.images import ViewedSource
from softcache.data.sources.images.base import InMemorySource
from softcache.data.transforms import Views, ViewSettings
from softcache.data.transforms.mix import SHARES, _thresholds, beta_shares, draw_mixes
from softcache.data.transforms.student import StudentViews, StudentViewSettings
from softcache.errors import LabelError, SpecError
from softcache.hashing.digests import fingerprint
from softcache.labels import MixedTargets
from softcache.labels.sparsify import top_k
from softcache.losses import cross_entropy, distillation_loss, make_loss, row_weights
from softcache.losses.sample_weights import WeightSettings

BOTH = {"seed": 5, "mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mix_probability": 0.9, "mix_switch": 0.4}
PLAIN = {"crop": "padded", "padding": 1, "flip": 0.5}


def source(num_samples=40, height=9, width=12, channels=3):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(
        0, 256, (num_samples, channels, height, width), generator=generator, dtype=torch.uint8
    )
    keys = [f"image/{number}" for number in range(num_samples)]
    return InMemorySource("memory", images, np.arange(num_samples) % 7, keys, list("abcdefg"))


def reference(data, sample, view):
    """One mixed view, from the documented stream: (float64 image, first class, second class, share)."""
    settings, views = data.views.settings, data.views
    key = data.source.key(sample)
    stream = np.random.Philox(
        key=np.array([settings.seed, xxhash.xxh3_64_intdigest(key.encode())], np.uint64),
        counter=np.array([0, view, 0, 0], np.uint64),
    ).random_raw(72)
    u = (stream >> np.uint64(11)) * 2.0**-53
    first = views.apply(data.source.image(sample), key=key, view=view).numpy().astype(np.float64)
    target = data.source.target(sample)
    if u[64] >= settings.mix_probability:
        return first, target, target, 1.0
    cuts = (
        u[65] < settings.mix_switch
        if settings.mixup_alpha and settings.cutmix_alpha
        else settings.cutmix_alpha > 0
    )
    alpha = settings.cutmix_alpha if cuts else settings.mixup_alpha
    share = round(float(scipy.stats.beta.ppf(u[66], alpha, alpha)) * 65536) / 65536
    others = [other for other in range(len(data.source)) if other != sample]
    other = others[int(u[67] * len(others))]
    second = (
        views.apply(data.source.image(other), key=data.source.key(other), view=view)
        .numpy()
        .astype(np.float64)
    )
    if not cuts:
        return share * first + (1 - share) * second, target, data.source.target(other), share
    height, width = first.shape[1:]
    side = math.sqrt(1 - share)
    mask = np.zeros((height, width), bool)
    middle_y, middle_x = int(u[68] * height), int(u[69] * width)
    cut_y, cut_x = int(height * side), int(width * side)
    for y in range(height):
        for x in range(width):
            inside_y = middle_y - cut_y // 2 <= y < middle_y - cut_y // 2 + cut_y
            mask[y, x] = inside_y and middle_x - cut_x // 2 <= x < middle_x - cut_x // 2 + cut_x
    return np.where(mask, second, first), target, data.source.target(other), 1 - mask.mean()


@pytest.mark.parametrize(
    "settings",
    [BOTH, {"mixup_alpha": 0.2}, {"cutmix_alpha": 3.5, "mix_probability": 0.5}, BOTH | PLAIN],
    ids=["both", "mixup", "cutmix", "both, augmented"],
)
def test_a_mixed_view_is_that_of_the_documented_stream(settings):
    data = ViewedSource(source(), Views(ViewSettings(**settings)))
    for view in (1, 7):
        batch = data.load(np.arange(40), view)
        assert isinstance(batch.targets, MixedTargets)
        for sample in range(40):
            image, first, second, share = reference(data, sample, view)
            assert np.array_equal(batch.images[sample].numpy(), np.floor(image + 0.5))
            row = batch.targets[sample]
            assert (int(row.first), int(row.second)) == (first, second)
            assert float(row.shares) == np.float32(share)
            seen = fingerprint(data.source.key(sample), view, batch.images[sample].numpy())
            assert batch.fingerprints[sample] == seen


def test_a_sample_is_mixed_alike_in_every_batch_and_order():
    data = ViewedSource(source(), Views(ViewSettings(**BOTH, **PLAIN)))
    whole, order = data.load(np.arange(40), 3), np.array([17, 3, 3, 39, 0])
    for batch, rows in ((data.load(order, 3), order), (data.load([8], 3), np.array([8]))):
        assert torch.equal(batch.images, whole.images[rows])
        for name in ("first", "second", "shares"):
            assert torch.equal(getattr(batch.targets, name), getattr(whole.targets, name)[rows])
        assert np.array_equal(batch.fingerprints, whole.fingerprints[rows])
    merged = type(whole).merge([data.load(order, 3), data.load(order, 0)])
    assert merged.targets.shares[-5:].eq(1).all()
    assert torch.equal(merged.targets.second[-5:], merged.targets.first[-5:])


def test_view_zero_and_a_single_sample_are_not_mixed():
    data = ViewedSource(source(), Views(ViewSettings(**BOTH)))
    batch = data.load(np.arange(40), 0)
    assert isinstance(batch.targets, torch.Tensor)
    assert torch.equal(batch.images, torch.stack([data.source.image(sample) for sample in range(40)]))
    alone = ViewedSource(source(1), Views(ViewSettings(**BOTH)))
    assert torch.equal(alone.load([0], 1).images, alone.load([0], 0).images)
    assert alone.load([0], 1).targets.shares.tolist() == [1.0]


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.8, 1.0, 2.0, 7.25, 32.0])
def test_shares_are_quantiles_of_the_beta_distribution(alpha):
    u = np.concatenate([np.random.default_rng(0).random(20000), [0.0, 0.5, 1 - 2.0**-53]])
    shares = beta_shares(alpha, u)
    expected = scipy.stats.beta.ppf(u, alpha, alpha) * SHARES
    assert np.abs(shares - expected).max() < 0.501
    assert shares[-2] == SHARES // 2
    assert (beta_shares(alpha, 1 - u[:-3]) == SHARES - shares[:-3]).all()
    ends = (np.arange(SHARES // 2) + 0.5) / SHARES
    assert np.abs(_thresholds(alpha) - scipy.stats.beta.cdf(ends, alpha, alpha)).max() < 2e-8


def test_mixing_follows_its_probabilities_and_takes_every_other_sample_alike():
    settings = ViewSettings(**BOTH)
    u_BS = np.random.default_rng(2).random((30000, 8))
    samples = np.full(30000, 4)
    mixes = draw_mixes(settings, u_BS, samples, 10)
    assert abs(len(mixes.rows) / 30000 - 0.9) < 0.01
    assert abs(mixes.cuts.mean() - 0.4) < 0.01
    counts = np.bincount(mixes.seconds, minlength=10)
    assert counts[4] == 0
    assert np.delete(counts, 4) == pytest.approx(3000, rel=0.07)


def test_mixed_images_are_those_of_timm_with_the_same_parameters(monkeypatch):
    mixup = pytest.importorskip("timm.data.mixup")
    data = ViewedSource(source(), Views(ViewSettings(**BOTH)))
    samples = np.arange(40)
    keys = [data.source.key(sample) for sample in range(40)]
    mixes = data.views.draw_mixes(keys, samples, 2, 40)
    plain = torch.stack([data.source.image(sample) for sample in range(40)])
    batch = data.load(samples, 2)
    live = mixup.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, mode="elem", label_smoothing=0.0, num_classes=7)
    for number, row in enumerate(mixes.rows.tolist()):
        share, cuts = mixes.shares[number] / SHARES, bool(mixes.cuts[number])
        # timm mixes the rows of a batch with those of the same batch from its end.
        pair = plain[[row, int(mixes.seconds[number])]].float()
        monkeypatch.setattr(
            live, "_params_per_elem", lambda size, s=share, c=cuts: (np.full(2, s), np.full(2, c))
        )
        centers = iter((mixes.centers[number] * [9, 12]).astype(int).tolist() * 2)
        monkeypatch.setattr(mixup.np.random, "randint", lambda low, high, size=None, c=centers: next(c))
        mixed, truth = live(
            pair.clone(), torch.tensor([data.source.target(row), data.source.target(mixes.seconds[number])])
        )
        assert (batch.images[row].float() - mixed[0]).abs().max() <= 0.5
        targets = batch.targets[row]
        ours = targets.shares * F.one_hot(targets.first, 7) + (1 - targets.shares) * F.one_hot(
            targets.second, 7
        )
        assert torch.allclose(ours, truth[0], atol=1e-6)


def test_a_student_sees_the_mixed_image_reduced():
    views = Views(ViewSettings(**BOTH, **PLAIN))
    whole = ViewedSource(source(), views).load(np.arange(40), 1)
    small = ViewedSource(source(), StudentViews(views, StudentViewSettings(size=5, grey=True)))
    batch = small.load(np.arange(40), 1)
    expected = StudentViews(views, StudentViewSettings(size=5, grey=True)).reduce(whole.images)
    assert torch.equal(batch.images, expected)
    assert torch.equal(batch.targets.shares, whole.targets.shares)


def floats():
    return lambda image: image.double() / 255


def narrow():
    return lambda image: image[:, :, : 5 + int(image.sum()) % 2]


def whole_numbers():
    return lambda image: image.int()


def test_floats_of_a_custom_transform_are_mixed_and_other_views_refused():
    def mixed(factory, **more):
        settings = ViewSettings(transform=f"tests.data.test_mix:{factory}", **more)
        return ViewedSource(source(), Views(settings)).load(np.arange(40), 1)

    batch, pixels = (
        mixed("floats", mixup_alpha=1.0),
        ViewedSource(source(), Views(ViewSettings(mixup_alpha=1.0))),
    )
    assert batch.images.dtype == torch.float64
    assert (batch.images * 255 - pixels.load(np.arange(40), 1).images).abs().max() <= 0.5 + 1e-9
    with pytest.raises(SpecError, match=r"sample 'image/\d+' is to be mixed.*set views.size"):
        mixed("narrow", cutmix_alpha=1.0)
    with pytest.raises(SpecError, match=r"int32 are to be mixed; expected uint8 or floating point"):
        mixed("whole_numbers", mixup_alpha=1.0)


def test_settings_that_do_nothing_are_in_no_identity():
    assert Views(ViewSettings(mix_switch=0.1, mix_probability=0.3)).digest == Views(ViewSettings()).digest
    assert Views(ViewSettings(mixup_alpha=0.3, mix_probability=0)).digest == Views(ViewSettings()).digest
    assert not {key for key in ViewSettings().identity() if "mix" in key}
    one = ViewSettings(mixup_alpha=0.3, mix_switch=0.9).identity()
    assert "mix_switch" not in one
    assert ViewSettings.model_validate(one).identity() == one
    digests = {
        Views(ViewSettings(**BOTH | change)).digest
        for change in ({}, {"mix_switch": 0.5}, {"mixup_alpha": 0.7})
    }
    assert len(digests) == 3
    assert ViewSettings(mixup_alpha=0.3).augments
    with pytest.raises(SpecError, match=r"views\.mixup_alpha, views\.cutmix_alpha: with boxes"):
        Views(ViewSettings(**BOTH)).apply_boxes(np.zeros((1, 4)), key="a", view=1, height=5, width=5)


def mixed_rows(num_rows=6, num_classes=5):
    torch.manual_seed(0)
    logits = torch.randn(num_rows, num_classes, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(num_rows, num_classes, dtype=torch.float64)
    first, second = torch.randint(0, num_classes, (2, num_rows))
    return logits, teacher, MixedTargets(first, second, torch.rand(num_rows))


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_has_both_classes_by_their_shares(name, alpha, masked):
    logits, teacher, targets = mixed_rows()
    truth = targets.shares[:, None] * F.one_hot(targets.first, 5) + (1 - targets.shares)[:, None] * F.one_hot(
        targets.second, 5
    )
    T = 2.0
    log_p, log_s = (teacher / T).log_softmax(1), (logits / T).log_softmax(1)
    one, other = (log_p, log_s) if name == "forward_kl" else (log_s, log_p)
    soft = T**2 * (one.exp() * (one - other)).sum(1)
    hard = -(truth * logits.log_softmax(1)).sum(1)
    mask = torch.tensor([1, 0, 1, 1, 0, 1]) if masked else None
    weights = torch.ones(6) if mask is None else mask
    expected = (weights * ((1 - alpha) * hard + alpha * soft)).sum() / weights.sum()
    labels = top_k(teacher, k=5).to_torch()
    found = distillation_loss(logits, labels, targets, temperature=T, alpha=alpha, loss=name, mask=mask)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-6)
    assert torch.allclose(cross_entropy(logits, targets), hard)


def test_losses_of_one_true_class_are_refused():
    logits, teacher, targets = mixed_rows()
    labels = top_k(teacher, k=5).to_torch()
    for name in ("dkd", "nkd"):
        with pytest.raises(
            LabelError, match=f"loss {name} reads the ground-truth class; found targets of mixed images"
        ):
            distillation_loss(logits, labels, targets, temperature=1.0, alpha=0.5, loss=make_loss(name))
    with pytest.raises(
        LabelError, match="teacher_correctness reads the ground-truth class; found targets of mixed"
    ):
        row_weights(WeightSettings(by="teacher_correctness"), labels, targets, num_student_classes=5)
    assert row_weights(
        WeightSettings(by="teacher_entropy"), labels, targets, num_student_classes=5
    ).shape == (6,)
    with pytest.raises((TypeError, AttributeError)):
        F.cross_entropy(logits, targets)  # never taken for a class each
