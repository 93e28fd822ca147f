"""Students that read something else than the teacher, seen from outside: exported, compared, searched, reported."""

import json

import numpy as np
import pytest
import tomli_w
import torch
from click.testing import CliRunner

from softcache.runs import train_student
from softcache.runs.export import ExportSettings, export_run
from softcache.runs.export.benchmark import load_onnx
from softcache.runs.report import open_report
from softcache.runs.report.examples import Names, example_sets
from softcache.runs.report.predictions import observe
from softcache.stages.cli import softcache
from tests.modalities.test_student_source import BYTES, DIGITS, SMALL
from tests.support.caches import make_cache
from tests.support.report_runs import inside

pytest.importorskip("onnxruntime")
FEW = ExportSettings(rounds=2, calibration_samples=40)
BYTES = BYTES | {"source": BYTES["source"] | {"format": "png", "compress_level": 0}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One cache; students of the teacher's own images, of 4x4 pixels, and of the files' bytes."""
    folder = tmp_path_factory.mktemp("shown")
    with inside(folder):
        for name, student in (("plain", {"model": "mlp?width=8"}), ("small", SMALL), ("bytes", BYTES)):
            tables = {"cache": str(folder / "cache"), "train": {"epochs": 1}, "student": student}
            config, data, cache = make_cache(folder / "cache", **tables)
            train_student(
                config, data, model=student["model"], labels="cache", cache=cache, out=folder / "runs" / name
            )
    return folder


def metrics_of(run):
    return json.loads((run / "metrics.json").read_text())


@pytest.mark.parametrize(("name", "kind"), [("small", "static"), ("bytes", "dynamic")])
def test_a_student_of_another_source_is_exported_for_what_it_reads(trained, tmp_path, name, kind):
    run = trained / "runs" / name
    report = open_report([run])
    figures = export_run(report, report.runs[0], tmp_path / "out", FEW)
    models = figures["models"]
    assert figures["quantization"] == kind
    assert models["student.onnx"]["same_predictions"] == models["student.pt2"]["same_predictions"] == 1.0
    assert models["student"]["accuracy"] == pytest.approx(metrics_of(run)["accuracy"])
    assert models["student"]["eval_loss"] == pytest.approx(metrics_of(run)["eval_loss"], rel=1e-4)
    # The teacher is scored and timed on its own images, and compared with the student sample by sample.
    assert figures["input"]["teacher_latency_shape"] == [1, 8, 8] != figures["input"]["latency_shape"]
    observed = observe(report, split="held-out")
    right = (observed.teacher.guess_P == observed.targets_P).mean()
    assert models["teacher"]["accuracy"] == pytest.approx(right)
    same = (observed.teacher.guess_P == observed.students[0].guess_P).mean()
    assert models["teacher"]["same_predictions"] == pytest.approx(same)


def test_a_file_of_any_length_is_padded_to_the_exported_input(trained, tmp_path):
    report = open_report([trained / "runs/bytes"])
    figures = export_run(report, report.runs[0], tmp_path / "out", FEW)
    (length,) = figures["input"]["latency_shape"]
    assert f"[batch, {length}]" in figures["input"]["contract"]
    assert "256 behind its end" in figures["input"]["contract"]
    onnx = load_onnx(tmp_path / "out/student.onnx", input_name="bytes", threads=1)
    task, model = report.student(report.runs[0])
    batch = task.evaluation.load([0, 1, 2], 0, fingerprints=False)
    padded = torch.nn.functional.pad(batch.images, (0, length - batch.images.shape[1]), value=256)
    with torch.no_grad():
        torch.testing.assert_close(onnx(padded), task.logits(model, batch.images), atol=1e-4, rtol=1e-4)


def test_students_of_one_cache_are_reported_together_whatever_they_read(trained):
    report = open_report([trained / "runs"])
    assert [run.name for run in report.runs] == [
        "bytes?width=8&depth=1 (cache, reads png bytes)",
        "mlp?width=8 (cache)",
        "mlp?width=8 (cache, reads digits size 4 grey)",
    ]
    observed = observe(report, split="held-out")
    for run, student in zip(report.runs, observed.students, strict=True):
        assert (student.guess_P == observed.targets_P).mean() == pytest.approx(run.metrics["accuracy"])
    shown = [one for gallery in example_sets(report, observed, Names(report)) for one in gallery.examples]
    assert all(one.picture for one in shown)


def test_held_out_samples_are_compared_with_their_partners_and_others_are_left_out(trained, monkeypatch):
    report = open_report([trained / "runs/small"])
    whole = observe(report, split="held-out")
    source = report.data_of(report.runs[0]).evaluation.source
    keys = [source.key(number) for number in range(len(source))]
    order = np.random.default_rng(0).permutation(len(keys))[:40]  # the student's own order, and fewer

    class Reordered:
        name, num_classes = source.name, source.num_classes

        def __len__(self):
            return len(order)

        def keys(self):
            return [keys[number] for number in order]

        def key(self, number):
            return keys[order[number]]

        def targets(self):
            return np.asarray(source.targets())[order]

        def image(self, number):
            return source.image(int(order[number]))

    monkeypatch.setattr(report.data_of(report.runs[0]).evaluation, "source", Reordered())
    few = observe(report, split="held-out")
    assert few.sample_P.tolist() == sorted(order.tolist())
    np.testing.assert_array_equal(few.students[0].guess_P, whole.students[0].guess_P[np.sort(order)])


@pytest.mark.parametrize("student", [SMALL, BYTES], ids=["small", "bytes"])
def test_compare_students_and_sweep_take_them_as_any_other(in_tmp, trained, student):
    tables = {
        "name": "other",
        "cache": str(trained / "cache"),
        "source": DIGITS,
        "views": {"crop": "padded", "padding": 1, "mean": [0.3], "std": [0.4]},
        "teacher": {"model": "tests.fakes:known"},
        "labels": {"k": 4, "num_views": 2},
        "student": student | ({} if student is BYTES else {"models": ["linear", student["model"]]}),
        "train": {"epochs": 1, "batch_size": 50, "device": "cpu"},
        "sweep": {"trials": 1, "space": {"alpha": [0.9]}},
    }
    (in_tmp / "other.toml").write_text(tomli_w.dumps(tables))

    def printed(command, *more):
        result = CliRunner().invoke(softcache, [command, "--config", "other.toml", "--json", *more])
        assert result.exit_code == 0, (result.output, result.exception)
        return json.loads(result.stdout)

    compared = printed("compare", "--seeds", "1")["students"]
    assert set(compared) == {"hard labels", "cache, 1 view", "cache, 2 views", "online teacher"}
    table = printed("train-students")["students"]
    # The default of student.models is of images; a student of bytes without one has its own architecture alone.
    assert {row["model"] for row in table} == {student["model"]} | (set() if student is BYTES else {"linear"})
    (trial,) = printed("sweep", "--no-cost")["trials"]
    own = next(row for row in table if row["model"] == student["model"])
    assert (trial["state"], trial["value"]) == ("complete", own["cache"]["accuracy"])
