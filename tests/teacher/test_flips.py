"""Labels of the mean of an image and its mirror image: `teacher.test_time_augmentation`."""

import pytest
import torch
from torch import nn

from softcache.models.image import Normalize
from softcache.runs import open_data, open_teacher
from softcache.teacher.image import ImageTeacher
from softcache.teacher.multi_label import MultiLabelTeacher
from tests.support.caches import digits_config
from tests.support.text_caches import text_config


def teacher_of(kind, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 8, 5))
    return kind(
        model,
        normalize=Normalize((0.5,) * 3, (0.2,) * 3),
        spec="ours:model",
        num_classes=5,
        device=torch.device("cpu"),
        dtype="float32",
        **options,
    )


@pytest.mark.parametrize(
    ("kind", "probabilities"),
    [(ImageTeacher, lambda x: x.softmax(-1)), (MultiLabelTeacher, torch.sigmoid)],
    ids=["softmax", "sigmoid"],
)
def test_probabilities_are_the_mean_of_both(kind, probabilities):
    images = torch.randint(0, 256, (4, 3, 6, 8), dtype=torch.uint8)
    plain, both = teacher_of(kind), teacher_of(kind, flips=True)
    expected = (
        probabilities(plain.logits(images).double()) + probabilities(plain.logits(images.flip(3)).double())
    ) / 2
    torch.testing.assert_close(probabilities(both.logits(images).double()), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both.logits(images.flip(3)), both.logits(images))


def test_it_is_another_teacher_and_of_images_alone(tmp_path):
    config = digits_config(teacher={"test_time_augmentation": "flip"})
    found = open_teacher(config, open_data(config)).identity()["teacher"]
    plain = open_teacher(digits_config(), open_data(config)).identity()["teacher"]
    assert found == plain | {"test_time_augmentation": "flip"}
    with pytest.raises(ValueError, match=r"teacher\.test_time_augmentation: of image classifiers"):
        text_config(tmp_path, teacher={"test_time_augmentation": "flip"})
