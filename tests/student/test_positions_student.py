"""Labels at some positions only: each joined with its own row, and what a student learns from them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from softcache.data.sources.text.source import load_tokenizer
from softcache.data.tokens import TokenBatch
from softcache.errors import AlignmentError
from softcache.losses import cross_entropy, distillation_loss
from softcache.reader.cache import Cache
from softcache.reader.dataset import SoftLabelDataset
from softcache.reader.open import open_cache
from softcache.reader.order import BlockShuffle
from softcache.runs import open_data, open_teacher, train_student
from softcache.tools.verify.teacher import verify_against_teacher, verify_units
from tests.modalities.test_text_runs import assert_same_weights, weights
from tests.support.position_caches import POLICIES, STUDENT, Made, chat_source, stored_positions
from tests.support.text_caches import text_config


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    return Made(folder, chat_source(folder))


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("documents"), {"packing": "documents"})


@pytest.fixture(params=["packed", "chats"])
def made(request):
    return request.getfixturevalue(request.param)


# -- joining -----------------------------------------------------------------------------------------------


def pairs_of(batch):
    """(sample, position, target's log-probability) of every labeled row."""
    sample_P = np.repeat(batch.samples, batch.row_counts)
    rows = np.arange(batch.num_rows) if batch.labeled is None else batch.labeled.numpy()
    cached = batch.labels.target_log_prob.tolist()
    return list(zip(sample_P[rows].tolist(), batch.positions[rows].tolist(), cached, strict=True))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_row_never_gets_another_positions_label(made, policy):
    """The log-probability of the target is the teacher's own at that position, whatever is done to the batch."""
    whole = made.cache()
    true = {
        (sample, position): value
        for sample in range(len(whole))
        for position, value in zip(
            stored_positions(whole, sample), whole.read([sample]).target_log_prob.tolist(), strict=True
        )
    }
    dataset = SoftLabelDataset(made.data.train, made.cache(policy))
    order = np.random.default_rng(2).permutation(len(whole)).tolist()
    batches = [dataset.fetch(order[start : start + 5]) for start in range(0, len(order), 5)]
    merged = TokenBatch.merge(batches)
    wanted = [
        (sample, position) for sample in order for position in stored_positions(made.cache(policy), sample)
    ]
    for found in ([merged], batches, merged.split(4), [piece for b in batches for piece in b.split(2)]):
        pairs = [pair for batch in found for pair in pairs_of(batch)]
        assert [pair[:2] for pair in pairs] == wanted
        for sample, position, cached in pairs:
            assert cached == pytest.approx(true[sample, position], abs=1e-4)
    for batch in batches:
        sample_P = np.repeat(np.arange(len(batch)), batch.row_counts)
        counted = np.bincount(sample_P[batch.labeled.numpy()], minlength=len(batch))
        assert batch.label_counts.tolist() == counted.tolist()


def test_batches_with_all_rows_and_with_some_go_together(packed):
    some, whole = (SoftLabelDataset(packed.data.train, packed.cache(p)) for p in ("every", "all"))
    parts = [some.fetch([1, 2]), whole.fetch([3]), some.fetch([0])]
    merged = TokenBatch.merge(parts)
    assert merged.label_counts.tolist() == [
        *parts[0].label_counts,
        *parts[1].row_counts,
        *parts[2].label_counts,
    ]
    assert pairs_of(merged) == [pair for part in parts for pair in pairs_of(part)]


def at(place, value):
    return lambda positions: np.where(np.arange(len(positions)) == place % len(positions), value, positions)


WRONG = {
    "a position that has nothing to predict": at(-1, 31),
    "a position beyond the sample": at(-1, 40),
    "in another order": lambda positions: positions[::-1].copy(),
    "twice": lambda positions: np.repeat(positions[:1], len(positions)),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_stored_position_that_the_source_lacks_is_refused(packed, monkeypatch, wrong):
    real = Cache.read_stored
    assert packed.data.train.source.sample(2).rows.max() < 31

    def spoilt(self, samples, view=0):
        stored = real(self, samples, view)
        first = int(stored.counts[0])
        positions = stored.positions.astype(np.int64)
        return stored._replace(positions=np.concatenate([wrong(positions[:first]), positions[first:]]))

    dataset = SoftLabelDataset(packed.data.train, packed.cache("every"))
    assert dataset.fetch([2, 3]).labels is not None
    monkeypatch.setattr(Cache, "read_stored", spoilt)
    key = packed.data.train.source.key(2)
    with pytest.raises(AlignmentError, match=rf"sample '{key}' has a label for position \d+"):
        dataset.fetch([2, 3])


def test_a_row_missing_from_a_cache_of_all_positions_is_refused(packed, monkeypatch):
    real = Cache.read_stored

    def shorter(self, samples, view=0):
        stored = real(self, samples, view)
        kept = slice(0, len(stored.labels) - 1)
        counts = stored.counts - np.eye(1, len(stored.counts), len(stored.counts) - 1, dtype=np.int64)[0]
        return stored._replace(
            labels=stored.labels.take(kept), positions=stored.positions[kept], counts=counts
        )

    dataset = SoftLabelDataset(packed.data.train, packed.cache())
    monkeypatch.setattr(Cache, "read_stored", shorter)
    with pytest.raises(AlignmentError, match=r"rows of labels for .* rows of samples"):
        dataset.fetch([2, 3])


def test_a_changed_text_is_told_by_its_contents(documents, tmp_path):
    """The table counts the labeled rows of a sample, and not what a source would count."""
    texts = [json.loads(line) for line in (documents.folder / "texts.jsonl").read_text().splitlines()]
    for document in texts:
        words = document["text"].split()
        words[1:3] = words[2:0:-1]  # as many tokens as before
        document["text"] = " ".join(words)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(document) + "\n" for document in texts))
    load_tokenizer(documents.config().source).save_pretrained(tmp_path / "tokenizer")
    source = {"packing": "documents", "tokenizer": str(tmp_path / "tokenizer")}
    data = open_data(text_config(tmp_path, source=source))
    assert data.train.source.keys() == documents.data.train.source.keys()
    with pytest.raises(AlignmentError, match=r"the contents of sample '.*' changed since it was labeled"):
        SoftLabelDataset(data.train, documents.cache("every"))


# -- the student -------------------------------------------------------------------------------------------


def dense_loss(student, batch, *, temperature, alpha):
    """(1 - alpha) * mean CE over all rows + alpha * mean T^2 KL over labeled rows, from the whole batch's logits."""
    logits_PV = student._parts.logits(student._hidden(batch)).double()
    labels = batch.labels.to_torch()
    hard = cross_entropy(logits_PV, batch.targets).mean()
    soft = distillation_loss(logits_PV[batch.labeled], labels, None, temperature=temperature, alpha=1.0)
    return (1 - alpha) * hard + alpha * soft


def gradients(student, loss):
    return torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.9), (2.0, 0.5), (2.0, 1.0), (3.0, 0.0)])
def test_the_loss_is_that_of_a_dense_reference(made, policy, temperature, alpha):
    config = made.config(policy, loss={"temperature": temperature, "alpha": alpha})
    task = made.data.task(config, STUDENT)
    torch.manual_seed(0)
    student = task.build()
    batch = SoftLabelDataset(made.data.train, made.cache(policy)).fetch([4, 0, 7, 2, 1])
    assert batch.num_labeled < batch.num_rows
    found = task.loss(student, batch)
    expected = dense_loss(student, batch, temperature=temperature, alpha=alpha)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for one, two in zip(gradients(student, found), gradients(student, expected), strict=True):
        if one is not None:
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_the_pieces_of_a_step_sum_to_the_steps_loss(packed, alpha):
    """Pieces have other shares of labels than the whole: one of them is labeled all over."""
    task = packed.data.task(packed.config("every", loss={"alpha": alpha}), STUDENT)
    torch.manual_seed(0)
    student = task.build()
    some, whole = (SoftLabelDataset(packed.data.train, packed.cache(p)) for p in ("every", "all"))
    parts = [some.fetch([5, 0]), whole.fetch([3]), some.fetch([8, 1, 2])]
    step = TokenBatch.merge(parts)
    share = step.num_labeled / step.num_rows
    expected = task.loss(student, step)
    pieces = [
        task.loss(student, piece, label_share=share) * piece.num_rows / step.num_rows for piece in parts
    ]
    assert sum(pieces).item() == pytest.approx(expected.item(), rel=1e-5)
    assert task.loss(student, step, label_share=share).item() == expected.item()


def test_every_rank_knows_the_share_of_labels_of_the_step():
    rows, labeled = np.arange(10) + 3, np.arange(10) // 2 + 1
    how = {"batch_size": 4, "view_of": lambda epoch: 0, "block_samples": 2, "window_blocks": 3, "seed": 1}
    orders = [
        BlockShuffle(
            lambda view: np.arange(10), rank=rank, num_ranks=3, rows_of=rows, labeled_of=labeled, **how
        )
        for rank in range(3)
    ]
    for step in range(3):
        batch = orders[0].order(0)[4 * step : 4 * step + 4]
        for order in orders:
            order.step = step
            assert order.label_share() == labeled[batch].sum() / rows[batch].sum()
    assert BlockShuffle(lambda view: np.arange(10), rows_of=rows, **how).label_share() is None


@pytest.mark.parametrize("policy", POLICIES)
def test_capture_verify_train(made, tmp_path, policy):
    config, data, cache = made.config(policy, train={"epochs": 1}), made.data, made.cache(policy)
    assert list(verify_units(cache)) == []
    found = verify_against_teacher(
        cache, data.train, open_teacher(config, data), num_rows=100, threshold_nats=1e-4, seed=0
    )
    assert list(found) == []
    how = {"model": STUDENT, "labels": "cache", "cache": cache}
    metrics = train_student(config, data, out=tmp_path / "one", **how)
    assert np.isfinite(metrics["history"][0]["train_loss"])
    pieces = made.config(policy, train={"epochs": 1, "accumulation_steps": 4})
    split = train_student(pieces, data, out=tmp_path / "many", **how)
    assert split["history"][0]["train_loss"] == pytest.approx(metrics["history"][0]["train_loss"], abs=1e-5)
    assert_same_weights(weights(tmp_path / "one"), weights(tmp_path / "many"), tolerance=2e-3)


def test_verify_finds_a_label_that_was_moved(packed, monkeypatch):
    """The first two labels of a sample change places: each is a fine record, of another position."""
    config, cache = packed.config("random"), packed.cache("random")
    real = Cache.read_stored

    def swapped(self, samples, view=0):
        stored = real(self, samples, view)
        order = np.arange(len(stored.labels))
        order[:2] = [1, 0]
        return stored._replace(labels=stored.labels.take(order))

    monkeypatch.setattr(Cache, "read_stored", swapped)
    teacher = open_teacher(config, packed.data)
    found = list(
        verify_against_teacher(
            cache, packed.data.train, teacher, num_rows=1000, threshold_nats=1e-4, seed=0, batch_size=1000
        )
    )
    assert len(found) == 1
    assert "the teacher disagrees with its record" in found[0]


def test_hard_labels_and_the_live_teacher_do_as_before(packed, tmp_path):
    runs = {}
    for policy in ("all", "every"):
        config = packed.config(policy, train={"epochs": 1})
        teacher = open_teacher(config, packed.data)
        for labels in ("ground_truth", "online"):
            out = tmp_path / policy / labels
            train_student(config, packed.data, model=STUDENT, labels=labels, teacher=teacher, out=out)
            runs[policy, labels] = weights(out)
    for labels in ("ground_truth", "online"):
        assert_same_weights(runs["all", labels], runs["every", labels])


def test_alpha_zero_learns_what_hard_labels_teach(packed, tmp_path):
    """Cross-entropy is over all rows, labeled or not."""
    config = packed.config("entropy", train={"epochs": 1}, loss={"alpha": 0.0})
    how = {"model": STUDENT, "cache": packed.cache("entropy")}
    for labels in ("cache", "ground_truth"):
        train_student(config, packed.data, labels=labels, out=tmp_path / labels, **how)
    assert_same_weights(weights(tmp_path / "cache"), weights(tmp_path / "ground_truth"), tolerance=2e-3)


# -- another tokenizer -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab_size", "is_shorter"), [(270, False), (340, True)])
@pytest.mark.parametrize("policy", POLICIES)
def test_row_r_of_a_document_still_meets_row_r_of_the_students_tokens(
    documents, tmp_path, policy, vocab_size, is_shorter
):
    """Labels beyond a student's shorter sample fall away."""
    other = {"student": {"tokenizer": f"bpe?vocab_size={vocab_size}"}, "loss": {"name": "uld"}}
    config, cache = documents.config(policy, **other, train={"epochs": 1}), documents.cache(policy)
    dataset, chosen = documents.data.train_dataset(config, cache)
    whole, _ = documents.data.train_dataset(config, documents.cache())
    for samples in (chosen[:7], chosen[::-1][:5]):
        requests = [(int(sample), 0) for sample in samples]
        batch, full = dataset.fetch(requests), whole.fetch(requests)
        assert full.labeled is None
        assert torch.equal(batch.rows, full.rows)
        assert batch.label_counts.tolist() == dataset.labeled_of[samples].tolist()
        assert batch.row_counts.tolist() == dataset.rows_of[samples].tolist()
        cached, true = batch.labels.target_log_prob, full.labels.target_log_prob[batch.labeled]
        torch.testing.assert_close(cached, true, rtol=0, atol=1e-4)
        kept = np.concatenate(
            [
                [position < count for position in stored_positions(cache, int(sample))]
                for sample, count in zip(samples, batch.row_counts, strict=True)
            ]
        )
        assert batch.num_labeled == kept.sum()
        assert kept.all() != is_shorter
    how = {"model": STUDENT, "labels": "cache", "cache": cache}
    metrics = train_student(config, documents.data, out=tmp_path / "one", **how)
    pieces = documents.config(policy, **other, train={"epochs": 1, "accumulation_steps": 3})
    split = train_student(pieces, documents.data, out=tmp_path / "many", **how)
    assert split["history"][0]["train_loss"] == pytest.approx(metrics["history"][0]["train_loss"], abs=1e-5)


def test_a_batch_whose_labels_all_lie_beyond_the_students_rows_has_cross_entropy_alone(packed):
    for alpha in (0.5, 1.0):
        task = packed.data.task(packed.config("every", loss={"alpha": alpha}), STUDENT)
        torch.manual_seed(0)
        student = task.build()
        batch = SoftLabelDataset(packed.data.train, packed.cache("every")).fetch([0, 1])
        bare = replace(
            batch,
            labels=batch.labels.take(slice(0, 0)),
            labeled=batch.labeled[:0],
            label_counts=np.zeros(2, np.int64),
        )
        hard = task.loss(student, replace(batch, labels=None, labeled=None, label_counts=None))
        for share in (None, 0.0, 0.3):
            loss = task.loss(student, bare, label_share=share)
            assert loss.item() == pytest.approx((1 - alpha) * hard.item(), rel=1e-5)
            loss.backward()


# -- transformers' Trainer ---------------------------------------------------------------------------------


def test_the_trainer_takes_the_steps_of_a_dense_loop(chats, tmp_path):
    from transformers import TrainingArguments

    from softcache.student.integrations.huggingface import DistillTrainer
    from softcache.student.tasks import LossSettings, TokenStudent

    cache, source = chats.cache("random"), chats.data.train.source
    how = {"temperature": 2.0, "alpha": 0.7}

    def fresh():
        torch.manual_seed(3)
        return chats.data.task(chats.config(), STUDENT).build().model

    def trained(size, pieces):
        arguments = TrainingArguments(
            str(tmp_path / f"{size}"),
            use_cpu=True,
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=pieces,
            max_steps=2,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            train_sampling_strategy="sequential",
        )
        trainer = DistillTrainer(fresh(), arguments, cache=open_cache(cache.url), source=source, **how)
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer.model

    student = TokenStudent(fresh(), LossSettings(**how), context=32).train()
    optimizer, expected = torch.optim.SGD(student.parameters(), lr=0.1), []
    dataset = SoftLabelDataset(source, cache)
    for samples in (range(6), range(6, 12)):
        loss = dense_loss(student, dataset.fetch(list(samples)), **how)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    for size, pieces in ((6, 1), (2, 3)):
        losses, model = trained(size, pieces)
        assert losses == pytest.approx(expected, rel=1e-4)
        assert_same_weights(dict(model.state_dict()), dict(student.model.state_dict()), tolerance=1e-5)
