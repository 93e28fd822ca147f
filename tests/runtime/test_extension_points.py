"""What users and other packages add: entry points of every group, sources of every modality, and one clear error."""

import sys
import tomllib

import numpy as np
import pytest

from softcache.cache.codecs import CODECS, codec_from_dict
from softcache.config.load import build_config
from softcache.data import open_source
from softcache.errors import ConfigError, SourceError, SpecError
from softcache.modalities import modality_of, open_data
from tests.support.caches import ROOT
from tests.support.custom_variants import REGISTRIES, forget_modules_of
from tests.support.docs_pages import blocks

PAGE = blocks((ROOT / "docs/how-to/extend.md").read_text())
POINTS = next(
    tomllib.loads(block.text)["project"]["entry-points"]
    for block in PAGE
    if block.language == "toml" and "entry-points" in block.text
)


@pytest.fixture
def user(tmp_path, monkeypatch):
    """An empty folder of a user, which Python imports from; its modules are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    forget_modules_of(tmp_path)


@pytest.fixture
def install(user):
    """Installs a package of entry points: a table for each group."""

    def write(points):
        folder = user / "extensions-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: extensions\nVersion: 1.0\n")
        lines = [
            line
            for group, found in points.items()
            for line in (f"[{group}]", *(f"{name} = {value}" for name, value in found.items()))
        ]
        (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")

    return write


@pytest.fixture
def installed(user, install):
    """The examples of extend.md as an installed package."""
    for block in PAGE:
        if block.file is not None and block.file.endswith(".py"):
            (user / block.file).write_text(block.text)
    install(POINTS)


def test_the_page_shows_the_groups_that_there_are():
    assert set(POINTS) == set(REGISTRIES)


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group, found in POINTS.items() for name in found]
)
def test_an_entry_point_is_a_variant(installed, group, name):
    module, _, attribute = POINTS[group][name].partition(":")
    found = REGISTRIES[group].get(name)
    assert found is getattr(sys.modules[module], attribute)
    assert name in REGISTRIES[group].names()
    assert REGISTRIES[group].get(POINTS[group][name], trusted=False) is found


def test_a_config_names_the_variants_of_an_installed_package(installed):
    config = build_config(
        {
            "name": "installed",
            "source": {"name": "bars", "num_images": 16},
            "loss": {"name": "renyi", "order": 0.2},
            "labels": {"policy": "threshold", "min_prob": 0.2},
            "capture": {"codec": {"name": "steps", "step": 0.5}},
        },
        "here",
    )
    assert len(config.source.open("train")) == 16
    assert config.loss.parameters == {"order": 0.2}
    assert (config.labels.min_prob, config.capture.codec.step) == (0.2, 0.5)
    tabular = build_config({"name": "t", "source": {"modality": "tabular", "name": "wines"}}, "here")
    assert modality_of(tabular).name == "tabular"
    assert open_data(tabular).num_classes == 3
    with pytest.raises(ConfigError, match=r"labels\.num_views: measurements have one view"):
        build_config(
            {
                "name": "t",
                "source": {"modality": "tabular", "name": "wines"},
                "labels": {"policy": "top_k", "num_views": 2},
            },
            "here",
        )


def test_a_codec_of_an_installed_package_is_read_from_a_manifest(installed):
    steps = CODECS.get("steps")
    described = steps(num_classes=10, k=2, temperatures=(1.0,), step=0.5).to_dict()
    sys.modules.pop("my_codecs")
    CODECS._custom.pop("my_codecs:Steps", None)
    assert codec_from_dict(described).step == 0.5


def test_a_broken_entry_point_is_refused_where_it_is_named_and_nowhere_else(install):
    install(
        {"softcache.losses": {"broken": "no_such_package:loss"}, "softcache.modalities": {"broken": "no:No"}}
    )
    tables = {"name": "x", "source": {"name": "digits"}}
    assert build_config(tables, "here").loss.name == "forward_kl"
    with pytest.raises(ConfigError, match=r"loss\.name: loss 'no_such_package:loss': .* No module named"):
        build_config(tables | {"loss": {"name": "broken"}}, "here")
    with pytest.raises(ConfigError, match=r"source\.nmae: unknown key"):
        build_config({"name": "x", "source": {"name": "digits", "nmae": 1}}, "here")


WRONG = """
from dataclasses import dataclass

from softcache.cache.codecs import Codec, SoftLabelCodec
from softcache.labels.sparsify import LabelSettings

number = 3


def formula(log_p_PB, log_s_PB):
    return log_p_PB.sum(1)


class HalfPolicy(LabelSettings):
    def num_slots(self, num_classes):
        return 1


class HalfCodec(SoftLabelCodec):
    pass


@dataclass(frozen=True)
class NoSettings(SoftLabelCodec):
    settings = None

    def encode(self, labels):
        return {}

    @property
    def columns(self):
        return ()
"""


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"loss": {"name": "no_module:f"}},
            r"loss\.name: loss 'no_module:f': .* No module named 'no_module'",
        ),
        ({"loss": {"name": "wrong:nothing"}}, r"loss\.name: .* module 'wrong' has no attribute 'nothing'"),
        ({"loss": {"name": "wrong:formula"}}, r"loss\.name: .*LossSpec; found the function formula"),
        (
            {"loss": {"name": "without_settings:loss"}},
            r"loss\.name: .* expected a subclass of softcache.settings.Settings; found <class .dict.>",
        ),
        ({"loss": {"name": "undecorated:f"}}, r"loss\.name: .* settings of a loss: .* write @divergence\(\)"),
        (
            {"labels": {"policy": "wrong:formula"}},
            r"labels\.policy: .*LabelSettings; found the function formula",
        ),
        (
            {"labels": {"policy": "wrong:HalfPolicy"}},
            r"labels\.policy: .* a class that defines apply, as every",
        ),
        ({"capture": {"codec": "wrong:number"}}, r"capture\.codec\.name: .*Codec; found 3"),
        (
            {"capture": {"codec": "wrong:HalfCodec"}},
            r"capture\.codec\.name: .* defines columns, encode, as every codec",
        ),
        ({"capture": {"codec": "wrong:NoSettings"}}, r"capture\.codec\.name: .* its settings: .* found None"),
        ({"source": {"name": "wrong:nothing"}}, r"source\.name: .* has no attribute 'nothing'"),
        ({"source": {"name": "wrong:number"}}, r"source\.name: .* or a function called with split=; found 3"),
        (
            {"source": {"name": "digits", "modality": "wrong:number"}},
            r"source\.modality: .*Modality; found 3",
        ),
        ({"source": {"name": "digits", "modality": "no_module:M"}}, r"source\.modality: .* No module named"),
        (
            {"source": {"name": "digits", "modality": "scoreless:M"}},
            r"source\.modality: .* scoreless:M: expected kind",
        ),
    ],
)
def test_what_is_no_variant_is_refused_by_one_message(user, tables, message):
    (user / "wrong.py").write_text(WRONG)
    (user / "undecorated.py").write_text(
        "from softcache.losses import divergence\n\n\n@divergence\ndef f(log_p_PB, log_s_PB):\n    return log_p_PB\n"
    )
    (user / "without_settings.py").write_text(
        "from softcache.losses import LossSpec\n\nloss = LossSpec(lambda p, s: p, settings=dict)\n"
    )
    (user / "scoreless.py").write_text(
        'from softcache.modalities import Modality\n\n\nclass M(Modality):\n    kind = "image"\n'
    )
    with pytest.raises(ConfigError, match=message) as caught:
        build_config({"name": "x", "source": {"name": "digits"}} | tables, "here")
    assert str(caught.value).count("\n") == 1


# -- sources of the user's, in every modality --------------------------------------------------------------

SOURCES_OF_A_USER = """
from softcache.data import open_source
from softcache.data.sources.text.documents import Document, InMemoryDocuments
from softcache.data.sources.text.settings import TextSettings
from softcache.data.sources.translation.settings import Pair, TranslationSettings


def texts(split):
    return InMemoryDocuments(f"words/{split}", [Document(f"{split}/{n}", "word " * (n + 3)) for n in range(9)])


class Texts(TextSettings):
    word: str = "word"

    def documents(self, split):
        return InMemoryDocuments(split, [Document(f"{split}/{n}", f"{self.word} " * 9) for n in range(9)])


def pairs(split):
    return [Pair(f"{split}/{n}", f"the cat sees {n}", f"die Katze sieht {n}", "de") for n in range(9)]


class Pairs(TranslationSettings):
    def read(self, split):
        return split, pairs(split), True


def scenes(split):
    return open_source({"modality": "detection", "name": "scenes", "train_scenes": 9, "eval_scenes": 3}, split=split)


def twice(split):
    return InMemoryDocuments("twice", [Document("a", "one"), Document("a", "two")])


def empty(split):
    return object()


def words(split):
    return ["a", "b"]


def no_split():
    return []
"""


@pytest.fixture
def sources(user):
    (user / "sources_of_a_user.py").write_text(SOURCES_OF_A_USER)

    def open_one(modality, name, **table):
        if modality != "detection":
            table |= {"tokenizer": "bpe?vocab_size=270", "data_dir": str(user / "data")}
        table |= {"modality": modality, "name": f"sources_of_a_user:{name}"}
        return open_source(table, split="train")

    return open_one


@pytest.mark.parametrize(
    ("modality", "name", "keys"),
    [
        ("text", "texts", {"packing": "documents"}),
        ("text", "Texts", {"packing": "documents", "word": "letter"}),
        ("translation", "pairs", {}),
        ("translation", "Pairs", {}),
        ("detection", "scenes", {}),
    ],
)
def test_a_source_of_the_user_is_read(sources, modality, name, keys):
    source = sources(modality, name, **keys)
    assert len(source) == len(set(source.keys())) == 9
    part = sources(modality, name, **keys, max_train_samples=4)
    assert list(part.keys()) == list(source.keys())[:4]
    assert part.digest != source.digest
    if modality == "detection":
        assert np.array_equal(part.truth(3).boxes, source.truth(3).boxes)
        with pytest.raises(IndexError):
            part.truth(4)


@pytest.mark.parametrize(
    ("modality", "name", "error", "message"),
    [
        ("text", "twice", SourceError, "source twice: two documents have the same key"),
        ("text", "empty", SpecError, r"'sources_of_a_user:empty': .* is no Documents; missing: name, digest"),
        ("text", "no_split", SpecError, r"'sources_of_a_user:no_split': .* called with split="),
        (
            "translation",
            "words",
            SpecError,
            r"'sources_of_a_user:words': expected a list of .*Pair .* found 'a'",
        ),
        ("detection", "empty", SpecError, r"'sources_of_a_user:empty': .* is no BoxSource; missing: .*truth"),
        ("detection", "nothing", SpecError, r"'sources_of_a_user:nothing': .* has no attribute 'nothing'"),
    ],
)
def test_what_is_no_source_is_refused(sources, modality, name, error, message):
    with pytest.raises(error, match=message):
        sources(modality, name)
