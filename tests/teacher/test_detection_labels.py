"""Records of dense predictors: what a sigmoid head keeps, and the columns stored with it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from softcache.data.boxes import DetectionBatch
from softcache.errors import LabelError, SourceError, TemperatureError
from softcache.labels import BernoulliLabels, DetectionLabels, SoftLabels

P, V, K = 6, 5, 2


def coins(seed=0, num_positions=P, dtype=np.float64):
    """The record of random logits, and the logits [P, V]."""
    logits = np.random.default_rng(seed).normal(0, 3, (num_positions, V))
    order = np.argsort(-logits, axis=1)
    ranked = np.take_along_axis(logits, order, axis=1)
    mass = (1 / (1 + np.exp(-ranked[:, K:]))).sum(1)
    record = BernoulliLabels(
        order[:, :K].astype(np.uint16), ranked[:, :K].astype(dtype), ranked[:, K].astype(dtype), V, mass
    )
    return record, logits


def softmax_record(num_positions=P):
    log_probs = np.log(np.tile([0.5, 0.25], (num_positions, 1)))
    ids = np.tile([2, 0], (num_positions, 1))
    return SoftLabels(ids, log_probs, np.full((num_positions, 1), np.log(0.25)), V, (1.0,))


def cell_labels(labels=None, seed=0, **columns):
    labels = coins(seed)[0] if labels is None else labels
    rng = np.random.default_rng(seed)
    columns = columns or {
        "boxes": rng.normal(size=(len(labels), 4)).astype(np.float32),
        "centerness": rng.normal(size=len(labels)).astype(np.float32),
    }
    return DetectionLabels(labels, rng.permutation(100)[: len(labels)].astype(np.int32), columns)


def arrays(record):
    labels = record.labels
    named = {"cells": record.cells, **record.columns, "ids": labels.ids}
    if isinstance(labels, BernoulliLabels):
        named |= {"logits": labels.logits, "bound": labels.dropped_bound, "mass": labels.dropped_mass}
    else:
        named |= {"log_probs": labels.log_probs, "log_tail": labels.log_tail}
    return named


def assert_same(record, other):
    left, right = arrays(record.to_numpy()), arrays(other.to_numpy())
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


@pytest.mark.parametrize("T", [0.5, 1.0, 4.0])
def test_a_softened_kept_logit_is_exact_and_the_bound_holds_for_every_dropped_class(T):
    record, logits = coins()
    soft = record.at_temperature(T)
    kept = record.ids.astype(int)
    np.testing.assert_allclose(soft.logits, np.take_along_axis(logits, kept, 1) / T)
    dropped = np.ones((P, V), bool)
    np.put_along_axis(dropped, kept, False, axis=1)
    highest = np.where(dropped, logits / T, -np.inf).max(1)
    np.testing.assert_allclose(soft.dropped_bound, highest)


def test_a_temperature_per_position_is_differentiable_and_equals_one_at_a_time():
    record = coins()[0].to_torch()
    T = torch.linspace(0.5, 3, P, dtype=torch.float64, requires_grad=True)
    whole = record.at_temperature(T)
    for row in range(P):
        one = record.take([row]).at_temperature(float(T[row].detach()))
        torch.testing.assert_close(whole.logits[row], one.logits[0])
        torch.testing.assert_close(whole.dropped_bound[row], one.dropped_bound[0])
    whole.logits.sum().backward()
    torch.testing.assert_close(T.grad, (-record.logits / T.detach()[:, None] ** 2).sum(1))


def test_half_precision_is_softened_in_float32_with_numpy_and_torch_alike():
    record = coins(dtype=np.float16)[0]
    here, there = record.at_temperature(3.0), record.to_torch().at_temperature(3.0)
    assert here.logits.dtype == np.float32
    assert there.logits.dtype == torch.float32
    np.testing.assert_array_equal(here.logits, there.logits.numpy())


@pytest.mark.parametrize("T", [0.0, -1.0, float("nan"), float("inf"), np.array([1.0, 2.0]), torch.ones(P)])
def test_a_temperature_out_of_range_or_of_another_shape_or_kind_is_refused(T):
    with pytest.raises(TemperatureError, match="temperature: expected"):
        coins()[0].at_temperature(T)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ids": np.zeros(P, np.int64)}, r"ids: expected shape \[P, K\]"),
        ({"num_classes": 1}, "K from 1 to num_classes"),
        ({"logits": np.zeros((P, 3))}, "logits: expected shape"),
        ({"logits": np.zeros((P, K), np.int64)}, "logits: expected a floating-point dtype"),
        ({"ids": np.zeros((P, K))}, "ids: expected an integer dtype"),
        ({"dropped_bound": torch.zeros(P)}, "dropped_bound: expected arrays of one kind"),
    ],
)
def test_arrays_that_break_the_contract_of_coins_are_named(changed, message):
    with pytest.raises(LabelError, match=message):
        replace(coins()[0], **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cells": np.zeros(P - 1, np.int32)}, "cells: expected shape"),
        ({"cells": np.zeros(P)}, "cells: expected an integer dtype"),
        ({"columns": {"masks": np.zeros(P)}}, "columns: expected some of boxes, bins, centerness"),
        ({"columns": {"boxes": np.zeros((P, 4)), "bins": np.zeros((P, 4, 3))}}, "boxes or bins, not both"),
        ({"columns": {"boxes": np.zeros((P, 5))}}, "boxes: expected shape"),
        ({"columns": {"bins": np.zeros((P, 4))}}, "bins: expected shape"),
        ({"columns": {"bins": np.zeros((P, 4, 1))}}, "bins: expected shape"),
        ({"columns": {"centerness": torch.zeros(P)}}, "centerness: expected arrays of one kind"),
    ],
)
def test_columns_that_break_the_contract_of_cells_are_named(changed, message):
    with pytest.raises(LabelError, match=message):
        replace(cell_labels(), **changed)


@pytest.mark.parametrize("labels", [coins()[0], softmax_record()], ids=["bernoulli", "categorical"])
@pytest.mark.parametrize("columns", [{}, {"bins": np.arange(P * 12, dtype=np.float16).reshape(P, 4, 3)}])
def test_a_record_survives_torch_taking_and_joining_whatever_its_distribution_and_columns(labels, columns):
    record = cell_labels(labels, **columns)
    there = record.to_torch("cpu")
    assert there.is_torch
    assert not record.is_torch
    assert_same(record, there)
    for whole in (record, there):
        assert_same(DetectionLabels.concat([whole.take(slice(0, 2)), whole.take([2, 3, 4, 5])]), record)
    order = [4, 0, 3]
    for name, array in arrays(record.take(order)).items():
        np.testing.assert_array_equal(array, arrays(record)[name][order], err_msg=name)
        np.testing.assert_array_equal(arrays(there.take(order))[name].numpy(), array, err_msg=name)


def test_records_that_differ_in_more_than_their_positions_do_not_join():
    record = cell_labels()
    with pytest.raises(LabelError, match="expected one kind of distribution"):
        DetectionLabels.concat([record, cell_labels(softmax_record())])
    with pytest.raises(LabelError, match="record 1: expected the columns"):
        DetectionLabels.concat([record, replace(record, columns={})])
    with pytest.raises(LabelError, match="record 1: expected num_classes 5"):
        DetectionLabels.concat([record, replace(record, labels=replace(record.labels, num_classes=9))])
    with pytest.raises(LabelError, match="record 1: expected the columns"):
        BernoulliLabels.concat([record.labels, replace(record.labels, dropped_mass=None)])
    with pytest.raises(LabelError, match="at least one record"):
        DetectionLabels.concat([])


ROWS = 2


def batch(labels=True):
    boxes = [torch.tensor([[0.0, 0, 4, 4], [1, 1, 3, 2]]), torch.zeros(0, 4), torch.tensor([[2.0, 2, 8, 8]])]
    classes = [torch.tensor([1, 2]), torch.zeros(0, dtype=torch.int64), torch.tensor([0])]
    images = torch.arange(3 * 64, dtype=torch.uint8).reshape(3, 1, 8, 8)
    prints = np.array([11, 12, 13], np.uint64)
    record = cell_labels().to_torch() if labels else None
    return DetectionBatch(images, boxes, classes, np.array([7, 3, 5]), 1, prints, ROWS, labels=record)


@pytest.mark.parametrize("pieces", [1, 2, 3, 5])
def test_pieces_of_a_batch_keep_boxes_and_rows_with_their_images_and_merge_to_it(pieces):
    whole = batch()
    parts = whole.split(pieces)
    assert len(parts) <= pieces
    assert all(part.num_rows == ROWS * len(part) for part in parts)
    start = 0
    for part in parts:
        for row, sample in enumerate(part.samples.tolist()):
            at = whole.samples.tolist().index(sample)
            assert torch.equal(part.boxes[row], whole.boxes[at])
            own = slice(row * ROWS, (row + 1) * ROWS)
            np.testing.assert_array_equal(
                part.labels.cells[own], whole.labels.cells[at * ROWS : (at + 1) * ROWS]
            )
        start += len(part)
    merged = DetectionBatch.merge(parts)
    assert start == len(merged) == 3
    assert torch.equal(merged.images, whole.images)
    assert merged.samples.tolist() == [7, 3, 5]
    assert merged.fingerprints.tolist() == [11, 12, 13]
    assert_same(merged.labels, whole.labels)


def test_a_batch_says_of_each_row_which_of_its_image_it_is_and_gives_torchvision_its_targets():
    whole = batch().to(torch.device("cpu"))
    assert whole.row_counts.tolist() == [2, 2, 2]
    assert whole.positions.tolist() == [0, 1, 0, 1, 0, 1]
    assert [target["labels"].tolist() for target in whole.targets] == [[1, 2], [], [0]]
    assert [list(target["boxes"].shape) for target in whole.targets] == [[2, 4], [0, 4], [1, 4]]


def test_a_batch_refuses_labels_of_other_rows_and_boxes_without_classes():
    whole = batch()
    with pytest.raises(LabelError, match="expected 6 label rows"):
        replace(whole, labels=whole.labels.take(slice(0, 5)))
    with pytest.raises(LabelError, match="expected 12 label rows"):
        DetectionBatch.merge([whole, batch(labels=False)])
    with pytest.raises(LabelError, match="expected 2 rows per sample"):
        DetectionBatch.merge([batch(labels=False), replace(batch(labels=False), rows_per_sample=3)])
    with pytest.raises(SourceError, match=r"sample 3: expected boxes \[N, 4\] and classes \[N\]"):
        replace(whole, classes=[whole.classes[0], torch.tensor([1]), whole.classes[2]])
    with pytest.raises(SourceError, match="of one number of images"):
        replace(whole, boxes=whole.boxes[:2])
