"""The label record: a teacher's distributions, kept in a few numbers, good at every temperature.

record.py      the record
bernoulli.py   the record of a sigmoid head: a logit per kept class
cells.py       the record of a detector: either of the two at cells of a grid, with boxes
arrays.py      what each of them does to its arrays
checks.py      what its arrays must be
alike.py       what those of detectors must be, alone and joined
softening.py   the record at one temperature
sampling.py    records whose classes were drawn at random, and what a drawn class weighs
joining.py     several records made into one
slimming.py    a record of fewer classes from one of more
"""

from pipeline.labels.bernoulli import BernoulliLabels, SoftenedBernoulli
from pipeline.labels.cells import COLUMNS, CellLabels, joined
from pipeline.labels.joining import collect, concat
from pipeline.labels.record import ARRAYS, STATS, SoftLabels
from pipeline.labels.sampling import Sampling
from pipeline.labels.slimming import slimmed
from pipeline.labels.softening import SoftenedLabels
from pipeline.tail import DEFAULT_TEMPERATURES

__all__ = [
    "ARRAYS",
    "COLUMNS",
    "DEFAULT_TEMPERATURES",
    "STATS",
    "BernoulliLabels",
    "CellLabels",
    "Sampling",
    "SoftLabels",
    "SoftenedBernoulli",
    "SoftenedLabels",
    "collect",
    "concat",
    "joined",
    "slimmed",
]
