"""Caches without statistics: what they save, what is the same, and what refuses them."""

import numpy as np
import pytest
import torch

from softcache.cache.codecs import PackedCodec
from softcache.errors import IdentityError, LabelError
from softcache.labels.sparsify import sample
from softcache.losses import distillation_loss
from softcache.runs import train_student
from softcache.runs.cache import cache_is_ready
from softcache.tools.shrink import ShrinkSettings, shrink_cache
from softcache.tools.verify.teacher import verify_units
from tests.support.caches import digits_config, make_cache
from tests.support.text_caches import make_text_cache

LEAN = {"statistics": "none"}


@pytest.mark.parametrize("codec", ["open", "packed"])
def test_labels_are_the_same_without_statistics(tmp_path, codec):
    capture = {"codec": codec}
    _, _, whole = make_cache(tmp_path / "whole", labels={"k": 4}, capture=capture)
    _, _, lean = make_cache(tmp_path / "lean", labels={"k": 4, **LEAN}, capture=capture)
    assert lean.manifest.identity["labels"]["statistics"] == "none"
    assert "statistics" not in whole.manifest.identity["labels"]
    sizes = [sum(cache.bytes_by_column().values()) / cache.num_rows_done for cache in (whole, lean)]
    assert sizes[0] - sizes[1] > (8 if codec == "open" else 3)
    one, other = (cache.read(range(60)) for cache in (whole, lean))
    assert other.stats is None
    for name in ("ids", "log_probs", "target_log_prob"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    step = whole.manifest.codec.get("step", 0.0)
    np.testing.assert_allclose(one.log_tail, other.log_tail, atol=step)
    assert list(verify_units(lean)) == []
    small = shrink_cache(whole, str(tmp_path / "small"), ShrinkSettings(statistics="none"))
    assert small.manifest.identity == lean.manifest.identity
    np.testing.assert_array_equal(small.read(range(60)).log_probs, other.log_probs)
    with pytest.raises(LabelError, match="has no statistics"):
        shrink_cache(lean, str(tmp_path / "no"), ShrinkSettings(statistics="all"))


def test_a_setting_is_compared_with_the_cache(tmp_path):
    config, data, lean = make_cache(tmp_path / "lean", labels={"k": 4, **LEAN})
    assert cache_is_ready(config, data, lean.url)
    _, _, whole = make_cache(tmp_path / "whole", labels={"k": 4})
    assert cache_is_ready(digits_config(labels={"k": 4, "statistics": "all"}), data, whole.url)
    with pytest.raises(IdentityError, match=r"labels\.statistics: 'none' in the config, 'all' in the cache"):
        cache_is_ready(config, data, whole.url)


def test_what_reads_statistics_names_the_setting(tmp_path):
    _, data, lean = make_cache(tmp_path / "lean", labels={"k": 4, **LEAN})
    for loss in ({"standardize": True, "temperature": 8}, {"weights": {"by": "teacher_entropy"}}):
        with pytest.raises(LabelError, match=r'capture with labels\.statistics = "all"'):
            train_student(
                digits_config(labels={"k": 4, **LEAN}, loss=loss, train={"epochs": 1}),
                data,
                model="linear",
                labels="cache",
                cache=lean,
                out=tmp_path / f"run-{len(loss)}",
            )


def test_drawn_labels_of_a_text_are_lean(tmp_path):
    labels = {"policy": "sample", "num_samples": 12, "temperatures": [1.0]}
    drawn = make_text_cache(tmp_path / "drawn", tmp_path, labels=labels)[2]
    small = shrink_cache(drawn, str(tmp_path / "small"), ShrinkSettings(statistics="none"))
    lean = make_text_cache(tmp_path / "lean", tmp_path, labels={**labels, **LEAN})[2]
    assert small.manifest.identity["labels"] == lean.manifest.identity["labels"]
    for name in ("ids", "counts"):
        np.testing.assert_array_equal(getattr(small.read(range(4)), name), getattr(lean.read(range(4)), name))


@pytest.mark.parametrize("step", [1.0, 8.0])
def test_gradients_of_drawn_labels_do_not_read_log_probabilities(step):
    """A draw counts as often as it was drawn: at the temperature of the draws a coarse step moves the value alone."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = (2 * torch.randn(40, 300, generator=generator) for _ in range(2))
    labels = sample(
        teacher,
        draws=12,
        seeds_P=torch.arange(40),
        temperatures=(1.0,),
        targets_P=torch.zeros(40, dtype=torch.long),
    ).to_numpy()
    codec = PackedCodec(
        num_classes=300, k=labels.k, temperatures=(1.0,), sampling=labels.sampling, stats=False, step=step
    )
    coarse = codec.decode(codec.encode(labels))
    gradients = []
    for record in (labels, coarse):
        logits = student.clone().requires_grad_()
        distillation_loss(logits, record.to_torch(), None, temperature=1.0, alpha=1.0).backward()
        gradients.append(logits.grad)
    there = labels.counts > 0
    assert np.abs(labels.log_probs[there] - coarse.log_probs[there]).max() > 0.3 * step
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
