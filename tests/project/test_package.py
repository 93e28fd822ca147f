"""The package: what it exports and imports, which extra has what, and the error where one is missing."""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from importlib.metadata import packages_distributions

import click
import pytest

import softcache
from softcache.errors import EXTRA_BY_PACKAGE, MissingExtraError
from softcache.stages.cli import softcache as group
from tests.support.caches import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = ["torch", "numba", "zarr", "tensorstore", "pyarrow", "pydantic", "scipy", "pandas"]

EXPORTS = {
    "softcache": [
        *("BlockSampler", "Cache", "DistillTrainer", "MemmapSettings", "SoftLabelDataset", "SoftLabelLoader"),
        *("SoftLabels", "__version__", "browse", "losses", "open_cache", "sparsify"),
    ],
    "softcache.labels": ["Sampling", "SoftLabels", "concat"],
    "softcache.data": ["Batch", "open_source"],
    "softcache.cache": ["Codec", "Manifest"],
    "softcache.losses": ["LOSSES", "LossSpec", "distillation_loss", "divergence", "forward_kl", "make_loss"],
    "softcache.teacher": ["Teacher", "capture"],
    "softcache.teacher.capture": ["CaptureSettings", "capture"],
    "softcache.reader": ["BlockSampler", "Cache", "SoftLabelDataset", "SoftLabelLoader", "open_cache"],
    "softcache.student": ["Task", "train"],
    "softcache.modalities": ["MODALITIES", "Data", "Modality", "Score"],
}

LOADED = "import json, sys; before = set(sys.modules); {code}; print(json.dumps(sorted(set(sys.modules) - before)))"

WITHOUT = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Without())
{code}
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


def _opens_text_of_the_locale(call):
    """Whether a call reads or writes text without naming its encoding."""
    name = getattr(call.func, "attr", getattr(call.func, "id", None))
    if name not in ("read_text", "write_text", "open") or any(
        word.arg == "encoding" for word in call.keywords
    ):
        return False
    if name == "read_text":
        return not call.args
    if name == "write_text":
        return True
    modes = [
        one.value
        for one in call.args[:2]
        if isinstance(one, ast.Constant) and isinstance(one.value, str) and set(one.value) <= set("rwaxbt+")
    ]
    return any("b" not in mode for mode in modes) and "devnull" not in ast.dump(call)


def test_files_are_utf8_whatever_the_locale():
    """A chat template or a list of classes that is decoded by the locale is another one, without a word."""
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for folder in ("pipeline", "stages")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(call, ast.Call) and _opens_text_of_the_locale(call)
    ]
    assert found == []


@pytest.mark.parametrize("code", ["import softcache", "from softcache.stages.cli import softcache"])
def test_importing_is_light(code):
    done = run(LOADED.format(code=code))
    loaded = json.loads(done.stdout)
    assert "softcache" in loaded
    assert not {name.partition(".")[0] for name in loaded} & set(HEAVY), "taken along"


@pytest.mark.parametrize("package", EXPORTS)
def test_a_package_exports_its_public_names(package):
    module = import_module(package)
    assert set(EXPORTS[package]) <= set(module.__all__)
    assert set(module.__all__) <= set(dir(module)), "what an editor offers"
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'there_is_none'"):
        _ = module.there_is_none


def test_the_public_names_are_those_that_are_promised():
    text = (ROOT / "docs/compatibility.md").read_text().partition("## Public names")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(softcache[\w.]*)` \| (`.*) \|$", text, re.M)
    promised = {module: set(re.findall(r"`(\w+)`", names)) for module, names in rows}
    assert {"softcache", "softcache.reader", "softcache.labels", "softcache.losses"} <= promised.keys()
    for module, names in promised.items():
        assert names == set(import_module(module).__all__), f"{module}: docs/compatibility.md lists others"
    assert (ROOT / "pipeline/softcache/py.typed").exists()


def test_a_package_opens_with_a_sentence():
    for path in sorted((ROOT / "pipeline/softcache").rglob("__init__.py")):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert text.partition("\n\n")[0].endswith("."), path


def test_the_names_that_read_a_cache_import_no_torch():
    code = (
        "from softcache.reader import Cache, open_cache; from softcache.cache import Codec, Manifest; "
        "cache = open_cache('tests/golden/v1/zarr'); repr(cache[:2].top(1)); cache.to_arrow()"
    )
    loaded = json.loads(run(LOADED.format(code=code)).stdout)
    assert "softcache.reader.cache" in loaded
    assert "torch" not in loaded


def test_a_run_imports_what_only_some_runs_use_when_they_use_it():
    """Each takes seconds, which every loader process and every Dask worker would pay."""
    done = run(LOADED.format(code="import softcache.runs, softcache.student.tasks"))
    loaded = json.loads(done.stdout)
    assert "torch" in loaded
    assert not {name.partition(".")[0] for name in loaded} & {"torchmetrics", "torchvision", "transformers"}


@pytest.mark.parametrize(
    ("name", "hidden", "extra"),
    [("losses", "torch", "vision"), ("SoftLabelLoader", "torch", "vision"), ("sparsify", "torch", "text")],
)
def test_a_public_name_says_which_extra_it_needs(name, hidden, extra):
    done = run(WITHOUT.format(hidden=[hidden], code=f"import softcache; softcache.{name}"))
    assert f"MissingExtraError: softcache.{name}: {hidden} is not installed" in done.stderr
    assert f"softcache[{extra}]" in done.stderr


def test_a_command_says_which_extra_it_needs():
    done = run(
        WITHOUT.format(
            hidden=["torch"],
            code="import sys; sys.argv = ['softcache', 'compare']; from softcache.stages.cli import main; main()",
        )
    )
    assert done.returncode == 1
    assert done.stderr.startswith(
        "softcache: softcache compare: torch is not installed; pip install 'softcache[vision]'"
    )


@pytest.mark.parametrize("store", ["zarr", "parquet"])
def test_a_cache_is_verified_without_torch_and_its_teacher_is_not(store):
    """Checksums and rows need what is in no extra."""

    def verify(*words):
        words = ["softcache", "verify", f"tests/golden/v1/{store}", *words]
        code = f"import sys; sys.argv = {words!r}; from softcache.stages.cli import main; main()"
        return run(WITHOUT.format(hidden=["torch"], code=code))

    done = verify()
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("4 units; 0 faults\n")
    done = verify("--config", "configs/digits.toml")
    assert done.returncode == 1
    assert "softcache verify --config: torch is not installed" in done.stderr


def test_a_module_that_is_in_no_extra_is_not_explained_away(monkeypatch):
    monkeypatch.setitem(softcache._HOMES, "Cache", "softcache.there_is_none")
    with pytest.raises(ModuleNotFoundError, match=r"softcache\.there_is_none") as caught:
        _ = softcache.Cache
    assert not isinstance(caught.value, MissingExtraError)


def test_every_package_of_an_extra_is_listed():
    """EXTRA_BY_PACKAGE is what pyproject.toml installs."""
    distributions = packages_distributions()
    installed = {}
    for extra, wanted in PROJECT["optional-dependencies"].items():
        installed[extra] = {word.partition(">")[0].partition("[")[0].lower() for word in wanted}
    for package, extra in EXTRA_BY_PACKAGE.items():
        names = {name.lower().replace("_", "-") for name in distributions[package]}
        assert names & installed[extra], f"{package} is not in the extra {extra}"


def test_all_has_every_extra_of_users():
    extras = set(PROJECT["optional-dependencies"]) - {"all", "dev", "train", "docs"}
    extras -= {"vllm"}  # 6 GB with its CUDA libraries, and pins of its own
    listed = set(PROJECT["optional-dependencies"]["all"][0].partition("[")[2].rstrip("]").split(","))
    assert listed == extras


def test_doctor_has_a_purpose_for_every_extra_of_users():
    from softcache.stages.doctor import PURPOSES

    assert PURPOSES.keys() == PROJECT["optional-dependencies"].keys() - {"all", "dev", "docs"}


def test_the_wheel_has_one_top_level_name(tmp_path):
    for name in ("pipeline", "stages", "configs"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    code = "from setuptools import build_meta; build_meta.build_wheel('.')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top_level = {name.partition("/")[0] for name in names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"softcache"}
    tree = {str(path.relative_to(ROOT / "pipeline")) for path in (ROOT / "pipeline/softcache").rglob("*.py")}
    tree |= {f"softcache/stages/{path.name}" for path in (ROOT / "stages").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == tree
    configs = {f"softcache/configs/{path.name}" for path in (ROOT / "configs").glob("*.toml")}
    assert configs <= set(names)


def test_the_packages_are_those_of_the_tree():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    tree = ROOT / "pipeline"
    found = {".".join(path.relative_to(tree).parent.parts) for path in tree.rglob("__init__.py")}
    assert set(listed) == found | {"softcache.stages", "softcache.configs"}


def test_the_citation_is_of_this_version():
    lines = (ROOT / "CITATION.cff").read_text().splitlines()
    assert f"version: {softcache.__version__}" in lines
    assert PROJECT["version"] == softcache.__version__


def test_an_unknown_command_is_none_of_the_list():
    assert group.get_command(click.Context(group), "none") is None
