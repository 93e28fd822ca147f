"""The benchmark of faults that are mended shows each of them, and that it is gone."""

import torch

from benchmarks.language_faults import changed_weights, head_errors, without_prompt


def test_whole_chats_have_their_prompts_and_cut_ones_do_not():
    assert without_prompt(600, 1024, "packed")[0] > 0.2
    bare, full = without_prompt(600, 1024, "best_fit")
    assert bare == 0
    assert full > 0.95


def test_a_rounded_head_is_wrong_where_its_accumulator_is_right():
    errors = head_errors(rows=16, width=64, classes=500)
    assert errors["rounded to bfloat16"][0] > 1000 * errors["float32 accumulator"][0]


def test_half_precision_weights_hardly_change():
    assert changed_weights(torch.bfloat16, steps=5) < 0.2
    assert changed_weights(torch.float32, steps=5) > 0.95
