"""Text: nothing lost between documents and samples, rows that predict the next token, tables made once and whole.

Everything is made here and offline; the tokenizer of most tests has one token per word, with ids known by heart.
"""

import codecs
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import hypothesis
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from softcache.data.sources import open_source, source_settings
from softcache.data.sources.text import chat as chats
from softcache.data.sources.text import encode as encoding
from softcache.data.sources.text import packing as token_samples
from softcache.data.sources.text import source as text
from softcache.data.sources.text import table as token_table
from softcache.data.sources.text import tokenizer as tokenizers
from softcache.data.sources.text.documents import Document
from softcache.data.sources.text.hugging_face import HuggingFaceTexts
from softcache.data.sources.text.packing import TokenSample
from softcache.data.sources.text.source import open_text
from softcache.data.sources.text.table import TokenSource
from softcache.data.sources.text.tokenizer import digest_tokenizer, load_tokenizer
from softcache.data.tokens import TokenBatch, TokenData
from softcache.errors import MissingExtraError, SourceError, SpecError, StorageError
from softcache.hashing.digests import fingerprint
from softcache.labels.sparsify import dense
from tests.support.programs import Program

ROOT = Path(__file__).parent.parent.parent
WORDS = ["<eos>", "[user]", "[assistant]", *(f"w{number}" for number in range(3, 200))]  # w7 has the id 7
CHAT = (
    "{% for message in messages %}{% if message.role == 'assistant' %}[assistant] {% generation %}"
    "{{ message.content }} <eos> {% endgeneration %}{% else %}[user] {{ message.content }} {% endif %}{% endfor %}"
)


def save_tokenizer(folder, *, words=WORDS, eos="<eos>", chat_template=None):
    """A word-level tokenizer: one token per word, its number as its id."""
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="w3")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)
    wrapped.chat_template = chat_template
    wrapped.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """The variable in conftest.py comes too late for libraries that are imported by then."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("words") / "tokenizer")


def write_texts(path, texts, **columns):
    rows = [
        {"text": value} | {name: values[number] for name, values in columns.items()}
        for number, value in enumerate(texts)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbered(*runs):
    """`numbered((3, 6))` is "w3 w4 w5"."""
    return [" ".join(f"w{number}" for number in range(*run)) for run in runs]


@pytest.fixture
def opened(tmp_path, words):
    """Opens documents of words, all of them in order and in the train split, unless the keywords differ."""

    def open_(texts=None, split="train", **given):
        path = given.pop("path", tmp_path / "docs.jsonl")
        if texts is not None:
            write_texts(Path(path), texts)
        defaults = {
            "modality": "text",
            "name": "hf",
            "tokenizer": words,
            "shuffle_documents": False,
            "eval_share": 1e-9,
            "data_dir": str(tmp_path / "data"),
        }
        return open_text(source_settings(defaults | {"path": str(path)} | given), split=split)

    return open_


def tokens_of(source):
    return [source.sample(number).tokens.tolist() for number in range(len(source))]


def segments_of(source):
    return [source.sample(number).segments.tolist() for number in range(len(source))]


# -- rows, by hand -------------------------------------------------------------------------------------------


def test_row_t_predicts_token_t_plus_1(opened):
    source = opened(numbered((10, 13), (20, 22), (30, 34)), seq_len=6)  # each is followed by <eos>, 0
    assert tokens_of(source) == [[10, 11, 12, 0, 20, 21], [0, 30, 31, 32, 33, 0]]
    assert segments_of(source) == [[0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1]]
    assert source.keys() == ["train/0@0", "train/1@2"]
    assert source.sample(0).rows.tolist() == [0, 1, 2, 4]
    assert source.sample(1).rows.tolist() == [1, 2, 3, 4]
    assert source.num_rows().tolist() == [4, 4]
    batch = TokenData(source).load([1, 0])
    assert batch.rows.tolist() == [1, 2, 3, 4, 6, 7, 8, 10]
    assert batch.targets.tolist() == [31, 32, 33, 0, 11, 12, 0, 21]
    assert batch.positions.tolist() == [1, 2, 3, 4, 0, 1, 2, 4]


def test_a_long_document_keeps_its_start_first_and_its_end_last(opened):
    source = opened(numbered((10, 20), (50, 52)), seq_len=4, packing="documents")
    assert tokens_of(source) == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19, 0], [50, 51, 0]]
    assert source.keys() == ["train/0@0", "train/0@4", "train/0@8", "train/1@0"]
    assert source.num_rows().tolist() == [3, 3, 2, 2]
    packed = opened(numbered((10, 20), (50, 52)), seq_len=4)
    assert tokens_of(packed) == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19, 0, 50], [51, 0]]
    assert packed.keys() == ["train/0@0", "train/0@4", "train/0@8", "train/1@1"]


def test_a_sample_without_a_row_is_left_out_and_counted(opened, capfd):
    source = opened(numbered((10, 13), (20, 24)), seq_len=4, packing="documents")
    assert tokens_of(source) == [[10, 11, 12, 0], [20, 21, 22, 23]]  # the <eos> of the second is alone
    assert (source.account["left_out"], source.account["skipped"], source.num_tokens) == (1, 0, 8)
    assert (
        "2 documents, 1 samples left out, which have nothing to predict; 8 tokens in 2 samples"
        in capfd.readouterr().err
    )


def test_empty_documents_are_skipped_and_counted(opened):
    source = opened(["", *numbered((10, 13)), "  ", *numbered((20, 22)), ""], seq_len=16)
    assert tokens_of(source) == [[10, 11, 12, 0, 20, 21, 0]]
    assert (source.account["skipped"], len(source), source.keys()) == (3, 1, ["train/1@0"])
    assert TokenData(source).load([0]).num_rows == 5


def test_without_an_end_of_text_token_none_is_added(opened, tmp_path):
    bare = save_tokenizer(tmp_path / "bare", eos=None)
    source = opened([*numbered((10, 13)), "w9"], tokenizer=bare)
    assert tokens_of(source) == [[10, 11, 12]]
    assert source.account["skipped"] == 1  # one token predicts nothing
    ending = opened()
    assert ending.tokenizer_digest == source.tokenizer_digest
    assert tokens_of(ending) == [[10, 11, 12, 0, 9, 0]], "the table of another end of text was used"


# -- cutting, against a slow reference -----------------------------------------------------------------------


def cut_slowly(documents, seq_len, packing):
    """Samples as lists of (document, offset, token), one token at a time; those without a row are dropped."""
    samples, current = [], []
    for number, document in enumerate(documents):
        for offset, token in enumerate(document):
            if len(current) == seq_len:
                samples.append(current)
                current = []
            current.append((number, offset, token))
        if packing == "documents" and current:
            samples.append(current)
            current = []
    samples += [current] if current else []
    return [sample for sample in samples if rows_slowly(sample)]


def rows_slowly(sample):
    return [t for t in range(len(sample) - 1) if sample[t][0] == sample[t + 1][0]]


@hypothesis.given(
    lengths=st.lists(st.integers(2, 23), max_size=12),
    seq_len=st.integers(2, 9),
    packing=st.sampled_from(["packed", "documents"]),
)
def test_cutting_agrees_with_the_slow_reference(lengths, seq_len, packing):
    flat = iter(range(sum(lengths)))
    documents = [[next(flat) for _ in range(length)] for length in lengths]
    encoded = [
        token_samples.Encoded(f"d{number}", np.array(tokens, np.int32), np.ones(len(tokens), bool))
        for number, tokens in enumerate(documents)
    ]
    cut = token_samples.packed if packing == "packed" else token_samples.one_sample_per_document
    every = [(pieces[0].key, token_samples._concat(pieces)) for pieces in cut(encoded, seq_len)]
    found = [(key, sample) for key, sample in every if len(sample.rows)]
    expected = cut_slowly(documents, seq_len, packing)

    assert np.concatenate([[], *(s.tokens for _, s in every)]).tolist() == list(range(sum(lengths)))
    assert [key for key, _ in found] == [f"d{s[0][0]}@{s[0][1]}" for s in expected]
    assert len({key for key, _ in found}) == len(found)
    for (_, sample), reference in zip(found, expected, strict=True):
        assert sample.tokens.tolist() == [token for _, _, token in reference]
        assert sample.rows.tolist() == rows_slowly(reference)
        assert sample.segments.tolist() == [number - reference[0][0] for number, _, _ in reference]
        segment_lengths = np.bincount(sample.segments)
        assert len(sample.rows) == (segment_lengths - 1).sum()
        assert len(sample.tokens) <= seq_len
    if packing == "packed":
        assert all(len(sample.tokens) == seq_len for _, sample in every[:-1])


def test_the_table_holds_what_was_cut(opened):
    texts = numbered((3, 20), (40, 43), (50, 90), (100, 102))
    documents = [[*(int(word[1:]) for word in value.split()), 0] for value in texts]
    for packing in ("packed", "documents"):
        source = opened(texts, seq_len=8, packing=packing)
        expected = cut_slowly(documents, 8, packing)
        assert tokens_of(source) == [[token for _, _, token in sample] for sample in expected]
        assert source.num_rows().tolist() == [len(rows_slowly(sample)) for sample in expected]
        assert source.num_rows().dtype == np.int64
        assert source.keys() == [source.key(number) for number in range(len(source))]
        assert (source.seq_len, source.packing, source.name.endswith("/train")) == (8, packing, True)
        sample = source.sample(0)
        assert (sample.tokens.dtype, sample.segments.dtype, sample.learnt.dtype) == (np.int32, np.int32, bool)


def test_many_record_batches_read_like_one(opened, monkeypatch):
    texts = numbered((3, 20), (40, 43), (50, 90), (100, 102))
    whole = opened(texts, seq_len=4)
    monkeypatch.setattr(token_table, "CHUNK_TOKENS", 9)
    parts = opened(texts, seq_len=4, data_dir=f"{Path(whole._folder).parent}-in-parts")
    assert len(parts._open()[0]) > 4 > len(whole._open()[0])
    assert parts.digest == whole.digest
    assert parts.keys() == whole.keys()
    assert tokens_of(parts) == tokens_of(whole)
    assert parts.num_rows().tolist() == whole.num_rows().tolist()


def test_batches_of_documents_do_not_change_a_table(opened, monkeypatch, tmp_path):
    texts = [*numbered((3, 20), (40, 43)), "", *numbered((50, 90), (100, 102))]
    one = opened(texts, seq_len=4)
    for name, value in (("BATCH_DOCUMENTS", 2), ("BATCH_CHARACTERS", 1)):
        monkeypatch.setattr(encoding, name, value)
        assert opened(texts, seq_len=4, data_dir=str(tmp_path / name)).digest == one.digest


# -- chats ---------------------------------------------------------------------------------------------------


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def write_chats(path, chats):
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))
    return path


def test_only_the_assistants_words_have_labels(opened, tmp_path):
    template = save_tokenizer(tmp_path / "chat", chat_template=CHAT)
    path = write_chats(
        tmp_path / "chats.jsonl",
        [
            chat(("user", "w10 w11"), ("assistant", "w20 w21"), ("user", "w12"), ("assistant", "w22")),
            chat(("user", "w13")),
            [],
        ],
    )
    source = opened(path=path, tokenizer=template, messages_column="messages")
    (sample,) = [source.sample(number) for number in range(len(source))]
    assert sample.tokens.tolist() == [1, 10, 11, 2, 20, 21, 0, 1, 12, 2, 22, 0]
    assert sample.learnt.tolist() == [False] * 4 + [True] * 3 + [False] * 3 + [True] * 2
    assert sample.rows.tolist() == [3, 4, 5, 9, 10]
    assert TokenData(source).load([0]).targets.tolist() == [20, 21, 0, 22, 0]
    assert source.account["skipped"] == 2
    # Of a chat that is too long, what fits is kept with its prompt; its end never continues without one.
    short = opened(path=path, tokenizer=template, messages_column="messages", seq_len=6, packing="documents")
    assert tokens_of(short) == [[1, 10, 11, 2, 20, 21]]
    account = short.account
    assert (account["truncated"], account["cut_tokens"], account["dropped"]) == (1, 6, 0)
    with pytest.raises(SourceError, match=r"2 of them skipped, 1 with a prompt that fills source\.seq_len"):
        opened(path=path, tokenizer=template, messages_column="messages", seq_len=4)


UNMARKED = CHAT.replace("{% generation %}", "").replace("{% endgeneration %}", "") + (
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.mark.parametrize("template", [CHAT, UNMARKED], ids=["marked", "derived"])
def test_a_message_of_weight_0_is_given_and_not_learned(template, opened, tmp_path):
    """As OpenAI's and Open-Orca's chats say it, of the assistant's messages; a user's weight means nothing."""
    tokenizer = save_tokenizer(tmp_path / "chat", chat_template=template)
    path = tmp_path / "chats.jsonl"

    def learnt(*weights):
        messages = chat(("user", "w10"), ("assistant", "w20"), ("user", "w12"), ("assistant", "w22"))
        weighted = [one | {"weight": weight} for one, weight in zip(messages, weights, strict=True)]
        (found,) = _open_chats(opened, write_chats(path, [weighted]), tokenizer)
        return found.tokens[found.learnt].tolist()

    assert learnt(0.0, 1.0, 0.5, 1.0) == [20, 0, 22, 0]
    assert learnt(0, 0, 0, 1) == [22, 0]
    assert learnt(None, None, None, 0) == [20, 0]
    with pytest.raises(
        SourceError, match=r"message 3 has the weight 0.5; expected 1, or 0 of what is not learned"
    ):
        learnt(0, 1, 0, 0.5)


@pytest.mark.parametrize("template", [CHAT, UNMARKED], ids=["marked", "derived"])
@pytest.mark.parametrize("number", [0, 1])
def test_parts_that_a_template_does_not_read_are_refused(number, template, opened, tmp_path):
    """jinja would write them as Python does, quotes and all."""
    reading = template.replace(
        "message.content }}", "message.content if message.content is string else message.content[0].text }}"
    )
    messages = chat(("user", "w10"), ("assistant", "w20"))
    messages[number]["content"] = [{"type": "text", "text": "w30"}]
    path = write_chats(tmp_path / "chats.jsonl", [messages])
    (found,) = _open_chats(opened, path, save_tokenizer(tmp_path / "reading", chat_template=reading))
    assert 30 in found.tokens
    assert found.tokens[found.learnt].tolist() == [[20, 30][number], 0]
    message = rf"the content of message {number} is a list, which the chat template writes out as Python does; expected text"
    with pytest.raises(SourceError, match=message):
        _open_chats(opened, path, save_tokenizer(tmp_path / "chat", chat_template=template))


def test_the_cause_of_a_damaged_line_is_in_the_message(opened, tmp_path):
    (tmp_path / "cut.jsonl").write_text('{"text": "w7"}\n{"text": "w8')
    message = r"cannot be loaded: DatasetGenerationError: .* \(ArrowInvalid: JSON parse error: .* in row 1\); check source.path"
    with pytest.raises(SourceError, match=message):
        tokens_of(opened(path=tmp_path / "cut.jsonl"))


def test_a_weight_of_a_passage_that_is_not_marked_is_refused(opened, tmp_path):
    """Which marked passage is of which message is known where there is one for each."""
    template = CHAT.replace("{% generation %}", "{% if loop.last %}{% generation %}").replace(
        "{% endgeneration %}", "{% endgeneration %}{% else %}{{ message.content }} <eos> {% endif %}"
    )
    tokenizer = save_tokenizer(tmp_path / "chat", chat_template=template)
    messages = chat(("user", "w10"), ("assistant", "w20"), ("user", "w12"), ("assistant", "w22"))
    messages[1]["weight"] = 0
    path = write_chats(tmp_path / "chats.jsonl", [messages])
    with pytest.raises(
        SourceError, match=r"1 passages .* of 2 messages .* which of them has weight 0 is not clear"
    ):
        _open_chats(opened, path, tokenizer)


def _open_chats(opened, path, tokenizer):
    source = opened(path=path, tokenizer=tokenizer, messages_column="messages")
    return [source.sample(number) for number in range(len(source))]


def test_a_marked_passage_may_end_in_what_no_token_covers(opened, tmp_path):
    """The <eos> of CHAT is followed by a space; transformers would mark the user's next words as well."""
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path / "chat", chat_template=CHAT))
    messages = chat(("assistant", "w20"), ("user", "w12"))
    theirs = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert theirs["assistant_masks"] == [0, 1, 1, 1, 1], "mended there: use it"
    settings = HuggingFaceTexts(
        modality="text", name="hf", path="x", messages_column="messages", tokenizer="chat"
    )
    (ours,) = chats.ChatEncoder(tokenizer, settings)([Document("k", messages=messages)])
    assert ours.learnt.tolist() == [False, True, True, False, False]


def test_what_a_message_lacks_is_not_there_for_the_template(opened, tmp_path):
    """Rows of a table have every field; a message without it differs from one with None."""
    template = CHAT.replace("[user] ", "[user] {{ 'w9 ' if message.name is defined else '' }}")
    tokenizer = save_tokenizer(tmp_path / "chat", chat_template=template)
    named = {"role": "user", "content": "w10", "name": "w30"}
    path = tmp_path / "chats.parquet"
    pq.write_table(pa.table({"messages": [[named, *chat(("user", "w11"), ("assistant", "w20"))]]}), path)
    source = opened(path=path, tokenizer=tokenizer, messages_column="messages")
    assert tokens_of(source) == [[1, 9, 10, 1, 11, 2, 20, 0]]


def test_every_byte_of_the_assistants_last_character_is_learnt(bpe_settings):
    tokenizer = load_tokenizer(bpe_settings())
    tokenizer.chat_template = CHAT.replace(" <eos> ", "")
    messages = chat(("user", "hi "), ("assistant", "a\n \U0001f600"), ("user", " b"))
    (ours,) = chats.ChatEncoder(tokenizer, bpe_settings(messages_column="m"))(
        [Document("k", messages=messages)]
    )
    assert tokenizer.decode(ours.tokens[ours.learnt]) == "a\n \U0001f600"


@pytest.mark.parametrize(
    ("offsets", "passages", "expected"),
    [
        ([(0, 2), (2, 4), (4, 6)], [(2, 4)], [0, 1, 0]),
        ([(0, 3), (3, 6)], [(2, 4)], [1, 1]),  # tokens across its edges
        ([(0, 2), (2, 2), (3, 4), (4, 4)], [(2, 4)], [0, 1, 1, 0]),  # without width
        ([(0, 2), (2, 4)], [(2, 2)], [0, 0]),  # the assistant's message is empty
        ([(0, 1), (1, 2), (2, 3), (3, 4)], [(0, 1), (3, 9)], [1, 0, 0, 1]),
        ([], [(0, 3)], []),
    ],
)
def test_tokens_are_marked_by_where_they_are(offsets, passages, expected):
    assert chats.mark_tokens(offsets, passages).tolist() == expected


def test_a_mask_and_a_template_are_part_of_the_digest(opened, tmp_path):
    path = write_chats(tmp_path / "chats.jsonl", [chat(("user", "w10 w11"), ("assistant", "w20 w21"))])
    everything = "{% generation %}" + CHAT.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    templates = [CHAT, everything + "{% endgeneration %}"]
    one, other = (
        opened(
            path=path,
            tokenizer=save_tokenizer(tmp_path / str(number), chat_template=template),
            messages_column="messages",
        )
        for number, template in enumerate(templates)
    )
    assert tokens_of(one) == tokens_of(other)
    assert one.tokenizer_digest == other.tokenizer_digest
    assert one.digest != other.digest
    assert (one.num_rows().tolist(), other.num_rows().tolist()) == ([3], [6])


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        (None, SpecError, "no chat template, which chats need"),
        (
            "{{ messages[0].content }}",
            SourceError,
            "document 'train/0': the chat template does not show which part of it message 1, the assistant's, is; put",
        ),
        (
            CHAT + "{{ raise_exception('roles must alternate') }}",
            SourceError,
            "document 'train/0': the chat template refuses it: TemplateError: roles must alternate",
        ),
    ],
)
def test_what_is_wrong_with_a_chat_template_is_said(template, error, message, opened, tmp_path):
    path = write_chats(tmp_path / "chats.jsonl", [chat(("user", "w10"), ("assistant", "w20"))])
    tokenizer = save_tokenizer(tmp_path / "chat", chat_template=template)
    with pytest.raises(error, match=message):
        opened(path=path, tokenizer=tokenizer, messages_column="messages")
    assert not list((tmp_path / "data/tokens").glob("*"))


def test_chats_need_a_tokenizer_that_knows_places(monkeypatch, opened, tmp_path):
    path = write_chats(tmp_path / "chats.jsonl", [[], chat(("user", "w10"))])
    given = {"path": path, "messages_column": "messages"}
    tokenizer = save_tokenizer(tmp_path / "chat", chat_template=CHAT)
    with pytest.raises(SourceError, match="nothing to predict in 2 documents, 2 of them skipped"):
        opened(tokenizer=tokenizer, **given)
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(SpecError, match=r"cannot say where in a text its tokens are.*name a fast tokenizer"):
        opened(tokenizer=tokenizer, **given)


# -- digests -------------------------------------------------------------------------------------------------

TEXTS = numbered((3, 20), (40, 43), (50, 90), (100, 102))


def test_every_change_gives_another_digest(opened, tmp_path):
    shifted = save_tokenizer(tmp_path / "shifted", words=[*WORDS[:3], *reversed(WORDS[3:])])
    sources = {
        "as it was": opened(TEXTS, seq_len=8),
        "another tokenizer": opened(TEXTS, seq_len=8, tokenizer=shifted),
        "another length": opened(TEXTS, seq_len=9),
        "another packing": opened(TEXTS, seq_len=8, packing="documents"),
        "one word changed": opened([*TEXTS[:-1], "w100 w103"], seq_len=8),
        "order changed": opened([*TEXTS[1:], TEXTS[0]], seq_len=8),
        "document dropped": opened(TEXTS[:-1], seq_len=8),
        "first samples": opened(TEXTS, seq_len=8, max_train_samples=3),
    }
    assert len({source.digest for source in sources.values()}) == len(sources)
    assert len({source.tokenizer_digest for source in sources.values()}) == 2
    assert opened(TEXTS, seq_len=8).digest == sources["as it was"].digest


def test_keys_are_part_of_the_digest(opened, tmp_path):
    digests = set()
    for ids in (["a", "b", "c", "d"], ["a", "b", "c", "e"]):
        path = write_texts(tmp_path / "keyed.jsonl", TEXTS, id=ids)
        digests.add(opened(path=path, key_column="id", packing="documents").digest)
    assert len(digests) == 2


def test_segments_are_part_of_the_digest_and_of_fingerprints():
    tokens, learnt = np.arange(4, dtype=np.int32), np.ones(4, bool)
    contents = [
        TokenSample(tokens, np.array(segments, np.int32), mask).content
        for segments, mask in [
            ([0, 0, 0, 0], learnt),
            ([0, 0, 1, 1], learnt),
            ([0, 1, 1, 1], learnt),
            ([0, 0, 0, 0], ~learnt),
            ([0, 0, 0, 0], np.array([True, True, True, False])),
        ]
    ]
    assert all(content.dtype == np.int32 and content.shape == (2, 4) for content in contents)
    assert len({fingerprint("k", 0, content) for content in contents}) == 5


def test_an_edit_that_keeps_size_and_time_is_seen(opened, tmp_path):
    path = write_texts(tmp_path / "docs.jsonl", ["w10 w11", "w20 w21"])
    before, stat = opened(path=path), path.stat()
    path.write_text(path.read_text().replace("w11", "w12"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    after = opened(path=path)
    assert tokens_of(after) == [[10, 12, 0, 20, 21, 0]], "the datasets library served what it had cached"
    assert after.digest != before.digest


def test_a_dataset_that_moves_keeps_its_table(opened, tmp_path, monkeypatch):
    first = opened(TEXTS)
    (tmp_path / "docs.jsonl").rename(tmp_path / "moved.jsonl")
    monkeypatch.setattr(text, "_tokenize", None)
    moved = opened(path=tmp_path / "moved.jsonl")
    assert moved.digest == first.digest
    assert "moved" in moved.name


def test_digests_and_keys_do_not_depend_on_the_process(opened, tmp_path):
    source = opened(TEXTS, shuffle_documents=True, tokenizer="bpe?vocab_size=300", seq_len=16)
    given = {"path": str(tmp_path / "docs.jsonl"), "tokenizer": "bpe?vocab_size=300", "seq_len": 16}
    given |= {"modality": "text", "name": "hf", "eval_share": 1e-9}
    code = (
        "import sys, json; from softcache.data.sources import *\n"
        f"source = open_source({given!r} | {{'data_dir': sys.argv[1]}}, split='train')\n"
        "print(json.dumps([source.digest, source.tokenizer_digest, source.keys()]))"
    )
    expected = [source.digest, source.tokenizer_digest, source.keys()]
    done = subprocess.run(  # this process has another hash seed, a random one
        [sys.executable, "-c", code, str(tmp_path / "data-5")],
        env=os.environ | {"PYTHONHASHSEED": "5"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == expected


# -- splits, order and limits --------------------------------------------------------------------------------


def test_the_held_out_part_is_disjoint_complete_and_follows_the_key_alone(opened, tmp_path):
    path = write_texts(tmp_path / "many.jsonl", [f"w{10 + n} w{20 + n} w5" for n in range(100)])
    given = {"path": path, "packing": "documents", "eval_share": 0.3}
    train, held_out = opened(**given), opened(split="eval", **given)
    assert set(train.keys()) | set(held_out.keys()) == {f"train/{n}@0" for n in range(100)}
    assert not set(train.keys()) & set(held_out.keys())
    assert 15 < len(held_out) < 45
    # More documents never move those that are there.
    write_texts(path, [f"w{10 + n} w{20 + n} w5" for n in range(150)])
    assert set(opened(split="eval", **given).keys()) >= set(held_out.keys())


def test_the_order_is_mixed_by_key_and_the_maxima_take_the_first(opened, tmp_path):
    texts = [f"w{10 + n} w5" for n in range(60)]
    path = write_texts(tmp_path / "many.jsonl", texts)
    straight = opened(path=path, packing="documents")
    mixed = opened(path=path, packing="documents", shuffle_documents=True)
    assert straight.keys() == [f"train/{n}@0" for n in range(60)]
    assert sorted(mixed.keys()) == sorted(straight.keys())
    assert mixed.keys() != straight.keys()
    for number in range(60):
        document = int(mixed.key(number).split("/")[1].split("@")[0])
        assert mixed.sample(number).tokens.tolist() == [10 + document, 5, 0]
    part = opened(
        path=path, packing="documents", shuffle_documents=True, max_train_samples=7, max_eval_samples=1
    )
    assert part.keys() == mixed.keys()[:7]
    assert tokens_of(part) == tokens_of(mixed)[:7]
    assert part.num_rows().tolist() == [2] * 7
    assert opened(path=path, packing="documents", max_train_samples=1000).digest == straight.digest


def test_a_limit_stops_tokenising(opened, monkeypatch, tmp_path):
    path = write_texts(tmp_path / "many.jsonl", [f"w{10 + n} w5" for n in range(60)])
    asked = []
    encode = encoding.DocumentEncoder.__call__
    monkeypatch.setattr(encoding, "BATCH_DOCUMENTS", 4)
    monkeypatch.setattr(
        encoding.DocumentEncoder, "__call__", lambda self, batch: asked.extend(batch) or encode(self, batch)
    )
    assert len(opened(path=path, packing="documents", max_train_samples=6)) == 6
    assert len(asked) == 8


def test_a_split_of_the_datasets_own(opened, tmp_path):
    for name, first in (("train", 10), ("validation", 50)):
        write_texts(tmp_path / f"folder/{name}.jsonl", [f"w{first + n} w5" for n in range(3)])
    given = {"path": tmp_path / "folder", "eval_split": "validation", "packing": "documents"}
    train, validation = opened(**given), opened(split="eval", **given)
    assert (train.keys(), tokens_of(train)[0]) == ([f"train/{n}@0" for n in range(3)], [10, 5, 0])
    assert (validation.keys(), tokens_of(validation)[0]) == (
        [f"validation/{n}@0" for n in range(3)],
        [50, 5, 0],
    )
    with pytest.raises(SourceError, match=r"source.eval_split: 'train' is what is trained on"):
        opened(**given | {"eval_split": "train"})
    with pytest.raises(SourceError, match=r"split 'nope': cannot be loaded: ValueError: Unknown split"):
        opened(split="eval", **given | {"eval_split": "nope"})


# -- kinds of files ------------------------------------------------------------------------------------------


KINDS = ["jsonl", "json", "parquet", "txt", "txt with a mark", "folder of txt", "folder of parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_local_file(kind, opened, tmp_path):
    texts = numbered((10, 13), (20, 24))
    suffix = kind.removeprefix("folder of ").split()[0]
    path = tmp_path / "folder" / f"train.{suffix}"
    path.parent.mkdir()
    if suffix == "parquet":
        pq.write_table(pa.table({"other": [1, 2], "text": texts}), path)
    elif suffix == "txt":
        mark = codecs.BOM_UTF8.decode() if "mark" in kind else ""  # as Windows' editors write one
        path.write_text(mark + "\n\n\n".join(value.replace(" ", "\n", 1) for value in texts) + "\n")
    elif suffix == "json":
        path.write_text(json.dumps([{"text": value} for value in texts]))
    else:
        write_texts(path, texts)
    source = opened(path=path.parent if "folder" in kind else path)
    assert tokens_of(source) == [[10, 11, 12, 0, 20, 21, 22, 23, 0]]
    # Hidden files are no part of a dataset.
    (tmp_path / "folder/.notes").write_text("hidden")
    assert opened(path=path.parent if "folder" in kind else path)._folder == source._folder


def test_a_name_on_the_hub_is_loaded_as_it_is_and_found_again_by_its_fingerprint(opened, monkeypatch):
    asked = []

    def load_dataset(**arguments):
        asked.append(arguments)
        return datasets.Dataset.from_dict({"text": TEXTS}, split="train")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = opened(path="some/corpus", subset="en")
    assert asked == [{"path": "some/corpus", "name": "en", "split": "train"}]
    monkeypatch.setattr(text, "_tokenize", None)
    assert opened(path="some/corpus", subset="en").digest == source.digest


def test_everything_is_written_under_data_dir_and_little_is_said(tmp_path, words):
    path = write_texts(tmp_path / "docs.jsonl", TEXTS)
    given = {"modality": "text", "name": "hf", "path": str(path), "data_dir": str(tmp_path / "data")}
    given |= {"tokenizer": "bpe?vocab_size=300", "eval_share": 1e-9}
    code = (
        "from softcache.data.sources import *; import datasets\n"
        f"open_source({given!r}, split='train')\n"
        "assert not datasets.are_progress_bars_disabled()"
    )
    (tmp_path / "home").mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env | {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == [
        f"train bpe on {path}/train",
        f"tokenize {path}/train",
        f"source {path}/train",
    ]
    assert done.stdout == ""
    assert not list((tmp_path / "home").iterdir())
    assert {entry.name for entry in tmp_path.iterdir()} == {"docs.jsonl", "data", "home"}
    assert {entry.name for entry in (tmp_path / "data").iterdir()} == {"datasets", "tokenizers", "tokens"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": "nowhere.jsonl"}, r"source.path 'nowhere.jsonl': no such file"),
        (
            {"path": "{}/notes.md"},
            r"a file must end in .parquet, .arrow, .json, .jsonl, .csv, .*\.zst behind; found '.md'",
        ),
        ({"path": "some/corpus"}, r"source.path 'some/corpus', split 'train': cannot be loaded"),
        ({"path": "{}/broken.parquet"}, r"cannot be loaded: .*; check source.path"),
        ({"path": "{}/docs.jsonl", "text_column": "body"}, r"no column 'body'; it has text, id, number"),
        ({"path": "{}/docs.jsonl", "key_column": "nope"}, r"no column 'nope'; it has text, id, number"),
        ({"path": "{}/docs.jsonl", "key_column": "id"}, r"row 2: key 'a' in column 'id' comes twice"),
        (
            {"path": "{}/gaps.jsonl", "key_column": "id"},
            r"row 1: key None in column 'id' is neither text nor",
        ),
        ({"path": "{}/docs.jsonl", "text_column": "number"}, r"row 0: int in column 'number'; expected str"),
        ({"path": "{}/docs.jsonl", "messages_column": "text"}, r"row 0: str in column 'text'; expected list"),
        ({"path": "{}/blank.jsonl"}, r"nothing to predict in 2 documents, 2 of them skipped"),
    ],
)
def test_what_is_wrong_with_a_dataset_is_said(given, message, opened, tmp_path):
    write_texts(tmp_path / "docs.jsonl", ["w10 w11"] * 3, id=["a", "b", "a"], number=[1, 2, 3])
    write_texts(tmp_path / "gaps.jsonl", ["w10 w11"] * 2, id=["a", None])
    write_texts(tmp_path / "blank.jsonl", ["", " "])
    (tmp_path / "notes.md").write_text("# notes")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    if "messages_column" in given:
        given = given | {"tokenizer": save_tokenizer(tmp_path / "chat", chat_template=CHAT)}
    with pytest.raises(SourceError, match=message):
        opened(**given | {"path": given["path"].format(tmp_path)})
    assert not list((tmp_path / "data/tokens").glob(".*")), "a staged folder was left behind"


def test_keys_may_be_whole_numbers(opened, tmp_path):
    path = write_texts(tmp_path / "keyed.jsonl", ["w10 w11"] * 2, id=[7, 9])
    assert opened(path=path, key_column="id", packing="documents").keys() == ["7@0", "9@0"]


def test_without_a_path_there_is_no_dataset(words):
    with pytest.raises(SourceError, match=r"source.path: missing; give a hub name"):
        open_source({"modality": "text", "name": "hf", "tokenizer": words}, split="train")
    with pytest.raises(ValidationError, match=r"path\n.*not permitted"):
        source_settings({"modality": "text", "name": "stdlib", "tokenizer": words, "path": "x"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokenizer": None}, "tokenizer"),
        ({"modality": "image"}, "source 'stdlib': unknown"),
        (
            {"name": "c4"},
            "source 'c4': unknown; known: hf, megatron, mixture, parts, rollouts, stdlib, token_stream",
        ),
        ({"seq_len": 1}, "seq_len"),
        ({"eval_share": 1.0}, "eval_share"),
        ({"packing": "tight"}, "packing"),
        ({"max_train_samples": 0}, "max_train_samples"),
        ({"root": "x"}, "root"),
    ],
)
def test_settings_are_strict(given, message):
    with pytest.raises((ValidationError, SpecError), match=message):
        source_settings({"modality": "text", "name": "stdlib", "tokenizer": "bpe"} | given)


def test_a_missing_library_is_named_with_its_extra(opened, monkeypatch):
    for module in ("datasets", "transformers"):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingExtraError, match=rf"needs the package {module} .*'softcache\[text\]'"):
            opened(TEXTS)
        monkeypatch.undo()


def test_a_data_dir_that_cannot_be_written_is_named(opened, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"source.data_dir: cannot write .*file/tokens/"):
        opened(path=write_stdlib(tmp_path), data_dir=str(tmp_path / "file"), name="hf")


def write_stdlib(tmp_path):
    # Text files that datasets has nothing to write for: its cache would fail first.
    return write_texts(tmp_path / "docs.jsonl", TEXTS)


# -- tokenizers ----------------------------------------------------------------------------------------------


@pytest.fixture
def bpe_settings(tmp_path):
    path = write_texts(tmp_path / "docs.jsonl", TEXTS)

    def make(**given):
        defaults = {"modality": "text", "name": "hf", "path": str(path), "tokenizer": "bpe?vocab_size=300"}
        defaults |= {"data_dir": str(tmp_path / "data"), "eval_share": 1e-9}
        return source_settings(defaults | given)

    return make


def test_a_bpe_is_trained_once_and_always_the_same(bpe_settings, tmp_path, monkeypatch):
    first = load_tokenizer(bpe_settings())
    again = load_tokenizer(bpe_settings(data_dir=str(tmp_path / "elsewhere")))
    assert digest_tokenizer(first) == digest_tokenizer(again)
    assert first.get_vocab() == again.get_vocab()
    assert first.eos_token == "<|endoftext|>"
    assert 257 < len(first) < 300, "a small corpus has few pairs that come twice"
    assert first.decode(first("w3 w4\n\té \U0001f600")["input_ids"]) == "w3 w4\n\té \U0001f600"
    (folder,) = (tmp_path / "data/tokenizers").iterdir()
    assert digest_tokenizer(AutoTokenizer.from_pretrained(str(folder))) == digest_tokenizer(first)
    monkeypatch.setattr(tokenizers, "_train_bpe", None)
    assert load_tokenizer(bpe_settings()).get_vocab() == first.get_vocab()
    assert load_tokenizer(bpe_settings(tokenizer=str(folder))).get_vocab() == first.get_vocab()


def test_a_bpe_is_named_by_documents_and_arguments(bpe_settings, tmp_path):
    for given in (
        {},
        {"tokenizer": "bpe?vocab_size=280"},
        {"tokenizer": "bpe?vocab_size=300&min_frequency=9"},
    ):
        load_tokenizer(bpe_settings(**given))
    write_texts(tmp_path / "docs.jsonl", TEXTS[:-1])
    load_tokenizer(bpe_settings())
    assert len(list((tmp_path / "data/tokenizers").iterdir())) == 4
    load_tokenizer(bpe_settings(seq_len=9, packing="documents", max_train_samples=1))
    assert len(list((tmp_path / "data/tokenizers").iterdir())) == 4


def test_a_bpe_learns_from_the_train_split_alone(bpe_settings, tmp_path):
    path = write_texts(tmp_path / "docs.jsonl", [f"{'q' if n % 2 else 'zz'}{n} word" for n in range(200)])
    given = {"path": str(path), "eval_share": 0.5}
    train = list(bpe_settings(**given).documents("train"))
    held_out = list(bpe_settings(**given).documents("eval"))
    assert len(train) + len(held_out) == 200
    seen = []
    original = tokenizers._train_bpe

    def train_bpe(documents, **arguments):
        seen.extend(document.text for document in documents)
        return original(documents, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "_train_bpe", train_bpe)
        evaluation = open_text(bpe_settings(**given), split="eval")
        training = open_text(bpe_settings(**given), split="train")
    assert seen == [document.text for document in train], "it was trained twice, or on other documents"
    assert evaluation.tokenizer_digest == training.tokenizer_digest


def test_training_reads_no_further_than_the_maximum(bpe_settings, monkeypatch):
    whole = load_tokenizer(bpe_settings(tokenizer="bpe?vocab_size=400&min_frequency=1"))
    monkeypatch.setattr(tokenizers, "BPE_MAX_CHARACTERS", 20)
    part = tokenizers._train_bpe(bpe_settings().documents("train"), vocab_size=400, min_frequency=1)
    assert 257 < len(part) < len(whole)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bpe?vocab_size=256", r"vocab_size=256; expected vocab_size of at least 257"),
        ("bpe?vocab_size=big", r"vocab_size=big; expected"),
        ("bpe?vocab=300", r"vocab=300; expected"),
        ("bpe?min_frequency=0", r"min_frequency=0; expected"),
        (
            "no/such-tokenizer",
            r"source.tokenizer 'no/such-tokenizer': cannot be loaded: .* or bpe\?vocab_size",
        ),
    ],
)
def test_what_is_wrong_with_a_tokenizer_is_said(spec, message, bpe_settings):
    with pytest.raises(SpecError, match=message):
        load_tokenizer(bpe_settings(tokenizer=spec))


def test_a_bpe_has_no_chat_template(bpe_settings):
    with pytest.raises(SpecError, match=r"'bpe': it has no chat template, which chats need"):
        load_tokenizer(bpe_settings(tokenizer="bpe", messages_column="text"))


def test_the_digest_of_a_tokenizer_is_of_what_it_does(words, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(words)
    before = digest_tokenizer(tokenizer)
    tokenizer(
        ["w3 w4", "w3"], padding="max_length", truncation=True, max_length=8
    ) if tokenizer.pad_token else None
    tokenizer("w3 w4", truncation=True, max_length=1)
    tokenizer.chat_template = CHAT
    assert digest_tokenizer(tokenizer) == before
    assert digest_tokenizer(AutoTokenizer.from_pretrained(save_tokenizer(tmp_path / "copy"))) == before
    tokenizer.add_tokens(["w1000"])
    assert digest_tokenizer(tokenizer) != before

    class Slow:
        special_tokens_map = None

        def get_vocab(self):
            return {"a": 0}

    assert digest_tokenizer(Slow()) not in ("", before)


def test_ids_outside_the_vocabulary_are_refused(opened, tmp_path):
    holes = save_tokenizer(tmp_path / "holes")
    path = Path(holes) / "tokenizer.json"
    described = json.loads(path.read_text())
    described["model"]["vocab"]["w11"] = 5000
    path.write_text(json.dumps(described))
    with pytest.raises(
        SourceError, match=r"token 5000 in the table; expected all below the vocabulary's 200"
    ):
        opened(["w10 w11"], tokenizer=holes)
    assert not list((tmp_path / "data/tokens").iterdir())
    assert opened(["w10 w12"], tokenizer=holes).vocab_size == 200


# -- made once, and whole ------------------------------------------------------------------------------------


def test_a_second_open_tokenizes_nothing(opened, monkeypatch):
    first = opened(TEXTS)
    monkeypatch.setattr(text, "_tokenize", None)
    second = opened(TEXTS)
    assert second.digest == first.digest
    assert tokens_of(second) == tokens_of(first)


def test_what_is_not_whole_is_made_again(opened, tmp_path):
    source = opened(TEXTS)
    folder, expected = source._folder, source.sample(0).tokens.tolist()
    table, samples = (folder / "table.json").read_text(), (folder / "samples.arrow").read_bytes()
    damages = {
        "no table.json": lambda: (folder / "table.json").unlink(),
        "half of table.json": lambda: (folder / "table.json").write_text(table[: len(table) // 2]),
        "no samples": lambda: (folder / "samples.arrow").unlink(),
        "half of the samples": lambda: (folder / "samples.arrow").write_bytes(samples[: len(samples) // 2]),
    }
    for name, damage in damages.items():
        damage()
        with pytest.raises(SourceError, match=r"the table .* is not whole; remove the folder"):
            TokenSource(folder, name="docs")
        assert opened(TEXTS).sample(0).tokens.tolist() == expected, name
        assert (folder / "samples.arrow").read_bytes() == samples, name
    assert [entry.name for entry in (tmp_path / "data/tokens").iterdir()] == [folder.name]


def test_a_staged_folder_of_a_killed_process_is_never_used(opened, tmp_path):
    source = opened(TEXTS)
    folder = source._folder
    staged = folder.with_name(f".{folder.name}.12345678")
    folder.rename(staged)  # as if killed right before its last step
    (staged / "samples.arrow").write_bytes(b"half")
    again = opened(TEXTS)
    assert tokens_of(again) == tokens_of(source)
    assert staged.exists()


CODE = """
import os, signal, sys
from softcache.data.sources import open_source
from softcache.data.sources.text import table as token_table
given = {given!r}
if sys.argv[1] == "kill":
    add, left = token_table.TableWriter.add, [3]
    def add_or_die(self, cut):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, cut)
    token_table.TableWriter.add = add_or_die
source = open_source(given, split="train")
print(source.digest)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_that_is_used_and_two_at_once_agree(tmp_path, words):
    path = write_texts(tmp_path / "docs.jsonl", numbered(*[(3, 190)] * 40))
    given = {"modality": "text", "name": "hf", "path": str(path), "tokenizer": "bpe?vocab_size=270"}
    given |= {"data_dir": str(tmp_path / "data"), "seq_len": 16, "eval_share": 1e-9}

    def start(how):
        return Program(CODE.format(given=given), how)

    killed = start("kill")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    tables = tmp_path / "data/tokens"
    assert [entry.name[0] for entry in tables.iterdir()] == ["."]
    together = [start("run"), start("run")]
    outputs = [process.communicate() for process in together]
    assert [process.returncode for process in together] == [0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert len([entry for entry in tables.iterdir() if entry.name[0] != "."]) == 1
    assert len(list(tables.iterdir())) == 2, "a builder left its staged folder"


def test_a_faster_process_is_left_its_table(opened, monkeypatch, tmp_path):
    """The table appears between the check and the last step: as if another process had been faster."""
    source = opened(TEXTS)
    made = (source._folder / "table.json").stat().st_ino
    arguments = []
    tokenize = text._tokenize
    monkeypatch.setattr(text, "_tokenize", lambda *given: arguments.append(given))
    with monkeypatch.context() as patch:
        for module in (text, token_table):
            patch.setattr(module, "described_table", lambda folder: None)
        with pytest.raises(SourceError, match="not whole"):
            opened(TEXTS)
    tokenize(*arguments[0])
    assert (source._folder / "table.json").stat().st_ino == made
    assert len(list((tmp_path / "data/tokens").iterdir())) == 1


def test_the_datasets_library_reads_the_table(opened):
    source = opened(TEXTS, seq_len=8)
    table = datasets.Dataset.from_file(str(source._folder / "samples.arrow"))
    assert table["key"][:] == source.keys()
    assert table["tokens"][:] == tokens_of(source)
    assert sum(table["num_rows"][:]) == source.num_rows().sum()


# -- reading -------------------------------------------------------------------------------------------------


def test_a_source_is_pickled_without_its_contents_and_opened_by_each_process(opened, tmp_path, monkeypatch):
    source = opened(TEXTS * 50, seq_len=4, data_dir=str(tmp_path / "data"))
    source.sample(0)
    pickled = pickle.dumps(source)
    assert len(pickled) < 1500
    copy = pickle.loads(pickled)
    assert copy._opened is None
    monkeypatch.chdir("/")
    assert tokens_of(copy) == tokens_of(source)
    assert (copy.digest, copy.keys(), len(copy)) == (source.digest, source.keys(), len(source))


def test_a_relative_data_dir_is_found_from_elsewhere(opened, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = opened(TEXTS, data_dir="here")
    monkeypatch.chdir("/")
    assert source.sample(0).tokens[0] == 3


def test_loader_processes_read_it(opened):
    source = opened(TEXTS, seq_len=4)
    data = TokenData(source)
    loader = torch.utils.data.DataLoader(
        range(len(source)), batch_size=3, num_workers=2, collate_fn=data.load, multiprocessing_context="fork"
    )
    prints = np.concatenate([batch.fingerprints for batch in loader])
    assert np.array_equal(prints, data.load(range(len(source))).fingerprints)


def test_there_is_no_sample_beyond_the_last(opened):
    source = opened(TEXTS, seq_len=8)
    for number in (-1, len(source)):
        for read in (source.sample, source.key):
            with pytest.raises(IndexError, match=f"sample {number} of {len(source)}"):
                read(number)
    assert source.key(np.int64(1)) == source.keys()[1]


def test_samples_are_views_of_the_file_and_cannot_be_written(opened):
    source = opened(TEXTS, seq_len=8)
    sample = source.sample(1)
    assert not sample.tokens.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        sample.tokens[0] = 1


def test_reading_is_fast_and_memory_stays_flat(opened, tmp_path):
    """A million tokens; the bounds are ten times what was measured."""
    path = write_texts(tmp_path / "long.jsonl", numbered((3, 200)) * 5000)
    source = opened(path=path)
    assert source.num_tokens >= 990_000
    source.sample(0)
    process = psutil.Process()
    before, started = process.memory_full_info().uss, time.perf_counter()
    for number in range(len(source)):
        source.sample(number)
    assert (time.perf_counter() - started) / len(source) < 50e-6
    assert process.memory_full_info().uss - before < 2**20


# -- batches -------------------------------------------------------------------------------------------------


def same(one, other):
    for name in ("tokens", "segments", "rows", "targets", "lengths", "row_counts", "samples", "fingerprints"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_a_batch_agrees_with_its_samples(opened):
    source = opened(TEXTS, seq_len=16, packing="documents")
    data, numbers = TokenData(source), [3, 0, 2, 1, 3]
    batch = data.load(numbers)
    length = max(len(source.sample(number).tokens) for number in numbers)
    assert batch.tokens.shape == batch.segments.shape == (5, length)
    assert {batch.tokens.dtype, batch.segments.dtype, batch.rows.dtype, batch.targets.dtype} == {torch.int64}
    assert (batch.samples.tolist(), batch.samples.dtype, batch.view, batch.unit) == (
        numbers,
        np.int64,
        0,
        None,
    )
    assert (len(data), len(batch), batch.num_rows) == (len(source), 5, len(batch.rows))
    rows, targets = [], []
    for place, number in enumerate(numbers):
        sample = source.sample(number)
        here = len(sample.tokens)
        assert batch.tokens[place].tolist() == [*sample.tokens.tolist(), *[0] * (length - here)]
        padding = [int(sample.segments[-1]) + 1] * (length - here)
        assert batch.segments[place].tolist() == [*sample.segments.tolist(), *padding]
        rows += [place * length + t for t in sample.rows.tolist()]
        targets += [int(sample.tokens[t + 1]) for t in sample.rows.tolist()]
        assert batch.row_counts[place] == len(sample.rows)
        assert batch.lengths[place] == here
        assert int(batch.fingerprints[place]) == fingerprint(source.key(number), 0, sample.content)
    assert batch.rows.tolist() == rows == sorted(rows)
    assert batch.targets.tolist() == targets
    assert batch.row_counts.tolist() == source.num_rows()[numbers].tolist()


def test_fingerprints_are_taken_where_asked_for(opened):
    data = TokenData(opened(TEXTS, seq_len=8))
    every = data.load([0, 1, 2]).fingerprints
    assert every.dtype == np.uint64
    assert len(set(every.tolist())) == 3
    assert data.load([0, 1, 2], 0, fingerprints=False).fingerprints.tolist() == [0, 0, 0]
    masked = data.load([0, 1, 2], 0, fingerprints=np.array([False, True, False])).fingerprints
    assert masked.tolist() == [0, every[1], 0]


def test_an_empty_batch_is_empty(opened):
    batch = TokenData(opened(TEXTS)).load([])
    assert (batch.tokens.shape, batch.num_rows, len(batch.fingerprints), len(batch.positions)) == (
        (0, 0),
        0,
        0,
        0,
    )


@pytest.mark.parametrize("pieces", [1, 2, 3, 5, 9])
def test_a_batch_is_split_and_merged_without_loss(pieces, opened):
    data = TokenData(opened(TEXTS, seq_len=16, packing="documents"))
    batch = data.load(range(5))
    labels = dense(torch.randn(batch.num_rows, 7, generator=torch.Generator().manual_seed(0)))
    batch = TokenBatch(
        **{name: getattr(batch, name) for name in batch.__dataclass_fields__} | {"labels": labels}
    )
    parts = batch.split(pieces)
    assert 1 <= len(parts) <= pieces
    assert np.concatenate([part.samples for part in parts]).tolist() == [0, 1, 2, 3, 4]
    for part in parts:
        assert np.array_equal(part.tokens.reshape(-1)[part.rows + 1], part.targets)
        assert part.num_rows == part.row_counts.sum() == len(part.labels)
        alone = data.load(part.samples)
        assert alone.targets.tolist() == part.targets.tolist()
        assert alone.positions.tolist() == part.positions.tolist()
    same(TokenBatch.merge(parts), batch)
    assert np.array_equal(TokenBatch.merge(parts).labels.log_probs, labels.log_probs)
    # Batches padded to other lengths become what one load of all gives.
    same(TokenBatch.merge([data.load([number]) for number in range(5)]), data.load(range(5)))
    same(TokenBatch.merge([data.load([1, 2]), data.load([0])]), data.load([1, 2, 0]))


def test_a_batch_moves_to_a_device(opened):
    batch = TokenData(opened(TEXTS, seq_len=8)).load([0, 1])
    same(batch.to(torch.device("cpu")), batch)
    assert batch.to(torch.device("meta")).rows.device.type == "meta"


@pytest.mark.gpu
def test_a_batch_is_pinned_and_moves_to_a_gpu(opened):
    batch = TokenData(opened(TEXTS, seq_len=8)).load([0, 1]).pin_memory()
    assert batch.tokens.is_pinned()
    moved = batch.to(torch.device("cuda"))
    assert moved.targets.tolist() == batch.targets.tolist()
    assert moved.positions.tolist() == batch.positions.tolist()


def test_text_has_one_view(opened):
    data = TokenData(opened(TEXTS))
    assert data.kind == "tokens"
    identity = data.identity(1)
    assert identity["tokenizer"] == {"digest": data.source.tokenizer_digest, "vocab_size": 200}
    assert TokenData(data.source, cross_documents=True).identity(1) != identity
    with pytest.raises(SourceError, match="2 views; text has one view only"):
        data.identity(2)
    with pytest.raises(SourceError, match="view 1; text has one view only, number 0"):
        data.load([0], 1)
    assert pickle.loads(pickle.dumps(data)).load([0]).tokens.tolist() == data.load([0]).tokens.tolist()


# -- the standard library ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stdlib_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("stdlib"))


def stdlib(stdlib_dir, **given):
    defaults = {
        "modality": "text",
        "name": "stdlib",
        "tokenizer": "bpe?vocab_size=4096",
        "data_dir": stdlib_dir,
    }
    return source_settings(defaults | given)


def test_the_standard_library_is_split_by_file(stdlib_dir):
    train, held_out = (list(stdlib(stdlib_dir).documents(split)) for split in ("train", "eval"))
    keys = [document.key for document in train + held_out]
    assert len(set(keys)) == len(keys) > 400
    assert 0.04 < len(held_out) / len(keys) < 0.2
    assert {"asyncio/events.py", "dataclasses.py"} <= set(keys)
    assert not [key for key in keys if {"test", "tests", "site-packages"} & set(key.split("/"))]
    assert not [key for key in keys if key.startswith(("_sysconfigdata", "config-", "sitecustomize"))]
    (document,) = [document for document in train + held_out if document.key == "dataclasses.py"]
    assert "def dataclass(" in document.text
    documents = stdlib(stdlib_dir).documents("eval")
    assert len(documents) == len(held_out)
    assert documents.digest == stdlib(stdlib_dir).documents("eval").digest
    assert documents.digest != stdlib(stdlib_dir, shuffle_documents=False).documents("eval").digest


def test_the_standard_library_is_tokenized_once(stdlib_dir, monkeypatch):
    given = stdlib(stdlib_dir, max_train_samples=500)
    train, held_out = open_text(given, split="train"), open_text(given, split="eval")
    assert len(train) == 500
    assert len(held_out) > 500
    assert train.vocab_size == 4096
    tokenizer = load_tokenizer(given)
    first = next(iter(given.documents("train")))
    start = tokenizer.decode(train.sample(0).tokens)
    assert start.startswith(first.text[:100])
    monkeypatch.setattr(text, "_tokenize", None)
    monkeypatch.setattr(tokenizers, "_train_bpe", None)
    monkeypatch.setitem(sys.modules, "transformers", None)  # its import alone costs more than the rest
    started = time.perf_counter()
    again = open_text(given, split="train")
    assert time.perf_counter() - started < 2, "0.1 s were measured"
    assert again.digest == train.digest
