"""Folders of images in every layout, the order of their classes, and pictures that cannot be decoded."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from softcache.data.sources import open_source
from softcache.errors import SourceError
from tests.support.pictures import write_pictures


def opened(root, split="train", **settings):
    return open_source(
        {"name": "imagefolder", "root": str(root), "data_dir": str(root / "data"), **settings}, split=split
    )


def made(root, *folders, count=2):
    for folder in folders:
        write_pictures(root / folder, count)
    return root


@pytest.mark.parametrize("name", ["eval", "val", "validation", "valid", "test"])
def test_the_folder_for_evaluation_may_have_any_usual_name(tmp_path, name):
    made(tmp_path, "train/a", "train/b", f"{name}/a", f"{name}/b")
    assert list(opened(tmp_path, "eval").keys())[::2] == [f"{name}/a/0.png", f"{name}/b/0.png"]
    assert opened(tmp_path).class_names == ("a", "b")


def test_folders_of_other_names_are_given(tmp_path):
    made(tmp_path, "x/a", "y/a", "val/b")
    settings = {"train_folder": "x", "eval_folder": "y"}
    assert opened(tmp_path, "eval", **settings).keys() == ["y/a/0.png", "y/a/1.png"]
    with pytest.raises(SourceError, match=r"source\.eval_folder: no folder .*z; check source\.root and"):
        opened(tmp_path, "eval", train_folder="x", eval_folder="z")


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_a_share_is_held_out_where_there_is_no_split(tmp_path, prefix):
    made(tmp_path, f"{prefix}a", f"{prefix}b", count=20)
    train, held_out = (opened(tmp_path, split, eval_share=0.3) for split in ("train", "eval"))
    assert len(train) + len(held_out) == 40
    assert 4 <= len(held_out) <= 20
    assert not set(train.keys()) & set(held_out.keys())
    with pytest.raises(SourceError, match=r"source\.eval_share to (hold out a share|the share)"):
        opened(tmp_path, "eval")


@pytest.mark.parametrize(
    "lines",
    [
        ["ImageId,PredictionString", "v1,n02 1 2 3 4", "v0,n01 85 131 499 499 n01 1 2 3 4", "v2,n02 9 9 9 9"],
        ["v0.png 0", "v1.png 1", "v2.png 1"],
        ["n01", "n02", "n02"],
    ],
    ids=["kaggle", "caffe", "in order"],
)
def test_imagenets_folder_for_evaluation_is_flat(tmp_path, lines):
    made(tmp_path, "train/n01", "train/n02")
    write_pictures(tmp_path / "val", 3, "v")
    (tmp_path / "labels.txt").write_text("\n".join(lines))
    source = opened(tmp_path, "eval", eval_labels=str(tmp_path / "labels.txt"))
    assert (source.keys(), source.targets().tolist()) == (
        ["val/v0.png", "val/v1.png", "val/v2.png"],
        [0, 1, 1],
    )


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["490", "361", "171"], "numbers alone; those of ILSVRC's ground truth"),
        (["n01", "n02"], "2 classes for the 3 images"),
        (["v0.png n01", "v1.png n02"], "no line for 1 of the 3 images of .*such as v2.png"),
        (
            ["v0.png n01", "v1.png n03", "v2.png n04"],
            r"2 samples have a label of no class, .*'n03' \(1\), 'n04'",
        ),
        (["a/v0.png n01", "b/v0.png n02", "v1 n01", "v2 n01"], r"'v0' is the name of several images"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, lines, message):
    made(tmp_path, "train/n01", "train/n02")
    write_pictures(tmp_path / "val", 3, "v")
    (tmp_path / "labels.txt").write_text("\n".join(lines))
    with pytest.raises(SourceError, match=message):
        opened(tmp_path, "eval", eval_labels=str(tmp_path / "labels.txt"))
    with pytest.raises(SourceError, match=r"images without folders of classes; set source\.eval_labels"):
        opened(tmp_path, "eval")


def test_a_class_of_several_words_is_not_the_class_of_its_first_word(tmp_path):
    made(tmp_path, "train/red", "train/red fox")
    write_pictures(tmp_path / "val", 3, "v")
    for lines in (
        ["v0.png,red fox", "v1.png,red", "v2.png,red fox,1 2 3"],
        ["v0 red fox", "v1 red", "v2 red fox"],
    ):
        (tmp_path / "labels.txt").write_text("\n".join(lines))
        source = opened(tmp_path, "eval", eval_labels=str(tmp_path / "labels.txt"))
        assert source.targets().tolist() == [1, 0, 1]
    (tmp_path / "labels.txt").write_text("red fox\nred\nred fox")
    assert opened(tmp_path, "eval", eval_labels=str(tmp_path / "labels.txt")).targets().tolist() == [1, 0, 1]


def test_links_are_followed_as_torchvision_follows_them_and_refused_where_they_lead_nowhere(tmp_path):
    made(tmp_path, "root/train/a", "root/train/b", "elsewhere/more")
    (tmp_path / "root/train/a/more").symlink_to(tmp_path / "elsewhere/more")
    made(tmp_path, "root/val/a", "root/val/b")
    source = opened(tmp_path / "root")
    expected = [
        (f"train/{Path(path).relative_to(tmp_path / 'root/train')}", target)
        for path, target in ImageFolder(tmp_path / "root/train").samples
    ]
    assert sorted(zip(source.keys(), source.targets().tolist(), strict=True)) == sorted(expected)
    assert any("more" in key for key, _ in expected)
    gone = tmp_path / "root/train/b/gone.png"
    gone.symlink_to(tmp_path / "annex/gone.png")
    with pytest.raises(
        SourceError, match=r"gone\.png is a link to .*annex/gone\.png, which is not there; fetch"
    ):
        opened(tmp_path / "root")
    gone.unlink()
    (tmp_path / "root/train/b/loop").symlink_to(tmp_path / "root/train")
    with pytest.raises(SourceError, match=r"loop is a link to a folder that it is in"):
        opened(tmp_path / "root")


def test_a_class_that_one_split_lacks_is_named_in_one_message(tmp_path):
    made(tmp_path, "train/a", "train/b", "train/c", "val/c", "val/d")
    with pytest.raises(SourceError, match=r"missing \['a', 'b'\], not there \['d'\]"):
        opened(tmp_path, "eval")


def test_the_order_of_classes_can_be_timms_or_given(tmp_path):
    made(tmp_path, "train/b10", "train/b9", "train/A", "val/b10", "val/b9", "val/A")
    plain = opened(tmp_path)
    assert (plain.class_names, plain.order_is_guessed) == (("A", "b10", "b9"), True)
    natural = opened(tmp_path, class_order="natural")
    assert (natural.class_names, natural.order_is_guessed) == (("A", "b9", "b10"), False)
    assert natural.keys()[2] == "train/b9/0.png"
    assert natural.digest != plain.digest
    for text, name in (
        (json.dumps(["b10", "A", "b9"]), "names.json"),
        (json.dumps({"b10": 0, "A": 1, "b9": 2}), "numbers.json"),
        ("b10\nA\nb9\n", "names.txt"),
    ):
        (tmp_path / name).write_text(text)
        source = opened(tmp_path, "eval", class_names=str(tmp_path / name))
        assert source.class_names == ("b10", "A", "b9")
        assert source.targets().tolist() == [0, 0, 1, 1, 2, 2]
    shown = {"A": "ant", "b9": "bee", "b10": "beetle"}
    (tmp_path / "shown.json").write_text(json.dumps(shown))
    assert opened(tmp_path, class_names=str(tmp_path / "shown.json")).class_names == ("ant", "bee", "beetle")
    with pytest.raises(SourceError, match=r"missing \['bee'\], not there \['b9'\]"):
        opened(tmp_path, class_names=["A", "b10", "bee"])


def test_pictures_of_every_suffix_are_seen_and_other_files_are_counted(tmp_path, caplog):
    caplog.set_level("INFO", logger="softcache")
    made(tmp_path, "train/a", "train/b", "train/a/.ipynb_checkpoints")
    for name, kind in (("x.jfif", "JPEG"), ("x.pgm", "PPM"), ("X.AVIF", "AVIF"), ("x.heic", "PNG")):
        Image.new("L", (8, 8)).save(tmp_path / "train/b" / name, kind)
    (tmp_path / "train/b/notes.txt").write_text("none")
    source = opened(tmp_path)
    assert source.keys()[2:] == [
        f"train/b/{name}" for name in ("0.png", "1.png", "X.AVIF", "x.jfif", "x.pgm")
    ]
    assert source.keys()[:2] == ["train/a/0.png", "train/a/1.png"]
    assert source.image(4).shape == (3, 8, 8)
    assert "files of other kinds than pictures are left out: 1 .txt, 1 .heic" in caplog.text


def test_a_class_without_a_picture_is_named_unless_the_classes_are_given(tmp_path):
    made(tmp_path, "train/a", "train/c", "val/a", "val/c")
    for folder in ("train/b", "val/b"):
        (tmp_path / folder).mkdir()
    with pytest.raises(
        SourceError, match=r"no image in 1 of the 3 folders of classes, such as 'b', which timm leaves"
    ):
        opened(tmp_path)
    assert opened(tmp_path, class_names=["a", "b", "c"]).targets().tolist() == [0, 0, 2, 2]
    assert opened(tmp_path, class_names=["a", "b", "c"], split="eval").targets().tolist() == [0, 0, 2, 2]


# -- pictures that cannot be decoded -----------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path):
    """A folder of twelve pictures, three of them broken in different ways."""
    made(tmp_path, "train/a", "train/b", "val/a", "val/b", count=6)
    whole = (tmp_path / "train/a/1.png").read_bytes()
    (tmp_path / "train/a/1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train/b/0.png").write_bytes(b"")
    (tmp_path / "train/b/4.png").write_bytes(b"<html>404</html>")
    return tmp_path


BROKEN = ("train/a/1.png", "train/b/0.png", "train/b/4.png")


def test_all_unreadable_pictures_are_named_at_once(broken):
    source = opened(broken)
    with pytest.raises(SourceError, match="3 of 12 images cannot be decoded") as caught:
        source.image(1)
    assert all(f"{broken / key}: " in str(caught.value) for key in BROKEN)
    assert str(caught.value).count("no picture of a kind that Pillow knows") == 1
    assert str(caught.value).count("the file is empty") == 1
    assert "source.skip_unreadable = true" in str(caught.value)
    (broken / "train/a/3.png").unlink()
    with pytest.raises(SourceError, match=r"train/a/3\.png: cannot be read: No such file"):
        source.image(3)


def test_unreadable_pictures_are_left_out_and_their_names_are_in_the_digest(broken):
    source = opened(broken, skip_unreadable=True)
    assert (len(source), source.unreadable) == (9, BROKEN)
    assert not set(source.keys()) & set(BROKEN)
    assert source.targets().tolist() == [0] * 5 + [1] * 4
    assert [source.image(sample).shape for sample in range(9)] == [(3, 8, 9)] * 9
    for key in BROKEN:
        (broken / key).unlink()
    whole = opened(broken, skip_unreadable=True)
    assert (whole.keys(), whole.unreadable) == (source.keys(), ())
    assert whole.digest != source.digest
    assert whole.digest == opened(broken).digest


def test_the_list_is_made_once_and_anew_for_a_file_that_changed(broken, monkeypatch):
    calls = []
    kind = type(opened(broken))
    decode = kind.decode
    monkeypatch.setattr(kind, "decode", lambda self, sample: calls.append(sample) or decode(self, sample))
    for _ in range(2):
        opened(broken, skip_unreadable=True)
    assert len(calls) == 12
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(broken / "train/b/0.png")
    assert opened(broken, skip_unreadable=True).unreadable == (BROKEN[0], BROKEN[2])


def test_a_split_without_any_readable_picture_is_refused(tmp_path):
    made(tmp_path, "train/a", "val/a")
    for path in (tmp_path / "train/a").iterdir():
        path.write_bytes(b"")
    with pytest.raises(SourceError, match="2 of 2 images cannot be decoded"):
        opened(tmp_path, skip_unreadable=True)
