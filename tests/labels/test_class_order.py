"""Evidence that labels are of the source's classes in another order, and none where a teacher is only bad."""

import numpy as np
import pytest

from softcache.data.sources.images.classes import sorted_places
from softcache.labels.class_order import find_other_order


def guesses(rng, targets_P, num_classes, outputs, accuracy):
    """The first guesses of a teacher that is right so often, and else guesses any class, with its outputs in places."""
    right_P = rng.random(len(targets_P)) < accuracy
    return np.asarray(outputs)[np.where(right_P, targets_P, rng.integers(0, num_classes, len(targets_P)))]


@pytest.mark.parametrize(
    ("num_classes", "num_rows", "accuracy"),
    [(2, 256, 0.8), (10, 256, 0.9), (10, 2048, 0.65), (100, 2048, 0.8), (1000, 2048, 0.85)],
)
def test_classes_that_are_all_in_other_places_are_found(num_classes, num_rows, accuracy):
    rng = np.random.default_rng(num_classes)
    outputs = np.roll(np.arange(num_classes), 1)
    targets_P = rng.integers(0, num_classes, num_rows)
    found = find_other_order(targets_P, guesses(rng, targets_P, num_classes, outputs, accuracy), num_classes)
    assert found is not None
    assert np.mean([outputs[one] == other for one, other in found.outputs.items()]) > 0.75
    assert found.right < 0.3 < 0.5 < found.right_then


def test_two_classes_in_each_others_places_are_found_among_ten():
    rng = np.random.default_rng(0)
    outputs = np.array([0, 1, 2, 7, 4, 5, 6, 3, 8, 9])
    targets_P = rng.integers(0, 10, 2048)
    found = find_other_order(targets_P, guesses(rng, targets_P, 10, outputs, 0.9), 10)
    assert found is not None
    assert found.outputs == {3: 7, 7: 3}
    assert "3 'd' as 7 'h', 7 'h' as 3 'd'" in found.describe(list("abcdefghij"))


def test_names_sorted_as_texts_and_by_number_are_found_in_a_part_of_a_sorted_source():
    """Of ten classes of a hundred, in blocks, as a trial of a folder sorted by class sees them."""
    rng = np.random.default_rng(0)
    outputs = np.argsort(np.argsort([str(number) for number in range(100)]))
    targets_P = np.repeat(np.arange(3, 100, 10), 64)
    found = find_other_order(targets_P, guesses(rng, targets_P, 100, outputs, 0.8), 100)
    assert found is not None
    assert all(outputs[one] == other for one, other in found.outputs.items())


@pytest.mark.parametrize("accuracy", [0.0, 0.1, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("num_classes", [2, 3, 10, 100, 1000])
def test_a_teacher_that_is_only_bad_is_no_evidence(num_classes, accuracy):
    rng = np.random.default_rng(1)
    for rows in (64, 256, 2048):
        for _ in range(20):
            targets_P = rng.integers(0, num_classes, rows)
            guesses_P = guesses(rng, targets_P, num_classes, np.arange(num_classes), accuracy)
            assert find_other_order(targets_P, guesses_P, num_classes) is None


def test_classes_that_are_always_taken_for_another_one_are_no_evidence():
    targets_P = np.repeat(np.arange(10), 100)
    one_for_all = np.full(1000, 4)
    into_a_neighbor = np.where(targets_P < 4, targets_P + 4, targets_P)  # 0 as 4, and 4 as 4
    to_classes_not_seen = np.where(targets_P < 2, targets_P + 10, targets_P)
    for guesses_P in (one_for_all, into_a_neighbor, to_classes_not_seen):
        assert find_other_order(targets_P, guesses_P, 20) is None


@pytest.mark.parametrize("accuracy", [0.6, 0.75])
def test_a_usual_order_of_a_thousand_classes_is_found_by_two_rows_of_each(accuracy):
    rng = np.random.default_rng(0)
    names = sorted(str(number) for number in range(1000))
    usual = sorted_places(names)
    assert usual[0] == list(range(1000))
    targets_P = rng.integers(0, 1000, 2048)
    found = find_other_order(targets_P, guesses(rng, targets_P, 1000, usual[1], accuracy), 1000, usual)
    assert found is not None
    assert found.right < 0.1 < 0.5 < found.right_then
    assert all(usual[1][one] == other for one, other in found.outputs.items())
    for bad in (0.0, accuracy):
        guesses_P = guesses(rng, targets_P, 1000, np.arange(1000), bad)
        assert find_other_order(targets_P, guesses_P, 1000, usual) is None


@pytest.mark.parametrize("num_seen", [2, 3, 5, 8])
def test_a_few_classes_of_many_that_a_weak_teacher_takes_for_others_are_no_evidence(num_seen):
    """As zero-shot CLIP does on aircraft, of which the trial of a sorted folder, or a unit of an import, shows a few."""
    rng = np.random.default_rng(num_seen)
    for _ in range(50):
        seen = rng.permutation(100)[:num_seen]
        outputs = np.arange(100)
        outputs[seen] = np.where(rng.random(num_seen) < 0.5, rng.integers(0, 100, num_seen), seen)
        targets_P = np.repeat(seen, 1024 // num_seen)
        guesses_P = guesses(rng, targets_P, 100, outputs, 0.8)
        assert find_other_order(targets_P, guesses_P, 100) is None


def test_rows_without_a_class_are_left_out_and_no_rows_are_no_evidence():
    targets_P = np.repeat([0, 1, -1, 7], 100)
    guesses_P = np.repeat([1, 0, 1, 0], 100)
    found = find_other_order(targets_P, guesses_P, 2)
    assert found is not None
    assert found.outputs == {0: 1, 1: 0}
    assert found.num_rows == 100
    assert find_other_order(targets_P[:0], guesses_P[:0], 2) is None
