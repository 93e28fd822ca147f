"""One TOML file per run: what is read, what is refused, and by which name."""

import pytest
from pydantic import ValidationError

from softcache.config.load import build_config, load_config
from softcache.config.run import RunConfig
from softcache.errors import ConfigError
from tests.support.caches import ROOT

SMALL = """
[source]
name = "digits"

[teacher]
model = "cnn"

[train]
epochs = 3
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def written(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


# -- what is read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_the_configs_of_the_repository_are_valid(path):
    config = load_config(path)
    assert config.name == path.stem
    kind = {
        "-lm": "text",
        "hidden-states": "text",
        "on-policy": "text",
        "-detection": "detection",
        "-segmentation": "segmentation",
        "translation": "translation",
    }
    assert config.source.modality == next((kind[end] for end in kind if path.stem.endswith(end)), "image")
    pretrained = ("clip-zero-shot", "coco-detection", "hf-causal-lm", "imagenet-tar", "on-policy")
    if path.stem not in pretrained:
        assert config.teacher.weights == f"runs/{path.stem}/teacher/model.safetensors"
        assert config.train_teacher is not None


def test_the_digits_config_says_what_its_file_says():
    config = load_config(ROOT / "configs/digits.toml")
    assert (config.labels.k, config.labels.num_views) == (5, 8)
    assert config.views.mean == (0.305,)
    assert config.student.models == ("linear", "mlp?width=64", "cnn?width=8", "timm:test_efficientnet")
    assert config.loss.temperature == 4.0
    assert isinstance(config.loss.temperature, float)
    assert config.train.lr == 5e-3
    assert config.train_teacher.epochs == 30


def test_tables_that_are_left_out_have_their_defaults(small):
    config = load_config(small)
    assert config.name == "small"
    assert config.cache_url == "runs/small/cache"
    assert config.train.epochs == 3
    assert config.train.batch_size == 128
    assert config.labels.policy == "top_k"
    assert config.train_teacher is None


def test_a_name_of_its_own_names_the_folder(small):
    assert load_config(small, ["name=other"]).cache_url == "runs/other/cache"


def test_a_config_is_frozen(small):
    config = load_config(small)
    with pytest.raises(ValidationError, match="frozen"):
        config.name = "other"
    with pytest.raises(ValidationError, match="frozen"):
        config.train.epochs = 4
    assert config.train.epochs == 3


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train.epoch = 4", r"train\.epoch: unknown key; did you mean epochs\?"),
        (
            "loss.temprature = 2",
            r"loss\.temprature: unknown key with name = 'forward_kl'; did you mean temperature ",
        ),
        ("teacher.weight = 'x'", r"teacher\.weight: unknown key; did you mean weights\?"),
        ("train_teacher.epochz = 3", r"train_teacher\.epochz: unknown key; did you mean epochs\?"),
        (
            "loss.zzz = 2",
            r"loss\.zzz: unknown key with name = 'forward_kl'; known keys: name, temperature, alpha, tail",
        ),
        ("trian.epochs = 3", r"trian: unknown key; did you mean train\?"),
        ("train.epochs = '4'", r"train\.epochs: input should be a valid integer; found '4'"),
        ("train.epochs = 4.0", r"train\.epochs: input should be a valid integer; found 4\.0"),
        ("train.epochs = true", r"train\.epochs: input should be a valid integer; found True"),
        ("train.lr = '1e-3'", r"train\.lr: input should be a valid number; found '1e-3'"),
        ("reader.verify = 1", r"reader\.verify: input should be a valid boolean; found 1"),
        ("source.name = 3", r"source\.name: input should be a valid string; found 3"),
        ("train = 3", r"train: input should be a valid dictionary.*; found 3"),
        ("train.epochs = 0", r"train\.epochs: input should be greater than or equal to 1; found 0"),
        ("loss.alpha = 1.5", r"loss\.alpha: input should be less than or equal to 1; found 1\.5"),
        ("loss.temperature = nan", r"loss\.temperature: input should be .*; found nan"),
        ("train.lr = inf", r"train\.lr: input should be a finite number; found inf"),
        (
            "train.labels = 'soft'",
            r"train\.labels: input should be 'cache', 'ground_truth' or 'online'; found 'soft'",
        ),
        ("labels.temperatures = [2.0, 1.0]", r"labels\.temperatures: .*found \[2\.0, 1\.0\]"),
        ("name = 'a/b'", r"name: string should match pattern .*; found 'a/b'"),
        ("name = '../up'", r"name: string should match pattern .*; found '\.\./up'"),
    ],
)
def test_a_wrong_key_is_named_with_what_is_allowed(tmp_path, line, message):
    given = "teacher.model = 'cnn'\n" + "source.name = 'digits'\n" * (not line.startswith("source"))
    with pytest.raises(ConfigError, match=message):
        load_config(written(tmp_path, given + line))


@pytest.mark.parametrize(
    "table", ["loss", "labels", "source", "views", "capture", "student", "train", "teacher", "reader"]
)
def test_a_value_in_the_place_of_a_table_is_named(small, table):
    tables = load_config(small).model_dump(exclude_unset=True, mode="json")
    for value in (0.5, "text", [1]):
        with pytest.raises(ConfigError, match=table):
            build_config(tables | {table: value}, "here")


def test_every_wrong_key_is_named_at_once(tmp_path):
    path = written(tmp_path, "source.name = 'digits'\ntrain.epochs = 0\nloss.alpha = 2\nlables.k = 3")
    with pytest.raises(ConfigError, match=r"run\.toml:") as error:
        load_config(path)
    for key in ("train.epochs", "loss.alpha", "lables"):
        assert f"\n  {key}: " in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nepochs = 3", "source: missing; it has no default"),
        ("[source]\n[teacher]\nmodel = 'cnn'", r"source\.name: missing; it has no default"),
        ("source.name = 'digits'\n[teacher]", r"teacher\.model: missing; it has no default"),
    ],
)
def test_what_has_no_default_is_missed(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(written(tmp_path, text))


def test_a_file_that_is_no_toml_says_where(tmp_path):
    with pytest.raises(ConfigError, match=r"run\.toml: not valid TOML: .*line 2"):
        load_config(written(tmp_path, "[source]\nname = digits\n"))


def test_a_binary_file_is_no_toml(tmp_path):
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"run\.toml: not valid TOML"):
        load_config(tmp_path / "run.toml")


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"none\.toml: cannot be read: No such file or directory; `softcache init` writes one",
    ):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


# -- --set -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.epochs=7", 7),
        ("train.lr=0.5", 0.5),
        ("train.lr=1e-3", 1e-3),
        ("loss.temperature=2", 2.0),
        ("reader.verify=false", False),
        ("student.model=cnn?width=8", "cnn?width=8"),
        ("student.model=timm:test_vit?img_size=8&patch_size=2", "timm:test_vit?img_size=8&patch_size=2"),
        ('student.model="linear"', "linear"),
        ('student.models=["linear", "cnn"]', ("linear", "cnn")),
        ("labels.temperatures=[1.0, 3.0]", (1.0, 3.0)),
        ("train_teacher.epochs=2", 2),
        ("teacher.weights=/data/a=b", "/data/a=b"),
    ],
)
def test_an_override_is_read_as_toml_or_else_as_text(small, override, value):
    found = load_config(small, [override])
    for part in override.partition("=")[0].split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_the_last_override_wins_and_the_rest_of_the_table_stays(small):
    config = load_config(small, ["train.lr=0.1", "train.lr=0.2"])
    assert (config.train.lr, config.train.epochs) == (0.2, 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", r"train\.epoch: unknown key; did you mean epochs\?"),
        ("loss.alpha=2", r"loss\.alpha: .* less than or equal to 1; found 2"),
        ("train.epochs=many", r"train\.epochs: input should be a valid integer; found 'many'"),
        ("train.epochs=", r"train\.epochs: input should be a valid integer; found ''"),
        ("teacher.model.width=3", r"--set 'teacher\.model\.width=3': 'model' is a value, not a table"),
        ("train.epochs", r"--set 'train\.epochs': expected table\.key=value"),
        ("=3", r"--set '=3': expected table\.key=value"),
        ("train..epochs=3", r"--set 'train\.\.epochs=3': expected table\.key=value"),
        ("train=3", "train: input should be a valid dictionary"),
    ],
)
def test_a_wrong_override_is_named(small, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(small, [override])


def test_drawn_labels_need_a_loss_that_they_estimate(tmp_path):
    """At once, not at the first batch after the teacher has run."""
    table = {
        "name": "x",
        "source": {"name": "digits"},
        "student": {"model": "linear"},
        "labels": {"policy": "sample", "num_samples": 5},
    }
    assert RunConfig.model_validate(table).labels.num_samples == 5
    with pytest.raises(ValueError, match="reverse_kl cannot be estimated from classes drawn at random"):
        RunConfig.model_validate({**table, "loss": {"name": "reverse_kl"}})


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("source.part=5", "source.part: 5; expected 0 to 1 (source.num_parts)"),
        ("views.mean=[128.0]", "views: mean [128.0] and std "),
    ],
)
def test_a_message_of_several_keys_names_them_once_without_the_table(tmp_path, override, line):
    source = 'modality = "text"\nname = "parts"\nnum_parts = 2\ntokenizer = "t"\n[source.each]\nname = "hf"\npath = "{part}"'
    if override.startswith("views"):
        source = 'name = "digits"\n[views]\nstd = [0.5]'
    (tmp_path / "run.toml").write_text(f"[source]\n{source}\n")
    with pytest.raises(ConfigError) as raised:
        load_config(tmp_path / "run.toml", [override])
    assert str(raised.value).splitlines()[1].startswith(f"  {line}")
    assert "{'" not in str(raised.value)
