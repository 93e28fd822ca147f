"""How much of its teacher a cache holds, and what other label policies and codecs would hold in how many bytes.

rerun.py      the teacher again, on random rows of a cache
truth.py      the teacher's distributions at one temperature, and their sums
measures.py   a record against the truth: divergences, the tail, the gradient that a student would see
frontier.py   records of every policy and codec, made of the same logits: bytes against error
figure.py     the frontier as a figure
report.py     the figures of a cache, together
"""

from pipeline.fidelity.figure import draw_frontier
from pipeline.fidelity.frontier import num_points
from pipeline.fidelity.report import measure_cache
from pipeline.fidelity.rerun import Rerun, rerun_teacher

__all__ = ["Rerun", "draw_frontier", "measure_cache", "num_points", "rerun_teacher"]
