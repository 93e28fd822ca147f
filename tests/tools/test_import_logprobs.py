"""Labels from a server's answers: the same as captured ones in every shape, and nothing that is not the source's."""

import copy
import gzip
import json
import lzma
import math
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner

from softcache.cache.codecs import OpenCodec, codec_from_dict
from softcache.data.sources.text.source import open_text
from softcache.data.tokens import TokenData
from softcache.errors import (
    AlignmentError,
    ConfigError,
    IdentityError,
    LabelError,
    ManifestError,
    SourceError,
    TemperatureError,
)
from softcache.labels import concat
from softcache.reader.open import open_cache
from softcache.runs import capture_labels, open_data, open_teacher, train_student
from softcache.stages.import_labels import import_command
from softcache.tools.convert import convert_cache
from softcache.tools.import_logprobs import find_responses, import_labels
from softcache.tools.import_logprobs.labels import _log_padding
from softcache.tools.verify.teacher import verify_against_teacher, verify_units
from tests.data.test_text_source import CHAT, save_tokenizer
from tests.support.caches import ROOT, hold_unit
from tests.support.programs import run_program
from tests.support.text_caches import text_config

DOCUMENTS = {"packing": "documents", "max_train_samples": 20, "max_eval_samples": 8}
TOP = 8
PACK = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}


class Served:
    """A source, a cache captured by its teacher, and what a server would say of every sample."""

    def __init__(self, folder, **tables):
        self.folder = folder
        self.config = text_config(folder, **tables)
        self.data = open_data(self.config)
        self.teacher = open_teacher(self.config, self.data)
        self.captured, _ = capture_labels(self.config, self.data, self.teacher, str(folder / "captured"))
        self.source = self.data.train.source
        self.keys = self.source.keys()
        self.tokens = [self.source.sample(number).tokens.tolist() for number in range(len(self.source))]
        self.rows = [self._rows(tokens) for tokens in self.tokens]

    def _rows(self, tokens):
        """For every token the K most likely at its place and itself, the actual one first; null for the first token."""
        with torch.no_grad():
            log_probs_LV = self.teacher.model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        rows = [None]
        for t, token in enumerate(tokens[1:]):
            top = log_probs_LV[t].topk(TOP)
            row = {token: float(log_probs_LV[t, token])}
            rows.append(row | dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
        return rows

    def answers(self, shape, samples=None):
        return [shape(self.keys[n], self.tokens[n], self.rows[n]) for n in samples or range(len(self.keys))]

    def write(self, answers, name="responses.jsonl", folder=None):
        path = (folder or self.folder) / name
        path.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
        return path

    def load(self, url, *paths, data=None, settings=None, **given):
        data = data or self.data.train
        found = find_responses(paths, data.source, any_model="model_name" in given)
        settings = settings or self.config.capture
        return import_labels(found, data, str(url), **{"k": 6, "settings": settings} | given)


def prompt_logprobs(key, tokens, rows):
    """vLLM's completions with return_token_ids, in a batch file."""
    entries = [
        row
        and {str(i): {"logprob": v, "rank": n, "decoded_token": "?"} for n, (i, v) in enumerate(row.items())}
        for row in rows
    ]
    choice = {
        "index": 0,
        "text": "?",
        "logprobs": None,
        "prompt_logprobs": entries,
        "prompt_token_ids": tokens,
    }
    body = {"id": "cmpl-1", "object": "text_completion", "model": "known", "choices": [choice]}
    response = {"status_code": 200, "request_id": "1", "body": body}
    return {"id": "1", "custom_id": key, "response": response, "error": None}


def plain(key, tokens, rows):
    """The same, as a script that calls vLLM itself would write it."""
    return {"key": key, "model": "known", "prompt_token_ids": tokens, "prompt_logprobs": [
        row and {str(i): v for i, v in row.items()} for row in rows
    ]}  # fmt: skip


def flat(key, tokens, rows):
    """vLLM's FlatLogprobs, as `dataclasses.asdict` gives them."""
    ends = np.cumsum([len(row or ()) for row in rows]).tolist()
    pairs = [pair for row in rows if row for pair in row.items()]
    logprobs = {
        "start_indices": [0, *ends[:-1]],
        "end_indices": ends,
        "token_ids": [i for i, _ in pairs],
        "logprobs": [v for _, v in pairs],
        "ranks": [None] * len(pairs),
    }
    return {"key": key, "model": "known", "prompt_token_ids": tokens, "prompt_logprobs": logprobs}


def sglang(key, tokens, rows):
    """SGLang's /generate."""
    meta = {
        "id": "1",
        "prompt_tokens": len(tokens),
        "input_token_logprobs": [
            [row and row[token], token, None] for token, row in zip(tokens, rows, strict=True)
        ],
        "input_top_logprobs": [
            row and [[v, i, None] for i, v in sorted(row.items(), key=lambda e: -e[1])[:TOP]] for row in rows
        ],
    }
    return {"key": key, "model": "known", "response": {"text": "?", "meta_info": meta}}


def echo(key, tokens, rows):
    """OpenAI's completions with echo, and one token that was generated."""
    name = "token_id:{}".format
    logprobs = {
        "text_offset": [],
        "tokens": [*map(name, tokens), name(5)],
        "token_logprobs": [row and row[token] for token, row in zip(tokens, rows, strict=True)] + [-0.5],
        # Some servers leave the actual token out where it is not among the most likely.
        "top_logprobs": [row and {name(i): v for i, v in sorted(row.items(), key=lambda e: -e[1])[:TOP]} for row in rows]
        + [{name(5): -0.5}],
    }  # fmt: skip
    usage = {"prompt_tokens": len(tokens), "completion_tokens": 1, "total_tokens": len(tokens) + 1}
    body = {"model": "known", "choices": [{"index": 0, "text": "?", "logprobs": logprobs}], "usage": usage}
    return {"key": key, "response": body}


def chat(key, tokens, rows):
    """Chat completions, where the last passage of the sample was generated."""
    start = tokens.index(2) + 1  # after [assistant]
    name = "token_id:{}".format
    content = [
        {"token": name(token), "logprob": row[token], "bytes": [],
         "top_logprobs": [{"token": name(i), "logprob": v, "bytes": []} for i, v in row.items()]}
        for token, row in zip(tokens[start:], rows[start:], strict=True)
    ]  # fmt: skip
    choice = {"index": 0, "message": {"role": "assistant"}, "logprobs": {"content": content}}
    body = {
        "model": "known",
        "choices": [choice],
        "prompt_token_ids": tokens[:start],
        "prompt_logprobs": None,
    }
    return {"custom_id": key, "response": {"status_code": 200, "body": body}, "error": None}


def llama_cpp(key, tokens, rows):
    """llama.cpp's /completion, behind the ids that the client sent."""
    start = tokens.index(2) + 1
    entries = [
        {"id": token, "token": "?", "logprob": row[token],
         "top_logprobs": [{"id": i, "token": "?", "logprob": v} for i, v in row.items()]}
        for token, row in zip(tokens[start:], rows[start:], strict=True)
    ]  # fmt: skip
    body = {"model": "known", "content": "?", "completion_probabilities": entries}
    return {"key": key, "prompt_token_ids": tokens[:start], "response": body}


def tgi(key, tokens, rows):
    """TGI's /generate, with details of the prompt and of what was generated."""
    start = tokens.index(2) + 1
    entries = [
        {"id": token, "text": "?", "logprob": row and row[token]}
        for token, row in zip(tokens, rows, strict=True)
    ]
    top = [[{"id": i, "text": "?", "logprob": v} for i, v in row.items()] for row in rows[start:]]
    details = {"prefill": entries[:start], "tokens": entries[start:], "top_tokens": top}
    return {"key": key, "model": "known", "response": {"generated_text": "?", "details": details}}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return Served(tmp_path_factory.mktemp("served"), source=DOCUMENTS)


@pytest.fixture(scope="module")
def served_chats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    with (folder / "chats.jsonl").open("w") as file:
        for n in range(16):
            turns = [("user", f"w{10 + n} w{20 + n}"), ("assistant", f"w{30 + n} w{40 + n} w{50 + n}")]
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    source = DOCUMENTS | {
        "path": str(folder / "chats.jsonl"),
        "key_column": None,
        "eval_share": 0.4,
        "messages_column": "messages",
        "tokenizer": save_tokenizer(folder / "tokenizer", chat_template=CHAT),
    }
    return Served(folder, source=source)


@pytest.fixture
def imported(served, tmp_path):
    path = served.write(served.answers(prompt_logprobs), folder=tmp_path)
    return served.load(tmp_path / "cache", path)[0]


def assert_like(imported, captured):
    samples = range(len(captured))
    (found, prints), (expected, prints_expected) = imported.read_rows(samples), captured.read_rows(samples)
    assert np.array_equal(prints, prints_expected)
    assert np.array_equal(found.ids, expected.ids)
    assert found.log_probs.dtype == np.float16
    np.testing.assert_allclose(found.log_probs, expected.log_probs, rtol=2**-10, atol=1e-6)
    np.testing.assert_allclose(np.exp(found.log_tail[:, 0]), np.exp(expected.log_tail[:, 0]), atol=2e-6)
    np.testing.assert_allclose(found.target_log_prob, expected.target_log_prob, rtol=1e-5, atol=1e-6)
    assert found.stats is None
    soft, soft_expected = found.at_temperature(1.0), expected.at_temperature(1.0)
    np.testing.assert_allclose(np.exp(soft.log_probs), np.exp(soft_expected.log_probs), atol=1e-3)


# -- the same labels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [prompt_logprobs, plain, flat, sglang, echo])
def test_an_imported_cache_is_like_a_captured_one(served, tmp_path, shape):
    path = served.write(served.answers(shape), folder=tmp_path)
    cache, report = served.load(tmp_path / "cache", path)
    assert (report.units_done, report.units_found) == (len(served.captured.markers), 0)
    assert report.rows == sum(len(tokens) - 1 for tokens in served.tokens)
    assert_like(cache, served.captured)
    assert list(verify_units(cache)) == []
    identity = cache.manifest.identity
    assert identity["teacher"] == {"spec": "imported:known", "weights_digest": "unknown", "dtype": "unknown"}
    assert identity["labels"] == {"policy": "imported", "k": 6, "temperatures": [1.0]}
    for part in ("source", "tokenizer", "attention"):
        assert identity[part] == served.captured.manifest.identity[part]


@pytest.mark.parametrize("shape", [chat, llama_cpp, tgi])
def test_of_a_chat_the_generated_passage_is_enough(served_chats, tmp_path, shape):
    path = served_chats.write(served_chats.answers(shape), folder=tmp_path)
    cache, _ = served_chats.load(tmp_path / "cache", path)
    assert_like(cache, served_chats.captured)
    assert len(cache.read([0])) == 4, "three words and the end of text"


def test_of_a_prompt_only_the_learnt_rows_are_kept(served_chats, tmp_path):
    path = served_chats.write(served_chats.answers(prompt_logprobs), folder=tmp_path)
    assert_like(served_chats.load(tmp_path / "cache", path)[0], served_chats.captured)


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz"])
def test_compressed_files(served, tmp_path, suffix):
    content = served.write(served.answers(plain), folder=tmp_path).read_bytes()
    path = tmp_path / f"packed.jsonl{suffix}"
    path.write_bytes(PACK[suffix](content))
    assert_like(served.load(tmp_path / "cache", path)[0], served.captured)
    path.write_bytes(PACK[suffix](content)[:-40])
    with pytest.raises(
        SourceError, match=rf"packed.jsonl{suffix}: cannot be unpacked: .*; compress it again"
    ):
        served.load(tmp_path / "other", path)


def test_llama_cpp_without_the_prompts_ids_and_tgi_of_a_prompt(served, served_chats, tmp_path):
    answers = served_chats.answers(llama_cpp)
    del answers[0]["prompt_token_ids"]
    with pytest.raises(LabelError, match="write the prompt's ids into the line, as prompt_token_ids"):
        served_chats.load(tmp_path / "a", served_chats.write(answers, folder=tmp_path))
    answers = served.answers(sglang)
    tokens, rows = served.tokens[0], served.rows[0]
    prefill = [{"id": token, "logprob": row and row[token]} for token, row in zip(tokens, rows, strict=True)]
    answers[0] = {
        "key": served.keys[0],
        "model": "known",
        "response": {"details": {"prefill": prefill, "tokens": []}},
    }
    with pytest.raises(LabelError, match="TGI gives of a prompt the actual token's alone, not the likeliest"):
        served.load(tmp_path / "b", served.write(answers, folder=tmp_path))


def test_files_and_lines_come_in_any_order(served, tmp_path):
    answers = served.answers(prompt_logprobs)
    paths = [
        served.write(answers[1::2], "odd.jsonl", tmp_path),
        served.write([*reversed(answers[::2])], "even.jsonl", tmp_path),
    ]
    assert_like(served.load(tmp_path / "cache", *paths)[0], served.captured)


def test_the_most_likely_are_kept_ties_by_lower_id_and_the_rest_is_the_tail(served, tmp_path):
    target = served.tokens[0][1]
    rows = list(served.rows[0])
    one, two, three = [i for i in range(30, 40) if i not in served.tokens[0][1:3]][:3]
    rows[1] = {target: -8.0, three: np.log(0.125), two: np.log(0.25), one: np.log(0.25)}
    rows[2] = {served.tokens[0][2]: 0.0, one: -9999.0}
    cache = self_import(served, tmp_path, rows, k=3)
    labels = cache.read([0])
    assert labels.ids[0].tolist() == [one, two, three]
    np.testing.assert_allclose(np.exp(labels.log_probs[0].astype(float)), [0.25, 0.25, 0.125], rtol=1e-3)
    assert np.exp(labels.log_tail[0, 0]) == pytest.approx(0.375, rel=1e-6)
    assert labels.target_log_prob[0] == -8
    # Nothing is left, to the digits that a server gives; -9999 is a probability of 0; unused slots hold V.
    assert labels.ids[1].tolist() == [served.tokens[0][2], cache.num_classes, cache.num_classes]
    assert labels.log_probs[1].tolist() == [0.0, -np.inf, -np.inf]
    assert np.exp(labels.log_tail[1, 0]) == pytest.approx(2**-24)


def self_import(served, tmp_path, rows, **given):
    """Imports all answers, with other rows for the first sample."""
    answers = served.answers(plain)
    answers[0] = plain(served.keys[0], served.tokens[0], rows)
    path = served.write(answers, folder=tmp_path)
    return served.load(tmp_path / "cache", path, **given)[0]


def test_the_tail_is_at_least_what_was_given_and_not_kept(served, tmp_path):
    token = served.tokens[0][1]
    others = [i for i in range(20, 25) if i != token][:2]
    rows = list(served.rows[0])
    rows[1] = {token: np.log(1 - 1e-9), others[0]: np.log(3e-7), others[1]: np.log(2e-7)}
    labels = self_import(served, tmp_path, rows, k=1).read([0])
    assert np.exp(labels.log_tail[0, 0]) == pytest.approx(5e-7, rel=1e-5)


def test_what_the_padding_of_a_servers_head_has_is_counted_in_the_tail(served, tmp_path, capfd):
    token, num_classes = served.tokens[0][1], served.source.vocab_size
    _log_padding.cache_clear()
    rows = list(served.rows[0])
    rows[1] = {token: np.log(1 - 1e-9), num_classes: np.log(3e-7), num_classes + 50: np.log(2e-7)}
    labels = self_import(served, tmp_path, rows, k=3).read([0])
    assert labels.ids[0].tolist() == [token, num_classes, num_classes], "the unused slots hold V"
    assert np.exp(labels.log_tail[0, 0]) == pytest.approx(5e-7, rel=1e-5)
    assert capfd.readouterr().err.count("padding of the server's head") == 1


def test_of_a_whole_distribution_nothing_is_guessed(served, tmp_path):
    num_classes = served.source.vocab_size
    rows = list(served.rows[0])
    rows[1] = dict.fromkeys(range(num_classes), -9999.0) | {served.tokens[0][1]: 0.0}
    labels = self_import(served, tmp_path, rows, k=2).read([0])
    assert labels.log_tail[0, 0] == -np.inf


def renormalized(rows, top):
    """What a server with top_k gives: the distribution over those tokens, and -9999 for each other that it is asked for."""
    cut = [None]
    for row in rows[1:]:
        kept = dict(sorted(row.items(), key=lambda entry: -entry[1])[:top])
        total = np.logaddexp.reduce(list(kept.values()))
        cut.append({i: round(float(kept[i] - total), 5) if i in kept else -9999.0 for i in row})
    return cut


@pytest.mark.parametrize("shape", [prompt_logprobs, flat, sglang])
def test_renormalized_log_probabilities_are_of_a_truncated_teacher(served, tmp_path, shape):
    cut = [renormalized(rows, top=5) for rows in served.rows]
    answers = [shape(*of) for of in zip(served.keys, served.tokens, cut, strict=True)]
    path = served.write(answers, folder=tmp_path)
    message = r"line 1, key '\S*': the given probabilities sum to 1 in each of the \d+ rows from here on, of 300 tokens, .*"
    with pytest.raises(
        LabelError, match=message + r"least of them is up to 0\.\d+: .*raw_logprobs\), or give --truncated"
    ):
        served.load(tmp_path / "cache", path)
    assert not (tmp_path / "cache").exists()
    cache, _ = served.load(tmp_path / "cache", path, is_truncated=True)
    with pytest.raises(IdentityError, match=r"labels\.truncated"):
        served.load(tmp_path / "cache", path)
    labels, _ = cache.read_rows(range(len(cache)))
    assert (labels.log_tail == -np.inf).all()
    np.testing.assert_allclose(np.exp(labels.log_probs.astype(float)).sum(1), 1.0, atol=2e-3)
    assert cache.manifest.identity["labels"]["truncated"]
    assert list(verify_units(cache)) == []
    fewer, _ = served.load(tmp_path / "fewer", path, is_truncated=True, k=3)
    tails, kept = (
        np.exp(x.astype(float)) for x in (fewer.read([0]).log_tail[:, 0], labels.log_probs[:, 3:5])
    )
    np.testing.assert_allclose(tails, kept[: len(tails)].sum(1), rtol=2e-3)


def test_a_confident_teacher_is_none_that_was_truncated(served, tmp_path):
    """Its rows sum to 1, too, but the least likely tokens of them have nothing; nor is one row that is left enough."""
    confident = [
        [None, *({(token + 1) % 290: -15.0, token: -1e-6} for token in tokens[1:])]
        for tokens in served.tokens
    ]
    answers = [plain(*of) for of in zip(served.keys, served.tokens, confident, strict=True)]
    served.load(tmp_path / "confident", served.write(answers, folder=tmp_path))
    whole = [renormalized(rows, top=5) for rows in served.rows]
    unit = served.captured.manifest.plan.unit_samples
    for n in range(0, len(whole), unit):
        whole[n][1] = served.rows[n][1]  # of which something is left
    answers = [plain(*of) for of in zip(served.keys, served.tokens, whole, strict=True)]
    path = served.write(answers, "mostly.jsonl", tmp_path)
    served.load(tmp_path / "mostly", path)
    for rows in whole[unit:]:
        rows[1] = renormalized([None, rows[1]], top=5)[1]
    answers = [plain(*of) for of in zip(served.keys, served.tokens, whole, strict=True)]
    with pytest.raises(LabelError, match=rf"line {unit + 1}, key .*: the given probabilities sum to 1"):
        served.load(tmp_path / "later", served.write(answers, "later.jsonl", tmp_path))
    assert sorted(open_cache(str(tmp_path / "later")).markers) == [0]
    with pytest.raises(
        LabelError, match=r"position 0, .*sum to 0\.\d+; expected 1 of a truncated teacher: drop --truncated"
    ):
        served.load(tmp_path / "declared", path, is_truncated=True)


def peaked(token, *, num_classes=300):
    """The likeliest tokens of a model that is rather sure, and the actual one, one of the others, which share what is left."""
    shares = [0.9, 0.06, 0.02, 0.0099, 1e-5]
    likeliest = {(token + 1 + n) % num_classes: math.log(share) for n, share in enumerate(shares)}
    return likeliest | {token: math.log((1 - sum(shares)) / (num_classes - len(shares)))}


@pytest.mark.parametrize(("base", "is_refused"), [(math.e, False), (2, True)])
def test_logarithms_of_another_base_are_refused_where_what_they_lack_of_1_cannot_be_elsewhere(
    served, tmp_path, base, is_refused
):
    """They were taken for a surer teacher's, whose tail has twelve times what it has."""
    rows = [
        [None, *({i: x / math.log(base) for i, x in peaked(token).items()} for token in tokens[1:])]
        for tokens in served.tokens
    ]
    answers = [plain(*of) for of in zip(served.keys, served.tokens, rows, strict=True)]
    path = served.write(answers, folder=tmp_path)
    if not is_refused:
        cache, _ = served.load(tmp_path / "cache", path)
        assert np.exp(cache.read([0]).log_tail[0, 0]) == pytest.approx(0.01009, rel=0.01)
        return
    message = r"position 0, .*sum to 0\.88\d+, the least of them is 6\.1e-08, and each of the other 1,318 .*natural log"
    with pytest.raises(LabelError, match=message):
        served.load(tmp_path / "cache", path)


def test_all_tokens_of_a_vocabulary_sum_to_1_or_are_refused(served, tmp_path):
    rows = list(served.rows[0])
    rows[1] = dict.fromkeys(range(served.source.vocab_size), -9999.0) | {served.tokens[0][1]: -0.1}
    with pytest.raises(LabelError, match=r"sum to 0\.904837, .* no token is left; expected 1 in all"):
        self_import(served, tmp_path, rows, k=2)


@pytest.mark.parametrize("store", ["zarr", "parquet"])
def test_stores_and_conversion_do_without_stats(served, tmp_path, store):
    path = served.write(served.answers(plain), folder=tmp_path)
    settings = served.config.capture.model_copy(update={"store": store})
    cache, _ = served.load(tmp_path / "cache", path, settings=settings)
    other = "parquet" if store == "zarr" else "zarr"
    copy = convert_cache(cache, str(tmp_path / "copy"), store=other)
    for opened in (cache, copy):
        assert_like(opened, served.captured)
        assert list(verify_units(opened)) == []
        assert opened.read([0]).max_temperature == 1.0


def test_the_teacher_confirms_what_its_server_said(served, imported):
    confirmed = verify_against_teacher(
        imported, served.data.train, served.teacher, num_rows=99, threshold_nats=1e-4, seed=0
    )
    assert list(confirmed) == []
    other = copy.deepcopy(served.teacher)
    other.model.get_output_embeddings().weight.mul_(1.5)
    faults = verify_against_teacher(
        imported, served.data.train, other, num_rows=9, threshold_nats=1e-4, seed=0
    )
    assert any("the teacher disagrees with its record" in fault for fault in faults)


# -- temperature 1, and no other -----------------------------------------------------------------------------


def test_a_student_learns_from_it_at_temperature_1(served, imported, tmp_path):
    tables = {"train": {"epochs": 1}, "loss": {"temperature": 1.0}}
    config = text_config(served.folder, source=DOCUMENTS, **tables).model_copy(update={"teacher": None})
    metrics = train_student(
        config, served.data, model="gpt2?width=16&depth=1&heads=2", labels="cache", cache=imported,
        out=tmp_path / "student",
    )  # fmt: skip
    assert metrics["epochs"] == 1
    assert np.isfinite(metrics["eval_loss"])


def test_another_temperature_is_refused_before_a_step_is_made(served, imported, tmp_path):
    config = text_config(served.folder, source=DOCUMENTS, loss={"temperature": 2.0})
    config = config.model_copy(update={"teacher": None})
    with pytest.raises(TemperatureError, match=r"at most 1 for these labels; found 2.*loss\.temperature = 1"):
        train_student(
            config, served.data, model="gpt2?width=16&depth=1&heads=2", labels="cache", cache=imported,
            out=tmp_path / "student",
        )  # fmt: skip
    assert not (tmp_path / "student" / "metrics.json").exists()


@pytest.mark.parametrize("as_torch", [False, True])
def test_the_limit_goes_with_the_record(imported, as_torch):
    labels = imported.read([0, 1])
    labels = labels.to_torch() if as_torch else labels
    for part in (labels, labels.take([0, 1]), concat([labels, labels]), labels.take(slice(0, 0))):
        assert part.max_temperature == 1.0
        part.at_temperature(1.0)
        with pytest.raises(TemperatureError, match="imported from a server's log-probabilities"):
            part.at_temperature(1.5)
    kind = torch.ones if as_torch else np.ones
    labels.at_temperature(kind(len(labels)))
    with pytest.raises(TemperatureError, match=r"found 1.25"):
        labels.kept_mass(kind(len(labels)) * 1.25)
    other = type(labels)(**{**vars(labels), "max_temperature": None})
    other.at_temperature(4.0)
    with pytest.raises(LabelError, match=r"expected max_temperature 1.0 as in record 0; found None"):
        concat([labels, other])
    with pytest.raises(TemperatureError, match=r"max_temperature: expected at least 1.0"):
        type(labels)(**{**vars(labels), "max_temperature": 0.5})


def test_a_codec_says_what_is_not_the_default_and_nothing_else():
    given = {"num_classes": 9, "k": 2, "temperatures": (1.0, 2.0)}
    assert OpenCodec(**given).to_dict().keys() == {"name", "num_classes", "k", "temperatures", "values"}
    codec = OpenCodec(**given, stats=False, max_temperature=2.0)
    assert codec_from_dict(json.loads(json.dumps(codec.to_dict()))) == codec
    assert [column.name for column in codec.columns] == ["ids", "log_probs", "log_tail", "target_log_prob"]
    for change in (
        {"stats": 1},
        {"max_temperature": 1.5},
        {"max_temperature": "hot"},
        {"max_temperature": 1e999},
    ):
        with pytest.raises(ManifestError, match="codec open"):
            codec_from_dict(codec.to_dict() | change)


# -- what is refused -----------------------------------------------------------------------------------------


def shifted(answer):
    """Row t where row t+1 belongs: the error of many a script."""
    answer["prompt_logprobs"] = [*answer["prompt_logprobs"][1:], None]


def without_the_first(answer):
    answer["prompt_logprobs"].pop(0)


def rows_one_late(answer):
    answer["prompt_logprobs"] = [None, answer["prompt_logprobs"][1], *answer["prompt_logprobs"][1:-1]]


def set_row(position, row):
    return lambda answer: answer["prompt_logprobs"].__setitem__(position + 1, row)


def add_to_row(position, entry):
    return lambda answer: answer["prompt_logprobs"][position + 1].update(entry)


def drop(name):
    return lambda answer: answer.pop(name)


def put(**fields):
    return lambda answer: answer.update(fields)


def other_token(answer):
    answer["prompt_token_ids"] = [*answer["prompt_token_ids"]]
    answer["prompt_token_ids"][1] += 1


def cut_short(answer):
    answer["prompt_token_ids"] = answer["prompt_token_ids"][:-1]
    answer["prompt_logprobs"] = answer["prompt_logprobs"][:-1]


def too_long(answer):
    answer["prompt_token_ids"] = [*answer["prompt_token_ids"], 5]
    answer["prompt_logprobs"] = [*answer["prompt_logprobs"], {"5": -1.0}]


BAD_ANSWERS = [
    (shifted, LabelError, r"prompt_logprobs\[0\] is not null.*not over the one after it"),
    (without_the_first, LabelError, r"prompt_token_ids has \d+, prompt_logprobs has \d+ entries"),
    (rows_one_late, LabelError, r"position 1, over token 2: the actual token, \d+, is not among those given"),
    (other_token, AlignmentError, r"position 1: the server saw token \d+, the source has \d+; send the sample's"),
    (cut_short, LabelError, r"position \d+: no log-probabilities over token \d+ of \d+"),
    (too_long, AlignmentError, r"position \d+: the server saw \d+ tokens, the source's sample has \d+"),
    (set_row(3, None), LabelError, r"position 3: no log-probabilities over token 4"),
    (set_row(3, {}), LabelError, r"position 3, over token 4: the actual token, \d+, is not among those given"),
    (set_row(3, [1, 2]), LabelError, r"position 3: the log-probabilities over token 4 are malformed: 'list'"),
    (set_row(3, {"x": -1}), LabelError, r"position 3: .* malformed: invalid literal"),
    (set_row(3, {"7": {"rank": 1}}), LabelError, r"position 3: .* malformed: 'logprob'"),
    (add_to_row(2, {"07": -3.0, "7": -3.0}), LabelError, r"position 2: .* malformed: a token comes twice"),
    (add_to_row(2, {"1400": -9.0}), LabelError, r"position 2, over token 3: token 1400 is outside of the vocabulary of 300"),
    (add_to_row(2, {"300": -6.0}), LabelError, r"at and above the vocabulary of 300 have a probability of 0.0025; expected none"),
    (add_to_row(2, {"-1": -9.0}), LabelError, r"position 2, over token 3: token -1 is outside of the vocabulary"),
    (add_to_row(2, {str(10**30): -9.0}), LabelError, r"position 2, over token 3: holds something else"),
    (add_to_row(2, {"7": 0.002}), LabelError, r"position 2, over token 3: token 7 has log-probability 0.002"),
    (add_to_row(2, {"7": float("nan")}), LabelError, r"position 2, over token 3: token 7 has log-probability nan"),
    (add_to_row(2, {"7": None}), LabelError, r"position 2, over token 3: token 7 has log-probability nan"),
    (add_to_row(2, {"7": "likely"}), LabelError, r"position 2, over token 3: holds something else than ids and numbers"),
    (add_to_row(2, {"7": -0.1, "8": -0.1}), LabelError, r"position 2, over token 3: the probabilities sum to 1\.[89]"),
    (drop("prompt_token_ids"), LabelError, r"no prompt_token_ids with the log-prob.*\"return_token_ids\": true"),
    (drop("prompt_logprobs"), LabelError, "no log-probabilities: expected prompt_logprobs with prompt_token_ids"),
    (put(prompt_logprobs={}), LabelError, "prompt_logprobs.start_indices is of type NoneType; expected list"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "kind", "message"), BAD_ANSWERS)
def test_a_bad_answer_is_named_by_file_line_key_and_position(served, tmp_path, spoil, kind, message):
    answers = json.loads(json.dumps(served.answers(plain)))
    sample = max(n for n, tokens in enumerate(served.tokens) if len(tokens) > 8)
    spoil(answers[sample])
    path = served.write(answers, folder=tmp_path)
    where = f"responses.jsonl, line {sample + 1}, key '{served.keys[sample]}'"
    with pytest.raises(kind, match=f"{where}.*{message}"):
        served.load(tmp_path / "cache", path)
    bad_unit = sample // served.captured.manifest.plan.unit_samples
    assert bad_unit not in open_cache(str(tmp_path / "cache")).markers
    # What was wrong is mended, and the import goes on where it stopped.
    good = served.write(served.answers(plain), folder=tmp_path)
    assert_like(served.load(tmp_path / "cache", good)[0], served.captured)


BAD_LINES = [
    (put(key="doc999@0"), LabelError, r"line 3, key 'doc999@0': source .* has no such sample \(its first is 'doc"),
    (put(key=3), LabelError, "line 3: no key"),
    (drop("key"), LabelError, "line 3: no key; give the sample's key as text, in `key` or `custom_id`"),
    (put(model="another"), IdentityError, r"line 3, key .*of model 'another'; .*line 1, key .* is of 'known'"),
    (put(choices=[]), LabelError, "line 3, key .*: 0 choices; expected 1; send one prompt per request"),
    (put(choices=[{}, {}]), LabelError, "line 3, key .*: 2 choices; expected 1"),
    (put(response=[]), LabelError, "line 3, key .*: response is of type list; expected dict"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "kind", "message"), BAD_LINES)
def test_a_bad_line_stops_before_anything_is_written(served, tmp_path, spoil, kind, message):
    answers = served.answers(plain)
    spoil(answers[2])
    path = served.write(answers, folder=tmp_path)
    with pytest.raises(kind, match=message):
        served.load(tmp_path / "cache", path)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"key": ', "line 1: not JSON"),
        ("[1, 2]\n", "line 1: the line is of type list; expected dict"),
        ("\n\n[" * 2, "line 3: not JSON"),
        ("[" * 100_000, "line 1: not JSON"),
        (b"\xff\xfe\x00", "line 1: not JSON"),
    ],
)
def test_what_is_not_json_lines_is_named(served, tmp_path, text, message):
    path = tmp_path / "responses.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(LabelError, match=message):
        find_responses([path], served.source)
    with pytest.raises(SourceError, match=r"responses .*nowhere: cannot be read: No such file"):
        find_responses([tmp_path / "nowhere"], served.source)


def test_a_line_without_end_is_not_read_into_memory(served, tmp_path, monkeypatch):
    monkeypatch.setattr("softcache.tools.import_logprobs.index.MAX_LINE_BYTES", 1000)
    (tmp_path / "responses.jsonl").write_bytes(b" " * 5000)
    with pytest.raises(LabelError, match="line 1: longer than 1,000 bytes"):
        find_responses([tmp_path / "responses.jsonl"], served.source)


def test_a_key_that_comes_twice_is_named_with_both_places(served, tmp_path):
    one = served.write(served.answers(plain), "one.jsonl", tmp_path)
    two = served.write(served.answers(plain, [4]), "two.jsonl", tmp_path)
    message = rf"two\.jsonl, line 1, key '{served.keys[4]}': comes twice; it was in .*one\.jsonl, line 5"
    with pytest.raises(LabelError, match=message):
        served.load(tmp_path / "cache", one, two)


def spoil_echo(served, change):
    answers = json.loads(json.dumps(served.answers(echo)))
    change(answers[2]["response"], answers[2]["response"]["choices"][0]["logprobs"])
    return answers


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda body, logprobs: logprobs["tokens"].__setitem__(2, "Ġthe"), LabelError,
         r"logprobs\.tokens: 'Ġthe' is not 'token_id:NUMBER'.*return_tokens_as_token_ids"),
        (lambda body, logprobs: logprobs["top_logprobs"].__setitem__(2, {"Ġthe": -1.0}), LabelError,
         r"position 1: .*'Ġthe' is not 'token_id:NUMBER'"),
        (lambda body, logprobs: logprobs["tokens"].__setitem__(2, None), LabelError, r"logprobs\.tokens: 'NoneType'"),
        (lambda body, logprobs: logprobs["top_logprobs"].pop(), LabelError, "top_logprobs has"),
        (lambda body, logprobs: logprobs.update(top_logprobs=None), LabelError, "top_logprobs is of type NoneType"),
        (lambda body, logprobs: [values.pop(0) for values in logprobs.values() if values], LabelError,
         r"token_logprobs\[0\] is not null"),
        (lambda body, logprobs: body.pop("usage"), AlignmentError, "keep usage.prompt_tokens"),
        (lambda body, logprobs: logprobs["tokens"].__setitem__(0, "token_id:1"), AlignmentError,
         "position 0: the server saw token 1"),
    ],
)  # fmt: skip
def test_a_bad_echo_is_refused(served, tmp_path, change, kind, message):
    path = served.write(spoil_echo(served, change), folder=tmp_path)
    with pytest.raises(kind, match=f"line 3, key '{served.keys[2]}'.*{message}"):
        served.load(tmp_path / "cache", path)


def one_late(values, first):
    """The entries from `first` on, each where the next belongs."""
    values[first + 1 :] = values[first:-1]


@pytest.mark.parametrize("only_others", [False, True])
@pytest.mark.parametrize("shape", [echo, sglang])
def test_likeliest_tokens_of_another_position_are_refused(served, tmp_path, shape, only_others):
    """The actual token has a number of its own there, which hid that the others were one row late."""
    answers = json.loads(json.dumps(served.answers(shape)))
    for answer, tokens in zip(answers, served.tokens, strict=True):
        body = answer["response"]
        top = (
            body["choices"][0]["logprobs"]["top_logprobs"]
            if shape is echo
            else body["meta_info"]["input_top_logprobs"]
        )
        one_late(top, 1)
        for row, token in zip(top, tokens, strict=False):
            if only_others and shape is echo and row:
                row.pop(f"token_id:{token}", None)
            elif only_others and row:
                row[:] = [entry for entry in row if entry[1] != token]
    with pytest.raises(
        LabelError, match=r"position \d+: .* malformed: the actual token, \d+, has .* of another position"
    ):
        served.load(tmp_path / "cache", served.write(answers, folder=tmp_path))


def test_an_echo_without_top_log_probs_of_a_row_has_the_actual_token_alone(served, tmp_path):
    answers = spoil_echo(served, lambda body, logprobs: logprobs["top_logprobs"].__setitem__(2, None))
    cache, _ = served.load(tmp_path / "cache", served.write(answers, folder=tmp_path))
    labels = cache.read([2])
    assert labels.ids[1].tolist() == [served.tokens[2][2], *[cache.num_classes] * 5]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda body, content: body.pop("prompt_token_ids"), LabelError, "no prompt_token_ids"),
        (lambda body, content: content.pop(), LabelError, r"no log-probabilities over token \d+ of \d+; the answer has"),
        (lambda body, content: content.append(content[-1]), AlignmentError, "the source's sample has"),
        (lambda body, content: content[1].update(token="w3"), LabelError, "'w3' is not 'token_id:NUMBER'"),
        (lambda body, content: content.__setitem__(1, 5), LabelError, r"content\[\] is of type int"),
        (lambda body, content: content[0].pop("logprob"), LabelError, "malformed: 'logprob'"),
        (lambda body, content: content[0].update(logprob=content[0]["logprob"] / 2), LabelError, "of another position or temp"),
        (lambda body, content: body["prompt_token_ids"].insert(0, 3), AlignmentError, "position 0: the server saw token 3"),
    ],
)  # fmt: skip
def test_a_bad_chat_is_refused(served_chats, tmp_path, change, kind, message):
    answers = json.loads(json.dumps(served_chats.answers(chat)))
    body = answers[0]["response"]["body"]
    change(body, body["choices"][0]["logprobs"]["content"])
    with pytest.raises(kind, match=message):
        served_chats.load(tmp_path / "cache", served_chats.write(answers, folder=tmp_path))


def test_packed_documents_would_see_each_other(served, tmp_path):
    """A server's prompt attends to all of itself; labels of packed samples would be of another context."""
    path = served.write([], folder=tmp_path)
    cases = (
        ({}, True),
        ({"packing": "best_fit"}, True),
        ({"cross_documents": True}, False),
        (DOCUMENTS, False),
    )
    for given, refused in cases:
        settings = text_config(served.folder, source=given).source
        data = TokenData(open_text(settings, split="train"), cross_documents=settings.cross_documents)
        error, message = (SourceError, "a server lets a prompt see all of itself") if refused else (
            LabelError, "samples are not answered")  # fmt: skip
        with pytest.raises(error, match=message):
            served.load(tmp_path / "cache", path, data=data, model_name="known")


def test_a_teacher_has_one_name(served, tmp_path):
    answers = [dict(answer) for answer in served.answers(plain)]
    for answer in answers:
        del answer["model"]
    path = served.write(answers, folder=tmp_path)
    with pytest.raises(LabelError, match="none names its `model`; give --model-name"):
        served.load(tmp_path / "cache", path)
    answers[0]["model"], answers[1]["model"] = "a", "b"
    path = served.write(answers, folder=tmp_path)
    cache, _ = served.load(tmp_path / "cache", path, model_name="mine")
    assert cache.manifest.identity["teacher"]["spec"] == "imported:mine"


# -- what is missing, and going on ---------------------------------------------------------------------------


def test_missing_samples_are_counted_and_the_first_is_named(served, tmp_path):
    answers = served.answers(prompt_logprobs)
    answers[1] |= {"response": None, "error": {"message": "out of memory"}}
    answers[9]["response"] |= {"status_code": 500}
    path = served.write(answers[:-2], folder=tmp_path)
    message = (
        rf"4 of {len(answers)} samples are not answered, the first: '{served.keys[1]}'; 2 requests had failed, the first: "
        ".*line 2, key .*out of memory.*; add the files that have them, or give --allow-missing"
    )
    with pytest.raises(LabelError, match=message):
        served.load(tmp_path / "cache", path)
    assert not (tmp_path / "cache").exists()


def test_units_that_are_not_whole_are_left_out_and_come_later(served, tmp_path):
    answers, size = served.answers(prompt_logprobs), served.captured.manifest.plan.unit_samples
    first = served.write(answers[: size + 1], "first.jsonl", tmp_path)
    cache, report = served.load(tmp_path / "cache", first, allow_missing=True)
    assert (report.units_done, sorted(cache.markers)) == (1, [0])
    before = (tmp_path / "cache" / "units" / "00000.json").read_bytes()
    rest = served.write(answers[size + 1 :], "rest.jsonl", tmp_path)
    with pytest.raises(
        LabelError, match=rf"1 of {len(answers)} samples are not answered, the first: '{served.keys[size]}'"
    ):
        served.load(tmp_path / "cache", rest)
    cache, report = served.load(tmp_path / "cache", first, rest)
    assert (report.units_found, cache.missing_units) == (1, [])
    assert_like(cache, served.captured)
    assert (tmp_path / "cache" / "units" / "00000.json").read_bytes() == before
    # Of finished units, nothing has to be there any more.
    assert (
        served.load(tmp_path / "cache", served.write([], folder=tmp_path), model_name="known")[1].units_done
        == 0
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [({"model_name": "other"}, "imported:other'; 'imported:known"), ({"k": 5}, "labels.k: 5; 6")],
)
def test_another_identity_is_refused(served, imported, tmp_path, given, message):
    path = served.write(served.answers(plain), "again.jsonl", tmp_path)
    with pytest.raises(IdentityError, match=message):
        served.load(imported.url, path, **given)
    with pytest.raises(IdentityError, match=r"labels.policy: 'top_k'; 'imported'"):
        capture_labels(served.config, served.data, served.teacher, imported.url)


def test_a_file_that_changes_meanwhile_is_noticed(served, tmp_path):
    answers = served.answers(plain)
    path = served.write(answers, folder=tmp_path)
    found = find_responses([path], served.source)
    served.write(answers[::-1], folder=tmp_path)
    with pytest.raises((SourceError, LabelError), match=r"changed while it was read|not JSON"):
        import_labels(found, served.data.train, str(tmp_path / "cache"), k=6, settings=served.config.capture)


def test_memory_does_not_grow_with_the_file(served, tmp_path):
    answers = served.answers(prompt_logprobs)
    for answer in answers:
        answer["padding"] = "x" * 1_000_000
    path = served.write(answers, folder=tmp_path)
    tracemalloc.start()
    served.load(tmp_path / "cache", path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 20e6
    assert peak < 8e6


# -- the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def toml(served, tmp_path):
    source = served.config.source.model_dump(exclude_none=True)
    lines = ['name = "mine"', "[source]", *(f"{key} = {json.dumps(value)}" for key, value in source.items())]
    capture = served.config.capture.model_dump(include={"unit_samples", "chunk_samples", "batch_size"})
    lines += ["[labels]", "k = 6", "[capture]", *(f"{key} = {value}" for key, value in capture.items())]
    (tmp_path / "mine.toml").write_text("\n".join(lines))
    return tmp_path / "mine.toml"


def test_the_command_says_what_it_made(served, tmp_path, toml):
    path = served.write(served.answers(echo), folder=tmp_path)
    arguments = [str(path), "--config", str(toml), "--cache", str(tmp_path / "cache")]
    result = CliRunner().invoke(import_command, [*arguments, "--k", "4"], catch_exceptions=False)
    assert result.exit_code == 0
    rows = sum(len(tokens) - 1 for tokens in served.tokens)
    assert (
        f"{rows:,} rows of imported:known, K=4 of 300 classes, at temperature 1; 4 units made now"
        in result.stdout
    )
    assert "0 of 4 missing" in result.stdout
    assert open_cache(str(tmp_path / "cache")).read([0]).k == 4
    whole = tmp_path / "whole.toml"
    for policy in ("dense", "top_p", "hybrid"):  # the last two have a labels.k, and mean more by it
        whole.write_text(toml.read_text().replace("[labels]\nk = 6", f'[labels]\npolicy = "{policy}"'))
        with pytest.raises(ConfigError, match=rf"labels.policy: {policy}; .* set it to \"top_k\""):
            CliRunner().invoke(
                import_command, [*arguments[:2], str(whole), *arguments[3:]], catch_exceptions=False
            )
    arguments[2] = str(ROOT / "configs" / "digits.toml")
    with pytest.raises(ConfigError, match=r"source.modality is image"):
        CliRunner().invoke(import_command, arguments, catch_exceptions=False)
    assert CliRunner().invoke(import_command, ["--config", str(toml)]).exit_code == 2


KILLED = """
import os, sys
from softcache.cache import units
from softcache.stages.import_labels import import_command
seen = []
def die(name):
    seen.append(name)
    if seen.count("before_marker") == 3:
        os._exit(9)
units._failpoint = die
import_command(sys.argv[1:])
"""


def test_killed_halfway_and_run_again(served, tmp_path, toml):
    path = served.write(served.answers(prompt_logprobs), folder=tmp_path)
    arguments = [str(path), "--config", str(toml), "--cache", str(tmp_path / "cache")]
    killed = run_program(KILLED, *arguments)
    assert killed.returncode == 9, killed.stderr
    assert sorted(open_cache(str(tmp_path / "cache")).markers) == [0, 1]
    result = CliRunner().invoke(import_command, arguments, catch_exceptions=False)
    assert "2 units made now, 2 found, 0 of 4 missing" in result.stdout
    whole, _ = served.load(tmp_path / "whole", path)
    assert_like(open_cache(str(tmp_path / "cache")), served.captured)
    for number, marker in whole.markers.items():
        other = open_cache(str(tmp_path / "cache")).markers[number]
        assert [shard.sha256 for shard in marker.shards] == [shard.sha256 for shard in other.shards]


def test_a_unit_that_another_import_holds_is_waited_for(served, tmp_path, monkeypatch):
    path = served.write(served.answers(plain), folder=tmp_path)
    cache, _ = served.load(tmp_path / "cache", path, settings=served.config.capture)
    waits = hold_unit(cache, 1, monkeypatch)
    found, report = served.load(cache.url, path)
    assert (len(waits), report.units_done, report.units_found) == (1, 1, 3)
    assert found.missing_units == []
