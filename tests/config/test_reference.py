"""The page of config keys: every key of every table is there, with what it is."""

import tomllib
from pathlib import Path

import pytest

from softcache.config.reference import config_tables, key_description, keys_page

ROOT = Path(__file__).parents[2]


def test_every_key_is_described():
    missing = {
        f"{model.__name__}.{key}"
        for _, base, variants in config_tables()
        for model in (base, *variants)
        for key in model.model_fields
        if not key_description(model, key)
    }
    assert not missing, (
        f"give them a line below Attributes: in the docstring of their settings: {sorted(missing)}"
    )


def test_the_page_has_types_bounds_choices_and_defaults():
    lines = keys_page().splitlines()
    assert (
        "| `epochs` | integer ≥ 1 | `20` | passes over the training samples, each with one view. |" in lines
    )
    assert any(line.startswith("| `lr` | number > 0 | `0.002` |") for line in lines)
    assert any(line.startswith("| `store` | `zarr`, `parquet` | `zarr` |") for line in lines)
    assert any(
        line.startswith("| `model` | string | *required* | its spec, such as `timm:resnet50`")
        for line in lines
    )
    assert '### `policy = "top_p"`' in lines
    assert '### `modality = "image", name = "imagefolder"`' in lines


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.toml")), ids=lambda path: path.stem)
def test_the_page_has_each_key_of_the_shipped_configs(path):
    known = {
        name: {key for model in (base, *variants) for key in model.model_fields}
        for name, base, variants in config_tables()
    }

    def check(table, name):
        for key, value in table.items():
            inner = f"{name}.{key}".lstrip(".")
            assert key in known[name], inner
            if isinstance(value, dict) and inner in known:
                check(value, inner)

    check(tomllib.loads(path.read_text()), "")
