"""The notebook of ten questions runs in this process, and its answers are right; the page has the same cells."""

import ast
import json
import re

import matplotlib
import numpy as np
import pytest
from torch.utils.data import Dataset

from softcache.labels import SoftLabels
from tests.support.caches import ROOT, make_cache

NOTEBOOK = json.loads((ROOT / "examples/questions.ipynb").read_text())
PAGE = (ROOT / "docs/tutorial/python.md").read_text()
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def answer(code, names):
    """Runs a cell; returns the value of its last line, as a notebook does."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    labels = {"k": 5, "num_views": 2}
    capture = {"unit_samples": 2048, "chunk_samples": 2048, "batch_size": 512}
    teacher = {"model": "tests.fakes:nearest_mean"}
    source = {"max_train_samples": None}
    made = make_cache(
        folder / "runs/digits/cache", source=source, teacher=teacher, labels=labels, capture=capture
    )[2]
    names: dict = {}
    matplotlib.use("agg")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield made, [answer(code, names) for code in CELLS], names, answer


def test_the_answers_are_right(answers):
    cache, (_, what, top, frame, doubt, picture, confusion, wrong, kept, whole, disagreement), _, _ = answers
    labels = [cache[:, view] for view in (0, 1)]
    predicted = np.stack([of_view.ids[:, 0] for of_view in labels])
    truth = cache.samples.targets
    assert "digits/train" in what._repr_html_()
    assert [len(row) for row in top] == [3]
    number = list(cache.keys).index("digits/0007")
    assert [name for name, _ in top[0]] == [str(n) for n in labels[0].ids[number, :3]]
    assert len(frame) == 5
    assert doubt.confidence.tolist() == pytest.approx(
        sorted(np.concatenate([np.exp(of_view.log_probs[:, 0].astype(float)) for of_view in labels]))[:5],
        rel=1e-3,
    )
    assert picture.get_text().count("%") == 5
    assert int(np.diag(confusion).sum()) == (predicted == truth).sum()
    assert len(wrong) == (predicted != truth).sum() > 0
    assert kept == pytest.approx(np.mean(labels[0].kept_mass(4.0)))
    assert whole.shape == (1, 10)
    assert whole.sum() == pytest.approx(1, abs=0.006)
    assert disagreement == pytest.approx((predicted[0] != predicted[1]).mean())


def test_the_rest_of_the_page_runs(answers):
    _, _, names, run = answers
    run(re.findall(r"```python\n(.*?)```", PAGE, re.S)[-1], names)
    assert isinstance(names["dataset"], Dataset)
    assert isinstance(names["batch"].labels, SoftLabels)
    assert len(names["batch"]) == 256


def test_page_and_notebook_have_the_same_cells_each_of_at_most_two_lines():
    shown = [block.strip() for block in re.findall(r"```python\n(.*?)```", PAGE, re.S)]
    assert shown[:-1] == CELLS
    assert max(cell.count("\n") + 1 for cell in CELLS[1:]) <= 2
    assert len(CELLS) == 11
    for cell in NOTEBOOK["cells"]:
        assert not cell.get("outputs"), f"clear the outputs of {cell['id']}"
