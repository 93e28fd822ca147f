"""Caches of a detector's cells: from capture to the student, joined by key and checked by content."""

import json
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from softcache.cache.codecs import CellCodec, codec_from_dict
from softcache.cache.manifest import Manifest
from softcache.data.sources.detection.synthetic import SceneSource
from softcache.errors import (
    AlignmentError,
    ConfigError,
    CorruptionError,
    IdentityError,
    LabelError,
    ManifestError,
    RunError,
    SpecError,
)
from softcache.labels import BernoulliLabels, SoftLabels
from softcache.losses.detection import CellLossSettings
from softcache.reader.dataset import SoftLabelDataset
from softcache.reader.open import open_cache
from softcache.runs import capture_labels, open_data, open_teacher, train_student
from softcache.runs.report.load import open_report
from softcache.runs.sweep.space import default_space
from softcache.stages.inspect import inspect_command
from softcache.tools.convert import convert_cache
from softcache.tools.fidelity.teacher_logits import rerun_teacher
from softcache.tools.fuse import FusionSettings, fuse_caches
from softcache.tools.shrink import ShrinkSettings, shrink_cache
from softcache.tools.verify.teacher import verify_against_teacher, verify_units
from tests.support.cell_caches import (
    NUM_SAMPLES,
    SPEC,
    TOP,
    K,
    cells_config,
    expected_rows,
    make_cells,
    weights,
)
from tests.support.programs import Program

SSD = "ssdlite?width=8&depth=0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cells")


@pytest.fixture(scope="module", params=["zarr", "parquet"])
def made(folder, request):
    return make_cells(folder, request.param, capture={"store": request.param})


@pytest.fixture(scope="module")
def zarr(folder):
    return make_cells(folder, "plain")


def assert_is(record, place, wanted):
    """The rows of one image are the teacher's answer, as far as float16 holds it."""
    rows = slice(place * TOP, (place + 1) * TOP)
    np.testing.assert_array_equal(record.cells[rows], wanted["cells"])
    np.testing.assert_array_equal(record.labels.ids[rows], wanted["ids"])
    for name in record.columns:
        np.testing.assert_allclose(record.columns[name][rows], wanted[name], rtol=1e-4, atol=1e-4)
    labels = record.labels
    if isinstance(labels, BernoulliLabels):
        np.testing.assert_allclose(labels.logits[rows], wanted["logits"], rtol=1e-3)
        np.testing.assert_allclose(labels.dropped_bound[rows], wanted["bound"], rtol=1e-4, atol=1e-4)
        mass = (1 / (1 + np.exp(-wanted["dropped"]))).sum(1)
        np.testing.assert_allclose(labels.dropped_mass[rows], mass, rtol=1e-3, atol=1e-5)
    else:
        np.testing.assert_allclose(labels.log_probs[rows], wanted["logits"], rtol=1e-3)
        tail = np.log(np.exp(wanted["dropped"]).sum(1))
        np.testing.assert_allclose(labels.log_tail[rows, 0], tail, rtol=1e-3, atol=1e-4)


def test_it_holds_what_the_teacher_says_at_the_chosen_cells_in_either_store(made):
    config, data, cache = made
    for view in range(2):
        record = cache.read([7, 2], view)
        for place, sample in enumerate((7, 2)):
            assert_is(record, place, expected_rows(config, data, sample, view))
    assert list(verify_units(cache)) == []


def test_of_a_softmax_head_it_holds_the_tail_and_no_centerness(folder):
    config, data, cache = make_cells(folder, "ssd", spec=SSD, student={"model": SSD})
    record = cache.read([3], 1)
    assert isinstance(record.labels, SoftLabels)
    assert set(record.columns) == {"boxes"}
    assert cache.manifest.class_names == ("background", *"0123456789")
    assert_is(record, 0, expected_rows(config, data, 3, 1))
    np.testing.assert_allclose(
        record.labels.kept_mass(1.0) + np.exp(record.labels.log_tail[:, 0]), 1, atol=1e-3
    )
    result = train_student(config, data, model=SSD, labels="cache", cache=cache, out=folder / "ssd-student")
    assert np.isfinite(result["eval_loss"])


def test_distributions_over_edges_are_kept_and_learnt(folder):
    spec = SPEC + "&bins=6"
    config, data, cache = make_cells(folder, "bins", spec=spec, student={"model": spec})
    record, batch = cache.read([3], 1), data.train.load([3], 1)
    assert {name: values.shape[1:] for name, values in record.columns.items()} == {
        "bins": (4, 7),
        "centerness": (),
    }
    teacher = open_teacher(config, data)
    with torch.no_grad():
        found, _ = teacher.model(data.normalize()(batch.images))
    wanted = found.bins[0][torch.from_numpy(record.cells).long()].numpy()
    np.testing.assert_allclose(record.columns["bins"], wanted, rtol=1e-3, atol=1e-3)
    task = data.task(config, spec)
    labels = record.to_torch(torch.device("cpu"))

    def soft(weight, bins):
        cells = CellLossSettings(class_weight=0, centerness_weight=0, box_weight=weight)
        return float(replace(task, cells=cells).soft(teacher.model, replace(found, bins=bins), labels, 2.0))

    assert soft(1.0, found.bins) < 1e-4
    assert soft(1.0, found.bins.flip(-1)) == pytest.approx(soft(3.0, found.bins.flip(-1)) / 3, rel=1e-4)
    assert soft(1.0, found.bins.flip(-1)) > 1e-3
    result = train_student(config, data, model=spec, labels="cache", cache=cache, out=folder / "bins-student")
    assert np.isfinite(result["eval_loss"])
    with pytest.raises(IdentityError, match="its cells"):
        data.check_student(SPEC, cache)
    assert list(verify_units(cache)) == []
    again = convert_cache(cache, str(folder / "bins.parquet"), store="parquet").read([3], 1)
    np.testing.assert_array_equal(again.columns["bins"], record.columns["bins"])


def test_a_student_learns_from_the_cache_what_it_learns_beside_the_teacher(folder):
    """Same batch, same loss; float32 on disk, so that nothing but summation order differs."""
    config, data, cache = make_cells(folder, "exact", capture={"codec": {"values": "float32"}})
    dataset, _ = data.train_dataset(config, cache)
    cached = dataset.fetch([(4, 1), (9, 1)])
    plain = data.train.load([4, 9], 1)
    task, live = data.task(config, SPEC), data.task(config, SPEC, open_teacher(config, data))
    torch.manual_seed(1)
    model = task.build().eval()
    for mix in (None, (1.0, 1.0), (4.0, 0.7)):
        found, wanted = task.loss(model, cached, mix=mix), live.loss(model, plain, mix=mix)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    hard = task.loss(model, cached, mix=(1.0, 0.0))
    assert abs(float(hard.detach() - found.detach())) > 1e-3, "the labels count"


def test_a_folder_in_cocos_format_teaches_as_scenes_do(folder, zarr):
    """The scenes written as a folder: other keys and colours, the same boxes."""
    root = folder / "coco"
    (root / "images").mkdir(parents=True)
    source = zarr[1].train.source
    notes = []
    for sample in range(6):
        grey = source.image(sample)[0].numpy()
        Image.fromarray(np.stack([grey] * 3, -1)).save(root / "images" / f"{sample}.png")
        truth = source.truth(sample)
        for box, kind in zip(truth.boxes.tolist(), truth.classes.tolist(), strict=True):
            corner = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            notes.append(
                {
                    "id": len(notes) + 1,
                    "image_id": sample,
                    "category_id": kind + 1,
                    "bbox": corner,
                    "iscrowd": 0,
                }
            )
    images = [{"id": n, "file_name": f"{n}.png", "width": 64, "height": 64} for n in range(6)]
    kinds = [{"id": n + 1, "name": str(n)} for n in range(10)]
    for split in ("train", "val"):
        tables = {"images": images, "annotations": notes, "categories": kinds}
        (root / f"{split}.json").write_text(json.dumps(tables))
    config, data, cache = make_cells(
        folder,
        "of-coco",
        source={"name": "coco", "root": str(root)},
        teacher={"model": SPEC, "weights": weights(folder, channels=3)},
    )
    assert len(cache) == 6
    assert_is(cache.read([4], 1), 0, expected_rows(config, data, 4, 1))
    metrics = train_student(
        config, data, model=SPEC, labels="cache", cache=cache, out=folder / "coco-student"
    )
    assert np.isfinite(metrics["eval_loss"])


def test_labels_are_joined_by_number_whatever_the_order(zarr):
    _, data, cache = zarr
    dataset = SoftLabelDataset(data.train, cache)
    batch = dataset.fetch([(11, 1), (3, 1), (11, 1)])
    assert batch.rows_per_sample == TOP
    alone = dataset[(3, 1)]
    assert torch.equal(batch.labels.take(slice(TOP, 2 * TOP)).cells, alone.labels.cells)
    assert torch.equal(
        batch.labels.take(slice(0, TOP)).cells, batch.labels.take(slice(2 * TOP, 3 * TOP)).cells
    )


def test_a_plain_source_is_seen_through_the_views_of_the_cache(zarr):
    _, data, cache = zarr
    batch = SoftLabelDataset(data.train.source, cache)[(5, 1)]
    wanted = data.train.load([5], 1)
    assert torch.equal(batch.images, wanted.images)
    assert torch.equal(batch.boxes[0], wanted.boxes[0])


def test_pixels_that_changed_are_refused_and_the_image_named(zarr, monkeypatch):
    _, data, cache = zarr
    dataset = SoftLabelDataset(data.train, cache)
    key = data.train.source.key(6)
    plain = data.train.load

    def changed(samples, view, **how):
        batch = plain(samples, view, **how)
        batch.fingerprints[list(batch.samples).index(6)] ^= 1
        return batch

    monkeypatch.setattr(data.train, "load", changed)
    with pytest.raises(AlignmentError, match=f"sample {key!r}.*the teacher saw content"):
        dataset.fetch([(2, 0), (6, 0)])


def test_a_box_that_changed_is_refused_though_the_pixels_are_the_same(zarr):
    _, data, cache = zarr
    old = data.train.source
    truths = [old.truth(sample) for sample in range(len(old))]
    truths[4] = replace(truths[4], boxes=truths[4].boxes + np.float32([0, 0, 0, 0.5]))
    images = torch.stack([old.image(sample) for sample in range(len(old))])
    new = SceneSource(old.name, images, truths, old.keys(), old.class_names)
    assert torch.equal(new.image(4), old.image(4))
    with pytest.raises(
        AlignmentError, match=r"the boxes of source scenes-digits/train changed since it was labeled"
    ):
        SoftLabelDataset(new, cache)
    same = SceneSource(old.name, images, [old.truth(n) for n in range(len(old))], old.keys(), old.class_names)
    assert len(SoftLabelDataset(same, cache)) == len(old)


def test_a_student_of_another_grid_is_refused(zarr, folder):
    config, data, cache = zarr
    with pytest.raises(IdentityError, match=r"student retinanet.*its cells.*are not those of the labels"):
        train_student(config, data, model="retinanet?width=8", labels="cache", cache=cache, out=folder / "no")
    with pytest.raises(IdentityError, match=r"student retinanet.*its cells"):
        data.task(config, "retinanet?width=8", open_teacher(config, data))


def test_the_cache_says_how_many_cells_there_are_whatever_the_config_leaves_out(zarr, folder):
    config, _, cache = zarr
    positions = config.labels.positions.model_copy(update={"top": 64})
    silent = config.model_copy(update={"labels": config.labels.model_copy(update={"positions": positions})})
    dataset, _ = open_data(silent).train_dataset(silent, cache)
    assert dataset[(0, 0)].num_rows == TOP


CAPTURE = """
import sys, time
from pathlib import Path
from softcache.teacher.detection import DetectionTeacher
from tests.support.cell_caches import make_cells
plain = DetectionTeacher.outputs
def slow(self, batch):
    time.sleep(0.05)
    return plain(self, batch)
DetectionTeacher.outputs = slow
make_cells(Path(sys.argv[1]))
"""


def files(url):
    return {
        str(path.relative_to(url)): path.read_bytes()
        for path in url.rglob("*")
        if path.is_file() and ".staging" not in path.parts and path.suffix != ".lock"
    }


def test_killed_and_run_again_it_is_bit_for_bit_what_an_uninterrupted_run_makes(tmp_path):
    url = tmp_path / "cache"
    weights(tmp_path)
    process = Program(CAPTURE, tmp_path)
    end = time.monotonic() + 120
    while len(list((url / "units").glob("*.json"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < end, "the capture did not get there"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(open_cache(url).markers)
    assert 2 <= done < 6
    config = cells_config(tmp_path)
    data = open_data(config)
    _, report = capture_labels(config, data, open_teacher(config, data), str(url))
    assert (report.units_found, report.units_done) == (done, 6 - done)
    make_cells(tmp_path, "whole")
    assert files(url) == files(tmp_path / "whole")


def test_converted_and_thawed_it_is_the_same(zarr, tmp_path):
    config, _, cache = zarr
    other = convert_cache(cache, str(tmp_path / "parquet"), store="parquet")
    reader = config.reader.model_copy(update={"memmap": "auto", "memmap_dir": str(tmp_path / "thaw")})
    thawed = reader.open_cache(cache.url)
    for copy in (other, thawed):
        for view in range(2):
            wanted, found = cache.read([8, 0, 19], view), copy.read([8, 0, 19], view)
            np.testing.assert_array_equal(found.cells, wanted.cells)
            np.testing.assert_array_equal(found.labels.logits, wanted.labels.logits)
            np.testing.assert_array_equal(found.columns["boxes"], wanted.columns["boxes"])
    assert thawed.memmap(0) is not None


def test_verify_confirms_the_teacher_and_finds_another(zarr, folder):
    config, data, cache = zarr
    how = {"num_rows": 12, "threshold_nats": 1e-3, "seed": 0}
    assert list(verify_against_teacher(cache, data.train, open_teacher(config, data), **how)) == []
    other = cells_config(folder, teacher={"model": SPEC, "weights": weights(folder, seed=1)})
    faults = list(verify_against_teacher(cache, data.train, open_teacher(other, data), **how))
    assert len(faults) == 12
    assert all("the teacher disagrees with its record" in fault for fault in faults)


@pytest.mark.parametrize("part", ["class", "box", "centerness"])
def test_verify_looks_at_every_output_of_the_head(zarr, part):
    config, data, cache = zarr
    teacher = open_teacher(config, data)
    name = {"class": "cls_logits", "box": "bbox_reg", "centerness": "bbox_ctrness"}[part]
    with torch.no_grad():
        touched = [p for n, p in teacher.model.named_parameters() if name in n and n.endswith("bias")]
        assert touched
        for parameter in touched:
            parameter.add_(0.5)
    how = {"num_rows": 4, "threshold_nats": 1e-3, "seed": 0}
    assert len(list(verify_against_teacher(cache, data.train, teacher, **how))) == 4


def test_a_damaged_shard_is_found(zarr, tmp_path):
    shutil.copytree(zarr[2].url, tmp_path / "cache")
    shard = next(s for s in open_cache(tmp_path / "cache").markers[1].shards if s.column == "boxes")
    path = tmp_path / "cache" / shard.path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptionError, match=r"unit 1"):
        open_cache(tmp_path / "cache").read([9], 0)


def test_what_is_not_made_for_cells_says_so(zarr, tmp_path):
    config, data, cache = zarr
    teacher = open_teacher(config, data)
    for call in (
        lambda: shrink_cache(cache, str(tmp_path / "slim"), ShrinkSettings(k=2)),
        lambda: fuse_caches(
            [cache, cache],
            str(tmp_path / "fused"),
            FusionSettings(caches=(cache.url, cache.url), rule="mean"),
        ),
        lambda: rerun_teacher(cache, data.train, teacher, num_rows=4, seed=0),
    ):
        with pytest.raises(LabelError, match=r"found those of codec 'cells', of a detector"):
            call()
    assert "k" not in default_space(config, data, cache)


@pytest.mark.parametrize(
    ("tables", "error", "message"),
    [
        ({"labels": {"policy": "top_p"}}, ConfigError, "labels.policy: 'top_p'.*top_k"),
        (
            {"labels": {"positions": {"policy": "every"}}},
            ConfigError,
            "labels.positions: 'every'.*cells are kept",
        ),
        (
            {"labels": {"positions": {"policy": "cells", "top": 999}}},
            LabelError,
            "999 is more than the 320 cells",
        ),
        ({"labels": {"temperatures": (1.0, 2.0)}}, ConfigError, "labels.temperatures: the head.*is sigmoids"),
        ({"labels": {"k": 11}}, LabelError, "labels.k: 11"),
        ({"capture": {"codec": "packed"}}, ConfigError, "capture.codec: 'packed'.*plain columns"),
        ({"loss": {"name": "dkd"}}, ConfigError, r"loss.name: for images and texts.*\[detection_loss\]"),
        ({"loss": {"standardize": True}}, ConfigError, "loss.standardize"),
    ],
)
def test_settings_that_cells_do_not_have_are_refused(folder, tables, error, message):
    with pytest.raises(error, match=message):
        make_cells(folder, "refused", **tables)
    assert not (folder / "refused" / "manifest.json").exists()


def test_too_few_rows_for_the_ground_truth_name_the_sample_and_nothing_is_marked(folder):
    with pytest.raises(
        LabelError, match=r"sample 0, view 0: .* ground-truth cells, at most labels.positions.top = 1"
    ):
        make_cells(folder, "few", labels={"positions": {"policy": "cells", "top": 1}})
    assert not open_cache(folder / "few").markers


def test_a_teacher_without_weights_is_refused(folder):
    config = cells_config(folder, teacher={"model": SPEC, "weights": None})
    with pytest.raises(ConfigError, match=r"teacher.weights: missing"):
        open_teacher(config, open_data(config))


def test_another_number_of_cells_is_another_cache(zarr, folder):
    with pytest.raises(IdentityError, match=r"identity.labels.positions.top: 5; 12"):
        make_cells(folder, "plain", labels={"positions": {"policy": "cells", "top": 5}})


def test_the_manifest_tells_the_teachers_mean_average_precision(folder):
    _, _, cache = make_cells(folder, "scored", capture={"evaluate": True})
    report = cache.manifest.teacher
    assert report.eval_accuracy is None
    assert 0 <= report.eval_map <= report.eval_map50 <= 1
    assert report.eval_loss > 0


def test_inspect_tells_probabilities_bytes_and_no_agreement(zarr):
    result = CliRunner().invoke(inspect_command, [zarr[2].url, "--json"])
    printed = json.loads(result.stdout)
    assert printed["rows"] == 2 * NUM_SAMPLES * TOP
    assert {"boxes", "cells", "logits"} <= printed["bytes_per_row"].keys()
    scores = 1 / (1 + np.exp(-zarr[2].read(np.arange(NUM_SAMPLES), 0).labels.logits[:, 0].astype(float)))
    others = 1 / (1 + np.exp(-zarr[2].read(np.arange(NUM_SAMPLES), 1).labels.logits[:, 0].astype(float)))
    np.testing.assert_allclose(printed["score"]["mean"], np.concatenate([scores, others]).mean(), rtol=1e-6)
    assert "agreement" not in printed


def codec(**changes):
    parameters = {"num_classes": 10, "k": K, "distribution": "bernoulli", "num_cells": 320}
    return CellCodec(**{**parameters, "head_columns": (("boxes", (4,)), ("centerness", ())), **changes})


def test_a_codec_is_what_its_description_says():
    for made in (
        codec(),
        codec(distribution="categorical", temperatures=(1.0, 2.0)),
        codec(head_columns=(("bins", (4, 17)),)),
    ):
        assert codec_from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize(
    "changes",
    [
        {"k": 11},
        {"k": 0},
        {"k": 2.0},
        {"num_cells": 0},
        {"distribution": "poisson"},
        {"values": "int8"},
        {"columns": {"boxes": [4], "bins": [4, 9]}},
        {"columns": {"masks": [4]}},
        {"columns": {"boxes": [5]}},
        {"columns": {"bins": [4, 1]}},
        {"columns": [1]},
        {"temperatures": [1.0]},
        {"distribution": "categorical"},
        {"distribution": "categorical", "temperatures": [2.0]},
        {"unknown": 1},
    ],
    ids=str,
)
def test_a_description_of_no_codec_is_refused(changes):
    with pytest.raises(ManifestError, match=r"codec cells: bad parameters"):
        codec_from_dict({**codec().to_dict(), **changes})


def test_a_manifest_that_contradicts_itself_is_refused(zarr):
    described = json.loads(zarr[2].manifest.to_bytes())
    for change, message in (
        ({"kind": "image"}, "kind image|rows"),
        ({"identity": {**described["identity"], "grid": {"digest": "0" * 64, "num_cells": 5}}}, "num_cells"),
        ({"rows": None}, "rows"),
    ):
        with pytest.raises(ManifestError, match=message):
            Manifest.parse(json.dumps({**described, **change}).encode(), where="cache x")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cells", 320, "column cells: 320 in row 1; expected 0 to 319"),
        ("ids", 10, "column ids: 10 in row 1; expected 0 to 9"),
        ("logits", np.inf, "column logits: inf in row 1"),
        ("boxes", np.nan, "column boxes: nan in row 1; expected finite"),
        ("dropped_bound", np.nan, "column dropped_bound: nan in row 1"),
    ],
)
def test_numbers_that_no_head_can_have_said_are_refused(name, value, message):
    made = codec()
    columns = {
        column.name: np.zeros(
            (2, *column.shape), np.int64 if column.name in ("ids", "cells") else column.dtype
        )
        for column in made.columns
    }
    columns[name][1] = value
    with pytest.raises(LabelError, match=message):
        made.validate(columns)


def test_a_record_of_another_head_is_not_encoded(zarr):
    record = zarr[2].read([0], 0)
    made = zarr[2].manifest.build_codec()
    assert made.encode(record).keys() == {column.name for column in made.columns}
    with pytest.raises(
        LabelError, match=r"expected DetectionLabels of BernoulliLabels; found BernoulliLabels"
    ):
        made.encode(record.labels)
    with pytest.raises(LabelError, match=r"expected the columns .*; found .*the teacher's head changed"):
        made.encode(type(record)(record.labels, record.cells, {"boxes": record.columns["boxes"]}))


def test_a_detector_has_no_report(zarr, tmp_path):
    config, data, cache = zarr
    train_student(config, data, model=SPEC, labels="cache", cache=cache, out=tmp_path / "run")
    with pytest.raises(
        RunError, match=r"of source.modality 'detection'; expected students of images or texts"
    ):
        open_report([tmp_path / "run"])


def test_a_detector_is_not_exported(zarr):
    config, data, _ = zarr
    task = data.task(config, SPEC)
    with pytest.raises(SpecError, match=r"export: a detector's boxes"):
        task.serve(task.build())
