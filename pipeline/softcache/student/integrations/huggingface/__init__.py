"""Distillation from a token cache inside transformers' own Trainer: any causal language model, your own arguments.

    trainer = DistillTrainer(model, TrainingArguments(...), cache=open_cache(URL), source=open_text(settings, split="train"),
                             temperature=1.0, alpha=0.9, eval_dataset=open_text(settings, split="eval"))
    trainer.train()

`examples/hf_trainer.py` is a whole script. Optimizer, schedule, clipping, checkpoints, logging and callbacks are the
Trainer's. What is ours:

    batches      sample and label rows joined by number, compared by fingerprint; `remove_unused_columns` cannot drop them
    order        shuffled by blocks, so that a chunk of the cache is decoded once per window, not once per sample
    loss         through the head, never [P, V] logits; divided by the label rows of the whole accumulated batch, over
                 all ranks, so that the logged number and the gradient are of one function
    evaluation   mean negative log-likelihood per row of the whole split (not the mean of the batches' means)

The loss runs *inside* the model's own `forward`, which the trainer teaches one more thing: handed a `Call`, it
runs that. So it goes through whatever the Trainer wraps around the model: DDP's gradient averaging, which a call of
the backbone would go around, and mixed precision. `trainer.model` stays the user's model, and everything that saves,
resumes, counts or inspects it works as ever. (A wrapper module in its place would have to be taken off again in
each of those.) Handed anything else, `forward` does what it did.

One device, or one process per device (torchrun, accelerate launch), by DDP, FSDP2 or DeepSpeed (accelerate's own plugins).
Every sample comes once an epoch over all ranks. DataParallel, FSDP1 and ways to cut rows or the head are refused.
"""

from softcache.errors import MissingExtraError

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise MissingExtraError(
        f"softcache.student.integrations.huggingface needs transformers ({error}); pip install 'softcache[text]'"
    ) from error

from softcache.student.integrations.huggingface.dataset import SoftLabelCollator, to_hf_dataset
from softcache.student.integrations.huggingface.trainer import DistillTrainer

__all__ = ["DistillTrainer", "SoftLabelCollator", "to_hf_dataset"]
