"""All parts of a corpus are labeled by one command: the caches are those of one command for each."""

import json
from contextlib import nullcontext

import pytest

from softcache.config.run import RunConfig
from softcache.data.sources.text import source as text_source
from softcache.errors import ConfigError, SourceError
from softcache.reader import SoftLabelDataset
from softcache.runs import capture_labels, open_data, open_labels, open_teacher
from softcache.runs import parts as runs_parts
from softcache.runs.parts import capture_parts
from tests.data.test_corpora import save_tokenizer
from tests.support.tables import merged

PARTS = 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    save_tokenizer(folder / "tokenizer")
    for part in range(PARTS):
        texts = [
            " ".join(f"w{3 + (7 * part + 5 * n + i) % 45}" for i in range(4 + 9 * (n % 5))) for n in range(20)
        ]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def config_of(corpus, folder, **tables):
    base = {
        "name": "parts",
        "cache": str(folder / "part-{part:02d}"),
        "source": {
            "modality": "text",
            "name": "parts",
            "num_parts": PARTS,
            "each": {"name": "hf", "path": str(corpus / "{part}.jsonl"), "eval_share": 0.3},
            "tokenizer": str(corpus / "tokenizer"),
            "seq_len": 32,
            "data_dir": str(folder / "data"),
        },
        "teacher": {"model": "tests.fakes_language:known"},
        "labels": {"k": 6},
        "capture": {"unit_samples": 8, "chunk_samples": 4, "batch_size": 4, "device": "cpu"},
    }
    return RunConfig.model_validate(merged(base, tables))


@pytest.fixture
def one_process(monkeypatch):
    monkeypatch.setattr(runs_parts, "_opened_meanwhile", lambda parts: nullcontext())


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_parts_are_labeled_by_one_teacher_and_tokenized_meanwhile(corpus, tmp_path, monkeypatch):
    tokenized, loaded = [], []
    monkeypatch.setattr(runs_parts, "open_teacher", lambda *args: loaded.append(1) or open_teacher(*args))
    tokenize = text_source._tokenize
    monkeypatch.setattr(
        text_source, "_tokenize", lambda documents, *rest: tokenized.append(1) or tokenize(documents, *rest)
    )
    config = config_of(corpus, tmp_path)
    made = list(capture_parts(config))
    assert [url for url, _, _ in made] == [str(tmp_path / f"part-{part:02d}") for part in range(PARTS)]
    assert len(loaded) == 1
    assert len(tokenized) == 2  # both splits of the first part; another process made those of the second

    for part in range(PARTS):
        alone = config_of(corpus, tmp_path, source={"part": part})
        assert alone.cache_url == made[part][0]
        data = open_data(alone)
        capture_labels(alone, data, open_teacher(alone, data), str(tmp_path / "alone"))
        assert files_of(tmp_path / "alone") == files_of(tmp_path / f"part-{part:02d}")
        (tmp_path / "alone").rename(tmp_path / f"alone-{part}")

    SoftLabelDataset(config.source.open("train"), open_labels(config))
    monkeypatch.setattr(runs_parts, "get_context", None)  # no process is started for what is complete
    again = list(capture_parts(config))
    assert [report.units_done for _, _, report in again] == [0] * PARTS
    assert len(loaded) == 2
    assert [report for _, _, report in capture_parts(config, reuse=True)] == [None] * PARTS
    assert len(loaded) == 2


def test_a_part_that_cannot_be_read_ends_the_run_at_its_turn(corpus, tmp_path, one_process):
    each = {"name": "hf", "path": str(tmp_path / "{part}.jsonl"), "eval_share": 0.3}
    (tmp_path / "0.jsonl").write_bytes((corpus / "0.jsonl").read_bytes())
    made = capture_parts(config_of(corpus, tmp_path, source={"each": each}))
    assert not next(made)[1].missing_units
    with pytest.raises(SourceError, match=r"1\.jsonl"):
        next(made)


def test_a_part_of_another_tokenizer_is_refused_before_it_is_labeled(corpus, tmp_path, one_process):
    made = capture_parts(config_of(corpus, tmp_path, source={"tokenizer": "bpe?vocab_size=300"}))
    next(made)
    with pytest.raises(SourceError, match=r"part 1 has the tokenizer .*as in the first one"):
        next(made)
    assert not (tmp_path / "part-01").exists()


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ("{part:q}", r"expected \{part\} or \{part:03d\}"),
        ("{part}-{number}", r"'number'.*expected \{part\} or \{part:03d\}"),
    ],
)
def test_places_of_parts_are_checked(corpus, tmp_path, cache, message):
    with pytest.raises(ConfigError, match=message):
        _ = config_of(corpus, tmp_path, cache=cache).cache_places


def test_places_of_parts_are_of_a_corpus_in_parts(corpus, tmp_path):
    config = config_of(corpus, tmp_path)
    assert config.cache_places == [str(tmp_path / f"part-{part:02d}") for part in range(PARTS)]
    plain = {
        "name": "hf",
        "path": str(corpus / "0.jsonl"),
        "eval_share": 0.3,
        "each": None,
        "num_parts": None,
    }
    source = {
        key: value for key, value in {**config.source.model_dump(), **plain}.items() if value is not None
    }
    one = RunConfig.model_validate(config.model_dump() | {"source": source, "labels": {"k": 6}})
    with pytest.raises(ConfigError, match=r"is of a corpus in parts; source.name is 'hf': drop the \{part\}"):
        _ = one.cache_url
