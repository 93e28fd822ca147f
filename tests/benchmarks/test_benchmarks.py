"""Benchmarks still run. Their figures are for people to read; sizes here are too small to mean anything."""

import io
import json
import zipfile

import pytest
import torch
from click.testing import CliRunner

from benchmarks import (
    epochs,
    fused,
    fusion,
    iglm,
    losses,
    on_policy,
    quality,
    shuffle_quality,
    teacher_memory,
)
from softcache.tools.fuse import RULES
from tests.support.programs import fork_interpreters


def test_fused_benchmark_runs(tmp_path, monkeypatch):
    fork_interpreters(monkeypatch)
    path = tmp_path / "figures.json"
    done = CliRunner().invoke(fused.main, ["--quick", "--rounds", "1", "--json", str(path)])
    assert done.exit_code == 0, done.output
    assert "peak memory above the inputs" in done.output
    figures = json.loads(path.read_text())
    assert figures["time"]["dense cross-entropy"]["ratio"] == 1.0
    assert all(row["seconds"] > 0 for row in figures["time"].values())
    assert [row["unfused_measured"] for row in figures["memory"]] == [True]


def test_teacher_memory_benchmark_runs(tmp_path, monkeypatch):
    fork_interpreters(monkeypatch)
    path = tmp_path / "figures.json"
    how = ["--length", "96", "--vocabulary", "500", "--json", str(path)]
    done = CliRunner().invoke(teacher_memory.main, how)
    assert done.exit_code == 0, done.output
    assert json.loads(path.read_text())[0]["length"] == 96


def test_quality_benchmark_trains_from_every_record_once(tmp_path):
    config = tmp_path / "digits.toml"
    config.write_text(
        """
        [source]
        name = "digits"
        max_train_samples = 120
        max_eval_samples = 40
        [teacher]
        model = "tests.fakes:known"
        [labels]
        policy = "top_k"
        k = 7
        [student]
        model = "linear"
        [train]
        epochs = 1
        """
    )
    how = ["--config", str(config), "--out", str(tmp_path / "out"), "--seeds", "0,1"]
    for record in ("hard", "live", "top_k:2:ignore", "top_k:4", "sample:5", "hybrid:2:3", "top_p:0.9:4"):
        how += ["--record", record]
    done = CliRunner().invoke(quality.main, how)
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert len(rows) == 14
    assert {row["bytes"] is None for row in rows if row["record"] in ("hard", "live")} == {True}
    sizes = {row["record"]: row["bytes"] for row in rows}
    assert sizes["top_k:2:ignore"] < sizes["top_k:4"]
    CliRunner().invoke(quality.main, how)
    assert len((tmp_path / "out/results.jsonl").read_text().splitlines()) == 14


def write_wheel(path):
    """A wheel with two checkpoints that write one sequence, of the pickled form and the tokens of iglm's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    acids = "ACDEFGHIKLMNPQRSTVWY"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *acids, *iglm.SPECIES, *iglm.CHAINS]
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("iglm/trained_models/vocab.txt", "\n".join(tokens))
        for name in ("IgLM", "IgLM-S"):
            config = GPT2Config(vocab_size=33, n_embd=16, n_layer=1, n_head=2, n_positions=192)
            model, pickled = GPT2LMHeadModel(config), io.BytesIO()
            # A position decides what comes next: A [MASK] C [SEP] A [CLS].
            with torch.no_grad():
                for weight in (block.c_proj.weight for h in model.transformer.h for block in (h.attn, h.mlp)):
                    weight.zero_()
                model.transformer.wte.weight.normal_()
                following = torch.tensor([5, 5, 4, 6, 3, 5, *[2] * 186])
                model.transformer.wpe.weight.copy_(50 * model.transformer.wte.weight[following])
            torch.save(model.state_dict() | {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}, pickled)
            wheel.writestr(f"iglm/trained_models/{name}/pytorch_model.bin", pickled.getvalue())
            inside = config.to_dict() | {"eos_token_id": 50256, "bos_token_id": 50256}
            wheel.writestr(f"iglm/trained_models/{name}/config.json", json.dumps(inside))


def test_pretrained_pair_benchmark_runs(tmp_path):
    write_wheel(tmp_path / "iglm.whl")
    how = ["--train", "8", "--held-out", "4", "--epochs", "1", "--seeds", "0", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(iglm.main, [str(tmp_path / "iglm.whl"), *how])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert [row["record"] for row in rows] == ["hard", "dense", "live"]
    texts = [json.loads(line)["text"] for line in (tmp_path / "out/texts/train.jsonl").open()]
    assert len(texts) == 8
    for text in texts:
        chain, species, *rest = text.split(" ")
        assert chain in iglm.CHAINS
        assert species in iglm.SPECIES
        assert rest.index("[MASK]") < rest.index("[SEP]")


def test_shuffle_quality_benchmark_runs(tmp_path):
    path = tmp_path / "figures.json"
    how = ["--config", "configs/digits.toml", "--block", "16", "--seeds", "1", "--json", str(path)]
    for change in ("source.max_train_samples=200", "source.max_eval_samples=50", "train.epochs=1"):
        how += ["--set", change]
    done = CliRunner().invoke(shuffle_quality.main, how)
    assert done.exit_code == 0, done.output
    rows = {row["window"]: row["of_full_shuffle"] for row in json.loads(path.read_text())["results"]}
    assert rows["no shuffle"] <= rows["1 block"] < rows["4 blocks"] < rows["all blocks"] == 1.0


def test_epochs_benchmark_runs(tmp_path):
    path, plot = tmp_path / "figures.json", tmp_path / "figures.svg"
    done = CliRunner().invoke(epochs.main, ["--quick", "--json", str(path), "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    images, text, accuracy = json.loads(path.read_text())["results"].values()
    for figures in (images, text):
        assert [figure["name"] for figure in figures[:2]] == ["hard labels", "hard labels, again"]
        assert figures[0]["ratio"] == 1.0
        assert {figure["name"] for figure in figures[2:]} == {"cache, T = 1", "cache, T = 4", "cache, T = 3"}
    assert [figure["name"] for figure in accuracy] == ["online teacher", "cache"]
    assert plot.exists()


def test_fusion_benchmark_trains_students_of_every_rule_once_and_measures_estimates(tmp_path, monkeypatch):
    config = tmp_path / "tiny.toml"
    config.write_text(
        """
        [source]
        name = "digits"
        max_train_samples = 80
        max_eval_samples = 40
        [teacher]
        model = "linear"
        [train_teacher]
        epochs = 1
        [labels]
        k = 3
        [student]
        model = "linear"
        [train]
        epochs = 1
        """
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        fusion, "TEACHERS", {name: ("mlp?width=8", n) for n, name in enumerate(fusion.TEACHERS)}
    )
    monkeypatch.setattr(fusion, "NUM_ROWS", 10)
    monkeypatch.setattr(fusion, "NUM_CLASSES", 80)
    for _ in range(2):
        done = CliRunner().invoke(fusion.main, ["--config", str(config), "--seeds", "1"])
        assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (tmp_path / "runs/fusion/students.jsonl").read_text().splitlines()]
    assert len(rows) == 1 + 3 + len(RULES)
    done = CliRunner().invoke(fusion.main, ["--config", str(config), "--estimates"])
    assert done.exit_code == 0, done.output
    assert "fused top-k against fused whole distributions" in done.output


@pytest.fixture
def small_tables(monkeypatch):
    """The benchmark of losses on a few samples, and teachers that are trained for a moment."""
    tables_of = losses.tables_of

    def small(kind, out):
        tables = tables_of(kind, out)
        tables["source"] |= {"max_train_samples": 48, "max_eval_samples": 16}
        for name in ("train", "train_teacher"):
            tables[name] |= {"epochs": 1, "batch_size": 8}
        return tables

    monkeypatch.setattr(losses, "tables_of", small)


def test_losses_benchmark_trains_with_each_loss_once(tmp_path, monkeypatch, small_tables):
    chosen = {name: losses.losses_of("images")[name] for name in ("hard labels", "forward_kl, ignore", "pld")}
    monkeypatch.setattr(losses, "losses_of", lambda kind: chosen)
    how = ["--kind", "images", "--seeds", "0", "--out", str(tmp_path)]
    first = CliRunner().invoke(losses.main, how)
    assert first.exit_code == 0, first.output
    rows = [json.loads(line) for line in (tmp_path / "images/results.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == list(chosen)
    monkeypatch.setattr(losses, "train_student", lambda *_, **__: pytest.fail("it trains again"))
    again = CliRunner().invoke(losses.main, how)
    assert again.exit_code == 0, again.output
    assert again.stdout.splitlines()[1:4] == first.stdout.splitlines()[1:4]


def test_on_policy_benchmark_runs_every_arm(tmp_path, small_tables):
    how = ["--seeds", "0", "--steps", "2", "--batch", "4", "--epochs", "1", "--out", str(tmp_path)]
    done = CliRunner().invoke(on_policy.main, how)
    assert done.exit_code == 0, done.output
    rows = {row["arm"]: row for row in map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())}
    assert {"start", "live", *on_policy.FORMS, "exact reverse KL"} <= set(rows)
    assert all(row["reverse_kl"] > 0 for row in rows.values())
