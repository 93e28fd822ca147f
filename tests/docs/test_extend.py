"""docs/how-to/extend.md, word for word: its files in an empty folder, its commands, and what they made."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from softcache.reader import open_cache
from tests.support.caches import ROOT
from tests.support.custom_variants import forget_modules_of
from tests.support.docs_pages import blocks
from tests.support.docs_shell import Shell

PAGE = blocks((ROOT / "docs/how-to/extend.md").read_text())
IN_A_PROCESS_OF_ITS_OWN = "softcache train-student --config run.toml"
"""It imports a loss, a policy, a codec and a source from the current folder; the others need no start of Python."""


def run(script: str, folder: Path) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment
        | {"PATH": path, "OMP_NUM_THREADS": "1", "SOFTCACHE_MEMMAP_DIR": str(folder / "memmap")},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a reader who has followed the page."""
    folder = tmp_path_factory.mktemp("extend")
    for block in PAGE:
        if block.file is not None:
            with (folder / block.file).open("a") as file:
                file.write("\n" * (file.tell() > 0) + block.text)
    commands = [command for block in PAGE for command in block.commands]
    assert len(commands) == 5
    with pytest.MonkeyPatch.context() as patch, Shell(folder) as shell:
        patch.syspath_prepend(folder)
        printed = [run(c, folder) if c == IN_A_PROCESS_OF_ITS_OWN else shell.run(c) for c in commands]
    (folder / "printed.txt").write_text("".join(printed))
    yield folder
    forget_modules_of(folder)


def metrics_of(folder, name, labels="cache"):
    (found,) = (folder / "runs" / name / "students").glob(f"*-{labels}-*/metrics.json")
    return json.loads(found.read_text()), json.loads((found.parent / "config.json").read_text())


def test_a_variant_is_one_file_and_a_config(folder):
    written = {path.name for path in folder.iterdir() if path.suffix in (".py", ".toml")} - {"pyproject.toml"}
    modules = {f"my_{kind}.py" for kind in ("losses", "policies", "codecs", "sources", "texts", "modality")}
    assert written == modules | {"run.toml", "text.toml", "wines.toml"}


def test_a_loss_a_policy_a_codec_and_a_source_make_one_run(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    __import__("my_codecs")
    cache = open_cache(folder / "runs/run/cache")
    identity = cache.manifest.identity
    assert (identity["source"]["name"], len(cache), cache.num_classes) == ("bars/train", 256, 8)
    assert (identity["labels"]["policy"], identity["labels"]["min_prob"]) == ("my_policies:Threshold", 0.05)
    assert (cache.manifest.codec["name"], cache.manifest.codec["step"]) == ("my_codecs:Steps", 0.02)
    labels = cache.read(range(256), view=0)
    assert (labels.log_probs[labels.ids < 8] > -3.1).all()
    metrics, config = metrics_of(folder, "run")
    assert (config["loss"]["name"], config["loss"]["order"]) == ("my_losses:renyi", 0.3)
    assert metrics["history"][-1]["train_loss"] < metrics["history"][0]["train_loss"]


def test_a_source_of_texts_makes_a_cache(folder):
    cache = open_cache(folder / "runs/text/cache")
    assert (cache.manifest.kind, cache.manifest.identity["source"]["name"]) == ("tokens", "sums/train")
    assert not cache.missing_units
    assert cache.manifest.teacher.eval_loss is not None


def test_a_modality_makes_a_run(folder):
    cache = open_cache(folder / "runs/wines/cache")
    assert (cache.manifest.identity["source"]["name"], len(cache), cache.num_classes) == (
        "wines/train",
        143,
        3,
    )
    assert cache.manifest.teacher.eval_accuracy > 0.9
    assert metrics_of(folder, "wines")[0]["accuracy"] > 0.8
    assert metrics_of(folder, "wines", "hard")[0]["accuracy"] > 0.5
    assert "my_modality:mlp?width=4" in (folder / "printed.txt").read_text()
