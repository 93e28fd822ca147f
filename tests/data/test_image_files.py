"""The same pictures in files of every kind: equal pixels, classes and keys that stay."""

import csv
import io
import json
import pickle
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softcache.data.sources import open_source
from softcache.data.sources.files import expand_braces
from softcache.errors import SourceError
from tests.support.pictures import encoded, pixels_of, write_pictures

NAMES = ("cat", "dog", "newt")
NUMBER = 12


def labels_of(number=NUMBER):
    return [seed % 3 for seed in range(number)]


def write_csv(root, labels=None, name="train.csv", header=("path", "label"), delimiter=","):
    write_pictures(root / "pictures", NUMBER)
    labels = labels or [NAMES[label] for label in labels_of()]
    with (root / name).open("w", newline="") as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        if header:
            writer.writerow(header)
        writer.writerows([f"pictures/{seed}.png", label] for seed, label in enumerate(labels))
    return {"name": "csv", "path": str(root / name)}


def write_parquet(root, labels=None, images=None, name="train.parquet", metadata=None, **columns):
    labels = labels or [NAMES[label] for label in labels_of()]
    images = images or [{"bytes": encoded(seed), "path": f"{seed}.png"} for seed in range(NUMBER)]
    table = pa.table({"image": images, "label": labels, **columns})
    pq.write_table(table.replace_schema_metadata(metadata), root / name, row_group_size=5)
    return {"name": "parquet", "path": str(root / name)}


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_tars(root, first=0, last=NUMBER, number=0, label="cls"):
    with tarfile.open(root / f"train-{number:03}.tar", "w") as tar:
        for seed in range(first, last):
            add(tar, f"a/{seed:04}.png", encoded(seed))
            name = NAMES[seed % 3]
            add(
                tar,
                f"a/{seed:04}.{label}",
                json.dumps({"class": name}).encode() if label == "json" else name.encode(),
            )
    return {"name": "webdataset", "path": str(root / "train-000.tar")}


def hf_table(names=True, number=NUMBER):
    label = datasets.ClassLabel(names=list(NAMES)) if names else datasets.Value("string")
    rows = labels_of(number) if names else [NAMES[label] for label in labels_of(number)]
    return datasets.Dataset.from_dict(
        {"image": [{"bytes": encoded(seed), "path": None} for seed in range(number)], "label": rows},
        features=datasets.Features({"image": datasets.Image(), "label": label}),
    )


def write_saved(root):
    hf_table().save_to_disk(root / "saved")
    return {"name": "hf", "path": str(root / "saved")}


def write_hf_parquet(root):
    hf_table().to_parquet(root / "hub.parquet")
    return {"name": "hf", "path": str(root / "hub.parquet")}


def write_hf_folder(root):
    for seed, label in enumerate(labels_of()):
        write_pictures(root / "photos/train" / NAMES[label], 1, f"{seed:02}-", seed)
    return {"name": "hf", "path": str(root / "photos")}


WRITERS = {
    "csv": write_csv,
    "parquet": write_parquet,
    "tar": write_tars,
    "save_to_disk": write_saved,
    "hf parquet": write_hf_parquet,
    "hf folder": write_hf_folder,
}


def opened(root, table, split="train", **settings):
    return open_source({"data_dir": str(root / "data"), "eval_share": 1e-9, **table, **settings}, split=split)


@pytest.mark.parametrize("kind", WRITERS)
def test_the_pictures_are_the_same_in_every_kind_of_file(tmp_path, kind):
    table = WRITERS[kind](tmp_path)
    source = opened(tmp_path, table)
    assert source.class_names == NAMES
    assert len(set(source.keys())) == len(source) == NUMBER
    order = range(NUMBER)
    if kind == "hf folder":  # class after class
        order = sorted(order, key=lambda seed: seed % 3)
    assert source.targets().tolist() == [seed % 3 for seed in order]
    again = pickle.loads(pickle.dumps(source))
    for sample, seed in enumerate(order):
        assert np.array_equal(again.image(sample).permute(1, 2, 0).numpy(), pixels_of(seed))
    assert source.digest == opened(tmp_path, table).digest
    assert source.contents_digest() == again.contents_digest()
    left = source.without([0, 5])
    assert left.digest != source.digest
    assert left.unreadable == (source.key(0), source.key(5))
    assert np.array_equal(left.image(4).numpy(), source.image(6).numpy())


def test_keys_say_where_a_picture_is(tmp_path):
    keys = {kind: opened(tmp_path, WRITERS[kind](tmp_path)).key(3) for kind in list(WRITERS)[:4]}
    assert keys == {
        "csv": "pictures/3.png",
        "parquet": "train.parquet/3",
        "tar": "train-000.tar/a/0003",
        "save_to_disk": "train/3",
    }


def test_a_share_of_each_is_held_out(tmp_path):
    for writer in (write_csv, write_parquet, write_tars, write_saved):
        table = writer(tmp_path)
        parts = [opened(tmp_path, table, split, eval_share=0.4).keys() for split in ("train", "eval")]
        assert all(parts), writer
        assert sorted([*parts[0], *parts[1]]) == sorted(opened(tmp_path, table).keys())


def test_a_file_for_evaluation_has_the_classes_of_the_training_file(tmp_path):
    table = write_csv(tmp_path)
    write_csv(tmp_path, [NAMES[2]] * NUMBER, name="eval.csv")
    source = opened(tmp_path, table, "eval", eval_path=str(tmp_path / "eval.csv"))
    assert (set(source.targets().tolist()), source.class_names) == ({2}, NAMES)
    write_csv(tmp_path, ["cow", *["cat"] * 10, "hen"], name="eval.csv")
    with pytest.raises(SourceError, match=r"2 samples have a label of no class, .*'cow' \(1\), 'hen' \(1\)"):
        opened(tmp_path, table, "eval", eval_path=str(tmp_path / "eval.csv"))


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_numbers_of_other_names_in_another_split_or_file_are_refused(tmp_path, kind):
    train, turned = (
        hf_table(),
        hf_table().cast_column("label", datasets.ClassLabel(names=["dog", "cat", "newt"])),
    )
    if kind == "saved":
        for name, test in (("a", turned), ("b", train)):
            datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / name)
        tables = [{"name": "hf", "path": str(tmp_path / name), "eval_split": "test"} for name in ("a", "b")]
    else:
        for name, table in (("train", train), ("turned", turned)):
            table.to_parquet(tmp_path / f"{name}.parquet")
        path = str(tmp_path / "train.parquet")
        tables = [
            {"name": "parquet", "path": path, "eval_path": str(tmp_path / f"{n}.parquet")}
            for n in ("turned", "train")
        ]
        with pytest.raises(SourceError, match=r"turned\.parquet: its numbers are of other classes"):
            opened(tmp_path, {"name": "parquet", "path": str(tmp_path / "t*.parquet")})
    with pytest.raises(
        SourceError, match=r"class 0 is 'dog', and 'cat' there; give both the same ClassLabel"
    ):
        opened(tmp_path, tables[0], "eval")
    assert opened(tmp_path, tables[1], "eval").targets().tolist() == labels_of()


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_whole_numbers_are_classes_and_have_names_where_they_are_given(tmp_path, kind):
    table = WRITERS[kind](tmp_path, labels_of())
    assert opened(tmp_path, table).class_names == ("0", "1", "2")
    (tmp_path / "names.json").write_text(json.dumps({"0": "cat", "1": "dog", "2": "newt"}))
    for names in (list(NAMES), str(tmp_path / "names.json")):
        source = opened(tmp_path, table, class_names=names)
        assert (source.class_names, source.targets().tolist()) == (NAMES, labels_of())
    with pytest.raises(SourceError, match=r"source\.class_order: 'natural', and labels are numbers; drop it"):
        opened(tmp_path, table, class_order="natural")
    with pytest.raises(SourceError, match=r"4 samples have a label of no class, .*'2' \(4\)"):
        opened(tmp_path, table, class_names=["cat", "dog"])


def test_a_number_for_no_class_is_refused_in_tables_and_tars(tmp_path):
    table = write_csv(tmp_path, labels=[*"01201201201", "-1"])
    with pytest.raises(
        SourceError, match=r"the label -1; expected classes from 0 on; leave out what has no label"
    ):
        opened(tmp_path, table)
    with tarfile.open(tmp_path / "train-000.tar", "w") as tar:
        for seed, label in enumerate((b"0", b"1", b"-1")):
            add(tar, f"{seed}.png", encoded(seed))
            add(tar, f"{seed}.cls", label)
    with pytest.raises(SourceError, match=r"the label -1; expected classes from 0 on"):
        opened(tmp_path, {"name": "webdataset", "path": str(tmp_path / "train-000.tar")})


def test_tables_are_divided_and_named_as_they_are(tmp_path):
    table = write_csv(tmp_path, header=("file", "species"), delimiter=";")
    settings = {"path_column": "file", "label_column": "species", "delimiter": ";"}
    assert len(opened(tmp_path, table, **settings)) == NUMBER
    with pytest.raises(SourceError, match=r"no column 'path'; it has file, species; set source\.path_column"):
        opened(tmp_path, table, delimiter=";")
    table = write_csv(tmp_path, header=None, name="plain.tsv", delimiter="\t")
    settings = {"header": False, "path_column": 0, "label_column": 1}
    assert len(opened(tmp_path, table, **settings)) == NUMBER
    with pytest.raises(
        SourceError, match=r"row 1: 1 columns; expected 2 or more, divided by ','; check source\.delim"
    ):
        opened(tmp_path, table, **settings, delimiter=",")


def test_images_that_are_not_there_are_counted(tmp_path):
    table = write_csv(tmp_path)
    (tmp_path / "pictures/3.png").unlink()
    (tmp_path / "pictures/7.png").unlink()
    with pytest.raises(
        SourceError, match=r"2 of 12 images are not in .*: pictures/3\.png, pictures/7\.png; set"
    ):
        opened(tmp_path, table)


def test_parquet_has_bytes_alone_and_keys_and_names_of_its_own(tmp_path):
    table = write_parquet(tmp_path, images=[encoded(seed) for seed in range(NUMBER)])
    assert np.array_equal(opened(tmp_path, table).image(11).permute(1, 2, 0).numpy(), pixels_of(11))
    table = write_parquet(tmp_path, id=[f"n{number}" for number in range(NUMBER)])
    assert opened(tmp_path, table, key_column="id").key(2) == "n2"
    assert opened(tmp_path, table, key_column="path").key(2) == "2.png"
    features = {"info": {"features": {"label": {"names": list(NAMES), "_type": "ClassLabel"}}}}
    table = write_parquet(tmp_path, labels_of(), metadata={"huggingface": json.dumps(features)})
    assert opened(tmp_path, table).class_names == NAMES


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"images": ["a"] * NUMBER}, {}, "column 'image' is of type string; expected binary, or a struct"),
        ({}, {"label_column": "labels"}, r"no column labels; it has image, label; set source\.image_column"),
        ({}, {"key_column": "id"}, "no column id; it has image, label"),
        (
            {"labels": [0.5] * NUMBER},
            {},
            "column 'label' is of type double; expected whole numbers, or texts",
        ),
        ({"labels": ["a", None, *["b"] * 10]}, {}, r"train\.parquet, row 1: no label"),
        (
            {"images": [{"bytes": None, "path": "x"}] * NUMBER},
            {},
            r"row 0: no bytes in column 'image'|is of type",
        ),
        ({"x": ["same"] * NUMBER}, {"key_column": "x"}, "the key 'same' comes 12 times"),
    ],
)
def test_parquet_that_is_not_of_images_is_refused(tmp_path, columns, settings, message):
    table = write_parquet(tmp_path, **columns)
    with pytest.raises(SourceError, match=message):
        opened(tmp_path, table, **settings)


# -- tar files ---------------------------------------------------------------------------------------------


def test_numbers_in_braces_are_files(tmp_path):
    assert expand_braces("{a,b}-{8..10}.tar") == [
        "a-8.tar",
        "a-9.tar",
        "a-10.tar",
        "b-8.tar",
        "b-9.tar",
        "b-10.tar",
    ]
    for number in range(3):
        write_tars(tmp_path, 4 * number, 4 * number + 4, number)
    table = {"name": "webdataset", "path": str(tmp_path / "train-{000..002}.tar")}
    source = opened(tmp_path, table)
    assert source.keys()[4] == "train-001.tar/a/0004"
    assert np.array_equal(source.image(9).permute(1, 2, 0).numpy(), pixels_of(9))
    assert source.digest == opened(tmp_path, {**table, "path": str(tmp_path / "train-*.tar")}).digest
    with pytest.raises(SourceError, match=r"2 of its 5 files are not there, such as .*train-003\.tar"):
        opened(tmp_path, {**table, "path": str(tmp_path / "train-{000..004}.tar")})


def test_the_class_may_be_in_json(tmp_path):
    table = write_tars(tmp_path, label="json")
    assert opened(tmp_path, table, json_key="class").targets().tolist() == labels_of()
    with pytest.raises(
        SourceError, match=r"a/0000\.json: KeyError: 'label'; expected a class as text, in JSON"
    ):
        opened(tmp_path, table, json_key="label")
    with pytest.raises(
        SourceError, match=r"no \.cls for 12 of 12 samples, the first is 'a/0000' with \.png, \.json"
    ):
        opened(tmp_path, table)


def test_a_tar_that_was_cut_or_is_none_is_refused(tmp_path):
    table = write_tars(tmp_path)
    whole = (tmp_path / "train-000.tar").read_bytes()
    source = opened(tmp_path, table)
    (tmp_path / "train-000.tar").write_bytes(whole[:2000])
    with pytest.raises(SourceError, match=r"cannot be read: .*the file was cut"):
        source.image(9)
    with pytest.raises(SourceError, match=r"unexpected end of data; expected a whole tar file"):
        opened(tmp_path, table)


def test_unreadable_rows_and_members_are_left_out(tmp_path):
    images = [{"bytes": encoded(seed), "path": None} for seed in range(NUMBER)]
    images[4]["bytes"] = b"no picture"
    table = write_parquet(tmp_path, images=images)
    with pytest.raises(
        SourceError, match=r"parquet/train, train\.parquet/4: cannot be decoded: .*skip_unreadable"
    ):
        opened(tmp_path, table).image(4)
    source = opened(tmp_path, table, skip_unreadable=True)
    assert (len(source), source.unreadable) == (11, ("train.parquet/4",))


# -- Hugging Face ------------------------------------------------------------------------------------------


def test_a_stream_of_images_is_bounded_and_keeps_its_names(tmp_path):
    hf_table(number=30).to_parquet(tmp_path / "hub.parquet")
    table = {"name": "hf", "path": str(tmp_path / "hub.parquet"), "streaming": True, "max_images": 10}
    source = opened(tmp_path, table)
    assert (len(source), source.class_names) == (10, NAMES)
    assert np.array_equal(source.image(7).permute(1, 2, 0).numpy(), pixels_of(7))
    (copied,) = (tmp_path / "data/streams").glob("*/documents.arrow")
    assert copied.stat().st_size < (tmp_path / "hub.parquet").stat().st_size
    with pytest.raises(
        ValueError, match=r"source\.streaming and source\.max_images: .*give both, or neither"
    ):
        opened(tmp_path, {**table, "max_images": None})


def test_splits_and_columns_of_a_dataset_are_named(tmp_path):
    splits = {"train": hf_table(names=False), "test": hf_table(names=False, number=3)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    table = {"name": "hf", "path": str(tmp_path / "saved"), "eval_split": "test"}
    assert (len(opened(tmp_path, table)), len(opened(tmp_path, table, "eval"))) == (12, 3)
    assert opened(tmp_path, table, "eval").class_names == NAMES
    with pytest.raises(SourceError, match=r"no column 'img'; it has image, label; set source\.image_column"):
        opened(tmp_path, table, image_column="img")
    with pytest.raises(SourceError, match=r"split 'test2': cannot be loaded: KeyError"):
        opened(tmp_path, {**table, "eval_split": "test2"}, "eval")
    with pytest.raises(SourceError, match=r"column 'label' is of type Value\('string'\); expected Image"):
        opened(tmp_path, table, image_column="label", label_column="label")


def test_labels_of_a_table_that_pandas_wrote_as_decimals_are_the_numbers_of_classes(tmp_path):
    numbers = [2, 11, 0, 2, 11, 0, 2, 11, 0, 2, 11, 0]
    table = write_csv(tmp_path, labels=[f"{number}.0" for number in numbers])
    source = opened(tmp_path, table, eval_path=table["path"])
    assert source.targets().tolist() == numbers
    assert source.num_classes == 12
    assert source.class_names[11] == "11"
    named = opened(tmp_path, table, eval_path=table["path"], class_names=[f"of {n}" for n in range(12)])
    assert (named.targets().tolist(), named.class_names[11]) == (numbers, "of 11")
    # Versions, which are names of classes because the names have them.
    versions = opened(tmp_path, table, eval_path=table["path"], class_names=["11.0", "2.0", "0.0"])
    assert versions.targets()[:3].tolist() == [1, 0, 2]
    with tarfile.open(tmp_path / "train-000.tar", "w") as tar:
        for seed, number in enumerate(numbers):
            add(tar, f"{seed}.png", encoded(seed))
            add(tar, f"{seed}.cls", f"{number}.0".encode())
    table = {"name": "webdataset", "path": str(tmp_path / "train-000.tar")}
    assert opened(tmp_path, table, eval_path=table["path"]).targets().tolist() == numbers
    table = write_csv(tmp_path, labels=["1.0", "1.5"] * 6)
    assert opened(tmp_path, table, eval_path=table["path"]).class_names == ("1.0", "1.5")


def write_text_labels(root, kind, labels):
    if kind in ("csv", "parquet"):
        return WRITERS[kind](root, labels)
    if kind == "webdataset":
        with tarfile.open(root / "train-000.tar", "w") as tar:
            for seed, label in enumerate(labels):
                add(tar, f"{seed}.png", encoded(seed))
                add(tar, f"{seed}.cls", label.encode())
        return {"name": "webdataset", "path": str(root / "train-000.tar")}
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": encoded(seed), "path": None} for seed in range(len(labels))], "label": labels},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")}),
    )
    table.save_to_disk(root / "saved")
    return {"name": "hf", "path": str(root / "saved"), "eval_share": 0.01}


@pytest.mark.parametrize("decimals", ["", ".0"])
@pytest.mark.parametrize("kind", ["csv", "parquet", "webdataset", "hf"])
def test_numbers_that_are_written_as_texts_are_numbers_of_classes_in_every_table(tmp_path, kind, decimals):
    numbers = [2, 11, 0] * 4
    table = write_text_labels(tmp_path, kind, [f"{number}{decimals}" for number in numbers])
    alone = {} if kind == "hf" else {"eval_path": table["path"]}
    source = opened(tmp_path, table, **alone)
    assert (source.targets().tolist(), source.num_classes) == (numbers, 12)
    named = opened(tmp_path, table, **alone, class_names=[f"of {n}" for n in range(12)])
    assert (named.targets().tolist(), named.class_names[11]) == (numbers, "of 11")


def test_an_empty_label_is_no_class(tmp_path):
    table = write_csv(tmp_path, labels=["0.0", "1.0", ""] * 4)
    with pytest.raises(SourceError, match=r"4 of 12 samples have an empty label; .* leave out what has none"):
        opened(tmp_path, table)
