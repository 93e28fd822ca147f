"""Finished students of digits whose names are hostile, for the tests of the report."""

import os
from contextlib import contextmanager

import torch

from softcache.data.sources import open_source
from softcache.data.sources.images.base import InMemorySource
from softcache.runs import capture_labels, open_data, open_teacher, train_student
from tests.support.caches import digits_config

HOSTILE = "<script>document.title = 'taken'</script>"


def hostile_source(split):
    """The digits, with a class and keys that would be markup if they were not escaped."""
    plain = open_source({"name": "digits"}, split=split)
    count = 300 if split == "train" else 100
    names = [HOSTILE, *plain.class_names[1:]]
    keys = [f"{key}</script><img src=x onerror=fail()>" for key in plain.keys()[:count]]
    images = torch.stack([plain.image(number) for number in range(count)])
    return InMemorySource(f"hostile/{split}", images, plain.targets()[:count], keys, names)


@contextmanager
def inside(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def make_runs(folder):
    """Writes a cache and four finished runs below `folder`; returns the folder of the runs, relative to it."""
    with inside(folder):
        config = digits_config(
            source={
                "name": "tests.support.report_runs:hostile_source",
                "max_train_samples": None,
                "max_eval_samples": None,
            },
            train={"epochs": 4},
        )
        data = open_data(config)
        cache, _ = capture_labels(config, data, open_teacher(config, data), "runs/test/cache")
        for model in ("linear", "mlp?width=8"):
            train_student(config, data, model=model, labels="cache", cache=cache)
            train_student(config, data, model=model, labels="ground_truth")
    return "runs/test/students"
