"""Students of hidden states: as of the online teacher and of every class, whole or a part of the rows, and interrupted."""

import pytest
import torch
from safetensors.torch import load_file

from softcache.errors import ConfigError
from softcache.runs import capture_labels, open_data, open_teacher
from softcache.runs.report.load import open_run
from softcache.runs.student import train_student
from tests.support.text_caches import text_config

STUDENT = "llama?width=16&depth=1&heads=2"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hidden-students")
    return folder, capture(folder, "cache", values="float32")


def capture(folder, name, policy="hidden", capture=None, **labels):
    config = text_config(folder, labels={"policy": policy, **labels}, capture=capture or {})
    data = open_data(config)
    return capture_labels(config, data, open_teacher(config, data), str(folder / name))[0]


@pytest.mark.parametrize("loss", ["forward_kl", "jsd"])
def test_it_learns_what_the_online_teacher_teaches(made, loss):
    folder, cache = made
    how = {
        "train": {"epochs": 1},
        "loss": {"name": loss, "temperature": 2.0},
        "labels": {"policy": "hidden", "values": "float32"},
    }
    config = text_config(folder, **how)
    data = open_data(config)
    runs = {}
    for labels in ("cache", "online"):
        teacher = open_teacher(config, data) if labels == "online" else None
        runs[labels] = train_student(
            config,
            data,
            model=STUDENT,
            labels=labels,
            cache=cache,
            teacher=teacher,
            out=folder / f"{loss}-{labels}",
        )
    one, other = (runs[name]["history"][0]["train_loss"] for name in ("cache", "online"))
    assert one == pytest.approx(other, abs=1e-4)
    assert runs["cache"]["eval_loss"] == pytest.approx(runs["online"]["eval_loss"], abs=1e-3)


@pytest.mark.parametrize(
    "labels",
    [
        {"values": "int8", "positions": {"policy": "random", "share": 0.4}},
        {"values": "bfloat16", "components": 8},
        {"values": "float8_e4m3"},
    ],
    ids=str,
)
def test_parts_of_the_rows_coordinates_and_few_bits_train_a_student(made, labels):
    folder = made[0]
    name = f"cache-{labels['values']}"
    cache = capture(folder, name, **labels)
    config = text_config(
        folder, labels={"policy": "hidden", **labels}, train={"epochs": 2}, loss={"temperature": 1.0}
    )
    found = train_student(
        config, open_data(config), model=STUDENT, labels="cache", cache=cache, out=folder / f"run-{name}"
    )
    losses = [row["train_loss"] for row in found["history"]]
    assert losses[1] < losses[0]


def test_interrupted_and_accumulated_it_ends_with_the_same_weights(made):
    folder, cache = made
    config = text_config(folder, labels={"policy": "hidden", "values": "float32"}, loss={"temperature": 2.0})
    data = open_data(config)

    def run(out, **how):
        train_student(config, data, model=STUDENT, labels="cache", cache=cache, out=folder / out, **how)
        return load_file(folder / out / "model.safetensors")

    def stops(row):
        raise KeyboardInterrupt

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("again", on_epoch=stops)
    again = run("again")
    for name, values in whole.items():
        assert torch.equal(values, again[name]), name
    report = open_run(folder / "whole", cache_url=cache.url)
    assert report.caches == []
    assert "holds hidden states, and no classes to show" in report.missing["cache"]


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        ({"name": "dkd"}, r"loss.name: dkd is no sum over classes.*use one of cross_entropy, forward_kl"),
        ({"standardize": True}, "loss.standardize: reads the deviation"),
        ({"weights": {"by": "teacher_entropy"}}, "loss.weights: read the entropy"),
    ],
)
def test_losses_that_cannot_be_had_are_refused_by_the_config_and_with_the_cache(made, loss, match):
    folder, cache = made
    with pytest.raises(ValueError, match=match):
        text_config(folder, labels={"policy": "hidden"}, loss=loss)
    config = text_config(folder, loss=loss)
    config = config.model_copy(update={"labels": type(config.labels)()})
    with pytest.raises(ConfigError, match=rf"holds hidden states, for which \[loss\] is not made: {match}"):
        train_student(
            config, open_data(config), model=STUDENT, labels="cache", cache=cache, out=folder / "refused"
        )
