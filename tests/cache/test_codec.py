"""The open codec: what it keeps bit for bit, the bound on what it rounds, and what it refuses."""

import numpy as np
import pytest
import torch

from softcache.cache.codecs import OpenCodec, codec_from_dict
from softcache.errors import LabelError, ManifestError
from softcache.labels.sparsify import top_k

GRID = (1.0, 2.0, 8.0)


def record(num_rows=200, num_classes=50, k=5, scale=3.0):
    logits = torch.randn(num_rows, num_classes, generator=torch.Generator().manual_seed(0)) * scale
    return top_k(logits, k=k, temperatures=GRID, targets_P=torch.arange(num_rows) % num_classes).to_numpy()


def codec(**changed):
    return OpenCodec(**{"num_classes": 50, "k": 5, "temperatures": GRID} | changed)


def test_float32_is_lossless():
    labels = record()
    back = codec(values="float32").decode(codec(values="float32").encode(labels))
    for name in ("ids", "log_probs", "log_tail", "target_log_prob", "stats"):
        assert np.array_equal(getattr(back, name), getattr(labels, name)), name


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 300.0])
def test_float16_stays_within_its_stated_error(scale):
    labels = record(scale=scale)
    back = codec().decode(codec().encode(labels))
    error = np.abs(back.log_probs.astype(np.float64) - labels.log_probs)
    assert (error <= np.abs(labels.log_probs.astype(np.float64)) * 2.0**-11 + 2.0**-25).all()
    for name in ("ids", "log_tail", "target_log_prob", "stats"):
        assert np.array_equal(getattr(back, name), getattr(labels, name)), name


def test_infinities_survive_and_finite_values_stay_finite():
    labels = record()
    values = labels.log_probs.copy()
    values[0, -1], values[1, -1] = -np.inf, -1e6
    changed = type(labels)(
        labels.ids, values, labels.log_tail, labels.num_classes, labels.temperatures,
        target_log_prob=labels.target_log_prob, stats=labels.stats,
    )  # fmt: skip
    back = codec().encode(changed)["log_probs"]
    assert np.isneginf(back[0, -1])
    assert back[1, -1] == np.finfo(np.float16).min


@pytest.mark.parametrize(
    ("num_classes", "dtype"), [(65_535, "uint16"), (65_536, "uint32"), (2**31, "uint32")]
)
def test_ids_hold_every_class_and_the_unused_mark(num_classes, dtype):
    ids = next(column for column in codec(num_classes=num_classes).columns if column.name == "ids")
    assert ids.dtype == dtype
    assert np.iinfo(dtype).max >= num_classes


def test_what_does_not_fit_is_refused():
    labels = record()
    with pytest.raises(LabelError, match=r"column ids: expected shape \(200, 4\); found \(200, 5\)"):
        codec(k=4).encode(labels)
    labels.log_tail[7, 1] = np.nan
    with pytest.raises(LabelError, match="column log_tail: NaN in row 7"):
        codec().encode(labels)
    with pytest.raises(LabelError, match="target_log_prob"):
        codec().encode(top_k(torch.randn(3, 50), k=5, temperatures=GRID).to_numpy())


def test_a_codec_names_itself():
    assert codec_from_dict(codec().to_dict()) == codec()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "packed"},
        {"k": 0},
        {"k": 51},
        {"k": "many"},
        {"num_classes": 2**40},
        {"temperatures": []},
        {"temperatures": [2.0, 4.0]},
        {"temperatures": [1.0, 1.0]},
        {"temperatures": [1.0, float("inf")]},
        {"temperatures": [1.0 + n for n in range(99)]},
        {"values": "float8"},
        {"extra": 1},
    ],
)
def test_a_codec_out_of_range_is_refused(change):
    with pytest.raises(ManifestError, match="codec"):
        codec_from_dict(codec().to_dict() | change)
