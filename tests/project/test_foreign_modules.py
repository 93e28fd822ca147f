"""A user's own `pipeline.py`, `stages.py`, `labels.py` and `data/` in the current folder are never imported by softcache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.caches import ROOT

CONFIG = """
name = "foreign"
[source]
name = "digits"
max_train_samples = 64
max_eval_samples = 32
[teacher]
model = "tests.fakes:known"
[labels]
k = 4
num_views = 1
[capture]
unit_samples = 32
chunk_samples = 32
batch_size = 32
device = "cpu"
[student]
model = "linear"
[train]
epochs = 1
batch_size = 32
device = "cpu"
[reader]
workers = 2
"""
FOREIGN = ("pipeline.py", "stages.py", "labels.py", "data/__init__.py", "reader.py", "softcache_stages.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's project: a config, and modules with the names of softcache's folders that fail when imported."""
    folder = tmp_path_factory.mktemp("foreign")
    for name in FOREIGN:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"raise RuntimeError('{name} of the current folder was imported')\n")
    (folder / "config.toml").write_text(CONFIG)
    return folder


def run(folder: Path, *command: str) -> str:
    """Returns the output of a Python command in the folder; the tests' fake teacher is importable there."""
    found = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout + found.stderr


@pytest.fixture(scope="module")
def cache(folder):
    """A cache captured by a Dask worker in that folder."""
    capture = [
        "teacher-logits",
        "--config",
        "config.toml",
        "--cache",
        "cache",
        "--dask",
        "auto",
        "--workers",
        "1",
    ]
    run(folder, "-m", "softcache", *capture)
    return folder / "cache"


def test_the_command_starts(folder):
    script = Path(sys.executable).parent / "softcache"
    for command in (["-m", "softcache"], [str(script)]):
        assert "teacher-logits" in run(folder, *command, "--help")


def test_dask_workers_capture(cache):
    assert (cache / "manifest.json").exists()


def test_a_script_reads_a_cache(folder, cache):
    read = "from softcache import open_cache; print(len(open_cache('cache').read([0, 1])))"
    assert run(folder, "-c", read).strip() == "2"


def test_loader_processes_and_torchrun_train(folder, cache):
    launched = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    train = ["train-student", "--config", "config.toml", "--cache", "cache", "--no-baseline", "--out", "out"]
    run(folder, *launched, "-m", "softcache", *train)
    assert (folder / "out/metrics.json").exists()
