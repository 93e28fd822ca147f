"""A finished student as files that others run: exported, quantized, run again and measured.

formats.py      torch.export and ONNX, of one program
quantize.py     int8 from ONNX, by onnxruntime
benchmark.py    agreement, held-out scores, FLOPs, latency in turns
teacher.py      the teacher, compared with a student that has other inputs
folder.py       the directory: identity, digests, atomic files
description.py  class names and preprocessing, as other libraries read them
model_card.py   the table, and the card in Markdown
run.py          all of that for one run
"""

from softcache.runs.export.model_card import latency_table, measurement_note, model_table
from softcache.runs.export.run import ExportSettings, check_drop, export_run, load_onnxruntime

__all__ = [
    "ExportSettings",
    "check_drop",
    "export_run",
    "latency_table",
    "load_onnxruntime",
    "measurement_note",
    "model_table",
]
