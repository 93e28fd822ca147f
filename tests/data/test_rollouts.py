"""Rollouts as a source: log-probabilities stay with their tokens from the file to the batch, and misfits are refused."""

import gzip
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from softcache.data.sources import open_source, source_settings
from softcache.data.sources.text import shards
from softcache.data.sources.text.packing import Encoded
from softcache.data.tokens import TokenBatch, TokenData
from softcache.errors import SourceError
from tests.data.test_text_source import no_network, save_tokenizer  # noqa: F401

ROLLOUTS = [
    {"prompt": [10, 11, 12], "response": [20, 21], "log_probs": [-0.5, -1.5]},
    {"prompt": [13], "response": [22, 23, 24, 0], "log_probs": [-2.0, -2.5, -3.0, -3.5]},
    {"prompt": [14, 15], "response": [25], "log_probs": [-4.0]},
]
OF_TOKEN = {20: -0.5, 21: -1.5, 22: -2.0, 23: -2.5, 24: -3.0, 0: -3.5, 25: -4.0}


@pytest.fixture
def opened(tmp_path):
    tokenizer = save_tokenizer(tmp_path / "tokenizer")

    def open_(rows, split="train", name="rollouts.jsonl", **given):
        path = tmp_path / name
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(text.encode()))
        elif path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text(text)
        table = {
            "modality": "text",
            "name": "rollouts",
            "path": str(path),
            "tokenizer": tokenizer,
            "seq_len": 8,
            "eval_path": str(tmp_path / "eval.jsonl"),
            "shuffle_documents": False,
            "data_dir": str(tmp_path / "data"),
        }
        (tmp_path / "eval.jsonl").write_text('{"prompt": [10], "response": [11, 12]}\n')
        return open_source(source_settings(table | given), split=split)

    return open_


def found_of(batch):
    return dict(zip(batch.targets.tolist(), batch.sampling_log_probs.tolist(), strict=True))


@pytest.mark.parametrize("name", ["rollouts.jsonl", "rollouts.jsonl.gz", "rollouts.parquet"])
def test_each_sampled_token_keeps_its_log_probability(opened, name):
    data = TokenData(opened(ROLLOUTS, name=name))
    assert len(data) == 2, "packed: 5 and 3 tokens, 5 tokens"
    batch = data.load(range(len(data)))
    assert found_of(batch) == OF_TOKEN
    assert found_of(TokenData(pickle.loads(pickle.dumps(data.source))).load([0, 1])) == OF_TOKEN
    for other in (TokenBatch.merge(batch.split(2)), TokenBatch.merge([data.load([n]) for n in (0, 1)])):
        assert found_of(other) == OF_TOKEN
    first, second = batch.split(2)
    assert found_of(first).keys() == {20, 21, 25}
    assert found_of(batch.select(np.array([1, 4]))) == {
        x: OF_TOKEN[x] for x in batch.targets[[1, 4]].tolist()
    }
    assert found_of(second.select(np.array([0]))) == {22: -2.0}


def test_texts_are_tokenized_as_a_policy_reads_and_writes_them(opened):
    rows = [
        {"prompt": "w10 w11 w12 ", "response": "w20 w21", "log_probs": [-0.5, -1.5]},
        {"prompt": "w13 ", "response": "w22 w23 w24 <eos>", "log_probs": [-2.0, -2.5, -3.0, -3.5]},
        {"prompt": "w14 w15 ", "response": "w25", "log_probs": [-4.0]},
    ]
    source, same = TokenData(opened(rows)), TokenData(opened(ROLLOUTS, name="ids.jsonl"))
    assert found_of(source.load([0, 1])) == OF_TOKEN
    assert (source.load([0, 1]).tokens == same.load([0, 1]).tokens).all()


def test_a_response_that_is_truncated_loses_the_log_probabilities_of_what_is_lost(opened):
    batch = TokenData(opened(ROLLOUTS, seq_len=4, packing="documents")).load([0, 1, 2])
    kept = [20, 22, 23, 24, 25]
    assert found_of(batch) == {token: OF_TOKEN[token] for token in kept}


def test_log_probabilities_are_part_of_what_a_source_is_and_of_no_fingerprint(opened):
    changed = [ROLLOUTS[0] | {"log_probs": [-0.5, -1.25]}, *ROLLOUTS[1:]]
    one, other = opened(ROLLOUTS), opened(changed, name="changed.jsonl")
    assert one.digest != other.digest
    prints = [TokenData(source).load([0, 1]).fingerprints.tolist() for source in (one, other)]
    assert prints[0] == prints[1]


def test_without_log_probabilities_and_in_the_held_out_part_there_are_none(opened):
    bare = [{key: row[key] for key in ("prompt", "response")} for row in ROLLOUTS]
    batch = TokenData(opened(bare, has_log_probs=False)).load([0, 1])
    assert np.isnan(batch.sampling_log_probs.numpy()).all()
    held_out = opened(ROLLOUTS, split="eval")
    assert TokenData(held_out).load([0]).targets.tolist() == [11, 12]


def test_encoded_rollouts_in_a_shard_are_read_as_they_were_written(tmp_path):
    log_probs = np.array([np.nan, np.nan, -1.0], np.float32)
    tokens, learnt = np.array([3, 4, 5], np.int32), np.array([False, False, True])
    encoded = [Encoded("a", tokens, learnt, 1, True, log_probs), Encoded("b", tokens[:2], learnt[:2])]
    made = shards.Shards(tmp_path)
    made.write(0, encoded)
    found = made.read(0)
    np.testing.assert_array_equal(found[0].log_probs, log_probs)
    assert np.isnan(found[1].log_probs).all()
    made.write(1, encoded[1:])
    assert made.read(1)[0].log_probs is None


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"log_probs": [-1.0]}, "document 'train/0': 1 log-probabilities of a response of 2 tokens"),
        ({"log_probs": [-1.0, 0.5]}, r"log-probability 0\.5 of response token 1; expected a finite number"),
        ({"log_probs": [-1.0, -np.inf]}, "log-probability -inf of response token 1"),
        ({"response": "w20 w21"}, "row 0: .* expected prompt and response both as text, or both as lists"),
        (
            {"prompt": [{"role": "user", "content": "w3"}]},
            "row 0: list in column 'prompt'.*apply_chat_template with add_generation_prompt",
        ),
        ({"response": [20, 999]}, "token 4 has the id 999"),
    ],
)
def test_rollouts_that_do_not_fit_are_refused_by_name(opened, row, complaint):
    with pytest.raises(SourceError, match=complaint):
        opened([ROLLOUTS[0] | row])


def test_keys_of_other_sources_are_refused(opened):
    for given, complaint in (
        ({"text_column": "text"}, r"source\.text_column: not read of rollouts"),
        ({"tokenizer": ""}, r"source\.tokenizer: missing, and .* is no folder"),
    ):
        with pytest.raises((ValidationError, SourceError), match=complaint):
            opened(ROLLOUTS, **given)
    with pytest.raises(SourceError, match="no column 'log_probs'"):
        opened([{"prompt": [3], "response": [4]}])
