"""The benchmark of the peers' own code: on one that is made up here, and on checkouts where SOFTCACHE_PEERS has them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from benchmarks import peers
from benchmarks.harness import cpu_seconds
from tests.support.caches import ROOT

CHECKOUTS = os.environ.get("SOFTCACHE_PEERS")
"""A folder with checkouts DistillKit, Megatron-LM and Cream, and a package liger_kernel in `lib`."""


class Records(Dataset):
    """What the made-up peer reads."""

    def __init__(self, folder, source, k):
        record = np.dtype([("seed", "<i4"), ("ids", "<i2", (k,)), ("probs", "<f2", (k,))])
        self.records = np.fromfile(folder / f"logits_top{k}_epoch0" / "rank0-values.bin", record)
        self.places, self.source = {key: number for number, key in enumerate(source.keys())}, source

    def __len__(self):
        return len(self.records)

    def set_epoch(self, epoch):
        pass

    def _get_saved_logits(self, key):
        seed, ids, probs = self.records[self.places[key]]
        return seed, ids.copy(), probs.copy()

    def __getitem__(self, sample):
        seed, ids, probs = self._get_saved_logits(self.source.key(sample))
        return (torch.zeros(1), self.source.target(sample)), (ids, probs, seed)


class MadeUp:
    """A peer that keeps TinyViT's files; what it writes of ids can be wrong."""

    name, patch, wrong = "made up", "nothing", 0

    def __init__(self, checkout, num_classes, k):
        self.k, self.num_classes = k, num_classes

    def write(self, folder, keys, ids, log_probs):
        folder = folder / f"logits_top{self.k}_epoch0"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rank0-keys.txt").write_text("\n".join(keys) + "\n")
        with (folder / "rank0-values.bin").open("wb") as file:
            for number, (row, probs) in enumerate(
                zip(ids, np.exp(log_probs.astype(np.float32)), strict=True)
            ):
                kept = (row + self.wrong) % self.num_classes
                file.write(np.int32(number).tobytes() + kept.astype(np.int16).tobytes())
                file.write(probs.astype(np.float16).tobytes())

    def dataset(self, folder, source):
        return Records(folder, source, self.k)

    def loader(self, dataset, batch_samples, workers):
        sampler = DistributedSampler(dataset, 1, 0)
        return DataLoader(dataset, batch_samples, sampler=sampler, num_workers=workers)


@pytest.fixture
def made_up(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "tinyvit", MadeUp)
    monkeypatch.setattr(peers, "WORKERS", {"images": (0,), "text": (0,)})
    return MadeUp


def run(tmp_path, *more):
    how = ["--quick", "--rounds", "1", "--rows", "64", "--json", str(tmp_path / "figures.json"), *more]
    return CliRunner().invoke(peers.main, how)


def test_a_peer_is_measured_beside_ours_and_one_that_is_not_there_says_so(made_up, tmp_path):
    done = run(tmp_path, "--tinyvit", str(tmp_path), "--megatron", str(tmp_path / "none"))
    assert done.exit_code == 0, done.output
    assert "megatron: left out: PeerError" in done.output
    assert "no such folder; expected a checkout" in done.output
    assert "changed to run here: nothing" in done.output
    results = json.loads((tmp_path / "figures.json").read_text())
    assert 0 < results["imports"]["tinyvit"] < 1e-3
    codecs = results["images, V=1,000, K=10"]
    assert list(codecs) == [
        "softcache, packed, the default",
        "softcache, open, float16",
        "TinyViT, its TxtManager",
    ]
    assert codecs["TinyViT, its TxtManager"]["bytes"] == 44
    assert all(0 < row["kl_mean"] < 1e-5 for row in codecs.values())
    rows = results["images, through a loader, 0 workers"]
    assert list(rows)[:2] == ["TinyViT, its own code", "TinyViT, its layout read by us"]
    assert len(rows) == 7
    assert rows["TinyViT, its own code"]["ratio"] == 1.0
    assert all(row["per_second"] > 0 and row["per_cpu_second"] > 0 for row in rows.values())


def test_a_peer_that_gives_other_labels_than_were_written_ends_the_benchmark(made_up, tmp_path, monkeypatch):
    monkeypatch.setattr(made_up, "wrong", 1)
    monkeypatch.setattr(peers, "check_import", lambda *_: 0.0)
    done = run(tmp_path, "--tinyvit", str(tmp_path))
    assert done.exit_code == 1
    assert "other ids came back than were written" in done.output


def test_an_import_that_differs_from_the_peers_reader_ends_the_benchmark(made_up, tmp_path, monkeypatch):
    read = Records._get_saved_logits
    monkeypatch.setattr(
        Records,
        "_get_saved_logits",
        lambda *of: (lambda seed, ids, probs: (seed, ids, probs / 2))(*read(*of)),
    )
    done = run(tmp_path, "--tinyvit", str(tmp_path))
    assert done.exit_code == 1
    assert "an import is 6.9e-01 nats from what its own reader gives" in done.output


def test_timm_trains_by_its_own_task_and_by_ours_with_one_loss(tmp_path):
    done = run(tmp_path, "--timm")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "figures.json").read_text())["timm"]
    assert found["difference"] < peers.LOSS_DIFFERENCE
    assert list(found["rows"]) == [
        "hard labels, ClassificationTask",
        "live teacher, LogitDistillationTask",
        "cache, TimmLoss",
    ]


def test_cpu_time_of_processes_that_have_ended_is_counted():
    before = cpu_seconds()
    subprocess.run(
        [sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass"],
        check=True,
    )
    assert cpu_seconds() - before > 0.2


@pytest.mark.skipif(not CHECKOUTS, reason="SOFTCACHE_PEERS names no folder with checkouts of the peers")
def test_imports_of_files_that_the_peers_write_are_what_their_readers_give(tmp_path):
    folder, figures = Path(CHECKOUTS), tmp_path / "figures.json"
    given = {
        "--distillkit": "DistillKit",
        "--megatron": "Megatron-LM",
        "--tinyvit": "Cream",
        "--liger": "lib",
    }
    how = [part for option, name in given.items() for part in (option, str(folder / name))]
    command = [sys.executable, "-m", "benchmarks.peers", *how, "--quick", "--rounds", "1", "--rows", "256"]
    path = os.pathsep.join([str(folder / "lib"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "--json", str(figures)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(figures.read_text())
    assert results["left_out"] == {}
    assert set(results["imports"]) == {"distillkit", "tinyvit"}
    assert all(results["commits"].values())
    assert {title for title in results if "loader" in title} >= {"text, through a loader, 1 worker"}
    assert isinstance(results["Liger-Kernel"]["LigerFusedLinearJSD, beta = 0: forward_kl"], dict)
