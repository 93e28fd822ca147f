"""Fixtures that all tests share."""

import os

# Tests never reach for a network, whatever a library would like to download; huggingface_hub reads this once, when it
# is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# The suite runs in one process per core; on small tensors a second thread only waits. For processes that tests start:
os.environ.setdefault("OMP_NUM_THREADS", "1")

import multiprocessing

import pytest
import torch

from tests.caches import make_cache

torch.set_num_threads(1)
# Loader processes are forked from a server that has imported what they need, instead of importing it one by one.
multiprocessing.get_context("forkserver").set_forkserver_preload(["pipeline.loader", "pipeline.sources"])


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    """A complete Zarr cache that tests read and never change."""
    return make_cache(tmp_path_factory.mktemp("shared") / "cache")


@pytest.fixture(scope="session", autouse=True)
def _thaw_folder(tmp_path_factory):
    """Caches are thawed into a temporary folder, also by the processes that tests start."""
    os.environ["SOFTCACHE_THAW_DIR"] = str(tmp_path_factory.mktemp("thaw"))


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Runs write under a temporary folder; the repository's configs stay reachable by absolute path."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
