"""A folder of ordinary images, from configs/imagefolder.toml: label it, learn from it, and notice any change to it."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from softcache.config.load import load_config
from softcache.errors import AlignmentError, SourceError
from softcache.models.image import build_model
from softcache.reader.dataset import SoftLabelDataset
from softcache.reader.open import open_cache
from softcache.runs import cache_is_ready, capture_labels, open_data, open_teacher, train_student
from softcache.tools.verify.teacher import verify_against_teacher, verify_units
from tests.support.caches import ROOT

CLASSES = ("cat", "dog", "newt")
SIZES = [
    (40, 61),
    (33, 48),
    (70, 36),
    (32, 90),
    (35, 50),
    (64, 64),
]  # width, height; one is smaller than size
TEACHER = "timm:test_efficientnet"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Images of 32 by 32 are too small to share: threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_image(path, seed, size):
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (6, 5, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)


def write_folder(root):
    for number, name in enumerate(CLASSES):
        for place, size in enumerate(SIZES):
            write_image(root / "train" / name / f"{place}.png", 100 * number + place, size)
        for place in range(2):
            write_image(root / "eval" / name / f"{place}.png", 1000 + 100 * number + place, SIZES[place])


def config_of(root, weights, workers=0):
    overrides = {
        "source.root": str(root),
        "views.size": 32,
        "teacher.model": TEACHER,
        "teacher.weights": str(weights),
        "labels.k": 2,
        "labels.num_views": 3,
        "capture.batch_size": 4,
        "capture.unit_samples": 10,
        "capture.chunk_samples": 5,
        "capture.device": "cpu",
        "capture.dtype": "float32",
        "capture.workers": workers,
        "student.model": "timm:test_resnet",
        "train.epochs": 3,
        "train.batch_size": 8,
        "train.device": "cpu",
        "train.precision": "no",
        "reader.workers": workers,
    }
    return load_config(
        ROOT / "configs" / "imagefolder.toml", [f"{key}={value}" for key, value in overrides.items()]
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, weights, cache's path): labeled once, copied by the tests that change something."""
    base = tmp_path_factory.mktemp("imagefolder")
    write_folder(base / "images")
    torch.manual_seed(0)
    model = build_model(TEACHER, num_classes=len(CLASSES), input_shape=(3, 32, 32))
    save_file(model.state_dict(), base / "teacher.safetensors")
    config = config_of(base / "images", base / "teacher.safetensors")
    data = open_data(config)
    capture_labels(config, data, open_teacher(config, data), str(base / "cache"))
    return base / "images", base / "teacher.safetensors", base / "cache"


@pytest.fixture
def moved(made, tmp_path):
    """(folder, config, cache): the folder and the cache on another machine, so to say, to be changed at will."""
    shutil.copytree(made[0], tmp_path / "images")
    shutil.copytree(made[2], tmp_path / "cache")
    return tmp_path / "images", config_of(tmp_path / "images", made[1]), open_cache(tmp_path / "cache")


def use(config, cache):
    """What a student's first epochs do with the cache."""
    data = open_data(config)
    dataset = SoftLabelDataset(data.train.source, cache, views=data.train.views)
    for view in range(cache.num_views):
        for sample in range(len(cache)):
            dataset[sample, view]


def test_the_configs_own_augmentation_is_what_is_put_to_the_test(made):
    views = config_of(made[0], made[1]).views
    assert (views.crop, views.augment, views.erase) == ("resized", "randaugment", 0.25)
    cache = open_cache(made[2])
    assert (len(cache), cache.num_views, cache.manifest.class_names) == (18, 3, CLASSES)
    keys, targets, _ = cache.samples_table()
    assert keys[0] == "train/cat/0.png"
    assert keys[-1] == "train/newt/5.png"
    assert targets.tolist() == [0] * 6 + [1] * 6 + [2] * 6


def test_every_view_is_drawn_anew(made):
    data = open_data(config_of(made[0], made[1]))
    batches = [data.train.load(range(18), view).images for view in range(3)]
    assert all(batch.shape == (18, 3, 32, 32) for batch in batches)
    assert all(not torch.equal(batches[0][n], batches[1][n]) for n in range(18))
    assert all(not torch.equal(batches[1][n], batches[2][n]) for n in range(18))


def test_a_student_learns_from_the_cache_and_the_teacher_confirms_it(made, tmp_path):
    config, cache = config_of(made[0], made[1]), open_cache(made[2])
    data = open_data(config)
    metrics = train_student(
        config, data, model=config.student.model, labels="cache", cache=cache, out=tmp_path / "student"
    )
    assert metrics["epochs"] == 3
    assert metrics["eval_samples"] == 6
    assert np.isfinite([row["train_loss"] for row in metrics["history"]]).all()
    assert (tmp_path / "student" / "model.safetensors").exists()
    teacher = open_teacher(config, data)
    assert list(verify_units(cache)) == []
    faults = verify_against_teacher(cache, data.train, teacher, num_rows=54, threshold_nats=1e-4, seed=0)
    assert list(faults) == []


def test_loader_processes_label_and_learn_the_same(made, tmp_path):
    config = config_of(made[0], made[1], workers=2)
    data = open_data(config)
    cache, report = capture_labels(config, data, open_teacher(config, data), str(tmp_path / "cache"))
    assert report.rows == 54
    one = open_cache(made[2])
    for view in range(3):
        np.testing.assert_array_equal(cache.read_rows(range(18), view)[1], one.read_rows(range(18), view)[1])
        np.testing.assert_array_equal(cache.read(range(18), view).ids, one.read(range(18), view).ids)
    losses = []
    for run in (config, config_of(made[0], made[1], workers=0)):
        out = tmp_path / f"student{run.reader.workers}"
        metrics = train_student(run, data, model="linear", labels="cache", cache=one, out=out)
        losses.append([row["train_loss"] for row in metrics["history"]])
    assert losses[0] == losses[1]


def test_the_folder_may_move(moved):
    _, config, cache = moved
    use(config, cache)
    assert cache_is_ready(config, open_data(config), cache.url)


# -- what may happen to a folder ---------------------------------------------------------------------------


def test_another_picture_under_the_same_name_is_named(moved):
    folder, config, cache = moved
    write_image(folder / "train/dog/3.png", seed=5, size=(44, 44))
    with pytest.raises(AlignmentError, match=r"contents of sample 'train/dog/3\.png' changed"):
        use(config, cache)


def test_another_picture_of_the_same_file_size_is_named(moved):
    """The digest of a folder sees sizes only; the fingerprint of the first batch sees the pixels."""
    folder, config, cache = moved
    before = open_data(config).train.source.digest
    path = folder / "train/dog/3.png"
    size = path.stat().st_size
    write_image(path, seed=5, size=(24, 24))
    content = path.read_bytes()
    assert len(content) < size
    path.write_bytes(content.ljust(size, b"\0"))  # decoders ignore what follows the image
    assert open_data(config).train.source.digest == before
    with pytest.raises(AlignmentError, match=r"sample 'train/dog/3\.png', view 0: the teacher saw content"):
        use(config, cache)


def test_one_pixel_of_one_picture_is_noticed(moved):
    folder, config, cache = moved
    path = folder / "train/newt/1.png"
    with Image.open(path) as image:
        pixels = np.array(image)
    pixels[len(pixels) // 2, pixels.shape[1] // 2] ^= 255
    Image.fromarray(pixels).save(path)
    with pytest.raises(AlignmentError, match=r"sample 'train/newt/1\.png'"):
        use(config, cache)


def test_students_leave_out_what_the_teacher_left_out(moved, tmp_path):
    """And a picture that is repaired later is named."""
    folder, config, _ = moved
    broken = folder / "train/dog/3.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:50])
    settings = {"skip_unreadable": True, "data_dir": str(tmp_path / "data")}
    config = config.model_copy(update={"source": config.source.model_copy(update=settings)})
    data = open_data(config)
    cache, _ = capture_labels(config, data, open_teacher(config, data), str(tmp_path / "partial"))
    assert cache.manifest.identity["source"]["unreadable"] == ["train/dog/3.png"]
    assert len(cache) == 17
    use(config, cache)
    broken.write_bytes(whole)
    with pytest.raises(
        AlignmentError, match=r"1 samples were left out as unreadable when .*such as 'train/dog/3\.png'"
    ):
        use(config, cache)
    (folder / "train/cat/0.png").write_bytes(b"")
    broken.write_bytes(whole[:50])
    with pytest.raises(AlignmentError, match=r"1 samples were labeled and are left out .*'train/cat/0\.png'"):
        use(config, cache)


def test_a_renamed_file_is_named(moved):
    folder, config, cache = moved
    (folder / "train/dog/3.png").rename(folder / "train/dog/3b.png")
    with pytest.raises(
        AlignmentError, match=r"was 'train/dog/3\.png' when labeled and is 'train/dog/3b\.png' now"
    ):
        use(config, cache)


def test_two_files_that_changed_names_are_noticed(moved):
    folder, config, cache = moved
    one, other = folder / "train/cat/1.png", folder / "train/cat/2.png"
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)
    with pytest.raises(AlignmentError, match=r"contents of sample 'train/cat/1\.png' changed"):
        use(config, cache)


def test_a_file_in_another_class_is_named(moved):
    folder, config, cache = moved
    (folder / "train/cat/5.png").rename(folder / "train/newt/9.png")
    with pytest.raises(AlignmentError, match=r"sample 5 was 'train/cat/5\.png' when labeled"):
        use(config, cache)


def test_an_added_file_is_named(moved):
    folder, config, cache = moved
    write_image(folder / "train/dog/35.png", seed=9, size=(40, 40))
    with pytest.raises(AlignmentError, match=r"train/dog/35\.png"):
        use(config, cache)


def test_a_deleted_file_is_named(moved):
    folder, config, cache = moved
    (folder / "train/dog/3.png").unlink()
    with pytest.raises(AlignmentError, match=r"train/dog/3\.png"):
        use(config, cache)


def test_a_file_that_breaks_or_goes_while_a_student_reads_is_named(moved):
    folder, config, cache = moved
    data = open_data(config)
    dataset = SoftLabelDataset(data.train.source, cache, views=data.train.views)
    path = folder / "train/dog/3.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(SourceError, match=r"train/dog/3\.png: cannot be decoded"):
        dataset[9]
    path.unlink()
    with pytest.raises(SourceError, match=r"train/dog/3\.png"):
        dataset[9]


def test_a_class_folder_that_is_gone_is_named(moved):
    folder, config, _ = moved
    shutil.rmtree(folder / "train/newt")
    with pytest.raises(SourceError, match=r"not there \['newt'\]"):
        open_data(config)


def test_a_change_is_noticed_before_a_student_or_a_rerun_starts(moved, tmp_path):
    folder, config, cache = moved
    (folder / "train/dog/3.png").rename(folder / "train/dog/3b.png")
    data = open_data(config)
    with pytest.raises(AlignmentError, match=r"train/dog/3\.png"):
        train_student(config, data, model="linear", labels="cache", cache=cache, out=tmp_path / "student")
    assert not (tmp_path / "student").exists()
    with pytest.raises(AlignmentError, match=r"train/dog/3\.png"):
        cache_is_ready(config, data, cache.url)
