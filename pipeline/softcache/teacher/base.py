"""A frozen teacher: batches in, float32 logits out chunk by chunk, label records at the end.

A chunk is as many rows of logits as are held at once: for images a whole batch, for tokens a part of one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from softcache.cache.codecs import CODECS, Codec, CodecSettings, OpenSettings, VectorCodec
from softcache.cache.codecs.vectors import HeadFacts, Vector
from softcache.data.batch import Dataset
from softcache.errors import ConfigError
from softcache.hashing.digests import digest_weights
from softcache.labels import MixedTargets, OutputHead, SoftLabels, VectorLabels, collect
from softcache.labels.sparsify import Hidden, LabelSettings, logit_faults, record_faults
from softcache.models.language.placement import WholeState, is_placed
from softcache.models.spec import architecture_of
from softcache.models.weights import count_parameters
from softcache.runtime.files import expand_home
from softcache.settings import Settings
from softcache.teacher.engines.base import AnyEngineSettings, TransformersSettings

__all__ = ["ClassVotes", "Dtype", "RowScores", "Teacher", "TeacherFacts", "TeacherSettings"]

Dtype = Literal["float32", "bfloat16", "float16"]


class TeacherSettings(Settings):
    """[teacher]: what labels the data, and the engine that runs a language model.

    With `test_time_augmentation = "flip"` the labels of an image are the mean of the probabilities of the image and of its
    mirror image.

    Attributes:
        model: its spec, such as `timm:resnet50`, `hf:NAME_OR_PATH` or `package.module:factory`.
        weights: a file of weights, `.safetensors` or a checkpoint that holds tensors alone; none: those that the spec
            names.
        class_map: a file that maps the classes of the teacher to those of the data.
        check_class_order: whether a teacher whose guesses would be right if classes were exchanged is refused; false: it is
            logged, and kept in the manifest.
        engine: what runs a language model.
    """

    model: str
    weights: str | None = None
    class_map: str | None = Field(None, min_length=1)
    check_class_order: bool = True
    test_time_augmentation: Literal["flip"] | None = None
    engine: AnyEngineSettings = TransformersSettings()

    @field_validator("weights")
    @classmethod
    def _expand_home(cls, given: str | None) -> str | None:
        return None if given is None else expand_home(given)

    @model_validator(mode="after")
    def _check_placement(self) -> TeacherSettings:
        if getattr(self.engine, "placement", None) is None:
            return self
        if not self.model.startswith("hf:") or self.weights is not None:
            raise ValueError(
                "engine.device_map, engine.tp_plan: expected a model that transformers loads (hf:NAME_OR_PATH, no weights "
                f"file); found {self.model!r}{' with weights' if self.weights else ''}; save_pretrained it, or drop them"
            )
        return self


class TeacherFacts:
    """What a cache's manifest holds of the teacher of its labels, also of one of which only the name is known.

    Attributes:
        spec: the model spec it was built from.
        num_classes: V.
        num_parameters: scalars in its parameters.
        weights_digest: sha256 over its state dict, independent of the file format.
        architecture: names what the weights are put into, wherever they come from; see `architecture_of`. None: unknown.
        dtype: of its autocast.
    """

    spec: str
    num_classes: int
    num_parameters: int = 0
    weights_digest: str = "unknown"
    architecture: str | None = None
    dtype: str = "unknown"

    def __init__(self, spec: str, num_classes: int) -> None:
        self.spec, self.num_classes = spec, num_classes

    def identity(self) -> dict[str, dict[str, Any]]:
        """Returns the teacher's part of a cache's identity."""
        names = ("spec", "weights_digest", "architecture", "dtype")
        facts = {name: getattr(self, name) for name in names}
        return {"teacher": {name: fact for name, fact in facts.items() if fact is not None}}

    def class_names(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the names of the classes that it labels, of the source's."""
        return names

    @property
    def head_identity(self) -> dict[str, Any]:
        """What names the head of a cache of hidden states; nothing of a teacher of which only the name is known."""
        return {}

    def codec(self, k: int, labels: LabelSettings, settings: CodecSettings) -> Codec:
        """Returns the codec of a cache of its labels.

        Args:
            k: the slots of a label row.
            settings: of `[capture.codec]`.

        Raises:
            ConfigError: codec, policy or temperatures are not for the labels of such a teacher.
            LabelError: more is to be kept than there is.
        """
        kind = CODECS.get(settings.name)
        if "image" not in kind.kinds or not kind.captures_softmax:
            whose = "independent classes'" if "image" in kind.kinds else "a detector's"
            raise ConfigError(f"capture.codec: {settings.name!r} is of {whose} labels; choose open or packed")
        make: Callable[..., Codec] = kind
        return make(
            num_classes=self.num_classes,
            k=k,
            temperatures=labels.temperatures,
            stats=labels.statistics == "all",
            sampling=labels.sampling,
            **settings.parameters(),
        )


class RowScores(NamedTuple):
    """How well the rows of a batch are predicted.

    Attributes:
        loss: sum of their negative log-likelihoods, nats.
        correct: how many are right at the first guess.
        guesses_P: [P] int64, the likeliest class of each.
        guess_loss: sum of the negative log-likelihoods of these, nats, where outputs have names.
    """

    loss: float
    correct: int
    guesses_P: torch.Tensor
    guess_loss: float = 0.0


class ClassVotes(NamedTuple):
    """First guesses that are independent of each other, by which another order of classes shows.

    Attributes:
        targets_P, guesses_P: ground truths, and the classes that are guessed, int64.
        loss: mean negative log-likelihood of these guesses, nats.
    """

    targets_P: torch.Tensor
    guesses_P: torch.Tensor
    loss: float


class Teacher(TeacherFacts, ABC):
    """A module in evaluation mode with its device and autocast dtype.

    Attributes:
        has_row_scores: whether each row has one ground-truth class, by which `score` scores it.
        has_named_outputs: whether outputs stand for classes that a source may have in another order (`votes`).
        fewest_samples: that such an order is looked for on, where the split has them.
        has_states: whether it is seen as a backbone and a head: `states`, `output_head`.

    Args:
        weights_digest: of the model; None: digested now. It is to be taken before the model's first forward pass:
            bitsandbytes' layers of 4 bits, on a CPU, are repacked by the first pass, and what `state_dict` then leaves of
            them computes other logits.
    """

    has_row_scores = True
    has_named_outputs = False
    fewest_samples = 0
    has_states = False

    def __init__(
        self,
        model: nn.Module,
        *,
        spec: str,
        num_classes: int,
        device: torch.device,
        dtype: Dtype,
        weights_digest: str | None = None,
    ) -> None:
        super().__init__(spec, num_classes)
        self.device, self.dtype = device, dtype
        self.num_parameters = count_parameters(model)
        self.weights_digest = weights_digest or digest_weights(WholeState(model))
        self.architecture = architecture_of(model, spec)
        self.model = (model if is_placed(model) else model.to(device)).eval().requires_grad_(False)

    def autocast(self) -> AbstractContextManager:
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.dtype))

    def codec(self, k: int, labels: LabelSettings, settings: CodecSettings) -> Codec:
        if not labels.of_states:
            return super().codec(k, labels, settings)
        assert isinstance(labels, Hidden)
        if settings != OpenSettings():
            raise ConfigError(
                f"capture.codec: {settings.name!r} is of classes; hidden states are kept as labels.values has it; drop the "
                "table"
            )
        head = self.output_head()
        size = labels.size(head.weight.shape[1])
        facts = HeadFacts(float(head.logit_scale), None if head.softcap is None else float(head.softcap))
        return VectorCodec(self.num_classes, (("hidden", Vector(size, labels.values)),), facts)

    @abstractmethod
    def chunks(self, batch: Any) -> Iterator[torch.Tensor]:
        """Yields float32 logits [p, V] on the teacher's device, which together cover the batch's rows in order.

        Raises:
            LabelError: the model returns something of another shape.
        """

    def states(self, batch: Any) -> Iterator[torch.Tensor]:
        """Yields the inputs [p, D] of the head, which together cover the batch's rows in order; see `output_head`."""
        raise self._no_states()

    def output_head(self) -> OutputHead:
        """Returns the linear layer that makes logits of hidden states, in the dtype that it is multiplied in.

        Raises:
            ConfigError: such a teacher is not seen as a backbone and a head.
        """
        raise self._no_states()

    def _no_states(self) -> ConfigError:
        return ConfigError(
            f'labels.policy: "hidden" keeps the input of a language model\'s head; teacher {self.spec} has none; '
            'use "dense", which keeps every class, or another policy'
        )

    @cached_property
    def head_identity(self) -> dict[str, Any]:
        """What names the head of a cache of hidden states."""
        head = self.output_head()
        tensors = {name: x for name, x in (("weight", head.weight), ("bias", head.bias)) if x is not None}
        return {
            "digest": digest_weights(tensors),
            "dtype": str(head.weight.dtype).removeprefix("torch."),
            "size": list(head.weight.shape),
        }

    @torch.inference_mode()
    def label(
        self,
        batch: Any,
        settings: LabelSettings,
        *,
        head: OutputHead | None = None,
    ) -> tuple[Any, torch.Tensor]:
        """Returns the batch's record and the faults [P] uint8 of its logits, on the device, waiting for nothing.

        Args:
            head: of the cache, of coordinates of hidden states.
        """
        if settings.of_states:
            return self._label_states(batch, settings, head)
        targets_P = batch.targets.to(self.device, non_blocking=True)
        if isinstance(targets_P, MixedTargets):
            targets_P = (
                targets_P.first
            )  # the record holds how likely the teacher finds the sample's own class
        faults_P = torch.zeros(batch.num_rows, dtype=torch.uint8, device=self.device)
        seeds_P = settings.row_seeds(batch.fingerprints, batch.row_counts, batch.positions)

        def records() -> Iterator[SoftLabels]:
            start = 0
            for logits_PV in self.chunks(batch):
                rows = slice(start, start + len(logits_PV))
                seeds = None if seeds_P is None else seeds_P[rows]
                record = settings.apply(logits_PV, targets_P=targets_P[rows], seeds_P=seeds, check=False)
                # A bad logit makes its row's statistics NaN; what it was is asked only then, where asking waits for nothing.
                if logits_PV.device.type != "cpu":
                    faults_P[rows] = record_faults(record, logits_PV)
                elif bool(record.stats.isnan().any()):  # type: ignore[union-attr]
                    faults_P[rows] = logit_faults(logits_PV)
                yield record
                start = rows.stop

        return collect(records(), batch.num_rows), faults_P

    def _label_states(
        self, batch: Any, settings: LabelSettings, head: OutputHead | None
    ) -> tuple[VectorLabels, torch.Tensor]:
        assert isinstance(settings, Hidden)
        records, faults = [], []
        for states_PD in self.states(batch):
            records.append(settings.apply_states(states_PD, head))
            faults.append(logit_faults(states_PD.abs()))
        record = records[0] if len(records) == 1 else VectorLabels.concat(records)
        return replace(record, num_classes=self.num_classes), torch.cat(faults)

    @torch.inference_mode()
    def score(self, batch: Any) -> RowScores:
        """Returns how well the rows of a batch are predicted."""
        targets_P = batch.targets.to(self.device, non_blocking=True)
        loss, guess_loss, start, guesses = 0.0, 0.0, 0, []
        for logits_PV in self.chunks(batch):
            wanted = targets_P[start : start + len(logits_PV)]
            loss += float(nn.functional.cross_entropy(logits_PV, wanted, reduction="sum"))
            guesses.append(logits_PV.argmax(-1))
            if self.has_named_outputs:
                guess_loss += float(nn.functional.cross_entropy(logits_PV, guesses[-1], reduction="sum"))
            start += len(logits_PV)
        guesses_P = torch.cat(guesses) if guesses else targets_P[:0]
        return RowScores(loss, int((guesses_P == targets_P).sum()), guesses_P.cpu(), guess_loss)

    def votes(self, batch: Any, scored: RowScores | None) -> ClassVotes:
        """Returns the guesses of a batch that are evidence of the order of classes, where outputs have names.

        Args:
            scored: by `score`, where rows have scores.
        """
        assert scored is not None
        return ClassVotes(batch.targets, scored.guesses_P, scored.guess_loss / max(1, batch.num_rows))

    def describe_score(self, accuracy: float, perplexity: float) -> str:
        """Returns in words how well the teacher predicts rows."""
        return f"{accuracy:.2%} right"

    def check_forward(self, batch: Any) -> None:  # most have no other forward pass
        """Checks on a batch that `chunks` gives what the model's own forward pass does, where that is another one.

        Raises:
            LabelError: it does not.
        """

    def scores(
        self,
        data: Dataset,
        *,
        batches: Iterable[range],
        progress: Callable[[int], None] = lambda samples: None,
    ) -> dict[str, Any]:
        """Returns the manifest's metrics of the teacher: here, its accuracy and loss on a split's plain view.

        Args:
            batches: the samples to score, a batch each.
            progress: called with the number of samples of each batch.
        """
        loss, correct, rows = 0.0, 0, 0
        for samples in batches:
            batch = data.load(samples, 0, fingerprints=False)
            scored = self.score(batch)
            loss, correct, rows = loss + scored.loss, correct + scored.correct, rows + batch.num_rows
            progress(len(batch.samples))
        # A masked class that is the truth costs +inf, and a faulty teacher is refused when it labels.
        return {"eval_accuracy": correct / rows, "eval_loss": loss / rows if math.isfinite(loss) else None}
