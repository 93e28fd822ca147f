"""The capture benchmark still runs. Its figures are for people to read; sizes here are too small to mean anything."""

import json

from click.testing import CliRunner

from benchmarks import capture
from tests.support.programs import fork_interpreters


def test_capture_benchmark_runs(tmp_path, monkeypatch):
    fork_interpreters(monkeypatch)
    path, plot = tmp_path / "figures.json", tmp_path / "figures.svg"
    how = ["--quick", "--rounds", "1", "--json", str(path), "--plot", str(plot)]
    done = CliRunner().invoke(capture.main, how)
    assert done.exit_code == 0, done.output
    results = json.loads(path.read_text())["results"]
    assert sum(title.startswith("text") for title in results) == 3
    for title, rows in results.items():
        names = [row["name"] for row in rows]
        if title.startswith("peak memory"):
            assert names == ["1 x", "4 x", "16 x"]
        else:
            assert names[:2] == ["teacher alone", "Zarr, open"]
            assert rows[0]["ratio"] == 1.0
        assert all(row["per_second"] > 0 for row in rows)
    assert plot.stat().st_size > 0
