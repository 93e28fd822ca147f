"""Windows in batch order against samples read chunk by chunk: the same bytes, each row handed out once, no damage passes.

The frozen caches have every codec, both stores, rows of one and of several to a sample.
"""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from softcache.cache.arrays import zarr_chunks
from softcache.cache.codecs import PackedCodec
from softcache.cache.codecs.column import RowPlaces
from softcache.errors import CorruptionError, LabelError
from softcache.reader.cache import Cache
from softcache.reader.open import open_cache
from softcache.reader.order import BlockShuffle
from softcache.reader.windows import DecodedWindows, _WithdrawnError
from tests.support.caches import ROOT

GOLDEN = ROOT / "tests" / "golden"
FROZEN = sorted(path.parent.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("manifest.json"))


def order_of(cache, **changes):
    """Samples of three windows in batches that do not end with them."""
    samples = cache.samples_in(0)
    block = max(len(cache) // 3, 1)
    options = {"batch_size": max(block - 1, 1), "view_of": lambda epoch: 0, "block_samples": block}
    return BlockShuffle(lambda view: samples, **options | {"window_blocks": 1, "seed": 1} | changes)


def walk(cache, order):
    """Yields (samples, what is read of them), windows announced as the loader does."""
    previous = -1
    for step, request in enumerate(order):
        if (window := order.window_of(step)) != previous:
            cache.prefetch([(one.view, one.samples) for one in order.windows(window, 2)])
            previous = window
        yield request.samples, cache.read_stored(request.samples, request.view)


def content(batch):
    found = batch.labels.arrays
    arrays = {**(found() if callable(found) else found), "prints": batch.fingerprints, "counts": batch.counts}
    if batch.positions is not None:
        arrays["positions"] = batch.positions
    return {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in arrays.items()}


def first_shard(url, column="log_tail"):
    return sorted(path for path in Path(url).glob(f"labels.zarr/{column}/c/**/*") if path.is_file())[0]


@pytest.fixture
def copied(tmp_path, shared_cache):
    """A copy of a cache that a test may damage."""
    return shutil.copytree(shared_cache[2].url, tmp_path / "copy")


@pytest.mark.parametrize("name", FROZEN)
def test_a_window_holds_what_is_read_chunk_by_chunk(name, monkeypatch):
    cache, reference = open_cache(str(GOLDEN / name)), open_cache(str(GOLDEN / name))
    with monkeypatch.context() as patch:
        if cache.manifest.store == "zarr":
            patch.setattr(cache, "_decode_block", None)  # nothing is left to the slow path
        found = list(walk(cache, order_of(cache)))
    cache.close()
    for samples, batch in found:
        assert content(batch) == content(reference.read_stored(samples))
    assert sorted(np.concatenate([samples for samples, _ in found])) == cache.samples_in(0).tolist()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_decodes_its_own_samples(shared_cache, rank, monkeypatch):
    cache = open_cache(shared_cache[2].url)
    order = order_of(cache, rank=rank, num_ranks=2, batch_size=32, block_samples=32, window_blocks=3)
    windows = [sample for number in range(4) for sample in order.windows(number, 1)[0].samples]
    assert windows == [sample for request in order for sample in request.samples]
    monkeypatch.setattr(cache, "_decode_block", None)
    for samples, batch in walk(cache, order):
        assert content(batch) == content(shared_cache[2].read_stored(samples))
    cache.close()


def test_a_row_is_handed_out_once_and_read_again_it_is_as_stored(shared_cache):
    cache = open_cache(shared_cache[2].url)
    samples = np.random.default_rng(0).permutation(96)
    cache.prefetch([(0, samples)])
    before = content(shared_cache[2].read_stored(samples[:7]))
    batch = cache.read_stored(samples[:7])
    assert not batch.labels.log_probs.flags.owndata, "a view of the window"
    batch.labels.log_probs[:] = 0
    assert content(cache.read_stored(samples[:7])) == before
    later = cache.read_stored(samples[20:30])
    assert content(later) == content(shared_cache[2].read_stored(samples[20:30])), "an order may skip"
    for again in (samples[7:20], samples[[31, 30]], samples[[40, 40]], samples[90:] + 1):
        assert content(cache.read_stored(again)) == content(shared_cache[2].read_stored(again)), (
            "any other order"
        )
    cache.close()


def test_memory_is_used_again_only_where_no_batch_holds_it(shared_cache):
    cache = open_cache(shared_cache[2].url)
    order = order_of(cache, batch_size=32, block_samples=32, window_blocks=1)
    kept, buffers = [], set()
    for epoch in range(3):
        order.epoch = epoch
        for number, (samples, batch) in enumerate(walk(cache, order)):
            if number % 4 == 0:
                kept.append((samples, batch))
            buffers |= {id(buffer) for buffer in cache._windows._buffers}
    for samples, batch in kept:
        assert content(batch) == content(shared_cache[2].read_stored(samples))
    assert len(buffers) < 3 * 10, "of as many windows"
    cache.close()


def test_a_buckets_chunks_are_asked_for_a_window_at_once(shared_cache, monkeypatch):
    cache = open_cache(shared_cache[2].url)
    order = order_of(cache, batch_size=32, block_samples=32, window_blocks=3)
    for _ in walk(cache, order):  # compares the units with their markers
        pass
    cache.close()
    monkeypatch.setattr(cache._windows, "_fetch", cache._fetch)
    asked, store = [], cache._opened_store()
    real = store.fetch_parts
    monkeypatch.setattr(store, "fetch_parts", lambda parts: asked.append(len(parts)) or real(parts))
    for samples, batch in walk(cache, order):
        assert content(batch) == content(shared_cache[2].read_stored(samples))
    assert sorted(asked[:4]) == [1, 3, 3, 3], "chunks of the four windows"
    assert len(asked) <= 5, "and of the next epoch's first"
    cache.close()


def test_a_window_with_a_sample_twice_is_read_chunk_by_chunk(shared_cache):
    cache, samples = open_cache(shared_cache[2].url), np.array([3, 1, 3])
    cache.prefetch([(0, samples)])
    assert content(cache.read_stored(samples)) == content(shared_cache[2].read_stored(samples))
    cache.close()


@pytest.mark.parametrize("verify", [True, False])
def test_damage_is_named_where_it_is_read_and_nowhere_else(copied, verify):
    """By the unit's sha256, and, where that is not looked at, by the chunk's own checksum."""
    shard = first_shard(copied)
    data = bytearray(shard.read_bytes())
    data[40] ^= 1
    shard.write_bytes(data)
    cache = open_cache(copied, verify=verify)
    size = cache.manifest.plan.chunk_samples
    samples = np.concatenate([np.arange(size), len(cache) - 1 - np.arange(size)])
    cache.prefetch([(0, samples)])
    with pytest.raises(CorruptionError, match="sha256" if verify else "cannot be decoded"):
        cache.read_stored(samples[:size])
    assert len(cache.read_stored(samples[size:]).labels) == size
    cache.close()


def test_numbers_that_no_teacher_gave_are_refused_with_their_row(copied, monkeypatch):
    codec = type(open_cache(copied)._codec)
    cache, real = open_cache(copied), codec.unpack

    def damaged(self, columns):
        arrays = real(self, columns)
        if len(arrays["ids"]) > 1:
            arrays["log_probs"] = np.array(arrays["log_probs"])
            arrays["log_probs"][1, 0] = np.nan
        return arrays

    monkeypatch.setattr(codec, "unpack", damaged)
    cache.prefetch([(0, np.arange(16))])
    with pytest.raises(CorruptionError, match="nan in row 1"):
        cache.read_stored(np.arange(16))
    cache.close()


def test_a_unit_that_is_written_again_is_read_as_it_is_now(copied):
    cache = open_cache(copied, verify=False)
    for _ in range(2):
        for samples, batch in walk(cache, order_of(cache)):
            assert content(batch) == content(open_cache(copied).read_stored(samples))
        shard = first_shard(copied)
        shard.rename(shard.with_name("moved"))
        shutil.copy(shard.with_name("moved"), shard)  # another file, as another writer would leave it
    cache.close()


def test_what_is_withdrawn_while_it_is_decoded_is_not_handed_out():
    """Two loaders announce to one cache: what the other has not decoded is no window of zeros."""
    windows = DecodedWindows(lambda window, block: None, dict)
    with pytest.raises(_WithdrawnError):
        windows._decode_block((0, 0))


@pytest.mark.parametrize("compressor", [None, "blosc", "zstd"])
def test_a_chunk_is_decoded_whole_or_not_at_all(compressor):
    import google_crc32c
    from numcodecs import blosc, zstd

    numbers = np.arange(4096, dtype=np.uint16).view(np.uint8)
    packed = {
        None: numbers.tobytes,
        "blosc": lambda: blosc.compress(numbers, b"zstd", 3, 2),
        "zstd": lambda: zstd.compress(numbers, 1),
    }[compressor]()

    def decode(body, out, *, checksum=None):
        crc = google_crc32c.value(bytes(body)) if checksum is None else checksum
        return zarr_chunks.decode_chunk(bytes(body) + crc.to_bytes(4, "little"), compressor, out)

    out = np.zeros_like(numbers)
    assert decode(packed, out)
    assert np.array_equal(out, numbers)
    assert not decode(packed, out, checksum=1)
    for wrong in (b"", packed[:10], packed[:-1], b"\0" * 64):
        assert not decode(wrong, out)
    for other in (np.zeros(len(numbers) - 2, np.uint8), np.zeros(len(numbers) + 2, np.uint8)):
        assert not decode(packed, other), "a claim of another size"


def test_reading_without_an_announcement_is_as_before(shared_cache):
    cache, samples = open_cache(shared_cache[2].url), np.array([5, 250, 17])
    assert content(Cache.read_stored(cache, samples)) == content(shared_cache[2].read_stored(samples))


@pytest.mark.parametrize(
    "name", [name for name in FROZEN if "packed" in name or "steps" in name or "wide" in name]
)
def test_packed_records_are_written_to_their_rows_bit_by_bit(name, monkeypatch):
    """Whole blocks of positions and parts of them, and rows that go nowhere, against `unpack`."""
    cache = open_cache(str(GOLDEN / name))
    codec, unit = cache._codec, cache.manifest.plan.unit(0)
    columns = cache._opened_store().read(unit, unit.start, unit.stop)
    random = np.random.default_rng(0)
    for count in (1, 63, 64, 150):
        rows = random.integers(len(columns["fingerprint"]), size=count)
        part = {name: np.asfortranarray(values[rows]) for name, values in columns.items()}
        expected = codec.unpack(part)
        given = np.where(random.random(count) < 0.2, -1, random.permutation(2 * count)[:count])
        out = {
            name: np.full((2 * count, *values.shape[1:]), 7, values.dtype)
            for name, values in expected.items()
        }
        with monkeypatch.context() as patch:
            if codec.name == "packed" and codec.step is not None and codec.tail != "float32":
                patch.setattr(PackedCodec, "unpack", None)  # and by nothing else
            codec.unpack_to(part, RowPlaces(given), out)
        there = given >= 0
        for name, values in expected.items():
            assert out[name][given[there]].tobytes() == values[there].tobytes(), name
            left = np.delete(out[name], given[there], axis=0)
            assert (left == np.full_like(left, 7)).all(), "nothing else is touched"


def test_packed_records_with_impossible_numbers_are_refused_as_by_the_plain_way():
    cache = open_cache(str(GOLDEN / "v1-packed" / "zarr"))
    codec, unit = cache._codec, cache.manifest.plan.unit(0)
    columns = cache._opened_store().read(unit, unit.start, unit.stop)
    out = {name: np.zeros_like(values) for name, values in codec.unpack(columns).items()}
    places, refused = RowPlaces(np.arange(len(columns["record"]))), 0
    for byte in range(codec.layout.num_bytes):
        changed = columns | {"record": columns["record"].copy(order="F")}
        changed["record"][0, byte] = 0xFF
        try:
            arrays = codec.unpack(changed)
            codec.validate(arrays)
        except LabelError as error:
            refused += 1
            with pytest.raises(LabelError, match=re.escape(str(error))):
                codec.unpack_to(changed, places, out)
        else:
            codec.unpack_to(changed, places, out)
            assert all(out[name].tobytes() == values.tobytes() for name, values in arrays.items())
    assert refused >= 3
