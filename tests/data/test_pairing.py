"""Pairs of samples: the join against a slow dictionary, and everything that it refuses."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from softcache.data.pairing import PairingSettings, pair_sources
from softcache.errors import AlignmentError, ConfigError


def source(keys, targets=None, *, name="made", num_classes=7):
    targets = np.array([sum(map(ord, key.split(".")[0])) % 7 for key in keys] if targets is None else targets)
    return SimpleNamespace(name=name, keys=lambda: keys, targets=lambda: targets, num_classes=num_classes)


KEYS = [f"s{number}" for number in range(9)]
TARGETS = [number % 7 for number in range(9)]


def pair(theirs, ours, **settings):
    return pair_sources(theirs, ours, PairingSettings.model_validate(settings))


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_sources_are_joined_as_a_slow_dictionary_joins_them(seed):
    random = np.random.default_rng(seed)
    here, there = random.permutation(200), random.permutation(200)[: 150 + 10 * seed]
    theirs = source([f"{n}" for n in here], here % 7)
    ours = source([f"{n}" for n in there], there % 7)
    pairing = pair(theirs, ours, subset=True)
    here_keys = theirs.keys()
    slow = {key: number for number, key in enumerate(ours.keys())}
    assert pairing.student_of.tolist() == [slow.get(key, -1) for key in here_keys]
    assert pairing.samples.tolist() == [n for n, key in enumerate(here_keys) if key in slow]
    assert [here_keys[n] for n in pairing.teacher_of] == ours.keys()
    assert pairing.num_missing == 200 - len(there)


def test_a_rule_makes_the_teachers_key_of_the_students():
    theirs = source(["a/1.png", "a/2.png"], [0, 1])
    ours = source(["small/a/2.jpg", "small/a/1.jpg"], [1, 0])
    pairing = pair(theirs, ours, replace=[["small/", ""]], suffix="ignore")
    assert pairing.student_of.tolist() == [1, 0]
    assert pair(theirs, ours, replace=[["small/", ""], [".jpg", ".png"]]).student_of.tolist() == [1, 0]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_file_names_the_pairs(tmp_path, suffix):
    table = pa.table({"teacher_key": ["01", "x"], "student_key": ["1e5", "7"]})  # a CSV's texts stay texts
    file = str(tmp_path / f"pairs.{suffix}")
    (parquet.write_table if suffix == "parquet" else csv.write_csv)(table, file)
    pairing = pair(source(["x", "01"], [3, 4]), source(["1e5", "7"], [4, 3]), file=file)
    assert pairing.student_of.tolist() == [1, 0]


def test_the_digest_is_of_the_pairs_however_they_were_found(tmp_path):
    theirs, ours = source(["a.png", "b.png"], [0, 1]), source(["b.jpg", "a.jpg"], [1, 0])
    file = tmp_path / "pairs.csv"
    file.write_text("student_key,teacher_key\na.jpg,a.png\nb.jpg,b.png\n")
    by_rule = pair(theirs, ours, suffix="ignore")
    assert pair(theirs, ours, file=str(file)).digest == by_rule.digest
    file.write_text("student_key,teacher_key\nb.jpg,a.png\na.jpg,b.png\n")
    same_class = source(["b.jpg", "a.jpg"], [0, 0])
    crossed = pair(source(["a.png", "b.png"], [0, 0]), same_class, file=str(file))
    assert crossed.digest != by_rule.digest
    assert pair(theirs, source(["a.jpg"], [0]), suffix="ignore", subset=True).digest != by_rule.digest


def test_labeled_samples_without_a_match_are_counted_and_need_leave():
    theirs, ours = source(KEYS, TARGETS), source(KEYS[5:], TARGETS[5:])
    with pytest.raises(
        AlignmentError,
        match=r"5 samples of source made have no match .*'s0', 's1', 's2', …; .*subset = true",
    ):
        pair(theirs, ours)
    assert pair(theirs, ours, subset=True).samples.tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("subset", [False, True])
def test_samples_that_were_not_labeled_are_refused(subset):
    with pytest.raises(AlignmentError, match=r"2 samples of student.source made have no match .*'new', 'x'"):
        pair(source(KEYS, TARGETS), source([*KEYS, "new", "x"], [*TARGETS, 0, 0]), subset=subset)


def test_keys_that_come_twice_are_refused():
    with pytest.raises(AlignmentError, match=r"1 keys of student.source made come more than once: 'a'"):
        pair(source(["a"], [0]), source(["a.png", "a.jpg"], [0, 0]), suffix="ignore")
    with pytest.raises(AlignmentError, match=r"1 keys of source made come more than once: 'a'"):
        pair(source(["a.png", "a.jpg"], [0, 0]), source(["a.bmp"], [0]), suffix="ignore")


def test_pairs_of_two_classes_are_refused():
    with pytest.raises(AlignmentError, match=r"2 samples are of another class .*s3 \(3, 4\).*s4 \(4, 3\)"):
        pair(source(KEYS, TARGETS), source(KEYS, [0, 1, 2, 4, 3, 5, 6, 0, 1]))
    with pytest.raises(AlignmentError, match="3 classes, source made has 7"):
        pair(source(KEYS, TARGETS), source(KEYS, TARGETS, num_classes=3))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("s0,s0\ns1,gone\n", r"1 keys in .* name no sample of student.source made: 'gone'"),
        ("lost,s0\ns1,s1\n", r"1 keys in .* name no sample of source made: 'lost'"),
        ("s0,s0\ns0,s1\n", r"1 keys of source made come more than once in .*'s0'"),
        ("s0,s1\ns1,s1\n", r"1 keys of student.source made come more than once in .*'s1'"),
        ("s0,\n", r"1 pairs in .* lack a key: 'row 0'"),
    ],
)
def test_a_file_that_pairs_wrongly_is_refused(tmp_path, rows, message):
    (tmp_path / "pairs.csv").write_text("teacher_key,student_key\n" + rows)
    both = source(["s0", "s1"], [0, 1])
    with pytest.raises(AlignmentError, match=message):
        pair(both, both, file=str(tmp_path / "pairs.csv"))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "broken.parquet").write_bytes(b"not at all")
    for name in ("none.csv", "other.csv", "broken.parquet"):
        with pytest.raises(
            ConfigError, match=rf"student.pairing.file .*{name}: cannot be read.*teacher_key and student_key"
        ):
            pair(source(KEYS, TARGETS), source(KEYS, TARGETS), file=str(tmp_path / name))
