"""From a config to the things that it names: teacher, cache, trained students, whatever the modality.

    teacher.py   the teacher
    cache.py     its labels
    student.py   who learns from them
    fit.py       one run of the training loop, of a student or of a teacher

The stages (one command each) and the comparisons (many runs each) are written in terms of these.
"""

from softcache.modalities import Data, open_data
from softcache.runs.cache import (
    cache_is_ready,
    capture_estimate,
    capture_labels,
    log_capture,
    log_unit,
    open_labels,
    prepare_cache,
    with_cached_labels,
)
from softcache.runs.fit import slugify
from softcache.runs.student import train_student
from softcache.runs.teacher import (
    format_score,
    make_teacher,
    open_teacher,
    teacher_is_missing,
    train_teacher,
)

__all__ = [
    "Data",
    "cache_is_ready",
    "capture_estimate",
    "capture_labels",
    "format_score",
    "log_capture",
    "log_unit",
    "make_teacher",
    "open_data",
    "open_labels",
    "open_teacher",
    "prepare_cache",
    "slugify",
    "teacher_is_missing",
    "train_student",
    "train_teacher",
    "with_cached_labels",
]
