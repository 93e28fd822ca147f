"""Compiled XXH3 and Philox are those of the libraries, at every length; batched fingerprints are the single ones."""

import numpy as np
import pytest
import xxhash

from softcache.hashing import batched as hashes
from softcache.hashing.digests import fingerprint, fingerprints

GENERATOR = np.random.default_rng(0)


def test_names_of_every_length_hash_as_xxhash_has_it():
    names = ["", *("".join(chr(c) for c in GENERATOR.integers(1, 128, n)) for n in range(1, 300))]
    expected = [xxhash.xxh3_64_intdigest(name.encode()) for name in names]
    assert hashes.hashes(names).tolist() == expected
    assert hashes.hashes(names[: hashes.LONGEST + 1]).tolist() == expected[: hashes.LONGEST + 1]
    assert hashes.hashes([]).tolist() == []


def test_names_that_are_not_ascii_are_hashed_as_utf8():
    names = ["é", "日本語" * 20, "a", "🙂x", ""]
    assert hashes.hashes(names).tolist() == [xxhash.xxh3_64_intdigest(name.encode()) for name in names]


@pytest.mark.parametrize("keys", [["a", "", "digits/0017", "ü" * 9], ["x" * 400, "y"]], ids=["short", "long"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 5), (), (7,), (0, 3), (1, 28, 28)])
@pytest.mark.parametrize("dtype", ["u1", ">u2", "<i8", "f4"])
def test_fingerprints_of_a_batch_are_those_of_its_samples(keys, shape, dtype):
    contents = GENERATOR.integers(0, 200, (len(keys), *shape)).astype(dtype)
    expected = [fingerprint(key, 3, content) for key, content in zip(keys, contents, strict=True)]
    assert fingerprints(keys, 3, contents).tolist() == expected


def test_fingerprints_at_every_length_of_content():
    for size in range(260):
        contents = GENERATOR.integers(0, 256, (2, size)).astype(np.uint8)
        expected = [fingerprint(key, 2**32 - 1, x) for key, x in zip(("ab", "c"), contents, strict=True)]
        assert fingerprints(["ab", "c"], 2**32 - 1, contents).tolist() == expected, size


def test_fingerprints_of_strided_contents_and_of_none():
    contents = GENERATOR.integers(0, 256, (6, 4, 5, 3)).astype(np.uint8).transpose(0, 3, 1, 2)[::2, :, ::-1]
    expected = [fingerprint(key, 0, x) for key, x in zip("abc", contents, strict=True)]
    assert fingerprints(list("abc"), 0, contents).tolist() == expected
    assert fingerprints([], 0, contents[:0]).tolist() == []


@pytest.mark.parametrize(("seed", "view"), [(0, 1), (2**64 - 1, 2**32 - 1), (5, 7)])
def test_uniforms_are_philox_as_numpy_has_it(seed, view):
    keys = np.array([0, 1, 2**64 - 1, 12345678901234567890], np.uint64)
    found = hashes.uniforms(seed, keys, view, 64)
    for row, key in enumerate(keys):
        philox = np.random.Philox(
            key=np.array([seed, key], np.uint64), counter=np.array([0, view, 0, 0], np.uint64)
        )
        assert (found[row] == (philox.random_raw(64) >> np.uint64(11)) * 2.0**-53).all()
    assert (hashes.uniforms(seed, keys, view, 8) == found[:, :8]).all()
