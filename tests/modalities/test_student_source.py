"""Students that read something else than the teacher saw: reduced views, other files, the bytes of a file."""

import json
import shutil
import tomllib
from itertools import pairwise

import numpy as np
import pytest
import tomli_w
import torch
from PIL import Image
from safetensors.torch import load_file

from softcache.config.load import build_config
from softcache.config.run import RunConfig
from softcache.data.bytes import PADDING, ByteBatch, ByteData
from softcache.data.sources import open_source
from softcache.data.sources.images.encoded import student_source_class
from softcache.data.transforms import Views, ViewSettings
from softcache.data.transforms.student import StudentViews, StudentViewSettings
from softcache.errors import AlignmentError, ConfigError, RunError, SourceError, SpecError
from softcache.modalities import open_data
from softcache.models.image import build_model
from softcache.runs import capture_labels, open_teacher, train_student, train_teacher
from softcache.runs.batches import cached_batches, hard_label_batches
from softcache.runs.sweep.space import candidate
from softcache.student import run as loop
from tests.support.caches import digits_config

DIGITS = {"name": "digits", "max_train_samples": 300, "max_eval_samples": 100}
BYTES = {"model": "bytes?width=8&depth=1", "source": {"modality": "bytes", **DIGITS}}
SMALL = {"model": "mlp?width=8", "source": DIGITS, "views": {"size": 4, "grey": True}}


def bytes_of_digits(split, **settings):
    return student_source_class("bytes", "digits")(modality="bytes", **DIGITS, **settings).open(split)


WRITTEN = ("model.safetensors", "config.json")


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Digits as PNG files in class folders, and the same as JPEG files under other names."""
    base = tmp_path_factory.mktemp("folders")
    for split in ("train", "eval"):
        source = open_source({"name": "digits"}, split=split)
        for sample in range(60):
            name = f"{split}/{source.target(sample)}/{sample:03d}"
            image = Image.fromarray(source.image(sample)[0].numpy())
            for kind, file in (("png", f"images/{name}.png"), ("jpg", f"files/{name}.jpg")):
                (base / file).parent.mkdir(parents=True, exist_ok=True)
                image.save(base / file, "jpeg" if kind == "jpg" else kind)
    return base


def folder_config(base, **student):
    tables = {
        "source": {"name": "imagefolder", "root": str(base / "images")},
        "views": {"crop": "padded", "padding": 1, "mean": (0.3,), "std": (0.4,)},
        "student": {
            "source": {"modality": "bytes", "name": "imagefolder", "root": str(base / "files")},
            "pairing": {"suffix": "ignore"},
            "model": "bytes?width=8&depth=1",
            **student,
        },
    }
    config = digits_config(**{name: table for name, table in tables.items() if name != "source"})
    return build_config(config.model_dump(exclude_unset=True) | {"source": tables["source"]}, "of a test")


@pytest.fixture
def labeled(folders, tmp_path):
    """(folder, config, data, cache) of a teacher of PNG files and a student of the JPEG files' bytes."""
    shutil.copytree(folders, tmp_path / "data")
    config = folder_config(tmp_path / "data")
    data = open_data(config)
    cache, _ = capture_labels(config, data, open_teacher(config, data), str(tmp_path / "cache"))
    return tmp_path / "data", config, data, cache


def batches_of(feed):
    feed.order.epoch = feed.order.step = 0
    return [feed.dataset.fetch(request) for request in feed.order]


# -- labels ------------------------------------------------------------------------------------------------


def test_every_sample_of_another_source_has_the_label_of_its_own_key(labeled):
    base, config, data, cache = labeled
    student = data.student_data(config)
    seen = set()
    for indices in np.array_split(np.random.default_rng(0).permutation(60), 4):
        batch = data.train_dataset(config, cache)[0].fetch([(int(n), 0) for n in indices])
        assert batch.samples.tolist() == indices.tolist()
        for row, sample in enumerate(indices):
            key = data.train.source.key(int(sample))
            file = (base / "files" / key).with_suffix(".jpg").read_bytes()
            assert bytes(batch.images[row, : batch.lengths[row]].to(torch.uint8).tolist()) == file
            expected = cache.read([int(sample)], view=0)
            assert np.array_equal(batch.labels.ids[row], expected.ids[0])
            assert np.array_equal(batch.labels.log_probs[row], expected.log_probs[0])
            assert int(batch.targets[row]) == student.train.source.target(
                int(student.pairing.student_of[sample])
            )
            seen.add(key)
    assert len(seen) == 60


def test_a_reduced_view_is_of_the_very_crop_that_was_labeled(shared_cache):
    config, data, cache = digits_config(student=SMALL), open_data(digits_config()), shared_cache[2]
    assert data.replays_teacher_views(config)
    dataset, chosen = data.train_dataset(config, cache)
    assert chosen is None
    samples = [7, 3, 250]
    for view in (0, 1):
        batch, whole = dataset.fetch([(n, view) for n in samples]), data.train.load(samples, view)
        assert batch.images.shape == (3, 1, 4, 4)
        for row in range(3):
            expected = torch.nn.functional.interpolate(
                whole.images[row : row + 1], size=(4, 4), mode="bilinear", antialias=True
            )
            assert torch.equal(batch.images[row], expected[0])
        assert np.array_equal(batch.labels.log_probs, cache.read(samples, view=view).log_probs)


def test_a_batch_is_reduced_as_its_images_are_one_by_one():
    views = Views(ViewSettings(crop="padded", padding=2, flip=0.5))
    small = StudentViews(views, StudentViewSettings(size=5, grey=True))
    images = torch.randint(0, 256, (6, 3, 9, 12), dtype=torch.uint8)
    keys = [f"{n}" for n in range(6)]
    for view in (0, 1):
        batch = small.apply_batch(images, keys=keys, view=view)
        one_by_one = [
            small.apply_batch([image], keys=[key], view=view)[0]
            for image, key in zip(images, keys, strict=True)
        ]
        assert batch.shape == (6, 1, 5, 6)
        assert torch.equal(batch, torch.stack(one_by_one))
    whole = StudentViews(views, StudentViewSettings(grey=True)).apply_batch(images, keys=keys, view=0)
    luma = (299 * images[:, 0].int() + 587 * images[:, 1].int() + 114 * images[:, 2].int()) // 1000
    assert torch.equal(whole[:, 0].int(), luma)


def test_who_cannot_replay_has_the_plain_view_and_its_label_unless_told_otherwise(shared_cache, tmp_path):
    config, data, cache = digits_config(student=BYTES), open_data(digits_config()), shared_cache[2]
    assert not data.replays_teacher_views(config)
    metrics = train_student(
        config, data, model=config.student.model, labels="cache", cache=cache, out=tmp_path / "run"
    )
    assert json.loads((tmp_path / "run" / "config.json").read_text())["num_views"] == 1
    assert metrics["epochs"] == 2
    dataset, _ = data.train_dataset(config, cache)
    plain, other = dataset.fetch([(5, 0)]), dataset.fetch([(5, 1)])
    assert torch.equal(plain.images, other.images)
    assert not np.array_equal(plain.labels.log_probs, other.labels.log_probs)
    assert {batch.view for batch in batches_of(hard_label_batches(config, data))} == {0}


def test_a_live_teacher_sees_its_own_images_of_the_students_samples(labeled):
    _, config, data, cache = labeled
    online = config.model_copy(update={"train": config.train.model_copy(update={"labels": "online"})})
    batch = batches_of(hard_label_batches(online, data))[0]
    teacher_of = data.student_data(config).pairing.teacher_of
    assert torch.equal(batch.seen, data.train.load(teacher_of[batch.samples], 0).images)
    pieces = batch.split(3)
    assert torch.equal(torch.cat([piece.seen for piece in pieces]), batch.seen)
    assert torch.equal(ByteBatch.merge(pieces).seen, batch.seen)
    teacher = open_teacher(config, data)
    live = data.task(online, config.student.model, teacher)
    cached = data.task(config, config.student.model)
    torch.manual_seed(0)
    model = live.build().eval()
    dense = data.train_dataset(config, cache)[0].fetch([(int(teacher_of[n]), 0) for n in batch.samples])
    # The cache keeps 4 of 10 classes; at T = 1 with its exact tail the losses are near each other, not equal.
    losses = [float(task.loss(model, rows).detach()) for task, rows in ((live, batch), (cached, dense))]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)


# -- wrong samples -----------------------------------------------------------------------------------------


def swap(one, other):
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def files_of(base, folder, *, same_size):
    files = sorted((base / folder / "train").rglob("*.*"))
    size = {}
    for file in files:
        if same_size and file.stat().st_size in size:
            return size[file.stat().st_size], file
        size[file.stat().st_size] = file
    return files[0], next(file for file in files if file.stat().st_size != files[0].stat().st_size)


@pytest.mark.parametrize("same_size", [False, True])
def test_two_swapped_files_of_the_teacher_are_refused(labeled, same_size):
    base, config, _, cache = labeled
    swap(*files_of(base, "images", same_size=same_size))
    with pytest.raises(AlignmentError, match=r"changed since it was labeled|the teacher saw content"):
        batches_of(cached_batches(config, open_data(config), cache, 1, False))


def test_two_swapped_files_of_the_student_are_refused_by_its_run(labeled, tmp_path):
    base, config, data, cache = labeled
    how = {"model": config.student.model, "labels": "cache", "cache": cache, "out": tmp_path / "run"}
    train_student(config, data, **how)
    swap(*files_of(base, "files", same_size=True))
    with pytest.raises(RunError, match="student_data"):
        train_student(config, open_data(config), **how)


def test_swapped_files_of_a_student_of_images_are_refused_too(labeled, tmp_path):
    base, _, _, cache = labeled
    other = {"source": {"name": "imagefolder", "root": str(base / "files")}, "views": {"size": 4}}
    config = folder_config(base, **other, model="linear")
    how = {"model": "linear", "labels": "cache", "cache": cache, "out": tmp_path / "run"}
    train_student(config, open_data(config), **how)
    swap(*files_of(base, "files", same_size=True))
    with pytest.raises(RunError, match="student_data"):
        train_student(config, open_data(config), **how)


def test_a_copy_with_two_files_of_one_size_swapped_replays_nothing_and_is_another_run(labeled, tmp_path):
    base, _, _, cache = labeled
    shutil.copytree(base / "images", base / "copy")
    copy = {"source": {"name": "imagefolder", "root": str(base / "copy")}, "pairing": {}}
    config = folder_config(base, **copy, model="linear")
    how = {"model": "linear", "labels": "cache", "cache": cache, "out": tmp_path / "run"}
    train_student(config, data := open_data(config), **how)
    assert data.replays_teacher_views(config)
    swap(*files_of(base, "copy", same_size=True))
    assert not open_data(config).replays_teacher_views(config)
    with pytest.raises(RunError, match="student_data"):
        train_student(config, open_data(config), **how)


def test_a_file_that_changes_under_a_run_is_named(labeled):
    base, config, data, cache = labeled
    feed = cached_batches(config, data, cache, 1, False)
    first, other = files_of(base, "files", same_size=False)
    swap(first, other)
    with pytest.raises(SourceError, match=r"file 'train/.*jpg' changed since this run opened it"):
        batches_of(feed)


def test_keys_that_do_not_meet_are_refused_before_anything_is_trained(labeled, tmp_path):
    base, _, _, cache = labeled
    config = folder_config(base, pairing={})
    with pytest.raises(AlignmentError, match=r"60 samples of student.source .* 'train/0/000.jpg'"):
        train_student(
            config, open_data(config), model="bytes", labels="cache", cache=cache, out=tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


# -- identity, subsets, resume -------------------------------------------------------------------------------


def test_another_pairing_is_another_run(labeled, tmp_path):
    base, config, data, cache = labeled
    keys, targets = data.train.source.keys(), data.train.source.targets()
    partner = {key: key.replace(".png", ".jpg") for key in keys}
    one, other = np.flatnonzero(targets == targets[0])[:2]
    how = {"model": config.student.model, "labels": "cache", "cache": cache, "out": tmp_path / "run"}
    train_student(config, data, **how)
    file = tmp_path / "pairs.csv"

    def write():
        rows = "".join(f"{theirs},{ours}\n" for theirs, ours in partner.items())
        file.write_text("teacher_key,student_key\n" + rows)
        return folder_config(base, pairing={"file": str(file)})

    same = train_student(write(), open_data(config), **how)  # the same pairs, named by a file
    assert same["seconds"] == json.loads((tmp_path / "run" / "metrics.json").read_text())["seconds"]
    partner[keys[one]], partner[keys[other]] = partner[keys[other]], partner[keys[one]]
    with pytest.raises(RunError, match="student_data"):
        train_student(write(), open_data(config), **how)


def test_a_subset_is_said_and_trains_on_what_is_there(labeled, capsys):
    base, _, _, cache = labeled
    for file in sorted((base / "files" / "train").rglob("*.jpg"))[::3]:
        file.unlink()
    with pytest.raises(AlignmentError, match=r"20 samples of source .* have no match"):
        open_data(config := folder_config(base)).student_data(config)
    config = folder_config(base, pairing={"suffix": "ignore", "subset": True})
    data = open_data(config)
    feed = cached_batches(config, data, cache, 1, False)
    assert "20 of 60 labeled samples match none of" in capsys.readouterr().err
    samples = np.concatenate([batch.samples for batch in batches_of(feed)])
    assert sorted(samples) == data.student_data(config).pairing.samples.tolist()
    assert len(samples) == len(feed.dataset) == 40
    assert data.student_data(config).identity()["subset"] is True
    assert (
        len(np.concatenate([batch.samples for batch in batches_of(hard_label_batches(config, data))])) == 40
    )


@pytest.mark.parametrize("student", [BYTES, SMALL], ids=["bytes", "low resolution"])
def test_killed_at_any_step_it_ends_with_the_same_weights(shared_cache, tmp_path, monkeypatch, student):
    config = digits_config(student=student, train={"epochs": 2, "batch_size": 100, "checkpoint_steps": 1})
    cache, data = shared_cache[2], open_data(config)
    how = {"model": config.student.model, "labels": "cache", "cache": cache}
    train_student(config, data, **how, out=tmp_path / "whole")
    save, left = loop.RunDirectory.save_checkpoint, [2]

    def dying(*arguments):
        save(*arguments)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    monkeypatch.setattr(loop.RunDirectory, "save_checkpoint", dying)
    with pytest.raises(Killed, match=r"^$"):
        train_student(config, data, **how, out=tmp_path / "killed")
    monkeypatch.undo()
    train_student(config, open_data(config), **how, out=tmp_path / "killed")
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_the_teacher_is_trained_on_what_it_sees(in_tmp):
    config = digits_config(
        student=BYTES,
        teacher={"model": "linear", "weights": "runs/test/teacher/model.safetensors"},
        train_teacher={"epochs": 1, "device": "cpu"},
    )
    train_teacher(config, open_data(config))
    assert load_file("runs/test/teacher/model.safetensors")["1.weight"].shape == (10, 64)


STUDENTS = {
    "bytes": BYTES,
    "lower resolution": SMALL,
    "other images": {"source": DIGITS, "pairing": {"subset": True}},
}


@pytest.mark.parametrize("student", STUDENTS.values(), ids=STUDENTS.keys())
def test_no_student_source_changes_the_teacher(in_tmp, student):
    tables = {
        "source": DIGITS,
        "teacher": {"model": "linear", "weights": "runs/test/teacher/model.safetensors"},
        "train_teacher": {"epochs": 1, "device": "cpu"},
    }
    trained = []
    for config in (digits_config(**tables), digits_config(student=student, **tables)):
        train_teacher(config, open_data(config))
        trained.append({name: (in_tmp / f"runs/test/teacher/{name}").read_bytes() for name in WRITTEN})
        shutil.rmtree(in_tmp / "runs/test/teacher")
    assert trained[0] == trained[1]


@pytest.mark.parametrize("student", [BYTES, SMALL], ids=["bytes", "low resolution"])
def test_trials_of_a_sweep_and_other_processes_have_the_same_student(shared_cache, student):
    config = digits_config(student={**student, "pairing": {"replace": [["a", "b"]], "subset": True}})
    trial = candidate(config, {"temperature": 2.0}, shared_cache[2])
    assert trial.student == config.student
    assert trial.loss.temperature == 2
    written = tomllib.loads(tomli_w.dumps(trial.model_dump(exclude_unset=True, exclude_none=True)))
    assert build_config(written, "of a test") == trial
    assert RunConfig.model_validate_json(config.model_dump_json()).student == config.student


# -- bytes -------------------------------------------------------------------------------------------------


def test_the_same_images_give_the_same_bytes_and_another_encoding_another_digest():
    def digest(**settings):
        return bytes_of_digits("train", **settings).digest

    assert digest() == digest() == digest(format="png")
    all_of_them = [digest(), digest(compress_level=0), digest(format="jpeg"), digest(max_bytes=50)]
    assert len({*all_of_them, digest(format="jpeg", quality=20)}) == 5


def test_encoded_bytes_decode_to_the_image():
    import io

    source = bytes_of_digits("train")
    images = open_source(DIGITS, split="train")
    for sample in (0, 17, 299):
        decoded = Image.open(io.BytesIO(source.content(sample).tobytes()))
        assert np.array_equal(np.array(decoded), images.image(sample)[0].numpy())


def test_batches_are_padded_behind_each_file_and_merge():
    data = ByteData(bytes_of_digits("train"))
    parts = [data.load([n], 0) for n in range(8)]
    whole = data.load(range(8), 0)
    merged = ByteBatch.merge(parts)
    assert torch.equal(merged.images, whole.images)
    assert torch.equal(merged.lengths, torch.from_numpy(data.source.lengths[:8]))
    assert len({int(length) for length in whole.lengths}) > 1, "files of one length prove nothing"
    for row, length in enumerate(whole.lengths):
        assert (whole.images[row, length:] == PADDING).all()
        assert (whole.images[row, :length] < PADDING).all()


@pytest.mark.parametrize("stride", [1, 3, 4])
def test_logits_do_not_depend_on_how_far_a_batch_is_padded(stride):
    torch.manual_seed(0)
    model = build_model(f"bytes?width=16&stride={stride}", num_classes=5, input_shape=(40,)).eval()
    for length in range(1, 20):
        file = torch.randint(0, 256, (1, length))
        outputs = [
            model(torch.nn.functional.pad(file, (0, more), value=PADDING))
            for more in (0, 1, 2, 5, 40 - length)
        ]
        for one, other in pairwise(outputs):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_order_of_bytes_and_every_one_of_them_counts():
    torch.manual_seed(0)
    model = build_model("bytes?width=16", num_classes=5, input_shape=(18,)).eval()
    file = torch.randint(0, 255, (1, 18))
    before = model(file)
    for place in range(18):
        changed = file.clone()
        changed[0, place] += 1
        assert not torch.allclose(model(changed), before, atol=1e-6), place
    assert not torch.allclose(model(file.flip(1)), before, atol=1e-6)


# -- refused configs ---------------------------------------------------------------------------------------


def test_a_model_of_the_other_kind_of_input_is_refused():
    with pytest.raises(SpecError, match=r"reads bytes, the data are images of \(1, 8, 8\)"):
        build_model("bytes", num_classes=10, input_shape=(1, 8, 8))
    with pytest.raises(SpecError, match="reads images, the data are files of 130 bytes"):
        build_model("cnn", num_classes=10, input_shape=(130,))
    model = build_model("bytes", num_classes=10, input_shape=(12,))
    with pytest.raises(SpecError, match="a file of 13 bytes, but it was built for at most 12"):
        model(torch.zeros(1, 13, dtype=torch.long))


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"source": {"modality": "bytes", "name": "digits", "formt": "png"}}, "student.source.formt: unknown key with name = .*; did you mean format"),
        ({"source": {"modality": "bytes", "name": "digits", "quality": 3}}, "quality is of format"),
        ({"source": {"modality": "bytes", "name": "imagefolder", "compress_level": 3}}, "compress_level is of format"),
        ({"source": {"modality": "sound", "name": "digits"}}, "student.source.modality: .*sound"),
        ({"source": {"modality": "bytes", "name": "digits"}, "views": {"size": 4}}, "a student of bytes reads files"),
        ({"views": {"crop": "padded"}}, "student.views.crop: unknown key"),
        ({"pairing": {"subset": True}}, "pairing joins a student.source"),
        ({"source": {"name": "digits"}, "pairing": {"file": "a", "suffix": "ignore"}}, "file names every pair"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_meant_is_refused_by_key(student, message):
    with pytest.raises(ConfigError, match=message):
        build_config({"name": "test", "source": {"name": "digits"}, "student": student}, "of a test")


def test_students_of_text_have_no_source_of_images():
    text = {"modality": "text", "name": "stdlib", "tokenizer": "bytes"}
    with pytest.raises(ConfigError, match=r"student.tokenizer; drop the tables"):
        build_config({"name": "test", "source": text, "student": {"source": DIGITS}}, "of a test")
