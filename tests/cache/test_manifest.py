"""Manifests and plans are untrusted input: every field checked, every path inside."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from softcache.cache.manifest import Manifest, Plan, diff_manifests
from softcache.errors import ManifestError
from tests.contracts.test_stores import manifest_of


def edited(**changes):
    """The JSON of a manifest with dotted keys changed; `...` removes one."""
    document = json.loads(manifest_of("zarr").to_bytes())
    for dotted, value in changes.items():
        *parents, key = dotted.split("__")
        table = document
        for parent in parents:
            table = table[parent]
        if value is ...:
            del table[key]
        else:
            table[key] = value
    return json.dumps(document).encode()


def test_it_is_read_as_it_was_written():
    manifest = manifest_of("parquet")
    assert Manifest.parse(manifest.to_bytes(), where="here") == manifest
    assert Manifest.parse(manifest.to_bytes(), where="here").to_bytes() == manifest.to_bytes()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"data": "../elsewhere"}, "data"),
        ({"data": "/etc"}, "data"),
        ({"data": "a/../../b"}, "data"),
        ({"data": "a b\n"}, "data"),
        ({"samples": "x/../../samples.parquet"}, "samples"),
        ({"samples_sha256": "abc"}, "samples_sha256"),
        ({"plan__num_samples": 0}, "num_samples"),
        ({"plan__num_samples": 2**60}, "num_samples"),
        ({"plan__num_samples": True}, "num_samples"),
        ({"plan__unit_samples": 12}, "plan"),
        ({"plan__num_views": -1}, "num_views"),
        ({"plan__num_samples": 2**40, "plan__unit_samples": 8, "plan__chunk_samples": 8}, "plan"),
        ({"num_classes": 13}, "num_classes"),
        ({"num_classes": "12"}, "num_classes"),
        ({"codec__name": "packed"}, "codec"),
        ({"codec__k": 99}, "codec"),
        ({"store": "hdf5"}, "store"),
        ({"kind": "audio"}, "kind"),
        ({"identity__teacher": {}}, "identity.teacher"),
        ({"identity": ...}, "identity"),
        ({"surprise": 1}, "surprise"),
        ({"format_version": 2}, "format_version 2"),
        ({"format_version": "1"}, "format_version"),
    ],
)
def test_a_wrong_field_is_refused_by_name(changes, field):
    with pytest.raises(ManifestError, match=field):
        Manifest.parse(edited(**changes), where="cache x")


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"format_version": NaN}']
)
def test_no_manifest_at_all(data):
    with pytest.raises(ManifestError, match="cache x"):
        Manifest.parse(data, where="cache x")


def test_a_manifest_of_a_bucket_that_was_cut_short_may_be_an_answer_that_was():
    data = manifest_of("zarr").to_bytes()[:100]
    with pytest.raises(
        ManifestError, match=r"not JSON: .*; read it again, in case .* cut short, or restore it from a copy"
    ):
        Manifest.parse(data, where="cache s3://bucket/cache")
    with pytest.raises(ManifestError, match=r"not JSON: [^;]*; restore it from a copy"):
        Manifest.parse(data, where="cache /data/cache")


def test_differences_name_the_fields():
    one, other = manifest_of("zarr"), manifest_of("zarr", k=2, num_views=5)
    lines = "\n".join(diff_manifests(one, other))
    assert "identity.labels.k: 3; 2" in lines
    assert "plan.num_views: 2; 5" in lines
    assert not diff_manifests(one, one)


@given(st.integers(1, 500), st.integers(1, 4), st.integers(1, 12), st.integers(1, 12))
def test_units_cover_every_sample_of_every_view_once(num_samples, num_views, chunks, chunk_samples):
    plan = Plan(
        num_samples=num_samples,
        num_views=num_views,
        unit_samples=chunks * chunk_samples,
        chunk_samples=chunk_samples,
    )
    rows = [(unit.view, sample) for unit in plan.units() for sample in range(unit.start, unit.stop)]
    assert rows == [(view, sample) for view in range(num_views) for sample in range(num_samples)]
    for view, sample in rows[:: max(1, len(rows) // 20)]:
        unit = plan.locate(view, sample)
        assert unit.view == view
        assert unit.start <= sample < unit.stop
    with pytest.raises(IndexError):
        plan.unit(plan.num_units)


def test_a_plan_is_frozen():
    with pytest.raises(ValidationError):
        manifest_of("zarr").plan.num_samples = 5
