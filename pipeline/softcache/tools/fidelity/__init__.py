"""Fidelity of a cache to its teacher, and of other label policies and codecs by their bytes.

teacher_logits.py   the teacher again, on random rows of a cache
reference.py        the teacher's distributions at one temperature, and their sums
metrics.py          soft labels against the reference: divergences, the tail, the gradient that a student would see
frontier.py         records of every policy and codec, made of the same logits: bytes against error
plot.py             the frontier as a figure
report.py           the figures of a cache, together
"""

from softcache.tools.fidelity.frontier import num_points
from softcache.tools.fidelity.plot import draw_frontier
from softcache.tools.fidelity.report import measure_cache
from softcache.tools.fidelity.teacher_logits import Rerun, rerun_teacher

__all__ = ["Rerun", "draw_frontier", "measure_cache", "num_points", "rerun_teacher"]
