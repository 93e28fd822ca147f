"""Students with peft's LoRA: in DistillTrainer and in softcache's own loop, on the backbone and on the head."""

import peft
import pytest
import torch

from softcache.errors import SpecError
from softcache.models.language import check_split, split
from tests.student.test_huggingface_trainer import VOCAB, labeled, llama, trainer_of

__all__ = ["labeled"]  # a fixture

TARGETS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "head too": {"target_modules": ["q_proj", "lm_head"]},
    "head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def adapted(model=None, **how):
    torch.manual_seed(2)
    model = peft.get_peft_model(
        llama() if model is None else model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **how)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # 0 at first, when LoRA does nothing
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("how", TARGETS.values(), ids=TARGETS)
def test_the_parts_give_the_logits_and_gradients_of_the_adapted_model(how):
    model = adapted(**how)
    parts = split(model)
    check_split(model, parts)
    tokens = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    trainable = [p for p in model.parameters() if p.requires_grad]
    expected = model(tokens, use_cache=False).logits
    found = parts.logits(parts.hidden(tokens, None).flatten(0, 1)).view_as(expected)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    wanted = torch.autograd.grad(expected.logsumexp(-1).sum(), trainable)
    for one, other in zip(torch.autograd.grad(found.logsumexp(-1).sum(), trainable), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_what_does_more_than_add_to_the_heads_weight_is_refused():
    with pytest.raises(SpecError, match=r"the adapter of its head has dropout.*modules_to_save"):
        split(adapted(target_modules=["lm_head"], lora_dropout=0.1))
    with pytest.raises(SpecError, match="the adapter of its head is a Linear that does more than add"):
        split(adapted(target_modules=["lm_head"], use_dora=True))
    prompt = peft.get_peft_model(
        llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    with pytest.raises(SpecError, match="PromptTuningConfig puts tokens of its own before the text"):
        split(prompt)


@pytest.mark.parametrize("how", TARGETS.values(), ids=TARGETS)
def test_a_trainer_takes_a_peft_model_and_trains_its_adapters_alone(labeled, tmp_path, how):
    model = adapted(**how)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trainer_of(labeled, tmp_path, model)
    trainer.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed == trainable
    trainer.save_model()
    again = peft.PeftModel.from_pretrained(llama(), tmp_path)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model.eval()(tokens).logits)


def test_a_trainer_takes_a_head_that_is_narrower_than_the_teachers_padded_one(labeled, tmp_path):
    """Of one family of tokenizers, heads of 151,936 and 152,064 rows."""
    _, _, cache = labeled
    identity = cache.manifest.identity["tokenizer"]
    assert identity["vocab_size"] == VOCAB
    wider = cache.num_classes + 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(cache), "num_classes", property(lambda self: wider))
        trainer_of(labeled, tmp_path, llama(vocab=VOCAB))
    with pytest.raises(
        SpecError, match=rf"its head has {VOCAB - 1} rows; the tokenizer of cache .* has {VOCAB} tokens"
    ):
        trainer_of(labeled, tmp_path, llama(vocab=VOCAB - 1))
