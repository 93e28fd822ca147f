"""The peers' losses and ours on the same numbers: timm's timed, Liger-Kernel's in Triton's interpreter for correctness."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import best
from softcache.labels.sparsify import top_k
from softcache.losses import LossSettings
from softcache.losses.fused import fused_distillation_loss

__all__ = ["liger_differences", "timm_steps"]

TEACHER, STUDENT, SIDE = "timm:resnet18", "test_efficientnet", 32
TEMPERATURE = 4.0


# -- timm --------------------------------------------------------------------------------------------------


def timm_steps(
    samples: int, rounds: int, teacher_model: str = TEACHER
) -> tuple[dict[str, tuple[float, float]], float]:
    """Returns samples per second and per CPU second of epochs by timm's tasks and ours, and how far the losses are apart.

    All train the same student on the same views through timm's `create_loader`: on hard labels, with a live teacher
    (`timm.task.LogitDistillationTask`), and from a cache of that teacher's labels (`TimmLoss`).
    """
    from timm import create_model
    from timm.data import create_loader
    from timm.task import ClassificationTask, LogitDistillationTask

    from softcache import MemmapSettings, open_cache
    from softcache.config.run import RunConfig
    from softcache.data.sources import open_source
    from softcache.runs import capture_labels, open_data
    from softcache.runs.teacher import open_teacher
    from softcache.student.integrations.timm import TimmDataset, TimmImages, TimmLoss

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = RunConfig.model_validate(
            {
                "name": "peers",
                "source": {"name": "digits", "max_train_samples": samples},
                "views": {"size": SIDE, "mean": [0.3], "std": [0.4]},
                "teacher": {"model": teacher_model, "weights": f"{folder}/teacher.safetensors"},
                "labels": {"k": 10, "temperatures": [1.0, TEMPERATURE]},
                "capture": {
                    "evaluate": False,
                    "device": "cpu",
                    "codec": {"name": "open", "values": "float32"},
                },
            }
        )
        data = open_data(config)
        _random_weights(config, data)
        teacher = open_teacher(config, data)
        url = f"{folder}/cache"
        capture_labels(config, data, teacher, url)
        cache = open_cache(url, memmap=MemmapSettings(folder=f"{folder}/memmaps"))
        source = open_source(config.source, split="train")
        cached, plain = TimmDataset(source, cache), TimmImages(source, cache)

        def loader(dataset: Any) -> Any:
            how = {"mean": plain.mean, "std": plain.std, "device": torch.device("cpu"), "num_workers": 0}
            return create_loader(dataset, plain.input_size, 64, is_training=True, no_aug=True, **how)

        def student() -> torch.nn.Module:
            torch.manual_seed(1)
            model = create_model(STUDENT, num_classes=10, in_chans=1)
            model.pretrained_cfg["mean"], model.pretrained_cfg["std"] = plain.mean, plain.std
            return model

        live = teacher.model
        live.pretrained_cfg = {"mean": plain.mean, "std": plain.std}
        kept = {
            "temperature": TEMPERATURE,
            "distill_loss_weight": 0.9,
            "task_loss_weight": 0.1,
            "verbose": False,
        }
        models = [student() for _ in range(3)]
        distillation = LogitDistillationTask(models[1], live, **kept)
        ours = TimmLoss(cached, LossSettings(temperature=TEMPERATURE, alpha=0.9))
        hard = ClassificationTask(models[0], verbose=False)
        contenders: dict[str, Callable[[], int]] = {
            "hard labels, ClassificationTask": _epoch(
                models[0], loader(plain), lambda x, y: hard(x, y)["loss"]
            ),
            "live teacher, LogitDistillationTask": _epoch(
                models[1], loader(plain), lambda x, y: distillation(x, y)["loss"]
            ),
            "cache, TimmLoss": _epoch(models[2], loader(cached), lambda x, y: ours(models[2](x), y)),
        }
        apart = _loss_difference(student().eval(), distillation, ours, plain, cached, loader)
        return best(contenders, rounds), apart


def _random_weights(config: Any, data: Any) -> None:
    from safetensors.torch import save_file

    from softcache.models.image import build_model

    model = build_model(config.teacher.model, num_classes=10, input_shape=(1, SIDE, SIDE))
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, config.teacher.weights
    )


def _epoch(
    model: torch.nn.Module, loader: Any, loss: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[], int]:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def run() -> int:
        count = 0
        model.train()
        for images, targets in loader:
            optimizer.zero_grad()
            loss(images, targets).backward()
            optimizer.step()
            count += len(images)
        return count

    return run


def _loss_difference(
    student: torch.nn.Module, theirs: Any, ours: Any, plain: Any, cached: Any, loader: Any
) -> float:
    """Returns the largest relative difference of the two losses on the first batches of an order."""

    def batches(dataset: Any) -> Iterator[tuple[Tensor, Tensor]]:
        torch.manual_seed(2)
        found = loader(dataset)
        for number, batch in enumerate(found):
            if number == 4:
                return
            yield batch

    theirs.trainable_module, kept = student, theirs.trainable_module
    found = []
    with torch.no_grad():
        for (images, targets), (same, rows) in zip(batches(plain), batches(cached), strict=True):
            torch.testing.assert_close(images, same, rtol=0, atol=0)
            expected = float(theirs(images, targets)["loss"])
            found.append(abs(float(ours(student(same), rows)) / expected - 1))
    theirs.trainable_module = kept
    return max(found)


# -- Liger-Kernel ------------------------------------------------------------------------------------------


def liger_differences(folder: str | None) -> dict[str, dict[str, float] | str]:
    """Returns by loss how far Liger's is from ours in value and gradients, or why it did not run; in a process of its own.

    Args:
        folder: where the package `liger_kernel` is; None: it is installed.
    """
    path = os.pathsep.join([*filter(None, [folder]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "benchmarks.peer_losses"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(
        command,
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"Liger-Kernel": done.stderr.strip().splitlines()[-1]}
    found: dict[str, dict[str, float] | str] = json.loads(done.stdout.splitlines()[-1])
    return found


def _compare_liger() -> dict[str, dict[str, float] | str]:
    """Values and gradients of the losses with K = V and T = 2; Liger leaves out the factor T^2."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    from liger_kernel.transformers import (
        LigerFusedLinearCrossEntropyLoss,
        LigerFusedLinearJSD,
        LigerKLDIVLoss,
    )

    random = torch.Generator().manual_seed(0)
    hidden, theirs = torch.randn(2, 24, 16, generator=random)
    head, their_head = torch.randn(2, 80, 16, generator=random)
    hidden.requires_grad_(), head.requires_grad_()
    targets = torch.randint(0, 80, (24,), generator=random)
    labels = top_k(theirs @ their_head.T, k=80, temperatures=(1.0, 2.0))

    def ours(loss: str) -> Callable[[], Tensor]:
        how: dict[str, Any] = {"temperature": 2.0, "alpha": 1.0, "loss": loss}
        return lambda: fused_distillation_loss(hidden, head, labels, targets, **how) / 4

    def hard() -> Tensor:
        return fused_distillation_loss(hidden, head, None, targets, temperature=1.0, alpha=0.0)

    def fused(beta: float) -> Callable[[], Tensor]:
        liger = LigerFusedLinearJSD(jsd_beta=beta, temperature=2.0)
        return lambda: liger(hidden, head, theirs, their_head, None)

    def kl_div() -> Tensor:
        log_probs = [torch.log_softmax(x / 2, dim=-1) for x in (hidden @ head.T, theirs @ their_head.T)]
        return LigerKLDIVLoss(reduction="batchmean", log_target=True)(*log_probs)

    chunked = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, temperature=2.0, compiled=False
    )
    pairs: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "LigerFusedLinearJSD, beta = 0: forward_kl": (fused(0.0), ours("forward_kl")),
        "LigerFusedLinearJSD, beta = 1: reverse_kl": (fused(1.0), ours("reverse_kl")),
        "LigerFusedLinearJSD, beta = 0.5: jsd": (fused(0.5), ours("jsd")),
        "LigerFusedLinearJSDLoss (no Triton): jsd": (
            lambda: chunked(hidden, head, theirs, their_head, targets),
            ours("jsd"),
        ),
        "LigerKLDIVLoss: forward_kl": (kl_div, ours("forward_kl")),
        "LigerFusedLinearCrossEntropyLoss: hard labels": (
            lambda: LigerFusedLinearCrossEntropyLoss()(head, hidden, targets),
            hard,
        ),
    }
    found: dict[str, dict[str, float] | str] = {}
    for name, pair in pairs.items():
        try:
            values = [_value_and_gradients(loss, hidden, head) for loss in pair]
        except Exception as error:  # of the interpreter, not of the loss
            found[name] = f"does not run in the interpreter: {error}".splitlines()[0]
            continue
        found[name] = {
            what: float(((a - b).abs().max() / b.abs().max()).detach())
            for what, a, b in zip(("value", "hidden", "head"), *values, strict=True)
        }
    return found


def _value_and_gradients(loss: Callable[[], Tensor], hidden: Tensor, head: Tensor) -> list[Tensor]:
    hidden.grad = head.grad = None
    value = loss()
    value.backward()
    assert hidden.grad is not None
    assert head.grad is not None
    return [value.detach(), hidden.grad, head.grad]


if __name__ == "__main__":
    print(json.dumps(_compare_liger()))
