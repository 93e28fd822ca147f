"""Language models end to end: labels row by row against a slow reference, students that start, die and go on."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from softcache.config.load import load_config
from softcache.config.run import RunConfig
from softcache.data.sources.text.source import load_tokenizer
from softcache.data.tokens import TokenData
from softcache.errors import (
    AlignmentError,
    ConfigError,
    IdentityError,
    IncompleteCacheError,
    LabelError,
    SourceError,
    SpecError,
)
from softcache.losses import distillation_loss
from softcache.losses.fused import fused_distillation_loss
from softcache.reader.dataset import SoftLabelDataset
from softcache.reader.open import open_cache
from softcache.runs import capture_labels, make_teacher, open_data, open_teacher, train_student
from softcache.student import StudentSettings
from tests.support.caches import ROOT, digits_config
from tests.support.text_caches import make_text_cache, text_config, write_texts


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A complete cache of tokens that tests read and never change, with its folder."""
    folder = tmp_path_factory.mktemp("text")
    return *make_text_cache(folder / "cache", folder), folder


def distributions(model, source, sample):
    """Log-probabilities of every labeled position, document by document, token by token: slow and obvious."""
    tokens, segments, learnt = source.sample(sample)[:3]
    rows = []
    for number in range(segments[-1] + 1):
        document = torch.from_numpy(tokens[segments == number].astype(np.int64))
        mask = learnt[segments == number]
        for t in range(len(document) - 1):
            if mask[t + 1]:
                with torch.no_grad():
                    logits = model(document[None, : t + 1]).logits[0, -1]
                rows.append((logits.double().log_softmax(-1), int(document[t + 1])))
    return rows


# -- labels ------------------------------------------------------------------------------------------------


def test_row_t_is_the_teachers_distribution_over_token_t_plus_1_of_the_same_document(made):
    config, data, cache, _ = made
    teacher = open_teacher(config, data)
    for sample in range(0, len(cache), 3):
        labels, rows = cache.read([sample]), distributions(teacher.model, data.train.source, sample)
        assert len(labels) == len(rows)
        for row, (log_probs, target) in enumerate(rows):
            ids = labels.ids[row].astype(int)
            assert labels.target_log_prob[row] == pytest.approx(float(log_probs[target]), abs=1e-4)
            assert ids[0] == int(log_probs.argmax())
            np.testing.assert_allclose(labels.log_probs[row], log_probs[ids], atol=4e-3)
            dropped = np.delete(log_probs.numpy(), ids)
            for place, t in enumerate(labels.temperatures):
                assert labels.log_tail[row, place] == pytest.approx(
                    float(np.logaddexp.reduce(dropped / t)), abs=1e-4
                )


def test_the_chunk_of_positions_and_the_batch_change_nothing(made, tmp_path):
    _, _, cache, folder = made
    _, _, other = make_text_cache(
        tmp_path / "cache", folder, capture={"chunk_positions": 1000, "batch_size": 3}
    )
    everything = np.arange(len(cache))
    one, two = cache.read(everything), other.read(everything)
    np.testing.assert_array_equal(one.ids[:, 0], two.ids[:, 0])
    np.testing.assert_allclose(one.target_log_prob, two.target_log_prob, atol=1e-4)
    np.testing.assert_allclose(one.log_tail, two.log_tail, atol=1e-4)


def test_killed_between_units_it_completes_what_is_missing_with_the_same_bytes(made, tmp_path, monkeypatch):
    config, data, cache, _ = made
    url = str(tmp_path / "cache")
    for point in ("after_shard", "before_marker", "after_marker"):
        count = itertools.count()

        def dies(name, point=point, count=count):
            if name == point and next(count) == 1:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("softcache.cache.units._failpoint", dies)
            with pytest.raises(KeyboardInterrupt):
                capture_labels(config, data, open_teacher(config, data), url)
        assert open_cache(url).missing_units
    again, report = capture_labels(config, data, open_teacher(config, data), url)
    assert report.units_found >= 1
    assert not again.missing_units
    for number, marker in cache.markers.items():
        assert [s.sha256 for s in again.markers[number].shards] == [s.sha256 for s in marker.shards]


def test_a_nan_logit_names_the_sample_and_the_position(tmp_path):
    with pytest.raises(LabelError, match=r"sample '.*doc.*', position \d+, view 0 \(unit 0\): a NaN logit"):
        make_text_cache(tmp_path / "cache", tmp_path, teacher={"model": "tests.fakes_language:nan_logits"})
    assert not list((tmp_path / "cache" / "units").glob("*.json"))


def test_a_masked_class_is_legal(tmp_path):
    _, _, cache = make_text_cache(
        tmp_path / "cache",
        tmp_path,
        teacher={"model": "tests.fakes_language:masked_class"},
        labels={"k": 250},
    )
    labels = cache.read(np.arange(len(cache)))
    assert (labels.stats[:, 3] == cache.num_classes - 1).all(), "the support is all classes but one"
    assert not (labels.ids == 5).any()
    assert np.isfinite(labels.at_temperature(2.0).log_tail).all()


def test_a_sequence_longer_than_the_teachers_context(tmp_path):
    with pytest.raises(SpecError, match=r"32.*16|16.*32"):
        make_text_cache(
            tmp_path / "cache",
            tmp_path,
            teacher={"model": "hf-config:" + save_config(tmp_path, context=16), "weights": None},
        )


def save_config(folder, context):
    from transformers import GPT2Config

    GPT2Config(vocab_size=300, n_positions=context, n_embd=16, n_layer=1, n_head=2).save_pretrained(
        folder / "gpt2"
    )
    return str(folder / "gpt2")


def test_a_random_teacher_is_refused(tmp_path):
    config = text_config(tmp_path, teacher={"model": "gpt2?width=16&depth=1&heads=2"})
    with pytest.raises(ConfigError, match=r"teacher\.weights: missing"):
        open_teacher(config, open_data(config))


# -- joining -----------------------------------------------------------------------------------------------


def test_every_sample_is_joined_with_its_own_labels(made):
    _, data, cache, _ = made
    dataset = SoftLabelDataset(data.train.source, cache)
    order = np.random.default_rng(1).permutation(len(cache))[:9].tolist()
    batch = dataset.fetch(order)
    start = 0
    for number, sample in enumerate(order):
        count = int(batch.row_counts[number])
        np.testing.assert_array_equal(
            batch.labels.ids[start : start + count].numpy(), cache.read([sample]).ids
        )
        start += count
    assert start == batch.num_rows == len(batch.labels)


CHANGES = {
    "another tokenizer": {"source": {"tokenizer": "bpe?vocab_size=280"}},
    "cut shorter": {"source": {"seq_len": 24}},
    "packed otherwise": {"source": {"packing": "documents"}},
    "in another order": {"source": {"shuffle_documents": False}},
    "fewer samples": {"source": {"max_train_samples": 10}},
    "attention across documents": {"source": {"cross_documents": True}},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_text_that_was_made_otherwise_is_refused(made, change):
    _, _, cache, folder = made
    config = text_config(folder, **change)
    data = open_data(config)
    with pytest.raises(AlignmentError, match=r"cache .*: (its|\d+ samples|sample)"):
        SoftLabelDataset(data.train, cache)
    with pytest.raises(IdentityError, match="made from something else"):
        capture_labels(config, data, open_teacher(config, data), cache.url)


def test_one_changed_document_is_refused_and_the_sample_named(made, tmp_path):
    _, _, cache, folder = made
    lines = (folder / "texts.jsonl").read_text().splitlines()
    documents = [json.loads(line) for line in lines]
    changed = next(d for d in documents if len(d["text"].split()) > 20)
    changed["text"] = changed["text"].replace("the", "thy", 1)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    load_tokenizer(text_config(folder).source).save_pretrained(tmp_path / "tokenizer")
    config = text_config(tmp_path, source={"tokenizer": str(tmp_path / "tokenizer")})
    with pytest.raises(
        AlignmentError, match=r"sample \d+ was '.*' when labeled|sample '.*' had|'.*' changed"
    ):
        SoftLabelDataset(open_data(config).train, cache)


def test_a_sample_that_changes_under_way_is_refused(made):
    _, data, cache, _ = made

    class Swapped(TokenData):
        def load(self, samples, view=0, *, fingerprints=True):
            return super().load(np.asarray(samples)[::-1].copy(), view, fingerprints=fingerprints)

    dataset = SoftLabelDataset(Swapped(data.train.source), cache)
    with pytest.raises(AlignmentError, match="the teacher saw content"):
        dataset.fetch([3, 4])


def test_a_pretrained_student_of_another_tokenizer_is_refused_with_the_way_out(made, tmp_path):
    config, data, cache, _ = made
    other = open_data(text_config(tmp_path, source={"tokenizer": "bpe?vocab_size=290"}))
    task = other.task(config, "gpt2?width=16&depth=1&heads=2")
    task.build().model.save_pretrained(tmp_path / "student")
    task.save_tokenizer(tmp_path / "student")
    with pytest.raises(IdentityError, match=r"student\.model .*: its tokenizer .* loss\.name = \"uld\""):
        train_student(config, data, model=f"hf:{tmp_path / 'student'}", labels="cache", cache=cache)


def test_image_caches_and_text_caches_are_not_taken_for_each_other(made, shared_cache):
    _, data, cache, _ = made
    with pytest.raises(AlignmentError, match="holds labels of kind 'image', the source is of kind 'tokens'"):
        SoftLabelDataset(data.train, shared_cache[2])
    with pytest.raises(AlignmentError, match="holds labels of kind 'tokens', the source is of kind 'image'"):
        SoftLabelDataset(shared_cache[1].train, cache)


# -- students ----------------------------------------------------------------------------------------------


def fit(made, out, *, model="llama?width=16&depth=1&heads=2", labels="cache", **tables):
    _, _, cache, folder = made
    config = text_config(folder, **tables)
    data = open_data(config)
    teacher = open_teacher(config, data) if labels == "online" else None
    return train_student(config, data, model=model, labels=labels, cache=cache, teacher=teacher, out=out)


def weights(out):
    return load_file(out / "model.safetensors")


def assert_same_weights(one, other, tolerance=0.0):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("model", ["gpt2", "llama", "qwen3"])
def test_one_cache_trains_students_of_every_family(made, tmp_path, model):
    metrics = fit(made, tmp_path, model=f"{model}?width=16&depth=1&heads=2")
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    assert metrics["history"][1]["train_loss"] < metrics["history"][0]["train_loss"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert_same_weights(dict(loaded.state_dict()), weights(tmp_path))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "hf")) == made[1].train.source.vocab_size


def test_the_held_out_loss_is_the_mean_over_all_rows(made, tmp_path):
    metrics = fit(made, tmp_path, train={"epochs": 1})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    source = made[1].evaluation.source
    rows = [row for sample in range(len(source)) for row in distributions(model, source, sample)]
    assert metrics["eval_loss"] == pytest.approx(
        -np.mean([float(lp[target]) for lp, target in rows]), abs=1e-4
    )
    assert metrics["accuracy"] == pytest.approx(np.mean([int(lp.argmax()) == target for lp, target in rows]))


@pytest.mark.parametrize("context", [8, 12, 31])
def test_a_student_of_shorter_context_loses_no_label(made, tmp_path, context):
    """Every window is a row of its own: the loss is that of the windows run one by one."""
    _, data, cache, folder = made
    config = text_config(folder, student={"context": context}, loss={"temperature": 2.0})
    task = data.task(config, "gpt2?width=16&depth=1&heads=2")
    torch.manual_seed(0)
    student = task.build()
    batch = SoftLabelDataset(data.train, cache).fetch([0, 1, 2, 3, 4])
    loss = task.loss(student, batch).item()
    logits = []
    for row in range(len(batch)):
        for start in range(0, batch.tokens.shape[1], context):
            window = slice(start, start + context)
            for number in batch.segments[row, window].unique():
                inside = batch.segments[row, window] == number
                logits.append(student.model(batch.tokens[row, window][inside][None]).logits[0])
    flat = torch.cat(logits)[batch.rows]
    expected = distillation_loss(flat, batch.labels, batch.targets, temperature=2.0, alpha=0.9)
    assert loss == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("labels", ["cache", "ground_truth", "online"])
def test_interrupted_again_and_again_it_ends_with_the_same_weights(made, tmp_path, monkeypatch, labels):
    from softcache.runs import fit as runs

    fit(made, tmp_path / "whole", labels=labels, train={"checkpoint_steps": 2})

    class Killed(Exception):
        pass

    real = runs.progress_bar
    for step in (1, 3, 5):
        steps = iter(range(1, step))

        def dying(*args, steps=steps, **kwargs):
            from contextlib import contextmanager

            @contextmanager
            def follow():
                def advance(count):
                    if next(steps, None) is None:
                        raise Killed

                yield advance

            return follow()

        with monkeypatch.context() as patch:
            patch.setattr(runs, "progress_bar", dying)
            with pytest.raises(Killed):
                fit(made, tmp_path / "broken", labels=labels, train={"checkpoint_steps": 2})
    assert runs.progress_bar is real
    fit(made, tmp_path / "broken", labels=labels, train={"checkpoint_steps": 2})
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


def test_accumulation_splits_the_batch_and_never_changes_the_gradient(made, tmp_path):
    """Rows, not samples, weigh the pieces: ragged pieces would otherwise count too much."""
    one = fit(made, tmp_path / "one", train={"epochs": 1})
    many = fit(made, tmp_path / "many", train={"epochs": 1, "accumulation_steps": 4})
    assert one["history"][0]["train_loss"] == pytest.approx(many["history"][0]["train_loss"], abs=1e-5)
    assert_same_weights(weights(tmp_path / "one"), weights(tmp_path / "many"), tolerance=2e-3)


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "by chunks"])
def test_the_live_teacher_and_a_dense_cache_teach_the_same(made, tmp_path, monkeypatch, at_once):
    monkeypatch.setattr("softcache.student.tasks.token_student.MAX_DENSE_ELEMENTS", 2**26 if at_once else 0)
    _, data, _, folder = made
    config = text_config(folder, labels={"policy": "dense"}, capture={"codec": {"values": "float32"}})
    cache, _ = capture_labels(config, data, open_teacher(config, data), str(tmp_path / "dense"))
    tables = {"train": {"epochs": 1}, "loss": {"temperature": 2.0}}
    online = fit(made, tmp_path / "online", labels="online", **tables)
    run = text_config(folder, labels={"policy": "dense"}, **tables)
    cached = train_student(
        run,
        data,
        model="llama?width=16&depth=1&heads=2",
        labels="cache",
        cache=cache,
        out=tmp_path / "cached",
    )
    assert cached["history"][0]["train_loss"] == pytest.approx(online["history"][0]["train_loss"], abs=1e-4)
    assert cached["eval_loss"] == pytest.approx(online["eval_loss"], abs=1e-3)


def test_what_accelerate_launch_is_asked_for_and_a_capture_does_not_do_is_refused(
    made, tmp_path, monkeypatch
):
    _, data, _, folder = made

    def labeled(dtype):
        config = text_config(folder, capture={"dtype": dtype})
        return capture_labels(config, data, open_teacher(config, data), str(tmp_path / dtype))

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(
        ConfigError, match=r"teacher-logits: .*mixed_precision.* expected 'no'.*; set capture\.dtype"
    ):
        labeled("float32")
    labeled("bfloat16")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"teacher-logits: .*use_fsdp.*; cut a teacher by tp_plan"):
        labeled("bfloat16")


def test_a_padded_head_of_teacher_or_student_goes_with_the_same_tokenizer(made, tmp_path):
    _, data, _, folder = made

    def narrow(teacher):
        config = text_config(folder, teacher={"model": f"tests.fakes_language:{teacher}"})
        cache, _ = capture_labels(config, data, open_teacher(config, data), str(tmp_path / teacher))
        assert cache.num_classes == data.train.source.vocab_size + 20
        how = {"model": "gpt2?width=16&depth=1&heads=2", "labels": "cache", "cache": cache}
        return train_student(config, data, out=tmp_path / f"narrow-{teacher}", **how)

    assert math.isfinite(narrow("padded_quietly")["eval_loss"])
    with pytest.raises(
        LabelError, match=r"head has 300 classes, the teacher's 320; .* to classes that the student lacks"
    ):
        narrow("padded")
    wide = fit(made, tmp_path / "wide", model="tests.fakes_language:padded")
    assert math.isfinite(wide["eval_loss"])


# -- another tokenizer -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """A cache of whole documents, as labels for another tokenizer need."""
    folder = tmp_path_factory.mktemp("documents")
    return *make_text_cache(folder / "cache", folder, source={"packing": "documents"}), folder


OTHER = {
    "student": {"tokenizer": "bpe?vocab_size=280"},
    "loss": {"name": "uld"},
    "source": {"packing": "documents"},
}


def test_a_student_of_another_tokenizer_learns_by_sorted_probabilities(documents, tmp_path):
    _, _, cache, folder = documents
    config = text_config(folder, **OTHER)
    data = open_data(config)
    how = {"model": "llama?width=16&depth=1&heads=2", "cache": cache}
    metrics = train_student(config, data, labels="cache", out=tmp_path / "cache", **how)
    assert metrics["history"][1]["train_loss"] < metrics["history"][0]["train_loss"]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "cache" / "hf")) == 280
    hard = train_student(config, data, labels="ground_truth", out=tmp_path / "hard", **how)
    assert hard["eval_loss"] != metrics["eval_loss"]


def test_row_r_of_a_document_meets_row_r_of_the_students_tokens(documents):
    _, data, cache, folder = documents
    config = text_config(folder, **OTHER)
    dataset, chosen = data.train_dataset(config, cache)
    student = data.student_data(config).train.source
    keys = student.keys()
    order = [int(chosen[4]), int(chosen[1]), int(chosen[2])]
    batch, start = dataset.fetch([(sample, 0) for sample in order]), 0
    for number, sample in enumerate(order):
        partner = student.sample(keys.index(data.train.source.key(sample)))
        labels = cache.read([sample])
        count = min(len(labels), len(partner.rows))
        assert batch.row_counts[number] == count == dataset.rows_of[sample]
        rows = slice(start, start + count)
        np.testing.assert_array_equal(batch.labels.ids[rows].numpy(), labels.ids[:count])
        np.testing.assert_array_equal(batch.targets[rows].numpy(), partner.tokens[partner.rows[:count] + 1])
        start += count
    assert start == batch.num_rows


@pytest.mark.parametrize(
    ("tables", "match"),
    [
        ({"loss": {"name": "uld"}}, r"student\.tokenizer: missing"),
        ({"student": {"tokenizer": "bpe?vocab_size=280"}}, r"set loss\.name = \"uld\""),
    ],
)
def test_another_tokenizer_and_the_loss_for_it_go_together(documents, tmp_path, tables, match):
    _, _, cache, folder = documents
    config = text_config(folder, source={"packing": "documents"}, **tables)
    with pytest.raises(ConfigError, match=match):
        train_student(config, open_data(config), model="gpt2", labels="cache", cache=cache, out=tmp_path)


@pytest.mark.parametrize("student", [OTHER["student"], {"context": 8}, {**OTHER["student"], "context": 8}])
def test_a_teacher_learns_its_own_tokens_and_context_whatever_the_students(in_tmp, student):
    """Trained on the student's tokens, it would not load; with a vocabulary of the same size it would, and label nonsense."""
    tables = {
        "source": OTHER["source"],
        "teacher": {
            "model": "gpt2?width=16&depth=1&heads=2",
            "weights": "runs/test-text/teacher/model.safetensors",
        },
        "train_teacher": {"epochs": 1, "batch_size": 8, "device": "cpu"},
    }
    loss = OTHER["loss"] if "tokenizer" in student else {}
    trained = []
    for config in (
        text_config(in_tmp, **tables),
        text_config(in_tmp, student=student, loss=loss, **tables),
    ):
        data = open_data(config)
        make_teacher(config, data)
        open_teacher(config, data)
        trained.append(
            [
                (in_tmp / f"runs/test-text/teacher/{name}").read_bytes()
                for name in ("model.safetensors", "config.json")
            ]
        )
        shutil.rmtree(in_tmp / "runs/test-text/teacher")
    assert trained[0] == trained[1]


def test_a_live_teacher_of_other_tokens_is_refused_and_not_left_out(documents, tmp_path):
    config = text_config(documents[3], **OTHER)
    data = open_data(config)
    with pytest.raises(
        ConfigError, match=r"teacher .*: cannot label .* student\.tokenizer .*; train from a cache"
    ):
        train_student(
            config, data, model="gpt2", labels="online", teacher=open_teacher(config, data), out=tmp_path
        )


def test_a_resolved_config_has_the_students_tokenizer_and_context(documents, tmp_path):
    _, _, cache, folder = documents
    config = text_config(folder, **(OTHER | {"student": {**OTHER["student"], "context": 16}}))
    model = "llama?width=8&depth=1&heads=2"
    train_student(config, open_data(config), model=model, labels="cache", cache=cache, out=tmp_path)
    resolved = RunConfig.model_validate(json.loads((tmp_path / "resolved.json").read_text()))
    assert resolved.student == StudentSettings(model=model, **{**OTHER["student"], "context": 16})


def test_packed_samples_cannot_be_joined_with_another_tokenizers(made, tmp_path):
    _, _, cache, folder = made
    config = text_config(folder, student=OTHER["student"], loss=OTHER["loss"])
    with pytest.raises(SourceError, match=r'set source\.packing = "documents"'):
        train_student(config, open_data(config), model="gpt2", labels="cache", cache=cache, out=tmp_path)


def test_a_student_without_a_head_is_refused(made, tmp_path):
    with pytest.raises(SpecError, match="get_output_embeddings"):
        fit(made, tmp_path, model="tests.fakes_language:headless")


def test_stop_at_is_a_held_out_loss(made, tmp_path):
    assert fit(made, tmp_path, train={"epochs": 5, "target_metric": 100.0})["epochs"] == 1


def test_missing_units_need_allow_partial(made, tmp_path):
    config, data, cache, _ = made
    shutil.copytree(cache.url, tmp_path / "cache")
    (tmp_path / "cache" / "units" / "00001.json").unlink()
    partial = open_cache(str(tmp_path / "cache"))
    how = {"model": "llama?width=16&depth=1&heads=2", "labels": "cache", "cache": partial}
    with pytest.raises(IncompleteCacheError, match="--allow-partial"):
        train_student(config, data, out=tmp_path / "no", **how)
    assert train_student(config, data, out=tmp_path / "yes", allow_partial=True, **how)["epochs"] == 2


# -- the config --------------------------------------------------------------------------------------------


def write_config(folder, text):
    (folder / "run.toml").write_text(text)
    return folder / "run.toml"


BAD = {
    "tokenizr": (
        '[source]\nmodality="text"\nname="stdlib"\ntokenizr="x"\n',
        r"source\.tokenizr: unknown key with name = 'stdlib'; did you mean tokenizer",
    ),
    "no tokenizer": ('[source]\nmodality="text"\nname="stdlib"\n', r"source\.tokenizer: missing"),
    "views": (
        '[source]\nmodality="text"\nname="stdlib"\ntokenizer="bpe"\n[views]\nflip=0.5\n',
        "views: a table for images",
    ),
    "num_views": (
        '[source]\nmodality="text"\nname="stdlib"\ntokenizer="bpe"\n[labels]\nnum_views=2\n',
        r"labels\.num_views: text has one view",
    ),
    "modality": (
        '[source]\nmodality="sound"\nname="x"\n',
        r"source\.modality: modality 'sound': unknown; known: .*image, multi_label, segmentation, text",
    ),
    "uld": ('[source]\nname="digits"\n[loss]\nname="uld"\n', r"loss\.name: uld compares"),
}


@pytest.mark.parametrize(("text", "match"), BAD.values(), ids=BAD.keys())
def test_a_bad_config_is_refused_by_its_dotted_name(tmp_path, text, match):
    with pytest.raises(ConfigError, match=match):
        load_config(write_config(tmp_path, text))


@pytest.mark.parametrize("name", ["stdlib-lm", "hf-causal-lm"])
def test_the_text_configs_load(name):
    config = load_config(ROOT / "configs" / f"{name}.toml")
    assert config.source.modality == "text"
    assert digits_config().source.modality == "image"


def test_the_teacher_is_trained_once_where_it_has_no_weights(in_tmp):
    write_texts(in_tmp / "texts.jsonl")
    config = text_config(
        in_tmp,
        teacher={
            "model": "gpt2?width=16&depth=1&heads=2",
            "weights": "runs/test-text/teacher/model.safetensors",
        },
        train_teacher={"epochs": 1, "batch_size": 8, "device": "cpu"},
    )
    data = open_data(config)
    make_teacher(config, data)
    stamp = (in_tmp / "runs/test-text/teacher/model.safetensors").stat().st_mtime_ns
    make_teacher(config, data)
    assert (in_tmp / "runs/test-text/teacher/model.safetensors").stat().st_mtime_ns == stamp
    cache, _ = capture_labels(config, data, open_teacher(config, data), "cache")
    assert cache.manifest.teacher.eval_loss == pytest.approx(
        json.loads((in_tmp / "runs/test-text/teacher/metrics.json").read_text())["eval_loss"], abs=1e-4
    )


# -- memory ------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_neither_side_ever_holds_the_logits_of_a_batch(made):
    """A batch of 8 x 32 positions over 300 classes is 73,000 logits; nothing comes near."""
    config, data, cache, _ = made
    batch = SoftLabelDataset(data.train, cache).fetch(list(range(8)))
    assert batch.num_rows > 150
    teacher = open_teacher(config, data)
    with Largest() as teaching:
        teacher.label(data.train.load(range(8)), config.labels)
    student = data.task(config, "llama?width=16&depth=1&heads=2").build()
    parts = student._parts
    with Largest() as learning:
        loss = fused_distillation_loss(
            student._hidden(batch),
            parts.weight,
            batch.labels,
            batch.targets,
            temperature=2.0,
            alpha=0.5,
            chunk_positions=16,
        )
        loss.backward()
    bound = batch.num_rows * cache.num_classes // 2
    assert teaching.numel < bound
    assert learning.numel < bound
