"""The benchmark of what needs a GPU, rehearsed on a CPU."""

import json

import click
import pytest
import torch
from click.testing import CliRunner

from benchmarks import gpu

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the rehearsal is for machines without a GPU"
)


def test_it_is_rehearsed_and_fills_the_page(tmp_path):
    pytest.importorskip("triton")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{gpu.BEGIN}\nnot measured\n{gpu.END}\nafter\n")
    done = CliRunner().invoke(gpu.main, ["--rehearse", "--out", str(tmp_path), "--write", str(page)])
    assert done.exit_code == 0, done.output
    figures = json.loads((tmp_path / "gpu.json").read_text())
    assert all(rows["300"][0]["ratio"] == 1.0 for rows in figures["parts"].values())
    assert [row["name"] for row in figures["parts"]["teacher with its labels"]["300"][1:]] == [*gpu.POLICIES]
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "not measured" not in text
    assert "| fused, forward KL of K = 64 | 300 |" in text


def test_what_no_time_is_left_for_is_named(tmp_path):
    results = gpu.run(gpu.REHEARSAL, 0.0, tmp_path / "gpu.json")
    assert not any(results["parts"].values())
    assert "decoding at V = 300, because the time was over" in results["left_out"]


def test_a_page_without_marks_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(gpu.END + gpu.BEGIN)
    with pytest.raises(click.ClickException, match="expected <!-- gpu: begin -->"):
        gpu.write_page(str(page), "")


def test_it_wants_a_gpu():
    done = CliRunner().invoke(gpu.main)
    assert done.exit_code == 1
    assert "--rehearse" in done.output
