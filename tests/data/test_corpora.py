"""Corpora of every form give the tokens that the same documents give as a jsonl file; what is wrong with one is named."""

import bz2
import gzip
import json
import lzma
import re
import struct
import tomllib
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from softcache.data.sources import open_source, source_settings
from softcache.data.sources.text import shards as shards_module
from softcache.data.sources.text.encode import DocumentEncoder
from softcache.data.sources.text.packing import Encoded
from softcache.data.sources.text.shards import Shards
from softcache.data.sources.text.table import TableWriter
from softcache.errors import LostProcessError, SourceError, SpecError, StorageError
from tests.support.caches import ROOT

TEXTS = ["w10 w11 w12", "w20 w21", "w30 w31 w32 w33"]
TOKENS = [[10, 11, 12, 0], [20, 21, 0], [30, 31, 32, 33, 0]]  # a text ends with <eos>, 0
CSV = "text,other\n" + "".join(f'"{text}",1\n' for text in TEXTS)
JSONL = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
COMPRESS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


def save_tokenizer(folder, *, bos=False):
    """A word-level tokenizer: w7 has the id 7, <eos> 0; with `bos`, <bos> is 1 and in front of each text."""
    words = ["<eos>", "<bos>", "w2", *(f"w{number}" for number in range(3, 50))]
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="w3")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>", "<bos>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    more = {"bos_token": "<bos>"} if bos else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", **more).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("words") / "tokenizer")


@pytest.fixture(scope="module")
def bos_words(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("bos") / "tokenizer", bos=True)


@pytest.fixture
def table_of(tmp_path, words):
    """The settings of a source whose samples are its documents in order, all of them of the train split."""

    def table(**given):
        return {
            "modality": "text",
            "name": "hf",
            "tokenizer": words,
            "seq_len": 8,
            "packing": "documents",
            "shuffle_documents": False,
            "eval_share": 1e-9,
            "data_dir": str(tmp_path / "data"),
        } | given

    return table


@pytest.fixture
def opened(table_of):
    return lambda split="train", **given: open_source(table_of(**given), split=split)


def tokens_of(source):
    return [source.sample(number).tokens.tolist() for number in range(len(source))]


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


# -- tables of texts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_are_read_as_what_they_hold(suffix, opened, tmp_path):
    for name, data in (("docs.jsonl", JSONL), ("docs.csv", CSV)):
        path = write(tmp_path / f"{name}.{suffix}", COMPRESS[suffix](data.encode()))
        assert tokens_of(opened(path=path)) == TOKENS
    assert {entry.name for entry in tmp_path.iterdir()} == {
        f"docs.jsonl.{suffix}",
        f"docs.csv.{suffix}",
        "data",
    }
    write(tmp_path / f"docs.jsonl.{suffix}", COMPRESS[suffix](JSONL.encode())[:-9])
    with pytest.raises(
        SourceError, match=rf"docs.jsonl.{suffix} cannot be unpacked: .*; expected a whole .{suffix} file"
    ):
        opened(path=str(tmp_path / f"docs.jsonl.{suffix}"))


def texts_of(table):
    return [document.text for document in source_settings(table).documents("train")]


@pytest.mark.parametrize("separator", [",", "\t"])
def test_numbers_in_a_csv_are_texts_as_they_are_written(separator, table_of, tmp_path):
    """The datasets library guesses a type for each 10,000 rows: 007 was 7 where all of a part are numbers."""
    completions = [*(f"x{n}" for n in range(10_000)), "007", "1.10", "1e3", "", "NA"]
    rows = ["p,c", *(f"q,{completion}" for completion in completions)]
    path = write(
        tmp_path / f"a.{'csv' if separator == ',' else 'tsv'}", "\n".join(rows).replace(",", separator)
    )
    pairs = {"prompt_column": "p", "completion_column": "c"}
    assert texts_of(table_of(path=path, **pairs)) == [f"q{completion}" for completion in completions]
    assert texts_of(
        table_of(path=write(tmp_path / "n.csv", "text,id\n007,a\n1.10,b\n"), key_column="id")
    ) == ["007", "1.10"]


def test_dates_that_were_read_as_times_are_refused(opened, tmp_path):
    rows = [{"p": "when? ", "c": f"2020-01-{day}"} for day in range(10, 20)]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SourceError, match=r"column 'c' holds dates, .* is lost; expected texts; write a csv"):
        opened(path=path, prompt_column="p", completion_column="c")


def test_csv_tsv_and_arrow(opened, tmp_path):
    assert tokens_of(opened(path=write(tmp_path / "a.csv", CSV + '"NA w5",2\n'))) == [*TOKENS, [3, 5, 0]]
    assert tokens_of(opened(path=write(tmp_path / "a.tsv", CSV.replace(",", "\t")))) == TOKENS
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file,
        pa.ipc.new_file(file, pa.schema({"text": "string"})) as writer,
    ):
        writer.write(pa.record_batch({"text": TEXTS}))
    assert tokens_of(opened(path=str(tmp_path / "a.arrow"))) == TOKENS


def test_globs_and_folders_of_compressed_files(opened, tmp_path):
    lines = JSONL.splitlines(keepends=True)
    for number, line in enumerate(lines):
        write(tmp_path / f"parts/part-{number}.jsonl.gz", gzip.compress(line.encode()))
    assert tokens_of(opened(path=str(tmp_path / "parts/part-*.jsonl.gz"))) == TOKENS
    assert tokens_of(opened(path=str(tmp_path / "parts"))) == TOKENS
    assert tokens_of(opened(path=str(tmp_path / "**/part-[12].jsonl.gz"))) == TOKENS[1:]
    with pytest.raises(
        SourceError, match=r"part-9.\*': no file has such a name; expected one ending in .parquet"
    ):
        opened(path=str(tmp_path / "parts/part-9.*"))
    write(tmp_path / "parts/part-3.csv", CSV)
    with pytest.raises(SourceError, match=r"files of different kinds, .csv, .jsonl; expected one kind"):
        opened(path=str(tmp_path / "parts/part-*"))


def test_folders_of_save_to_disk(opened, tmp_path):
    table = datasets.Dataset.from_dict({"text": TEXTS})
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "validation": table.select([1])}).save_to_disk(tmp_path / "two")
    assert tokens_of(opened(path=str(tmp_path / "one"))) == TOKENS
    given = {"path": str(tmp_path / "two"), "eval_split": "validation"}
    assert tokens_of(opened(**given)) == TOKENS
    assert tokens_of(opened("eval", **given)) == TOKENS[1:2]
    with pytest.raises(
        SourceError, match=r"eval_split: 'validation', and .*one' is one table without splits"
    ):
        opened("eval", path=str(tmp_path / "one"), eval_split="validation")
    with pytest.raises(SourceError, match=r"train_split: 'b', and .*one' is one table without splits"):
        opened(path=str(tmp_path / "one"), train_split="b")
    with pytest.raises(SourceError, match=r"split 'test': cannot be loaded: KeyError"):
        opened(path=str(tmp_path / "two"), train_split="test")


def test_plain_files_next_to_compressed_ones_are_those_of_the_folder_that_is_named(tmp_path):
    """Unpacked files are kept by their contents; those that were not compressed stay where they are, in either folder."""
    from softcache.data.sources.files import find_files

    settings = SimpleNamespace(data_dir=str(tmp_path / "kept"))
    for folder in ("one", "two"):
        write(tmp_path / folder / "part-0.txt", "plain")
        write(tmp_path / folder / "part-1.txt.gz", gzip.compress(b"packed"))

    def contents(folder):
        found = find_files(str(tmp_path / folder / "part-*"), settings, kinds=[".txt"]).unpacked(settings)
        return [path.read_text() for path in found.paths]

    assert contents("one") == ["plain", "packed"]
    write(tmp_path / "one/part-0.txt", "other")
    assert contents("two") == ["plain", "packed"]


@pytest.mark.parametrize("other", [b"b" * 300, b"b" * 100, b"b" * 500, None])
def test_an_object_that_is_replaced_while_it_is_copied_is_no_mixture(bucket, monkeypatch, tmp_path, other):
    from softcache.cache.storage.cloud.store import CloudObjects
    from softcache.data.sources import files

    objects, blocks = CloudObjects(bucket), CloudObjects.blocks
    objects.put("corpus/a.txt", b"a" * 300)

    def slowly(self, path, tag, size):
        for number, block in enumerate(blocks(self, path, tag, 100)):
            yield block
            if number == 0:
                objects.delete("corpus/a.txt") if other is None else objects.put("corpus/a.txt", other)

    monkeypatch.setattr(CloudObjects, "blocks", slowly)
    settings = SimpleNamespace(data_dir=str(tmp_path))
    with pytest.raises(StorageError, match=r"corpus/a\.txt: was replaced or removed while it was copied"):
        files.find_files(f"{bucket}/corpus/a.txt", settings, kinds=[".txt"])
    assert not list((tmp_path / "files").iterdir())


GLOBBED = [
    ("a-b/x.txt", "a/x.txt", "a/b/y.txt", "z.txt", "a/.hidden.txt", ".git/x.txt"),
    ("p8.txt", "p9.txt", "p10.txt", "._p8.txt", "p[8].txt"),
]


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        *(
            (GLOBBED[0], pattern)
            for pattern in ("**/*.txt", "a/**", "a/**/*.txt", "*/x.txt", "*.txt", "**/.h*.txt")
        ),
        *(
            (GLOBBED[1], pattern)
            for pattern in ("p{8..10}.txt", "*.txt", "{p9,p8}.txt", "p{9,1}*.txt", "p[8].txt", "p[89].txt")
        ),
    ],
)
def test_a_pattern_means_the_same_files_in_the_same_order_in_a_bucket(bucket, tmp_path, names, pattern):
    """`**` was one folder there, hidden files were taken, and the order, which the digest has, was another."""
    from softcache.cache.storage.cloud.store import CloudObjects
    from softcache.data.sources.files import find_files

    objects, settings = CloudObjects(f"{bucket}/corpus"), SimpleNamespace(data_dir=str(tmp_path / "kept"))
    for name in names:
        write(tmp_path / "corpus" / name, name)
        objects.put(name, name.encode())
    found = [
        find_files(f"{place}/{pattern}", settings, kinds=[".txt"])
        for place in (tmp_path / "corpus", f"{bucket}/corpus")
    ]
    here, there = ([path.read_text() for path in one.paths] for one in found)
    assert here == there != []
    assert found[0].digest == found[1].digest


def test_files_in_a_bucket(bucket, opened, tmp_path):
    from softcache.cache.storage.cloud.store import CloudObjects

    objects = CloudObjects(bucket)
    for number, line in enumerate(JSONL.splitlines(keepends=True)):
        objects.put(f"corpus/part-{number}.jsonl.gz", gzip.compress(line.encode()))
    assert tokens_of(opened(path=f"{bucket}/corpus/part-*.jsonl.gz")) == TOKENS
    assert tokens_of(opened(path=f"{bucket}/corpus")) == TOKENS
    assert tokens_of(opened(path=f"{bucket}/corpus/part-1.jsonl.gz")) == TOKENS[1:2]
    objects.put("corpus/part-1.jsonl.gz", gzip.compress(b'{"text": "w40"}\n'))
    assert tokens_of(opened(path=f"{bucket}/corpus/part-1.jsonl.gz")) == [[40, 0]], "the old copy was taken"
    with pytest.raises(SourceError, match=r"corpus/part-9\*': no object has such a name"):
        opened(path=f"{bucket}/corpus/part-9*")
    assert tokens_of(opened(path=f"{bucket}/corpus/part-{{0,1}}.jsonl.gz")) == [TOKENS[0], [40, 0]]
    with pytest.raises(
        SourceError, match=r"1 of its 3 files are not there, such as .*part-3\.jsonl\.gz; check the"
    ):
        opened(path=f"{bucket}/corpus/part-{{1..3}}.jsonl.gz")
    with pytest.raises(SourceError, match=r"corpus/part-9.jsonl': no such object; check the bucket"):
        opened(path=f"{bucket}/corpus/part-9.jsonl")
    write_megatron(tmp_path / "corpus", DOCUMENTS)
    for kind in ("bin", "idx"):
        objects.put(f"ids/corpus.{kind}", (tmp_path / f"corpus.{kind}").read_bytes())
    assert tokens_of(opened(name="megatron", path=f"{bucket}/ids/corpus")) == TOKENS


# -- streams -------------------------------------------------------------------------------------------------


def test_a_stream_is_bounded_and_kept(opened, tmp_path, monkeypatch):
    lines = [json.dumps({"text": f"w{10 + n} w5 w6", "other": n}) + "\n" for n in range(30)]
    for number in range(3):
        write(tmp_path / f"parts/train-{number}.jsonl", "".join(lines[10 * number : 10 * number + 10]))
    monkeypatch.setattr("softcache.data.sources.hub.BATCH_ROWS", 4)
    path = {"path": str(tmp_path / "parts"), "streaming": True}
    expected = [[10 + n, 5, 6, 0] for n in range(30)]
    by_documents = opened(**path, max_documents=13)
    assert tokens_of(by_documents) == expected[:13]
    assert tokens_of(opened(**path, max_documents=100)) == expected
    # 7 documents have 21 tokens of text; the one that reaches the bound is the last.
    assert (
        tokens_of(opened(**path, max_tokens=20)) == tokens_of(opened(**path, max_tokens=21)) == expected[:7]
    )
    assert tokens_of(opened(**path, max_tokens=22)) == expected[:8]
    assert tokens_of(opened(**path, max_tokens=22, max_documents=3)) == expected[:3]
    monkeypatch.setattr("datasets.load_dataset", None)
    assert opened(**path, max_documents=13, seq_len=4).digest == by_documents.digest, "it was streamed again"
    assert not list((tmp_path / "data/datasets").rglob("*.arrow")), "all of it was made a table"


def test_a_stream_of_the_hub(opened, monkeypatch):
    asked = []

    def load_dataset(**arguments):
        asked.append(arguments)
        return datasets.Dataset.from_dict({"text": TEXTS, "id": ["a", "b", "c"]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    given = {"path": "some/corpus", "subset": "en", "revision": "v2", "streaming": True, "max_documents": 2}
    source = opened(**given, key_column="id")
    assert (tokens_of(source), source.keys()) == (TOKENS[:2], ["a@0", "b@0"])
    assert asked == [
        {"path": "some/corpus", "name": "en", "revision": "v2", "split": "train", "streaming": True}
    ]
    with pytest.raises(SourceError, match=r"no column 'body'; it has text, id"):
        opened(**given, text_column="body")


# -- token ids -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "save_to_disk"])
def test_token_ids_are_taken_as_they_are(kind, opened, tmp_path):
    rows = {"input_ids": [*TOKENS, []]}
    path = tmp_path / f"ids.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"input_ids": pa.array(rows["input_ids"], pa.list_(pa.uint16()))}), path)
    elif kind == "jsonl":
        write(path, "".join(json.dumps({"input_ids": row}) + "\n" for row in rows["input_ids"]))
    else:
        datasets.Dataset.from_dict(rows).save_to_disk(path)
    source = opened(path=str(path), input_ids_column="input_ids")
    text = opened(path=write(tmp_path / "docs.jsonl", JSONL))
    assert tokens_of(source) == TOKENS
    assert (source.digest, source.tokenizer_digest) == (text.digest, text.tokenizer_digest)
    assert source.account["skipped"] == 1
    long = opened(path=str(path), input_ids_column="input_ids", seq_len=3)
    assert tokens_of(long) == [[10, 11, 12], [20, 21, 0], [30, 31, 32], [33, 0]]  # [0] alone has no row


def test_labels_and_masks_say_what_is_learned(opened, tmp_path):
    ids = [[10, 11, 12, 13, 0], [20, 21, 0]]
    rows = [
        {"ids": ids[0], "labels": [-100, -100, 12, 13, 0], "mask": [0, 0, 1, 1, 1], "text": "x"},
        {"ids": ids[1], "labels": [-100, 21, -100], "mask": [0, 1, 0], "text": "x"},
    ]
    path = write(tmp_path / "ids.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    by_labels = opened(path=path, input_ids_column="ids", labels_column="labels", seq_len=4, packing=None)
    by_mask = opened(path=path, input_ids_column="ids", mask_column="mask", seq_len=4, packing=None)
    assert by_labels.digest == by_mask.digest
    assert by_labels.packing == "best_fit"
    assert tokens_of(by_labels) == [[10, 11, 12, 13], [20, 21, 0]]  # what has a prompt never continues
    assert [by_labels.sample(number).rows.tolist() for number in range(2)] == [[1, 2], [0]]
    assert by_labels.account["truncated"] == 1

    rows[1]["labels"] = [21, 0, -100]
    rows[0]["mask"] = [0, 1, 1]
    write(tmp_path / "ids.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        SourceError, match=r"row 1, column 'labels': label 21 of token 0, whose id is 20; expected the same"
    ):
        opened(path=path, input_ids_column="ids", labels_column="labels")
    with pytest.raises(
        SourceError, match=r"row 0, column 'mask': 3 values; expected 5, one for each of 'ids'"
    ):
        opened(path=path, input_ids_column="ids", mask_column="mask")
    with pytest.raises(
        SourceError, match=r"row 1, column 'ids': 21 in a mask|row 0, column 'ids': 13 in a mask"
    ):
        opened(path=path, input_ids_column="ids", mask_column="ids")
    with pytest.raises(SourceError, match=r"column 'text' is of string; expected lists of whole numbers"):
        opened(path=path, input_ids_column="text")


@pytest.mark.parametrize("wrong", [50, -1])
def test_ids_outside_of_the_vocabulary_are_named(wrong, opened, tmp_path):
    path = write(
        tmp_path / "ids.jsonl", json.dumps({"ids": [1, 2]}) + "\n" + json.dumps({"ids": [3, wrong]}) + "\n"
    )
    with pytest.raises(
        SourceError,
        match=rf"ids.jsonl/train, document 'train/1': token 1 has the id {wrong}; expected 0 to 49, the ids",
    ):
        opened(path=path, input_ids_column="ids")


def test_bos_of_token_ids(opened, tmp_path, bos_words):
    rows = [[1, 10, 11, 12, 0], [20, 21, 0]]
    path = write(tmp_path / "ids.jsonl", "".join(json.dumps({"ids": row}) + "\n" for row in rows))
    given = {"path": path, "input_ids_column": "ids", "tokenizer": bos_words, "seq_len": 4}
    with pytest.raises(
        SourceError,
        match=r"document 'train/1': starts with id 20; expected \[1\] \(<bos>\).*source.bos = true",
    ):
        opened(**given)
    source = opened(bos=True, **given)
    assert tokens_of(source) == [[1, 10, 11, 12], [1, 20, 21, 0]]  # <bos> <eos> alone has no row
    assert source.prefix == [1]
    assert tokens_of(opened(bos=False, **given)) == [[10, 11, 12, 0], [20, 21, 0]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"input_ids_column": "ids", "messages_column": "m"},
            r"messages_column and source.input_ids_column: a document is",
        ),
        ({"labels_column": "l"}, r"source.labels_column: of token ids, which source.input_ids_column names"),
        (
            {"input_ids_column": "i", "labels_column": "l", "mask_column": "m"},
            r"labels_column and source.mask_column: give one",
        ),
        ({"input_ids_column": "i", "chat_template": "t"}, r"source.chat_template: for chats only"),
        ({"streaming": True}, r"source.streaming: without a bound; give source.max_documents or"),
        ({"max_tokens": 9}, r"source.max_tokens: bounds what is streamed; set source.streaming = true"),
        (
            {"streaming": True, "max_tokens": 9, "messages_column": "m"},
            r"source.max_tokens: of texts and token ids; bound chats by",
        ),
        (
            {"streaming": True, "max_tokens": 9, "tokenizer": "bpe"},
            r"source.max_tokens: counted by source.tokenizer, and",
        ),
        (
            {"input_ids_column": "i", "mask_column": "m", "packing": "packed"},
            r"would cut answers from their prompts",
        ),
    ],
)
def test_settings_that_disagree_are_refused(given, message, table_of):
    with pytest.raises(ValidationError, match=message):
        source_settings(table_of(path="x.jsonl") | {"packing": None} | given)


def test_a_bpe_cannot_be_trained_on_token_ids(opened, tmp_path):
    path = write(tmp_path / "ids.jsonl", json.dumps({"ids": [1, 2]}) + "\n")
    with pytest.raises(
        SpecError, match=r"trained on texts, and documents are token ids here; name the tokenizer"
    ):
        opened(path=path, input_ids_column="ids", tokenizer="bpe?vocab_size=300")


def test_custom_documents_of_token_ids(table_of, monkeypatch):
    from softcache.data.sources.text.documents import Document, InMemoryDocuments

    found = [Document(f"d{n}", tokens=np.array(ids, np.uint16)) for n, ids in enumerate(TOKENS)]
    monkeypatch.setattr(
        "json.made_here", lambda split: InMemoryDocuments(f"made/{split}", found), raising=False
    )
    table = {
        key: value
        for key, value in table_of(name="json:made_here").items()
        if key not in ("eval_share", "shuffle_documents")
    }
    assert tokens_of(open_source(table, split="train")) == TOKENS


# -- files of ids --------------------------------------------------------------------------------------------


def write_megatron(prefix, documents, *, code=8, dtype="<u2", **wrong):
    """PREFIX.bin and PREFIX.idx by hand: documents are lists of sequences of ids; `wrong` replaces a field."""
    sequences = [ids for document in documents for ids in document]
    lengths = [len(ids) for ids in sequences]
    item = np.dtype(dtype).itemsize
    fields = {
        "magic": b"MMIDIDX\x00\x00",
        "version": struct.pack("<Q", 1),
        "code": bytes([code]),
        "counts": struct.pack("<QQ", len(sequences), len(documents) + 1),
        "lengths": np.array(lengths, "<i4").tobytes(),
        "offsets": (np.cumsum([0, *lengths[:-1]]) * item).astype("<i8").tobytes(),
        "bounds": np.cumsum([0, *map(len, documents)]).astype("<i8").tobytes(),
        "tail": b"",
    } | {name: value for name, value in wrong.items() if name != "bin"}
    write(prefix.with_name(prefix.name + ".idx"), b"".join(fields.values()))
    write(
        prefix.with_name(prefix.name + ".bin"),
        wrong.get("bin", np.concatenate(sequences).astype(dtype).tobytes()),
    )
    return str(prefix)


DOCUMENTS = [[[10, 11], [12, 0]], [[20, 21, 0]], [[30, 31, 32, 33, 0]]]  # the first one in two sequences


@pytest.fixture
def opened_ids(table_of):
    def open_(path, name="megatron", split="train", **given):
        return open_source(table_of(name=name, path=str(path), **given), split=split)

    return open_


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4"), (5, "<i8")])
def test_megatron_files(code, dtype, opened_ids, tmp_path):
    prefix = write_megatron(tmp_path / "corpus_text_document", DOCUMENTS, code=code, dtype=dtype)
    source = opened_ids(prefix)
    assert tokens_of(source) == TOKENS
    assert source.keys() == [f"corpus_text_document/{number}@0" for number in range(3)]
    write_megatron(tmp_path / "other", DOCUMENTS[1:2])
    assert (
        tokens_of(opened_ids(f"{prefix}.bin", eval_path=str(tmp_path / "other"), split="eval")) == TOKENS[1:2]
    )
    assert tokens_of(opened_ids(tmp_path / "*")) == [*TOKENS, TOKENS[1]]
    (tmp_path / "other.bin").unlink()
    with pytest.raises(
        SourceError, match=r"\*': other.bin is missing next to the other of the pair .idx and .bin; copy both"
    ):
        opened_ids(tmp_path / "*")
    with pytest.raises(SourceError, match=r"nowhere.idx': no such file"):
        opened_ids(tmp_path / "nowhere")


LENGTHS = np.array([2, 2, 3, 5], "<i4")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"magic": b"TNTIDX\x00\x00\x00"},
            r"x.idx: expected an index of Megatron-LM's mmap form .*; found the older TNTIDX",
        ),
        (
            {"magic": b"PAR1PAR1\x00"},
            r"x.idx: expected an index that starts with MMIDIDX; found b'PAR1PAR1.x00'",
        ),
        ({"version": struct.pack("<Q", 2)}, r"x.idx: expected version 1; found version 2"),
        ({"code": 6}, r"x.idx: expected a dtype code of whole numbers .*; found 6"),
        ({"bounds": b""}, r"x.idx: expected 114 bytes for 4 sequences and 4 bounds; found 82"),
        (
            {"counts": struct.pack("<QQ", 2**40, 4)},
            r"x.idx: expected 13,[\d,]+ bytes for 1,099,511,627,776 sequences",
        ),
        ({"tail": b"\x00" * 4}, r"x.idx: expected an index of text; found one with a mode for each sequence"),
        (
            {"offsets": np.array([0, 4, 9, 14], "<i8").tobytes()},
            r"expected sequence 2 at byte 8, where .*; found 9",
        ),
        ({"lengths": (-LENGTHS).tobytes()}, r"x.idx: expected lengths of 0 and more; found -5"),
        (
            {"bounds": np.array([0, 3, 2, 4], "<i8").tobytes()},
            r"expected bounds of documents from 0 to 4, ascending; found",
        ),
        (
            {"bin": b"\x00" * 22},
            r"x.bin: expected 24 bytes, 12 ids of uint16 as x.idx has it; found 22; copy the pair",
        ),
        ({"code": 4}, r"x.idx: expected sequence 1 at byte 8, where the one before it ends; found 4"),
    ],
)
def test_a_corrupt_megatron_index_is_named(wrong, message, opened_ids, tmp_path):
    write_megatron(tmp_path / "x", DOCUMENTS, **wrong)
    with pytest.raises(SourceError, match=message):
        opened_ids(tmp_path / "x")


def test_a_truncated_megatron_header_is_named(opened_ids, tmp_path):
    write_megatron(tmp_path / "x", DOCUMENTS)
    write(tmp_path / "x.idx", (tmp_path / "x.idx").read_bytes()[:20])
    with pytest.raises(SourceError, match=r"x.idx: expected a header of 34 bytes; found 20 bytes in all"):
        opened_ids(tmp_path / "x")


def write_llm_c(path, ids, *, magic=20240520, version=1, dtype="<u2", num_ids=None):
    head = np.zeros(256, "<i4")
    head[:3] = magic, version, len(ids) if num_ids is None else num_ids
    return write(path, head.tobytes() + np.array(ids, dtype).tobytes())


def test_streams_of_nanogpt(opened_ids, tmp_path):
    ids = np.concatenate(TOKENS)
    path = write(tmp_path / "train.bin", ids.astype("<u2").tobytes())
    source = opened_ids(path, "token_stream")
    assert tokens_of(source) == TOKENS
    assert source.keys() == [f"train.bin/{number}@0" for number in range(3)]
    # What follows the last separator is a document, too.
    open_end = write(tmp_path / "open.bin", ids[:-1].astype("<u4").tobytes())
    assert tokens_of(opened_ids(open_end, "token_stream", dtype="uint32")) == [*TOKENS[:2], [30, 31, 32, 33]]
    assert tokens_of(opened_ids(path, "token_stream", separator_id=21)) == [
        [10, 11, 12, 0, 20, 21],
        [0, 30, 31, 32, 33, 0],
    ]
    whole = opened_ids(path, "token_stream", document_separator="none", seq_len=32)
    assert tokens_of(whole) == [ids.tolist()]
    packed = write(tmp_path / "train.bin.gz", gzip.compress(ids.astype("<u2").tobytes()))
    assert tokens_of(opened_ids(packed, "token_stream")) == TOKENS


@pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")])
def test_streams_of_llm_c(magic, version, dtype, opened_ids, tmp_path):
    ids = [0, 10, 11, 12, 0, 20, 21]
    path = write_llm_c(tmp_path / "train_0.bin", ids, magic=magic, version=version, dtype=dtype)
    assert tokens_of(opened_ids(path, "token_stream")) == [[0, 10, 11, 12], [0, 20, 21]]
    write_llm_c(tmp_path / "train_1.bin", ids, magic=magic, version=version, dtype=dtype, num_ids=9)
    with pytest.raises(SourceError, match=r"train_1.bin: expected 9 ids, as its header has it; found 7"):
        opened_ids(tmp_path / "train_*.bin", "token_stream")
    write_llm_c(tmp_path / "train_1.bin", ids, magic=20240522)  # its multiple-choice questions
    with pytest.raises(
        SourceError, match=r"train_1.bin: expected ids, or a header with .*; found a header with 20240522"
    ):
        opened_ids(tmp_path / "train_*.bin", "token_stream")


@pytest.mark.parametrize(
    ("data", "given", "message"),
    [
        (b"\x01" * 7, {}, r"x.bin: expected whole ids of uint16; found 7 bytes, which 2 does not divide"),
        (b"", {}, r"x.bin: expected token ids; found none"),
        (
            np.array([9, 8, 7, 0], "<u4").tobytes(),
            {},
            r"found that every second one is 0, .*set source.dtype = .uint32.",
        ),
        (
            np.array([9, 8, 7, 0], "<u2").tobytes(),
            {"dtype": "uint32"},
            r"expected documents that end with id 0; found none",
        ),
        (
            np.array([9, 8, 7, 0], "<u2").tobytes(),
            {"dtype": "uint32", "document_separator": "none"},
            r"document 'x.bin/0': token 0 has the id 524297; expected 0 to 49.*check source.dtype",
        ),
        (
            np.array([9, 8, 0, 50], "<u2").tobytes(),
            {},
            r"document 'x.bin/1': token 0 has the id 50; expected 0 to 49",
        ),
        (
            np.array([9, 8], "<u2").tobytes(),
            {},
            r"expected documents that end with id 0; found none in 2 ids; name the",
        ),
    ],
)
def test_a_stream_that_is_something_else_is_named(data, given, message, opened_ids, tmp_path):
    write(tmp_path / "x.bin", data)
    with pytest.raises(SourceError, match=message):
        opened_ids(tmp_path / "x.bin", "token_stream", **given)


def test_long_runs_of_ids_are_several_documents(opened_ids, tmp_path, monkeypatch):
    monkeypatch.setattr("softcache.data.sources.text.token_files.MAX_DOCUMENT_TOKENS", 4)
    ids = [*range(3, 13), 0, 20, 0]
    path = write(tmp_path / "x.bin", np.array(ids, "<u2").tobytes())
    source = opened_ids(path, "token_stream")
    assert tokens_of(source) == [[3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 0], [20, 0]]
    assert source.keys() == [f"x.bin/{number}@0" for number in range(4)]


# -- shards and processes ------------------------------------------------------------------------------------


@pytest.fixture
def many(monkeypatch, table_of, tmp_path):
    """A corpus of several shards, and how many documents were encoded."""
    monkeypatch.setattr("softcache.data.sources.text.shards.SHARD_DOCUMENTS", 10)
    lines = [json.dumps({"text": f"w{10 + n} w5 w6 w{3 + n}"}) + "\n" for n in range(35)]
    path = write(tmp_path / "many.jsonl", "".join(lines))
    encoded = []
    encode = DocumentEncoder._texts
    monkeypatch.setattr(
        DocumentEncoder, "_texts", lambda self, batch: encoded.extend(batch) or encode(self, batch)
    )
    return table_of(path=path, packing="packed", seq_len=16), encoded


def test_finished_shards_are_used_after_a_stop_and_damaged_ones_are_not(many, monkeypatch, tmp_path):
    table, encoded = many
    whole = open_source(table | {"data_dir": str(tmp_path / "whole")}, split="train")
    assert not (tmp_path / "whole/shards").exists(), "shards of a whole table are kept"
    encoded.clear()
    add, left = TableWriter.add, [11]  # samples: 33 of the 44 are in the third shard

    def add_or_stop(self, cut):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        add(self, cut)

    monkeypatch.setattr(TableWriter, "add", add_or_stop)
    with pytest.raises(KeyboardInterrupt):
        open_source(table, split="train")
    monkeypatch.setattr(TableWriter, "add", add)
    (folder,) = (tmp_path / "data/shards").iterdir()
    first, *_, last = sorted(folder.iterdir())
    assert len(encoded) == 40 - 5, "the last shard has 5 documents"
    encoded.clear()
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    (folder / ".000009.half").write_bytes(b"half")
    again = open_source(table, split="train")
    assert again.digest == whole.digest
    assert len(encoded) == 15, "the damaged shard and the last one"
    assert first.parent == folder
    assert not (tmp_path / "data/shards").exists()


def test_processes_make_the_same_table(many, tmp_path):
    table, encoded = many
    one = open_source(table | {"data_dir": str(tmp_path / "one")}, split="train")
    encoded.clear()
    two = open_source(table | {"tokenize_workers": 1}, split="train")
    assert not encoded, "this process encoded"
    assert two.digest == one.digest
    for name in ("samples.arrow", "table.json"):
        assert (two._folder / name).read_bytes() == (one._folder / name).read_bytes()
    assert not (tmp_path / "data/shards").exists()


def test_a_process_that_is_killed_is_named_and_shards_stay(many, monkeypatch):
    class Broken:
        _processes = None

        def submit(self, make, folder, number, *given):
            done = Future()
            if number:
                done.set_exception(BrokenProcessPool("killed"))
            else:
                made = [Encoded(f"d{n}", np.arange(8, dtype=np.int32), np.ones(8, bool)) for n in range(10)]
                done.set_result(Shards(folder).write(number, made))
            return done

        def shutdown(self, **how):
            pass

    monkeypatch.setattr(
        "softcache.data.sources.text.shards.ProcessPoolExecutor", lambda *given, **more: Broken()
    )
    with pytest.raises(
        LostProcessError, match=r"source.tokenize_workers: a process ended without an answer .*; 1 shards of"
    ):
        open_source(many[0] | {"tokenize_workers": 1}, split="train")


# -- mixtures ------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(table_of, tmp_path):
    """A mixture of 40 documents of 4 tokens and 10 of 8."""
    texts = [json.dumps({"text": f"w{10 + n % 30} w5 w6"}) + "\n" for n in range(40)]
    write(tmp_path / "short.jsonl", "".join(texts))
    write_megatron(tmp_path / "long", [[[20 + n, 3, 4, 5, 6, 7, 8, 0]] for n in range(10)])

    def table(*weights, **given):
        held_out = {"eval_share": 1e-9, "shuffle_documents": False}
        sources = [
            {"name": "hf", "path": str(tmp_path / "short.jsonl"), "label": "web", **held_out},
            {"name": "megatron", "path": str(tmp_path / "long"), **held_out},
        ]
        sources = [source | {"weight": weight} for source, weight in zip(sources, weights, strict=True)]
        shared = {key: value for key, value in table_of().items() if key not in held_out}
        return shared | {"name": "mixture", "sources": sources, "seq_len": 12} | given

    return table


def test_a_mixture_has_the_share_of_tokens_that_its_weights_give(mixed, capfd):
    source = open_source(mixed(3, 1), split="train")
    web, books = source.account["sources"]
    assert (web["label"], web["documents"], web["tokens"]) == ("web", 40, 160)
    assert (books["label"], books["documents"], books["tokens"]) == ("1", 7, 56)
    keys = source.keys()
    assert (
        keys[:7]
        == ["web/train/0@0", "1/long/0@0", *(f"web/train/{n}@0" for n in range(1, 6)), "web/train/6@0"][:7]
    )
    # Any start of the order has the shares, to within a document.
    counts = np.cumsum([(4, 0) if key.startswith("web") else (0, 8) for key in keys], axis=0)
    assert (np.abs(counts[:, 0] - 3 * counts[:, 1]) <= 3 * 8).all()
    printed = capfd.readouterr().err
    assert "source mixture/train, web: 40 documents, 160 tokens (74.1%)" in printed
    assert "source mixture/train, 1: 7 documents, 56 tokens (25.9%)" in printed
    assert open_source(mixed(1, 1), split="train").account["sources"][1]["documents"] == 10
    every = open_source(mixed(3, 1, on_end="continue"), split="train")
    assert [part["documents"] for part in every.account["sources"]] == [40, 10]
    assert tokens_of(every)[:40] == tokens_of(source)[:40]
    first = open_source(mixed(3, 1, max_train_samples=5), split="train")
    assert tokens_of(first) == tokens_of(source)[:5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 8}, r"source.sources\[0\].seq_len: one for all sources; set source.seq_len"),
        ({"weight": 0}, r"source.sources\[0\].weight: 0; expected a number above 0"),
        ({"name": "hff"}, r"source.sources\[0\]: source 'hff': unknown; did you mean"),
        ({"text_colum": "x"}, r"source.sources\[0\] \(hf\): text_colum: Extra inputs"),
        ({"label": "1"}, r"labels \['1', '1'\]; expected a label of its own for each"),
    ],
)
def test_a_mixture_refuses_what_is_no_source(change, message, mixed):
    table = mixed(1, 1)
    table["sources"][0] |= change
    with pytest.raises(ValidationError, match=message):
        source_settings(table)


def test_a_mixture_without_documents_of_a_source_is_named(mixed):
    with pytest.raises(
        SourceError, match=r"source.sources, web: .*short.jsonl/eval: no documents in this split; raise"
    ):
        open_source(mixed(1, 1), split="eval")


def test_a_bpe_is_trained_on_a_mixture_of_texts(mixed, tmp_path):
    table = mixed(1, 1, tokenizer="bpe?vocab_size=262")
    table["sources"][1] = table["sources"][0] | {"label": "again", "weight": 2}
    source = open_source(table, split="train")
    assert source.vocab_size <= 262
    keys = source.keys()
    assert {key.split("/")[0] for key in keys} == {"web", "again"}


def test_the_tables_of_the_page_are_settings_of_sources():
    tables = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/how-to/corpora.md").read_text(), re.S)
    assert {source_settings(tomllib.loads(table)["source"]).name for table in tables} == {
        "hf",
        "megatron",
        "mixture",
        "parts",
        "token_stream",
    }


def test_shards_whose_folder_a_faster_process_removed_are_written_again(tmp_path, monkeypatch):
    shards, checksum = Shards(tmp_path / "shards/x"), []
    encoded = [Encoded("d", np.arange(5, dtype=np.int32), np.ones(5, bool), num_prefix=1, has_prompt=True)]

    def remove_once(path):
        if not checksum:
            shards.remove()
        checksum.append(path)
        return original(path)

    original = shards_module._checksum
    monkeypatch.setattr(shards_module, "_checksum", remove_once)
    shards.write(3, encoded)
    (found,) = shards.read(3)
    assert (found.key, found.num_prefix, found.has_prompt, found.tokens.tolist()) == (
        "d",
        1,
        True,
        [0, 1, 2, 3, 4],
    )
    shards.remove()
    assert shards.read(3) is None
    monkeypatch.setattr(
        "pathlib.Path.mkdir", lambda *given, **more: (_ for _ in ()).throw(PermissionError("no"))
    )
    with pytest.raises(
        StorageError, match=r"source.data_dir: cannot write .*shards/x: no; set it to a folder"
    ):
        shards.write(3, encoded)
