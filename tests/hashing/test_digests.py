"""Digests and fingerprints: what changes them, what does not, and the documented bytes behind them."""

import hashlib
import json
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from softcache.hashing.digests import digest_bytes, digest_json, digest_source, digest_weights, fingerprint

PIXELS = np.arange(12, dtype=np.uint8).reshape(1, 3, 4)


def fingerprint_by_the_book(key, view, content):
    """The layout of the module's docstring, written out byte by byte."""
    name, kind = key.encode("utf-8"), content.dtype.name.encode()
    data = len(name).to_bytes(4, "little") + name + view.to_bytes(4, "little")
    data += len(kind).to_bytes(4, "little") + kind + content.ndim.to_bytes(4, "little")
    for axis in content.shape:
        data += axis.to_bytes(8, "little")
    for value in content.flatten(order="C").tolist():
        data += struct.pack(
            {"uint8": "<B", "uint16": "<H", "int64": "<q", "float32": "<f"}[content.dtype.name], value
        )
    return xxhash.xxh3_64_intdigest(data)


@pytest.mark.parametrize(
    "content",
    [
        PIXELS,
        PIXELS.transpose(2, 0, 1),
        PIXELS[:, ::2, ::-1],
        np.arange(5, dtype=np.int64),
        np.arange(5, dtype=">u2"),
        np.array(1.5, np.float32),
        np.zeros((0, 3), np.uint8),
    ],
    ids=["plain", "transposed", "strided", "int64", "big-endian", "scalar", "empty"],
)
def test_fingerprint_is_the_documented_layout(content):
    assert fingerprint("digits/0017 é", 3, content) == fingerprint_by_the_book("digits/0017 é", 3, content)


def test_fingerprint_never_changes_between_versions():
    assert fingerprint("digits/0017", 3, PIXELS) == 10711682660797407426
    assert fingerprint("", 0, np.zeros((0,), np.uint8)) == 5855442163992731811


def test_fingerprint_changes_with_every_part():
    flipped = PIXELS.copy()
    flipped[0, 2, 3] ^= 1
    others = [
        fingerprint("a", 1, flipped),
        fingerprint("b", 1, PIXELS),
        fingerprint("a", 2, PIXELS),
        fingerprint("a", 1, PIXELS.reshape(3, 1, 4)),
        fingerprint("a", 1, PIXELS.reshape(12)),
        fingerprint("a", 1, PIXELS.view(np.int8)),
        fingerprint("a", 1, PIXELS.transpose(0, 2, 1)),
    ]
    assert len({fingerprint("a", 1, PIXELS), *others}) == len(others) + 1


@given(
    st.lists(
        st.tuples(st.text(alphabet="ab\0", max_size=3), st.integers(0, 2), st.binary(max_size=3)),
        min_size=2,
        max_size=2,
        unique=True,
    )
)
def test_no_two_inputs_are_framed_alike(pair):
    prints = [fingerprint(key, view, np.frombuffer(data, np.uint8)) for key, view, data in pair]
    assert prints[0] != prints[1]


def test_digest_bytes_and_json_are_sha256_of_canonical_text():
    assert digest_bytes(b"abc") == hashlib.sha256(b"abc").hexdigest()
    assert digest_json({"b": [1, 2.5], "a": None}) == hashlib.sha256(b'{"a":null,"b":[1,2.5]}').hexdigest()
    assert digest_json({"b": 1, "a": 2}) == digest_json(json.loads('{"a": 2, "b": 1}'))
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest_json(float("nan"))


def test_digest_source_depends_on_order_keys_targets_and_extra():
    base = digest_source(["a", "b"], [0, 1], {"x": 1})
    assert base == digest_source(("a", "b"), np.array([0, 1], np.int32), {"x": 1})
    others = [
        digest_source(["b", "a"], [0, 1], {"x": 1}),
        digest_source(["a", "b"], [1, 0], {"x": 1}),
        digest_source(["a", "b"], None, {"x": 1}),
        digest_source(["a", "b"], [0, 1], {"x": 2}),
        digest_source(["a,b"], [0], {"x": 1}),
        digest_source(["ab", ""], [0, 1], {"x": 1}),
    ]
    assert len({base, *others}) == len(others) + 1


def test_digest_weights_ignores_order_and_layout_and_sees_every_bit():
    weight = torch.arange(24.0).reshape(1, 2, 3, 4)
    state = {
        "b": torch.tensor(3),
        "a": weight,
        "half": torch.ones(2, dtype=torch.bfloat16),
        "none": torch.zeros(0, 2),
    }
    base = digest_weights(state)
    shuffled = {name: state[name] for name in ("none", "a", "half", "b")}
    assert base == digest_weights(
        shuffled | {"a": weight.to(memory_format=torch.channels_last).requires_grad_()}
    )
    nudged = weight.clone()
    nudged[0, 1, 2, 3] = torch.nextafter(nudged[0, 1, 2, 3], torch.tensor(99.0))
    others = [
        digest_weights(state | {"a": nudged}),
        digest_weights(state | {"a": weight.reshape(2, 3, 4)}),
        digest_weights(state | {"a": weight.view(torch.int32)}),
        digest_weights(state | {"c": weight}),
        digest_weights({name: state[name] for name in ("a", "b", "half")}),
    ]
    assert len({base, *others}) == len(others) + 1


def test_digest_weights_survives_safetensors(tmp_path):
    from safetensors.torch import load_file, save_file

    state = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    assert digest_weights(load_file(tmp_path / "model.safetensors")) == digest_weights(state)


def test_importing_it_does_not_import_torch():
    code = "import sys, softcache.hashing.digests; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
