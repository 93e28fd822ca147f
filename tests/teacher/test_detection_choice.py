"""Which cells of a detector get a row, and what is kept of them: against a slow reference in plain Python."""

import math

import pytest
import torch

from softcache.errors import LabelError
from softcache.labels import BernoulliLabels
from softcache.labels.positions import PositionSettings
from softcache.labels.sparsify import (
    cell_faults,
    choose_cells,
    describe_fault,
    label_settings,
    sparsify_cells,
)
from softcache.labels.sparsify.detection import DenseOutputs
from tests.support.caches import digits_config
from tests.support.text_caches import text_config

B, A, V, TOP, K = 3, 40, 6, 9, 2


def outputs(seed=0, ties=False):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, A, V, generator=draw) * 3
    columns = {
        "boxes": torch.randn(B, A, 4, generator=draw),
        "centerness": torch.randn(B, A, generator=draw),
    }
    truth = [torch.tensor([17, 3]), torch.tensor([], dtype=torch.int64), torch.tensor([39, 39, 0])]
    return DenseOutputs(logits.round() if ties else logits, columns, truth)


def settings(**changes):
    positions = {"policy": "cells", "top": TOP}
    return label_settings(**({"k": K, "positions": positions} | changes))


def slow_cells(logits_AV, truth, top, background):
    """The chosen cells of one image, by sorting all of them."""

    def score(row):
        if not background:
            return max(row)
        peak = max(row)
        return max(row[1:]) - peak - math.log(sum(math.exp(x - peak) for x in row))

    first = sorted(set(truth.tolist()))
    others = [cell for cell in range(len(logits_AV)) if cell not in first]
    others.sort(key=lambda cell: (-score(logits_AV[cell].tolist()), cell))
    return (first + others)[:top]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("background", [False, True])
def test_ground_truth_comes_first_then_the_best_scores_and_ties_go_to_the_lower_cell(background, ties):
    made = outputs(ties=ties and not background)
    chosen = choose_cells(made.logits, made.truth, TOP, background=background)
    for image in range(B):
        wanted = slow_cells(made.logits[image], made.truth[image], TOP, background)
        assert chosen[image].tolist() == wanted


def test_scores_of_a_softmax_leave_the_background_out():
    logits = torch.tensor([[[9.0, 0.0, 0.0], [0.0, 1.0, 0.0], [30.0, 2.0, 0.0]]])
    none = [torch.tensor([], dtype=torch.int64)]
    assert choose_cells(logits, none, 1, background=True).tolist() == [[1]]
    assert choose_cells(logits, none, 1).tolist() == [[2]]


def test_more_ground_truth_cells_than_rows_is_an_error_that_names_image_and_setting():
    made = outputs()
    with pytest.raises(LabelError, match=r"2 ground-truth cells.*labels\.positions\.top = 1") as error:
        choose_cells(made.logits, made.truth, 1)
    assert error.value.position == 0
    twice = [torch.tensor([5, 5, 5])] * B
    assert choose_cells(made.logits, twice, 1).tolist() == [[5]] * B


def test_more_rows_than_cells_is_an_error():
    made = outputs()
    with pytest.raises(LabelError, match=r"labels\.positions\.top: expected 1 to 40.*found 41"):
        choose_cells(made.logits, made.truth, A + 1)


def test_records_of_sigmoids_are_those_of_the_slow_reference():
    made = outputs(seed=1)
    record = sparsify_cells(made, settings(), distribution="bernoulli")
    labels = record.labels
    assert isinstance(labels, BernoulliLabels)
    assert len(record) == B * TOP
    row = 0
    for image in range(B):
        for cell in slow_cells(made.logits[image], made.truth[image], TOP, False):
            logits = made.logits[image, cell].tolist()
            order = sorted(range(V), key=lambda c: (-logits[c], c))
            assert int(record.cells[row]) == cell
            assert labels.ids[row].tolist() == order[:K]
            assert labels.logits[row].tolist() == [logits[c] for c in order[:K]]
            assert float(labels.dropped_bound[row]) == logits[order[K]]
            dropped = sum(1 / (1 + math.exp(-logits[c])) for c in order[K:])
            assert float(labels.dropped_mass[row]) == pytest.approx(dropped, rel=1e-5)
            for name, values in made.columns.items():
                assert torch.equal(record.columns[name][row], values[image, cell])
            row += 1


def test_records_of_a_softmax_are_top_k_of_the_chosen_cells():
    made = outputs(seed=2)
    record = sparsify_cells(made, settings(), distribution="categorical")
    images = torch.arange(B).repeat_interleave(TOP)
    dense = made.logits[images, record.cells.long()].log_softmax(-1)
    wanted = dense.topk(K)
    assert torch.equal(record.labels.ids, wanted.indices)
    torch.testing.assert_close(record.labels.log_probs, wanted.values)
    mass = record.labels.log_probs.exp().sum(1) + record.labels.log_tail[:, 0].exp()
    torch.testing.assert_close(mass, torch.ones(len(mass)))


def test_a_dense_policy_keeps_every_class_and_drops_nothing():
    record = sparsify_cells(
        outputs(),
        label_settings("dense", positions={"policy": "cells", "top": TOP}),
        distribution="bernoulli",
    )
    assert record.k == V
    assert bool((record.labels.dropped_bound == -torch.inf).all())
    assert not record.labels.dropped_mass.any()


def test_more_classes_than_there_are_is_an_error():
    with pytest.raises(LabelError, match=r"labels\.k: expected 1 to 6.*found 7"):
        sparsify_cells(outputs(), settings(k=7), distribution="bernoulli")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("logits", math.nan, "a NaN logit"),
        ("logits", math.inf, "a [+]inf logit"),
        ("boxes", math.nan, "not finite"),
        ("centerness", -math.inf, "not finite"),
    ],
)
def test_a_fault_at_any_cell_is_of_its_image(place, value, message):
    made = outputs()
    values = made.logits if place == "logits" else made.columns[place]
    values[1, 30] = value
    faults = cell_faults(made, distribution="bernoulli").tolist()
    assert [fault > 0 for fault in faults] == [False, True, False]
    with pytest.raises(ValueError, match=message):
        raise ValueError(describe_fault(faults[1]))


def test_a_cell_of_impossible_classes_is_a_fault_of_a_softmax_only():
    made = outputs()
    made.logits[2, 7] = -torch.inf
    assert cell_faults(made, distribution="bernoulli").tolist() == [0, 0, 0]
    assert describe_fault(cell_faults(made, distribution="categorical").tolist()[2]) == "all logits -inf"


def test_the_identity_of_cells_is_policy_and_top():
    assert PositionSettings(policy="cells", top=8).identity() == {"policy": "cells", "top": 8}
    with pytest.raises(ValueError, match=r'top without a policy would be ignored; set policy = .* "cells"'):
        PositionSettings(top=8)


@pytest.mark.parametrize("modality", ["images", "text"])
def test_configs_of_texts_and_of_plain_images_have_no_cells(modality, tmp_path):
    labels = {"positions": {"policy": "cells"}}
    with pytest.raises(ValueError, match=r"labels\.positions: .cells."):
        digits_config(labels=labels) if modality == "images" else text_config(tmp_path, labels=labels)
