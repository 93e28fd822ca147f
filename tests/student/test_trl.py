"""A cache in TRL's SFTTrainer: its own loss on the exported tokens, softcache's on the labels."""

import numpy as np
import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM, TrainingArguments
from trl import SFTConfig, SFTTrainer

from softcache.config.load import load_config
from softcache.data.sources.text.source import load_tokenizer, open_text
from softcache.data.tokens import TokenData
from softcache.errors import AlignmentError, ConfigError, RunError, SpecError
from softcache.losses import cross_entropy
from softcache.reader.dataset import HardLabelDataset, SoftLabelDataset
from softcache.runs import capture_labels, open_data, open_teacher
from softcache.student.integrations.huggingface import SoftLabelCollator, to_hf_dataset
from softcache.student.integrations.trl import DistillSFTTrainer
from tests.student.test_huggingface_trainer import (
    EXACT,
    ROUNDING,
    assert_same,
    dense_logits,
    llama,
    trained,
    write_config,
)
from tests.support.position_caches import Made, chat_source


def made(folder, *overrides):
    path = write_config(folder)
    if overrides:
        path.write_text(path.read_text().replace("k = 5\n", ""))
    config = load_config(path, overrides)
    data = open_data(config)
    cache, _ = capture_labels(config, data, open_teacher(config, data), str(folder / "cache"))
    return folder, config.source, cache


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    """(folder, source settings, cache) of samples with several documents each."""
    return made(tmp_path_factory.mktemp("trl"))


@pytest.fixture(scope="module")
def exported(labeled):
    folder, source, cache = labeled
    return to_hf_dataset(cache, open_text(source, split="train"), cache_dir=str(folder / "hf"))


def arguments(out, **settings):
    base = {
        "use_cpu": True,
        "bf16": False,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
    }
    return SFTConfig(str(out), **base | settings)


def trainer_of(labeled, out, exported, model=None, *, settings=None, **more):
    _, source, cache = labeled
    how = {"temperature": 2.0, "alpha": 0.7, "train_dataset": exported} | more
    return DistillSFTTrainer(
        llama() if model is None else model,
        arguments(out, **settings or {}),
        cache=cache,
        source=open_text(source, split="train"),
        processing_class=load_tokenizer(source),
        **how,
    )


def run(trainer):
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}, losses


# -- the dataset -------------------------------------------------------------------------------------------


def test_the_dataset_collates_to_the_batches_of_the_reader(labeled, exported):
    _, source, cache = labeled
    expected = SoftLabelDataset(open_text(source, split="train"), cache)
    assert len(exported) == len(expected)
    for samples in ([0, 1, 2, 3], [7, 2]):
        found = SoftLabelCollator(cache)([exported[i] for i in samples])["batch"]
        batch = expected.load(np.array(samples), 0)
        for name in ("tokens", "segments", "rows", "targets", "lengths", "row_counts"):
            np.testing.assert_array_equal(getattr(found, name), getattr(batch, name), err_msg=name)
        for name in ("ids", "log_probs", "log_tail", "target_log_prob"):
            np.testing.assert_array_equal(
                getattr(found.labels, name), getattr(batch.labels, name), err_msg=name
            )
        assert found.labels.temperatures == batch.labels.temperatures


def test_labels_are_ignored_where_a_document_begins(exported):
    row = exported[0]
    begins = np.cumsum([0, *row["seq_lengths"][:-1]])
    assert len(begins) > 1
    assert (row["labels"][begins] == -100).all()
    others = np.setdiff1d(np.arange(len(row["labels"])), begins)
    np.testing.assert_array_equal(row["labels"][others], row["input_ids"][others])


@pytest.mark.parametrize("policy", ["labels.policy=sample", "labels.positions.policy=every"])
def test_drawn_labels_and_positions_without_labels_are_exported(tmp_path, policy):
    more = ["labels.num_samples=6"] if "sample" in policy else ["labels.positions.every=3", "labels.k=5"]
    labeled = made(tmp_path, policy, *more)
    _, source, cache = labeled
    exported = to_hf_dataset(cache, open_text(source, split="train"), cache_dir=str(tmp_path / "hf"))
    found, losses = run(trainer_of(labeled, tmp_path, exported, temperature=1.0))
    sequential = {"train_sampling_strategy": "sequential", "max_steps": 2}
    expected, expected_losses = trained(labeled, tmp_path, temperature=1.0, settings=sequential)
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    assert_same(found, expected, **ROUNDING)


def test_a_changed_source_is_another_dataset(labeled, exported, tmp_path):
    folder, source, cache = labeled
    again = to_hf_dataset(cache, open_text(source, split="train"), cache_dir=str(folder / "hf"))
    assert again.cache_files == exported.cache_files
    held_out = to_hf_dataset(None, open_text(source, split="eval"), cache_dir=str(folder / "hf"))
    assert set(held_out.column_names) == {"input_ids", "labels", "seq_lengths"}
    with pytest.raises(AlignmentError, match="labeled"):
        to_hf_dataset(cache, open_text(source, split="eval"), cache_dir=str(tmp_path))


def test_a_row_that_was_cut_is_refused(labeled, exported):
    _, _, cache = labeled
    row = exported[0]
    cut = row | {"input_ids": row["input_ids"][:10], "labels": row["labels"][:10]}
    with pytest.raises(AlignmentError, match="without max_length or packing"):
        SoftLabelCollator(cache)([cut])
    cut |= {"seq_lengths": np.array([10])}
    with pytest.raises(AlignmentError, match="a soft label at a position where nothing is learned"):
        SoftLabelCollator(cache)([cut])


@pytest.mark.parametrize("how", ["tokens", "tokens and labels", "order", "documents"])
def test_a_row_that_was_changed_is_refused(labeled, exported, how):
    """Its soft labels would be those of other tokens, or of tokens after others."""
    collate, row = SoftLabelCollator(labeled[2]), exported[0]
    assert collate([row])["batch"].num_labeled > 0
    changed = {name: np.array(row[name]) for name in ("input_ids", "labels", "seq_lengths")}
    if how == "order":
        changed["input_ids"] = changed["input_ids"][::-1]
    elif how == "documents":
        changed["seq_lengths"] = changed["seq_lengths"].sum(keepdims=True)
    else:
        for name in ("input_ids", "labels")[: len(how.split(" and "))]:
            changed[name][3] = (row["input_ids"][3] + 1) % 300
    with pytest.raises(AlignmentError, match="are not those that were labeled"):
        collate([exported[1], row | changed])


def test_rows_of_another_teachers_cache_are_refused(labeled, exported, tmp_path):
    """They would be learned as those of the cache that was named: numbers of classes and K are the same."""
    path = write_config(tmp_path)
    state = load_file(tmp_path / "teacher.safetensors")
    save_file({name: -tensor for name, tensor in state.items()}, tmp_path / "teacher.safetensors")
    config = load_config(path)
    data = open_data(config)
    other, _ = capture_labels(config, data, open_teacher(config, data), str(tmp_path / "cache"))
    with pytest.raises(AlignmentError, match=r"not of cache .*; make it of that"):
        SoftLabelCollator(other)([exported[0]])
    bare = {name: exported[0][name] for name in ("input_ids", "labels", "seq_lengths")}
    assert SoftLabelCollator(other)([bare])["batch"].num_labeled == 0
    copied = load_config(labeled[0] / "run.toml", ["source.max_train_samples=20"])
    data = open_data(copied)
    part, _ = capture_labels(copied, data, open_teacher(copied, data), str(tmp_path / "part"))
    assert SoftLabelCollator(part)([exported[0]])["batch"].num_labeled > 0, "another source, the same teacher"


@pytest.mark.parametrize(
    "name", ["labels", "seq_lengths", "soft_positions", "soft_log_tail", "soft_cache", "soft_sample"]
)
def test_a_row_that_lost_a_column_is_refused(labeled, exported, name):
    """Without seq_lengths its documents would attend to each other, without soft_positions it would have no soft labels."""
    row = exported[0]
    del row[name]
    with pytest.raises(AlignmentError, match=rf"sample: without {name}; expected all columns"):
        SoftLabelCollator(labeled[2])([exported[1], row])


# -- SFTTrainer --------------------------------------------------------------------------------------------


def test_sft_trainer_itself_learns_the_hard_labels_of_the_dataset(tmp_path):
    """TRL's class, collator and loss, on one document a sample: the mean negative log-likelihood of the rows."""
    labeled = made(tmp_path, "source.packing=documents", "labels.k=5")
    _, source, cache = labeled
    exported = to_hf_dataset(cache, open_text(source, split="train"), cache_dir=str(tmp_path / "hf"))
    trainer = SFTTrainer(
        llama(), arguments(tmp_path), train_dataset=exported, processing_class=load_tokenizer(source)
    )
    _, losses = run(trainer)
    data = HardLabelDataset(TokenData(open_text(source, split="train")))
    batch = data.load(np.arange(4), 0)
    expected = cross_entropy(dense_logits(llama(), batch), batch.targets).mean()
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("pieces", [1, 2])
def test_it_takes_the_steps_of_distill_trainer(labeled, exported, tmp_path, pieces):
    settings = {"per_device_train_batch_size": 4 // pieces, "gradient_accumulation_steps": pieces}
    found, losses = run(trainer_of(labeled, tmp_path, exported, settings=settings))
    sequential = {"train_sampling_strategy": "sequential", "max_steps": 2}
    expected, expected_losses = trained(labeled, tmp_path, settings=sequential)
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    assert_same(found, expected, **(EXACT if pieces == 1 else ROUNDING))
    assert not torch.equal(found["lm_head.weight"], llama().state_dict()["lm_head.weight"])


def test_a_batch_without_padding_changes_no_step(labeled, exported, tmp_path):
    """SFTTrainer refuses it for its own collator and its own columns."""
    trainer = trainer_of(labeled, tmp_path, exported, settings={"padding_free": True})
    assert trainer._student()._padding_free
    found, losses = run(trainer)
    expected, expected_losses = run(trainer_of(labeled, tmp_path, exported))
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    assert_same(found, expected, **ROUNDING)


def test_rows_can_be_chosen_and_mixed_with_ones_without_soft_labels(labeled, exported, tmp_path):
    """A row without soft labels adds (1 - alpha) of its cross-entropy; the soft part is a mean over the others."""
    from datasets import concatenate_datasets

    bare = exported.select([5]).remove_columns([c for c in exported.column_names if c.startswith("soft_")])
    mixed = concatenate_datasets([exported.select([2, 0]), bare]).with_format("numpy")
    settings = {"per_device_train_batch_size": 3, "max_steps": 1}
    _, losses = run(trainer_of(labeled, tmp_path, mixed, settings=settings))
    _, source, cache = labeled
    dataset = SoftLabelDataset(open_text(source, split="train"), cache)
    from softcache.losses import distillation_loss

    whole, soft = dataset.load(np.array([2, 0, 5]), 0), dataset.load(np.array([2, 0]), 0)
    hard = cross_entropy(dense_logits(llama(), whole), whole.targets).mean()
    how = {"temperature": 2.0, "alpha": 1.0}
    expected = 0.3 * hard + 0.7 * distillation_loss(dense_logits(llama(), soft), soft.labels, None, **how)
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)


def test_a_run_goes_on_in_its_order_or_is_refused(labeled, exported, tmp_path):
    settings = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "train_sampling_strategy": "random",
    }
    expected, _ = run(trainer_of(labeled, tmp_path, exported, settings=settings))
    again = trainer_of(labeled, tmp_path, exported, settings=settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(again.model.state_dict(), expected, **EXACT)
    fewer = trainer_of(labeled, tmp_path, exported.select(range(40)), settings=settings)
    with pytest.raises(RunError, match="samples of an epoch 47 there, 40 here"):
        fewer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    turned = trainer_of(labeled, tmp_path, exported.shuffle(seed=1), settings=settings)
    with pytest.raises(RunError, match=r"rows '\w+' there, '\w+' here"):
        turned.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_its_held_out_loss_is_the_negative_log_likelihood(labeled, exported, tmp_path):
    _, source, _ = labeled
    held_out = open_text(source, split="eval")
    settings = {"per_device_eval_batch_size": len(held_out)}
    trainer = trainer_of(
        labeled,
        tmp_path,
        exported,
        settings=settings,
        eval_dataset=to_hf_dataset(None, held_out, cache_dir=str(tmp_path)),
    )
    batch = HardLabelDataset(TokenData(held_out)).load(np.arange(len(held_out)), 0)
    expected = cross_entropy(dense_logits(llama(), batch), batch.targets).mean()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_adapters_of_its_peft_config_learn(labeled, exported, tmp_path):
    adapters = LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    found, losses = run(trainer_of(labeled, tmp_path, exported, peft_config=adapters))
    moved = [name for name, tensor in found.items() if "lora_B" in name and tensor.any()]
    assert len(moved) == 4
    assert losses[0] == pytest.approx(trained(labeled, tmp_path, settings={
        "train_sampling_strategy": "sequential", "max_steps": 1})[1][0], rel=1e-5)  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": True}, "packing would part tokens from their labels"),
        ({"max_length": 8}, "max_length 8 would cut samples of up to 32 tokens"),
        ({"loss_type": "dft"}, "loss_type 'dft' would be ignored"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor 0.1 would be ignored"),
        ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef 0.1 would be ignored"),
        ({"eval_packing": True}, "eval_packing True would be ignored"),
        ({"shuffle_dataset": True}, r"shuffle_dataset True would be ignored, .*\.shuffle\(seed"),
        ({"pad_to_multiple_of": 64}, "pad_to_multiple_of 64 would be ignored"),
        (
            {"chat_template_path": "x.jinja"},
            r"chat_template_path 'x\.jinja' would be ignored, .* source\.chat_template",
        ),
        ({"eos_token": "a"}, "eos_token 'a' would be ignored"),
        (
            {"completion_only_loss": True},
            "completion_only_loss True would be ignored: these are texts without prompts",
        ),
        (
            {"assistant_only_loss": True},
            "assistant_only_loss True would be ignored: these are texts without prompts",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(labeled, exported, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        trainer_of(labeled, tmp_path, exported, settings=settings)


def test_the_loss_of_answers_alone_is_what_chats_have_and_texts_have_not(
    labeled, exported, tmp_path, monkeypatch
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    trainer_of(labeled, tmp_path, exported, settings={"completion_only_loss": False})
    chats = Made(tmp_path, chat_source(tmp_path))
    chats = (tmp_path, chats.config().source, chats.cache())
    how = {"model": llama(len(load_tokenizer(chats[1]))), "train_dataset": None}
    for settings in ({"completion_only_loss": True}, {"assistant_only_loss": True}, {}):
        trainer_of(chats, tmp_path, None, settings=settings, **how)
    with pytest.raises(
        ConfigError, match="completion_only_loss False would be ignored: prompts of this source"
    ):
        trainer_of(chats, tmp_path, None, settings={"completion_only_loss": False}, **how)


def mixture(**settings):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return MixtralForCausalLM(
        MixtralConfig(vocab_size=300, num_key_value_heads=2, num_local_experts=4, **size, **settings)
    )


def test_a_mixture_of_experts_learns_by_the_loss_alone_whatever_sfttrainer_adds(labeled, exported, tmp_path):
    """TRL 1.16 turns the balance of their load on in every one; it was then refused, with an advice that changed nothing."""
    model = mixture()
    found, losses = run(trainer_of(labeled, tmp_path, exported, model))
    assert (model.config.output_router_logits, model.config.router_aux_loss_coef) == (False, 0.001)
    plain = {"train_sampling_strategy": "sequential", "max_steps": 2}
    expected, ours = trained(labeled, tmp_path, mixture(), settings=plain)
    assert_same(found, expected, **ROUNDING)
    assert losses == pytest.approx(ours, rel=1e-5)
    mixture().save_pretrained(tmp_path / "mixture")
    named = trainer_of(labeled, tmp_path, exported, str(tmp_path / "mixture"))
    assert named.model.config.output_router_logits is False
    for model in (mixture(output_router_logits=True), str(tmp_path / "balanced")):
        mixture(output_router_logits=True).save_pretrained(tmp_path / "balanced")
        with pytest.raises(SpecError, match="output_router_logits = True: the balance"):
            trainer_of(labeled, tmp_path, exported, model)


def test_a_held_out_source_is_evaluated_as_its_rows(labeled, exported, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    held_out = open_text(labeled[1], split="eval")
    rows = to_hf_dataset(None, held_out)
    trainer = trainer_of(labeled, tmp_path, exported, eval_dataset={"source": held_out, "rows": rows})
    found = trainer.evaluate()
    assert found["eval_source_loss"] == found["eval_rows_loss"] > 0
    with pytest.raises(ConfigError, match=r"DistillSFTTrainer\.predict: .* use evaluate\(\)"):
        trainer.predict(rows)


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_datasets_of_texts_are_refused(labeled, exported, tmp_path, name):
    texts = Dataset.from_dict({"text": ["a", "b"]})
    with pytest.raises(ConfigError, match=rf"{name} has no input_ids and labels; .* found columns text"):
        trainer_of(labeled, tmp_path, exported, **{name: texts})
    with pytest.raises(ConfigError, match=rf"{name} has no input_ids and labels; .* found list"):
        trainer_of(labeled, tmp_path, exported, **{name: ["a"]})


def test_a_collator_of_the_user_is_refused(labeled, exported, tmp_path):
    with pytest.raises(ConfigError, match="data_collator would be ignored"):
        trainer_of(labeled, tmp_path, exported, data_collator=list)


def test_what_is_no_argument_of_that_kind_is_refused(labeled, exported, tmp_path):
    with pytest.raises(ConfigError, match="args: expected an SFTConfig; found TrainingArguments"):
        DistillSFTTrainer(llama(), TrainingArguments(str(tmp_path)), cache=labeled[2], source=None)
    with pytest.raises(ConfigError, match=r"processing_class: missing, .* pass load_tokenizer"):
        DistillSFTTrainer(llama(), arguments(tmp_path), cache=labeled[2], source=None)
    with pytest.raises(ConfigError, match=r"source: expected one that is open; found \w+; pass open_source"):
        to_hf_dataset(labeled[2], labeled[1])
    with pytest.raises(
        ConfigError, match=r"cache: expected one that is open; found '.*'; pass open_cache\(URL\)"
    ):
        to_hf_dataset(labeled[2].url, open_text(labeled[1], split="train"))


def test_several_processes_are_refused(labeled, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(SFTConfig, "world_size", property(lambda self: 2))
    with pytest.raises(ConfigError, match="2 processes, which was never tested here"):
        trainer_of(labeled, tmp_path, exported)
