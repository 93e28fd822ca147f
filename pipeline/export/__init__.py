"""A finished student as files that others run: exported, quantised, run again and measured.

exporting.py     torch.export and ONNX, of one program
quantizing.py    int8 from ONNX, by onnxruntime
measuring.py     agreement, held-out scores, FLOPs, latency in turns
beside.py        the teacher beside a student that reads something else
folder.py        the directory: identity, digests, atomic files
card.py          the table, and the card in Markdown
running.py       all of that for one run
"""

from pipeline.export.card import latency_table, model_table, note
from pipeline.export.running import ExportSettings, check_drop, export_run, load_onnxruntime

__all__ = [
    "ExportSettings",
    "check_drop",
    "export_run",
    "latency_table",
    "load_onnxruntime",
    "model_table",
    "note",
]
