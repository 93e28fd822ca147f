"""Sources: stable keys, honest digests, and errors that name the file; all data is embedded or made here."""

import gzip
import pickle
import shutil
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from sklearn.datasets import load_digits

from softcache.data.sources import open_source, source_settings
from softcache.data.sources.images.base import Source
from softcache.errors import SourceError, SpecError

IDX = {
    "train-images-idx3-ubyte": (2051, (6, 5, 4)),
    "train-labels-idx1-ubyte": (2049, (6,)),
    "t10k-images-idx3-ubyte": (2051, (3, 5, 4)),
    "t10k-labels-idx1-ubyte": (2049, (3,)),
}


def opened(split="train", **settings):
    return open_source(source_settings(settings), split=split)


# -- digits --------------------------------------------------------------------------------------------------


def test_digits_splits_are_disjoint_complete_and_stratified():
    train, evaluation = opened(name="digits"), opened("eval", name="digits")
    assert (len(train), len(evaluation)) == (1501, 296)
    assert set(train.keys()) | set(evaluation.keys()) == {f"digits/{n:04d}" for n in range(1797)}
    assert not set(train.keys()) & set(evaluation.keys())
    every = np.bincount(load_digits().target, minlength=10)
    assert np.array_equal(np.bincount(evaluation.targets(), minlength=10), every // 6)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_digits_are_scikit_learns_scaled_to_bytes(split):
    source, data = opened(split, name="digits"), load_digits()
    for sample in range(0, len(source), 37):
        number = int(source.key(sample).split("/")[1])
        expected = [[[round(value * 255 / 16) for value in row] for row in data.images[number].tolist()]]
        assert source.image(sample).tolist() == expected
        assert source.image(sample).dtype == torch.uint8
        assert source.target(sample) == data.target[number] == source.targets()[sample]
    assert source.class_names == tuple("0123456789")


def test_digits_never_change_between_versions():
    assert opened(name="digits").digest == "d2b70d7fc5ed1910862d1f6998cbca3043d14564c528bc30b835c786e9552ea8"


def test_sources_satisfy_the_protocol_and_survive_pickling(folder):
    for source in (opened(name="digits", max_train_samples=5), opened(name="imagefolder", root=str(folder))):
        assert isinstance(source, Source)
        copy = pickle.loads(pickle.dumps(source))
        assert copy.digest == source.digest
        assert copy.keys() == source.keys()
        assert torch.equal(copy.image(2), source.image(2))
        assert source.targets().dtype == np.int64


def test_the_maxima_take_the_first_samples_and_change_the_digest():
    whole, part = opened(name="digits"), opened(name="digits", max_train_samples=20, max_eval_samples=3)
    assert list(part.keys()) == list(whole.keys())[:20]
    assert torch.equal(part.image(19), whole.image(19))
    assert part.digest != whole.digest
    assert len(opened("eval", name="digits", max_eval_samples=3)) == 3
    assert len(opened("eval", name="digits", max_train_samples=3)) == 296


# -- the MNIST family ----------------------------------------------------------------------------------------


def idx_bytes(magic, shape, seed=0):
    body = np.random.default_rng(seed).integers(0, 10, shape, np.uint8)
    return struct.pack(f">{1 + len(shape)}I", magic, *shape) + body.tobytes()


def write_idx(root, *, packed=True, seed=0):
    root.mkdir(parents=True, exist_ok=True)
    for number, (name, (magic, shape)) in enumerate(IDX.items()):
        data = idx_bytes(magic, shape, seed + number)
        (root / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(data) if packed else data)
    return root


def fashion(root, tmp_path, split="train", **settings):
    return opened(split, name="fashion-mnist", root=str(root), data_dir=str(tmp_path / "data"), **settings)


@pytest.mark.parametrize("layout", ["gz", "raw", "torchvision"])
def test_fashion_mnist_is_read_from_any_layout(layout, tmp_path):
    flat = {
        "gz": tmp_path / "flat",
        "raw": tmp_path / "flat",
        "torchvision": tmp_path / "tv/FashionMNIST/raw",
    }[layout]
    write_idx(flat, packed=layout == "gz")
    root = tmp_path / "tv" if layout == "torchvision" else flat
    source, evaluation = fashion(root, tmp_path), fashion(root, tmp_path, "eval")
    pixels = np.frombuffer(idx_bytes(2051, (6, 5, 4), 0)[16:], np.uint8).reshape(6, 1, 5, 4)
    assert np.array_equal(torch.stack([source.image(n) for n in range(6)]).numpy(), pixels)
    assert source.targets().tolist() == list(idx_bytes(2049, (6,), 1)[8:])
    assert source.key(3) == "fashion-mnist/train/00003"
    assert evaluation.key(2) == "fashion-mnist/eval/00002"
    assert (len(source), len(evaluation), source.num_classes) == (6, 3, 10)
    assert source.class_names[9] == "Ankle boot"
    assert (tmp_path / "data").exists() == (layout != "torchvision")
    assert not list(tmp_path.rglob(".*"))
    part = fashion(root, tmp_path, max_train_samples=2)
    assert part.image(0).untyped_storage().nbytes() == 2 * 5 * 4, "a part holds the whole"


def test_a_second_folder_replaces_what_the_first_one_left(tmp_path):
    one = fashion(write_idx(tmp_path / "one"), tmp_path)
    raw = tmp_path / "data/FashionMNIST/raw/train-images-idx3-ubyte"
    unpacked = raw.stat().st_mtime_ns
    assert fashion(tmp_path / "one", tmp_path).digest == one.digest
    assert raw.stat().st_mtime_ns == unpacked
    two = fashion(write_idx(tmp_path / "two", seed=9), tmp_path)
    assert two.digest != one.digest
    three = fashion(write_idx(tmp_path / "three", packed=False), tmp_path)
    assert three.digest == one.digest


@pytest.mark.parametrize("packed", [True, False], ids=["gz", "raw"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-7], "fetch"),
        (lambda data: data[:3], "fetch"),
        (lambda data: b"\0" * len(data), "fetch"),
    ],
    ids=["truncated", "stump", "zeros"],
)
def test_a_damaged_file_is_named_and_nothing_is_left_behind(damage, message, packed, tmp_path):
    root = write_idx(tmp_path / "flat", packed=packed)
    path = root / f"train-images-idx3-ubyte{'.gz' if packed else ''}"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SourceError, match=f"{path.name}.*{message}"):
        fashion(root, tmp_path)
    assert not [p for p in (tmp_path / "data").rglob("*") if p.is_file()]
    write_idx(root, packed=packed)
    assert len(fashion(root, tmp_path)) == 6


def test_a_damaged_file_in_torchvisions_layout_is_named_and_kept(tmp_path):
    path = write_idx(tmp_path / "tv/FashionMNIST/raw", packed=False) / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        SourceError, match=r"t10k-images-idx3-ubyte: expected idx magic 2051 and 76 bytes.*and 75 bytes"
    ):
        fashion(tmp_path / "tv", tmp_path)
    assert path.exists()


def test_wrong_magic_and_mixed_files_are_found_out(tmp_path):
    root = write_idx(tmp_path / "flat")
    labels, images = root / "train-labels-idx1-ubyte.gz", root / "train-images-idx3-ubyte.gz"
    shutil.copy(images, labels)
    with pytest.raises(
        SourceError, match=r"train-labels-idx1-ubyte.gz: expected idx magic 2049.*found magic 2051"
    ):
        fashion(root, tmp_path)
    shutil.copy(root / "t10k-labels-idx1-ubyte.gz", labels)
    with pytest.raises(SourceError, match=r"6 images, 3 labels of 10 classes in the train split"):
        fashion(root, tmp_path)
    labels.write_bytes(gzip.compress(struct.pack(">2I", 2049, 6) + bytes([0, 1, 2, 3, 4, 10])))
    with pytest.raises(SourceError, match=r"expected a label below that"):
        fashion(root, tmp_path)


def test_three_of_four_files_are_not_enough(tmp_path):
    root = write_idx(tmp_path / "flat")
    (root / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(SourceError, match=r"t10k-labels-idx1-ubyte \(or .gz\) missing, next to"):
        fashion(root, tmp_path)


def test_a_data_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "data").write_text("a file")
    with pytest.raises(
        SourceError, match=r"cannot be unpacked into .*data/FashionMNIST/raw \(source.data_dir\)"
    ):
        fashion(write_idx(tmp_path / "flat"), tmp_path)


def test_nothing_found_tells_what_where_and_three_ways_out(tmp_path):
    with pytest.raises(SourceError) as caught:
        fashion(tmp_path / "nowhere", tmp_path)
    for part in (
        str(tmp_path / "nowhere"),
        *IDX,
        "FashionMNIST/raw",
        "source.download = true",
        "source.root",
    ):
        assert part in str(caught.value)
    assert "dpkg -L dataset-fashion-mnist" in str(caught.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("name", "files"),
    [("mnist", "train-images"), ("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")],
)
def test_the_others_say_what_is_missing_too(name, files, tmp_path):
    with pytest.raises(SourceError, match=f"source {name}: no complete dataset.*{files}.*download = true"):
        opened(name=name, root=str(tmp_path), data_dir=str(tmp_path))


def test_download_is_tried_only_when_asked_for_and_into_the_data_folder(tmp_path, monkeypatch):
    from torchvision import datasets

    asked = []

    class Offline(datasets.FashionMNIST):
        def download(self):
            asked.append(self.raw_folder)
            raise OSError("no network")

    Offline.__name__ = "FashionMNIST"
    monkeypatch.setattr(datasets, "FashionMNIST", Offline)
    with pytest.raises(SourceError, match="no complete dataset"):
        fashion(tmp_path, tmp_path)
    assert asked == []
    with pytest.raises(SourceError, match="the download failed: no network"):
        fashion(tmp_path, tmp_path, download=True)
    assert asked == [str(tmp_path / "data/FashionMNIST/raw")]


def test_cifar_channels_come_first(tmp_path, monkeypatch):
    from torchvision import datasets

    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), np.uint8)

    def cifar(root, *, train, download):
        return SimpleNamespace(data=pixels, targets=[0, 1, 2, 9], classes=[str(n) for n in range(10)])

    monkeypatch.setattr(datasets, "CIFAR10", cifar)
    source = opened(name="cifar10", root=str(tmp_path), max_train_samples=3)
    assert source.keys() == [f"cifar10/train/0000{n}" for n in range(3)]
    assert np.array_equal(source.image(2).numpy(), pixels[2].transpose(2, 0, 1))


# -- folders of images ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    root, random = tmp_path / "images", np.random.default_rng(0)
    for path in (
        "train/cat/b.png",
        "train/cat/a.png",
        "train/dog/deep/c.png",
        "eval/cat/d.png",
        "eval/dog/e.png",
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (7, 5, 3), np.uint8)).save(root / path)
    return root


def test_an_image_folder_has_relative_keys_in_class_order(folder):
    (folder / "train/cat/notes.txt").write_text("not an image")
    (folder / "train/cat/._a.png").write_text("another system's litter")
    (folder / "train/.cache").mkdir()
    train, evaluation = (
        opened(name="imagefolder", root=str(folder)),
        opened("eval", name="imagefolder", root=str(folder)),
    )
    assert train.keys() == ["train/cat/a.png", "train/cat/b.png", "train/dog/deep/c.png"]
    assert evaluation.keys() == ["eval/cat/d.png", "eval/dog/e.png"]
    assert train.class_names == ("cat", "dog")
    assert train.targets().tolist() == [0, 0, 1]
    expected = np.asarray(Image.open(folder / "train/cat/b.png")).transpose(2, 0, 1)
    assert np.array_equal(train.image(1).numpy(), expected)
    assert opened(name="imagefolder", root=str(folder), max_train_samples=2).keys() == train.keys()[:2]
    (folder / "eval").rename(folder / "val")
    assert opened("eval", name="imagefolder", root=str(folder)).keys() == ["val/cat/d.png", "val/dog/e.png"]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_every_kind_of_image_becomes_rgb(mode, folder):
    path = folder / "train/cat/a.png"
    image = Image.open(path).convert(mode)
    image.save(path)
    found = opened(name="imagefolder", root=str(folder)).image(0)
    assert found.shape == (3, 7, 5)
    assert np.array_equal(found.numpy(), np.asarray(image.convert("RGB")).transpose(2, 0, 1))


def test_the_digest_of_a_folder_sees_names_classes_and_sizes_but_not_its_place(folder, tmp_path):
    def digest(root=folder):
        return opened(name="imagefolder", root=str(root)).digest

    first = digest()
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert digest(tmp_path / "elsewhere") == first
    (folder / "train/cat/a.png").rename(folder / "train/cat/z.png")
    renamed = digest()
    with (folder / "train/cat/z.png").open("ab") as file:
        file.write(b"\0")
    assert len({first, renamed, digest()}) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"GIF89a" + data[6:],
        lambda data: data[:40] + bytes(40) + data[80:],
    ],
    ids=["truncated", "empty", "other", "zeros"],
)
def test_a_broken_image_is_named(damage, folder):
    path = folder / "train/cat/b.png"
    path.write_bytes(damage(path.read_bytes()))
    source = opened(name="imagefolder", root=str(folder))
    with pytest.raises(SourceError, match=r"image .*train/cat/b.png: cannot be decoded.*take it out"):
        source.image(1)
    assert source.image(0).shape == (3, 7, 5)


def test_both_splits_must_have_the_same_classes(folder):
    (folder / "eval/bird").mkdir()
    with pytest.raises(SourceError, match=r"expected the 2 class folders .*not there \['bird'\]"):
        opened("eval", name="imagefolder", root=str(folder))
    (folder / "eval/bird").rmdir()
    shutil.rmtree(folder / "eval/dog")
    with pytest.raises(SourceError, match=r"missing \['dog'\]"):
        opened("eval", name="imagefolder", root=str(folder))


def test_folders_that_are_no_dataset_are_refused(folder, tmp_path):
    with pytest.raises(SourceError, match=r"source.root: missing"):
        opened(name="imagefolder")
    with pytest.raises(SourceError, match=r"nowhere: no such folder; check source\.root"):
        opened(name="imagefolder", root=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"no folder train in it"):
        opened(name="imagefolder", root=str(tmp_path / "empty"))
    for path in (folder / "train").rglob("*.png"):
        path.unlink()
    with pytest.raises(SourceError, match=r"no images \(\.avif, \.bmp"):
        opened(name="imagefolder", root=str(folder))
    shutil.rmtree(folder / "eval")
    with pytest.raises(SourceError, match=r"no folder eval, val, validation, valid or test in it"):
        opened("eval", name="imagefolder", root=str(folder))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_file_name_that_is_not_utf8_is_refused(folder):
    (folder / "train/cat/a.png").rename(folder / "train/cat/a\udcff.png")
    with pytest.raises(SourceError, match=r"'train/cat/a\\udcff.png' is not UTF-8"):
        opened(name="imagefolder", root=str(folder))


# -- names and the user's own --------------------------------------------------------------------------------


class Squares:
    """Four images of one value each."""

    name, num_classes, class_names, digest = "squares", 2, ("even", "odd"), "00"

    def __init__(self, split, keys=("a", "b", "c", "d"), targets=(0, 1, 0, 1)):
        self._keys, self._targets = [f"{split}/{key}" for key in keys], np.array(targets)

    def __len__(self):
        return 4

    def key(self, sample):
        return self._keys[sample]

    def keys(self):
        return self._keys

    def target(self, sample):
        return int(self._targets[sample])

    def targets(self):
        return self._targets

    def image(self, sample):
        return torch.full((1, 3, 3), sample, dtype=torch.uint8)


def make(split):
    return Squares(split)


def make_twins(split):
    return Squares(split, keys="aacd")


def make_lost_target(split):
    return Squares(split, targets=(0, 1, 0))


def make_wild_target(split):
    return Squares(split, targets=(0, 1, 0, 2))


def make_half_target(split):
    return Squares(split, targets=(0, 1, 0.5, 1))


def changed(split, **members):
    return type("Changed", (Squares,), members)(split)


def make_other_key(split):
    return changed(split, key=lambda self, sample: [*self._keys[:3], f"{split}/z"][sample])


def make_other_target(split):
    return changed(split, target=lambda self, sample: (0, 1, 1, 1)[sample])


def make_one_name(split):
    return changed(split, class_names=("even",))


def make_floats(split):
    return changed(split, image=lambda self, sample: torch.full((1, 3, 3), sample / 4))


def make_channels_last(split):
    return changed(split, image=lambda self, sample: torch.zeros(8, 9, 3, dtype=torch.uint8))


def make_half(split):
    return SimpleNamespace(name="half", key=None, keys=None, image=None)


def make_nothing_of_it(split):
    raise SourceError("squares: gone")


def test_your_own_source_is_opened_and_cut():
    source = opened("eval", name="tests.data.test_sources:make", max_train_samples=1)
    assert source.keys() == ["eval/a", "eval/b", "eval/c", "eval/d"]
    part = opened(name="tests.data.test_sources:make", max_train_samples=3)
    assert isinstance(part, Source)
    assert (len(part), part.keys(), part.targets().tolist()) == (
        3,
        ["train/a", "train/b", "train/c"],
        [0, 1, 0],
    )
    assert (part.key(2), part.target(1), int(part.image(2)[0, 0, 0])) == ("train/c", 1, 2)
    assert part.digest not in (
        source.digest,
        opened(name="tests.data.test_sources:make", max_train_samples=2).digest,
    )
    with pytest.raises(IndexError, match="out of range"):
        part.image(3)
    assert len(opened(name="tests.data.test_sources:make", max_train_samples=30)) == 4


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("no_such_module:make", SpecError, "No module named 'no_such_module'"),
        ("tests.data.test_sources:no_such", SpecError, "no attribute 'no_such'"),
        ("tests.data.test_sources:opened_wrongly", SpecError, "unexpected keyword argument 'split'"),
        (
            "tests.data.test_sources:make_half",
            SpecError,
            "no Source; missing: num_classes, class_names, digest, target",
        ),
        ("tests.data.test_sources:make_twins", SourceError, "4 samples with 3 different keys"),
        ("tests.data.test_sources:make_lost_target", SourceError, r"targets of shape \(3,\)"),
        ("tests.data.test_sources:make_wild_target", SourceError, "classes 0 to 2; expected whole .* 0 to 1"),
        (
            "tests.data.test_sources:make_half_target",
            SourceError,
            r"target\(2\) is 0, and targets\(\) has 0.5",
        ),
        (
            "tests.data.test_sources:make_other_key",
            SourceError,
            r"key\(3\) is 'train/z', and keys\(\) has train/d",
        ),
        (
            "tests.data.test_sources:make_other_target",
            SourceError,
            r"target\(2\) is 1, and targets\(\) has 0",
        ),
        ("tests.data.test_sources:make_one_name", SourceError, "1 class_names, and num_classes is 2"),
        (
            "tests.data.test_sources:make_floats",
            SourceError,
            r"image\(0\) is torch.float32 of shape \(1, 3, 3\); .*uint8",
        ),
        (
            "tests.data.test_sources:make_channels_last",
            SourceError,
            r"shape \(8, 9, 3\), which looks like \[H, W, C\]",
        ),
        ("tests.data.test_sources:make_nothing_of_it", SourceError, "^squares: gone$"),
    ],
)
def test_what_is_wrong_with_your_own_source_is_said(name, error, message):
    with pytest.raises(error, match=message):
        opened(name=name)


def opened_wrongly():
    return None


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("fashion_mnist", "fashion-mnist"),
        ("digit", "digits"),
        ("cifar", "cifar10"),
        ("imagenet-folder", "imagefolder"),
        ("?", "digits"),
    ],
)
def test_an_unknown_name_gets_the_nearest_ones(name, near):
    with pytest.raises(SpecError, match=f"unknown; (did you mean|known:) .*{near}"):
        opened(name=name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "name"),
        ({"name": "digits", "max_train_samples": 0}, "max_train_samples"),
        ({"name": "digits", "download": "yes"}, "download"),
        ({"name": "digits", "path": "x"}, "path"),
    ],
)
def test_settings_are_strict(settings, message):
    with pytest.raises(ValidationError, match=message):
        source_settings(settings)


@pytest.mark.slow
def test_digests_do_not_depend_on_the_process():
    code = "from softcache.data.sources import *; print(open_source({'name': 'digits'}, split='eval').digest)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "5"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == opened("eval", name="digits").digest


def test_a_source_shows_what_it_is(folder):
    source = opened(name="imagefolder", root=str(folder))
    shown = repr(source)
    assert shown.startswith(f"ImageFolderSource imagefolder/train: {len(source):,} samples, ")
    assert source.class_names[0] in shown
    assert source.key(0) in shown
