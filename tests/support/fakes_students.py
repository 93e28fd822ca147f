"""Models that are hard to train by accident: one draws random numbers in every step, one has real parameters."""

from torch import nn

from tests.fakes import known


def restless(num_classes, input_shape):
    """Dropout draws from the global generator, batch norm keeps running statistics: both must survive a kill."""
    channels, height, width = input_shape
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * height * width, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(8, num_classes),
    )


def parametric(num_classes, input_shape, scale=1.0):
    """The known teacher with its weight as a parameter, so that it has a size to compare students with."""
    teacher = known(num_classes, input_shape)
    weight = teacher.weight * scale
    del teacher.weight
    teacher.weight = nn.Parameter(weight)
    return teacher
