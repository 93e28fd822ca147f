"""Digits with several properties each, as a source of images that have any number of classes."""

import numpy as np

from softcache.data.sources import open_source

__all__ = ["PROPERTIES", "counted", "digits", "matrix"]

PROPERTIES = {
    "even": {0, 2, 4, 6, 8},
    "prime": {2, 3, 5, 7},
    "large": {5, 6, 7, 8, 9},
    "square": {0, 1, 4, 9},
    "round": {0, 6, 8, 9},
}


def digits(split):
    """Returns the first digits of a split; 1 has one property, 3 one, 8 three."""
    limits = {"max_train_samples": 24, "max_eval_samples": 12}
    source = open_source({"name": "digits", **limits}, split=split)
    hot = [[digit in members for members in PROPERTIES.values()] for digit in source.targets().tolist()]
    source.multi_hot = np.array(hot, np.uint8)
    source.num_classes, source.class_names = len(PROPERTIES), tuple(PROPERTIES)
    source._targets = source.multi_hot.sum(1).astype(np.int64)
    return source


def matrix(split):
    """Returns digits whose targets are what should be `multi_hot`."""
    source = digits(split)
    source._targets = source.multi_hot
    return source


def counted(split):
    """Returns digits whose `multi_hot` has a 2."""
    source = digits(split)
    source.multi_hot[0, 0] = 2
    return source
