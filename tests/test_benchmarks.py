"""Benchmarks still run. Their figures are for people to read; sizes here are too small to mean anything."""

import json

from click.testing import CliRunner

from benchmarks import fused, teacher_memory


def test_fused_benchmark_runs(tmp_path):
    path = tmp_path / "figures.json"
    done = CliRunner().invoke(fused.main, ["--quick", "--rounds", "1", "--json", str(path)])
    assert done.exit_code == 0, done.output
    assert "peak memory beside the inputs" in done.output
    figures = json.loads(path.read_text())
    assert figures["time"]["dense cross-entropy"]["ratio"] == 1.0
    assert all(row["seconds"] > 0 for row in figures["time"].values())
    assert [row["unfused_measured"] for row in figures["memory"]] == [True]


def test_teacher_memory_benchmark_runs(tmp_path):
    path = tmp_path / "figures.json"
    how = ["--length", "96", "--vocabulary", "500", "--json", str(path)]
    done = CliRunner().invoke(teacher_memory.main, how)
    assert done.exit_code == 0, done.output
    assert json.loads(path.read_text())[0]["length"] == 96
