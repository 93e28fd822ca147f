"""Translation on several processes, and teachers' texts whose writers are killed: the same scores, the same bytes."""

import json
import os
import signal
import sys

import pytest
import tomli_w

from softcache.reader.open import open_cache
from softcache.runs import capture_labels, open_data, open_teacher, train_student
from softcache.stages.cli import main
from softcache.teacher import generate as writing
from tests.modalities.test_translation import files_of
from tests.student.test_run import distance
from tests.support.process_groups import run_ranks
from tests.support.translations import translation_config, write_pairs

PAIRS = {"generate": {"beams": 2, "batch_size": 8, "part_pairs": 8}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pairs, their cache, and a config of the run that made it."""
    folder = tmp_path_factory.mktemp("processes")
    write_pairs(folder / "pairs.jsonl", num_pairs=24, languages=("de", "ed"))
    config = translation_config(folder, **PAIRS)
    data = open_data(config)
    capture_labels(config, data, open_teacher(config, data), str(folder / "cache"))
    (folder / "run.toml").write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_unset=True)))
    return folder


# -- one student of many processes -------------------------------------------------------------------------


def _trains(rank, folder, out):
    """Two students: one of all pairs, and one that is scored on a single pair, so that one of two ranks has none."""
    found = []
    for name, source in (("all", {}), ("single", {"max_eval_samples": 1})):
        config = translation_config(
            folder, source=source, train={"epochs": 2, "lr": 1e-2, "batch_size": 8}, **PAIRS
        )
        how = {"labels": "cache", "cache": open_cache(folder / "cache"), "out": out / name}
        found.append(train_student(config, open_data(config), model=config.student.model, **how))
    return found


def test_two_processes_train_and_score_the_student_that_one_trains(place, tmp_path):
    ended = run_ranks(tmp_path / "ranks", 2, _trains, place, tmp_path / "two")
    assert [end.code for end in ended] == [0, 0], ended
    one = _trains(0, place, tmp_path / "one")
    for number, name in enumerate(("all", "single")):
        first, second = (end.value[number] for end in ended)
        scores = [key for key in one[number] if key.startswith(("chrf", "bleu"))]
        assert scores
        assert [first[key] for key in scores] == [second[key] for key in scores], "each rank has those of all"
        assert [first[key] for key in scores] == pytest.approx([one[number][key] for key in scores])
        assert first["eval_loss"] == pytest.approx(one[number]["eval_loss"], rel=1e-4)
        assert distance(tmp_path / "one" / name, tmp_path / "two" / name) < 1e-4
        written = json.loads((tmp_path / "two" / name / "metrics.json").read_text())
        assert [written[key] for key in scores] == [first[key] for key in scores]


# -- what a teacher writes, killed --------------------------------------------------------------------------


def _generates(rank, folder, out, dies, signum):
    """`softcache teacher-generate` as its user types it; sends itself a signal in the middle of a part."""
    os.chdir(folder)
    translate, left = writing.translate, iter(range(dies))

    def dying(*arguments, **how):
        found = translate(*arguments, **how)
        if next(left, None) is None:
            os.kill(os.getpid(), signum)
        return found

    writing.translate = dying
    sys.argv = ["softcache", "teacher-generate", "--config", "run.toml", "--out", str(out)]
    main()


def generate(place, folder, out, *, dies=99, signum=0):
    (ended,) = run_ranks(folder, 1, _generates, place, out, dies, signum)
    return ended


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert generate(place, folder / "ranks", folder / "out").code == 0
    return files_of(folder / "out")


@pytest.mark.parametrize(
    ("signum", "code", "message"),
    [
        (signal.SIGKILL, -signal.SIGKILL, ""),
        (signal.SIGTERM, 128 + signal.SIGTERM, "the same command goes on: softcache teacher-generate"),
    ],
    ids=["killed", "asked to end"],
)
def test_a_writer_that_is_ended_goes_on_where_it_was_with_the_same_bytes(
    place, whole, tmp_path, signum, code, message
):
    ended = generate(place, tmp_path / "first", tmp_path / "out", dies=2, signum=signum)
    assert (ended.code, message in ended.err) == (code, True), ended.err
    there = files_of(tmp_path / "out")
    assert "train/00001.jsonl" in there
    assert "train/00002.jsonl" not in there, "what is not whole is not there"
    assert "manifest.json" not in there
    again = generate(place, tmp_path / "second", tmp_path / "out")
    assert again.code == 0, again.err
    assert "2 found" in again.out
    assert files_of(tmp_path / "out") == whole
