"""The registry of codecs: a custom codec works by its path, and a manifest imports no module."""

import subprocess
import sys

import numpy as np
import pytest

from softcache.cache.codecs import CODECS, codec_from_dict
from softcache.errors import ManifestError
from softcache.reader.open import open_cache
from softcache.tools.verify.checksums import verify_units
from tests.support.caches import ROOT, digits_config, make_cache
from tests.support.extend_page import write_example


def test_the_built_in_codecs_are_registered():
    assert {name: codec.name for name, codec in CODECS.items()} == {
        name: name for name in ("open", "packed", "cells", "bernoulli", "vectors")
    }


@pytest.mark.parametrize(
    ("codec", "key"), [("open", "step"), ("open", "tail"), ("packed", "values"), ("cells", "step")]
)
def test_a_key_that_the_codec_does_not_read_is_refused_by_its_dotted_name(codec, key):
    with pytest.raises(ValueError, match=rf"capture\.codec\.{key}\n *unknown key with name = '{codec}'"):
        digits_config(capture={"codec": {"name": codec, key: 1}})


@pytest.mark.parametrize("store", ["zarr", "parquet"])
def test_a_custom_codec_by_its_path(tmp_path, monkeypatch, store):
    tables = write_example("A codec", tmp_path / "my_codecs.py")
    monkeypatch.syspath_prepend(tmp_path)
    capture = {**tables["capture"], "store": store}
    _, _, cache = make_cache(tmp_path / "cache", capture=capture)
    plain = make_cache(tmp_path / "plain", capture={"codec": {"values": "float32"}, "store": store})[2]
    described = cache.manifest.codec
    assert (described["name"], described["step"]) == ("my_codecs:Steps", 0.02)
    assert list(verify_units(cache)) == []
    labels, expected = cache.read(range(50), 1), plain.read(range(50), 1)
    assert np.array_equal(labels.ids, expected.ids)
    assert np.abs(labels.log_probs - expected.log_probs).max() <= 0.0101
    code = f"from softcache.reader.open import open_cache; open_cache({str(tmp_path / 'cache')!r})"
    for first, returncode in (("", 1), ("import my_codecs; ", 0)):
        path = {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", first + code], cwd=ROOT, env=path, capture_output=True, text=True
        )
        assert done.returncode == returncode, done.stderr
        assert bool(first) or "import my_codecs first" in done.stderr
    assert open_cache(str(tmp_path / "cache")).manifest.build_codec() == codec_from_dict(described)


@pytest.mark.parametrize("name", ["intruder:Codec", "intruder:Codec.name", "os:system", "intruder"])
def test_a_manifest_imports_no_module(tmp_path, monkeypatch, name):
    (tmp_path / "intruder.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ManifestError, match=r"codec.name '.*': unknown"):
        codec_from_dict({"name": name, "num_classes": 3, "k": 1, "temperatures": [1.0]})
    assert "intruder" not in sys.modules
