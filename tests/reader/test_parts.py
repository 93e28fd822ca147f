"""Caches of the parts of a corpus, read as one: the labels, order and student of one cache of all of it."""

import json
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from softcache.config.run import RunConfig
from softcache.data.tokens import TokenData
from softcache.errors import AlignmentError, CacheNotFoundError, ConfigError, IdentityError, SourceError
from softcache.reader import BlockSampler, SoftLabelDataset, open_cache
from softcache.reader.loader import SoftLabelLoader
from softcache.reader.memmap import MemmapSettings
from softcache.reader.order import BlockShuffle
from softcache.reader.paired.documents import MatchedDocuments
from softcache.reader.parts import CacheParts, expand_parts
from softcache.runs import capture_labels, open_data, open_labels, open_teacher, train_student
from softcache.runs.report import open_report
from softcache.tools.verify.checksums import verify_units
from tests.data.test_corpora import save_tokenizer
from tests.support.caches import make_cache
from tests.support.tables import merged

PARTS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus of three files, its tokenizer, and a cache of each."""
    folder = tmp_path_factory.mktemp("parts")
    save_tokenizer(folder / "tokenizer")
    draw = random.Random(0)
    for part in range(PARTS):
        texts = [
            " ".join(f"w{draw.randrange(3, 50)}" for _ in range(draw.randint(2, 60)))
            for _ in range(30 + part)
        ]
        lines = [json.dumps({"text": text, "id": f"{part}-{n}"}) + "\n" for n, text in enumerate(texts)]
        (folder / f"texts-{part}.jsonl").write_text("".join(lines))
        capture(config_of(folder, source={"part": part}), folder / f"part-{part}")
    return folder


def config_of(folder, **tables):
    base = {
        "name": "parts",
        "cache": [str(folder / f"part-{part}") for part in range(PARTS)],
        "source": {
            "modality": "text",
            "name": "parts",
            "num_parts": PARTS,
            "each": {
                "name": "hf",
                "path": str(folder / "texts-{part}.jsonl"),
                "key_column": "id",
                "eval_share": 0.3,
            },
            "tokenizer": str(folder / "tokenizer"),
            "seq_len": 32,
            "data_dir": str(folder / "data"),
        },
        "teacher": {"model": "tests.fakes_language:known"},
        "labels": {"k": 6},
        "capture": {"unit_samples": 8, "chunk_samples": 4, "batch_size": 4, "device": "cpu"},
        "student": {"model": "llama?width=16&depth=1&heads=2"},
        "train": {"epochs": 1, "batch_size": 6, "device": "cpu", "eval_batch_size": 4},
    }
    return RunConfig.model_validate(merged(base, tables))


def capture(config, url):
    data = open_data(config)
    return capture_labels(config, data, open_teacher(config, data), str(url))[0]


@pytest.fixture(scope="module")
def whole(folder):
    """A cache of all parts, captured at once from the same samples."""
    return capture(config_of(folder), folder / "whole")


def same(one, other):
    for name in ("ids", "log_probs", "log_tail", "target_log_prob", "stats"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def reading(folder, how):
    memmap = MemmapSettings(1 << 30, str(folder / "maps")) if how == "maps" else None
    return open_cache(str(folder / "part-*"), memmap=memmap, window_blocks=2)


@pytest.mark.parametrize("how", ["chunks", "maps"])
def test_any_samples_in_any_order_are_those_of_one_cache(folder, whole, how):
    cache = reading(folder, how)
    assert isinstance(cache, CacheParts)
    assert len(cache) == len(whole) == sum(map(len, cache.parts))
    assert (cache.fits_in_memmap, cache.memmap(0) is not None) == (how == "maps",) * 2
    draw = np.random.default_rng(0)
    for samples in (
        np.arange(len(whole)),
        draw.permutation(len(whole)),
        draw.integers(0, len(whole), 5),
        [0],
        [],
    ):
        stored, expected = cache.read_stored(samples), whole.read_stored(samples)
        same(stored.labels, expected.labels)
        for name in ("fingerprints", "counts", "positions"):
            np.testing.assert_array_equal(getattr(stored, name), getattr(expected, name), err_msg=name)
    np.testing.assert_array_equal(cache.samples_in(0), whole.samples_in(0))
    assert cache.samples_table().keys == whole.samples_table().keys
    assert cache.num_rows_done == whole.num_rows_done
    assert cache.manifest.total_rows == whole.manifest.total_rows
    assert not cache.missing_units
    with pytest.raises(IndexError, match=f"it holds {len(whole)}"):
        cache.read([len(whole)])


def test_parts_are_indexed_and_shown_as_one_cache(folder, whole):
    cache = reading(folder, "chunks")
    keys = cache.keys[[0, len(cache) - 1, len(cache) // 2]]
    same(cache[keys], whole[keys])
    assert cache.to_arrow(keys).equals(whole.to_arrow(keys))
    assert f"{cache.num_units} units of 3 caches" in repr(cache)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_every_sample_once_over_two_ranks_and_resumes(folder, whole, workers):
    config = config_of(folder)
    source, cache = config.source.open("train"), reading(folder, "chunks")
    dataset = SoftLabelDataset(source, cache)

    def order(rank):
        return BlockShuffle(
            cache.samples_in,
            batch_size=4,
            view_of=lambda epoch: 0,
            seed=1,
            block_samples=4,
            window_blocks=3,
            rank=rank,
            num_ranks=2,
        )

    seen = []
    for rank in range(2):
        loader = SoftLabelLoader(dataset, order(rank), workers=workers)
        for batch in loader:
            expected = whole.read(batch.samples).to_torch()
            for name in ("ids", "log_probs", "log_tail"):
                assert torch.equal(getattr(batch.labels, name), getattr(expected, name))
            seen += batch.samples.tolist()
    assert sorted(seen) == list(range(len(whole)))


def test_torch_loader_and_pickle(folder, whole):
    cache = pickle.loads(pickle.dumps(reading(folder, "chunks")))
    dataset = SoftLabelDataset(config_of(folder).source.open("train"), cache)
    loader = DataLoader(dataset, batch_size=5, sampler=BlockSampler(dataset))
    assert sorted(sample for batch in loader for sample in batch.samples.tolist()) == list(range(len(whole)))


def test_a_student_of_the_parts_is_the_student_of_one_cache(folder, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = []
    for cache in (config_of(folder).cache, str(folder / "whole")):
        config = config_of(folder, cache=cache, reader={"memmap_dir": str(folder / "maps")})
        data = open_data(config)
        report = train_student(
            config, data, model=config.student.model, labels="cache", cache=open_labels(config)
        )
        weights.append(load_file(f"{report['out']}/model.safetensors"))
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


# -- what does not go together -----------------------------------------------------------------------------


def test_the_parts_of_another_order_are_not_the_source(folder):
    places = [str(folder / f"part-{part}") for part in (1, 0, 2)]
    with pytest.raises(AlignmentError, match=r"sample 0 was '1-\d+.*' when labeled and is '0-"):
        SoftLabelDataset(config_of(folder).source.open("train"), open_cache(places))


def test_a_part_alone_is_what_each_would_be(folder):
    config = config_of(folder, source={"part": 1})
    SoftLabelDataset(config.source.open("train"), open_cache(folder / "part-1"))
    plain = config.source.settings_of(1)
    assert plain.name == "hf"
    assert plain.open("train").digest == config.source.open("train").digest


def test_a_part_of_another_teacher_is_refused_unless_each_labels_its_own(folder, tmp_path):
    other = config_of(folder, source={"part": 1}, teacher={"model": "tests.fakes_language:known_scaled"})
    capture(other, tmp_path / "other")
    places = [folder / "part-0", tmp_path / "other", folder / "part-2"]
    with pytest.raises(
        IdentityError, match=r"other: no part of .*part-0: identity.teacher is .*several_teachers"
    ):
        open_cache(places)
    cache = open_cache(places, several_teachers=True)
    SoftLabelDataset(config_of(folder).source.open("train"), cache)
    assert cache.manifest.teacher.eval_loss is None
    first = len(open_cache(places[0]))
    same(cache.read([first]), open_cache(places[1]).read([0]))


def test_parts_of_other_labels_or_kinds_are_refused(folder, tmp_path):
    capture(config_of(folder, source={"part": 1}, labels={"k": 5}), tmp_path / "other")
    with pytest.raises(IdentityError, match=r"other: no part of .*: codec is "):
        open_cache([folder / "part-0", tmp_path / "other"])
    make_cache(tmp_path / "images")
    with pytest.raises(IdentityError, match=r"images: no part of .*: class names is "):
        open_cache([folder / "part-0", tmp_path / "images"])
    with pytest.raises(CacheNotFoundError, match="expected the places of one cache or more"):
        open_cache([])
    with pytest.raises(CacheNotFoundError, match="no folder of that pattern holds a cache"):
        open_cache(tmp_path / "nothing-*")


def test_missing_units_are_of_all_parts(folder, tmp_path, whole):
    for part in range(PARTS):
        shutil.copytree(folder / f"part-{part}", tmp_path / f"part-{part}")
    (tmp_path / "part-1/units/00000.json").unlink()
    cache = open_cache(tmp_path / "part-*")
    before = cache.parts[0].num_units
    assert cache.missing_units == [before]
    assert cache.describe_missing().endswith(f"units are missing ({tmp_path}/part-1)")
    assert len(cache.samples_in(0)) == len(whole) - 8
    assert not cache.fits_in_memmap


def test_folders_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("part-10", "part-2", "part-1", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    (tmp_path / "part-3").mkdir()
    found = expand_parts(f"{tmp_path}/part-*")
    assert [place.rpartition("/")[2] for place in found] == ["part-1", "part-2", "part-10"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"part": 3}, r"source.part: 3; expected 0 to 2"),
        (
            {"each": {"name": "hf", "path": "texts.jsonl"}},
            r"source.each: the same for all parts; expected \{part\}",
        ),
        ({"each": {"name": "hf", "path": "{number}"}}, r"source.each: 'number'; expected \{part\}"),
        (
            {"each": {"name": "hf", "path": "{part}", "seq_len": 3}},
            r"source.each.seq_len: one for all sources; set source.seq_len",
        ),
        ({"each": {"name": "hf", "path": "{part}", "nane": 3}}, r"source.each \(hf\): nane"),
    ],
)
def test_tables_of_parts_are_checked(folder, source, message):
    with pytest.raises(ValueError, match=message):
        config_of(folder, source=source)


def test_parts_of_other_tokenizers_are_refused(folder, tmp_path):
    config = config_of(folder, source={"tokenizer": "bpe?vocab_size=300", "data_dir": str(tmp_path)})
    with pytest.raises(
        SourceError, match=r"tokenizer_digest is .*parts of one corpus are made with the same"
    ):
        config.source.open("train")


def test_a_teacher_writes_one_cache(folder):
    with pytest.raises(ConfigError, match="cache: a list of 3 places, which students read as one"):
        _ = config_of(folder).cache_url
    with pytest.raises(
        ConfigError, match=r"cache: runs/part-\*, a pattern of places, which students read as one"
    ):
        _ = config_of(folder).model_copy(update={"cache": "runs/part-*"}).cache_url


@pytest.mark.parametrize("places", ["list", "pattern"])
def test_verify_and_report_take_parts(folder, tmp_path, monkeypatch, places):
    assert list(verify_units(open_cache(str(folder / "part-*")))) == []
    monkeypatch.chdir(tmp_path)
    config = config_of(folder)
    if places == "pattern":
        config = config.model_copy(update={"cache": str(folder / "part-*")})
    data, cache = open_data(config), open_labels(config)
    train_student(config, data, model=config.student.model, labels="cache", cache=cache, out=tmp_path / "run")
    assert open_report([tmp_path / "run"]).caches[0].url == cache.url


def test_documents_of_one_key_in_two_parts_are_not_joined_with_another_tokenizers(folder, whole, tmp_path):
    each = {"name": "hf", "path": str(folder / "texts-{part}.jsonl"), "eval_share": 0.3}
    source = {"each": each, "packing": "documents", "data_dir": str(tmp_path)}
    data = TokenData(config_of(folder, source=source).source.open("train"))
    with pytest.raises(
        SourceError, match=r"[23] documents have the key 'train/\d+@0', and they are joined by key"
    ):
        MatchedDocuments(data, data, whole)
