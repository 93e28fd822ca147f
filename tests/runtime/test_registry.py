"""One registry for all kinds of variants: by name, by path, by entry point; settings of the chosen one."""

from typing import Annotated

import pytest
from pydantic import SerializeAsAny, ValidationError

from softcache.errors import LabelError, SpecError
from softcache.runtime.registry import Registry, variant
from softcache.settings import Settings


class Base(Settings):
    name: str = "small"


class Small(Base):
    width: int = 1


class Large(Base):
    depth: int = 2


def registry(**options):
    made = Registry("model size", package="tests.runtime", group="softcache.sizes", **options)
    made._is_loaded = True  # nothing of a package to import
    made.register("small")(Small)
    made.register("large")(Large)
    return made


def test_a_variant_is_found_by_its_name():
    assert registry().get("large") is Large
    assert registry().names() == ["large", "small"]
    assert "small" in registry()
    assert "tiny" not in registry()


def test_a_variant_of_the_user_is_found_by_its_path():
    assert registry().get("softcache.settings:Settings") is Settings


def test_an_entry_point_of_another_package_is_a_variant(monkeypatch, tmp_path):
    folder = tmp_path / "sizes-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: sizes\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[softcache.sizes]\nhuge = softcache.settings:Settings\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert registry().get("huge") is Settings
    assert "huge" in registry().names()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smal", "model size 'smal': unknown; did you mean small"),
        ("zzz", "known: large, small"),
        ("no_such_module:Name", "can be imported; found No module named 'no_such_module'"),
        ("softcache.settings:Nothing", "found module 'softcache.settings' has no attribute 'Nothing'"),
    ],
)
def test_an_unknown_name_is_refused(name, message):
    with pytest.raises(SpecError, match=message):
        registry().get(name)


def test_the_error_is_the_one_of_the_registry():
    with pytest.raises(LabelError, match="unknown"):
        registry(error=LabelError).get("zzz")


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="model size 'small' is registered twice"):
        registry().register("small")(Large)


def test_the_modules_of_a_package_register_themselves_at_the_first_lookup():
    made = Registry("codec", package="softcache.runtime", group="softcache.none")
    assert "small" not in made
    assert made._is_loaded


def test_a_package_that_fails_to_import_fails_at_every_lookup(monkeypatch, tmp_path):
    (tmp_path / "broken_sizes").mkdir()
    (tmp_path / "broken_sizes" / "__init__.py").touch()
    (tmp_path / "broken_sizes" / "huge.py").write_text("raise ImportError('no such extra')")
    monkeypatch.syspath_prepend(tmp_path)
    made = Registry("model size", package="broken_sizes", group="softcache.none")
    for _ in range(2):
        with pytest.raises(ImportError, match="no such extra"):
            made.get("huge")


class Config(Settings):
    size: Annotated[
        SerializeAsAny[Base], variant(registry(), lambda chosen: chosen, key="name", default="small")
    ] = Small()


def test_a_table_is_read_by_the_settings_of_its_variant():
    assert Config.model_validate({"size": {"name": "large", "depth": 3}}).size == Large(name="large", depth=3)
    assert Config.model_validate({"size": {"width": 4}}).size == Small(width=4)
    assert Config(size=Large(name="large")).model_dump() == {"size": {"name": "large", "depth": 2}}


def test_a_key_that_the_variant_does_not_read_is_refused_by_its_place():
    with pytest.raises(ValidationError) as caught:
        Config.model_validate({"size": {"name": "large", "width": 4}})
    assert [(error["loc"], error["type"]) for error in caught.value.errors()] == [
        (("size", "width"), "variant")
    ]


def test_an_unknown_variant_is_refused_by_the_key_that_names_it():
    with pytest.raises(ValidationError, match=r"size\.name\s+model size 'lrge': unknown; did you mean large"):
        Config.model_validate({"size": {"name": "lrge"}})
