"""Vector columns: frozen caches read by softcache, from the page and by other tools; encodings; the objects that rows share."""

import json
import shutil

import numpy as np
import pytest
import torch

from softcache.cache.codecs import codec_from_dict
from softcache.cache.codecs.vectors import HeadFacts, Vector, VectorCodec
from softcache.cache.manifest import Manifest
from softcache.cache.storage.open import open_objects
from softcache.errors import CorruptionError, IdentityError, LabelError, ManifestError
from softcache.labels import ENCODINGS, VectorLabels, encode_vectors
from softcache.reader.open import open_cache
from softcache.tools.convert import convert_cache
from softcache.tools.garbage import collect_garbage
from softcache.tools.shrink import ShrinkSettings, shrink_cache
from softcache.tools.verify.checksums import verify_units
from tests.golden.make import HIDDEN, main, read_columns
from tests.support import plain_reader
from tests.support.caches import ROOT

GOLDEN = ROOT / "tests/golden/v1-hidden"


@pytest.fixture(params=list(HIDDEN))
def place(request):
    return GOLDEN / request.param


def frozen(place):
    with np.load(GOLDEN / "expected.npz") as file:
        names = [name for name in file if name.startswith(f"{place.name}/")]
        return {name.removeprefix(f"{place.name}/"): file[name] for name in names}


def test_what_was_frozen_is_read_from_the_page_and_by_softcache_to_the_same_logits(place):
    cache, rows = open_cache(place), plain_reader.read(place)
    labels = cache.read(np.arange(len(cache)))
    expected = np.concatenate([plain_reader.logits(place, rows[0, sample]) for sample in range(len(cache))])
    vectors = np.concatenate(
        [plain_reader.vectors(cache.manifest.codec, rows[0, n]) for n in range(len(cache))]
    )
    np.testing.assert_array_equal(labels.vectors(), vectors.astype(np.float32))
    found = labels.to_torch()
    np.testing.assert_array_equal(found.vectors(), vectors.astype(np.float32))
    np.testing.assert_allclose(found.head_logits(), expected, atol=1e-4)
    assert labels.vectors().shape[1] == HIDDEN[place.name].get("components", 16)


def test_other_tools_find_the_frozen_columns_and_the_manifest_is_written_again_byte_for_byte(place):
    expected, cache = frozen(place), open_cache(place)
    for name, found in read_columns(place).items():
        assert found.dtype == expected[name].dtype
        np.testing.assert_array_equal(found, expected[name], err_msg=name)
    assert list(verify_units(cache)) == []
    assert cache.manifest.to_bytes() == (place / "manifest.json").read_bytes()
    with pytest.raises(SystemExit, match="never written again"):
        main(["hidden"])


def test_a_copy_in_the_other_store_has_the_same_rows_head_and_feature(place, tmp_path):
    cache = open_cache(place)
    store = "parquet" if cache.manifest.store == "zarr" else "zarr"
    copy = convert_cache(cache, str(tmp_path / "copy"), store=store)
    back = convert_cache(copy, str(tmp_path / "back"), store=cache.manifest.store)
    assert copy.manifest.features == ("vectors",)
    assert list(verify_units(copy)) == []
    one, *others = (x.read(np.arange(len(cache))) for x in (cache, copy, back))
    for other in others:
        assert one.head == other.head
        for name in one.arrays:
            np.testing.assert_array_equal(one.arrays[name], other.arrays[name])
    if cache.manifest.store == "zarr":  # Parquet's bytes are those of a version of pyarrow
        assert [m.shards for m in back.markers.values()] == [m.shards for m in cache.markers.values()]


def test_encodings_round_to_nearest_and_are_decoded_alike_by_numpy_and_torch():
    x = torch.randn(64, 33, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 64)[:, None]
    x[5] = 0.0
    bounds = {"float32": 0.0, "bfloat16": 2.0**-8, "float8_e4m3": 2.0**-4, "int8": 1.0}
    for encoding, bound in bounds.items():
        columns = {name: y.numpy() for name, y in encode_vectors(x, encoding).items()}
        labels = VectorLabels(columns, {"hidden": encoding}, num_classes=1)
        found = labels.vectors()
        assert columns["hidden"].dtype == ENCODINGS[encoding].dtype
        np.testing.assert_array_equal(found, labels.to_torch().vectors())
        error = (torch.from_numpy(found) - x).abs()
        if encoding == "int8":
            assert bool((error <= x.abs().amax(1, keepdim=True) / 127 * 0.5001).all())
        elif encoding == "float8_e4m3":  # below its normal numbers steps are even: 2^-9 of a scale
            assert bool(
                (
                    error <= torch.maximum(x.abs() * bound, x.abs().amax(1, keepdim=True) / 448 * 2.0**-10)
                ).all()
            )
        else:
            assert bool((error <= x.abs() * bound).all())
        assert np.isfinite(found).all()


def codec(**changes):
    described = VectorCodec(5, (("hidden", Vector(3, "int8")),), HeadFacts(1.0, None)).to_dict()
    return json.loads(json.dumps(described)) | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"k": 4},
        {"temperatures": [1.0]},
        {"vectors": {}},
        {"vectors": {"hidden": {"size": 0, "values": "int8"}}},
        {"vectors": {"hidden": {"size": 3, "values": "float4"}}},
        {"vectors": {"other": {"size": 3, "values": "int8"}}},
        {"vectors": {"hidden": {"size": 3, "values": "int8"}, "hidden_scale": {"size": 3, "values": "int8"}}},
        {"vectors": {"position": {"size": 3, "values": "int8"}}, "head": None},
        {"head": {"logit_scale": 1.0, "softcap": 0.0}},
        {"head": {"logit_scale": "1", "softcap": None}},
        {"more": 1},
    ],
)
def test_a_codec_that_is_none_is_refused(changes):
    with pytest.raises(ManifestError, match="codec vectors: bad parameters"):
        codec_from_dict(codec(**changes))


def test_features_and_embeddings_are_vectors_without_a_head():
    described = codec(
        vectors={"embedding": {"size": 3, "values": "bfloat16"}, "pooled": {"size": 2, "values": "float32"}}
    )
    del described["head"]
    found = codec_from_dict(described)
    assert found.to_dict() == described
    assert [(c.name, c.dtype, c.shape) for c in found.columns] == [
        ("embedding", "uint16", (3,)),
        ("pooled", "float32", (2,)),
    ]


def test_a_manifest_names_the_feature_and_the_head():
    stored = json.loads((GOLDEN / "zarr/manifest.json").read_text())
    for change, match in (
        ({"features": []}, "features must name 'vectors'"),
        ({"objects": {}}, "objects: expected 'head', which codec vectors reads"),
        (
            {"objects": {"head": stored["objects"]["head"] | {"num_bytes": 2**40}}},
            "at most .* are read for this codec",
        ),
    ):
        with pytest.raises(ManifestError, match=match):
            Manifest.parse(json.dumps(stored | change).encode(), where="cache")


def test_damage_is_named(tmp_path):
    place = tmp_path / "cache"
    shutil.copytree(GOLDEN / "zarr", place)
    cache = open_cache(place)
    path = place / cache.manifest.objects["head"].path
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"\1")
    assert any("invariant I7" in line and "objects/head-" in line for line in verify_units(open_cache(place)))
    head = open_cache(place).read([0]).head
    with pytest.raises(CorruptionError, match=r"objects/head-.*sha256 .* expected; restore it"):
        type(head).load(head, "cpu")
    path.unlink()
    assert any("missing" in line for line in verify_units(open_cache(place)))
    labels = VectorCodec(5, (("hidden", Vector(3, "int8")),)).decode(
        {"hidden": np.full((2, 3), -128, np.int8), "hidden_scale": np.ones(2, np.float32)}
    )
    with pytest.raises(LabelError, match=r"column hidden: -128 in row 0; expected a finite number of int8"):
        VectorCodec(5, (("hidden", Vector(3, "int8")),)).encode(labels)


def test_objects_of_a_crashed_run_are_garbage_and_those_of_the_manifest_are_not(tmp_path):
    place = tmp_path / "cache"
    shutil.copytree(GOLDEN / "zarr", place)
    stray = place / f"objects/head-{'0' * 16}.safetensors"
    stray.write_bytes(b"x")
    report = collect_garbage(open_objects(str(place)), delete=True, older_than=0)
    assert list(report.stray) == [stray.relative_to(place).as_posix()]
    assert not report.foreign
    assert list(verify_units(open_cache(place))) == []


def test_parts_with_one_head_are_read_as_one_and_others_are_not(tmp_path):
    for name, origin in (("one", "zarr"), ("two", "zarr"), ("three", "zarr-coordinates")):
        shutil.copytree(GOLDEN / origin, tmp_path / name)
    parts = open_cache([str(tmp_path / "one"), str(tmp_path / "two")])
    labels = parts.read([0, len(parts) - 1])
    single = open_cache(tmp_path / "one").read([0, len(parts) // 2 - 1])
    np.testing.assert_array_equal(labels.vectors(), single.vectors())
    assert labels.head == single.head
    with pytest.raises(IdentityError, match="no part of"):
        open_cache([str(tmp_path / "one"), str(tmp_path / "three")])


def test_what_reads_classes_refuses_hidden_states_in_one_message(tmp_path):
    with pytest.raises(LabelError, match=r"of vectors \(hidden states\), for which it is not made"):
        shrink_cache(open_cache(GOLDEN / "zarr"), str(tmp_path / "out"), ShrinkSettings(k=3))
