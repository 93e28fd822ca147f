"""The report of language models: the same numbers token by token, and texts as heat maps."""

import numpy as np
import pytest
import torch

from softcache.runs import capture_labels, open_data, open_teacher, train_student
from softcache.runs.report import build_sections, open_report
from softcache.runs.report.predictions import observe
from softcache.tools.browse.samples import group_tokens
from tests.support.report_runs import inside
from tests.support.text_caches import make_text_cache
from tests.support.translations import translation_config

pytest.importorskip("plotly")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report-text")
    with inside(folder):
        config, data, cache = make_text_cache(folder / "cache", folder)
        for labels in ("cache", "ground_truth"):
            model = "gpt2?width=8&depth=1&heads=2"
            how = {"cache": cache} if labels == "cache" else {}
            # Shorter than the samples: the report must know what the run's student attends over.
            narrow = config.model_copy(update={"student": config.student.model_copy(update={"context": 16})})
            train_student(narrow, data, model=model, labels=labels, **how)
        yield open_report([folder / "runs/test-text/students"], cache_url=str(folder / "cache"))


def test_students_score_what_their_runs_say(report):
    observed = observe(report, split="held-out")
    for run, found in zip(report.runs, observed.students, strict=True):
        assert -found.target_log_prob_P.mean() == pytest.approx(run.metrics["eval_loss"], abs=1e-5)
        assert (found.guess_P == observed.targets_P).mean() == pytest.approx(
            run.metrics["accuracy"], abs=1e-6
        )


def test_divergence_is_that_of_the_whole_distributions_row_by_row(report):
    observed = observe(report, split="held-out")
    _, model = report.student(report.runs[0])
    batch = report.data.evaluation.load(range(len(report.data.evaluation)), 0)
    with torch.no_grad():
        student = model.logits(batch).double().softmax(1)
    teacher = torch.cat(list(report.teacher.chunks(batch))).double().softmax(1)[:, : student.shape[1]]
    expected = (teacher * (teacher / student).log()).sum(1)
    np.testing.assert_allclose(observed.students[0].kl_P, expected, atol=1e-4)


def test_texts_are_shown_as_shaded_tokens_up_to_the_row(report):
    sections = {section.key: section for section in build_sections(report)}
    galleries = sections["knowledge"].galleries
    shown = [e for gallery in galleries for e in gallery.examples]
    assert shown
    for gallery in galleries:
        keys = [example.key for example in gallery.examples]
        assert max(map(keys.count, keys), default=0) <= 2, "neighbours in one text are mostly one mistake"
    for example in shown:
        assert example.picture is None
        text, kl = example.tokens[-1]
        assert text
        assert kl >= 0


def test_tokens_that_only_together_make_a_letter_are_shown_as_one():
    def decode(numbers):
        return bytes(numbers).decode(errors="replace")

    assert group_tokens(decode, list("aÄ!".encode())) == [("a", [0]), ("Ä", [1, 2]), ("!", [3])]
    whole = "".join(text for text, _ in group_tokens(decode, list("tür€".encode()[:-1])))
    assert whole.startswith("tür")
    assert whole.endswith("\ufffd"), "a letter that is cut off at the end is still there"


def test_translations_are_shown_with_both_sides_their_chrf_and_targets_only_as_classes(tmp_path):
    with inside(tmp_path):
        config = translation_config(tmp_path)
        data = open_data(config)
        cache, _ = capture_labels(config, data, open_teacher(config, data), "runs/test-translation/cache")
        for labels, how in (("cache", {"cache": cache}), ("ground_truth", {})):
            train_student(config, data, model=config.student.model, labels=labels, **how)
        report = open_report(["runs/test-translation/students"])
        sections = {section.key: section for section in build_sections(report)}
        observed = observe(report, split="held-out")
    for run, found in zip(report.runs, observed.students, strict=True):
        assert -found.target_log_prob_P.mean() == pytest.approx(run.metrics["eval_loss"], abs=1e-5)
    source = report.data.evaluation.source
    targets = {int(t) for n in range(len(source)) for t in source.sample(n).tokens[source.sample(n).rows + 1]}
    assert set(observed.classes_C.tolist()) <= targets
    figure = next(f for f in sections["glance"].figures if f.key == "glance-translations")
    assert figure.columns[1:3] == ("chrF de", "chrF ed")
    assert figure.rows[0][1][1] == f"{report.runs[0].metrics['chrf_de']:.1f}"
    shown = [e for gallery in sections["knowledge"].galleries for e in gallery.examples]
    assert any("<2de>" in text for example in shown for text, _ in example.tokens), "the source is shown, too"
