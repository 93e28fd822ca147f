"""The label record: a teacher's distributions, kept in a few numbers, good at every temperature.

record.py      the record
checks.py      what its arrays must be
softening.py   the record at one temperature
sampling.py    records whose classes were drawn at random, and what a drawn class weighs
joining.py     several records made into one
slimming.py    a record of fewer classes from one of more
"""

from pipeline.labels.joining import collect, concat
from pipeline.labels.record import ARRAYS, STATS, SoftLabels
from pipeline.labels.sampling import Sampling
from pipeline.labels.slimming import slimmed
from pipeline.labels.softening import SoftenedLabels
from pipeline.tail import DEFAULT_TEMPERATURES

__all__ = [
    "ARRAYS",
    "DEFAULT_TEMPERATURES",
    "STATS",
    "Sampling",
    "SoftLabels",
    "SoftenedLabels",
    "collect",
    "concat",
    "slimmed",
]
