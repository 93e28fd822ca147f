"""DistillTrainer: the same steps as a loop written by hand, whatever the Trainer's own settings."""

import copy
import inspect
import json
import runpy
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
)

from softcache.cache.finished import FinishedUnits
from softcache.config.load import load_config
from softcache.data.sources.text.source import load_tokenizer, open_text
from softcache.data.sources.text.tokenizer import train_byte_level
from softcache.data.tokens import TokenData
from softcache.errors import (
    AlignmentError,
    ConfigError,
    IdentityError,
    IncompleteCacheError,
    RunError,
    SpecError,
)
from softcache.losses import cross_entropy, distillation_loss
from softcache.models.language import build_language_model, split
from softcache.reader.dataset import HardLabelDataset, SoftLabelDataset
from softcache.reader.open import open_cache
from softcache.runs import capture_labels, open_data, open_teacher
from softcache.student.integrations.huggingface import DistillTrainer
from softcache.student.integrations.huggingface.trainer import RankBatches
from softcache.student.integrations.huggingface.validate import refuse_parallel
from softcache.student.tasks import LossSettings, TokenStudent
from tests.support.process_groups import run_ranks
from tests.support.text_caches import WORDS, text_config

ROOT = Path(__file__).parent.parent.parent
VOCAB, SEQ_LEN = 300, 32
SENTENCE = "the cache keeps what a teacher said of every token so that many students may learn it later on"


def write_config(folder):
    """A TOML with a few dozen short documents, a 300-token BPE and a random teacher."""
    words = SENTENCE.split()
    lines = (" ".join(words[(i * 7 + j * j) % len(words)] for j in range(4 + i % 9)) for i in range(110))
    (folder / "text.txt").write_text("\n\n".join(lines) + "\n")
    teacher = "gpt2?width=16&depth=1&heads=2"
    torch.manual_seed(0)
    state = build_language_model(teacher, vocab_size=VOCAB, context=SEQ_LEN).state_dict()
    save_file({name: 20 * tensor.clone() for name, tensor in state.items()}, folder / "teacher.safetensors")
    (folder / "run.toml").write_text(f"""
[source]
modality = "text"
name = "hf"
path = "{folder / "text.txt"}"
tokenizer = "bpe?vocab_size={VOCAB}"
seq_len = {SEQ_LEN}
data_dir = "{folder / "data"}"
[teacher]
model = "{teacher}"
weights = "{folder / "teacher.safetensors"}"
[labels]
k = 5
[capture]
unit_samples = 20
chunk_samples = 5
batch_size = 8
device = "cpu"
evaluate = false
""")
    return folder / "run.toml"


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    """(folder, source settings, cache), made once and never changed."""
    folder = tmp_path_factory.mktemp("trainer")
    config = load_config(write_config(folder))
    data = open_data(config)
    cache, _ = capture_labels(config, data, open_teacher(config, data), str(folder / "cache"))
    return folder, config.source, cache


def llama(vocab=VOCAB, **settings):
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": vocab, "max_position_embeddings": 64, "initializer_range": 0.2}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes | ids | settings))


def arguments(out, **settings):
    base = {
        "use_cpu": True,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return TrainingArguments(str(out), **base | settings)


def trainer_of(labeled, out, model=None, *, temperature=2.0, alpha=0.7, settings=None, **more):
    _, source, cache = labeled
    return DistillTrainer(
        llama() if model is None else model,
        arguments(out, **settings or {}),
        cache=open_cache(cache.url),
        source=open_text(source, split="train"),
        temperature=temperature,
        alpha=alpha,
        **more,
    )


def trained(*args, **kwargs):
    """Returns (weights, logged losses) of a finished trainer."""
    trainer = trainer_of(*args, **kwargs)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}, losses


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


EXACT = {"rtol": 0, "atol": 0}
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


def dense_logits(model, batch):
    """[P, V], computed for the whole batch at once, unlike in the package."""
    parts = split(model)
    return parts.logits(parts.hidden(batch.tokens, batch.segments).flatten(0, 1)[batch.rows])


# -- the loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.9), (3.0, 1.0), (2.0, 0.0)])
def test_it_takes_the_steps_of_a_loop_written_by_hand(labeled, tmp_path, temperature, alpha):
    sequential = {"train_sampling_strategy": "sequential"}
    found, losses = trained(labeled, tmp_path, temperature=temperature, alpha=alpha, settings=sequential)
    _, source, cache = labeled
    dataset = SoftLabelDataset(open_text(source, split="train"), cache)
    model, expected = llama().train(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _, batch in zip(
        range(3), DataLoader(dataset, batch_size=4, collate_fn=dataset.collate), strict=False
    ):
        how = {"temperature": temperature, "alpha": alpha}
        loss = distillation_loss(dense_logits(model, batch), batch.labels, batch.targets, **how)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_same(found, model.state_dict(), **ROUNDING)
    assert not torch.equal(found["lm_head.weight"], llama().state_dict()["lm_head.weight"])


def test_accumulated_steps_are_one_step_of_the_whole_batch(labeled, tmp_path):
    """A peer divides the loss by the mask twice, and indexes its labels by optimizer step."""
    whole, losses = trained(labeled, tmp_path, settings={"per_device_train_batch_size": 12})
    for pieces in (3, 4):
        settings = {"per_device_train_batch_size": 12 // pieces, "gradient_accumulation_steps": pieces}
        found, found_losses = trained(labeled, tmp_path, settings=settings)
        assert found_losses == pytest.approx(losses, rel=1e-5)
        assert_same(found, whole, **ROUNDING)


def test_a_short_last_batch_counts_by_its_rows(labeled, tmp_path):
    """An epoch's last step may have fewer batches than it accumulates, the last of them smaller."""
    _, source, _ = labeled
    size = len(open_text(source, split="train"))
    assert size % 3
    assert -(-size // 3) % 5
    epoch = {"max_steps": -1, "num_train_epochs": 1}
    pieces = epoch | {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5}
    found, losses = trained(labeled, tmp_path, settings=pieces)
    whole = epoch | {"per_device_train_batch_size": 15}
    expected, expected_losses = trained(labeled, tmp_path, settings=whole)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert_same(found, expected, **ROUNDING)


@pytest.mark.parametrize("family", ["opt", "gemma2"])
def test_other_families_learn_too(labeled, tmp_path, family):
    """OPT has to run one document per row; Gemma caps its logits."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": VOCAB}
    more = {
        "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
        "gemma2": {"head_dim": 8, "num_key_value_heads": 2},
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes, **more[family], max_position_embeddings=64)
    _, losses = trained(
        labeled, tmp_path, AutoModelForCausalLM.from_config(config), settings={"max_steps": 6}
    )
    assert losses[-1] < losses[0]


# -- the Trainer's settings --------------------------------------------------------------------------------


def test_no_setting_drops_the_labels_or_changes_the_steps(labeled, tmp_path):
    """A peer loses its cached columns to remove_unused_columns, which is on by default."""
    expected, losses = trained(labeled, tmp_path, settings={"remove_unused_columns": True})
    for settings in (
        {"remove_unused_columns": False},
        {"activation_checkpointing": True},
        {"dataloader_num_workers": 1},
    ):
        found, found_losses = trained(labeled, tmp_path, settings=settings)
        assert found_losses == losses, settings
        assert_same(found, expected, **EXACT)


def test_bf16_runs_the_loss_in_the_models_autocast(labeled, tmp_path):
    seen = []

    class Spy(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append({parameter.dtype for parameter in model.parameters()})

    _, expected = trained(labeled, tmp_path)
    _, losses = trained(labeled, tmp_path, settings={"bf16": True}, callbacks=[Spy()])
    assert losses != expected
    assert losses == pytest.approx(expected, rel=3e-2)
    assert seen == [{torch.float32}] * 3
    _, losses = trained(labeled, tmp_path, llama().bfloat16())
    assert losses == pytest.approx(expected, rel=3e-2)


def test_a_resumed_run_ends_with_the_same_weights(labeled, tmp_path):
    """From the middle of the second epoch, between two accumulated steps, with dropout."""
    settings = {
        "optim": "adamw_torch",
        "lr_scheduler_type": "linear",
        "gradient_accumulation_steps": 2,
        "max_steps": 9,
        "save_strategy": "steps",
        "save_steps": 8,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    model = llama(attention_dropout=0.2)
    more = {"settings": settings, "eval_dataset": open_text(labeled[1], split="eval")}
    expected, _ = trained(labeled, tmp_path, copy.deepcopy(model), **more)
    trainer = trainer_of(labeled, tmp_path, copy.deepcopy(model), **more)
    steps = -(-len(trainer.get_train_dataloader()) // 2)
    assert steps < 8 < 2 * steps
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert_same(trainer.model.state_dict(), expected, **EXACT)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"per_device_train_batch_size": 2}, "samples of a step 4 there, 2 here"),
        ({"gradient_accumulation_steps": 2}, "samples of a step 4 there, 8 here"),
        ({"seed": 5}, "seed 42 there, 5 here"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last False there, True here"),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, None),
        ({"seed": 5, "ignore_data_skip": True}, None),
    ],
)
def test_a_run_goes_on_in_its_order_or_is_refused(labeled, tmp_path, changed, message):
    """Of another step the Trainer would skip as many: samples come twice in the epoch, and others never."""
    settings = {"num_train_epochs": 1, "max_steps": -1, "save_strategy": "steps", "save_steps": 5}
    first = trainer_of(labeled, tmp_path, settings=settings)
    steps = _counted(first)
    first.train()
    again = trainer_of(labeled, tmp_path, settings=settings | changed)
    rest, resume = _counted(again), str(tmp_path / "checkpoint-5")
    if message is not None:
        with pytest.raises(RunError, match=f"checkpoint of step 5: {message}.* ignore_data_skip=True"):
            again.train(resume_from_checkpoint=resume)
    else:
        again.train(resume_from_checkpoint=resume)
        assert "seed" in changed or rest == steps[5:]


def _another_run(labeled, folder, *, swap=(2, 2), turn=1.0):
    """(folder, source settings, cache) of as many samples as `labeled`, of another text or another teacher."""
    path = write_config(folder)
    texts = [line.split() for line in (folder / "text.txt").read_text().split("\n\n")]
    for words in texts:
        words[2], words[swap[1]] = words[swap[1]], words[2]
    (folder / "text.txt").write_text("\n\n".join(map(" ".join, texts)) + "\n")
    state = load_file(folder / "teacher.safetensors")
    save_file({name: turn * tensor for name, tensor in state.items()}, folder / "teacher.safetensors")
    load_tokenizer(labeled[1]).save_pretrained(folder / "tokenizer")
    config = load_config(path, [f"source.tokenizer={folder / 'tokenizer'}"])
    data = open_data(config)
    cache, _ = capture_labels(config, data, open_teacher(config, data), str(folder / "cache"))
    return folder, config.source, cache


def test_a_run_goes_on_with_its_cache_elsewhere_and_not_with_another(labeled, tmp_path):
    """As many samples of other texts would come twice or never, and another teacher would take over without a word."""
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    whole, _ = trained(labeled, tmp_path / "run", settings=settings)
    for name, change, message in (
        ("elsewhere", {}, None),
        ("teacher", {"turn": -1.0}, r"labels \w+ there, .*which has another teacher"),
        ("text", {"swap": (2, 3)}, "source '.*samples would come twice or never"),
    ):
        (tmp_path / name).mkdir()
        other = trainer_of(
            _another_run(labeled, tmp_path / name, **change), tmp_path / "other", settings=settings
        )
        assert len(other.train_dataset) == 47
        if message is None:
            other.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
            assert_same(other.model.state_dict(), whole, **EXACT)
            continue
        with pytest.raises(RunError, match=f"checkpoint of step 2: {message}"):
            other.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))


def test_the_windows_of_a_checkpoints_order_are_taken_over(labeled, tmp_path):
    """They follow from how much may be memory-mapped, which may be set otherwise when the run goes on."""
    settings = {"num_train_epochs": 1, "max_steps": -1, "save_strategy": "steps", "save_steps": 5}
    first, again = (trainer_of(labeled, tmp_path, settings=settings) for _ in range(2))
    first._order._order.window_blocks = 2
    steps, rest = _counted(first), _counted(again)
    first.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert rest == steps[5:]


def test_what_is_saved_is_the_model_itself(labeled, tmp_path):
    trainer = trainer_of(labeled, tmp_path, processing_class=load_tokenizer(labeled[1]))
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(trainer.model)
    assert_same(loaded.state_dict(), trainer.model.state_dict(), **EXACT)
    assert (tmp_path / "tokenizer.json").exists()


def test_the_model_is_still_an_ordinary_model(labeled, tmp_path):
    model, ids = llama(), torch.arange(8)[None]
    before = model(ids, labels=ids).loss
    first = trainer_of(labeled, tmp_path, model)
    second = trainer_of(labeled, tmp_path, model, temperature=5.0)
    assert torch.equal(model(input_ids=ids, labels=ids).loss, before)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 10)
    double = copy.deepcopy(model)
    nn.init.zeros_(model.lm_head.weight)
    assert not double(ids).logits.eq(0).all()  # a copy runs on its own weights
    (inputs,), _ = first.get_batch_samples(iter(first.get_train_dataloader()), 1, torch.device("cpu"))
    assert first.compute_loss(model, inputs) != second.compute_loss(
        model, inputs
    )  # and each trainer on its own loss


def test_a_model_that_accelerate_has_hooked_learns_too(labeled, tmp_path):
    """A model loaded with a device_map has a forward that is no method of its class."""
    expected, _ = trained(labeled, tmp_path)
    model = llama()
    add_hook_to_module(model, ModelHook())
    found, _ = trained(labeled, tmp_path, model)
    assert_same(found, expected, **EXACT)
    parameters = list(inspect.signature(model.forward).parameters)
    assert parameters == list(inspect.signature(llama().forward).parameters)


def test_every_epoch_sees_every_sample_in_another_order(labeled, tmp_path):
    trainer = trainer_of(labeled, tmp_path)
    loader, orders = trainer.get_train_dataloader(), []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        orders.append([int(sample) for batch in loader for sample in batch.samples])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(len(trainer.train_dataset)))


def test_tokens_are_counted_without_the_padding(labeled, tmp_path):
    trainer = trainer_of(
        labeled, tmp_path, settings={"include_num_input_tokens_seen": "non_padding", "max_steps": 12}
    )
    trainer.train()
    source = open_text(labeled[1], split="train")
    assert len(trainer.get_train_dataloader()) == 12  # one epoch
    assert trainer.state.num_input_tokens_seen == source.num_tokens
    assert trainer.state.total_flos > 0


def test_a_model_can_be_made_by_the_trainer(labeled, tmp_path):
    expected, _ = trained(labeled, tmp_path)
    _, source, cache = labeled
    trainer = DistillTrainer(
        model_init=lambda: llama(),
        args=arguments(tmp_path),
        cache=cache,
        source=open_text(source, split="train"),
        temperature=2,
        alpha=0.7,
    )
    for _ in range(2):
        trainer.train()
        assert_same(trainer.model.state_dict(), expected, **EXACT)


# -- evaluation --------------------------------------------------------------------------------------------


def test_evaluation_is_the_mean_over_all_rows_of_the_split(labeled, tmp_path):
    held_out = open_text(labeled[1], split="eval")
    everything = HardLabelDataset(TokenData(held_out))
    batch = everything.fetch([(sample, 0) for sample in range(len(held_out))])
    with torch.no_grad():
        expected = float(cross_entropy(dense_logits(llama().eval(), batch), batch.targets).mean())
    for settings in ({}, {"per_device_eval_batch_size": 2}, {"dataloader_num_workers": 1}):
        trainer = trainer_of(labeled, tmp_path, eval_dataset=held_out, settings=settings)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    named = trainer_of(labeled, tmp_path, eval_dataset={"one": held_out}).evaluate()
    assert named["eval_one_loss"] == pytest.approx(expected, rel=1e-5)
    assert named["eval_one_perplexity"] == pytest.approx(2.718281828**expected, rel=1e-4)
    assert 0 <= named["eval_one_accuracy"] <= 1
    half = trainer_of(labeled, tmp_path, settings={"bf16_full_eval": True})
    assert half.evaluate(held_out)["eval_loss"] == pytest.approx(expected, rel=2e-2)


def test_evaluation_between_steps_changes_no_step(labeled, tmp_path):
    model, held_out = llama(attention_dropout=0.2), open_text(labeled[1], split="eval")
    expected, _ = trained(labeled, tmp_path, copy.deepcopy(model))
    settings = {"eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer_of(labeled, tmp_path, copy.deepcopy(model), settings=settings, eval_dataset=held_out)
    trainer.train()
    assert_same(trainer.model.state_dict(), expected, **EXACT)
    evaluated = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert len(evaluated) == 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[-1], abs=1e-6)


def test_prediction_is_refused(labeled, tmp_path):
    with pytest.raises(ConfigError, match=r"predict: it would keep the logits .* use evaluate\(\)"):
        trainer_of(labeled, tmp_path).predict(None)


# -- what does not fit -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_changed_sample_stops_the_training(labeled, tmp_path, workers):
    _, source, cache = labeled
    trainer = trainer_of(labeled, tmp_path, settings={"dataloader_num_workers": workers, "max_steps": 40})
    changed = open_text(source, split="train").sample(3).tokens.tobytes()
    table = next(
        path for path in Path(source.data_dir).glob("tokens/*/samples.arrow") if changed in path.read_bytes()
    )
    whole = table.read_bytes()
    try:
        with table.open("r+b") as file:  # in place: size, path and digest stay
            file.seek(whole.index(changed) + 8)
            file.write((7).to_bytes(4, "little"))
        with pytest.raises(AlignmentError, match=r"the teacher saw content .* the student would see"):
            trainer.train()
    finally:
        with table.open("r+b") as file:
            file.write(whole)
    SoftLabelDataset(open_text(source, split="train"), cache)[3]


def test_another_source_or_an_unfinished_cache_is_refused(labeled, tmp_path, shared_cache):
    _, source, cache = labeled
    other = open_text(source, split="eval")
    with pytest.raises(AlignmentError, match="samples were labeled, the source has"):
        DistillTrainer(llama(), arguments(tmp_path), cache=cache, source=other)
    _, data, images = shared_cache
    with pytest.raises(ConfigError, match="labels of kind 'image'; DistillTrainer is for language models"):
        DistillTrainer(llama(), arguments(tmp_path), cache=images, source=data.train)
    half = open_cache(cache.url)
    half._markers = FinishedUnits(half.index, {0: cache.markers[0]}, {})
    with pytest.raises(IncompleteCacheError, match="units are missing; rerun `softcache teacher-logits`"):
        DistillTrainer(llama(), arguments(tmp_path), cache=half, source=open_text(source, split="train"))


def test_a_student_of_another_tokenizer_is_refused(labeled, tmp_path):
    _, source, _ = labeled
    other = load_tokenizer(source.model_copy(update={"tokenizer": "bpe?vocab_size=290"}))
    with pytest.raises(
        IdentityError, match=r"processing_class: its tokenizer .* 290 tokens.* would be read as another"
    ):
        trainer_of(labeled, tmp_path, processing_class=other)
    llama().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    trainer_of(labeled, tmp_path, model)  # no tokenizer there: nothing to compare
    other.save_pretrained(tmp_path / "model")
    with pytest.raises(IdentityError, match=r"model .*/model: its tokenizer"):
        trainer_of(labeled, tmp_path, model)
    with pytest.raises(IdentityError, match=r"model .*/model: its tokenizer"):  # whatever tokenizer is named
        trainer_of(labeled, tmp_path, model, processing_class=load_tokenizer(source))
    fresh = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(IdentityError, match="embeddings are fresh, pass the cache's as processing_class"):
        trainer_of(labeled, tmp_path, fresh)
    trainer_of(labeled, tmp_path, fresh, processing_class=load_tokenizer(source))
    load_tokenizer(source).save_pretrained(tmp_path / "model")
    trainer_of(labeled, tmp_path, model)


def test_the_tokenizer_that_is_saved_begins_texts_as_the_source_did(tmp_path):
    """GPT-NeoX's class makes its template anew when it is loaded: its texts began with nothing."""
    model = json.loads(
        train_byte_level(WORDS, special_tokens=["<s>", "</s>"], vocab_size=300, min_frequency=1).to_str()
    )["model"]
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "</s>"}
    merges = [tuple(merge) for merge in model["merges"]]
    GPTNeoXTokenizer(vocab=model["vocab"], merges=merges, **tokens).save_pretrained(tmp_path / "neox")
    config = text_config(tmp_path, source={"tokenizer": str(tmp_path / "neox"), "bos": True})
    data = open_data(config)
    cache, _ = capture_labels(config, data, open_teacher(config, data), str(tmp_path / "cache"))
    trainer = DistillTrainer(
        llama(cache.num_classes),
        arguments(tmp_path / "out"),
        cache=cache,
        source=data.train,
        processing_class=load_tokenizer(config.source),
    )
    trainer.save_model()
    assert data.train.source.sample(0).tokens[0] == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the teacher")["input_ids"][0] == 0


def test_a_tokenizer_that_begins_texts_otherwise_is_not_saved_next_to_the_student(labeled, tmp_path):
    """Its digest is the same: what is put around a text changes no id of it."""
    _, source, _ = labeled
    other = load_tokenizer(source)
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", other.eos_token_id)]
    )
    with pytest.raises(IdentityError, match=r"processing_class: begins texts with \[0\]; expected \[\]"):
        trainer_of(labeled, tmp_path, processing_class=other)


def test_a_model_of_the_hub_is_compared_by_its_tokenizer_there(labeled, tmp_path, monkeypatch):
    """32,000 tokens are those of several tokenizers; the number of classes does not tell them apart."""
    _, source, _ = labeled
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    there = tmp_path / "models--some--model"
    (there / "refs").mkdir(parents=True)
    (there / "refs" / "main").write_text("0" * 40)
    llama().save_pretrained(there / "snapshots" / ("0" * 40))
    cuts = train_byte_level(
        ["other words " * 99, "zebras"], special_tokens=["<s>"], vocab_size=VOCAB, min_frequency=1
    )
    other = PreTrainedTokenizerFast(tokenizer_object=cuts)
    other.save_pretrained(there / "snapshots" / ("0" * 40))
    model = AutoModelForCausalLM.from_pretrained("some/model")
    for tokenizer in (None, load_tokenizer(source)):
        with pytest.raises(IdentityError, match=r"model some/model.*: its tokenizer"):
            trainer_of(labeled, tmp_path, model, processing_class=tokenizer)
    load_tokenizer(source).save_pretrained(there / "snapshots" / ("0" * 40))
    trainer_of(labeled, tmp_path, model)


def test_a_compiled_forward_is_refused_and_a_compiled_backbone_learns(labeled, tmp_path, monkeypatch):
    """torch.compile would trace the loss, and fails in it."""
    for name in ("BACKEND", "MODE"):
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "")  # which TrainingArguments sets for good
    with pytest.raises(ConfigError, match=r"torch_compile .* model\.model\.compile\(\)"):
        trainer_of(labeled, tmp_path, settings={"torch_compile": True})
    monkeypatch.undo()
    model = llama()
    model.model.compile(backend="eager")
    found, expected = (trained(labeled, tmp_path, one)[0] for one in (model, llama()))
    assert_same(found, expected, **ROUNDING)


@pytest.mark.parametrize(
    ("variable", "value", "settings", "message"),
    [
        ("DYNAMO_BACKEND", "INDUCTOR", {}, r"dynamo_backend .*=inductor.* model\.model\.compile\(\)"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", {}, r"gradient_accumulation_steps .*=4.* expected '1'"),
        ("MIXED_PRECISION", "fp16", {"bf16": True}, r"mixed_precision .*=fp16.* expected 'bf16'"),
        ("USE_PARALLELISM_CONFIG", "true", {}, "parallelism_config does not go with a cache's labels"),
    ],
)
def test_what_accelerate_launch_is_asked_for_and_would_be_ignored_is_refused(
    labeled, tmp_path, monkeypatch, variable, value, settings, message
):
    monkeypatch.setattr("accelerate.parallelism_config.ParallelismConfig.get_device_mesh", lambda *args: None)
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with pytest.raises(ConfigError, match=message):
            trainer_of(labeled, tmp_path, settings=settings)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_what_accelerate_launch_is_asked_for_and_is_done_is_accepted(labeled, tmp_path, monkeypatch):
    for name, value in (("DYNAMO_BACKEND", "NO"), ("MIXED_PRECISION", "bf16"), ("USE_CPU", "True")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        found = trainer_of(labeled, tmp_path, settings={"gradient_accumulation_steps": 2})
        assert found.accelerator.mixed_precision == "bf16"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_processes_that_would_weigh_rows_by_themselves_are_refused(labeled, tmp_path, monkeypatch):
    """A process without a sample in the last batch would divide by none of its rows."""
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(ConfigError, match=r"average_tokens_across_devices False .* leave it out"):
        trainer_of(labeled, tmp_path, settings={"average_tokens_across_devices": False})


def test_a_student_without_a_head_or_with_too_small_a_one_is_refused(labeled, tmp_path):
    with pytest.raises(SpecError, match="no head: expected get_output_embeddings"):
        trainer_of(labeled, tmp_path, nn.Linear(2, 2))
    with pytest.raises(
        SpecError, match=r"head has 290 rows; .* has 300 tokens; resize_token_embeddings\(300\)"
    ):
        trainer_of(labeled, tmp_path, llama(290))
    trained(labeled, tmp_path, llama(320), settings={"max_steps": 1})  # a padded vocabulary is fine
    with pytest.raises(SpecError, match="takes rows of at most 16 tokens; found rows of 32"):
        trainer_of(labeled, tmp_path, llama(max_position_embeddings=16))
    trained(labeled, tmp_path, llama(max_position_embeddings=16), context=16, settings={"max_steps": 1})


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"train_dataset": [1]}, "train_dataset would be ignored; training samples come from `source`"),
        ({"compute_metrics": print}, "compute_metrics would be ignored; .*evaluate"),
        ({"compute_loss_func": print}, "compute_loss_func would be ignored"),
        ({"data_collator": print}, "data_collator would be ignored"),
        ({"eval_dataset": [1]}, "eval_dataset: expected a source of tokens; found list; pass open_text"),
        ({"settings": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor 0.1 would be ignored"),
        ({"settings": {"train_sampling_strategy": "group_by_length"}}, "group_by_length.*shuffled by blocks"),
        ({"settings": {"use_liger_kernel": True}}, "use_liger_kernel replaces the model's forward"),
        ({"loss": {"name": "jsd"}, "temperature": None, "alpha": None}, "loss: expected LossSettings; found"),
        ({"model": "gpt2"}, r"model: expected a module; found 'gpt2'; pass AutoModelForCausalLM"),
        ({"temperature": 0.5}, "temperature: input should be greater than or equal to 1; found 0.5"),
        ({"alpha": 2.0}, "alpha: input should be less than or equal to 1"),
    ],
)
def test_what_would_be_ignored_is_refused(labeled, tmp_path, more, match):
    with pytest.raises(ConfigError, match=match):
        trainer_of(labeled, tmp_path, **more)


def test_an_evaluation_source_of_another_tokenizer_is_refused(labeled, tmp_path):
    other = open_text(labeled[1].model_copy(update={"tokenizer": "bpe?vocab_size=290"}), split="eval")
    with pytest.raises(AlignmentError, match=r"eval_dataset: source .* tokens of another tokenizer"):
        trainer_of(labeled, tmp_path, eval_dataset=other)


# -- several processes, and the example --------------------------------------------------------------------


def _counted(trainer):
    """A list of the samples that count in each step of a trainer, filled while it trains."""
    steps, get = [], trainer.get_batch_samples

    def spy(*args):
        inputs, rows = get(*args)
        steps.append([s for x in inputs if x["num_rows"] for s in x["batch"].samples.tolist()])
        return inputs, rows

    trainer.get_batch_samples = spy
    return steps


def _whole(trainer):
    """The weights of a trainer's model, gathered where processes have a share each."""
    state = trainer.model.state_dict()
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
        for name, value in state.items()
    }


EPOCHS = {"max_steps": -1, "num_train_epochs": 2, "optim": "adamw_torch", "learning_rate": 0.01}
EPOCHS |= {"max_grad_norm": 1.0, "eval_strategy": "epoch"}
CUT = {
    "max_steps": 4,
    "optim": "adamw_torch",
    "learning_rate": 0.01,
    "eval_strategy": "steps",
    "eval_steps": 2,
}


def _rank(rank, labeled, out):
    """Trains by DDP and by FSDP2; returns weights, losses, held-out losses and the samples of each step."""
    folder, source, url = labeled
    held_out = open_text(source, split="eval")

    def run(settings, resume=None):
        settings = settings | {"ddp_backend": "gloo"}
        trainer = trainer_of((folder, source, open_cache(url)), out, settings=settings, eval_dataset=held_out)
        steps = _counted(trainer)
        if trainer.is_fsdp_enabled and resume is None:
            with pytest.raises(ConfigError, match=r"evaluate: .* expected a model that is cut; train first"):
                trainer.evaluate()
        trainer.train(resume_from_checkpoint=resume)
        log = trainer.state.log_history
        kind = type(trainer.model_wrapped).__name__
        return _whole(trainer), log, steps, kind

    found = {"ddp": run(EPOCHS | {"per_device_train_batch_size": 23})}
    # In mid-epoch, accelerate alone would give several ranks the order of the first epoch again.
    late = {"max_steps": 8, "save_strategy": "steps", "save_steps": 7, "per_device_train_batch_size": 4}
    found["late"], found["resumed"] = run(late), run(late, f"{out}/checkpoint-7")
    _gpus_that_are_cpus()
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    settings |= {"fsdp": True, "fsdp_config": {"version": 2}}
    settings |= {"save_strategy": "steps", "save_steps": 2} | CUT
    found["fsdp"] = run(settings)
    found["fsdp-resumed"] = run(settings, f"{out}/checkpoint-2")
    torch.distributed.destroy_process_group()
    return found


def _gpus_that_are_cpus():
    """accelerate cuts a model for several GPUs alone: from here on it takes several CPUs for those."""
    join = PartialState.__init__

    def joined(state, *args, **kwargs):
        join(state, *args, **kwargs)
        if state._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = joined


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 3}, r"seed: 3; 42"),
        ({"cache": "0f"}, r"cache: '0f'; '\w+'"),
        ({"blocks": {"block_samples": 1, "window_blocks": None}}, r"blocks: .*'block_samples': 1"),
    ],
)
def test_processes_of_other_orders_are_refused(labeled, tmp_path, monkeypatch, other, message):
    """Each takes its part of its own order: samples would come twice, and others never."""
    trainer = trainer_of(labeled, tmp_path)
    here = "softcache.runtime.distributed."
    monkeypatch.setattr(here + "num_ranks", lambda: 2)
    monkeypatch.setattr(here + "rank", lambda: 1)
    monkeypatch.setattr(here + "broadcast_from_rank0", lambda value: value | other)
    with pytest.raises(
        RunError, match=rf"process 1 of 2: the run differs .*: {message}.*; give all processes"
    ):
        trainer.train()


def test_two_ranks_take_the_steps_of_one_by_ddp_and_fsdp_and_see_each_sample_once(labeled, tmp_path):
    """47 samples, the last batch of one: a rank without a sample takes part without weight."""
    _, source, cache = labeled
    num_samples = len(open_text(source, split="train"))
    assert num_samples == 47
    ended = run_ranks(tmp_path / "ranks", 2, _rank, (tmp_path, source, cache.url), str(tmp_path))
    assert [end.code for end in ended] == [0, 0], ended
    held_out = open_text(source, split="eval")
    sizes = {"ddp": EPOCHS | {"per_device_train_batch_size": 46}, "fsdp": CUT}
    sizes["fsdp"] = sizes["fsdp"] | {"per_device_train_batch_size": 8}
    for name, settings in sizes.items():
        alone = trainer_of(labeled, tmp_path / "one", settings=settings, eval_dataset=held_out)
        expected_steps = _counted(alone)
        alone.train()
        for end in ended:
            weights, log, _, _ = end.value[name]
            assert_same(weights, alone.model.state_dict(), **ROUNDING)
            for key in ("loss", "eval_loss"):
                expected = [row[key] for row in alone.state.log_history if key in row]
                assert [row[key] for row in log if key in row] == pytest.approx(expected, rel=1e-5)
        both = [sorted(chain(*parts)) for parts in zip(*(end.value[name][2] for end in ended), strict=True)]
        assert both == [sorted(step) for step in expected_steps], "the batches of one process, cut in two"
    steps = [[*chain(*parts)] for parts in zip(*(end.value["ddp"][2] for end in ended), strict=True)]
    assert [len(step) for step in steps] == [46, 1, 46, 1]
    for epoch in (steps[:2], steps[2:]):
        assert sorted(chain(*epoch)) == list(range(num_samples)), "each sample once an epoch"
    first = ended[0].value
    assert (first["ddp"][3], first["fsdp"][3]) == ("DistributedDataParallel", "FSDPLlamaForCausalLM")
    for whole, resumed in (("late", "resumed"), ("fsdp", "fsdp-resumed")):
        assert_same(first[resumed][0], first[whole][0], **EXACT)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"n_gpu": 2},
            "DataParallel does not go with a cache's labels here; start the script with `torchrun",
        ),
        ({"fsdp_version": 1}, r"FSDP version 1 .* set fsdp_config = \{\"version\": 2\}"),
        (
            {"cpu_ram_efficient_loading": True},
            "cpu_ram_efficient_loading leaves the weights .* set it to false",
        ),
        ({"parallelism_config": object()}, "parallelism_config .* cut rows or the head"),
        ({"dispatch_batches": True}, "dispatch_batches .* its own part of the cache"),
    ],
)
def test_ways_to_cut_that_the_loss_does_not_go_through_are_refused(more, message):
    """By what a Trainer knows of them: most of them need several devices to be set up."""
    plugin = SimpleNamespace(**{"fsdp_version": 2, "cpu_ram_efficient_loading": False} | more)
    args = {"n_gpu": 1} | more
    args["accelerator_config"] = SimpleNamespace(dispatch_batches=more.get("dispatch_batches"))
    state = SimpleNamespace(fsdp_plugin=plugin)
    accelerator = SimpleNamespace(state=state, parallelism_config=more.get("parallelism_config"))
    trainer = SimpleNamespace(args=SimpleNamespace(**args), is_fsdp_enabled=True, accelerator=accelerator)
    with pytest.raises(ConfigError, match=message):
        refuse_parallel(trainer)


@pytest.mark.parametrize("num_samples", [1, 7, 8, 47])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_batches_of_ranks_have_each_sample_once_and_are_equally_many(num_samples, num_ranks):
    order = torch.utils.data.SequentialSampler(range(num_samples))
    for drop_last in (False, True):
        parts = [
            list(RankBatches(order, 6, rank=rank, num_ranks=num_ranks, drop_last=drop_last))
            for rank in range(num_ranks)
        ]
        size = num_samples // 6 if drop_last else -(-num_samples // 6)
        assert {len(part) for part in parts} == {size}
        assert len(RankBatches(order, 6, rank=0, num_ranks=num_ranks, drop_last=drop_last)) == size
        seen = [
            sample for step in zip(*parts, strict=True) for part in step for sample in part if sample >= 0
        ]
        assert seen == list(range(num_samples // 6 * 6 if drop_last else num_samples))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_batch_without_padding_has_the_same_loss_and_gradient(labeled, attention):
    _, source, cache = labeled
    data = SoftLabelDataset(open_text(source, split="train"), open_cache(cache.url))
    batch = data.collate([data[number] for number in (3, 11, 20, 46)])
    assert batch.lengths.min() < batch.tokens.shape[1], "some are padded"
    found = []
    for padding_free in (False, True):
        model = llama(attn_implementation=attention)
        settings = LossSettings(temperature=2.0, alpha=0.7)
        student = TokenStudent(model, settings, context=SEQ_LEN, padding_free=padding_free)
        loss = student(batch, batch.labels, 0.7)
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0)
    assert_same(found[1][1], found[0][1], rtol=1e-4, atol=1e-6)


def test_the_example_runs(labeled, tmp_path, monkeypatch, capsys):
    folder, _, cache = labeled
    monkeypatch.setattr(
        sys, "argv", ["hf_trainer.py", cache.url, str(folder / "run.toml"), str(tmp_path / "out")]
    )
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    example = ROOT / "examples" / "hf_trainer.py"
    runpy.run_path(str(example), run_name="__main__")
    assert "eval_loss" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.hidden_size == 96
    assert len(example.read_text().splitlines()) <= 30
