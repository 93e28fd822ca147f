"""A batch of images is what its samples are one by one: pixels, ground truth, fingerprints."""

import pickle

import numpy as np
import pytest
import torch

from softcache.data.images import ViewedSource
from softcache.data.sources import open_source
from softcache.data.sources.images.base import InMemorySource, load_images
from softcache.data.sources.images.custom import Subset
from softcache.data.transforms import Views, ViewSettings
from softcache.errors import SourceError
from softcache.hashing.digests import fingerprint

SAMPLES = np.array([5, 0, 3, 3, 8])


def memory_source(channels=1, height=6, width=7, kind=InMemorySource):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (9, channels, height, width), generator=generator, dtype=torch.uint8)
    keys = [f"image/{number}é" for number in range(9)]
    return kind("memory", images, np.arange(9) % 4, keys, list("abcd"))


class OneByOne(InMemorySource):
    """Overrides `image` alone, so that its `images` would not be what it shows."""

    def image(self, sample):
        return 255 - super().image(sample)


def transform():
    return lambda image: image.float() + torch.rand(())


POLICIES = {
    "plain": {},
    "flip": {"flip": 0.5},
    "padded": {"crop": "padded", "padding": 2},
    "wide padding": {"crop": "padded", "padding": 9, "flip": 0.5},
    "erase": {"crop": "padded", "padding": 1, "flip": 0.5, "erase": 0.6},
    "size": {"size": 5, "crop": "padded", "padding": 1, "flip": 0.5, "erase": 0.5},
    "resized": {"size": 5, "crop": "resized", "flip": 0.5},
    "jitter": {"color_jitter": [0.4, 0.4, 0.4, 0.1]},
    "trivial": {"crop": "padded", "padding": 1, "augment": "trivial"},
    "own": {"transform": "tests.data.test_batches:transform"},
}


@pytest.mark.parametrize("view", [0, 1, 2, 1000])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", [InMemorySource, OneByOne])
def test_a_batch_is_its_samples_one_by_one(policy, view, channels, kind):
    source = memory_source(channels, kind=kind)
    views = Views(ViewSettings.model_validate({"seed": 3, **POLICIES[policy]}))
    batch = ViewedSource(source, views).load(SAMPLES, view)
    assert len(batch.images) == len(SAMPLES)
    for row, sample in enumerate(SAMPLES.tolist()):
        expected = views.apply(source.image(sample), key=source.key(sample), view=view)
        assert batch.images[row].dtype == expected.dtype
        assert torch.equal(batch.images[row], expected)
        assert batch.fingerprints[row] == fingerprint(source.key(sample), view, expected.numpy())
        assert batch.targets[row] == source.target(sample)
    assert batch.targets.dtype == torch.int64
    assert batch.samples.tolist() == SAMPLES.tolist()


def test_moves_differ_from_sample_to_sample_and_leave_the_source_alone():
    source = memory_source()
    before = source.image(3).clone()
    views = Views(ViewSettings(crop="padded", padding=2, flip=0.5, erase=1.0))
    images = ViewedSource(source, views).load(np.arange(9), 1).images
    assert len({image.numpy().tobytes() for image in images}) == 9
    plain = ViewedSource(source, Views(ViewSettings())).load([3], 0).images
    plain.zero_()
    assert torch.equal(source.image(3), before)


def test_only_the_fingerprints_that_were_asked_for_are_taken():
    data = ViewedSource(memory_source(), Views(ViewSettings()))
    every = data.load(SAMPLES, 0).fingerprints
    mask = np.array([True, False, True, False, False])
    assert data.load(SAMPLES, 0, fingerprints=mask).fingerprints.tolist() == np.where(mask, every, 0).tolist()
    assert data.load(SAMPLES, 0, fingerprints=False).fingerprints.tolist() == [0] * 5
    assert data.load(SAMPLES[:0], 0).images.shape == (0, 1, 6, 7)


def test_images_of_other_sizes_are_refused_and_the_sample_named():
    class Ragged(InMemorySource):
        def image(self, sample):
            return super().image(sample)[:, : 6 - sample % 2]

    data = ViewedSource(memory_source(kind=Ragged), Views(ViewSettings()))
    with pytest.raises(
        SourceError, match=r"sample 'image/1é', view 0: image of shape \(1, 5, 7\); expected \(1, 6, 7\)"
    ):
        data.load([0, 2, 1], 0)


def test_what_a_source_offers_at_once_is_what_it_shows_one_by_one():
    for source in (
        memory_source(),
        memory_source(kind=OneByOne),
        Subset(memory_source(), 9),
        Subset(memory_source(kind=OneByOne), 9),
        open_source({"name": "digits"}, split="eval"),
    ):
        images = load_images(source, SAMPLES)
        assert all(torch.equal(x, source.image(n)) for x, n in zip(images, SAMPLES.tolist(), strict=True))
    with pytest.raises(IndexError, match="sample 8 of 4"):
        Subset(memory_source(), 4).images(SAMPLES)


def test_a_source_whose_image_was_replaced_shows_that():
    source = memory_source()
    source.image = lambda sample: torch.full((1, 6, 7), sample, dtype=torch.uint8)
    assert [int(image.max()) for image in load_images(source, SAMPLES)] == SAMPLES.tolist()


def test_a_pickled_source_loads_the_same():
    data = ViewedSource(memory_source(), Views(ViewSettings(flip=0.5)))
    first = data.load(SAMPLES, 1)
    again = pickle.loads(pickle.dumps(data)).load(SAMPLES, 1)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.targets, again.targets)
    assert (first.fingerprints == again.fingerprints).all()
