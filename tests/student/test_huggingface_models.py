"""Pretrained folders of three families as teacher and as student, and chats, from the config to the trained student."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from softcache.data.sources.text.source import load_tokenizer
from softcache.errors import IdentityError
from softcache.models.language import build_language_model
from softcache.runs import capture_labels, open_data, open_teacher, train_student
from softcache.runs.cache import check_config_matches_cache
from tests.support.text_caches import text_config

FAMILIES = {
    "gpt2": "gpt2?width=16&depth=2&heads=2",
    "llama": "llama?width=16&depth=2&heads=2&kv_heads=1",
    "qwen3": "qwen3?width=16&depth=2&heads=2&tied=false",
}


def save_model(folder, spec, tokenizer, context=32, seed=0):
    """A folder as `save_pretrained` writes it: configuration, weights, tokenizer."""
    torch.manual_seed(seed)
    model = build_language_model(spec, vocab_size=len(tokenizer), context=context)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(6.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"hf:{folder}"


@pytest.mark.parametrize("teacher", FAMILIES)
def test_a_pretrained_teacher_labels_and_a_pretrained_student_learns(tmp_path, teacher):
    tokenizer = load_tokenizer(text_config(tmp_path).source)
    student = {"gpt2": "qwen3", "llama": "gpt2", "qwen3": "llama"}[teacher]
    teacher_spec = save_model(tmp_path / "teacher", FAMILIES[teacher], tokenizer)
    student_spec = save_model(tmp_path / "student", FAMILIES[student], tokenizer, seed=1)
    config = text_config(
        tmp_path,
        teacher={"model": teacher_spec},
        # The tokenizer is read from the teacher's own folder, as a user of the hub would.
        source={"tokenizer": str(tmp_path / "teacher")},
    )
    data = open_data(config)
    cache, _ = capture_labels(config, data, open_teacher(config, data), str(tmp_path / "cache"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").eval()
    sample = data.train.source.sample(0)
    first = sample.segments == 0
    with torch.no_grad():
        logits = model(torch.from_numpy(sample.tokens[first].astype(np.int64))[None]).logits[0]
    log_probs = logits.double().log_softmax(-1)[:-1]
    labels = cache.read([0])
    np.testing.assert_array_equal(labels.ids[: len(log_probs), 0], log_probs.argmax(-1))
    metrics = train_student(
        config, data, model=student_spec, labels="cache", cache=cache, out=tmp_path / "run"
    )
    assert metrics["history"][1]["train_loss"] < metrics["history"][0]["train_loss"]
    assert (
        type(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf"))
        .__name__.lower()
        .startswith(student)
    )


def test_a_capture_goes_on_with_the_same_teacher_from_another_path(tmp_path):
    """Weights, configuration and dtype are its identity; where they were loaded from is not."""
    tokenizer = load_tokenizer(text_config(tmp_path).source)
    save_model(tmp_path / "one" / "teacher", FAMILIES["llama"], tokenizer)
    shutil.copytree(tmp_path / "one", tmp_path / "two")

    def capture(folder):
        teacher = {"model": f"hf:{tmp_path / folder / 'teacher'}"}
        config = text_config(tmp_path, teacher=teacher)
        data = open_data(config)
        return config, capture_labels(config, data, open_teacher(config, data), str(tmp_path / "cache"))

    _, (_, first) = capture("one")
    config, (cache, again) = capture("two")
    assert (first.units_found, again.units_done) == (0, 0)
    check_config_matches_cache(config, cache)
    path = tmp_path / "two" / "teacher" / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    with pytest.raises(IdentityError, match=r"identity\.teacher\.architecture: 'LlamaForCausalLM:"):
        capture("two")


@pytest.mark.parametrize(("asked", "least", "most"), [("", 0.9, 1.0), ("?dtype=bfloat16", 0.0, 0.3)])
def test_a_half_precision_checkpoint_learns_with_float32_weights(tmp_path, capfd, asked, least, most):
    """At the learning rates of fine-tuning, almost every update is lost when it is added to a bfloat16 weight."""
    tokenizer = load_tokenizer(text_config(tmp_path).source)
    spec = save_model(tmp_path / "student", FAMILIES["llama"], tokenizer)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "student").bfloat16()
    before.save_pretrained(tmp_path / "student")
    config = text_config(tmp_path, train={"lr": 2e-5, "weight_decay": 0.0, "labels": "ground_truth"})
    train_student(
        config,
        open_data(config),
        model=spec + asked,
        labels="ground_truth",
        cache=None,
        out=tmp_path / "run",
    )
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf").state_dict()
    changed = torch.cat([(after[k].float() != v.float()).flatten() for k, v in before.state_dict().items()])
    assert least <= changed.float().mean() <= most
    assert after["model.norm.weight"].dtype == (torch.bfloat16 if asked else torch.float32)
    assert ("updates of less than 2^-9 of a weight are lost" in capfd.readouterr().err) == bool(asked)


TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ message.content }} {% endif %}{% endfor %}"
)


def test_of_a_chat_only_the_assistants_words_are_labeled_and_learnt(tmp_path):
    tokenizer = load_tokenizer(text_config(tmp_path).source)
    tokenizer.chat_template = TEMPLATE
    spec = save_model(tmp_path / "teacher", FAMILIES["llama"], tokenizer)
    questions = ["what does the teacher tell", "one cache serves", "who knows every temperature"] * 8
    chats = [
        {
            "id": f"chat{number}",
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": f"the student knows it {number}"},
            ],
        }
        for number, question in enumerate(questions)
    ]
    chats.append({"id": "silent", "messages": [{"role": "user", "content": "the teacher tells"}]})
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    config = text_config(
        tmp_path,
        teacher={"model": spec},
        source={
            "path": str(tmp_path / "chats.jsonl"),
            "messages_column": "messages",
            "tokenizer": str(tmp_path / "teacher"),
            "packing": "documents",
        },
    )
    data = open_data(config)
    source = data.train.source
    cache, _ = capture_labels(config, data, open_teacher(config, data), str(tmp_path / "cache"))
    rows = 0
    for number in range(len(source)):
        sample, batch = source.sample(number), data.train.load([number])
        learnt = tokenizer.decode(batch.targets)
        assert learnt.startswith(("the student knows it", " the student knows it"))
        assert learnt.endswith(tokenizer.eos_token)
        assert batch.num_rows == sample.learnt.sum() < len(sample.tokens) - 1
        rows += batch.num_rows
    assert cache.manifest.rows.num_rows == rows, "masked positions are not stored"
    keys = source.keys()
    assert not any(key.startswith("silent") for key in keys)
    metrics = train_student(
        config, data, model="gpt2?width=16&depth=1&heads=2", labels="cache", cache=cache, out=tmp_path / "run"
    )
    assert metrics["history"][1]["train_loss"] < metrics["history"][0]["train_loss"]
