"""Tables, lists and names that programs write oddly: read as they are meant, or refused; no sample is lost without a word."""

import pytest

from softcache.config.load import load_config
from softcache.data.sources import open_source
from softcache.data.sources.images.classes import find_classes
from softcache.errors import SourceError
from tests.support.pictures import write_pictures

NFC, NFD = "caf\xe9", "cafe\u0301"
ROWS = [f"{number}.png,{'cat' if number % 2 else 'dog'}" for number in range(6)]
TABLE = "\n".join(["path,label", *ROWS, ""])


def opened(folder, table, encoding="utf-8", **settings):
    write_pictures(folder / "im", 6)
    (folder / "t.csv").write_bytes(table.encode(encoding))
    given = {"name": "csv", "path": str(folder / "t.csv"), "root": str(folder / "im")}
    source = open_source(
        {**given, "data_dir": str(folder / "data"), "eval_share": 0.001, **settings}, split="train"
    )
    return dict(zip(source.keys(), [source.class_names[target] for target in source.targets()], strict=True))


@pytest.mark.parametrize(
    "table",
    [
        "\ufeff" + TABLE,
        TABLE.replace("\n", "\r\n"),
        TABLE.replace("\n", "\r"),
        TABLE.replace("cat", '"cat"'),
        TABLE.replace(",", " , "),
    ],
)
def test_marks_line_ends_and_quotes_are_no_part_of_names(tmp_path, table):
    assert opened(tmp_path, table) == {row.split(",")[0]: row.split(",")[1] for row in ROWS}


@pytest.mark.parametrize(
    ("table", "match"),
    [
        (TABLE.replace("2.png,dog", '2.png,"dog'), "unexpected end of data; expected UTF-8, rows divided by"),
        (
            TABLE.replace("1.png,cat", '1.png,"cat').replace("4.png,dog", '4.png,dog"'),
            r"row 3: 'cat\\n2\.png.* goes over several lines; .*close the quotes",
        ),
        (TABLE + "./0.png,cat\n", r"'\./0\.png', '0\.png' comes 2 times; expected one row for each"),
        (TABLE + "../im/0.png,cat\n", r"'\.\./im/0\.png', '0\.png' comes 2 times"),
        (
            TABLE.replace("label", "label,label").replace("cat", "cat,x").replace("dog", "dog,x"),
            "2 columns 'label'",
        ),
        (TABLE.replace(",", ";"), r"it has path;label; .*source\.delimiter to what divides columns"),
        (
            TABLE.replace("1.png,cat", f"1.png,{NFC}").replace("3.png,cat", f"3.png,{NFD}"),
            "look like one .*u0301",
        ),
        (
            TABLE.replace("1.png,cat", "1.png,a  b").replace("3.png,cat", "3.png,a b"),
            "'a  b' and 'a b' look alike",
        ),
        ("path,label\n", "no rows of the training split"),
        ("", "no column 'path'; it has none"),
    ],
)
def test_what_would_lose_or_double_samples_is_refused(tmp_path, table, match):
    with pytest.raises(SourceError, match=match):
        opened(tmp_path, table)


def test_a_first_row_that_is_an_image_is_no_header(tmp_path):
    columns = {"path_column": 0, "label_column": 1}
    with pytest.raises(SourceError, match=r"row 1: '0\.png' is an image, .*; set source\.header = false"):
        opened(tmp_path, "\n".join(ROWS), **columns)
    assert len(opened(tmp_path, "\n".join(ROWS), **columns, header=False)) == 6
    with pytest.raises(SourceError, match=r"source\.label_column: -1; expected a name, or a number from 0"):
        opened(tmp_path, "\n".join(ROWS), path_column=0, label_column=-1, header=False)


def test_a_table_of_another_encoding_is_told_what_is_expected(tmp_path):
    with pytest.raises(SourceError, match=r"can't decode .*; expected UTF-8"):
        opened(tmp_path, TABLE, encoding="utf-16")


def test_folders_whose_names_look_alike_say_what_differs(tmp_path):
    for place, number in ((f"train/{NFC}", 1), ("train/x", 1), (f"val/{NFD}", 1), ("val/x", 1)):
        write_pictures(tmp_path / place, number)
    settings = {"name": "imagefolder", "root": str(tmp_path)}
    with pytest.raises(
        SourceError, match=r"'cafe\\u0301' and 'caf\\xe9' look alike and are of other characters"
    ):
        open_source(settings, split="eval")
    assert len(open_source(settings, split="train")) == 2
    write_pictures(tmp_path / f"train/{NFD}", 1)
    with pytest.raises(SourceError, match="3 classes, two of which look like one"):
        open_source(settings, split="train")


def test_marks_that_are_not_shown_make_no_class_of_their_own():
    for mark in ("\ufeff", "\u200b", "\u200e"):
        with pytest.raises(SourceError, match="2 classes, two of which look like one"):
            find_classes([f"{mark}cat", "cat"], given=None, order=None, where="here")


def test_capital_letters_may_be_classes_of_their_own():
    assert find_classes(["a", "A"], given=None, order=None, where="letters").names == ("A", "a")


def test_a_byte_order_mark_is_no_part_of_a_list_of_names_or_a_config(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n", encoding="utf-8-sig")
    (tmp_path / "names.json").write_text('["cat", "dog"]', encoding="utf-8-sig")
    for file in ("names.txt", "names.json"):
        found = find_classes([0, 1], given=str(tmp_path / file), order=None, where="here")
        assert found.names == ("cat", "dog")
    (tmp_path / "run.toml").write_text('[source]\nname = "digits"\n', encoding="utf-8-sig")
    assert load_config(tmp_path / "run.toml").source.name == "digits"


@pytest.mark.parametrize(
    ("content", "match"),
    [(b"", "the file is empty"), (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS")],
)
def test_a_file_that_is_no_picture_says_what_it_is(tmp_path, content, match):
    write_pictures(tmp_path / "train/a", 2)
    (tmp_path / "train/a/0.png").write_bytes(content)
    source = open_source(
        {"name": "imagefolder", "root": str(tmp_path), "eval_folder": "train"}, split="train"
    )
    with pytest.raises(SourceError, match=match):
        source.image(0)
