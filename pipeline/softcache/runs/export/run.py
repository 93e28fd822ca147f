"""Exports and quantizes the student of a finished run, runs it from its files, and measures it against its teacher.

Finished files are kept; existing figures are read from distill.json.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcache.data.batch import Dataset
from softcache.errors import RunError, missing_extra
from softcache.hashing.digests import digest_weights
from softcache.models.weights import count_parameters
from softcache.runs.export.benchmark import (
    Model,
    compare_models,
    count_flops,
    first_inputs,
    in_batches,
    load_onnx,
    load_pt2,
    measure_latency,
    requests,
    run_module,
)
from softcache.runs.export.description import describe, metadata_of, write_companions
from softcache.runs.export.folder import ExportFolder
from softcache.runs.export.formats import export_program, write_onnx, write_pt2
from softcache.runs.export.model_card import write_card
from softcache.runs.export.quantize import quantize
from softcache.runs.export.teacher import load_teacher_for_comparison
from softcache.runs.report.load import Report, Run
from softcache.student.tasks.inference import Serving

__all__ = [
    "EXPORTED",
    "FLOAT_FILES",
    "INT8_FILE",
    "ExportSettings",
    "check_drop",
    "check_tolerance",
    "export_run",
    "load_onnxruntime",
]

FLOAT_FILES = ("student.onnx", "student.pt2")
INT8_FILE = "student.int8.onnx"
EXPORTED = (*FLOAT_FILES, INT8_FILE)
LATENCY_BATCHES = (1, 32)
CALIBRATION_BATCH = 32


@dataclass(frozen=True)
class ExportSettings:
    """How an export is made and judged.

    Attributes:
        tolerance: of the fp32 files' logits, relative to the student's largest logit (at least 1).
        rounds: timed calls of each model and batch size.
        calibration_samples: of the training split, for static quantization.
    """

    tolerance: float = 1e-4
    rounds: int = 100
    calibration_samples: int = 256


def load_onnxruntime() -> None:
    """Imports what exporting needs.

    Raises:
        MissingExtraError: a package of the extra is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_extra(error, "exporting a student") from error


def export_run(
    report: Report,
    run: Run,
    out: str | Path,
    settings: ExportSettings,
    *,
    cost: dict[str, Any] | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Writes a run's student to `out` in every form; returns the figures of distill.json.

    Args:
        report: the run, opened, with its data and, where its weights are there, its teacher.
        cost: what the student cost, stored with the figures.
        progress: called with what is done next.

    Raises:
        SpecError: the student holds what cannot be exported.
        RunError: a file of fp32 differs from torch by more than the tolerance, or `out` holds another student.
        CorruptionError: a finished file is not what was written.
    """
    load_onnxruntime()
    task, model = report.student(run)
    serving = task.serve(model)
    identity = {
        "student": run.model,
        "labels": run.labels,
        "weights": digest_weights(serving.module.state_dict()),
        "data": report.data.identity() | _student_data(run),
        "calibration_samples": settings.calibration_samples if serving.quantization == "static" else None,
    }
    folder = ExportFolder(out, identity)
    with folder.locked():
        figures: dict[str, Any] | None = folder.read_json("distill.json")
        if figures is None:
            description = describe(report, run, serving)
            write_companions(folder, task, model, run.model, description)
            metadata = metadata_of(run.model, description)
            _write_files(report, run, serving, folder, settings, metadata, progress)
            progress("measuring")
            figures = _measure(report, run, serving, folder, settings) | description | {"cost": cost or {}}
        check_tolerance(figures, settings.tolerance, folder.path)
        folder.make_json("distill.json", figures)
        files = {name: folder.files[name] for name in EXPORTED}
        folder.make("README.md", lambda path: write_card(path, figures, files))
    return figures


def _write_files(
    report: Report,
    run: Run,
    serving: Serving,
    folder: ExportFolder,
    settings: ExportSettings,
    metadata: dict[str, str],
    progress: Callable[[str], None],
) -> None:
    missing = [name for name in EXPORTED if name not in folder.files]
    if not missing:
        return
    progress("torch.export")
    own = report.data_of(run)
    example = first_inputs(own.evaluation, serving, 2)
    if {*FLOAT_FILES} & {*missing}:
        program = export_program(serving, example, name=run.model)
        folder.make("student.pt2", lambda path: write_pt2(program, path, name=run.model, metadata=metadata))
        progress("ONNX")
        folder.make(
            "student.onnx",
            lambda path: write_onnx(program, path, serving=serving, name=run.model, metadata=metadata),
        )
    progress(f"int8 ({serving.quantization})")
    source = folder.path / "student.onnx"
    samples = _calibration(own.train, serving, settings.calibration_samples)
    folder.make(
        INT8_FILE, lambda path: quantize(source, path, serving=serving, samples=samples, name=run.model)
    )


def _student_data(run: Run) -> dict[str, Any]:
    return {"student_data": run.identity["student_data"]} if run.identity.get("student_data") else {}


def _calibration(data: Dataset, serving: Serving, count: int) -> Iterator[np.ndarray]:
    """Yields inputs of samples spread evenly over the training split."""
    samples = np.unique(np.linspace(0, len(data) - 1, min(count, len(data))).astype(np.int64))
    for request in requests(serving, data, samples, CALIBRATION_BATCH):
        yield request.inputs.numpy()


def _measure(
    report: Report, run: Run, serving: Serving, folder: ExportFolder, settings: ExportSettings
) -> dict[str, Any]:
    threads, data = torch.get_num_threads(), report.data_of(run).evaluation
    models: dict[str, Model] = {"student": run_module(serving.module)}
    for name in EXPORTED:
        path = folder.path / name
        is_onnx = path.suffix == ".onnx"
        models[name] = (
            load_onnx(path, input_name=serving.input_name, threads=threads) if is_onnx else load_pt2(path)
        )
    example = first_inputs(data, serving, max(LATENCY_BATCHES))
    teacher = load_teacher_for_comparison(report, run)
    if teacher is not None and not teacher.is_apart:
        models["teacher"] = teacher.model
    scores = compare_models(models, in_batches(serving, data, report.data.num_classes), reference="student")
    calls = {name: (model, example) for name, model in models.items()}
    if teacher is not None:
        inputs = first_inputs(teacher.data, teacher.serving, len(example))
        calls["teacher"] = teacher.model, inputs
        if teacher.is_apart:
            scores["teacher"] = teacher.scores(models["student"], serving, data)
    latencies = {
        rows: measure_latency(
            {name: partial(model, inputs[:rows].contiguous()) for name, (model, inputs) in calls.items()},
            rounds=settings.rounds,
        )
        for rows in LATENCY_BATCHES
    }
    sizes = _sizes(report, run, folder)
    rows = {}
    for name, (_, inputs) in calls.items():
        of = teacher.serving if teacher is not None and name == "teacher" else serving
        rows[name] = asdict(scores[name]) | {
            "bytes": sizes[name],
            "parameters": count_parameters(of.module),
            "flops": count_flops(of, inputs),
            "latency_seconds": {str(batch): asdict(found[name]) for batch, found in latencies.items()},
        }
    shapes = {name: list(inputs.shape[1:]) for name, (_, inputs) in calls.items()}
    return {
        "student": run.model,
        "teacher": report.teacher.spec if report.teacher is not None else None,
        "teacher_missing": report.missing.get("teacher"),
        "metric": _metric(run),
        "classes": report.data.num_classes,
        "input": {
            "name": serving.input_name,
            "contract": serving.contract,
            "latency_shape": shapes["student"],
            "teacher_latency_shape": shapes.get("teacher"),
        },
        "quantization": serving.quantization,
        "machine": _machine(threads),
        "models": rows,
    }


def _metric(run: Run) -> str:
    return "eval_loss" if "perplexity" in run.metrics else "accuracy"


def _sizes(report: Report, run: Run, folder: ExportFolder) -> dict[str, int]:
    sizes = {name: folder.files[name]["bytes"] for name in EXPORTED}
    # Of a student with adapters, model.safetensors holds those alone; what is served is the merged model.
    adapted = (run.path / "adapter").is_dir()
    files = (run.path / "hf").glob("*.safetensors") if adapted else [run.path / "model.safetensors"]
    sizes["student"] = sum(file.stat().st_size for file in files)
    if report.teacher is not None:
        settings = report.config.teacher
        weights = settings.weights if settings is not None else None
        held = sum(p.numel() * p.element_size() for p in report.teacher.model.parameters())
        sizes["teacher"] = Path(weights).stat().st_size if weights else held
    return sizes


def _machine(threads: int) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    versions = {package: version(package) for package in ("torch", "onnx", "onnxruntime")}
    return {"cpu": name, "threads": threads, **versions}


def check_tolerance(figures: dict[str, Any], tolerance: float, out: Path) -> None:
    """Raises where a file of fp32 is not the student.

    Raises:
        RunError: a logit differs by more than the tolerance.
    """
    for name in FLOAT_FILES:
        row = figures["models"][name]
        allowed = tolerance * max(1.0, row["largest_logit"])
        if row["max_difference"] > allowed:
            raise RunError(
                f"export {out / name}: a logit differs by {row['max_difference']:.3g} from the torch student "
                f"{figures['student']}, more than {allowed:.3g} (--tolerance {tolerance:g} of the largest logit, "
                f"{row['largest_logit']:.3g}); {100 * row['same_predictions']:.2f}% of the predictions are the same; the "
                "file is kept, find the cause before using it"
            )


def check_drop(figures: dict[str, Any], max_drop: float, out: str | Path) -> None:
    """Raises where int8 costs too much.

    Args:
        max_drop: points of accuracy that int8 may lose against the student (of token accuracy for language models).

    Raises:
        RunError: it loses more.
    """
    rows = figures["models"]
    drop = 100 * (rows["student"]["accuracy"] - rows[INT8_FILE]["accuracy"])
    if drop > max_drop:
        raise RunError(
            f"export {Path(out) / INT8_FILE}: accuracy {100 * rows[INT8_FILE]['accuracy']:.2f}%, the student "
            f"{100 * rows['student']['accuracy']:.2f}%: {drop:.2f} points lost, more than --max-drop {max_drop:g}; "
            "every file is kept; use student.onnx, or allow more"
        )
