"""DistillTrainer under DeepSpeed: with the package, two processes take the steps of one; without, what it is called with."""

import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from softcache.data.sources.text.source import open_text
from softcache.reader.open import open_cache
from softcache.student.integrations.huggingface.zero import register_head, whole_weights, zero_stage
from softcache.student.tasks import LossSettings, TokenStudent
from tests.student.test_huggingface_trainer import (  # noqa: F401 (a fixture)
    ROUNDING,
    SEQ_LEN,
    assert_same,
    labeled,
    llama,
    trainer_of,
)
from tests.support.process_groups import run_ranks

STEPS = {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 0.01, "max_grad_norm": 1.0}
STEPS |= {"eval_strategy": "steps", "eval_steps": 2}


@pytest.fixture
def deepspeed(monkeypatch):
    """The package, as far as it is used here; returns what it was called with."""
    calls = {"registered": [], "gathered": []}
    fake = ModuleType("deepspeed")
    fake.zero = SimpleNamespace(
        register_external_parameter=lambda module, parameter: calls["registered"].append((module, parameter)),
        GatheredParameters=lambda parameters: calls["gathered"].append(parameters) or "gathered",
    )
    monkeypatch.setitem(sys.modules, "deepspeed", fake)
    return calls


def trainer_at(stage, model=None):
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
    return SimpleNamespace(
        is_deepspeed_enabled=stage > 0, accelerator=SimpleNamespace(state=state), model=model
    )


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_head_is_gathered_with_the_model_by_zero_3_alone(deepspeed, stage):
    model = llama(tie_word_embeddings=True)
    student, trainer = TokenStudent(model, LossSettings(), context=SEQ_LEN), trainer_at(stage)
    assert zero_stage(trainer) == stage
    register_head(trainer, student)
    register_head(trainer, student)
    assert [module is model for module, _ in deepspeed["registered"]] == ([True] if stage == 3 else [])
    assert all(parameter is model.lm_head.weight for _, parameter in deepspeed["registered"])


def test_only_partitioned_weights_are_gathered_for_the_checks(deepspeed):
    model = llama()
    with whole_weights(trainer_at(3, model)):
        assert deepspeed["gathered"] == []
    weight = model.lm_head.weight
    weight.ds_id = 0
    assert whole_weights(trainer_at(3, model)) == "gathered"
    assert len(deepspeed["gathered"]) == 1
    assert deepspeed["gathered"][0][0] is weight


def _trains(rank, labeled, out, stage):  # noqa: F811
    os.environ["DS_ACCELERATOR"] = os.environ.get("DS_ACCELERATOR", "cpu")
    folder, source, url = labeled
    config = {
        **dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"),
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }
    settings = STEPS | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    settings |= {"deepspeed": config, "ddp_backend": "gloo"}
    held_out = open_text(source, split="eval")
    trainer = trainer_of((folder, source, open_cache(url)), out, settings=settings, eval_dataset=held_out)
    trainer.train()
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return state, trainer.state.log_history


@pytest.mark.chaos
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_take_the_steps_of_one(labeled, tmp_path, stage):  # noqa: F811
    """DeepSpeed compiles an operator of its own the first time, which takes minutes."""
    pytest.importorskip("deepspeed")
    folder, source, cache = labeled
    held_out = open_text(source, split="eval")
    settings = STEPS | {"per_device_train_batch_size": 8}
    alone = trainer_of(labeled, tmp_path / "one", settings=settings, eval_dataset=held_out)
    alone.train()
    ended = run_ranks(
        *(tmp_path / "ranks", 2, _trains, (folder, source, cache.url), str(tmp_path), stage), seconds=900.0
    )
    assert [end.code for end in ended] == [0, 0], ended
    weights, log = ended[0].value
    expected = {name: tensor for name, tensor in alone.model.state_dict().items() if name in weights}
    assert_same({name: torch.as_tensor(tensor) for name, tensor in weights.items()}, expected, **ROUNDING)
    for key in ("loss", "eval_loss"):
        losses = [row[key] for row in alone.state.log_history if key in row]
        assert [row[key] for row in log if key in row] == pytest.approx(losses, rel=1e-5)
