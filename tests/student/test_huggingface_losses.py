"""DistillTrainer with a whole `[loss]`: the steps of a loop written by hand, and what is refused."""

import math

import pytest
import torch
from torch.utils.data import DataLoader

from softcache.config.load import load_config
from softcache.data.sources.text.source import open_text
from softcache.errors import ConfigError
from softcache.losses import LossSettings, cross_entropy, distillation_loss, row_weights
from softcache.reader.dataset import SoftLabelDataset
from softcache.runs import capture_labels, open_data, open_teacher
from tests.student.test_huggingface_trainer import (
    EXACT,
    ROUNDING,
    VOCAB,
    assert_same,
    dense_logits,
    labeled,  # noqa: F401
    llama,
    trainer_of,
)

WHOLE_LOSSES = {
    "reverse_kl, tail spread": {"name": "reverse_kl", "tail": "uniform", "temperature": 4.0},
    "jsd, standardized": {"name": "jsd", "beta": 0.3, "standardize": True, "temperature": 4.0},
    "dkd": {"name": "dkd", "dkd_beta": 2.0, "temperature": 4.0},
    "T from 6 to 1, alpha from 0.2 to 0.8": {
        "temperature": 6.0,
        "alpha": 0.2,
        "temperature_schedule": {"kind": "linear", "end": 1.0},
        "alpha_schedule": {"kind": "cosine", "end": 0.8},
    },
    "rows weighted by the gap": {
        "weights": {"by": "gap"},
        "temperature": 4.0,
        "temperature_schedule": {"kind": "cosine", "end": 1.5},
    },
}
MIXES = {  # of six steps, worked out by hand where they move
    "T from 6 to 1, alpha from 0.2 to 0.8": [
        (6 - step, 0.2 + 0.6 * (1 - math.cos(math.pi * step / 5)) / 2) for step in range(6)
    ],
    "rows weighted by the gap": [
        (1.5 + 2.5 * (1 + math.cos(math.pi * step / 5)) / 2, 0.9) for step in range(6)
    ],
}


@pytest.mark.parametrize("name", WHOLE_LOSSES)
def test_a_whole_loss_takes_the_steps_of_a_loop_written_by_hand(labeled, tmp_path, name):  # noqa: F811
    """Six steps of two accumulated batches each, against dense logits of all eight samples at once."""
    settings = LossSettings(**WHOLE_LOSSES[name])
    sequential = {"train_sampling_strategy": "sequential", "gradient_accumulation_steps": 2, "max_steps": 6}
    more = {"temperature": None, "alpha": None, "loss": settings}
    trainer = trainer_of(labeled, tmp_path, settings=sequential, **more)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    _, source, cache = labeled
    dataset = SoftLabelDataset(open_text(source, split="train"), cache)
    model, expected = llama().train(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mixes = MIXES.get(name, [(settings.temperature, settings.alpha)] * 6)
    batches = DataLoader(dataset, batch_size=8, collate_fn=dataset.collate)
    for (temperature, alpha), batch in zip(mixes, batches, strict=False):
        logits = dense_logits(model, batch)
        weights_P = None
        if settings.weights is not None:
            own_P = -cross_entropy(logits.detach(), batch.targets)
            weights_P = row_weights(
                settings.weights,
                batch.labels,
                batch.targets,
                student_log_probs_P=own_P,
                num_student_classes=VOCAB,
            )
        how = {"temperature": temperature, "alpha": alpha, "loss": settings.loss, "soft_weights": weights_P}
        loss = distillation_loss(logits, batch.labels, batch.targets, **how)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert [row["loss"] for row in rows] == pytest.approx(expected, rel=1e-5)
    assert_same(trainer.model.state_dict(), model.state_dict(), **ROUNDING)
    if name in MIXES:
        assert [(row["temperature"], row["alpha"]) for row in rows] == [pytest.approx(mix) for mix in mixes]
    else:
        assert "temperature" not in rows[0]


def test_a_schedule_that_waits_for_held_out_losses_goes_on_when_resumed(labeled, tmp_path):  # noqa: F811
    """No epoch improves by 100 nats: from the second on, each halves the temperature, down to 1.5."""
    schedule = {"kind": "stall", "end": 1.5, "patience": 1, "min_delta": 100.0}
    settings = {
        "max_steps": -1,
        "num_train_epochs": 5,
        "per_device_train_batch_size": 16,
        "eval_strategy": "epoch",
    }
    settings |= {"logging_strategy": "epoch", "save_strategy": "epoch"}
    more = {
        "settings": settings,
        "eval_dataset": open_text(labeled[1], split="eval"),
        "loss": LossSettings(temperature=8.0, temperature_schedule=schedule),
        "temperature": None,
        "alpha": None,
    }
    whole = trainer_of(labeled, tmp_path, **more)
    whole.train()
    temperatures = [row["temperature"] for row in whole.state.log_history if "loss" in row]
    assert temperatures == [8.0, 8.0, 4.0, 2.0, 1.5]
    resumed = trainer_of(labeled, tmp_path, **more)
    steps = whole.state.max_steps // 5
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{3 * steps}"))
    assert_same(resumed.model.state_dict(), whole.model.state_dict(), **EXACT)


@pytest.mark.parametrize(
    ("loss", "more", "match"),
    [
        ({"name": "uld"}, {}, r"loss\.name uld is for a student of another tokenizer"),
        ({"name": "policy_gradient"}, {}, r"loss\.name policy_gradient is of tokens that a policy sampled"),
        (
            {"curriculum": {}, "temperature": 4.0},
            {},
            r"loss\.curriculum learns a temperature, which no checkpoint .* use loss\.temperature_sch",
        ),
        ({}, {"alpha": 0.5}, "alpha beside loss, which has its own; expected one of the two"),
        (
            {"alpha_schedule": {"kind": "stall", "end": 0.1}},
            {},
            r"loss\.alpha_schedule of kind \"stall\" waits .* found eval_strategy 'no' and no eval_dataset",
        ),
    ],
)
def test_what_the_trainer_cannot_do_of_a_loss_is_refused_by_name(labeled, tmp_path, loss, more, match):  # noqa: F811
    given = {"temperature": None, "alpha": None, "loss": LossSettings(**loss)} | more
    with pytest.raises(ConfigError, match=match):
        trainer_of(labeled, tmp_path, **given)


def test_a_loss_that_drawn_classes_cannot_serve_is_refused(labeled, tmp_path):  # noqa: F811
    folder, source, _ = labeled
    sampled = (folder / "run.toml").read_text().replace("k = 5", 'policy = "sample"\nnum_samples = 5')
    (tmp_path / "run.toml").write_text(sampled)
    config = load_config(tmp_path / "run.toml")
    data = open_data(config)
    drawn, _ = capture_labels(config, data, open_teacher(config, data), str(tmp_path / "cache"))
    more = {"temperature": None, "alpha": None, "loss": LossSettings(name="jsd", temperature=1.0)}
    with pytest.raises(ConfigError, match=r"loss\.name jsd cannot be estimated .* use one of .*forward_kl"):
        trainer_of((folder, source, drawn), tmp_path, **more)
    trainer_of((folder, source, drawn), tmp_path, temperature=1.0)
