"""The report's numbers against slow obvious ones, and what it refuses."""

import json
import os
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from softcache.errors import IdentityError, MissingExtraError, RunError
from softcache.labels.base import dense_log_probs
from softcache.labels.sparsify import Dense, TopK
from softcache.reader.open import open_cache
from softcache.runs import capture_labels, open_data, open_teacher, train_student
from softcache.runs.report import build_sections, open_report, open_run
from softcache.runs.report.examples import Names, example_sets
from softcache.runs.report.metrics import (
    agrees_with_teacher,
    break_even,
    by_class,
    by_decile,
    calibration_error,
    deciles,
    kept_by_k,
    misses_teacher,
    reliability,
)
from softcache.runs.report.plots import Styles, heat_of_values, load_plotly
from softcache.runs.report.predictions import observe
from softcache.runs.report.student_table import settings_figures, student_table
from softcache.tools.fidelity.report import bytes_per_position
from softcache.tools.shrink import ShrinkSettings, shrink_cache
from tests.support.caches import digits_config
from tests.support.report_runs import inside, make_runs

pytest.importorskip("plotly")
pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return folder, make_runs(folder)


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A copy of the runs, to be changed."""
    shutil.copytree(made[0] / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / made[1]


@pytest.fixture(scope="module")
def held_out(made):
    with inside(made[0]):
        report = open_report([made[0] / made[1]])
        return report, observe(report, split="held-out")


def change(run: Path, name: str, **values):
    path = run / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_calibration_error_is_the_weighted_gap_of_ten_bins():
    draw = np.random.default_rng(0)
    confidence, correct = draw.uniform(0.01, 0.99, 500).astype(np.float32), draw.random(500) < 0.6
    expected = 0.0
    for number in range(10):
        inside_bin = [i for i in range(500) if number / 10 < confidence[i] <= (number + 1) / 10]
        if inside_bin:
            sure = sum(float(confidence[i]) for i in inside_bin) / len(inside_bin)
            right = sum(bool(correct[i]) for i in inside_bin) / len(inside_bin)
            expected += len(inside_bin) / 500 * abs(sure - right)
    assert calibration_error(confidence, correct) == pytest.approx(expected, abs=1e-6)
    bins = reliability(confidence, correct)
    assert sum(b.rows for b in bins) == 500
    assert sum(b.rows / 500 * abs(b.confidence - b.accuracy) for b in bins) == pytest.approx(
        expected, abs=1e-6
    )


def test_tenths_have_the_least_sure_rows_first_and_equal_sizes():
    confidence = np.random.default_rng(1).random(57)
    tenth = deciles(confidence)
    assert np.bincount(tenth).tolist() in [
        [6, 6, 6, 5, 6, 6, 5, 6, 6, 5],
        np.bincount(np.arange(57) * 10 // 57).tolist(),
    ]
    assert all(confidence[tenth == n].max() <= confidence[tenth == n + 1].min() for n in range(9))
    assert by_decile(np.ones(3), deciles(np.arange(3.0))) == [
        1.0,
        None,
        None,
        1.0,
        None,
        None,
        1.0,
        None,
        None,
        None,
    ]


def test_means_by_class_and_rows_that_follow_or_fail():
    targets, teacher, student = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0]), np.array([1, 1, 1, 0])
    assert by_class(student == targets, targets, np.array([0, 1, 2, 3])) == [0.0, 1.0, 0.0, None]
    assert agrees_with_teacher(teacher, student, targets).tolist() == [1, 3]
    assert misses_teacher(teacher, student, targets).tolist() == [0]


@pytest.mark.parametrize(("views", "epochs", "students"), [(8, 40, 1), (8, 3, 3), (1, 1, 1), (9, 3, 3)])
def test_break_even_is_the_first_number_of_students_with_no_more_passes(views, epochs, students):
    assert break_even(views, epochs) == students == next(n for n in range(1, 99) if n * epochs >= views)


def test_a_record_of_all_classes_gives_the_distribution_back_and_a_short_one_its_mass():
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    exact = logits.log_softmax(1)
    whole = torch.from_numpy(dense_log_probs(Dense().apply(logits)))
    torch.testing.assert_close(whole, exact, atol=1e-5, rtol=0)
    short = torch.from_numpy(dense_log_probs(TopK(k=3).apply(logits)))
    torch.testing.assert_close(short.exp().sum(1), torch.ones(6), atol=1e-5, rtol=0)
    kept = exact.topk(3)
    torch.testing.assert_close(short.gather(1, kept.indices), kept.values, atol=1e-5, rtol=0)


def test_students_score_what_their_runs_say(held_out):
    report, observed = held_out
    assert [found.name for found in observed.students] == [run.name for run in report.runs]
    for run, found in zip(report.runs, observed.students, strict=True):
        assert (found.guess_P == observed.targets_P).mean() == pytest.approx(
            run.metrics["accuracy"], abs=1e-6
        )
        assert -found.target_log_prob_P.mean() == pytest.approx(run.metrics["eval_loss"], abs=1e-5)


def test_divergence_and_similarity_are_those_of_the_whole_distributions(held_out):
    report, observed = held_out
    task, model = report.student(report.runs[0])
    batch = report.data.evaluation.load(range(len(report.data.evaluation)), 0)
    with torch.no_grad():
        student = task.logits(model, batch.images).double().softmax(1)
    teacher = report.teacher.logits(batch.images).double().softmax(1)
    kl = (teacher * (teacher.log() - student.log())).sum(1)
    np.testing.assert_allclose(observed.students[0].kl_P, kl, atol=1e-5)
    assert np.abs(observed.teacher.kl_P).max() == 0
    for number in (0, 7):
        rows = [student[i] for i in range(len(student)) if batch.targets[i] == number]
        expected = sum(rows) / len(rows)
        np.testing.assert_allclose(observed.students[0].similarity_CC[number], expected, atol=1e-6)


def test_examples_are_those_of_which_the_teacher_was_surest(held_out):
    report, observed = held_out
    found = example_sets(report, observed, Names(report))
    assert {gallery.student for gallery in found} == {"linear (cache)", "mlp?width=8 (cache)"}
    for gallery in found:
        assert [e.confidence for e in gallery.examples] == sorted(
            (e.confidence for e in gallery.examples), reverse=True
        )
        for example in gallery.examples:
            assert example.picture.startswith("data:image/png;base64,")
            if gallery.kind == "follows":
                assert example.student == example.teacher != example.label
            else:
                assert example.teacher == example.label != example.student


def test_without_the_teachers_weights_the_cache_speaks_for_it_and_the_page_says_so(place):
    for run in place.iterdir():
        change(run, "resolved", teacher={"model": "linear", "weights": "gone.safetensors"})
    report = open_report([place])
    assert report.teacher is None
    sections = {section.key: section for section in build_sections(report)}
    assert "gone.safetensors" in sections["calibration"].missing[0]
    assert "come from the cache" in sections["knowledge"].missing[0]
    assert "training split" in sections["compression"].lead
    found = observe(report, split="training")
    labels = report.cache.read(np.arange(len(report.cache)), 0)
    assert found.teacher.guess_P.tolist() == labels.ids[:, 0].tolist()


def test_without_cache_and_teacher_each_panel_that_needs_them_says_so(place):
    shutil.rmtree("runs/test/cache")
    for run in place.iterdir():
        change(run, "resolved", teacher=None)
    sections = {section.key: section for section in build_sections(open_report([place]))}
    for key in ("knowledge", "compression", "cache", "cost"):
        assert sections[key].missing, key
        assert not sections[key].figures
    assert sections["glance"].figures


def test_runs_of_other_data_are_refused_by_name(place):
    odd = sorted(place.glob("linear-hard*"))[0]
    change(odd, "config", evaluation="0" * 64)
    with pytest.raises(IdentityError, match=rf"run .*{odd.name}: of other data than .*evaluation differ"):
        open_report([place])


def test_a_run_whose_cache_is_not_there_is_refused(place):
    odd = sorted(place.glob("mlp*-cache-*"))[0]
    change(odd, "config", cache="0" * 64)
    with pytest.raises(IdentityError, match=rf"{odd.name}: learnt from another cache than runs/test/cache"):
        open_report([place])


def test_data_that_changed_since_are_refused(place):
    for run in place.iterdir():
        change(run, "config", source="0" * 64)
    with pytest.raises(IdentityError, match="its data changed since"):
        open_report([place])


def test_another_cache_at_the_place_is_refused(place):
    for run in place.glob("*-cache-*"):
        change(run, "config", cache="0" * 64)
    with pytest.raises(IdentityError, match="learnt from another cache than runs/test/cache"):
        open_report([place])


def test_an_unfinished_run_is_refused_alone_and_named_in_a_folder(place):
    odd = sorted(place.iterdir())[0]
    (odd / "metrics.json").unlink()
    with pytest.raises(RunError, match="not finished"):
        open_report([odd])
    report = open_report([place])
    assert report.unfinished == [odd]
    assert odd.name in build_sections(report)[0].missing[-1]


def test_one_run_is_asked_for_before_several_are_compared(place):
    """Not as a report refuses them: that they are of other data is of no interest to who wants one."""
    change(next(place.iterdir()), "config", source="another")
    with pytest.raises(RunError, match=r"run .*: expected one run; found 4 in it; name one's own directory"):
        open_run(place)


@pytest.mark.parametrize("open_it", [open_report, open_run])
def test_a_student_of_other_tokens_is_refused_in_words_for_both_commands(place, open_it):
    run = next(place.iterdir())
    change(run, "config", student_data={"tokenizer": "another"})
    message = r"has another tokenizer than the teacher.*neither report nor export is of such a student: name other runs$"
    with pytest.raises(RunError, match=message):
        open_it([run] if open_it is open_report else run)


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(RunError, match="expected a run's directory"):
        open_report([tmp_path])


def test_a_fidelity_report_of_another_cache_is_refused(place, tmp_path):
    path = tmp_path / "fidelity.json"
    path.write_text(json.dumps({"manifest_sha256": "0" * 64}))
    with pytest.raises(RunError, match="of another cache"):
        build_sections(open_report([place]), fidelity=path)


def test_the_frontier_shows_the_cache_and_every_kind_of_record(place, tmp_path):
    report = open_report([place])

    def point(k, size, error):
        return {
            "policy": "top_k",
            "codec": "open float16",
            "k": k,
            "bytes_per_position": {"total": size},
            "temperatures": {"1": {"gradient_error": error}},
        }

    found = {
        "manifest_sha256": report.cache.manifest_sha256,
        "bytes_per_position": {"total": 30.0},
        "temperatures": {"1": {"gradient_error": 0.02}},
        "frontier": [point(1, 20.0, 0.1), point(8, 40.0, 0.001), point(10, 50.0, 0.0)],  # the last: rounding
    }
    path = tmp_path / "fidelity.json"
    path.write_text(json.dumps(found))
    sections = {section.key: section for section in build_sections(report, fidelity=path)}
    frontier = next(figure for figure in sections["cache"].figures if figure.key == "cache-frontier")
    kind = "top_k, open float16"
    rows = [("this cache", "30.0", "2.00e-02"), (kind, "20.0", "1.00e-01"), (kind, "40.0", "1.00e-03")]
    assert [cells for _, cells in frontier.rows] == rows
    assert [list(trace["x"]) for trace in frontier.plot["data"]] == [[20.0, 40.0], [30.0]]


def test_seeds_of_one_architecture_are_told_apart_and_compared_by_their_mean(place):
    one = sorted(place.glob("linear-cache-*"))[0]
    shutil.copytree(one, place / "again")
    change(place / "again", "metrics", accuracy=0.0)
    report = open_report([place])
    assert sorted(run.name for run in report.runs if run.path in (one, place / "again")) == sorted(
        [f"linear (cache) {one.name}", "linear (cache) again"]
    )
    assert "its mean is compared" in build_sections(report)[0].lead


def test_the_first_table_has_one_line_for_seeds_and_names_what_differs(place):
    one = sorted(place.glob("linear-cache-*"))[0]
    identity, resolved = (json.loads((one / f"{name}.json").read_text()) for name in ("config", "resolved"))
    for name, seed, temperature, accuracy in (("seed", 1, 4.0, 0.5), ("hot", 0, 2.0, 0.25)):
        shutil.copytree(one, place / name)
        train = identity["train"] | {"seed": seed}
        change(place / name, "config", train=train, loss=identity["loss"] | {"temperature": temperature})
        change(place / name, "resolved", loss=resolved["loss"] | {"temperature": temperature})
        change(place / name, "metrics", accuracy=accuracy)
    section = build_sections(report := open_report([place]))[0]
    assert section.key == "glance"
    assert "train.seed (0, 1); loss.temperature (2, 4). All other settings are the same." in section.lead
    names = {run.path.name: run.name for run in report.runs}
    assert names["hot"] == "linear (cache, seed = 0, T = 2)"
    table = section.figures[0]
    assert table.sortable
    lines = [dict(zip(table.columns, cells, strict=True)) | {"of": of} for of, cells in table.rows]
    assert [line["student"] for line in lines] == ["teacher", *(line["student"] for line in lines[1:])]
    scores = {run.path.name: run.metrics["accuracy"] for run in report.runs}
    first = [scores[one.name], 0.5]
    (seeds,) = [line for line in lines if line["runs"] == "2"]
    assert seeds["of"] == (names[one.name], names["seed"])
    assert seeds["accuracy"] == f"{100 * np.mean(first):.2f}% ± {100 * np.std(first, ddof=1):.2g}"
    assert (seeds["loss"], seeds["T"], seeds["K"], seeds["alpha"]) == ("forward_kl", "4", "4", "0.9")
    hard = next(score for name, score in scores.items() if name.startswith("linear-hard"))
    assert seeds["gain"] == f"{100 * (np.mean(first) - hard):+.2f}"
    teacher = float(lines[0]["accuracy"].rstrip("%"))
    assert float(seeds["gap"]) == pytest.approx(100 * np.mean(first) - teacher, abs=0.011)
    (surface,) = [figure for figure in section.figures if figure.key.startswith("glance-settings")]
    assert [cells[:3] for _, cells in surface.rows] == [("2", "0.9", 1), ("4", "0.9", 2)]


def test_of_runs_that_differ_in_more_than_t_and_alpha_the_best_is_shown_and_named(place):
    one = sorted(place.glob("linear-cache-*"))[0]
    identity, resolved = (json.loads((one / f"{name}.json").read_text()) for name in ("config", "resolved"))
    for name, seed, temperature, lr, accuracy in (
        ("hot", 0, 2.0, 0.001, 0.25),
        ("slow", 0, 4.0, 1e-9, 0.0625),  # a bad learning rate says nothing of T = 4
        ("fast", 0, 4.0, 0.5, 0.75),
        ("fast-again", 1, 4.0, 0.5, 0.5),
    ):
        shutil.copytree(one, place / name)
        loss = {"temperature": temperature}
        change(
            place / name,
            "config",
            train=identity["train"] | {"seed": seed, "lr": lr},
            loss=identity["loss"] | loss,
        )
        change(place / name, "resolved", loss=resolved["loss"] | loss)
        change(place / name, "metrics", accuracy=accuracy)
    shutil.rmtree(one)
    (surface,) = settings_figures(open_report([place]))
    assert surface.columns == ("T", "alpha", "lr", "runs", "accuracy")
    assert [cells for _, cells in surface.rows] == [
        ("2", "0.9", "0.001", 1, "25.00%"),
        ("4", "0.9", "0.5", 3, "62.50%"),
    ]
    assert (
        "the mean over seeds of the best of the runs with these two: they differ in lr too" in surface.summary
    )
    assert surface.plot["data"][0]["z"] == [[25.0, 62.5]]
    for name in ("slow", "hot"):
        shutil.rmtree(place / name)
    shutil.copytree(place / "fast", place / "hot")
    change(
        place / "hot",
        "config",
        loss=identity["loss"] | {"temperature": 2.0},
        train=identity["train"] | {"lr": 0.5},
    )
    change(place / "hot", "resolved", loss=resolved["loss"] | {"temperature": 2.0})
    (surface,) = settings_figures(open_report([place]))
    assert (surface.columns, surface.summary.endswith("the mean over seeds.")) == (
        ("T", "alpha", "runs", "accuracy"),
        True,
    )


def test_a_run_that_is_there_twice_is_no_further_seed(place):
    one = sorted(place.glob("linear-cache-*"))[0]
    train = json.loads((one / "config.json").read_text())["train"]
    shutil.copytree(one, place / "again")
    shutil.copytree(one, place / "seed")
    change(place / "seed", "config", train=train | {"seed": 1})
    change(place / "seed", "metrics", accuracy=0.5)
    relative = Path(os.path.relpath(one))
    report = open_report([one, relative, place / "again", place / "seed"])
    assert [run.path.name for run in report.runs] == [one.name, "again", "seed"]
    latencies = defaultdict(lambda: 1.0)
    table = student_table(report, latencies, {"score": None, "parameters": None})
    (cells,) = [dict(zip(table.columns, cells, strict=True)) for _, cells in table.rows]
    seeds = [json.loads((one / "metrics.json").read_text())["accuracy"], 0.5]
    assert cells["accuracy"] == f"{100 * np.mean(seeds):.2f}% ± {100 * np.std(seeds, ddof=1):.2g}"
    (place / "seed" / "metrics.json").unlink()
    table = student_table(open_report([one, place / "again"]), latencies, {"score": None, "parameters": None})
    assert "±" not in table.rows[0][1][table.columns.index("accuracy")]


def test_kept_mass_by_k_is_that_of_smaller_caches(made):
    cache = open_cache(made[0] / "runs/test/cache")
    found, labels = kept_by_k(cache), cache.read(np.arange(len(cache)), 0)
    assert {k for k, _ in found} == {1, 2, 4}
    for (k, t), mass in found.items():
        assert mass == pytest.approx(
            np.exp(labels.at_temperature(t).log_probs)[:, :k].sum(1).mean(), abs=1e-6
        )
        if k == 4:
            assert mass == pytest.approx(float(np.mean(labels.kept_mass(t))), abs=1e-6)


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(MissingExtraError, match=r"softcache\[report\]"):
        load_plotly()


def test_students_of_caches_that_keep_less_are_laid_beside_those_of_the_whole_one(tmp_path):
    with inside(tmp_path):
        make_runs(tmp_path)
        whole = open_cache("runs/test/cache")
        shrink_cache(whole, "runs/test/sweep/caches/k-2", ShrinkSettings(k=2))
        first = open_report(["runs/test/students"]).runs[0]
        config = first.config.model_copy(update={"labels": first.config.labels.model_copy(update={"k": 2})})
        smaller = open_cache("runs/test/sweep/caches/k-2")
        train_student(config, open_data(config), model="linear", labels="cache", cache=smaller)
        report = open_report(["runs/test/students"])
        assert [cache.manifest_sha256 for cache in report.caches] == [
            whole.manifest_sha256,
            smaller.manifest_sha256,
        ]
        assert {"linear (cache, K = 2)", "linear (cache, K = 4)", "linear (hard)"} <= {
            r.name for r in report.runs
        }
        section = next(section for section in build_sections(report) if section.key == "compression")
        figure = next(figure for figure in section.figures if figure.key == "compression-bytes")
        smallest = figure.rows[0][1]
        assert smallest[:2] == ("linear (cache, K = 2)", "K = 2")
        assert float(smallest[2]) == pytest.approx(sum(bytes_per_position(smaller).values()), abs=0.05)
        colors = [Styles(report.runs).color(run.name) for run in report.runs]
        assert len(set(colors)) == len(colors), "runs of one architecture have distinct colors"

        other = digits_config(name="test", cache="elsewhere", views={"padding": 2})
        capture_labels(other, open_data(other), open_teacher(other, open_data(other)), "elsewhere")
        with pytest.raises(IdentityError, match=r"learnt from another cache than elsewhere .* once for each"):
            open_report(["runs/test/students"], cache_url=["elsewhere", "runs/test/cache"])


@pytest.mark.parametrize(
    ("across", "kind", "texts"), [(8, "heatmap", True), (12, "heatmap", False), (13, "scatter", False)]
)
def test_many_settings_are_marks_or_have_a_scale_in_place_of_texts(across, kind, texts):
    values = {(float(t), 0.5): 70.0 + t for t in range(across)}
    plot = heat_of_values(
        values, {place: f"{x:g}%" for place, x in values.items()}, x="T", y="a", title="<b>"
    )
    (trace,) = plot["data"]
    assert (trace["type"], bool(trace.get("texttemplate"))) == (kind, texts)
    if kind == "scatter":
        assert trace["marker"]["line"]["width"] == 1, "marks have an outline on light and dark ground"
        assert trace["marker"]["colorbar"]["title"]["text"] == "&lt;b&gt;"
    else:
        assert trace["showscale"] == (not texts)
