"""Rollouts sampled, labeled and learned from: their log-probabilities, what a kill leaves, and whose they are."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from transformers import AutoTokenizer

from softcache.cache.storage.local import LocalObjects
from softcache.config.run import RunConfig
from softcache.data.sources.text.rollouts import read_manifest
from softcache.errors import ConfigError, IdentityError, SourceError
from softcache.models.language import split
from softcache.models.language.sample import RolloutSettings, _choose_draw, sample_responses
from softcache.runs import capture_labels, open_data, open_teacher, train_student
from softcache.runs.rollouts import check_teacher_consistency, open_policy, sft_teacher_of_run
from softcache.stages.cli import softcache
from softcache.teacher.rollouts import _end_tokens, generate_rollouts, prompts_of, rollout_prompts
from softcache.testing import FaultyObjects, Killed
from tests.data.test_special_tokens import EOS, with_bos
from tests.fakes_language import known, padded
from tests.support.architectures import ARCHITECTURES, make_model
from tests.support.text_caches import text_config

TEACHER = {"spec": "tests.fakes_language:known", "weights_digest": "abc"}


class Bare(nn.Module):
    """A model with nothing of transformers but its parts, so without `generate`."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """Rollouts of the teacher on a text's prompts; returns the config that sampled them and their folder."""
    folder = tmp_path_factory.mktemp("rollouts")
    config = text_config(folder, rollouts={"max_tokens": 6, "prompt_tokens": 4, "part_prompts": 8})
    write(config, folder / "rollouts")
    return config, folder / "rollouts"


def write(config, out, objects=None, **tables):
    config = config.model_copy(update={"rollouts": config.rollouts.model_copy(update=tables)})
    data = open_data(config)
    policy, sft_teacher = open_policy(config, data)
    prompts = rollout_prompts(data, config.rollouts)
    return generate_rollouts(
        objects or LocalObjects(out, create=True),
        data,
        policy,
        config.rollouts,
        prompts,
        sft_teacher=sft_teacher,
    )


def lines_of(folder):
    paths = sorted((folder / "train").glob("*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def rollout_config(folder, out, **tables):
    source = {"name": "rollouts", "path": str(out), "tokenizer": str(out / "tokenizer")}
    more = tables.pop("source", {})
    table = text_config(folder, **tables).model_dump(mode="json", exclude_unset=True)
    table["source"] = {"modality": "text", "seq_len": 32, "data_dir": str(folder / "data")} | source | more
    table["loss"] = {"name": "policy_gradient"}
    return RunConfig.model_validate(table)


@pytest.mark.parametrize("make", [known, padded])
@pytest.mark.parametrize("has_generate", [True, False])
def test_log_probabilities_are_those_of_the_distribution_that_was_drawn_from(make, has_generate):
    model = make(40, 16).eval()
    prompts = [np.array([3, 4, 5]), np.array([6]), np.array([7, 8])]
    found = sample_responses(
        model if has_generate else Bare(model),
        split(model),
        prompts,
        max_tokens=[6, 4, 6],
        end_tokens={9},
        vocab_size=40,
        temperature=1.5,
        seed=3,
    )
    for prompt, response in zip(prompts, found, strict=True):
        row = torch.from_numpy(np.concatenate([prompt, response.tokens]))
        logits = model(row[None]).logits[0, :, :40].double() / 1.5
        places = torch.arange(len(prompt) - 1, len(row) - 1)
        wanted = logits.log_softmax(-1)[places, row[len(prompt) :]]
        np.testing.assert_allclose(response.log_probs, wanted.detach().numpy(), rtol=1e-5, atol=1e-6)
        assert response.tokens.max() < 40
        assert response.is_finished == (response.tokens[-1] == 9)
        assert 9 not in response.tokens[:-1]
    assert [len(response.tokens) <= most for response, most in zip(found, (6, 4, 6), strict=True)] == [
        True
    ] * 3


WAYS = {"llama": "_draw", "bloom": "_draw", "mamba": "_draw", "recurrent_gemma": "_draw_by_length", "bart": "_draw_by_length",
        "marian": "_draw_by_length", "whisper": "_draw_by_length", "rwkv": "_draw_plainly"}  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
@torch.no_grad()
def test_a_shorter_prompt_of_a_batch_is_continued_as_it_is_alone(name):
    """Its padding was seen by some, so that tokens were drawn from another distribution than that of their log-probabilities."""
    model = make_model(next(each for each in ARCHITECTURES if each.name == name))
    parts = split(model)
    prompts = [np.arange(3, 3 + length) for length in (2, 9, 5, 2)]
    found = sample_responses(
        model, parts, prompts, max_tokens=[5] * 4, end_tokens={2}, vocab_size=101, temperature=1e-4
    )
    for prompt, response in zip(prompts, found, strict=True):
        row = torch.from_numpy(np.concatenate([prompt, response.tokens]))
        logits = model(row[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        assert response.tokens.tolist() == logits.argmax(-1).tolist()
    assert _choose_draw(model, parts, is_padded=True).__name__ == WAYS[name]


def test_a_model_is_tried_once_whatever_the_number_of_batches(monkeypatch):
    model = make_model(next(each for each in ARCHITECTURES if each.name == "recurrent_gemma"))
    parts, calls = split(model), []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda *a, **k: calls.append(k) or generate(*a, **k))
    how = {"max_tokens": [3] * 2, "end_tokens": set(), "vocab_size": 101, "seed": 5}
    found = [sample_responses(model, parts, [np.arange(3, 3 + n) for n in (2, 4)], **how) for _ in range(3)]
    # Two trials (of two lengths, of one), then two calls for each batch, one of each length.
    assert len(calls) == 2 + 3 * 2
    assert len({tuple(map(tuple, (one.tokens for one in batch))) for batch in found}) == 1


def test_tokens_are_drawn_as_often_as_the_model_says():
    model = known(12, 8).eval()
    prompt = np.array([3, 4])
    probs = model(torch.from_numpy(prompt)[None]).logits[0, -1].double().softmax(-1).detach().numpy()
    found = sample_responses(
        model, split(model), [prompt] * 4000, max_tokens=[1] * 4000, end_tokens=set(), vocab_size=12, seed=1
    )
    shares = np.bincount([int(x.tokens[0]) for x in found], minlength=12) / 4000
    assert np.abs(shares - probs).max() < 4 * np.sqrt(0.25 / 4000)
    assert not any(response.is_finished for response in found)


def test_a_response_ends_with_what_the_tokenizer_ends_texts_with(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(with_bos(tmp_path / "t", template="<bos> $A <eos>"))
    assert _end_tokens(tokenizer, RolloutSettings()) == {EOS}
    tokenizer.eos_token = None
    assert _end_tokens(tokenizer, RolloutSettings(stop_tokens=("w9",))) == {EOS, 9}


def test_prompts_are_what_is_given_or_the_first_tokens(tmp_path):
    data = open_data(text_config(tmp_path)).train
    found = list(prompts_of(data, 4))
    assert found
    for prompt in found:
        name, _, segment = prompt.key.rpartition("#")
        sample = data.source.sample(data.source.keys().index(name))
        tokens = sample.tokens[sample.segments == int(segment)]
        assert tokens.tolist() == [*prompt.tokens, *prompt.answer]
        assert len(prompt.tokens) == 4


def test_a_killed_run_goes_on_with_the_same_bytes(sampled, tmp_path):
    config, whole = sampled
    out = tmp_path / "killed"
    # Two files of a tokenizer, then the parts.
    objects = FaultyObjects(LocalObjects(out, create=True), at={("put", 4): "killed"})
    with pytest.raises(Killed):
        write(config, out, objects)
    with pytest.raises(SourceError, match=r"no manifest\.json, so nothing complete"):
        read_manifest(str(out))
    report = write(config, out)
    assert report.parts_found > 0
    for path in sorted(whole.rglob("*.json*")):
        assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes()
    with pytest.raises(IdentityError, match=r"rollouts\.seed: 1 now, 0 there"):
        write(config, out, seed=1)


def test_a_student_learns_from_a_cache_of_its_rollouts(sampled, tmp_path):
    """From the command to the student, whose first loss is that of its log-probabilities against the teacher's."""
    _, out = sampled
    rows = lines_of(out)
    assert all(len(row["response"]) == len(row["log_probs"]) > 0 for row in rows)
    config = rollout_config(tmp_path, out, labels={"k": 1, "statistics": "none"})
    data = open_data(config)
    cache, _ = capture_labels(config, data, open_teacher(config, data), str(tmp_path / "cache"))
    batch = data.train_dataset(config, cache)[0].load(np.arange(len(data.train)), 0)
    # The policy is the teacher: what the record holds of each token is what the rollouts hold.
    torch.testing.assert_close(
        batch.labels.to_torch().target_log_prob, batch.sampling_log_probs, rtol=0, atol=2e-3
    )
    metrics = train_student(
        config,
        data,
        model="tests.fakes_language:known",
        labels="cache",
        cache=cache,
        out=tmp_path / "student",
    )
    assert abs(metrics["history"][0]["train_loss"]) < 0.01, "KL(policy || teacher) of equal models"
    with pytest.raises(
        IdentityError, match=r"sampled by .*known, .* student .*known_scaled starts with weights"
    ):
        train_student(
            config,
            data,
            model="tests.fakes_language:known_scaled",
            labels="cache",
            cache=cache,
            out=tmp_path / "other",
        )


@pytest.mark.parametrize(
    ("change", "is_refused"),
    [
        (lambda x: x, False),
        (lambda x: x / np.log(2), True),
        (lambda x: x - 1.0, True),
        (lambda x: x + 0.5 * (x < -0.5), False),  # a surer policy than the student
    ],
)
@pytest.mark.parametrize("model", ["known", "known_scaled"])
def test_log_probabilities_of_a_file_that_tokens_were_not_sampled_with_are_refused(
    sampled, tmp_path, change, is_refused, model
):
    """Each weighs its token: to base 2 they trained the student on other weights without a word."""
    _, out = sampled
    rows = lines_of(out)
    for row in rows:
        row["log_probs"] = change(np.array(row["log_probs"])).tolist()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(tmp_path / "rows.jsonl"), "eval_path": str(out / "eval.jsonl")}
    config = rollout_config(tmp_path, out, source=source)
    build = open_data(config).task(config, f"tests.fakes_language:{model}").build
    if not is_refused:
        build()
        return
    with pytest.raises(
        SourceError, match=r"times the probability of their log_probs.* loss\.importance = false"
    ):
        build()


def test_log_probabilities_of_a_file_that_are_all_0_are_refused(sampled, tmp_path):
    """They are no policy's: a column that was filled for want of numbers would weigh each token by the student's own s."""
    _, out = sampled
    rows = [row | {"log_probs": [0.0] * len(row["log_probs"])} for row in lines_of(out)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(tmp_path / "rows.jsonl"), "eval_path": str(out / "eval.jsonl")}
    config = rollout_config(tmp_path, out, source=source)
    with pytest.raises(SourceError, match=r"sampled tokens are all 0, .* loss\.importance = false"):
        open_data(config).task(config, "tests.fakes_language:known").build()


def test_rollouts_of_a_policy_of_another_teacher_are_refused_unless_it_is_named(sampled, tmp_path):
    _, out = sampled
    teacher = read_manifest(str(out))["sft_teacher"]
    check_teacher_consistency(rollout_config(tmp_path, out), teacher, "cache c")
    other = teacher | {"weights_digest": "0" * 64}
    with pytest.raises(
        IdentityError, match=r"fine-tuned on tests.fakes_language:known .*expected the teacher of cache c"
    ):
        check_teacher_consistency(rollout_config(tmp_path, out), other, "cache c")
    for accepted in (teacher["spec"], teacher["weights_digest"]):
        config = rollout_config(tmp_path, out, source={"other_sft_teacher": accepted})
        check_teacher_consistency(config, other, "cache c")
    config = rollout_config(tmp_path, out, source={"other_sft_teacher": "another"})
    with pytest.raises(IdentityError, match="other_sft_teacher"):
        check_teacher_consistency(config, other, "cache c")


@pytest.mark.parametrize(
    ("sft_teacher", "found"),
    [
        (None, "a teacher that is not known"),
        ("none", "no teacher"),
        ("hf:org/other", "hf:org/other"),
        ("tests.fakes_language:known", None),
        ("abc", None),
    ],
)
def test_a_file_of_rollouts_names_its_teacher_in_the_settings(sampled, tmp_path, sft_teacher, found):
    _, out = sampled
    path = out / "train" / "00000.jsonl"
    more = {} if sft_teacher is None else {"sft_teacher": sft_teacher}
    config = rollout_config(tmp_path, out, source={"path": str(path), **more})
    if found is None:
        check_teacher_consistency(config, TEACHER, "cache c")
        return
    with pytest.raises(IdentityError, match=f"fine-tuned on {found}; expected the teacher of cache c, tests"):
        check_teacher_consistency(config, TEACHER, "cache c")
    name = sft_teacher or "unknown"
    config = rollout_config(tmp_path, out, source={"path": str(path), **more, "other_sft_teacher": name})
    check_teacher_consistency(config, TEACHER, "cache c")


def test_the_teacher_of_a_run_is_that_of_its_labels_or_of_its_responses(sampled, tmp_path):
    config, out = sampled
    run = tmp_path / "run"
    run.mkdir()

    def write_run(labels, source, cache=None, **identity):
        resolved = {"name": "x", "train": {"labels": labels}, "source": source, "cache": cache}
        (run / "resolved.json").write_text(json.dumps(resolved))
        (run / "config.json").write_text(json.dumps(identity))

    write_run("online", {"name": "hf"}, teacher={"spec": "s", "weights": "w", "dtype": "float32"})
    assert sft_teacher_of_run(run) == {"spec": "s", "weights_digest": "w"}
    write_run("ground_truth", {"name": "hf"})
    assert sft_teacher_of_run(run) == "none"
    write_run("ground_truth", {"name": "rollouts", "path": str(out)})
    assert sft_teacher_of_run(run)["spec"] == "tests.fakes_language:known"
    data = open_data(config)
    cache, _ = capture_labels(config, data, open_teacher(config, data), str(tmp_path / "cache"))
    write_run("cache", {"name": "hf"}, cache=str(tmp_path / "cache"))
    (run / "config.json").write_text(json.dumps({"cache": cache.manifest_sha256}))
    assert sft_teacher_of_run(run) == read_manifest(str(out))["sft_teacher"]
    (run / "config.json").write_text(json.dumps({"cache": "0"}))
    with pytest.raises(
        ConfigError, match=r"another one than the run's; name its teacher as rollouts\.sft_teacher"
    ):
        sft_teacher_of_run(run)


def test_the_command_samples_and_a_changed_part_is_refused(tmp_path, monkeypatch):
    import tomli_w

    monkeypatch.chdir(tmp_path)
    config = text_config(tmp_path, rollouts={"max_tokens": 4, "num_samples": 2, "prompt_tokens": 4})
    (tmp_path / "run.toml").write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_unset=True)))
    result = CliRunner().invoke(
        softcache, ["teacher-generate", "--config", "run.toml", "--out", "out"], catch_exceptions=False
    )
    assert "rollouts (0 empty); 1 parts made now, 0 found" in result.output
    rows = lines_of(tmp_path / "out")
    assert rows[0]["prompt"] == rows[1]["prompt"]
    assert [row["key"][-2:] for row in rows[:2]] == ["/0", "/1"]
    path = tmp_path / "out" / "train" / "00000.jsonl"
    path.write_text(path.read_text().replace("-", "-1", 1))
    with pytest.raises(SourceError, match=r"expected .* that of manifest"):
        open_data(rollout_config(tmp_path, tmp_path / "out"))
