"""[student.lora]: adapters in softcache's own loop, exact resume, what is on disk, and what is refused."""

import json

import peft
import pytest
import torch
from accelerate import Accelerator
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from softcache.data.sources.text.source import load_tokenizer
from softcache.errors import SpecError
from softcache.models.language import build_language_model
from softcache.runs import open_data, train_student
from softcache.runs.export import export_run
from softcache.runs.report import open_report
from softcache.student.tasks import TokenTask
from tests.runs.test_export import FEW
from tests.student.test_huggingface_models import FAMILIES, save_model
from tests.student.test_run import Killed, assert_same_run, dies_at, watched
from tests.support.caches import digits_config
from tests.support.text_caches import text_config

LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}


def fit(folder, out, *, lora=LORA, family="llama", dtype=torch.float32, model=None, **train):
    """Trains a pretrained student with adapters on ground truth for two epochs; returns its metrics."""
    if model is None:
        model = save_model(folder / family, FAMILIES[family], load_tokenizer(text_config(folder).source))
        if dtype is not torch.float32:
            AutoModelForCausalLM.from_pretrained(folder / family).to(dtype).save_pretrained(folder / family)
    train = {"lr": 0.02, "labels": "ground_truth", "checkpoint_steps": 1} | train
    config = text_config(folder, train=train, student={"model": model, "lora": lora})
    return train_student(config, open_data(config), model=model, labels="ground_truth", out=out)


def held_out_loss(folder, out):
    """The loss of a loaded model on the held-out split."""
    config = text_config(folder)
    data = open_data(config)
    task = data.task(config, f"hf:{out}")
    return task.evaluate(task.build().eval(), Accelerator(cpu=True), 4)["eval_loss"]


def test_averaged_adapters_are_saved_and_merged(tmp_path):
    """Of the average, too, the files hold the adapters, and the merged model is that of the best epoch."""
    metrics = fit(tmp_path, tmp_path / "run", ema_decay=0.5, lr=0.2, epochs=4)
    losses = [row["eval_loss"] for row in metrics["history"]]
    assert metrics["best_epoch"] < 3, "of the last epoch, it would be what is in memory"
    assert held_out_loss(tmp_path, tmp_path / "run" / "hf") == pytest.approx(min(losses), rel=1e-5)
    for name in ("model", "best"):
        kept = load_file(tmp_path / "run" / f"{name}.safetensors")
        assert sum(value.numel() for value in kept.values()) == metrics["num_trained_parameters"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_trained_and_saved_alone_and_merged(tmp_path, dtype):
    metrics = fit(tmp_path, tmp_path / "run", dtype=dtype)
    assert metrics["history"][1]["train_loss"] < metrics["history"][0]["train_loss"]
    # 4 x (in + out) of q, k, v, o (16 -> 16, 8, 8, 16) and of gate, up, down (16 -> mlp, back) in two layers.
    mlp = AutoModelForCausalLM.from_pretrained(tmp_path / "llama").config.intermediate_size
    expected = 2 * 4 * ((32 + 24 + 24 + 32) + 3 * (16 + mlp))
    assert metrics["num_trained_parameters"] == expected < metrics["num_parameters"]
    for name in ("model", "best"):
        kept = load_file(tmp_path / "run" / f"{name}.safetensors")
        assert sum(value.numel() for value in kept.values()) == expected
        assert {value.dtype for value in kept.values()} == {torch.float32}
    kept = load_file(tmp_path / "run" / "checkpoint" / "model.safetensors")
    assert sum(value.numel() for value in kept.values()) == expected
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=dtype)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf").eval()
    assert merged.dtype == torch.float32
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        difference = (adapted.float()(tokens).logits - merged(tokens).logits).abs().max()
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
        assert difference < 1e-4 < (plain(tokens).logits - merged(tokens).logits).abs().max()
    found = held_out_loss(tmp_path, tmp_path / "run" / "hf")
    assert found == pytest.approx(metrics["best_eval_loss"], abs=1e-4 if dtype is torch.float32 else 2e-2)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run" / "hf")) == 300


def test_killed_again_and_again_it_ends_with_the_same_adapters(tmp_path, monkeypatch):
    fit(tmp_path, tmp_path / "whole")
    for step in (1, 3, 5):
        with watched(monkeypatch, dies_at(step)), pytest.raises(Killed):
            fit(tmp_path, tmp_path / "broken")
    fit(tmp_path, tmp_path / "broken")
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    for name in ("hf/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


def test_a_report_and_an_export_rebuild_the_adapted_student(tmp_path):
    fit(tmp_path, tmp_path / "run")
    report = open_report([tmp_path / "run"])
    task, model = report.student(report.runs[0])
    found = model.model.state_dict()
    for name, value in load_file(tmp_path / "run" / "model.safetensors").items():
        torch.testing.assert_close(found[name], value, atol=0, rtol=0)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = model.model(tokens).logits
        served = task.serve(model).module(tokens)
    torch.testing.assert_close(served, expected, atol=1e-4, rtol=1e-4)
    figures = export_run(report, report.runs[0], tmp_path / "export", FEW)
    assert figures["models"]["student.onnx"]["same_predictions"] == 1.0
    size = (tmp_path / "run" / "hf" / "model.safetensors").stat().st_size
    assert figures["models"]["student"]["bytes"] == size


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_head_that_is_trained_whole_is_merged_untied(tmp_path, family):
    """gpt2's head is tied to its embeddings, which stay as they were."""
    lora = {
        "rank": 2,
        "target_modules": ["c_attn" if family == "gpt2" else "q_proj"],
        "modules_to_save": ["lm_head"],
    }
    metrics = fit(tmp_path, tmp_path / "run", lora=lora, family=family)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / family)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf")
    torch.testing.assert_close(after.get_input_embeddings().weight, before.get_input_embeddings().weight)
    assert (after.lm_head.weight - before.lm_head.weight).abs().max() > 1e-3
    assert held_out_loss(tmp_path, tmp_path / "run" / "hf") == pytest.approx(
        metrics["best_eval_loss"], abs=1e-4
    )


def test_a_run_without_the_table_is_what_it_was(tmp_path):
    model = save_model(tmp_path / "llama", FAMILIES["llama"], load_tokenizer(text_config(tmp_path).source))
    fit(tmp_path, tmp_path / "whole", lora=None, model=model)
    fit(tmp_path, tmp_path / "adapted", model=model)
    described = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert "lora" not in described
    assert not (tmp_path / "whole" / "adapter").exists()
    found = json.loads((tmp_path / "adapted" / "config.json").read_text())
    expected = {"target_modules": "all-linear", "modules_to_save": []} | LORA
    assert found.pop("lora") == expected
    assert found == described
    resolved = json.loads((tmp_path / "adapted" / "resolved.json").read_text())
    assert resolved["student"]["lora"] == expected


def test_what_cannot_be_adapted_is_refused(tmp_path):
    model = save_model(tmp_path / "gpt2", FAMILIES["gpt2"], load_tokenizer(text_config(tmp_path).source))
    with pytest.raises(SpecError, match=r"student\.lora: student\.model 'llama\?.*' has fresh weights"):
        fit(tmp_path, tmp_path / "1", model=FAMILIES["llama"])
    with pytest.raises(SpecError, match=r"student\.lora: the head of .* is tied to its embeddings"):
        fit(tmp_path, tmp_path / "2", model=model, lora={"target_modules": ["lm_head"]})
    with pytest.raises(SpecError, match=r"peft cannot adapt .*q_prok.*check target_modules"):
        fit(tmp_path, tmp_path / "3", model=model, lora={"target_modules": ["q_prok"]})
    with pytest.raises(
        ValidationError, match=r"student\.lora: adapts language models; a student of .*'image'"
    ):
        digits_config(student={"lora": {}})
    for key, value in {"context": 8, "tokenizer": "gpt2"}.items():
        with pytest.raises(
            ValidationError, match=rf"student\.{key}: of language models; a student of .*'image'"
        ):
            digits_config(student={key: value})


@pytest.mark.parametrize("best", [0, 1])
def test_the_folder_for_transformers_holds_the_best_epoch(tmp_path, monkeypatch, best):
    model = save_model(tmp_path / "llama", FAMILIES["llama"], load_tokenizer(text_config(tmp_path).source))
    config = json.loads((tmp_path / "llama" / "generation_config.json").read_text())
    (tmp_path / "llama" / "generation_config.json").write_text(
        json.dumps(config | {"repetition_penalty": 1.5})
    )
    evaluate, added = TokenTask.evaluate, iter([0.0, 0.0 if best else 9.0, 0.0])

    def evaluate_worse(*args):
        scores = evaluate(*args)
        return scores | {"eval_loss": scores["eval_loss"] + next(added)}

    monkeypatch.setattr(TokenTask, "evaluate", evaluate_worse)
    metrics = fit(tmp_path, tmp_path / "run", lora=None, model=model, lr=1e-3)
    assert metrics["best_epoch"] == best
    assert held_out_loss(tmp_path, tmp_path / "run" / "hf") == pytest.approx(
        metrics["best_eval_loss"], abs=1e-4
    )
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf").state_dict()
    names = ("model", "best")
    same = [
        all(
            torch.equal(kept[key], value)
            for key, value in load_file(tmp_path / "run" / f"{name}.safetensors").items()
        )
        for name in names
    ]
    assert same == [best == 1, True]
    generation = GenerationConfig.from_pretrained(tmp_path / "run" / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "hf")
    assert generation.repetition_penalty == 1.5
    assert generation.eos_token_id == tokenizer.eos_token_id is not None
    assert build_language_model(f"hf:{tmp_path / 'run' / 'hf'}", vocab_size=300, context=32)
