"""Compares models: predictions on the held-out split, latency, FLOPs.

Latency: all models have the same number of threads, and the same inputs unless teacher and student read different ones;
after a warm-up they run in turns, so that load on the machine affects all of them, and the median and the quartiles of
many rounds are reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from softcache.data.batch import Dataset
from softcache.errors import CorruptionError, RunError
from softcache.student.tasks.inference import Request, Serving

__all__ = [
    "Agreement",
    "Latency",
    "Model",
    "compare_models",
    "count_flops",
    "first_inputs",
    "in_batches",
    "load_onnx",
    "load_pt2",
    "measure_latency",
    "requests",
    "run_module",
]

Model = Callable[[torch.Tensor], torch.Tensor]
MAX_ELEMENTS = 2**23  # of one batch of logits
WARM_UP = 5
MIN_ROUNDS = 10


@dataclass
class Agreement:
    """A model's scores on the held-out split, and its agreement with the torch student.

    Attributes:
        accuracy: share of label rows whose likeliest class is the ground truth.
        eval_loss: mean cross-entropy, nats.
        max_difference: of a logit, from the student's; `largest_logit` is the student's largest in absolute value.
        same_predictions: share of rows with the student's likeliest class; None where the rows are not the student's.
    """

    rows: int = 0
    accuracy: float = 0.0
    eval_loss: float = 0.0
    max_difference: float = 0.0
    same_predictions: float | None = 0.0
    largest_logit: float = 0.0


@dataclass(frozen=True)
class Latency:
    """Seconds of one call: the median and the quartiles of so many rounds."""

    median: float
    lower: float
    upper: float
    rounds: int


def run_module(module: nn.Module) -> Model:
    """Returns a torch module as a model to be measured."""

    def run(inputs: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            output: torch.Tensor = module(inputs)
            return output

    return run


def load_pt2(path: Path) -> Model:
    """Returns the model of a `.pt2` file.

    Raises:
        CorruptionError: torch.export cannot read it.
    """
    try:
        return run_module(torch.export.load(path).module())
    except Exception as error:
        raise CorruptionError(
            f"{path}: torch.export cannot load it ({error}); remove it to export anew"
        ) from error


def load_onnx(path: Path, *, input_name: str, threads: int) -> Model:
    """Returns the model of an ONNX file, run by onnxruntime on the CPU with so many threads.

    Raises:
        CorruptionError: onnxruntime cannot read it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise CorruptionError(
            f"{path}: onnxruntime cannot load it ({error}); remove it to export anew"
        ) from error
    return lambda inputs: torch.from_numpy(session.run(None, {input_name: inputs.numpy()})[0])


def requests(serving: Serving, data: Dataset, samples: np.ndarray, batch_size: int) -> Iterator[Request]:
    """Yields samples of a split as the model is asked for them; batches without a label row are left out."""
    for start in range(0, len(samples), batch_size):
        batch = data.load(samples[start : start + batch_size], 0, fingerprints=False)
        if batch.num_rows:
            yield serving.ask(batch)


def in_batches(serving: Serving, data: Dataset, num_classes: int) -> Iterator[Request]:
    """Yields all of a split, in batches whose logits are bounded, whatever the vocabulary and the length."""
    elements = num_classes * max(1, first_inputs(data, serving, 1)[0].numel())
    return requests(serving, data, np.arange(len(data)), max(1, min(64, MAX_ELEMENTS // elements)))


def first_inputs(data: Dataset, serving: Serving, rows: int) -> torch.Tensor:
    """Returns the first inputs of a split, repeated where it has fewer."""
    asked = next(requests(serving, data, np.arange(min(rows, len(data))), rows)).inputs
    return asked.repeat(-(-rows // len(asked)), *[1] * (asked.dim() - 1))[:rows].contiguous()


def compare_models(
    models: Mapping[str, Model], asked: Iterator[Request], *, reference: str
) -> dict[str, Agreement]:
    """Returns each model's scores on all requests, and its agreement with the reference.

    Raises:
        RunError: a model gives logits that are no numbers.
    """
    found = {name: Agreement() for name in models}
    for request in asked:
        wanted_PV = request.logits_of(models[reference](request.inputs))
        for name, model in models.items():
            logits_PV = request.logits_of(model(request.inputs))
            if not bool(torch.isfinite(logits_PV).all()):
                raise RunError(
                    f"{name}: gives logits that are no numbers on the held-out split; it cannot be measured"
                )
            _add(found[name], logits_PV, wanted_PV, request.targets)
    for row in found.values():
        row.accuracy, row.eval_loss = row.accuracy / row.rows, row.eval_loss / row.rows
        row.same_predictions = (row.same_predictions or 0.0) / row.rows
    return found


def _add(row: Agreement, logits_PV: torch.Tensor, wanted_PV: torch.Tensor, targets_P: torch.Tensor) -> None:
    guess_P = logits_PV.argmax(1)
    row.rows += len(logits_PV)
    row.accuracy += int((guess_P == targets_P).sum())
    row.eval_loss += float(nn.functional.cross_entropy(logits_PV.double(), targets_P, reduction="sum"))
    row.same_predictions = (row.same_predictions or 0.0) + int((guess_P == wanted_PV.argmax(1)).sum())
    row.largest_logit = max(row.largest_logit, float(wanted_PV.abs().max()))
    if logits_PV.shape == wanted_PV.shape:  # a teacher's head may be padded to another width
        row.max_difference = max(row.max_difference, float((logits_PV - wanted_PV).abs().max()))


def count_flops(serving: Serving, example: torch.Tensor) -> int:
    """Returns the floating-point operations of one row (a multiplication and an addition are two).

    Counted are matrix products, convolutions and attention, as torch.utils.flop_counter does; what is done per element
    (activations, norms) is not.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        serving.module(example[:1])
    return int(counter.get_total_flops())


def measure_latency(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, max_seconds: float = 20.0
) -> dict[str, Latency]:
    """Returns how long each call of a model takes; rounds end early after `max_seconds`, never below ten."""
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for done in range(rounds):
        if done >= MIN_ROUNDS and time.perf_counter() - began > max_seconds:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    found = {}
    for name, values in seconds.items():
        median, lower, upper = (float(value) for value in np.percentile(values, (50, 25, 75)))
        found[name] = Latency(median, lower, upper, len(values))
    return found
