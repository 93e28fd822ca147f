"""`[loss]`: what it accepts, and that students of both modalities learn by it, from labels and from an online teacher."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from softcache.config.load import load_config
from softcache.data.images import ImageBatch
from softcache.errors import ConfigError, LabelError
from softcache.labels.sparsify import dense, dense_labels_unsorted, top_k
from softcache.losses import LOSSES, LossSettings, distillation_loss
from softcache.losses.fused import fused_distillation_loss
from softcache.student.tasks import ImageTask, TokenStudent
from tests.fakes_language import known, padded
from tests.losses.test_functional import make_logits
from tests.support.losses_dense import COMPARING

OWN = {name: kind.settings().model_dump() for name, kind in LOSSES.items()}
CLASSWISE = [name for name in COMPARING if name != "uld"]


@pytest.mark.parametrize("name", LOSSES.names())
def test_defaults_are_written_and_read_back(name):
    settings = LossSettings(name=name)
    assert settings.loss.parameters == OWN[name]
    written = settings.model_dump(mode="json")
    assert {key: written[key] for key in OWN[name]} == OWN[name]
    assert LossSettings.model_validate(written) == settings


def test_parameters_reach_the_loss():
    settings = LossSettings(name="dkd", dkd_beta=0.5, standardize=True, tail="uniform")
    assert settings.loss.parameters == {"dkd_alpha": 1.0, "dkd_beta": 0.5}
    assert (settings.loss.tail, settings.loss.standardize) == ("uniform", True)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ('name = "klt"', r"loss\.name: loss 'klt': unknown; .*found 'klt'"),
        ("beta = 0.5", r"loss\.beta: unknown key with name = 'forward_kl'; known keys: name, .*found 0\.5"),
        ('name = "dkd"\nnkd_gamma = 1.0', r"loss\.nkd_gamma: unknown key with name = 'dkd'; .*"),
        ('name = "skew_kl"\nskew = 1.0', r"loss\.skew: input should be less than 1; found 1\.0"),
        (
            'name = "reverse_kl"\ntail = "renormalize"',
            r"loss\.tail: .*expected 'bucket', 'uniform', 'ignore' for",
        ),
        ('tail = "zero"', r"loss\.tail: input should be 'bucket', 'uniform', 'ignore' or 'renormalize'"),
        ("temperature = 0.5", r"loss\.temperature: input should be greater than or equal to 1"),
        ('standardize = "yes"', r"loss\.standardize: input should be a valid boolean"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, tables, message):
    path = tmp_path / "run.toml"
    path.write_text(f'[source]\nname = "digits"\n[loss]\n{tables}\n')
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_settings_do_not_change():
    with pytest.raises(ValidationError):
        LossSettings().name = "jsd"


# -- the students ------------------------------------------------------------------------------------------


class Teacher:
    def __init__(self, logits):
        self._logits = logits

    def chunks(self, batch):
        yield self._logits


@pytest.mark.parametrize("name", CLASSWISE)
def test_images_learn_by_it_from_labels_and_from_an_online_teacher(name):
    settings = LossSettings(name=name, temperature=2.0, alpha=0.7, standardize=True)
    teacher, targets = make_logits(6, 9, 0).float(), torch.arange(6)
    images = make_logits(6, 4, 1).float()
    model = nn.Linear(4, 9)

    def loss(labels, online):
        task = ImageTask(lambda: model, None, nn.Identity(), 9, settings, online)
        return task.loss(
            model, ImageBatch(images, targets, np.arange(6), 0, np.zeros(6, np.uint64), labels=labels)
        )

    labels = top_k(teacher, k=3, targets_P=targets)
    how = {"temperature": 2.0, "alpha": 0.7, "loss": settings.loss}
    torch.testing.assert_close(loss(labels, None), distillation_loss(model(images), labels, targets, **how))
    torch.testing.assert_close(loss(None, Teacher(teacher)), loss(dense(teacher), None))


@pytest.mark.parametrize(("share", "is_refused"), [(9e-4, False), (2e-3, True)])
def test_labels_of_classes_that_the_student_lacks_are_those_of_a_padding_or_refused(share, is_refused):
    """Their mass went to the dropped classes, whatever it was."""
    student = TokenStudent(known(40, 8), LossSettings(), context=8)
    teacher = make_logits(5, 50, 3).float()
    teacher[:, 40:] = -30.0
    teacher[3, 47] = teacher[3].logsumexp(0) + math.log(share / (1 - share))
    labels, hidden = top_k(teacher, k=49), make_logits(5, 16, 2).float()
    if not is_refused:
        assert student._mixed(hidden, labels, torch.arange(5), 1.0, 1.0).isfinite()
        assert student._shared_classes(teacher).shape == (5, 40)
        return
    message = (
        r"head has 40 classes, the teacher's 50; labeled row 3 gives 0\.002 to classes that the student lacks"
    )
    with pytest.raises(LabelError, match=message):
        student._mixed(hidden, labels, torch.arange(5), 1.0, 1.0)
    with pytest.raises(LabelError, match=message):
        student._shared_classes(teacher)


@pytest.mark.parametrize("make", [known, padded])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("name", CLASSWISE)
def test_tokens_learn_by_it_from_an_online_teacher_at_once_and_by_chunks(name, standardize, make):
    """Of a head of more rows than the teacher's, and of fewer."""
    settings = LossSettings(name=name, temperature=2.0, alpha=0.7, standardize=standardize)
    student = TokenStudent(make(40, 8), settings, context=8)
    num_student_classes = student._parts.weight.shape[0]
    hidden = make_logits(7, 16, 2).float().requires_grad_()
    targets = torch.arange(7)
    teacher = make_logits(7, 50, 3).float()[:, :num_student_classes]
    at_once = student._dense_loss(hidden, teacher, targets, 0.7, 2.0)
    by_chunks = student._fused(hidden, dense_labels_unsorted(teacher), targets, 0.7, 2.0)
    torch.testing.assert_close(at_once, by_chunks, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(x, hidden)[0] for x in (at_once, by_chunks)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    labels = top_k(teacher, k=4, targets_P=targets)
    expected = fused_distillation_loss(
        hidden,
        student._parts.weight,
        labels,
        targets,
        temperature=2.0,
        alpha=0.7,
        padded_vocabulary=True,
        loss=settings.loss,
    )
    torch.testing.assert_close(student._fused(hidden, labels, targets, 0.7, 2.0), expected)
