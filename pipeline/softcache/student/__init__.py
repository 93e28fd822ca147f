"""Train a student: on cached soft labels, on hard labels, or with an online teacher, by one loop.

    build the model from its seed, restore the checkpoint if there is one
    for every epoch: for every batch: split it, sum the weighted gradients, step
    evaluate on the plain view, keep the best, save a checkpoint, stop early if the goal is reached

The step's learning rate, the order of the samples and the view of an epoch are pure functions of the step,
and everything else is in the checkpoint: a run that is killed and run again ends with the same weights.
SIGINT and SIGTERM (`softcache.runtime.signals`) save a checkpoint after the step and end the run.
A batch belongs to the optimizer's step; `accumulation_steps` is only the number of pieces it is split into,
so it never changes which samples meet which labels. So do processes: `batch_size` counts the samples of all of them,
each takes its slice of every batch, and its gradient weighs as much as its rows.

    settings.py   the tables [student] and [train]
    loop.py       one step, one epoch
    run.py        a run: checkpoints, epochs, metrics
"""

from softcache.student.loop import TrainBatches
from softcache.student.run import train
from softcache.student.settings import StudentSettings, TrainSettings
from softcache.student.tasks.base import Task

__all__ = ["StudentSettings", "Task", "TrainBatches", "TrainSettings", "train"]
