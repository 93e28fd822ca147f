"""`mypy --strict` and pyright pass on the Python of every page and notebook: what softcache exports is typed as it is used.

A module is a page, or a file that a page shows. What a page leaves to its reader (`student`, `source`) has no definition, and is
Any; so are libraries of others, but for torch, NumPy and the standard library: their own types change with their releases.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.support.caches import ROOT
from tests.support.docs_pages import PAGES, blocks

OTHERS = (
    *(
        "accelerate",
        "dask",
        "dask_jobqueue",
        "datasets",
        "distributed",
        "lightning",
        "matplotlib",
        "obstore",
        "pandas",
    ),
    *("PIL", "sklearn", "timm", "torchvision", "transformers", "trl", "xarray", "zarr"),
)
CONFIG = f"""
[mypy]
strict = True
python_version = 3.11
mypy_path = {ROOT / "pipeline"}
plugins = pydantic.mypy
ignore_missing_imports = True
follow_imports = silent
cache_dir = {ROOT / ".mypy_cache/snippets"}
disable_error_code = name-defined
# torch's Tensor.backward is not annotated, and subclasses of what is Any here are those of others' classes
disallow_untyped_calls = False
disallow_subclassing_any = False
[mypy-{",".join(f"{name}.*" for name in OTHERS)}]
follow_imports = skip
"""
PYRIGHT = {
    "typeCheckingMode": "standard",
    "pythonVersion": "3.11",
    "extraPaths": [str(ROOT / "pipeline")],
    "useLibraryCodeForTypes": False,  # what has no types is Any, and what has them is by the stubs
    "reportMissingImports": False,
    "reportMissingModuleSource": False,
    "reportUndefinedVariable": False,
    "reportUnusedExpression": False,  # cells of a notebook
}
STUB = "from typing import Any\n\ndef __getattr__(name: str) -> Any: ...\n"


def modules():
    """The Python of pages and notebooks by the name of its module."""
    found = {}
    for page in PAGES:
        name = page.relative_to(ROOT).with_suffix("").as_posix().replace("/", "_").replace("-", "_")
        for block in blocks(page.read_text()):
            if block.language == "python":
                of_file = f"{name}_{block.file.removesuffix('.py')}" if block.file else name
                found[of_file] = f"{found.get(of_file, '')}\n\n{block.text}"
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        found[f"notebook_{path.stem}"] = "\n".join(
            "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"
        )
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All modules, one of them with two mistakes in its third line."""
    folder = tmp_path_factory.mktemp("snippets")
    texts = modules()
    assert len(texts) > 15
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "wrong.py").write_text("from softcache import open_cache\n\nopen_cache(3).read('a')\n")
    return folder


def errors_of(words, folder):
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env=os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line.strip().removeprefix(f"{folder}{os.sep}") for line in done.stdout.splitlines()]
    found = [line for line in lines if "error: " in line]
    wrong = [line for line in found if line.startswith("wrong.py:3")]
    assert len(wrong) == 2, done.stdout + done.stderr
    return "\n".join(line for line in found if line not in wrong)


def test_every_example_passes_mypy_strict(folder):
    (folder / "mypy.ini").write_text(CONFIG)
    files = sorted(path.name for path in folder.glob("*.py"))
    assert errors_of(["mypy", "--config-file", "mypy.ini", *files], folder) == ""


@pytest.mark.skipif(find_spec("pyright") is None, reason="needs pyright: pip install 'softcache[dev]'")
def test_every_example_passes_pyright(folder):
    for name in (*OTHERS, "timm.data"):
        stub = folder / "typings" / name.replace(".", "/") / "__init__.pyi"
        stub.parent.mkdir(parents=True)
        stub.write_text(STUB)
    (folder / "pyrightconfig.json").write_text(json.dumps(PYRIGHT))
    assert errors_of(["pyright", "--project", ".", "--pythonpath", sys.executable], folder) == ""
