"""The benchmark of codecs still runs, and its figures hold together. Sizes here are too small to mean anything."""

import json

from click.testing import CliRunner

from benchmarks import codecs


def test_codec_benchmark_runs(tmp_path, monkeypatch):
    monkeypatch.delattr("os.sched_setaffinity", raising=False)  # the rest of the tests may use every core
    path = tmp_path / "figures.json"
    done = CliRunner().invoke(
        codecs.main, ["--quick", "--rows", "128", "--rounds", "1", "-k", "32", "--json", str(path)]
    )
    assert done.exit_code == 0, done.output
    text, drawn, images = json.loads(path.read_text()).values()
    assert {"open float16", "packed, default"} <= set(text)
    for rows in (text, images):
        assert rows["open float32"]["kl_max"] < 1e-12
        for name, row in rows.items():
            if name.startswith("packed, default"):
                assert row["kl_max"] <= codecs.PackedCodec(9, 1, (1.0,)).step ** 2 / 8
            assert row["bytes"] > sum(row.get("bound", {}).values())
    sizes = [row["bytes"] for row in drawn.values()]
    assert sizes == sorted(sizes, reverse=True)  # each leaves out more than the one before
