"""docs/format/: the published schemas are those of the models, and both readers give the published vectors."""

import json
import math

import jsonschema
import numpy as np
import pytest

from softcache.cache.codecs import codec_from_dict
from softcache.cache.manifest import Manifest
from softcache.cache.schema import SCHEMAS
from softcache.errors import ManifestError
from softcache.hashing.digests import fingerprint
from softcache.labels import DEFAULT_TEMPERATURES
from softcache.reader.open import open_cache
from tests.golden.vectors import SCHEMA_FILES, VECTORS, schema_bytes
from tests.support import plain_packed, plain_reader, plain_writer
from tests.support.caches import ROOT

CACHES = sorted(path.parent for path in (ROOT / "tests/golden").glob("*/*/manifest.json"))
FOUND = json.loads(VECTORS.read_text())
MASS_ERROR = 8e-3
"""Of the interpolation that the page gives, on the default grid; what softcache refines has a ninth of it."""


def floats(values):
    return np.array(
        [-math.inf if value is None else value for value in np.ravel(np.array(values, object))], float
    )


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_the_published_schema_is_that_of_the_model(name):
    """If it differs, run python -m tests.golden.vectors."""
    assert SCHEMA_FILES[name].read_bytes() == schema_bytes(name)


@pytest.mark.parametrize("place", CACHES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_every_frozen_cache_follows_the_schemas_and_is_read_by_the_second_reader(place):
    jsonschema.validate(json.loads((place / "manifest.json").read_text()), SCHEMAS["manifest"]())
    for path in (place / "units").glob("?????.json"):
        jsonschema.validate(json.loads(path.read_text()), SCHEMAS["marker"]())
    cache, rows = open_cache(place), plain_reader.read(place)
    assert rows.keys() == {(view, sample) for view in range(cache.num_views) for sample in range(len(cache))}
    for (view, sample), row in list(rows.items())[:: max(1, len(rows) // 8)]:
        stored = cache.read_stored([sample], view)
        assert int(row["fingerprint"][0]) == int(stored.fingerprints[0])
        labels = getattr(stored.labels, "labels", stored.labels)
        for name in (
            "ids",
            "log_probs",
            "log_tail",
            "target_log_prob",
            "stats",
            "counts",
            "logits",
            "dropped_mass",
        ):
            found = getattr(labels, name, None)
            if found is not None:
                np.testing.assert_allclose(
                    found.astype(float), row[name].astype(float), rtol=3e-7, err_msg=name
                )


WRONG = {
    "codec.step": ({"codec": {"name": "packed", "step": 9.0, "tail": "fixed"}}, "values"),
    "codec.tail": ({"codec": {"name": "packed", "tail": "fixed"}}, None),
    "codec.unknown": ({"codec": {"more": 1}}, None),
    "kind": ({"kind": "words"}, None),
    "rows": ({"rows": {"num_rows": 1, "shard_rows": 1}}, None),
    "identity.source": ({"identity": {"source": {}}}, None),
    "extensions": ({"extensions": {"a b": 1}}, None),
    "unknown": ({"unknown": 1}, None),
    "samples_sha256": ({"samples_sha256": "x"}, None),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_what_the_schema_refuses_the_model_refuses(name):
    changes, removed = WRONG[name]
    manifest = json.loads((CACHES[0].parent.parent / "v1/zarr/manifest.json").read_text())
    for key, value in changes.items():
        is_table = isinstance(value, dict) and key in ("codec", "identity")
        manifest[key] = manifest[key] | value if is_table else value
    manifest["codec"].pop(removed, None)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, SCHEMAS["manifest"]())
    with pytest.raises(ManifestError):
        Manifest.parse(json.dumps(manifest).encode(), where="cache")


def test_fingerprints():
    for vector in FOUND["fingerprints"]:
        content = np.array(vector["values"], vector["dtype"]).reshape(vector["shape"])
        for function in (fingerprint, plain_writer.fingerprint):
            assert function(vector["key"], vector["view"], content) == int(vector["fingerprint"])


def test_packed_records():
    for vector in FOUND["packed"]:
        record, codec = bytes.fromhex(vector["record"]), codec_from_dict(vector["codec"])
        labels = codec.decode({"record": np.frombuffer(record, np.uint8)[None].copy()})
        plain = plain_packed.decode(vector["codec"], record)
        assert plain.keys() == vector["decoded"].keys()
        for name, values in vector["decoded"].items():
            expected = floats(values)
            np.testing.assert_array_equal(floats(np.array(plain[name])), expected, err_msg=name)
            np.testing.assert_allclose(
                getattr(labels, name)[0].ravel().astype(float), expected, rtol=2e-7, err_msg=name
            )


def test_tails_between_the_temperatures_of_the_grid():
    """The second reader gives the vectors; softcache, which refines them, the same mass within the error of the page."""
    for vector in FOUND["tails"]:
        codec, row = vector["codec"], {name: floats(values) for name, values in vector["row"].items()}
        arrays = {
            name: values[None].astype("float32" if name != "ids" else "int64") for name, values in row.items()
        }
        labels = codec_from_dict(codec).decode(arrays | {"target_log_prob": np.zeros(1, np.float32)})
        for temperature, expected in vector["log_tail_at"]:
            found = plain_reader.tail_at(codec, row, temperature)
            kept = np.logaddexp.reduce(row["log_probs"] / temperature)
            if expected is None:
                assert found == -math.inf
                assert labels.at_temperature(temperature).log_tail[0] == -math.inf
                continue
            assert found == pytest.approx(expected, rel=1e-12)
            if len(codec["temperatures"]) < len(DEFAULT_TEMPERATURES):
                continue  # what two nodes or four leave open is more
            mass = math.exp(expected - np.logaddexp(expected, kept))
            assert math.exp(labels.at_temperature(temperature).log_tail[0]) == pytest.approx(
                mass, abs=MASS_ERROR
            )
