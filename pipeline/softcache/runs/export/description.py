"""What the users of an exported file must know of its inputs and outputs, in the formats that they read.

ONNX metadata `class_names` and `preprocessing` (JSON), `metadata.json` in the `.pt2`, both in distill.json and on the card;
and

    preprocessor_config.json   of images: with what transformers' AutoImageProcessor makes the input of student.onnx, where
                               it can; under "softcache" the whole of it. Of timm students transformers makes from
                               config.json the processor of their weights, which normalizes; for student.onnx it is
                               CLIPImageProcessor.from_pretrained("OUT")
    config.json, model.safetensors
                               of timm students: timm.create_model("local-dir:OUT", pretrained=True), with the transform of
                               its pretrained_cfg; transformers' AutoModelForImageClassification and AutoImageProcessor
    tokenizer.json, …          of language models: transformers.AutoTokenizer.from_pretrained("OUT")

Where a side is longer than the centre by an odd number of pixels, timm begins the centre as `geometry = "torchvision"` does
and transformers as "floor" does: of the other geometry, theirs may be one pixel beside the student's.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from softcache.data.transforms import Views
from softcache.data.transforms.student import StudentViews
from softcache.models.spec import parse_spec
from softcache.runs.export.folder import ExportFolder
from softcache.runs.report.load import Report, Run
from softcache.runtime.logging import log_info
from softcache.student.tasks.inference import Serving

__all__ = ["describe", "describe_images", "image_processor", "metadata_of", "write_companions"]

RESAMPLE = {"bilinear": 2, "bicubic": 3}
"""Pillow's numbers, which transformers uses."""
LARGE = 2**14
"""The side of a square whose scaled side, relative to it, no rounding hides."""


def describe(report: Report, run: Run, serving: Serving) -> dict[str, Any]:
    """Returns the class names of a student's outputs (None of a language model), and how its input is made."""
    data, own = report.data, report.data_of(run)
    if not hasattr(data, "views"):
        tokenizer = getattr(own, "tokenizer", None)
        special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
        name = run.config.student.tokenizer or getattr(run.config.source, "tokenizer", None)
        made: dict[str, Any] = {"tokenizer": name, "special_token_ids": special}
        return {"class_names": None, "preprocessing": made | {"context": serving.dynamic[1][1]}}
    return {
        "class_names": [str(name) for name in data.train.source.class_names],
        "preprocessing": describe_images(getattr(own.evaluation, "views", None), serving),
    }


def describe_images(views: Views | StudentViews | None, serving: Any) -> dict[str, Any]:
    """Returns how the input of a student of images is made; `views` is None where it reads encoded files."""
    made: dict[str, Any] = {"input_shape": list(serving.input_shape)}
    if views is None:  # encoded files
        return made
    seen = views.teacher.settings if isinstance(views, StudentViews) else views.settings
    mean, std = seen.mean, seen.std
    made |= {"size": seen.size, "fit": seen.fit if seen.size is not None else None}
    if seen.size is not None:
        made["interpolation"] = seen.interpolation
        if seen.fit in ("crop", "stretch_crop"):
            made |= {"eval_share": seen.eval_share, "geometry": seen.geometry}
        if isinstance(seen.size, int) and seen.fit == "crop":
            made["resize_shorter_side"] = seen.scaled(LARGE, LARGE)[0]
        if seen.fit == "stretch_crop":
            made["resize"] = list(seen.scaled(LARGE, LARGE))
    if isinstance(views, StudentViews):
        mean, std = views.settings.normalization(views.teacher)
        made |= {"then_shorter_side": views.settings.size, "grey": views.settings.grey}
    return made | {"mean": list(mean), "std": list(std), "scale": 1 / 255}


def metadata_of(student: str, description: dict[str, Any]) -> dict[str, str]:
    """Returns the description as texts by name."""
    found = {"student": student, "preprocessing": json.dumps(description["preprocessing"])}
    if (names := description["class_names"]) is not None:
        found["class_names"] = json.dumps(names)
    return found


def write_companions(
    folder: ExportFolder, task: Any, model: nn.Module, spec: str, description: dict[str, Any]
) -> None:
    """Writes the files that other libraries read next to the exported ones; see the module docstring.

    Args:
        task: of the student.
        model: the student, without its normalisation.
        spec: of the student.
    """
    if hasattr(task, "save_tokenizer"):
        _make_all(folder, task.save_tokenizer)
    made = description["preprocessing"]
    if "mean" not in made:
        return
    processor, is_timm = image_processor(made), parse_spec(spec).family == "timm"
    has_config = is_timm and made["fit"] != "letterbox"
    if (
        has_config
    ):  # of which transformers makes a model, and a processor that normalizes, as that model needs it
        processor.pop("image_processor_type", None)
    folder.make_json("preprocessor_config.json", processor)
    if has_config:
        if made.get("then_shorter_side") is not None:
            log_info(
                f"export {spec}: config.json has timm scale a picture once, to the student's own view of "
                f"{made['then_shorter_side']} pixels, which is the teacher's view of {made['size']} scaled again: pixels "
                "differ a little; README.md and preprocessor_config.json describe both steps"
            )
        _make_all(folder, partial(_save_for_timm, model, description))
    elif is_timm:
        log_info(
            f"export {spec}: no config.json for timm, whose borders (crop_mode) are on all sides of an image; the view "
            "fills up the right or the bottom"
        )


def _make_all(folder: ExportFolder, write: Callable[[Path], Any]) -> None:
    """Makes the files of a folder that holds all that `write` writes into an empty one."""
    with tempfile.TemporaryDirectory() as made:
        write(Path(made))
        for path in sorted(Path(made).iterdir()):
            folder.make(path.name, partial(shutil.copyfile, path))


def image_processor(made: dict[str, Any]) -> dict[str, Any]:
    """Returns what transformers' CLIPImageProcessor makes the input of the exported files with: they normalize inside.

    Without its name where it could not: other scalings, and images of one channel.
    """
    channels, size = made["input_shape"][0], made["size"]
    height, width = (size, size) if isinstance(size, int) else size or made["input_shape"][1:]
    found = {
        "do_resize": made["size"] is not None,
        "do_center_crop": made["fit"] in ("crop", "stretch_crop"),
        "do_rescale": False,
        "do_normalize": False,
        "do_convert_rgb": channels == 3,
        "rescale_factor": made["scale"],
        "image_mean": made["mean"] * (channels if len(made["mean"]) == 1 else 1),
        "image_std": made["std"] * (channels if len(made["std"]) == 1 else 1),
        "softcache": made,
    }
    plain = channels == 3 and not made.get("grey") and made.get("then_shorter_side") is None
    named = (
        made["size"] is None or made["fit"] in ("stretch", "stretch_crop") or "resize_shorter_side" in made
    )
    if plain and named:
        found["image_processor_type"] = "CLIPImageProcessor"
    if made["size"] is not None:
        found["resample"] = RESAMPLE[made["interpolation"]]
    if made["fit"] == "stretch":
        found["size"] = {"height": height, "width": width}
    if "resize" in made:
        found["size"] = dict(zip(("height", "width"), made["resize"], strict=True))
    if "resize_shorter_side" in made:
        found["size"] = {"shortest_edge": made["resize_shorter_side"]}
    if found["do_center_crop"] and "size" in found:
        found["crop_size"] = {"height": height, "width": width}
    return found


def _save_for_timm(model: nn.Module, description: dict[str, Any], folder: Path) -> None:
    from timm.models import save_for_hf

    made = description["preprocessing"]
    channels = made["input_shape"][0]
    share, scaled = made.get("eval_share", 1.0), made.get("resize_shorter_side")
    if scaled is not None and int(made["size"] / share) != scaled:  # timm rounds down
        share = made["size"] / (scaled + 0.5)
    data = {
        "input_size": made["input_shape"],
        "interpolation": made.get("interpolation", "bilinear"),
        "crop_pct": share,
        "crop_mode": "squash" if made["fit"] in ("stretch", "stretch_crop") else "center",
        "mean": made["mean"] * (channels if len(made["mean"]) == 1 else 1),
        "std": made["std"] * (channels if len(made["std"]) == 1 else 1),
    }
    save_for_hf(
        model,
        str(folder),
        {"label_names": description["class_names"]},
        data_config=data,
        safe_serialization=True,
    )
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config.get("model_args", {}).pop(
        "num_classes", None
    )  # a key of its own; transformers fails where it is given twice
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
