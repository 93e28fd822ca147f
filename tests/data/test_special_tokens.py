"""The tokens that a tokenizer puts around a text: as the model was trained, once per document, at each piece's start."""

import json
from functools import partial

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from softcache.data.sources import source_settings
from softcache.data.sources.text.packing import Account, Encoded, cut_documents
from softcache.data.sources.text.saved_tokenizer import check_tokenizer_is_saved, save_with_tokenizer
from softcache.data.sources.text.source import open_text
from softcache.data.sources.text.special_tokens import special_tokens
from softcache.data.sources.text.tokenizer import train_byte_level
from softcache.data.tokens import TokenData
from softcache.errors import SourceError, SpecError
from softcache.runs import open_data
from tests.data.test_text_source import WORDS, save_tokenizer, write_texts
from tests.support.text_caches import text_config

BOS, EOS = 1, 0
CHAT = (
    "{{ '<bos> ' }}{% for m in messages %}{% if m.role == 'assistant' %}[assistant] {% generation %}{{ m.content }} "
    "<eos> {% endgeneration %}{% else %}w9 {{ m.content }} {% endif %}{% endfor %}"
)


def with_bos(folder, *, template="<bos> $A", chat_template=None):
    """A word-level tokenizer whose post-processor puts tokens around a text; [user] is <bos>, with the id 1."""
    words = ["<eos>", "<bos>", *WORDS[2:]]
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(folder, words=words))
    tokenizer.backend_tokenizer.add_special_tokens(["<bos>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<bos>", eos_token="<eos>"
    )
    wrapped.chat_template = chat_template
    wrapped.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture
def opened(tmp_path):
    def open_(texts, tokenizer, **given):
        path = write_texts(tmp_path / "docs.jsonl", texts)
        table = {
            "modality": "text",
            "name": "hf",
            "path": str(path),
            "tokenizer": tokenizer,
            "eval_share": 1e-9,
        }
        table |= {"shuffle_documents": False, "data_dir": str(tmp_path / "data")}
        return open_text(source_settings(table | given), split="train")

    return open_


def tokens_of(source):
    return [source.sample(number).tokens.tolist() for number in range(len(source))]


def test_a_text_begins_as_its_tokenizer_begins_it(opened, tmp_path):
    source = opened(["w10 w11", "w12"], with_bos(tmp_path / "t"))
    assert tokens_of(source) == [[BOS, 10, 11, EOS, BOS, 12, EOS]]
    # BOS predicts the first word; nothing predicts BOS.
    assert TokenData(source).load([0]).targets.tolist() == [10, 11, EOS, 12, EOS]
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "t"))
    assert source.sample(0).tokens[:3].tolist() == theirs("w10 w11")["input_ids"]


def test_what_the_tokenizer_ends_a_text_with_is_not_put_there_twice(opened, tmp_path):
    source = opened(["w10 w11"], with_bos(tmp_path / "t", template="<bos> $A <eos>"))
    assert tokens_of(source) == [[BOS, 10, 11, EOS]]


@pytest.mark.parametrize("bos", ["auto", True, False])
def test_a_text_that_has_its_special_tokens_gets_none_twice(opened, tmp_path, bos):
    """As in columns of text that a chat template wrote."""
    texts = ["<bos> w10 w11 <eos>", "w10 <eos> w11", "<bos> w12", "<eos>"]
    source = opened(texts, with_bos(tmp_path / "t"), bos=bos, packing="documents")
    first = [] if bos is False else [BOS]
    expected = [[*first, 10, 11, EOS], [*first, 10, EOS, 11, EOS], [*first, 12, EOS], [*first, EOS]]
    assert tokens_of(source) == (
        expected[:3] if bos is False else expected
    )  # one token has nothing to predict
    assert not first or not any(source.sample(number).learnt[0] for number in range(len(source)))


def test_a_prompt_with_the_first_token_and_an_answer_with_the_last_get_none_twice(opened, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [("<bos> w10 ", "w11 <eos>"), ("w10 ", "w11"), ("<bos> w10 ", "w11")]
    path.write_text("".join(json.dumps({"p": prompt, "c": answer}) + "\n" for prompt, answer in rows))
    columns = {"prompt_column": "p", "completion_column": "c", "packing": "documents"}
    source = opened([], with_bos(tmp_path / "t"), path=str(path), **columns)
    assert tokens_of(source) == [[BOS, 10, 11, EOS]] * 3
    assert [source.sample(n).learnt.tolist() for n in range(3)] == [[False, False, True, True]] * 3


@pytest.mark.parametrize(
    ("template", "bos", "expected"),
    [
        ("<bos> $A", "auto", [BOS, 10, EOS]),
        ("<bos> $A", True, [BOS, 10, EOS]),
        ("<bos> $A", False, [10, EOS]),
        ("$A", "auto", [10, EOS]),
        ("$A", True, [BOS, 10, EOS]),
    ],
)
def test_bos_can_be_asked_for_and_left_out(opened, tmp_path, template, bos, expected):
    source = opened(["w10"], with_bos(tmp_path / "t", template=template), bos=bos)
    assert tokens_of(source) == [expected]
    identity = TokenData(source).identity(1)["tokenizer"]
    assert identity.get("prefix", []) == ([BOS] if BOS in expected else [])


@pytest.mark.parametrize("template", ["<bos> $A", "<bos> $A <eos>", "$A", "$A <eos>"])
@pytest.mark.parametrize("bos", ["auto", True, False])
def test_the_tokenizer_next_to_a_model_begins_texts_as_the_training_did(template, bos, tmp_path):
    folder = with_bos(tmp_path / "t", template=template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = special_tokens(tokenizer, bos=bos, of="t").prefix
    plain = tokenizer("w10 w11", add_special_tokens=False)["input_ids"]
    after = tokenizer("w10 w11")["input_ids"][len(plain) + ("<bos>" in template) :]
    save_with_tokenizer(tmp_path / "model", tokenizer, bos=bos)
    saved = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert saved("w10 w11")["input_ids"] == [*before, *plain, *after]


@pytest.mark.parametrize("bos", ["auto", True, False])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    "name", ["GPTNeoXTokenizer", "CodeLlamaTokenizer", "RobertaTokenizer", "LlamaTokenizer"]
)
def test_a_class_that_makes_its_template_anew_is_saved_as_it_began_texts(name, own, bos, tmp_path):
    """What was written was lost when transformers loaded it: GPT-NeoX began texts with nothing, CodeLlama with <s>."""
    model = json.loads(
        train_byte_level(
            ["hello world"] * 9, special_tokens=["<s>", "</s>"], vocab_size=280, min_frequency=1
        ).to_str()
    )["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "</s>"}
    tokenizer = getattr(transformers, name)(vocab=model["vocab"], merges=merges, add_bos_token=own, **tokens)
    before = special_tokens(tokenizer, bos=bos, of="t").prefix
    ids = tokenizer("hello world", add_special_tokens=False)["input_ids"]
    check_tokenizer_is_saved(tokenizer, bos)
    save_with_tokenizer(tmp_path, tokenizer, bos=bos)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved("hello world")["input_ids"][: len(before) + len(ids)] == [*before, *ids]
    assert (saved.bos_token, saved.eos_token) == ("<s>", "</s>")


def slow_tokenizer(folder):
    """One of Python alone, which begins texts with nothing."""
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({"<unk>": 0, "a": 1, "b": 2, "<s>": 3}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = {"vocab_file": str(folder / "vocab.json"), "merges_file": str(folder / "merges.txt")}
    transformers.CTRLTokenizer(**files, bos_token="<s>").save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_that_cannot_be_saved_as_it_begins_texts_is_refused_before_a_training(opened, tmp_path):
    folder = slow_tokenizer(tmp_path / "t")
    assert tokens_of(opened(["a b a"], folder, bos=True)) == [[3, 1, 2, 1]]  # what is labeled is right
    message = r"CTRLTokenizer\): saved, it begins texts with \[\]; expected \[3\].*source\.bos = true.*; set source\.bos"
    config = text_config(tmp_path, source={"tokenizer": folder, "bos": True})
    task = partial(open_data(config).task, config, "gpt2?width=16&depth=1&heads=2")
    with pytest.raises(SpecError, match=message):
        task()
    plain = text_config(tmp_path, source={"tokenizer": folder})
    open_data(plain).task(plain, "gpt2?width=16&depth=1&heads=2")


@pytest.mark.parametrize(
    ("own", "ends"), [(None, 0), (7, [7, 0]), ([7, 9], [7, 9, 0]), ([0, 7], [0, 7]), (0, 0)]
)
def test_a_generation_ends_where_the_texts_of_the_training_ended(own, ends, tmp_path):
    GenerationConfig(eos_token_id=own).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(with_bos(tmp_path / "t"))
    assert tokenizer.eos_token_id == 0
    save_with_tokenizer(tmp_path, tokenizer)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == ends


def test_a_generation_ends_with_what_the_tokenizer_ends_texts_with_where_it_has_no_end_of_text(tmp_path):
    """As BERT's does with [SEP]; the ids of a configuration that was copied are of another vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(with_bos(tmp_path / "t", template="<bos> $A <eos>"))
    tokenizer.eos_token = None
    (tmp_path / "config.json").write_text('{"vocab_size": 64}')
    GenerationConfig(eos_token_id=50256, bos_token_id=50256, pad_token_id=5).save_pretrained(tmp_path)
    save_with_tokenizer(tmp_path, tokenizer)
    found = GenerationConfig.from_pretrained(tmp_path)
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (BOS, EOS, 5)


def test_a_tokenizer_without_bos_cannot_be_asked_for_one(opened, tmp_path):
    with pytest.raises(SpecError, match=r"has no BOS token, which source\.bos = true asks for"):
        opened(["w10"], save_tokenizer(tmp_path / "t"), bos=True)


def test_a_text_without_words_is_skipped(opened, tmp_path):
    source = opened(["", "w10", "  "], with_bos(tmp_path / "t"))
    assert (tokens_of(source), source.account["skipped"]) == ([[BOS, 10, EOS]], 2)


@pytest.mark.parametrize("packing", ["packed", "documents", "best_fit"])
def test_a_continued_document_begins_with_bos_again(opened, tmp_path, packing):
    """A segment is read by itself; a model that was never without BOS is not without it there."""
    source = opened(
        [" ".join(f"w{n}" for n in range(10, 17))], with_bos(tmp_path / "t"), seq_len=4, packing=packing
    )
    assert tokens_of(source) == [[BOS, 10, 11, 12], [BOS, 13, 14, 15], [BOS, 16, EOS]]
    assert source.keys() == ["train/0@0", "train/0@4", "train/0@7"]
    # The first word of a continuation is not learned: what predicts it is in the sample before.
    targets = [TokenData(source).load([n]).targets.tolist() for n in range(3)]
    assert targets == [[10, 11, 12], [14, 15], [EOS]]


def test_a_sample_ends_before_a_prefix_that_leads_to_nothing(opened, tmp_path):
    source = opened(["w10 w11", "w12 w13 w14", "w15"], with_bos(tmp_path / "t"), seq_len=5)
    assert tokens_of(source) == [[BOS, 10, 11, EOS], [BOS, 12, 13, 14, EOS], [BOS, 15, EOS]]


def test_a_length_that_holds_no_row_is_refused(opened, tmp_path):
    with pytest.raises(SourceError, match=r"source\.seq_len: 2 holds no row after the 1 tokens"):
        opened(["w10 w11"], with_bos(tmp_path / "t"), seq_len=2)


def test_letters_of_a_special_token_are_made_anew_where_the_tokenizer_takes_them_apart(opened, tmp_path):
    """Which is a setting of the tokenizer, and no part of its vocabulary."""
    backend = train_byte_level(["a few words"], special_tokens=["<end>"], vocab_size=257, min_frequency=1)
    for splits, length in ((False, 6), (True, 10)):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token="<end>", split_special_tokens=splits
        )
        tokenizer.save_pretrained(str(tmp_path / "t"))
        source = opened(["ab<end>cd"], str(tmp_path / "t"))
        assert len(source.sample(0).tokens) == length
        theirs = AutoTokenizer.from_pretrained(str(tmp_path / "t"))("ab<end>cd")["input_ids"]
        assert source.sample(0).tokens.tolist() == [*theirs, 0]


@pytest.mark.parametrize(("bos", "expected"), [("auto", 1), (True, 1), (False, 0)])
def test_a_chat_whose_template_writes_bos_has_it_once(tmp_path, bos, expected):
    chat = [{"role": "user", "content": "w10"}, {"role": "assistant", "content": "w20"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    table = {
        "modality": "text",
        "name": "hf",
        "path": str(tmp_path / "chats.jsonl"),
        "eval_share": 1e-9,
        "bos": bos,
    }
    table |= {"tokenizer": with_bos(tmp_path / "t", chat_template=CHAT), "messages_column": "messages"}
    source = open_text(source_settings(table | {"data_dir": str(tmp_path / "data")}), split="train")
    (tokens,) = tokens_of(source)
    assert tokens == [BOS] * expected + [9, 10, 2, 20, EOS]
    assert TokenData(source).load([0]).targets.tolist() == [20, EOS]


def test_the_tokens_of_a_table_are_those_of_the_tokenizer(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(with_bos(tmp_path / "t", template="<bos> $A <eos>"))
    around = special_tokens(tokenizer, bos="auto", of="t")
    assert (around.prefix, around.suffix) == ((BOS,), (EOS,))


@pytest.mark.parametrize("model", ["WordLevel", "BPE"])
def test_a_tokenizer_of_few_letters_has_its_tokens_around_a_text(model, opened, tmp_path):
    """One without "a" and without an unknown token makes nothing of "a", or refuses it."""
    letters = {token: number for number, token in enumerate(["<s>", "</s>", *"ACGT"])}
    backend = Tokenizer(models.WordLevel(letters) if model == "WordLevel" else models.BPE(letters, []))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert special_tokens(tokenizer, bos="auto", of="t") == ((0,), (1,))
    tokenizer.save_pretrained(tmp_path / "t")
    assert tokens_of(opened(["ACGT", "CC"], str(tmp_path / "t"))) == [[0, 2, 3, 4, 5, 1, 0, 3, 3, 1]]
    if model == "WordLevel":
        message = r"refuses the text 'Na'.*: WordLevel error.*; expected a tokenizer with a token for what it does not know"
        with pytest.raises(SourceError, match=message):
            opened(["ACGT", "Na"], str(tmp_path / "t"))


def test_tokens_that_are_not_around_a_text_are_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(with_bos(tmp_path / "t"))

    class Changing(type(tokenizer)):
        def __call__(self, text, **given):
            return super().__call__(text, **given) if given else {"input_ids": [BOS, 7]}

    tokenizer.__class__ = Changing
    with pytest.raises(SpecError, match=r"t: makes \[3\] of 'a', and \[1, 7\] with special tokens"):
        special_tokens(tokenizer, bos="auto", of="t")


# -- best-fit packing ----------------------------------------------------------------------------------------


def documents_of(lengths, has_prompt=False):
    flat = iter(range(1, 1 + sum(lengths)))
    for number, length in enumerate(lengths):
        tokens = np.array([next(flat) for _ in range(length)], np.int32)
        yield Encoded(f"d{number}", tokens, np.ones(length, bool), has_prompt=has_prompt)


def cut(lengths, seq_len, *, packing="best_fit", has_prompt=False):
    account = Account()
    documents = documents_of(lengths, has_prompt)
    return list(cut_documents(documents, packing=packing, seq_len=seq_len, account=account)), account


def test_best_fit_puts_whole_documents_where_the_least_room_is_left():
    samples, _ = cut([5, 3, 7, 2, 4, 3], seq_len=8)
    # 7; 5+3; 4+3; 2 where 8-7=1 has no room, after 5+3 there is none, after 4+3 there is none
    assert [sample.lengths.tolist() for sample in samples] == [[5, 3], [7], [2], [4, 3]]
    assert [sample.key for sample in samples] == ["d0@0", "d2@0", "d3@0", "d4@0"]


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_loses_nothing_and_is_fuller_than_first_fit(seed):
    rng = np.random.default_rng(seed)
    lengths, seq_len = rng.integers(2, 60, 200).tolist(), 50
    samples, account = cut(lengths, seq_len)
    tokens = np.concatenate([sample.sample.tokens for sample in samples])
    lost = account.left_out  # the last token of a longer document, alone in a sample
    assert len(set(tokens.tolist())) == len(tokens) == sum(lengths) - lost
    assert all(len(sample.sample.tokens) <= seq_len for sample in samples)
    first_fit: list[int] = []
    pieces = [p for n in lengths for p in ([50, n - 50] if n > 50 else [n])]
    for piece in pieces:
        place = next((n for n, used in enumerate(first_fit) if used + piece <= seq_len), None)
        if place is None:
            first_fit.append(piece)
        else:
            first_fit[place] += piece
    assert len(samples) <= len(first_fit)


def test_documents_with_prompts_are_truncated_from_the_right_and_counted():
    samples, account = cut([5, 12, 3], seq_len=8, has_prompt=True)
    assert [sample.lengths.tolist() for sample in samples] == [[5, 3], [8]]
    assert (account.documents, account.truncated, account.cut_tokens, account.dropped) == (3, 1, 4, 0)
    assert "3 documents, 1 truncated by 4 tokens in all" in str(account)


def test_a_prompt_that_fills_a_sample_is_dropped_and_counted():
    learnt = np.arange(12) >= 9
    document = Encoded("d", np.arange(12, dtype=np.int32), learnt, has_prompt=True)
    account = Account()
    assert list(cut_documents([document], packing="best_fit", seq_len=8, account=account)) == []
    assert (account.documents, account.dropped) == (0, 1)


def test_a_document_with_a_prompt_is_not_packed_whatever_source_it_is_of():
    with pytest.raises(SourceError, match=r'document .d0.: source\.packing = "packed" would cut its answer'):
        cut([5, 3], seq_len=8, packing="packed", has_prompt=True)


def test_windows_bound_what_is_held(monkeypatch):
    monkeypatch.setattr("softcache.data.sources.text.packing.WINDOW_TOKENS", 10)
    samples, _ = cut([5, 7, 3], seq_len=8)
    assert [sample.lengths.tolist() for sample in samples] == [[5], [7], [3]]


# -- what a tokenizer does not know ------------------------------------------------------------------------


def test_unknown_tokens_are_counted_and_called_out(opened, tmp_path, capsys):
    """A BERT tokenizer made of a list of tokens alone takes the bracketed ones, which are not registered as special, apart."""
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "A", "C", "[HEAVY]"]
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(words))
    BertTokenizerFast(str(path), do_lower_case=False).save_pretrained(str(tmp_path / "t"))
    source = opened(["[HEAVY] A C"], str(tmp_path / "t"))
    assert tokens_of(source) == [[2, 1, 1, 1, 5, 6, 3]]
    assert "3 of 7 tokens (42.9%) are [UNK], by which tokenizer" in capsys.readouterr().err
    opened(["A C"], str(tmp_path / "t"))
    assert "[UNK]" not in capsys.readouterr().err
