"""Each bug that was found in the language-model tools of others, as a test of ours (images: tests/peers/test_images.py)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from softcache import open_cache
from softcache.cache.codecs import OpenCodec
from softcache.errors import AlignmentError, LabelError
from softcache.labels.sparsify import top_k
from softcache.losses.fused import fused_distillation_loss
from softcache.reader.dataset import SoftLabelDataset
from softcache.runs import capture_labels, open_data, open_teacher
from tests.support.text_caches import make_text_cache, text_config


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers-text")
    return *make_text_cache(folder / "cache", folder), folder


# DistillKit masks ids to 17 bits (131072 becomes 0), Megatron caps V at 131072 and its sentinel -1 packs to 131071,
# TinyViT wraps at 32767.
@pytest.mark.parametrize("vocab_size", [32_768, 65_535, 65_536, 131_072, 131_073, 262_144])
def test_ids_up_to_the_last_of_any_vocabulary_come_back(vocab_size):
    logits = torch.zeros(3, vocab_size)
    wanted = [0, vocab_size // 2, vocab_size - 1]
    for row, first in enumerate(wanted):
        logits[row, first] = 9.0
        logits[row, 131_071 % vocab_size] += 3.0
    record = top_k(logits, k=2).to_numpy()
    codec = OpenCodec(num_classes=vocab_size, k=2, temperatures=record.temperatures)
    full = top_k(logits, k=2, targets_P=torch.tensor(wanted)).to_numpy()
    decoded = codec.decode(codec.encode(full))
    np.testing.assert_array_equal(decoded.ids[:, 0].astype(np.int64), wanted)
    np.testing.assert_array_equal(decoded.ids.astype(np.int64), record.ids)


# DistillKit masks an id beyond the vocabulary silently.
def test_an_id_beyond_the_students_vocabulary_raises():
    hidden, weight = torch.randn(2, 4), torch.randn(10, 4)
    labels = top_k(torch.randn(2, 10), k=3)
    with pytest.raises(LabelError, match=r"expected .*10.*; found 10|\[0, 10\)"):
        fused_distillation_loss(hidden, weight, labels, torch.tensor([3, 10]), temperature=1.0, alpha=0.5)


# Megatron: halving the global batch served samples [0, 1, 4, 5, 8, 9] for [0, 1, 2, 3, 4, 5], silently; easydistill
# indexes its labels by global_step, which gradient accumulation and shuffling shift.
@pytest.mark.parametrize("batch_size", [1, 2, 4, 7])
@pytest.mark.parametrize("shuffle", [False, True])
def test_whatever_the_batch_size_and_order_a_sample_keeps_its_labels(made, batch_size, shuffle):
    _, data, cache, _ = made
    dataset, seen = SoftLabelDataset(data.train.source, cache), []
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=shuffle)
    for batch in loader:
        ends = np.cumsum(batch.row_counts)
        for number, sample in enumerate(batch.samples.tolist()):
            rows = slice(ends[number] - batch.row_counts[number], ends[number])
            np.testing.assert_array_equal(batch.labels.ids[rows].numpy(), cache.read([sample]).ids)
            tokens = data.train.source.sample(sample)
            np.testing.assert_array_equal(batch.targets[rows].numpy(), tokens.tokens[tokens.rows + 1])
            seen.append(sample)
    assert sorted(seen) == list(range(len(cache)))


# axolotl multiplies the reported loss by T^2 and the gradient not.
@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_the_gradient_is_the_derivative_of_the_reported_loss(temperature):
    torch.manual_seed(0)
    hidden = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64)
    labels = top_k(torch.randn(3, 11, dtype=torch.float64) * 3, k=4)

    def loss(h):
        return fused_distillation_loss(h, weight, labels, None, temperature=temperature, alpha=1.0)

    loss(hidden).backward()
    step = 1e-6
    for place in [(0, 0), (1, 3), (2, 4)]:
        moved = torch.zeros_like(hidden)
        moved[place] = step
        slope = (loss(hidden.detach() + moved) - loss(hidden.detach() - moved)) / (2 * step)
        assert float(hidden.grad[place]) == pytest.approx(float(slope), rel=1e-6)


# easydistill divides by the mask twice; DistillKit's top-k without a tail goes negative.
def test_the_loss_is_the_plain_mean_over_labeled_rows_and_never_negative(made):
    config, data, cache, _ = made
    task = data.task(config, "llama?width=16&depth=1&heads=2")
    torch.manual_seed(0)
    student = task.build()
    dataset = SoftLabelDataset(data.train.source, cache)
    whole = task.loss(student, dataset.fetch([0, 1, 2, 3])).item()
    parts = [dataset.fetch([sample]) for sample in range(4)]
    losses = [task.loss(student, part).item() * part.num_rows for part in parts]
    assert whole == pytest.approx(sum(losses) / sum(part.num_rows for part in parts), rel=1e-5)
    assert min(losses) > 0


# DistillKit's rerun overwrites from file 0.
def test_a_rerun_writes_no_file_again(made):
    config, data, cache, _ = made
    files = [path for path in Path(cache.url).rglob("*") if path.is_file()]
    stamps = {path: path.stat().st_mtime_ns for path in files}
    _, report = capture_labels(config, data, open_teacher(config, data), cache.url)
    assert report.units_done == 0
    assert {path: path.stat().st_mtime_ns for path in files} == stamps


# maxtext keeps the raw top-k: the mass outside is unknown, so no other temperature can be served.
def test_the_mass_outside_of_the_kept_tokens_is_known_at_every_temperature(made):
    config, data, cache, _ = made
    teacher = open_teacher(config, data)
    batch = data.train.load([0, 1])
    logits = torch.cat(list(teacher.chunks(batch)))
    labels = cache.read([0, 1])
    for temperature in (1.0, 1.7, 2.5, 6.0):
        softened = labels.at_temperature(temperature)
        dense = (logits.double() / temperature).log_softmax(-1).numpy()
        kept = np.take_along_axis(np.exp(dense), labels.ids.astype(np.int64), 1).sum(1)
        np.testing.assert_allclose(np.exp(softened.log_tail), 1 - kept, atol=4e-3)


# DistillKit's compression settings must be copied by hand to the student.
def test_a_reader_needs_nothing_but_the_url(made):
    _, _, cache, _ = made
    assert open_cache(cache.url).read([0]).k == 6


# whittle's loader ignores the input ids; Megatron's identity has no tokenizer and no content.
def test_the_same_keys_with_other_tokens_are_not_the_same_data(made, tmp_path):
    _, _, cache, _ = made
    other = open_data(text_config(tmp_path, source={"tokenizer": "bpe?vocab_size=299"}))
    with pytest.raises(AlignmentError, match="another tokenizer"):
        SoftLabelDataset(other.train.source, cache)
