"""Teachers whose answers are known: pure functions of the pixels, no weights file, no training."""

import os
import signal
import time
from pathlib import Path

import torch
from torch import nn


class KnownTeacher(nn.Module):
    """Logits are fixed cosines of the image: the same on every run, different for every image and class."""

    def __init__(self, num_classes: int, size: int, scale: float = 3.0) -> None:
        super().__init__()
        grid = torch.arange(num_classes * size, dtype=torch.float32).reshape(num_classes, size)
        self.register_buffer("weight", torch.cos(grid * 0.7) * scale / size**0.5)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return images_BCHW.flatten(1) @ self.weight.T


class FaultyTeacher(KnownTeacher):
    """Gives a bad logit to one image in `every`, chosen by its content."""

    def __init__(self, num_classes: int, size: int, value: float) -> None:
        super().__init__(num_classes, size)
        self.value = value

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        logits = super().forward(images_BCHW)
        chosen = images_BCHW.flatten(1).sum(1) == images_BCHW.flatten(1).sum(1).max()
        logits[chosen, 0] = self.value
        return logits


def known(num_classes, input_shape):
    channels, height, width = input_shape
    return KnownTeacher(num_classes, channels * height * width)


def known_scaled(num_classes, input_shape):
    channels, height, width = input_shape
    return KnownTeacher(num_classes, channels * height * width, scale=4.0)


class NearestMean(nn.Module):
    """Minus half the squared distance of a digit to the mean of each class, in the order `classes` of outputs."""

    def __init__(self, classes: list[int]) -> None:
        super().__init__()
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = torch.from_numpy(digits.data).float() / 16
        means = torch.stack([pixels[digits.target == number].mean(0) for number in classes])
        self.register_buffer("weight", 3 * means)
        self.register_buffer("bias", -1.5 * means.square().sum(1))

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        flat = images_BCHW.flatten(1)
        flat = flat - flat.amin(1, keepdim=True)
        return (flat / flat.amax(1, keepdim=True)) @ self.weight.T + self.bias


def nearest_mean(num_classes, input_shape):
    return NearestMean(list(range(num_classes)))


def nearest_mean_reversed(num_classes, input_shape):
    return NearestMean(list(range(num_classes))[::-1])


def nan_teacher(num_classes, input_shape):
    channels, height, width = input_shape
    return FaultyTeacher(num_classes, channels * height * width, float("nan"))


def inf_teacher(num_classes, input_shape):
    channels, height, width = input_shape
    return FaultyTeacher(num_classes, channels * height * width, float("inf"))


def masking_teacher(num_classes, input_shape):
    channels, height, width = input_shape
    return FaultyTeacher(num_classes, channels * height * width, float("-inf"))


def wrong_head(num_classes, input_shape):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes + 2))


def inverting_transform():
    return lambda image: 255 - image


class PoisonedTeacher(KnownTeacher):
    """Raises on one image, known by its first logit: whatever batch it comes in."""

    def __init__(self, num_classes: int, size: int, poison: float) -> None:
        super().__init__(num_classes, size)
        self.poison = poison

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        logits_BV = super().forward(images_BCHW)
        if (logits_BV[:, 0] - self.poison).abs().min() < 1e-5:
            raise RuntimeError("cannot digest this image")
        return logits_BV


def poisoned(num_classes, input_shape, poison):
    channels, height, width = input_shape
    return PoisonedTeacher(num_classes, channels * height * width, poison)


class DeadlyTeacher(PoisonedTeacher):
    """Kills its own process on that image."""

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        try:
            return super().forward(images_BCHW)
        except RuntimeError:
            os.kill(os.getpid(), signal.SIGKILL)
            raise


def deadly(num_classes, input_shape, poison):
    channels, height, width = input_shape
    return DeadlyTeacher(num_classes, channels * height * width, poison)


class HangingTeacher(PoisonedTeacher):
    """Sleeps for an hour on that image."""

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        try:
            return super().forward(images_BCHW)
        except RuntimeError:
            time.sleep(3600)
            raise


def hanging(num_classes, input_shape, poison):
    channels, height, width = input_shape
    return HangingTeacher(num_classes, channels * height * width, poison)


class DyingTeacher(KnownTeacher):
    """Kills its own process, as the kernel would for want of memory, as long as there are lives in a folder."""

    def __init__(self, num_classes: int, size: int, lives: str) -> None:
        super().__init__(num_classes, size)
        self.lives, self.calls = Path(lives), 0

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > 3:
            for life in sorted(self.lives.iterdir())[:1]:
                life.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images_BCHW)


def dying(num_classes, input_shape, lives):
    channels, height, width = input_shape
    return DyingTeacher(num_classes, channels * height * width, lives)


class SlowTeacher(KnownTeacher):
    """Takes a twentieth of a second for a batch."""

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return super().forward(images_BCHW)


def slow(num_classes, input_shape):
    channels, height, width = input_shape
    return SlowTeacher(num_classes, channels * height * width)
