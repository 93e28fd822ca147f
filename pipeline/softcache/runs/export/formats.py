"""A served model as files: torch.export's `.pt2`, and ONNX of the same exported program, with dynamic axes."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from softcache.errors import SpecError
from softcache.student.tasks.inference import Serving

__all__ = ["export_program", "write_onnx", "write_pt2"]

MAX_PARAMETER_BYTES = 2**31 - 2**24
"""An ONNX file is one protobuf message, which ends at 2 GiB; beyond it weights would lie in a second file."""


@contextmanager
def _exporting(what: str, to: str) -> Iterator[None]:
    """Turns whatever an exporter raises into one line, and keeps its chatter off stderr."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    except SpecError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise SpecError(
            f"student {what}: cannot be exported to {to}: {type(error).__name__}: {reason}; nothing was written for it; "
            "train a student of operations that export, such as cnn, mlp or timm:resnet18"
        ) from error
    finally:
        logger.setLevel(level)


def export_program(serving: Serving, example: torch.Tensor, *, name: str) -> torch.export.ExportedProgram:
    """Returns the model's graph, from its input to its logits, for every size of its dynamic axes.

    Args:
        example: an input of at least two rows (a size of one would be taken as fixed).
        name: of the student, for messages.

    Raises:
        SpecError: the model holds what torch.export cannot follow, or has too many bytes for one ONNX file.
    """
    held = sum(p.numel() * p.element_size() for p in serving.module.parameters())
    if held > MAX_PARAMETER_BYTES:
        raise SpecError(
            f"student {name}: {held:,} bytes of parameters; an ONNX file holds at most {MAX_PARAMETER_BYTES:,}; export a "
            "smaller student"
        )
    axes: dict[int, Any] = {
        axis: torch.export.Dim(label, min=1, max=most) if most else torch.export.Dim(label, min=1)
        for axis, (label, most) in serving.dynamic.items()
    }
    with _exporting(name, "torch.export"):
        return torch.export.export(serving.module, (example,), dynamic_shapes=(axes,), strict=False)


def write_pt2(
    program: torch.export.ExportedProgram, path: Path, *, name: str, metadata: Mapping[str, str]
) -> None:
    """Writes the program; `torch.export.load(path).module()` runs it, and it holds `metadata.json` as an extra file."""
    with _exporting(name, "torch.export"):
        torch.export.save(program, path, extra_files={"metadata.json": json.dumps(dict(metadata))})


def write_onnx(
    program: torch.export.ExportedProgram,
    path: Path,
    *,
    serving: Serving,
    name: str,
    metadata: Mapping[str, str],
) -> None:
    """Writes the program as ONNX, checked by onnx.checker.

    Args:
        metadata: its `metadata_props`.

    Raises:
        SpecError: an operation has no ONNX form.
    """
    import onnx

    axes = {axis: label for axis, (label, _) in serving.dynamic.items()}
    with _exporting(name, "ONNX"):
        written = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=[serving.input_name], output_names=["logits"]
        )
        assert written is not None
        model = written.model_proto
        for axis, label in axes.items():
            _rename(model, model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param, label)
        onnx.helper.set_model_props(model, dict(metadata))
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)


def _rename(model: Any, old: str, new: str) -> None:
    """Renames an axis as the model card names it, in inputs, outputs and what lies between."""
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        for dim in value.type.tensor_type.shape.dim:
            if old and dim.dim_param == old:
                dim.dim_param = new
