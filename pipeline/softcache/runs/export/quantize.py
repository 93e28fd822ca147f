"""int8 from an ONNX file, by onnxruntime: static QDQ with calibrated activations, or dynamic.

Static: weights int8 per channel, activations uint8 with the ranges seen on samples of the training split. Dynamic: weights
int8, the ranges of activations taken from each input.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from softcache.errors import SpecError
from softcache.student.tasks.inference import Serving

__all__ = ["count_int8_weights", "quantize"]


def quantize(source: Path, path: Path, *, serving: Serving, samples: Iterable[np.ndarray], name: str) -> None:
    """Writes `source`, an ONNX file, with int8 weights and the same metadata to `path`.

    Args:
        samples: inputs [N, ...] of the training split; read where quantization is static.

    Raises:
        SpecError: nothing in the graph can be quantized.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            inputs = next(self._left, None)
            return None if inputs is None else {serving.input_name: inputs}

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{os.getpid()}.quantize.") as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        if serving.quantization == "static":
            quantize_static(
                prepared,
                path,
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                weight_type=QuantType.QInt8,
                activation_type=QuantType.QUInt8,
            )
        else:
            quantize_dynamic(
                prepared, path, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm", "Gather"]
            )
    quantized = onnx.load(path)
    onnx.helper.set_model_props(
        quantized,
        {entry.key: entry.value for entry in onnx.load(source, load_external_data=False).metadata_props},
    )
    onnx.save(quantized, path)
    if not count_int8_weights(path):
        raise SpecError(
            f"student {name}: onnxruntime found nothing to quantize in it; "
            "student.onnx and student.pt2 are there and finished"
        )


def count_int8_weights(path: Path) -> int:
    """Returns how many weights of an ONNX file are int8 (scalars, zero points not counted)."""
    import onnx

    held = onnx.load(path).graph.initializer
    return sum(
        int(np.prod(tensor.dims))
        for tensor in held
        if tensor.data_type == onnx.TensorProto.INT8 and not tensor.name.endswith("zero_point")
    )
