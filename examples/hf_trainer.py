"""A tiny llama learns from a cache, inside transformers' own Trainer.

From the repository's root:

    softcache teacher-logits --config configs/stdlib-lm.toml
    python examples/hf_trainer.py runs/stdlib-lm/cache configs/stdlib-lm.toml runs/hf-trainer
"""

import sys

from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments

from softcache.config.load import load_config
from softcache.data.sources.text.source import load_tokenizer, open_text
from softcache.reader.open import open_cache
from softcache.student.integrations.huggingface import DistillTrainer

url, config, out = sys.argv[1:]
source = load_config(config).source
tokenizer = load_tokenizer(source)
size = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **size))
args = TrainingArguments(out, num_train_epochs=1, per_device_train_batch_size=16, learning_rate=3e-3)

trainer = DistillTrainer(model, args, cache=open_cache(url), source=open_text(source, split="train"),
                         temperature=1.0, alpha=0.9, eval_dataset=open_text(source, split="eval"),
                         processing_class=tokenizer)  # fmt: skip
trainer.train()
trainer.save_model()
print(trainer.evaluate())
