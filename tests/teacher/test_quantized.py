"""Saved quantized folders as teachers: labels are those of transformers' own forward pass. `make test-vllm`, which has bitsandbytes."""

import pytest
import torch
import transformers

from softcache.runs import open_data
from tests.support.engine_models import label, load_teacher, save_model
from tests.support.text_caches import text_config

pytestmark = pytest.mark.vllm
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}


@pytest.mark.parametrize(
    "how",
    [FOUR_BITS, FOUR_BITS | {"bnb_4bit_use_double_quant": True}, {"load_in_8bit": True}],
    ids=["nf4", "double", "int8"],
)
def test_labels_are_those_of_a_model_that_was_just_loaded(how, tmp_path):
    saved = save_model(tmp_path / "plain", "llama", intermediate_size=128)  # blocks of 64
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        saved,
        quantization_config=transformers.BitsAndBytesConfig(**how),
        device_map="cpu",
        dtype=torch.float32,
    )
    quantized.save_pretrained(tmp_path / "saved")
    teacher = load_teacher(tmp_path / "saved")
    batch = open_data(text_config(tmp_path)).train.load(range(2))
    labels = label(teacher, batch)

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    wanted = []
    for tokens, segments in zip(batch.tokens, batch.segments, strict=True):
        for segment in segments.unique_consecutive():
            document = tokens[segments == segment]
            with torch.no_grad():
                wanted.append(model(document[None]).logits[0, :, : teacher.num_classes].log_softmax(-1))
    logits = torch.cat(wanted)[batch.rows]
    torch.testing.assert_close(labels.log_probs, logits.gather(1, labels.ids.long()), atol=5e-5, rtol=0)
    assert load_teacher(tmp_path / "saved").weights_digest == teacher.weights_digest
