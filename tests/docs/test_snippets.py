"""`mypy --strict` passes on the Python of every page and notebook: what softcache exports is typed as it is used.

A module is a page, or a file that a page shows. What a page leaves to its reader (`student`, `source`) has no definition, and is
Any; so are libraries of others, but for torch, NumPy and the standard library: their own types change with their releases.
"""

import json
import subprocess
import sys

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


def test_every_example_passes_mypy_strict(tmp_path):
    texts = modules()
    assert len(texts) > 15
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    (tmp_path / "wrong.py").write_text("from softcache import open_cache\n\nopen_cache(3).read('a')\n")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--config-file",
            "mypy.ini",
            *sorted(f"{name}.py" for name in texts),
            "wrong.py",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    found = [
        line for line in done.stdout.splitlines() if ": error: " in line and not line.startswith("wrong.py:3")
    ]
    assert found == [], "\n".join(found)
    assert done.stdout.count("wrong.py:3: error: ") == 2, done.stdout + done.stderr
