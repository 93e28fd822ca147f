"""The quickstart notebook runs from its first cell to its last, prints the expected results, and is stored without outputs."""

import asyncio
import os
import re

import nbformat
from nbclient import NotebookClient

from tests.support.caches import ROOT, make_cache

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def executed(folder, monkeypatch):
    """Returns what the notebook's cells printed, and how many figures they drew."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "jupyter"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    return printed, sum("image/png" in output.get("data", {}) for output in outputs)


def test_the_quickstart_runs(tmp_path, monkeypatch):
    printed, figures = executed(tmp_path, monkeypatch)
    assert "1,501 images, 4 views of each, 10 classes" in printed
    assert "together 1.000" in printed
    accuracy = {name: float(found) for name, found in re.findall(r"^(\w[\w ]*?) +([\d.]+)%", printed, re.M)}
    assert accuracy["teacher"] > 95
    assert accuracy["from the cache"] > 80
    assert accuracy["hard labels"] > 80
    assert figures == 3
    assert (tmp_path / "runs" / "quickstart" / "cache" / "manifest.json").exists()


def test_it_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs"), f"clear the outputs of {cell.id}"
        assert cell.get("execution_count") is None
    links = re.findall(r"\]\(([^)]+)\)", "".join(cell.source for cell in notebook.cells))
    for link in links:
        assert (NOTEBOOK.parent / link).exists(), link


def test_a_cache_is_made_where_an_event_loop_runs(tmp_path):
    """As in every notebook."""

    async def capture():
        return make_cache(tmp_path / "cache")[2]

    assert not asyncio.run(capture()).missing_units
