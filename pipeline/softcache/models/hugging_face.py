"""Image classifiers of transformers, and their models of images and texts as classifiers of any names.

    hf:NAME_OR_FOLDER[?revision=…]                   AutoModelForImageClassification with its head, safetensors only
    hf-config:NAME_OR_FOLDER                         the same with fresh weights
    hf-zero-shot:NAME_OR_FOLDER[?template=…]         CLIP, SigLIP and others: a class is a text, such as "a photo of a {}."

The texts of a zero-shot head are the source's class names in `template`, or in each line of the file `templates` (or of its
JSON list), whose embeddings are averaged as in CLIP's paper. `names` is a file with what a class is called in them: lines,
or a JSON list, in the order of the classes, or a JSON object by class name. Logits are the model's own: the scaled cosine of
image and text, with SigLIP's bias.

Code from a hub is never run: there is no `trust_remote_code`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from softcache.errors import MissingExtraError, SpecError
from softcache.models.spec import ModelSpec
from softcache.models.weights import refuse_adapter
from softcache.runtime.logging import progress_bar

__all__ = [
    "SCHEMES",
    "HfImageClassifier",
    "ZeroShotClassifier",
    "build_hf_model",
    "hf_output_names",
    "hf_scheme",
    "is_bgr",
    "is_multi_label",
    "load_image_processor",
    "num_hf_channels",
    "num_hf_outputs",
]

SCHEMES = ("hf", "hf-config", "hf-zero-shot")
TEMPLATE = "a photo of a {}."
BATCH_TEXTS = 256
NO_WORDS = re.compile(r"\d+|n\d{8}|LABEL_\d+|class[ _-]?\d+", re.IGNORECASE)
"""Names that no model of texts knows the meaning of: numbers, and ImageNet's synsets."""


def hf_scheme(parsed: ModelSpec) -> str:
    """Returns which of SCHEMES a spec has; empty: none."""
    scheme = parsed.name.partition(":")[0] if parsed.family == "factory" else ""
    return scheme if scheme in SCHEMES else ""


class HfImageClassifier(nn.Module):
    """A classifier of transformers: images to logits.

    Attributes:
        config: of the model, which names its architecture.
    """

    def __init__(self, net: nn.Module, *, is_bgr: bool = False) -> None:
        super().__init__()
        self.net, self._is_bgr = net, is_bgr

    @property
    def config(self) -> Any:
        return self.net.config

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.net(pixel_values=_channels(images_BCHW, self.config, self._is_bgr)).logits
        return logits


class ZeroShotClassifier(nn.Module):
    """A model of images and texts as a classifier: the cosine of an image and of each class's texts.

    The embeddings of the texts are made once, by the constructor, and are no part of the state dict: that has the weights
    which made them, and `config` the texts.

    Args:
        texts: of each class, the same number.
    """

    texts_VD: torch.Tensor

    def __init__(
        self, net: Any, tokenizer: Any, texts: Sequence[Sequence[str]], *, is_bgr: bool = False
    ) -> None:
        super().__init__()
        self.net, self._is_bgr = net.eval(), is_bgr
        self._texts = [list(prompts) for prompts in texts]
        self.config = _TextsConfig(net.config, self._texts)
        self.register_buffer("texts_VD", self._embedded(tokenizer), persistent=False)

    @torch.inference_mode()
    def _embedded(self, tokenizer: Any) -> torch.Tensor:
        flat = [text for prompts in self._texts for text in prompts]
        parts = []
        with progress_bar("embed the texts of classes", len(flat), "texts") as advance:
            for start in range(0, len(flat), BATCH_TEXTS):
                batch = flat[start : start + BATCH_TEXTS]
                inputs = tokenizer(batch, return_tensors="pt", **self._padding())
                self._check_length(inputs["input_ids"], batch)
                parts.append(_unit(_pooled(self.net.get_text_features(**inputs))))
                advance(len(batch))
        texts_VTD = torch.cat(parts).unflatten(0, (len(self._texts), -1))
        # Of one template the mean is the embedding itself, to the bit.
        return texts_VTD[:, 0].clone() if texts_VTD.shape[1] == 1 else _unit(texts_VTD.mean(1))

    def _padding(self) -> dict[str, Any]:
        """Returns how texts are filled up: SigLIP was trained on texts of full length."""
        if "siglip" not in self.net.config.model_type:
            return {"padding": True}
        return {"padding": "max_length", "max_length": self._max_length}

    @property
    def _max_length(self) -> int:
        config = getattr(self.net.config, "text_config", self.net.config)
        return int(getattr(config, "max_position_embeddings", 64))

    def _check_length(self, ids_NL: torch.Tensor, texts: Sequence[str]) -> None:
        if ids_NL.shape[1] > self._max_length:
            longest = max(texts, key=len)
            raise ValueError(
                f"the text {longest!r} has more than the {self._max_length} tokens that the model reads; shorten names or "
                "template"
            )

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        found = self.net.get_image_features(
            pixel_values=_channels(images_BCHW, self.net.config, self._is_bgr)
        )
        with torch.autocast(
            images_BCHW.device.type, enabled=False
        ):  # a cosine of half precision is scaled by 100
            cosines_BV = _unit(_pooled(found).float()) @ self.texts_VD.float().T
            logits_BV: torch.Tensor = cosines_BV * self.net.logit_scale.float().exp()
            bias = getattr(self.net, "logit_bias", None)
            return logits_BV if bias is None else logits_BV + bias.float()


class _TextsConfig:
    """A configuration that names the texts, too."""

    def __init__(self, config: Any, texts: Sequence[Sequence[str]]) -> None:
        self._config, self._texts = config, texts

    def to_diff_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = self._config.to_diff_dict()
        return found | {"texts": self._texts}


def _channels(images_BCHW: torch.Tensor, config: Any, is_bgr: bool) -> torch.Tensor:
    if images_BCHW.shape[1] == 1 != (wanted := _num_channels(config)):
        images_BCHW = images_BCHW.expand(-1, wanted, -1, -1)
    return images_BCHW.flip(1) if is_bgr else images_BCHW


def _num_channels(config: Any) -> int:
    return int(getattr(getattr(config, "vision_config", config), "num_channels", 3))


def _pooled(found: Any) -> torch.Tensor:
    return found if isinstance(found, torch.Tensor) else found.pooler_output


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(p=2, dim=-1, keepdim=True)


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            f"models hf:… need transformers ({error}); pip install 'softcache[text]'"
        ) from error
    return transformers


def _place(parsed: ModelSpec) -> tuple[str, dict[str, Any]]:
    """Returns a model's name or folder, and the arguments that transformers takes to find it."""
    arguments: dict[str, Any] = {
        key: parsed.args[key] for key in ("revision", "cache_dir") if key in parsed.args
    }
    return parsed.name.partition(":")[2], {"trust_remote_code": False, **arguments}


def build_hf_model(
    parsed: ModelSpec,
    num_classes: int | None,
    input_shape: tuple[int, ...],
    class_names: Sequence[str],
    *,
    task: str = "AutoModelForImageClassification",
) -> nn.Module:
    """Returns a model in evaluation mode.

    Args:
        num_classes: of the head. A pretrained one of another size becomes a random one, which teachers refuse beforehand
            (`num_hf_outputs`). None: that of the weights.
        class_names: of a zero-shot head.
        task: the class of transformers that makes it, unless it is of zero-shot.

    Raises:
        SpecError: an argument is unknown, weights are missing, or a zero-shot head has no names.
        Exception: of any kind that transformers raises.
    """
    scheme, (name, found) = hf_scheme(parsed), _place(parsed)
    known = {"revision", "cache_dir"} | (
        {"template", "templates", "names"} if scheme == "hf-zero-shot" else set()
    )
    if unknown := sorted(parsed.args.keys() - known):
        raise SpecError(
            f"model {parsed.name!r}: no argument {unknown[0]!r}; expected {', '.join(sorted(known))}"
        )
    transformers = _library()
    flips = is_bgr(load_image_processor(parsed))
    if scheme == "hf-zero-shot":
        texts = _texts(parsed, class_names)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **found)
        net = _loaded(transformers.AutoModelForZeroShotImageClassification, parsed, ())
        if not all(
            hasattr(net, member) for member in ("get_text_features", "get_image_features", "logit_scale")
        ):
            raise SpecError(
                f"model {parsed.name!r}: a {type(net).__name__} has no embeddings of images and texts; expected CLIP, "
                "SigLIP or one like them; hf: is for classifiers"
            )
        model: nn.Module = ZeroShotClassifier(net, tokenizer, texts, is_bgr=flips)
    else:
        auto, config = getattr(transformers, task), _config(parsed)
        head = {} if num_classes is None or num_classes == config.num_labels else {"num_labels": num_classes}
        if scheme == "hf-config":
            for key, value in head.items():
                setattr(config, key, value)
            net = auto.from_config(config, trust_remote_code=False)
        else:
            net = _loaded(auto, parsed, HEADS if head else (), **head)
        model = HfImageClassifier(net, is_bgr=flips)
    with torch.inference_mode():
        model.eval()(torch.zeros(1, *input_shape))  # a size that it does not take is refused here
    return model


HEADS = ("classifier", "head", "fc")
"""What the heads of classifiers are called, which are random where the number of classes is another one."""


def _loaded(auto: Any, parsed: ModelSpec, may_miss: tuple[str, ...], **head: Any) -> Any:
    name, found = _place(parsed)
    net, report = auto.from_pretrained(
        name,
        dtype=torch.float32,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=bool(head),
        **found,
        **head,
    )
    missing = [key for key in report["missing_keys"] if not set(key.split(".")) & set(may_miss)]
    if missing:
        raise SpecError(
            f"model {parsed.name!r}: {len(missing)} of its weights are not in the checkpoint and would be random, such as "
            f"{missing[0]}; name a checkpoint of a {type(net).__name__}"
        )
    return net


def _config(parsed: ModelSpec) -> Any:
    name, found = _place(parsed)
    library = _library()
    if hf_scheme(parsed) == "hf":
        refuse_adapter(parsed.name, name, **{key: found[key] for key in found if key != "trust_remote_code"})
    return library.AutoConfig.from_pretrained(name, **found)


def _checked_config(parsed: ModelSpec) -> Any:
    """Returns a model's configuration; raises SpecError where there is none."""
    try:
        return _config(parsed)
    except (MissingExtraError, SpecError):
        raise
    except Exception as error:  # the hub, JSON, and the file system have errors of their own
        raise SpecError(
            f"model {parsed.name!r}: {type(error).__name__}: {' '.join(str(error).split())[:400]}; expected a name on the "
            "hub, or a folder of save_pretrained"
        ) from error


def num_hf_outputs(parsed: ModelSpec) -> int | None:
    """Returns how many classes the pretrained head of a classifier has; None of other models.

    Raises:
        SpecError: there is no such model.
    """
    return int(_checked_config(parsed).num_labels) if hf_scheme(parsed) == "hf" else None


def num_hf_channels(parsed: ModelSpec) -> int:
    """Returns how many channels the images of a model have.

    Raises:
        SpecError: there is no such model.
    """
    return _num_channels(_checked_config(parsed))


def is_multi_label(parsed: ModelSpec) -> bool | None:
    """Returns whether a classifier was trained with a sigmoid for each class; None where its configuration has not that."""
    if hf_scheme(parsed) != "hf":
        return None
    problem = getattr(_checked_config(parsed), "problem_type", None)
    known = {"multi_label_classification": True, "single_label_classification": False}
    return known.get(problem) if isinstance(problem, str) else None


def hf_output_names(parsed: ModelSpec) -> list[str]:
    """Returns the names of a classifier's outputs, its id2label; empty where it has none of its own (LABEL_0, …)."""
    if hf_scheme(parsed) != "hf":
        return []
    named = {int(number): str(name) for number, name in _checked_config(parsed).id2label.items()}
    names = [named[number] for number in sorted(named)]
    return [] if all(name == f"LABEL_{number}" for number, name in enumerate(names)) else names


# -- zero-shot ---------------------------------------------------------------------------------------------


def _texts(parsed: ModelSpec, class_names: Sequence[str]) -> list[list[str]]:
    """Returns the texts of each class.

    Raises:
        SpecError: classes have no names that are words, or a file is not as expected.
    """
    what, names = f"model {parsed.name!r}", list(class_names)
    if (file := parsed.args.get("names")) is not None:
        given = _read(str(file), f"{what}: names {file}")
        if isinstance(given, dict):
            lost = [name for name in names if name not in given]
            if lost:
                raise SpecError(
                    f"{what}: names {file}: no entry for {len(lost)} classes, such as {lost[0]!r}; add them"
                )
            given = [given[name] for name in names]
        if len(given) != len(names) or not all(isinstance(name, str) for name in given):
            raise SpecError(
                f"{what}: names {file}: {len(given)} names for {len(names)} classes; expected one each, in their order"
            )
        names = given
    wordless = [name for name in names if NO_WORDS.fullmatch(name)]
    if wordless or not names:
        raise SpecError(
            f"{what}: classes are texts to it, and {len(wordless) or 'all'} of {len(names)} class names are no words"
            f"{f', such as {wordless[0]!r}' if wordless else ''}; give names by ?names=FILE, or source.class_names"
        )
    if "template" in parsed.args and "templates" in parsed.args:
        raise SpecError(f"{what}: template and templates; give one of them")
    templates = [str(parsed.args.get("template", TEMPLATE))]
    if (file := parsed.args.get("templates")) is not None:
        templates = _read(str(file), f"{what}: templates {file}")
    wrong = [template for template in templates if not isinstance(template, str) or "{}" not in template]
    if wrong or not templates or not isinstance(templates, list):
        raise SpecError(
            f"{what}: template {wrong[0] if wrong else templates!r} has no place {{}} for a name; expected e.g. {TEMPLATE!r}"
        )
    return [[template.replace("{}", name.replace("_", " ")) for template in templates] for name in names]


def _read(file: str, what: str) -> Any:
    try:
        text = Path(file).expanduser().read_text("utf-8-sig")
        return (
            json.loads(text)
            if file.endswith(".json")
            else [x.strip() for x in text.splitlines() if x.strip()]
        )
    except (OSError, ValueError) as error:
        raise SpecError(
            f"{what}: {error}; expected a JSON file, or a text file with a line for each"
        ) from error


def is_bgr(processor: Any) -> bool:
    """Returns whether an image processor reverses the channels: by what it makes of a red picture, a black one aside.

    One that takes no such picture, or makes something else than three channels of it, is asked for its setting.
    """
    red = np.zeros((2, 256, 256, 3), np.uint8)
    red[1, ..., 0] = 255
    try:
        made = [processor(images=x, return_tensors="np", input_data_format="channels_last") for x in red]
        black, shown = (np.asarray(one["pixel_values"][0], np.float64) for one in made)
    except Exception:  # a class of the library raises anything; None is none
        return bool(getattr(processor, "do_flip_channel_order", False))
    moved = np.abs(shown - black)
    if moved.ndim != 3 or len(moved) != 3:
        return bool(getattr(processor, "do_flip_channel_order", False))
    return bool(moved[2].mean() > moved[0].mean())


def load_image_processor(parsed: ModelSpec) -> Any:
    """Returns the image processor that a model was saved with, None where there is none."""
    name, found = _place(parsed)
    transformers = _library()
    try:
        return transformers.AutoImageProcessor.from_pretrained(name, **found)
    except (OSError, ValueError):
        return None
