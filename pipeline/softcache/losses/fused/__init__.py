"""Losses through a language model's head, from its hidden states: [P, V] logits are never held.

    distillation.py   the losses, as a student's training calls them
    hidden.py         the losses of a teacher's hidden states, through both heads
    evaluate.py       likelihood and correctness, for evaluation

    rows.py           the positions that count: checked once, and how much each weighs
    head.py           a chunk of hidden states to logits
    soft.py           the soft losses: a student's masses in the labels' buckets to a value and its slopes
    chunk.py          a chunk of logits to its loss and, in place, to the gradient of that loss
    autograd.py       that gradient to those of hidden states, weight and bias, all in the forward pass

Beside the gradients themselves, kept in float32, that takes, with P positions, width D and V classes,

    chunk x V x 4 bytes x (1 + 1 where both parts are on at T != 1, or the tail is spread + 1 for a softcap
                             + 1 for standardised logits + 1/2 in half precision)

where chunk x V is 2^23: at most 32 or 64 MiB in the usual cases, whatever P. On a GPU it is 2^26, and with kernels in Triton
(`gpu.py`) 256 MiB and half of that for a gradient in half precision are all. (In half precision the product
that is added to the head's gradient is one more [V, D] of 4 bytes, and so is, on a CPU, the head.) Logits of half-precision
inputs keep the float32 accumulator.
Three matrix products per chunk are as many as autograd needs, and all else happens in place: on two cores it
takes 0.93 (0.63 to 0.97) of the time of dense cross-entropy on the full logits, without a teacher, at P = 1024,
D = 256, V = 32768 (`python -m benchmarks.fused`).
"""

from softcache.losses.fused.distillation import fused_distillation_loss, fused_uld_loss
from softcache.losses.fused.evaluate import token_scores
from softcache.losses.fused.hidden import fused_hidden_loss

__all__ = ["fused_distillation_loss", "fused_hidden_loss", "fused_uld_loss", "token_scores"]
