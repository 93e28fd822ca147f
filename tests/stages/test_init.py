"""`softcache init`: every template is a config, and what is given is put in its place."""

import os
import re
import tomllib

import pytest
from click.testing import CliRunner

from softcache.config.load import load_config
from softcache.data.sources.images.hugging_face import KINDS as IMAGE_KINDS
from softcache.data.sources.images.path_table import KINDS as TABLE_KINDS
from softcache.data.sources.text.hugging_face import HfDocuments
from softcache.errors import ConfigError
from softcache.stages.cli import softcache
from softcache.stages.init import FILES
from tests.support.caches import ROOT

CORES = min(8, len(os.sched_getaffinity(0)))
TEMPLATES = sorted(path.stem for path in (ROOT / "configs").glob("*.toml"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("pets", "data/pets", "data/my pets", "vit-pets"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "corpus.jsonl").touch()
    return lambda *arguments, **how: CliRunner().invoke(softcache, ["init", *arguments], **how)


def test_every_template_is_listed_in_a_short_sentence(run):
    lines = run("--list").output.splitlines()
    assert sorted(line.split()[0] for line in lines if not line.startswith("   ")) == TEMPLATES
    assert len(lines) < 2 * len(TEMPLATES), "of at most two lines of 80 columns, most of one"
    assert "Handwritten digits that ship inside scikit-learn" in " ".join(lines)


def test_commands_take_the_config_that_was_written(run, tmp_path):
    done = run("--template", "digits")
    assert done.exit_code == 0, done.output
    assert "softcache teacher-logits  " in done.output
    own, original = (
        load_config(path) for path in (tmp_path / "softcache.toml", ROOT / "configs/digits.toml")
    )
    assert own == original
    shown = CliRunner().invoke(softcache, ["teacher-logits", "--dry-run"])
    assert "dry run: runs/digits/cache" in shown.output
    assert not (tmp_path / "runs").exists()
    again = run("--template", "stdlib-lm")
    assert "nothing was written" in str(again.exception)
    assert (tmp_path / "softcache.toml").read_text().startswith("# Handwritten")


def test_images_with_a_pretrained_teacher_keep_its_preprocessing(run, tmp_path):
    spec = "timm:resnet50?pretrained=true"
    done = run("--task", "image", "--data", "data/my pets", "--teacher", spec, "--student", "timm:resnet18")
    assert done.exit_code == 0, done.output
    assert "the teacher is trained by [train_teacher]" in done.output  # its head has other classes
    tables = tomllib.loads((tmp_path / "softcache.toml").read_text())
    assert tables["source"]["root"] == "data/my pets"
    assert tables["teacher"]["model"] == spec
    assert tables["teacher"]["weights"]
    assert tables["train_teacher"]
    assert tables["student"] == {"model": "timm:resnet18"}
    assert not {"size", "mean", "std"} & tables["views"].keys()
    load_config(tmp_path / "softcache.toml")


@pytest.mark.parametrize("spec", ["hf:org/vit-pets", "timm:hf-hub:org/vit-pets", "timm:local-dir:vit-pets"])
def test_a_teacher_that_was_fine_tuned_is_not_trained_again(run, tmp_path, spec):
    done = run("--task", "image", "--data", "pets", "--teacher", spec)
    assert "is trained" not in done.output
    tables = tomllib.loads((tmp_path / "softcache.toml").read_text())
    assert tables["teacher"] == {"model": spec}
    assert "train_teacher" not in tables


def test_images_without_a_teacher_have_one_trained_first(run, tmp_path):
    done = run("--task", "image", "--data", "pets", "--out", "pets.toml")
    assert "softcache teacher-logits --config pets.toml     # the teacher is trained by" in done.output
    load_config(tmp_path / "pets.toml")


@pytest.mark.parametrize(("folders", "k"), [(3, 3), (40, 20), (0, 20)])
def test_no_more_classes_are_kept_than_the_folder_has(run, tmp_path, folders, k):
    for number in range(folders):
        (tmp_path / f"pets/train/{number}").mkdir(parents=True)
    assert run("--task", "image", "--data", "pets").exit_code == 0
    assert load_config(tmp_path / "softcache.toml").labels.k == k


def test_a_text_takes_the_tokenizer_of_its_teacher_and_comments_stay(run, tmp_path):
    given = ("--data", "corpus.jsonl", "--teacher", "hf:org/big?dtype=bfloat16", "--student", "hf:org/small")
    assert run("--task", "text", *given).exit_code == 0
    config = load_config(tmp_path / "softcache.toml")
    assert (config.source.path, config.source.tokenizer) == ("corpus.jsonl", "org/big")
    assert (config.teacher.model, config.student.model) == ("hf:org/big?dtype=bfloat16", "hf:org/small")
    text = (tmp_path / "softcache.toml").read_text()
    assert 'path = "corpus.jsonl"     # hub name' in text
    assert text.count("#") == (ROOT / "configs/hf-causal-lm.toml").read_text().count("#") + 1 - 2


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_with_a_teacher_and_a_student_is_a_config(run, tmp_path, name):
    original = load_config(ROOT / f"configs/{name}.toml")
    given = ("--teacher", original.teacher.model, "--student", original.student.model, "--out", "own.toml")
    assert run("--template", name, *given).exit_code == 0
    assert load_config(tmp_path / "own.toml").student.model == original.student.model


def test_a_terminal_is_asked(run, tmp_path, monkeypatch):
    monkeypatch.setattr("softcache.stages.init.can_ask", lambda: True)
    done = run(input="image\ndata/pets\n\ntimm:resnet18\n")
    assert done.exit_code == 0, done.output
    config = load_config(tmp_path / "softcache.toml")
    assert (config.source.root, config.student.model) == ("data/pets", "timm:resnet18")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--template", "digit"), "did you mean digits"),
        (("--template", "digits", "--data", "here"), r"--data here: the data of this template come with it"),
        (("--template", "digits", "--out", "no/such/folder.toml"), "cannot be written"),
        (
            ("--task", "image", "--data", "dogs"),
            "--data dogs: no such folder; correct it, or leave it out and set source.root in",
        ),
        (
            ("--task", "image", "--data", "corpus.jsonl"),
            "corpus.jsonl: a file, and a folder is expected; correct it",
        ),
        (("--task", "image", "--data", "s3://bucket/pets"), r"s3://bucket/pets: no such folder"),
        (
            ("--task", "text", "--data", "other.jsonl.gz"),
            "other.jsonl.gz: no such file or folder; .* set source.path in",
        ),
        (("--task", "text", "--data", "./corpus"), "./corpus: no such file or folder"),
        (("--task", "text", "--data", "my/own/corpus"), "my/own/corpus: no such file or folder"),
        (("--template", "imagenet-tar", "--data", "org/imagenet"), "org/imagenet: no such file or folder"),
        (
            ("--template", "imagenet-tar", "--data", "pets/{00..01}.tar"),
            r"\{00\.\.01\}\.tar: no such file or folder",
        ),
        (
            ("--task", "text", "--teacher", "hf:./big?dtype=bfloat16"),
            r"--teacher hf:./big\?dtype=bfloat16: no such folder: ./big",
        ),
        (
            ("--task", "text", "--student", "hf-config:/no/small"),
            "--student hf-config:/no/small: no such folder",
        ),
        (
            ("--task", "image", "--teacher", "timm:local-dir:vit"),
            "--teacher timm:local-dir:vit: no such folder: vit",
        ),
    ],
)
def test_what_cannot_be_filled_in_is_refused(run, tmp_path, arguments, message):
    done = run(*arguments)
    assert isinstance(done.exception, ConfigError)
    assert re.search(message, str(done.exception))
    assert not (tmp_path / "softcache.toml").exists()


@pytest.mark.parametrize(
    ("task", "data"),
    [
        ("text", "HuggingFaceFW/fineweb"),
        ("text", "imdb"),
        ("text", "s3://bucket/texts/*.jsonl"),
        ("text", "*.jsonl"),
        ("text", "data/{my pets,pets}"),
        ("text", "runs/own/texts/rows.jsonl"),  # that a run has yet to write
        ("image", "~/pets"),
    ],
)
def test_data_that_may_be_there_are_taken(run, tmp_path, monkeypatch, task, data):
    monkeypatch.setenv("HOME", str(tmp_path))
    done = run("--task", task, "--data", data)
    assert done.exit_code == 0, done.exception
    source = tomllib.loads((tmp_path / "softcache.toml").read_text())["source"]
    assert source.get("path", source.get("root")) == data


def test_every_kind_of_file_is_known():
    assert {*HfDocuments._KINDS, *IMAGE_KINDS, *TABLE_KINDS} <= {*FILES}


def test_without_a_terminal_something_has_to_be_given(run):
    assert run().exit_code == 2
    assert run("--task", "text", "--template", "digits").exit_code == 2


def test_keys_are_set_in_the_file_and_checked(run, tmp_path):
    given = [
        "views.size=64",
        "views.scale=[0.5, 1.0]",
        "capture.codec.name=packed",
        "name=pets",
        "loss.name=reverse_kl",
    ]
    done = run("--task", "image", "--data", "pets", *(word for each in given for word in ("--set", each)))
    assert done.exit_code == 0, done.output
    text = (tmp_path / "softcache.toml").read_text()
    assert "size = 64               # for a first try" in text
    given += ["source.root=pets", f"reader.workers={CORES}", f"capture.workers={CORES}"]
    expected = load_config(ROOT / "configs/imagefolder.toml", given)
    assert load_config(tmp_path / "softcache.toml").model_dump() == expected.model_dump()


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("train.epoch=3", "did you mean epochs"),
        ("train.epochs={", "valid integer"),
        ("foo", "expected table"),
    ],
)
def test_a_key_that_is_wrong_is_refused_and_nothing_is_written(run, tmp_path, given, error):
    done = run("--template", "digits", "--set", given)
    assert error in str(done.exception)
    assert not (tmp_path / "softcache.toml").exists()


def test_a_config_is_for_this_machine_and_shows_no_command_of_another_file(run, tmp_path):
    for name in TEMPLATES:
        run("--template", name, "--out", f"{name}.toml")
        text = (tmp_path / f"{name}.toml").read_text()
        assert f"configs/{name}.toml" not in text
        assert max(map(int, re.findall(r"^workers = (\d+)", text, re.M)), default=0) <= CORES


def test_a_folder_of_class_folders_alone_has_a_share_held_out(run, tmp_path):
    for folder in ("flat/cat", "flat/dog", "split/train/cat"):
        (tmp_path / folder).mkdir(parents=True)
    for data, expected in (("flat", 0.1), ("split", None), ("pets", None)):
        done = run("--task", "image", "--data", data, "--out", f"{data}.toml")
        assert done.exit_code == 0, done.output
        assert tomllib.loads((tmp_path / f"{data}.toml").read_text())["source"].get("eval_share") == expected
        load_config(tmp_path / f"{data}.toml")


@pytest.mark.parametrize(
    ("files", "data", "expected"),
    [
        (["saved/dataset_info.json", "saved/state.json"], "saved", {"name": "hf", "path": "saved"}),
        (
            ["both/dataset_dict.json", "both/train/state.json", "both/validation/state.json"],
            "both",
            {"name": "hf", "path": "both", "eval_split": "validation"},
        ),
        (["rows/a.parquet", "rows/b.parquet", "rows/README.md"], "rows", {"name": "parquet", "path": "rows"}),
        (["rows/a.parquet"], "rows/a.parquet", {"name": "parquet", "path": "rows/a.parquet"}),
        (["tars/a-00.tar"], "tars/a-{00..00}.tar", {"name": "webdataset", "path": "tars/a-{00..00}.tar"}),
        (["tars/a-00.tar"], "tars", {"name": "webdataset", "path": "tars"}),
        (
            ["photos/1.jpg", "photos/labels.csv"],
            "photos/labels.csv",
            {"name": "csv", "path": "photos/labels.csv"},
        ),
        (["photos/train/a/1.jpg", "photos/labels.csv"], "photos", {"name": "imagefolder", "root": "photos"}),
    ],
)
def test_images_are_read_by_what_holds_them(run, tmp_path, files, data, expected):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    done = run("--task", "image", "--data", data)
    assert done.exit_code == 0, done.exception
    assert tomllib.loads((tmp_path / "softcache.toml").read_text())["source"] == expected
    load_config(tmp_path / "softcache.toml")
