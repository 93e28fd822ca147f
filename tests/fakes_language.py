"""Language models for tests: tiny, of a fixed seed, or with a fault."""

import torch
from torch import nn

from softcache.models.language import build_language_model


def _seeded(vocab_size, context, spec="gpt2?width=16&depth=1&heads=2", scale=8.0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        model = build_language_model(spec, vocab_size=vocab_size, context=context)
        with torch.no_grad():  # fresh weights are all but uniform; a teacher has opinions
            model.get_output_embeddings().weight.mul_(scale)
    return model


def known(vocab_size, context):
    return _seeded(vocab_size, context)


def known_scaled(vocab_size, context):
    return _seeded(vocab_size, context, scale=5.0)


def padded(vocab_size, context):
    """A head of more rows than the tokenizer has tokens, as models are padded for speed."""
    return _seeded(vocab_size + 20, context)


def headless(vocab_size, context):
    return nn.Linear(4, 4)


def _untied(vocab_size, context, *, bias):
    model = _seeded(vocab_size, context)
    old = model.get_output_embeddings()
    head = nn.Linear(old.in_features, old.out_features, bias=bias)
    with torch.no_grad():
        head.weight.copy_(old.weight)
        if bias:
            head.bias.zero_()
    model.config.tie_word_embeddings = False
    model.set_output_embeddings(head)
    return model


def padded_quietly(vocab_size, context):
    """A padded head whose padding has next to no probability, as of a model that was trained."""
    model = _untied(vocab_size + 20, context, bias=True)
    with torch.no_grad():
        model.get_output_embeddings().bias[vocab_size:] = -40.0
    return model


def nan_logits(vocab_size, context):
    """Gives NaN from the first occurrence of the last token of the vocabulary on."""
    model = _untied(vocab_size, context, bias=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[-1] = float("nan")
    return model


def masked_class(vocab_size, context):
    """A model that never predicts token 5."""
    model = _untied(vocab_size, context, bias=True)
    with torch.no_grad():
        model.get_output_embeddings().bias[5] = -torch.inf
    return model
