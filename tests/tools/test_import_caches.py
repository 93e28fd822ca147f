"""Caches of other programs: what their own writers wrote comes out as it was, and what cannot be a label is refused."""

import io
import json
import pickle
import shutil
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from softcache.cache import units
from softcache.data.images import ViewedSource
from softcache.errors import (
    AlignmentError,
    ConfigError,
    IdentityError,
    LabelError,
    SourceError,
    TemperatureError,
)
from softcache.reader.dataset import SoftLabelDataset
from softcache.reader.open import open_cache
from softcache.runs import open_data, train_student
from softcache.stages.import_labels import import_command
from softcache.stages.inspect import inspect_command
from softcache.tools.convert import convert_cache
from softcache.tools.import_caches import TopRows, import_cache, open_original
from softcache.tools.import_caches.crops import FKDCrops
from softcache.tools.import_caches.top_rows import LEAST_TAIL, soft_labels
from softcache.tools.verify.teacher import verify_units
from tests.data.test_text_source import save_tokenizer
from tests.support.caches import digits_config, hold_unit
from tests.support.text_caches import text_config, write_texts

ORIGINALS = Path(__file__).parent / "originals"
SETTINGS = {"unit_samples": 64, "chunk_samples": 32, "batch_size": 40}


def digits(**tables):
    return open_data(digits_config(source={"max_train_samples": 120}, **tables)).train


def digits_like(cache, logits_SNV):
    """Compares a cache of rounded probabilities with the logits, [view, sample, class], that they are of."""
    for view, logits_NV in enumerate(logits_SNV):
        labels = cache.read(np.arange(len(cache)), view)
        log_probs_NV = torch.tensor(logits_NV).log_softmax(-1).numpy()
        expected_NK = np.take_along_axis(log_probs_NV, labels.ids.astype(np.int64), 1)
        top_NK = np.sort(log_probs_NV, axis=1)[:, ::-1][:, : labels.k]
        np.testing.assert_allclose(expected_NK, top_NK, atol=1e-3)  # ties of float16
        # Rounded as the original's float16, and as float16 logarithms.
        most_NK = np.exp(expected_NK) * 2**-11 * (1.01 - expected_NK) + 2**-25
        assert (np.abs(np.exp(labels.log_probs.astype(float)) - np.exp(expected_NK)) <= most_NK).all()
        dropped_N = 1 - np.exp(expected_NK).sum(1)
        np.testing.assert_allclose(np.exp(labels.log_tail[:, 0]), dropped_N, atol=6e-4)
        assert (labels.stats, labels.max_temperature) == (None, 1)
    return labels


def load(name, path, url, data, **given):
    from softcache.teacher.capture.plan import CaptureSettings

    original = open_original(name, [path], data)
    how = {"settings": CaptureSettings(**SETTINGS), "model_name": "theirs"} | given
    return import_cache(original, data, str(url), **how)


def wrong_copy(name, tmp_path, file, change):
    """Copies an original, with one file changed."""
    folder = shutil.copytree(ORIGINALS / name, tmp_path / name)
    (folder / file).write_bytes(change((folder / file).read_bytes()))
    return folder


# -- rows ----------------------------------------------------------------------------------------------------


class Codec:
    num_classes, k, temperatures, max_temperature = 6, 3, (1.0,), 1.0


def rows(ids, probs, targets, *, max_mass=1e-3, bounds_tail=True):
    with np.errstate(divide="ignore"):
        top = TopRows(np.array(ids), np.log(np.array(probs, float)))
    return soft_labels(top, np.array(targets), Codec, max_mass=max_mass, bounds_tail=bounds_tail)[0]


def test_rows_are_ordered_and_the_tail_is_what_is_missing_to_1():
    labels = rows([[4, 2, 0, 6]] * 2, [[0.25, 0.5, 0.125, 0]] * 2, [0, 3])
    assert labels.ids.tolist() == [[2, 4, 0]] * 2
    np.testing.assert_allclose(np.exp(labels.log_probs), [[0.5, 0.25, 0.125]] * 2, rtol=1e-6)
    np.testing.assert_allclose(np.exp(labels.log_tail), [[0.125]] * 2, rtol=1e-6)
    np.testing.assert_allclose(labels.target_log_prob, [np.log(0.125), np.nan])


def test_the_tail_is_at_most_what_classes_like_the_last_one_hold_and_at_least_2_to_the_minus_24():
    short = rows([[0, 1]], [[0.9, 0.001]], [0])  # 0.099 are missing, and four classes hold 0.004 at most
    assert np.exp(short.log_tail[0, 0]) == pytest.approx(0.004, rel=1e-3)
    assert np.exp(rows([[0, 1]], [[0.9, 0.001]], [0], bounds_tail=False).log_tail[0, 0]) == pytest.approx(
        0.099
    )
    assert np.exp(rows([[0, 1]], [[0.9, 0.1005]], [0]).log_tail[0, 0]) == pytest.approx(LEAST_TAIL)
    whole = rows([[0, 1, 2, 3, 4, 5]], [[0.5, 0.1, 0.1, 0.1, 0.1, 0.1]], [0])
    assert np.exp(whole.log_tail[0, 0]) == pytest.approx(0.3), "given, and not kept"


def test_a_sum_above_1_is_kept_within_rounding_scaled_where_a_format_approximates_and_else_refused():
    labels = rows([[0, 1]], [[0.9, 0.1005]], [0])
    assert np.exp(labels.log_probs[0]).sum() == pytest.approx(1.0005)
    scaled = rows([[0, 1]], [[0.9, 0.12]], [0], max_mass=0.05)
    np.testing.assert_allclose(np.exp(scaled.log_probs[0, :2]), np.array([0.9, 0.12]) / 1.02, rtol=1e-6)
    with pytest.raises(LabelError, match=r"probabilities sum to 1\.0200; expected at most 1\.001") as refused:
        rows([[0, 1], [0, 1]], [[0.5, 0.1], [0.9, 0.12]], [0, 0])
    assert refused.value.position == 1


@pytest.mark.parametrize(
    ("ids", "probs", "message"),
    [
        ([0, 7], [0.5, 0.1], "class 7 in slot 1; expected 0 to 5"),
        ([0, -3], [0.5, 0.1], "class -3 in slot 1"),
        ([2, 2], [0.5, 0.1], "class 2 comes twice"),
        ([0, 1], [0.5, np.nan], "log-probability nan"),
        ([0, 1], [1.5, 0.1], "log-probability 0.405"),
        ([6, 6], [0, 0], "no class has a probability above 0"),
    ],
)
def test_what_cannot_be_a_label_is_refused(ids, probs, message):
    with pytest.raises(LabelError, match=message):
        rows([ids], [probs], [0])


# -- TinyViT -------------------------------------------------------------------------------------------------

TINYVIT = ORIGINALS / "tinyvit" / "saved"
KNOWN = np.load(ORIGINALS / "tinyvit" / "logits.npy").astype(np.float32) / 8


@pytest.fixture(scope="module")
def tinyvit(tmp_path_factory):
    url = tmp_path_factory.mktemp("tinyvit") / "cache"
    return load("tinyvit", TINYVIT, url, digits())[0]


def test_tinyvit_is_read_as_its_writer_wrote_it(tinyvit):
    assert (tinyvit.num_views, tinyvit.manifest.codec["k"]) == (2, 5)
    labels = digits_like(tinyvit, KNOWN)
    targets = digits().source.targets()
    is_kept = (labels.ids == targets[:, None]).any(1)
    assert 0 < (~is_kept).sum() < 60
    assert np.array_equal(np.isnan(labels.target_log_prob), ~is_kept)
    assert list(verify_units(tinyvit)) == []
    with pytest.raises(TemperatureError):
        labels.at_temperature(2.0)
    facts = tinyvit.manifest.attributes["imported"]
    assert facts["views"] == ["logits_top5_epoch0", "logits_top5_epoch1"]
    assert facts["joined_by"] == "number"
    assert "statistics" in facts["missing"]
    identity = tinyvit.manifest.identity
    assert identity["views"]["digest"].startswith("foreign:tinyvit:")
    assert identity["teacher"]["spec"] == "imported:theirs"


def test_copies_keep_what_is_said_and_fewer_classes_can_be_kept(tinyvit, tmp_path):
    copy = convert_cache(tinyvit, str(tmp_path / "copy"), store="parquet")
    assert copy.manifest.attributes == tinyvit.manifest.attributes
    assert list(verify_units(copy)) == []
    fewer, _ = load("tinyvit", TINYVIT, tmp_path / "fewer", digits(), k=2)
    assert list(verify_units(fewer)) == []
    all_of, two = tinyvit.read([7]), fewer.read([7])
    assert two.ids[0].tolist() == all_of.ids[0, :2].tolist()
    rest = np.exp(all_of.log_tail[0, 0]) + np.exp(all_of.log_probs[0, 2:].astype(float)).sum()
    assert np.exp(two.log_tail[0, 0]) == pytest.approx(rest, rel=2e-3)
    with pytest.raises(LabelError, match="k = 6; the original has 5 classes of each row"):
        load("tinyvit", TINYVIT, tmp_path / "more", digits(), k=6)


class Seeded(ViewedSource):
    """Views that a program of the user's own makes from the original's seeds."""

    def __init__(self, source, views, original):
        super().__init__(source, views)
        self.original = original

    def load(self, samples, view, *, fingerprints=True):
        batch = super().load(samples, 0, fingerprints=False)
        seeds = self.original.parameters(np.asarray(samples), view)["seed"]
        images = [image.roll(int(seed) % 3, -1) for image, seed in zip(batch.images, seeds, strict=True)]
        return type(batch)(torch.stack(images), batch.targets, batch.samples, view, batch.fingerprints)


def test_a_student_shows_foreign_views_itself(tinyvit):
    data = digits()
    original = open_original("tinyvit", [TINYVIT], data)
    seeds = np.load(ORIGINALS / "tinyvit" / "seeds.npy")
    assert np.array_equal(original.parameters(np.arange(120), 1)["seed"], seeds[1])
    dataset = SoftLabelDataset(Seeded(data.source, data.views, original), tinyvit)
    batch = dataset[(5, 1)]
    assert batch.labels.ids[0].tolist() == tinyvit.read([5], 1).ids[0].tolist()
    plain = data.source.image(5).roll(int(seeds[1, 5]) % 3, -1)
    assert torch.equal(batch.images[0], plain)
    with pytest.raises(
        AlignmentError, match=r"'digits/0005', view 1: its labels are of a view of another program"
    ):
        SoftLabelDataset(data.source, tinyvit)[(5, 1)]


def test_a_student_learns_from_the_plain_view_by_the_users_word(tmp_path):
    config = digits_config(
        source={"max_train_samples": 120}, labels={"num_views": 1, "k": 5}, loss={"temperature": 1.0}
    )
    config = config.model_copy(update={"teacher": None})
    data = open_data(config)
    with pytest.raises(ConfigError, match="--plain-view of labels with 2 views"):
        load("tinyvit", TINYVIT, tmp_path / "two", data.train, plain_view=True)
    cache, report = load(
        "tinyvit", TINYVIT / "logits_top5_epoch1", tmp_path / "cache", data.train, plain_view=True
    )
    digits_like(cache, KNOWN[1:])
    right = (KNOWN[1].argmax(-1) == data.train.source.targets()).mean()
    assert report.agreement == pytest.approx(right, abs=0.02)
    metrics = train_student(
        config, data, model="mlp?width=8", labels="cache", cache=cache, out=tmp_path / "student"
    )
    assert np.isfinite(metrics["eval_loss"])


def test_an_import_goes_on_and_only_from_the_same_files(tmp_path, monkeypatch):
    failing = iter([None] * 5)

    def stop(name):
        if name == "before_marker":
            next(failing)

    monkeypatch.setattr(units, "_failpoint", stop)
    failing = iter([None])
    with pytest.raises(StopIteration):
        load("tinyvit", TINYVIT, tmp_path / "cache", digits())
    monkeypatch.undo()
    cache, report = load("tinyvit", TINYVIT, tmp_path / "cache", digits())
    assert (report.units_found, report.units_done) == (1, 3)
    digits_like(cache, KNOWN)
    again = load("tinyvit", TINYVIT, tmp_path / "other", digits())[0]
    assert cache.manifest_sha256 == again.manifest_sha256
    with pytest.raises(IdentityError, match=r"original\.digest"):
        load("tinyvit", TINYVIT / "logits_top5_epoch0", tmp_path / "cache", digits())


def test_a_unit_that_another_import_holds_is_waited_for(tmp_path, monkeypatch):
    cache, _ = load("tinyvit", TINYVIT, tmp_path / "cache", digits())
    waits = hold_unit(cache, 1, monkeypatch)
    found, report = load("tinyvit", TINYVIT, tmp_path / "cache", digits())
    assert (len(waits), report.units_done, report.units_found) == (1, 1, 3)
    assert found.missing_units == []


@pytest.mark.parametrize(
    ("file", "change", "error", "message"),
    [
        (
            "rank0-values.bin",
            lambda b: b[:-7],
            SourceError,
            r"1,433 bytes for 60 keys; expected 4 \+ 4 K bytes",
        ),
        (
            "rank1-values.bin",
            lambda b: b[:-480],
            SourceError,
            r"records of 16 and 24 bytes; expected one;",
        ),
        (
            "rank0-keys.txt",
            lambda b: b.replace(b"\n7\n", b"\n777\n"),
            AlignmentError,
            r"key '777'; source .* has none such",
        ),
        (
            "rank0-keys.txt",
            lambda b: b.replace(b"\n7\n", b"\n8\n"),
            AlignmentError,
            r"no labels of 1 of 120 samples",
        ),
        (
            "rank0-values.bin",
            lambda b: b[:4] + b"\xff\xff" + b[6:],
            LabelError,
            r"rank0-values.bin, record 0: sample 'digits/\d+', view 0: class -1 in slot 0",
        ),
        (
            "rank0-values.bin",
            lambda b: b[:14] + np.float16(1.2).tobytes() + b[16:],
            LabelError,
            r"record 0: sample 'digits/\d+', view 0: class \d has log-probability 0.18",
        ),
    ],
)
def test_damage_is_refused_by_name(tmp_path, file, change, error, message):
    keys = (TINYVIT / "logits_top5_epoch0" / "rank0-keys.txt").read_text().splitlines()
    assert "7" in keys
    folder = wrong_copy("tinyvit", tmp_path, f"saved/logits_top5_epoch0/{file}", change) / "saved"
    with pytest.raises(error, match=message):
        load("tinyvit", folder, tmp_path / "cache", digits())


def test_labels_of_other_samples_are_refused(tmp_path):
    def shifted(content):
        return b"".join(b"%d\n" % ((int(key) + 1) % 120) for key in content.split())

    folder = tmp_path / "tinyvit"
    shutil.copytree(TINYVIT, folder)
    for path in folder.glob("*/*-keys.txt"):
        path.write_bytes(shifted(path.read_bytes()))
    data = digits()
    from softcache.teacher.capture.plan import CaptureSettings

    with pytest.raises(
        AlignmentError, match=r"ground truth in \d+\.\d% of 120 rows; expected more than 1\d\.\d%"
    ):
        load("tinyvit", folder, tmp_path / "cache", data, settings=CaptureSettings(unit_samples=120))


def test_labels_of_classes_in_another_order_are_refused(tmp_path, monkeypatch):
    from softcache.teacher.capture.plan import CaptureSettings

    data = digits()
    reversed_N = 9 - data.source.targets()
    monkeypatch.setattr(data.source, "targets", lambda: reversed_N)
    with pytest.raises(
        AlignmentError, match=r"another order, or of its samples: of \d+ rows .*: 0 '0' as 9 '9', 1"
    ):
        load("tinyvit", TINYVIT, tmp_path / "cache", data, settings=CaptureSettings(unit_samples=120))


class ManyClasses:
    """A source of two samples and many classes."""

    name, class_names, multi_hot = "many", (), None

    def __init__(self, num_classes):
        self.num_classes = num_classes

    def __len__(self):
        return 2

    def keys(self):
        return ["a/n01_1.JPEG", "a/n01_2.JPEG"]


class ManyData:
    kind = "image"

    def __init__(self, num_classes):
        self.source = ManyClasses(num_classes)

    def __len__(self):
        return len(self.source)


def test_ids_of_16_bits(tmp_path):
    """Of 21,841 classes as they are; above 32,768 they come back from two's complement; above 65,536 they cannot."""
    record = np.zeros(2, [("seed", "<i4"), ("ids", "<i2", 2), ("probs", "<f2", 2)])
    record["ids"], record["probs"] = [[21000, 3], [-1, 5]], [[0.5, 0.25], [0.5, 0.25]]
    (tmp_path / "rank0-values.bin").write_bytes(record.tobytes())
    (tmp_path / "rank0-keys.txt").write_text("n01_2\nn01_1\n")
    with pytest.raises(LabelError, match="70,000 classes of source many; its ids are of 16 bits"):
        open_original("tinyvit", [tmp_path], ManyData(70_000))
    original = open_original("tinyvit", [tmp_path], ManyData(65_536))
    assert original.facts["joined_by"] == "file name"
    assert original.read(np.array([0, 1]), 0, None).ids.tolist() == [[65535, 5], [21000, 3]]
    with pytest.raises(LabelError, match="class -1 in slot 0; expected 0 to 21840"):
        open_original("tinyvit", [tmp_path], ManyData(21_841)).read(np.array([0]), 0, None)


# -- DistillKit ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("words") / "tokenizer")


def text_run(folder, words, data_dir):
    """A config whose source is the original's files, and its data."""
    source = {
        "path": f"{folder}/*.parquet",
        "input_ids_column": "input_ids",
        "key_column": None,
        "tokenizer": words,
        "packing": "documents",
        "shuffle_documents": False,
        "eval_share": 0.4,
    }
    write_texts(data_dir / "texts.jsonl", 2)
    config = text_config(data_dir, source=source, loss={"temperature": 1.0}, labels={"k": 16})
    config = config.model_copy(update={"teacher": None})
    return config, open_data(config)


@pytest.mark.parametrize("name", ["curve", "residuals"])
def test_distillkit_is_read_as_its_own_reader_reads_it(name, words, tmp_path):
    folder = ORIGINALS / f"distillkit-{name}"
    config, data = text_run(folder, words, tmp_path)
    cache, report = load("distillkit", folder, tmp_path / "cache", data.train)
    expected = np.load(folder / "decompressed.npz")
    ids = [
        row.as_py() for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path)["input_ids"]
    ]
    starts = np.cumsum([0, *(len(row) - 1 for row in ids)])
    known, targets = [], []
    for number in range(len(cache)):
        document = ids.index(data.train.source.sample(number).tokens.tolist())
        known.extend(range(starts[document], starts[document + 1]))
        targets.extend(ids[document][1:])
    labels = cache.read(np.arange(len(cache)))
    rows, values = np.arange(len(known))[:, None], expected["log_probs"][known].astype(float)
    dense_theirs, dense_ours = np.full((2, len(known), 201), -99.0)
    dense_theirs[rows, expected["ids"][known]] = np.minimum(values, 0)
    dense_ours[rows, labels.ids] = labels.log_probs
    # Theirs computes in the coefficients' dtype; ours is float64, then float16 logarithms.
    np.testing.assert_allclose(dense_ours, dense_theirs, rtol=2**-10, atol=2e-3 if name == "curve" else 2e-2)
    left = np.maximum(1 - np.exp(values).sum(1), LEAST_TAIL)
    np.testing.assert_allclose(np.exp(labels.log_tail[:, 0]), left, atol=1e-4 if name == "curve" else 1e-3)
    is_kept = (labels.ids == np.array(targets)[:, None]).any(1)
    assert np.array_equal(np.isnan(labels.target_log_prob), ~is_kept)
    assert report.agreement > 0.5
    assert list(verify_units(cache)) == []
    assert cache.manifest.identity["source"]["digest"] == data.train.source.digest
    assert cache.manifest.attributes["imported"]["teacher_saw"] == "the source's samples"
    if name == "curve":
        metrics = train_student(
            config,
            data,
            model="gpt2?width=16&depth=1&heads=2",
            labels="cache",
            cache=cache,
            out=tmp_path / "student",
        )
        assert np.isfinite(metrics["eval_loss"])


def test_what_distillkit_spoils_is_refused(words, tmp_path):
    folder = shutil.copytree(ORIGINALS / "distillkit-curve", tmp_path / "theirs")
    _, data = text_run(folder, words, tmp_path)
    path = folder / "data_0.parquet"
    whole, config = pq.read_table(path), (folder / "compression_config.yaml").read_text()

    def refused(error, message):
        with pytest.raises(error, match=message):
            load("distillkit", folder, tmp_path / f"cache-{len(list(tmp_path.iterdir()))}", data.train)

    rows = whole.to_pylist()
    rows[0]["compressed_logprobs"][3][8:12] = [
        0,
        0,
        192,
        127,
    ]  # NaN in the first coefficient: one -inf gives it
    pq.write_table(pa.Table.from_pylist(rows, whole.schema), path)
    refused(
        LabelError,
        r"data_0.parquet, row group 0, row 0: sample 'train/0@0', position 3: slot 4 has log-probability nan",
    )
    rows = whole.to_pylist()
    packed = np.unpackbits(np.array(rows[1]["bytepacked_indices"][2], np.uint8))
    packed[8:24] = np.unpackbits(np.array([0, 0], np.uint8))  # two ids that were masked to 0
    rows[1]["bytepacked_indices"][2] = np.packbits(packed).tolist()
    pq.write_table(pa.Table.from_pylist(rows, whole.schema), path)
    refused(
        LabelError,
        r"sample 'train/1@0', position 2: class 0 comes twice; expected each once: ids that the original",
    )
    rows = whole.to_pylist()
    rows[0]["input_ids"][4] = 5
    pq.write_table(pa.Table.from_pylist(rows, whole.schema), path)
    refused(AlignmentError, r"sample 'train/0@0' of \d+ tokens has the ids of no row")
    pq.write_table(whole, path)
    (folder / "compression_config.yaml").write_text(config.replace("d: 200", "d: 128"))
    refused(LabelError, r"d = 128, so ids have 7 bits; source .* has 200 tokens, and ids above 127 were cut")
    (folder / "compression_config.yaml").write_text(config.replace("exact_k: 4", "exact_k: 5"))
    refused(LabelError, r"sample 'train/0@0', position 0: compressed_logprobs has 24 bytes; expected 26")
    (folder / "compression_config.yaml").unlink()
    refused(SourceError, r"compression_config.yaml: No such file or directory; put the settings there")
    named = whole.append_column("attention_mask", whole["input_ids"])
    pq.write_table(named, path)
    (folder / "compression_config.yaml").write_text(config)
    refused(SourceError, "packed by distillkit-pack-logits")
    legacy = whole.rename_columns(["coeffs", "packed_indices", "exact_values"])
    pq.write_table(legacy, path)
    refused(LabelError, "compressed as versions before 1.0 did")


# -- FKD and ml-dr -------------------------------------------------------------------------------------------

CROPS = np.load(ORIGINALS / "fkd" / "logits.npy").astype(np.float32) / 8


def dozen():
    return open_data(digits_config(source={"max_train_samples": 12})).train


def test_fkd_is_read_as_its_writer_wrote_it(tmp_path):
    cache, report = load("fkd", ORIGINALS / "fkd" / "labels", tmp_path / "cache", dozen())
    assert (cache.num_views, cache.manifest.codec["k"], report.units_done) == (2, 5, 2)
    digits_like(cache, CROPS)
    assert list(verify_units(cache)) == []
    facts = cache.manifest.attributes["imported"]
    assert facts["joined_by"] == "file name"
    assert "the temperature of the softmax, taken to be 1" in facts["missing"]
    crops = np.load(ORIGINALS / "fkd" / "crops.npz")
    original = open_original("fkd", [ORIGINALS / "fkd" / "labels"], dozen())
    found = original.parameters(np.arange(12), 1)
    np.testing.assert_allclose(found["box"], crops["boxes"][:, 1], atol=2**-12)  # the last file is float16
    assert np.array_equal(found["flip"], crops["flips"][:, 1])


def test_a_student_of_fkd_sees_the_crops_that_its_own_loader_shows(tmp_path):
    cache, _ = load("fkd", ORIGINALS / "fkd" / "labels", tmp_path / "cache", dozen())
    data, crops = dozen(), np.load(ORIGINALS / "fkd" / "crops.npz")
    original = open_original("fkd", [ORIGINALS / "fkd" / "labels"], data)
    dataset = SoftLabelDataset(FKDCrops(data.source, original, size=10), cache)
    for view in range(2):
        batch = dataset.load(np.array([7, 2, 11]), view)
        assert np.array_equal(batch.images.numpy(), crops["seen"][[7, 2, 11], view])
        assert batch.targets.tolist() == data.source.targets()[[7, 2, 11]].tolist()
        assert np.array_equal(batch.labels.ids.numpy(), cache.read([7, 2, 11], view).ids)


def test_ml_dr_is_read_as_its_writer_wrote_it(tmp_path):
    cache, _ = load("ml-dr", ORIGINALS / "ml-dr" / "rdata", tmp_path / "cache", dozen())
    assert (cache.num_views, cache.manifest.codec["k"]) == (2, 4)
    digits_like(cache, CROPS)
    assert list(verify_units(cache)) == []
    facts = cache.manifest.attributes["imported"]
    assert facts["image_augmentation"]["random_resized_crop"]["size"] == 8
    original = open_original("ml-dr", [ORIGINALS / "ml-dr" / "rdata"], dozen())
    params = original.parameters(np.arange(12), 1)["params"]
    assert params[3][2:] == [True, [(3, 0.5), (11, -1.0)]]


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def dump(content):
    return zlib.compress(pickle.dumps(content))


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


FKD_FILE, DR_FILE = "labels/imagenet/train/digits/0003.tar", "rdata/3.pth.tar"
LABELS = np.array([[[3, 1], [0.5, 0.25]]] * 2, np.float32)
CROP = np.zeros((2, 4), np.float32), np.zeros(2, bool)


@pytest.mark.parametrize(
    ("name", "file", "content", "error", "message"),
    [
        (
            "fkd",
            FKD_FILE,
            saved([*CROP, Evil()]),
            SourceError,
            r"0003.tar: cannot be read as numbers and arrays: ",
        ),
        ("fkd", FKD_FILE, None, SourceError, r"0003.tar: cannot be read as numbers and arrays"),
        (
            "fkd",
            FKD_FILE,
            saved([*CROP, LABELS]),
            SourceError,
            r"\(2, 2, 2\); expected .* \(2, 2, 5\), as in the first",
        ),
        (
            "fkd",
            FKD_FILE,
            saved([*CROP, np.array([3, 1])]),
            LabelError,
            'type "hard", which have no probability',
        ),
        (
            "ml-dr",
            DR_FILE,
            dump(Evil()),
            SourceError,
            r"3.pth.tar: .* it names builtins.print, which could run code",
        ),
        ("ml-dr", DR_FILE, dump((3, []))[:-3], SourceError, "3.pth.tar: .* cut off, or too large"),
        ("ml-dr", DR_FILE, dump((4, [])), SourceError, "3.pth.tar: holds image 4; expected that of its name"),
        (
            "ml-dr",
            DR_FILE,
            dump([1, 2, 3]),
            SourceError,
            r"3.pth.tar: is not \(number, list of params and prob",
        ),
        (
            "ml-dr",
            DR_FILE,
            dump((3, [{"params": [], "prob": ([0.5], [1])}] * 2)),
            SourceError,
            "2 views of .*; expected 2 of 4",
        ),
        (
            "ml-dr",
            DR_FILE,
            dump((3, [{"params": [], "prob": ([0.5, 0.2, 0.1, 0.1], [1, 2, 3, 10])}] * 2)),
            LabelError,
            "3.pth.tar: sample 'digits/0003', view 0: class 10 in slot 3",
        ),
    ],
    ids=["code", "cut", "k", "hard", "pickled code", "zlib cut", "number", "shape", "two views", "class"],
)
def test_files_that_could_run_code_or_are_damaged_are_refused(
    tmp_path, capfd, name, file, content, error, message
):
    folder = wrong_copy(name, tmp_path, file, lambda whole: whole[:-200] if content is None else content)
    with pytest.raises(error, match=message):
        load(name, folder / file.split("/")[0], tmp_path / "cache", dozen())
    assert "code ran" not in capfd.readouterr().out


def test_ids_that_float16_rounded_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("n01_1", "n01_2"):
        (tmp_path / "a" / f"{name}.tar").write_bytes(saved([*CROP, LABELS.astype(np.float16)]))
    with pytest.raises(LabelError, match="ids in float16, which rounds those above 2,048; source has 3,000"):
        open_original("fkd", [tmp_path], ManyData(3000))
    assert open_original("fkd", [tmp_path], ManyData(2048)).k == 2


# -- the command ---------------------------------------------------------------------------------------------


def test_the_command_says_what_the_original_lacks(tmp_path):
    path = tmp_path / "run.toml"
    capture = "".join(f"{key} = {value}\n" for key, value in SETTINGS.items())
    path.write_text(
        f'name = "mine"\n[source]\nname = "digits"\nmax_train_samples = 120\n[capture]\n{capture}'
    )
    arguments = [
        str(TINYVIT),
        "--format",
        "tinyvit",
        "--config",
        str(path),
        "--cache",
        str(tmp_path / "cache"),
    ]
    runner = CliRunner()
    refused = runner.invoke(import_command, arguments)
    assert refused.exit_code == 2
    assert "--model-name: missing" in refused.output
    done = runner.invoke(import_command, [*arguments, "--model-name", "clip"], catch_exceptions=False)
    assert "240 rows of imported:clip, K=5 of 10 classes, at temperature 1" in done.output
    assert (
        "the teacher saw views of the original's, which are not replayed; the original lacks the tail above T = 1"
        in done.output
    )
    again = runner.invoke(
        import_command, [*arguments, "--model-name", "clip", "--json"], catch_exceptions=False
    )
    assert json.loads(again.stdout)["units_found"] == 4
    shown = runner.invoke(inspect_command, [str(tmp_path / "cache")], catch_exceptions=False)
    assert "format tinyvit" in shown.output
    with pytest.raises(ConfigError, match="tinyvit: holds labels of kind 'image'"):
        open_original("tinyvit", [TINYVIT], type("Text", (), {"kind": "tokens", "source": ManyClasses(9)})())
    assert open_cache(str(tmp_path / "cache")).num_views == 2
    custom = open_original("softcache.tools.import_caches.formats.tinyvit:TinyViT", [TINYVIT], digits())
    assert custom.num_views == 2
