"""Caches by a writer that knows docs/format.md and nothing of softcache: opened, verified, joined, and trained from."""

import ast
import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch

from softcache.cache.schema import manifest_schema, marker_schema
from softcache.errors import AlignmentError
from softcache.reader.dataset import SoftLabelDataset
from softcache.reader.open import open_cache
from softcache.runs import open_data, train_student
from softcache.tools.verify.checksums import verify_units
from tests.support import plain_writer
from tests.support.caches import digits_config
from tests.support.plain_writer import write_images, write_tokens
from tests.support.text_caches import text_config

ALLOWED = {
    "hashlib",
    "json",
    "struct",
    "numpy",
    "pyarrow",
    "pyarrow.parquet",
    "xxhash",
    "zarr",
    "zarr.codecs",
}
STORES = ["zarr", "parquet"]


def image_config():
    return digits_config(
        source={"max_train_samples": 47, "max_eval_samples": 20},
        labels={"num_views": 1, "k": 3},
        train={"epochs": 1, "batch_size": 16},
    )


def made_images(folder, store, *, changed=False):
    """Returns (config, data, logits) of a cache of the digits by the second writer."""
    config = image_config()
    data = open_data(config)
    batch = data.train.load(np.arange(47), 0)
    random = np.random.default_rng(0)
    logits = random.normal(size=(47, 10)) * 3
    pixels = (batch.images * 0.4 + 0.3).mul(255).round().to(torch.uint8).numpy()
    if batch.images.dtype == torch.uint8:
        pixels = batch.images.numpy()
    pixels = pixels.copy()
    if changed:
        pixels[33] ^= 1
    settings = {"crop": "padded", "padding": 1, "mean": [0.3], "std": [0.4]}
    keys = data.train.source.keys()
    targets, teacher = batch.targets.numpy(), config.teacher.model
    write_images(folder, store, keys, targets, [pixels], [logits], settings=settings, teacher=teacher)
    return config, data, logits


def made_tokens(folder, store):
    packing = {"packing": "documents", "max_train_samples": 23, "max_eval_samples": 5}
    config = text_config(folder.parent, source=packing, labels={"k": 3}, train={"epochs": 1})
    data = open_data(config)
    source = data.train.source
    tokens = [np.asarray(source.sample(n).tokens, np.int32) for n in range(len(source))]
    random = np.random.default_rng(0)
    logits = [random.normal(size=(len(document) - 1, source.vocab_size)) * 2 for document in tokens]
    write_tokens(folder, store, source.keys(), tokens, logits, teacher=config.teacher.model)
    return config, data, np.concatenate(logits)


def test_the_writer_imports_nothing_of_softcache():
    tree = ast.parse(Path(plain_writer.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names <= ALLOWED


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("made", [made_images, made_tokens])
def test_its_caches_verify_and_train_a_student(made, store, tmp_path, capsys):
    config, data, logits = made(tmp_path / "cache", store)
    cache = open_cache(tmp_path / "cache")
    assert list(verify_units(cache)) == []
    labels = cache.read(np.arange(len(cache)))
    expected = torch.from_numpy(logits).log_softmax(1)
    top = expected.topk(3, dim=1)
    np.testing.assert_array_equal(labels.ids, top.indices)
    np.testing.assert_allclose(labels.log_probs, top.values, atol=1e-6)
    for t in (2.0, 3.0):
        softened = (expected / t).log_softmax(1).gather(1, top.indices)
        np.testing.assert_allclose(
            labels.at_temperature(t).log_probs, softened, atol=1e-6 if t == 2 else 2e-3
        )
    metrics = train_student(
        config, data, model=config.student.model, labels="cache", cache=cache, out=tmp_path / "student"
    )
    assert metrics["epochs"] == 1
    assert len(metrics["history"]) == 1
    assert "digests of another writer" in capsys.readouterr().err


def test_its_documents_follow_the_schemas(tmp_path):
    made_images(tmp_path / "images", "zarr")
    made_tokens(tmp_path / "tokens", "parquet")
    for folder in ("images", "tokens"):
        jsonschema.validate(json.loads((tmp_path / folder / "manifest.json").read_text()), manifest_schema())
        for path in (tmp_path / folder / "units").iterdir():
            jsonschema.validate(json.loads(path.read_text()), marker_schema())


def test_other_samples_are_refused_by_key_and_other_pixels_by_fingerprint(tmp_path):
    _, data, _ = made_images(tmp_path / "cache", "parquet", changed=True)
    dataset = SoftLabelDataset(
        data.train, open_cache(tmp_path / "cache"), fingerprint_fraction=0.0, fingerprint_first=0
    )
    dataset.load(np.arange(33), 0)
    with pytest.raises(
        AlignmentError, match=rf"sample {data.train.source.key(33)!r}, view 0: the teacher saw content"
    ):
        dataset.load(np.arange(30, 40), 0)
    other = open_data(
        digits_config(source={"max_train_samples": 46, "max_eval_samples": 20}, labels={"num_views": 1})
    )
    with pytest.raises(AlignmentError, match="47 samples were labeled, the source has 46"):
        SoftLabelDataset(other.train, open_cache(tmp_path / "cache"))
