"""Every command on caches of pairs: it works, or it refuses by name."""

import json

import pytest
import tomli_w
from click.testing import CliRunner
from safetensors.torch import load_file

from softcache.errors import ConfigError, IdentityError, SpecError
from softcache.reader.open import open_cache
from softcache.runs.report import build_sections, open_report
from softcache.stages.cli import softcache
from tests.support.translations import translation_config, write_pairs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the configs of two teachers of the same pairs, and their caches one/cache and two/cache."""
    folder = tmp_path_factory.mktemp("commands")
    write_pairs(folder / "pairs.jsonl", num_pairs=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, teacher in (("one", "known"), ("two", "other")):
            config = translation_config(
                folder, name=name, teacher={"model": f"tests.support.translations:{teacher}"}
            )
            tables = config.model_dump(mode="json", exclude_unset=True) | {"cache": f"{name}/cache"}
            (folder / f"{name}.toml").write_text(tomli_w.dumps(tables))
            output = invoke("teacher-logits", "--config", f"{name}.toml")
            assert "units made now, 0 found" in output
    return folder


def invoke(*arguments):
    """What a command prints; what it raises is raised."""
    result = CliRunner().invoke(softcache, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def run(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("SOFTCACHE_MEMMAP_DIR", str(place / "thawed"))
    return invoke


WORKS = {
    "inspect": (("inspect", "one/cache"), "tests.support.translations:known"),
    "status": (("status", "one/cache"), "complete; "),
    "verify": (("verify", "one/cache", "--config", "one.toml"), "rows against the teacher; 0 faults"),
    "fidelity": (("fidelity", "one/cache", "--config", "one.toml", "--rows", 16, "--out", "fidelity"), "frontier.png"),
    "dry run": (("teacher-logits", "--config", "one.toml", "--dry-run", "--cache", "dry"), "nothing was written"),
    "gc": (("gc", "one/cache"), "orphaned 0 objects"),
}  # fmt: skip


@pytest.mark.parametrize(("command", "printed"), WORKS.values(), ids=WORKS.keys())
def test_a_command_works_on_pairs(run, command, printed):
    assert printed in run(*command)


MADE = {
    "convert": ("convert", "one/cache", "OUT", "--store", "parquet"),
    "shrink": ("shrink", "one/cache", "OUT", "--k", 3),
    "shrink to packed": ("shrink", "one/cache", "OUT", "--codec", "packed"),
    "fuse": ("fuse", "one/cache", "two/cache", "--rule", "mean", "--out", "OUT", "--allow-weak-teachers"),
}


@pytest.mark.parametrize("command", MADE.values(), ids=MADE.keys())
def test_a_cache_made_of_caches_of_pairs_is_whole_and_trains(run, tmp_path, command):
    run(*(tmp_path / "made" if argument == "OUT" else argument for argument in command))
    assert "0 faults" in run("verify", tmp_path / "made")
    k, store = (
        open_cache(tmp_path / "made").manifest.codec["k"],
        "parquet" if command[0] == "convert" else "zarr",
    )
    how = ("--set", f"labels.k={k}", "--set", f"capture.store={store}", "--out", tmp_path / "run")
    run("train-student", "--config", "one.toml", "--cache", tmp_path / "made", "--no-baseline", *how)
    assert "chrf_de" in json.loads((tmp_path / "run" / "metrics.json").read_text())


def test_the_thawed_cache_trains_the_very_student_that_the_frozen_one_trains(run, place, tmp_path):
    assert "made" in run("materialize", "one/cache")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (place / "thawed").glob("*.thaw"))
    assert before
    train = ("train-student", "--config", "one.toml", "--no-baseline", "--out")
    run(*train, tmp_path / "thawed")
    run(*train, tmp_path / "frozen", "--set", "reader.memmap_limit_bytes=0")
    assert "found" in run("materialize", "one/cache")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("thawed", "frozen"))
    assert all((one[name] == two[name]).all() for name in one)


REFUSED = {
    "import": (("import", "one.toml", "--config", "one.toml"), ConfigError, "source.modality is translation"),
    "verify of a fused one": (("verify", "fused", "--config", "one.toml"), IdentityError, "fused of the labels"),
    "fidelity of a fused one": (("fidelity", "fused", "--config", "one.toml"), IdentityError, "another teacher"),
    "export": (("export", "run", "--out", "exported"), SpecError, "a translation model writes by a search"),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(place):
    """A finished run in `run`, and a fused cache in `fused`, below the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        invoke(
            "fuse", "one/cache", "two/cache", "--rule", "geometric", "--out", "fused", "--allow-weak-teachers"
        )
        invoke("train-student", "--config", "one.toml", "--no-baseline", "--out", "run")


@pytest.mark.parametrize(("command", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_command_that_cannot_work_on_pairs_refuses_by_name(finished, run, command, error, message):
    with pytest.raises(error, match=message):
        run(*command)


def test_a_report_shows_pairs_as_texts(finished, run, place, tmp_path):
    pytest.importorskip("plotly")
    assert "1 student, " in run("report", "run", "--cache", "one/cache", "--out", tmp_path / "report.html")
    sections = {
        section.key: section for section in build_sections(open_report(["run"], cache_url="one/cache"))
    }
    shown = [example for gallery in sections["knowledge"].galleries for example in gallery.examples]
    pairs = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    words = {pair["key"]: {*pair["source"].split(), *pair["target"].split()} for pair in pairs}
    assert shown
    for example in shown:
        text = "".join(token for token, _ in example.tokens)
        assert any(word in text for word in words[example.key])


def test_convert_counts_rows_as_rows(run, tmp_path):
    rows = open_cache("one/cache").manifest.total_rows
    output = run("convert", "one/cache", tmp_path / "made", "--store", "zarr")
    assert f"{rows:,}/{rows:,} rows" in output
