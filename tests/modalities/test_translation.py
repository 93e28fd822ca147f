"""Encoder-decoder models: pairs of texts, their parts, labels of the target, and what a model writes."""

import json
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from click.testing import CliRunner

from softcache.cache.storage.local import LocalObjects
from softcache.data.sources import source_settings
from softcache.data.sources.translation.source import load_pairs, open_translation
from softcache.data.tokens import TokenData
from softcache.errors import ConfigError, IdentityError, SourceError, SpecError
from softcache.losses import cross_entropy
from softcache.losses.fused import fused_distillation_loss
from softcache.models.language import (
    PairTokens,
    build_language_model,
    build_translation_model,
    check_split,
    split,
)
from softcache.models.language.generate import translate
from softcache.runs import capture_labels, open_data, open_teacher, train_student
from softcache.runs.tables import translation_rows
from softcache.stages.cli import softcache
from softcache.student.tasks.translation import corpus_scores
from softcache.teacher.generate import generate_source
from softcache.testing import FaultyObjects, Killed
from softcache.tools.verify.teacher import verify_against_teacher, verify_units
from tests.support.translations import translation_config, write_package

TOKENS = PairTokens(pad=0, start=0, end=1)
SPECS = ["t5?width=32&depth=2&heads=4", "marian?width=32&depth=2&heads=4"]


def settings(**more):
    return source_settings({"modality": "translation", "tokenizer": "bpe?vocab_size=300"} | more)


# -- pairs -------------------------------------------------------------------------------------------------


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))

    def ship(name, **how):
        write_package(tmp_path, name, **how)
        found = settings(
            name="gettext", package=name, languages=how.get("languages", ("de",)), eval_share=0.4
        )
        return {pair.source: pair for split in ("train", "eval") for pair in load_pairs(found, split).pairs}

    return ship


@pytest.mark.parametrize("kind", ["po", "mo"])
def test_a_catalogue_gives_pairs_without_what_nobody_translated(shipped, kind):
    pairs = shipped(f"shipped_{kind}", kind=kind)
    assert {source: pair.target for source, pair in pairs.items()} == {
        "Save": "Speichern",
        "Delete": "Löschen",
        "May": "Dürfen",
        "%d file": "%d Datei",
        "%d files": "%d Dateien",
    }
    assert pairs["Save"].key.startswith("de/")


def test_a_language_that_is_not_there_is_named(shipped):
    shipped("shipped_de", languages=("de",))
    with pytest.raises(SourceError, match=r"no catalogue .* for 'fr'; it has de"):
        load_pairs(settings(name="gettext", package="shipped_de", languages=("fr",)), "train")


def test_no_english_string_of_django_is_both_learnt_from_and_scored_on():
    django = settings(name="gettext", package="django", languages=("de", "cy"))
    train, held_out = load_pairs(django, "train").pairs, load_pairs(django, "eval").pairs
    assert not {pair.source for pair in train} & {pair.source for pair in held_out}
    for language, least in (("de", 800), ("cy", 600)):
        assert sum(pair.language == language for pair in [*train, *held_out]) >= least
        assert sum(pair.language == language for pair in held_out) >= 50
    keys = [pair.key for pair in [*train, *held_out]]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (
            '{"key": "k7", "source": "one", "target": "  "}',
            r"bad\.jsonl, line 2: key 'k7': the target is empty",
        ),
        ('{"source": "", "target": "eins"}', r"bad\.jsonl, line 2: key 'bad\.jsonl:2': the source is empty"),
        ('{"source": 3, "target": "drei"}', r"line 2: source is int 3; expected a text"),
        ("[1]", r"line 2: expected an object"),
    ],
)
def test_a_pair_with_an_empty_side_is_named_by_key_and_file(tmp_path, line, complaint):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"source": "good", "target": "gut"}\n' + line + "\n")
    with pytest.raises(SourceError, match=complaint):
        load_pairs(settings(name="files", path=str(path)), "train")


def test_tsv_pairs_are_merged_and_an_overlap_of_splits_is_refused(tmp_path):
    (tmp_path / "a.tsv").write_text("\ufeffone\teins\tde\none\teins\tde\tagain\ntwo\tzwei\tde\n")
    (tmp_path / "b.tsv").write_text("two\tzwo\tde\n")
    pairs = settings(name="files", path=str(tmp_path / "a.tsv"), eval_share=0.01)
    assert {(pair.key, pair.source) for pair in load_pairs(pairs, "train").pairs} == {
        ("a.tsv:1", "one"),
        ("a.tsv:3", "two"),
    }
    with pytest.raises(SourceError, match=r"1 of its source texts are in .*'two'"):
        load_pairs(pairs.model_copy(update={"eval_path": str(tmp_path / "b.tsv")}), "eval")


def test_several_languages_need_a_way_to_ask_for_one(tmp_path):
    config = translation_config(tmp_path)
    data = open_data(config)
    data.save_tokenizer(tmp_path / "mine")
    (tmp_path / "more.tsv").write_text("one\tun\tfr\ntwo\tdos\tes\n")
    other = config.source.model_copy(
        update={"path": str(tmp_path / "more.tsv"), "eval_share": 0.01, "tokenizer": str(tmp_path / "mine")}
    )
    with pytest.raises(SpecError, match=r"nothing says that the target is es or fr; give source.prefixes"):
        open_translation(other, split="train")
    prefixed = other.model_copy(update={"prefixes": {"fr": "French: ", "es": "Spanish: "}})
    assert len(open_translation(prefixed, split="train")) == 2


def test_rows_are_the_tokens_of_the_target_and_fingerprints_cover_both_sides(tmp_path):
    data = open_data(translation_config(tmp_path))
    pairs = data.pairs_by_key("train")
    batch = data.train.load([0, 1, 2])
    for row, number in enumerate(batch.samples):
        pair = pairs[data.train.source.key(int(number))]
        ((source, target),) = data._tokenizer.encode([pair])
        mine = batch.rows // batch.tokens.shape[1] == row
        assert batch.targets[mine].tolist() == target[1:].tolist()
        assert batch.tokens[row, : len(source)].tolist() == source.tolist()
        assert data.decode([target]) == [pair.target]

    class Changed:
        def __init__(self, source, token):
            self._source, self._token = source, token

        def __getattr__(self, name):
            return getattr(self._source, name)

        def sample(self, number):
            sample = self._source.sample(number)
            tokens = sample.tokens.copy()
            tokens[self._token] += 1
            return sample._replace(tokens=tokens)

    for token in (1, -2):  # a word of the source, a word of the target
        changed = TokenData(Changed(data.train.source, token)).load([0, 1, 2])
        assert not (changed.fingerprints == batch.fingerprints).any()


# -- models ------------------------------------------------------------------------------------------------


def ragged(vocab_size):
    """Pairs of ragged lengths as a batch of tokens and segments, and as a model takes them, pair by pair."""
    draw = np.random.default_rng(0)
    pairs = [
        (draw.integers(2, vocab_size, s), np.r_[0, draw.integers(2, vocab_size, t)])
        for s, t in ((4, 7), (9, 1), (1, 3))
    ]
    longest = max(len(source) + len(target) for source, target in pairs)
    tokens, segments = np.zeros((3, longest), np.int64), np.full((3, longest), 2)
    for row, (source, target) in enumerate(pairs):
        tokens[row, : len(source) + len(target)] = [*source, *target]
        segments[row, : len(source) + len(target)] = [0] * len(source) + [1] * len(target)
    return torch.from_numpy(tokens), torch.from_numpy(segments), pairs


@pytest.mark.parametrize("spec", SPECS)
def test_hidden_times_head_is_what_the_model_says_of_each_pair_alone(spec):
    torch.manual_seed(0)
    model = build_translation_model(spec, vocab_size=90, context=16, tokens=TOKENS).eval()
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    parts = split(model)
    check_split(model, parts)
    tokens, segments, pairs = ragged(90)
    hidden = parts.hidden(tokens, segments)
    for row, (source, target) in enumerate(pairs):
        expected = model(
            input_ids=torch.from_numpy(source)[None], decoder_input_ids=torch.from_numpy(target)[None]
        ).logits[0]
        torch.testing.assert_close(
            parts.logits(hidden[row, segments[row] == 1]), expected, atol=2e-5, rtol=2e-5
        )
    rows = (segments == 1).flatten()
    targets = torch.arange(int(rows.sum())) % 90
    flat = hidden.flatten(0, 1)[rows]
    fused = fused_distillation_loss(
        flat, parts.weight, None, targets, temperature=1.0, alpha=0.0, bias_V=parts.bias, logit_scale=parts.logit_scale
    )  # fmt: skip
    torch.testing.assert_close(fused, cross_entropy(parts.logits(flat), targets).mean())
    fused.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_a_model_that_does_more_than_its_head_is_refused():
    model = build_translation_model(SPECS[0], vocab_size=90, context=16, tokens=TOKENS).eval()
    parts = split(model)
    object.__setattr__(parts, "logit_scale", 1.0)  # T5's scale of tied embeddings forgotten
    with pytest.raises(SpecError, match="something happens between hidden state and logits"):
        check_split(model, parts)


def test_models_of_the_other_kind_are_refused(tmp_path):
    with pytest.raises(SpecError, match="has no encoder and decoder; expected one for pairs"):
        build_translation_model("tests.fakes_language:known", vocab_size=90, context=16, tokens=TOKENS)
    with pytest.raises(SpecError, match="expected a causal language model for a text"):
        build_language_model("tests.modalities.test_translation:seq2seq", vocab_size=90, context=16)
    with pytest.raises(SpecError, match=r"unknown name 'marion'; did you mean marian"):
        build_translation_model("marion", vocab_size=90, context=16, tokens=TOKENS)
    with pytest.raises(SpecError, match="its decoder starts with token 0; expected 5"):
        build_translation_model(
            "tests.modalities.test_translation:seq2seq", vocab_size=90, context=16, tokens=PairTokens(5, 5, 1)
        )


def seq2seq(vocab_size, context):
    return build_translation_model(SPECS[0], vocab_size=vocab_size, context=context, tokens=TOKENS)


def test_a_saved_model_comes_back_with_its_tokenizer_and_another_one_is_refused(tmp_path):
    config = translation_config(tmp_path)
    data = open_data(config)
    model = build_translation_model(SPECS[1], vocab_size=data.num_classes, context=65, tokens=data.tokens)
    model.save_pretrained(tmp_path / "saved")
    data.save_tokenizer(tmp_path / "saved")
    spec = f"hf:{tmp_path / 'saved'}"
    own = translation_config(tmp_path, source={"tokenizer": str(tmp_path / "saved")}, teacher={"model": spec})
    teacher = open_teacher(own, open_data(own))
    assert torch.equal(teacher.model.get_input_embeddings().weight, model.get_input_embeddings().weight)
    other = translation_config(tmp_path, source={"tokenizer": "bpe?vocab_size=290"}, teacher={"model": spec})
    with pytest.raises(IdentityError, match=r"teacher\.model .* its tokenizer .* is not that of the source"):
        open_teacher(other, open_data(other))


# -- labels and students -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("translation")
    config = translation_config(folder)
    data = open_data(config)
    teacher = open_teacher(config, data)
    cache, _ = capture_labels(config, data, teacher, str(folder / "cache"))
    return folder, config, data, teacher, cache


def test_labels_are_the_teachers_own_on_the_forced_target(captured):
    _, _, data, teacher, cache = captured
    assert list(verify_units(cache)) == []
    confirmed = verify_against_teacher(cache, data.train, teacher, num_rows=50, threshold_nats=1e-4, seed=0)
    assert list(confirmed) == []
    labels = cache.read([3])
    batch = data.train.load([3])
    ((source, target),) = data._tokenizer.encode([data.pairs_by_key("train")[data.train.source.key(3)]])
    logits = teacher.model(
        input_ids=torch.from_numpy(source).long()[None],
        decoder_input_ids=torch.from_numpy(target[:-1]).long()[None],
    ).logits[0]
    best = logits.log_softmax(-1).topk(6)
    assert batch.num_rows == len(target) - 1
    assert np.array_equal(labels.ids, best.indices.numpy())
    np.testing.assert_allclose(labels.log_probs, best.values.detach().numpy(), atol=5e-3, rtol=5e-3)


def test_students_learn_from_the_cache_and_are_scored_per_language(captured, tmp_path):
    _, config, data, _, cache = captured
    metrics = train_student(
        config, data, model=config.student.model, labels="cache", cache=cache, out=tmp_path / "run"
    )
    assert {"chrf", "bleu", "chrf_de", "chrf_ed", "bleu_de", "bleu_ed", "eval_loss"} <= metrics.keys()
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert written["chrf_de"] == metrics["chrf_de"]
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "hf")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run" / "hf")) == data.num_classes


def test_the_last_table_of_a_training_has_chrf_and_bleu_per_language(captured, in_tmp):
    """Of one student both of whose trainings are scored, and of one that has no baseline."""
    _, config, _, _, cache = captured
    tables = config.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    (in_tmp / "pairs.toml").write_text(tomli_w.dumps(tables))
    arguments = [
        "train-student",
        "--config",
        "pairs.toml",
        "--cache",
        cache.url,
        "--out",
        "run",
        "--baseline",
    ]
    shown = CliRunner().invoke(softcache, arguments)
    assert shown.exit_code == 0, shown.output
    lines = [line.split() for line in shown.stdout.splitlines()]
    run = json.loads((in_tmp / "run" / "metrics.json").read_text())
    (path,) = in_tmp.glob("runs/*/students/*hard*/metrics.json")
    hard = json.loads(path.read_text())
    for language, suffix in (("de", "_de"), ("ed", "_ed"), ("mean", "")):
        scores = [f"{of[name + suffix]:.1f}" for name in ("chrf", "bleu") for of in (run, hard)]
        assert [config.student.model, "│", language, *(x for s in scores for x in ("│", s))] in [
            line[1:-1] for line in lines
        ], shown.stdout
    alone = next(iter(translation_rows([(run | {"model": "t5"}, None)])))
    assert alone == ("t5", "de", f"{run['chrf_de']:.1f}", "-", f"{run['bleu_de']:.1f}", "-")
    assert list(translation_rows([({"model": "linear", "accuracy": 0.9}, None)])) == []


def test_scores_are_those_of_sacrebleu_and_perfect_for_the_reference():
    triples = [("de", "das ist ein kleines Haus", "das ist ein kleines Haus"), ("cy", "xyz", "tŷ bach")]
    scores = corpus_scores(triples)
    assert scores["chrf_de"] == pytest.approx(100)
    assert scores["bleu_de"] == pytest.approx(100)
    assert scores["chrf"] == pytest.approx((100 + scores["chrf_cy"]) / 2)
    assert scores["chrf_cy"] < 20


# -- what a teacher writes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
def test_a_translation_does_not_depend_on_its_batch(captured, beams):
    _, _, data, teacher, _ = captured
    how = {"tokens": data.tokens, "max_tokens": 12, "beams": beams}
    samples = np.array([5, 0, 9, 2])
    together = translate(teacher.model, teacher.parts, data.train, samples, **how)
    for sample, found in zip(samples, together, strict=True):
        (alone,) = translate(teacher.model, teacher.parts, data.train, np.array([sample]), **how)
        assert np.array_equal(alone.tokens, found.tokens)
        assert alone.log_prob == pytest.approx(found.log_prob, abs=1e-3)
        ((source, _),) = data._tokenizer.encode(
            [data.pairs_by_key("train")[data.train.source.key(int(sample))]]
        )
        target = torch.tensor([[data.tokens.start, *found.tokens, data.tokens.end]])
        logits = teacher.model(
            input_ids=torch.from_numpy(source).long()[None], decoder_input_ids=target[:, :-1]
        ).logits
        expected = logits.log_softmax(-1).gather(2, target[:, 1:, None]).sum().item()
        assert found.log_prob == pytest.approx(expected, abs=1e-3)


def test_a_checkpoints_own_way_to_search_changes_nothing(captured):
    _, _, data, teacher, _ = captured
    how = {"tokens": data.tokens, "max_tokens": 12, "beams": 2}
    before = translate(teacher.model, teacher.parts, data.train, np.arange(4), **how)
    own = teacher.model.generation_config
    try:
        own.repetition_penalty, own.no_repeat_ngram_size, own.num_return_sequences = 5.0, 1, 2
        after = translate(teacher.model, teacher.parts, data.train, np.arange(4), **how)
        assert teacher.model.generation_config is own
    finally:
        own.repetition_penalty, own.no_repeat_ngram_size, own.num_return_sequences = None, None, None
    assert [one.tokens.tolist() for one in after] == [one.tokens.tolist() for one in before]


def files_of(folder: Path):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def generated(captured):
    folder, config, data, teacher, _ = captured
    generate_source(LocalObjects(folder / "generated", create=True), data, teacher, config.generate)
    return folder / "generated"


@pytest.mark.parametrize("puts", [0, 1, 5, 6, 7])
def test_killed_at_any_put_and_run_again_it_writes_the_same_bytes(captured, generated, tmp_path, puts):
    _, config, data, teacher, _ = captured
    objects = FaultyObjects(LocalObjects(tmp_path / "out", create=True), at={("put", puts): "killed"})
    try:
        generate_source(objects, data, teacher, config.generate)
    except Killed:
        assert not (tmp_path / "out" / "manifest.json").exists()
    again = LocalObjects(tmp_path / "out", create=True)
    generate_source(again, data, teacher, config.generate)
    assert files_of(tmp_path / "out") == files_of(generated)
    assert generate_source(again, data, teacher, config.generate).parts_done == 0


def test_a_source_that_another_run_began_is_never_overwritten(captured, generated, tmp_path):
    _, config, data, teacher, _ = captured
    before = files_of(generated)
    other = config.generate.model_copy(update={"beams": 1})
    with pytest.raises(IdentityError, match=r"generate\.beams: 1 now, 2 there"):
        generate_source(LocalObjects(generated), data, teacher, other)
    assert files_of(generated) == before
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SourceError, match=r"there is something else \(thesis\.txt\)"):
        generate_source(LocalObjects(tmp_path), data, teacher, config.generate)
    assert list(files_of(tmp_path)) == ["thesis.txt"]


def test_what_the_teacher_wrote_is_a_source_with_the_same_tokenizer(captured, generated, tmp_path):
    folder, config, data, _, _ = captured
    source = {
        "modality": "translation",
        "name": "generated",
        "path": str(generated),
        "max_tokens": 400,  # a random teacher's text has more tokens when it is read again
        "data_dir": str(folder / "data"),
    }
    tables = config.model_dump(mode="json", exclude_unset=True) | {"source": source}
    from softcache.config.load import build_config

    run = build_config(tables, "generated")
    theirs = open_data(run)
    assert theirs.train.source.tokenizer_digest == data.train.source.tokenizer_digest
    assert theirs.num_classes == data.num_classes
    assert theirs.evaluation.source.digest == data.evaluation.source.digest
    for key, pair in theirs.pairs_by_key("train").items():
        assert pair.reference == data.pairs_by_key("train")[key].target
        assert pair.source == data.pairs_by_key("train")[key].source
    teacher = open_teacher(run, theirs)
    cache, _ = capture_labels(run, theirs, teacher, str(tmp_path / "cache"))
    for labels in ("ground_truth", "cache"):
        metrics = train_student(
            run, theirs, model=run.student.model, labels=labels, cache=cache, out=tmp_path / labels
        )
        assert metrics["chrf"] >= 0


def test_a_part_that_changed_or_is_not_finished_is_refused(captured, generated, tmp_path):
    import shutil

    shutil.copytree(generated, tmp_path / "copy")
    changed = settings(name="generated", path=str(tmp_path / "copy"), tokenizer=None)
    part = tmp_path / "copy" / "train" / "00000.jsonl"
    part.write_bytes(part.read_bytes() + b"\n")
    with pytest.raises(SourceError, match=r"00000\.jsonl: sha256 .* that of manifest.json"):
        load_pairs(changed, "train")
    (tmp_path / "copy" / "manifest.json").unlink()
    with pytest.raises(SourceError, match=r"run `softcache teacher-generate` to the end"):
        load_pairs(changed, "train")


# -- configs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tables", "complaint"),
    [
        (
            {"source": {"eval_path": None, "package": "django"}},
            "source.package: unknown key with name = 'files'",
        ),
        ({"student": {"context": 16}}, r"student\.context: not for pairs of texts"),
        ({"student": {"tokenizer": "gpt2"}}, r"student\.tokenizer: not for pairs of texts"),
        ({"loss": {"name": "uld"}}, r"loss\.name: uld is for texts"),
        ({"views": {"flip": 0.5}}, "views: a table for images"),
    ],
)
def test_settings_that_make_no_sense_for_pairs_are_refused(tmp_path, tables, complaint):
    with pytest.raises(ConfigError, match=complaint):
        translation_config(tmp_path, **tables)


def test_the_command_writes_a_source(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from softcache.stages.cli import softcache

    monkeypatch.chdir(tmp_path)
    config = translation_config(tmp_path)
    import tomli_w

    tables = config.model_dump(mode="json", exclude_unset=True)
    (tmp_path / "run.toml").write_text(tomli_w.dumps(tables))
    result = CliRunner().invoke(
        softcache, ["teacher-generate", "--config", "run.toml", "--out", "out"], catch_exceptions=False
    )
    assert "parts made now, 0 found" in result.output
    refused = CliRunner().invoke(
        softcache, ["teacher-generate", "--config", "run.toml", "--out", "s3://bucket/out"]
    )
    assert "s3://bucket/out: expected a path of this machine" in refused.output
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["teacher"]["spec"] == "tests.support.translations:known"
    line = json.loads((tmp_path / "out" / "train" / "00000.jsonl").read_text().splitlines()[0])
    assert list(line) == ["key", "source", "target", "score", "reference", "language"]
