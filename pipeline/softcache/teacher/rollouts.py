"""Rollouts of a causal language model on a text's prompts, written as a source of their own (`text/rollouts`).

    generation.json  what is being made, from what and how; written first, never replaced
    tokenizer/…      the one that made the ids
    train/00000.jsonl  a part: so many prompts, in the source's order; put whole
    eval.jsonl       the held-out documents as they are, to score students on
    manifest.json    generation.json and the sha256 of every part; written last

The policy is a student, whose rollouts the teacher labels afterwards like any other text; or the teacher, whose responses a
student is fine-tuned on first.

References:
    Wu, Han, Cai 2026, "Lightning OPD", arXiv 2604.13010: teacher log-probabilities stored once over the student's rollouts.
    Kim and Rush 2016, "Sequence-Level Knowledge Distillation", arXiv 1606.07947 (of the teacher's own responses).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from softcache.cache.storage.base import Objects
from softcache.data.sources.text.rollouts import ROLLOUTS_KIND, ROLLOUTS_VERSION
from softcache.data.sources.text.special_tokens import end_tokens
from softcache.data.tokens import TokenData
from softcache.errors import SourceError
from softcache.hashing.digests import digest_json
from softcache.models.language.sample import RolloutSettings, SampledResponse, sample_responses
from softcache.teacher.generate import GenerateReport, lines, write_source
from softcache.teacher.language import LanguageTeacher

__all__ = ["Prompt", "PromptData", "generate_rollouts", "prompts_of", "rollout_prompts"]


class PromptData(Protocol):
    """What has prompts: the data of a run on text."""

    train: TokenData
    evaluation: TokenData

    @property
    def tokenizer(self) -> Any: ...
    def identity(self) -> dict[str, Any]: ...
    def save_tokenizer(self, folder: Path) -> None: ...


class Prompt(NamedTuple):
    """The given part of a document, and what follows it there.

    Attributes:
        key: of the sample, and the number of the document in it.
        tokens: [L] int64.
        answer: [T] int64, the first run of learned tokens.
    """

    key: str
    tokens: np.ndarray
    answer: np.ndarray


def prompts_of(data: TokenData, prompt_tokens: int) -> Iterator[Prompt]:
    """Yields the prompts of the documents of a source, in order.

    Args:
        prompt_tokens: of a document without a given part, so many of its first tokens.
    """
    source = data.source
    num_prefix = len(source.prefix)
    for number in range(len(source)):
        sample = source.sample(number)
        for segment in range(int(sample.segments[-1]) + 1):
            inside = sample.segments == segment
            tokens, learnt = sample.tokens[inside].astype(np.int64), sample.learnt[inside]
            if not learnt.any():
                continue
            start = int(learnt.argmax())
            if start <= num_prefix:
                start = num_prefix + prompt_tokens
            after = np.flatnonzero(~learnt[start:])
            stop = start + int(after[0]) if len(after) else len(tokens)
            if start < stop:
                yield Prompt(f"{source.key(number)}#{segment}", tokens[:start], tokens[start:stop])


def rollout_prompts(data: PromptData, settings: RolloutSettings) -> list[Prompt]:
    """Returns the prompts of the training split that leave room for a response, each as often as it is sampled from.

    Raises:
        SourceError: there is none.
    """
    seq_len = data.train.source.seq_len
    prompts = [
        prompt
        for prompt in prompts_of(data.train, settings.prompt_tokens)
        if len(prompt.tokens) < seq_len
        for _ in range(settings.num_samples)
    ]
    if not prompts:
        raise SourceError(
            f"source {data.train.source.name}: no document has a prompt and {seq_len} tokens of source.seq_len in which a "
            "response fits; raise source.seq_len, or lower rollouts.prompt_tokens"
        )
    return prompts


def generate_rollouts(
    objects: Objects,
    data: PromptData,
    policy: LanguageTeacher,
    settings: RolloutSettings,
    prompts: Sequence[Prompt],
    *,
    sft_teacher: Mapping[str, Any] | str,
    progress: Callable[[int], None] = lambda prompts: None,
) -> GenerateReport:
    """Writes what a policy samples after the prompts of the training split, and the held-out documents.

    Args:
        prompts: those of `rollout_prompts`.
        sft_teacher: the teacher that the policy was fine-tuned on: its spec and weights_digest, or "none" or "unknown".

    Raises:
        IdentityError: something else is being written there, or was.
        SourceError: there is something else than rollouts, or a stop token is none.
    """
    seq_len = data.train.source.seq_len
    ends = _end_tokens(data.tokenizer, settings)

    def part(numbers: np.ndarray) -> bytes:
        chosen = [prompts[number] for number in numbers.tolist()]
        order = np.argsort([len(prompt.tokens) for prompt in chosen], kind="stable")
        found: dict[int, SampledResponse] = {}
        for start in range(0, len(order), settings.batch_size):
            places = order[start : start + settings.batch_size].tolist()
            seed = int(digest_json([settings.seed, int(numbers[0]), start])[:15], 16)
            batch = [chosen[place].tokens for place in places]
            with policy.autocast():
                drawn = sample_responses(
                    policy.model,
                    policy.parts,
                    batch,
                    max_tokens=[min(settings.max_tokens, seq_len - len(tokens)) for tokens in batch],
                    end_tokens=ends,
                    vocab_size=data.train.source.vocab_size,
                    temperature=settings.temperature,
                    seed=seed,
                )
            found.update(zip(places, drawn, strict=True))
        return lines(
            _line(prompt, found[place], number % settings.num_samples, data)
            for place, (prompt, number) in enumerate(zip(chosen, numbers.tolist(), strict=True))
        )

    held_out = lines(
        {"key": prompt.key, "prompt": prompt.tokens.tolist(), "response": prompt.answer.tolist()}
        for prompt in prompts_of(data.evaluation, settings.prompt_tokens)
    )
    plan = {
        "kind": ROLLOUTS_KIND,
        "version": ROLLOUTS_VERSION,
        "policy": {"spec": policy.spec, "weights_digest": policy.weights_digest, "dtype": policy.dtype},
        "sft_teacher": sft_teacher,
        "source": {"name": data.train.source.name, **data.identity()},
        "rollouts": {
            **settings.model_dump(mode="json", exclude={"policy", "policy_weights", "sft_teacher"}),
            "end_tokens": sorted(ends),
        },
    }
    return write_source(
        objects,
        plan,
        part,
        num_rows=len(prompts),
        part_rows=settings.part_prompts * settings.num_samples,
        held_out=held_out,
        save_tokenizer=data.save_tokenizer,
        written="response",
        rows="rollouts",
        progress=progress,
    )


def _line(prompt: Prompt, found: SampledResponse, repeat: int, data: PromptData) -> dict[str, Any]:
    return {
        "key": f"{prompt.key}/{repeat}",
        "prompt": prompt.tokens.tolist(),
        "response": found.tokens.tolist(),
        "log_probs": [round(min(float(x), 0.0), 6) for x in found.log_probs],
        "finished": found.is_finished,
        "text": data.tokenizer.decode(found.tokens.tolist()),
    }


def _end_tokens(tokenizer: Any, settings: RolloutSettings) -> set[int]:
    ends = set(end_tokens(tokenizer))
    known = tokenizer.get_vocab()
    for token in settings.stop_tokens:
        if token not in known:
            raise SourceError(
                f"rollouts.stop_tokens: {token!r} is no token of the tokenizer; name one as it is in its vocabulary"
            )
        ends.add(int(known[token]))
    return ends
