"""The label record: a teacher's distributions, kept in a few numbers, good at every temperature from 1 up.

soft_labels.py          the record
bernoulli.py            the record of a sigmoid head: a logit per kept class
detection.py            the record of a detector: either of the two at cells of a grid, with boxes
vectors.py              the record of vectors, such as a teacher's hidden states, and their encodings
base.py                 what all of them show, and how they are indexed
arrays.py               what each of them does to its arrays
validate.py             what its arrays must be
temperature.py          the record at one temperature
sampling.py             records whose classes were drawn at random, and what a drawn class weighs
join.py                 several records made into one
mixed_targets.py        the ground truth of images that are mixtures of two
class_order.py          whether labels are of the classes in another order
truncate.py             a record of fewer classes from one of more
"""

from softcache.labels.bernoulli import BernoulliLabels, SoftenedBernoulli
from softcache.labels.detection import COLUMNS, DetectionLabels, concat_labels
from softcache.labels.join import collect, concat
from softcache.labels.mixed_targets import MixedTargets
from softcache.labels.positions import LabelKind
from softcache.labels.sampling import Sampling
from softcache.labels.soft_labels import ARRAYS, STATS, SoftLabels
from softcache.labels.tail import DEFAULT_TEMPERATURES
from softcache.labels.temperature import SoftenedLabels
from softcache.labels.truncate import truncate_labels
from softcache.labels.vectors import ENCODINGS, OutputHead, VectorLabels, encode_vectors

__all__ = [
    "ARRAYS",
    "COLUMNS",
    "DEFAULT_TEMPERATURES",
    "ENCODINGS",
    "STATS",
    "BernoulliLabels",
    "DetectionLabels",
    "LabelKind",
    "MixedTargets",
    "OutputHead",
    "Sampling",
    "SoftLabels",
    "SoftenedBernoulli",
    "SoftenedLabels",
    "VectorLabels",
    "collect",
    "concat",
    "concat_labels",
    "encode_vectors",
    "truncate_labels",
]
