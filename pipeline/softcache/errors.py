"""Every error that softcache raises on purpose.

Each error is a `SoftcacheError` and also the builtin that a caller would expect, so
`except FileNotFoundError` and `except ValueError` keep working. A message names the object and
the place, what was expected, what was found, and what to do next. The command line prints the
message alone and exits with 1; anything that is not a `SoftcacheError` is a bug of ours.
"""

__all__ = [
    "AlignmentError",
    "CacheNotFoundError",
    "ConfigError",
    "CorruptionError",
    "DivergedError",
    "EngineError",
    "IdentityError",
    "IncompleteCacheError",
    "LabelError",
    "LostProcessError",
    "ManifestError",
    "MissingExtraError",
    "RunError",
    "SoftcacheError",
    "SourceError",
    "SpecError",
    "StorageError",
    "TemperatureError",
    "UnitsFailedError",
    "UnknownKeyError",
    "missing_extra",
]

EXTRA_BY_PACKAGE = {
    **dict.fromkeys(("accelerate", "matplotlib", "safetensors", "torch", "torchvision"), "train"),
    **dict.fromkeys(("faster_coco_eval", "torchmetrics"), "detection"),
    **dict.fromkeys(("PIL", "sklearn", "timm"), "vision"),
    **dict.fromkeys(("datasets", "tokenizers", "transformers"), "text"),
    **dict.fromkeys(("bokeh", "dask", "distributed"), "dask"),
    **dict.fromkeys(("filelock", "optuna", "tomli_w"), "sweep"),
    **dict.fromkeys(("jinja2", "plotly"), "report"),
    "lightning": "lightning",
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "export"),
    "obstore": "cloud",
    **dict.fromkeys(("pandas", "xarray"), "frames"),
    "peft": "lora",
    "tensorboard": "track",
}
"""The extra that installs a package. "train" is part of "vision" and of "text"."""


class SoftcacheError(Exception):
    """Base of all errors that softcache raises on purpose."""


class ConfigError(SoftcacheError, ValueError):
    """A config file or a `--set` holds an unknown, missing, mistyped or out-of-range key."""


class SpecError(SoftcacheError, ValueError):
    """A model or source name does not exist or cannot be built from its arguments."""


class SourceError(SoftcacheError, ValueError):
    """A dataset cannot be read as described: missing files, duplicate keys, broken images."""


class MissingExtraError(SoftcacheError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


def missing_extra(error: ModuleNotFoundError, wanted_by: str) -> ModuleNotFoundError | MissingExtraError:
    """Returns what to raise where a module is missing: the extra to install, or `error` where it is in none."""
    package = (error.name or "").partition(".")[0]
    extra = EXTRA_BY_PACKAGE.get(package)
    if extra is None:
        return error
    requirement = (
        "'softcache[vision]' for images, 'softcache[text]' for text"
        if extra == "train"
        else f"'softcache[{extra}]'"
    )
    return MissingExtraError(f"{wanted_by}: {package} is not installed; pip install {requirement}")


class LabelError(SoftcacheError, ValueError):
    """Logits or a label record break the contract (shape, NaN, +inf, K larger than V).

    Attributes:
        position: the first offending row of the array that was given, where one row is at fault.
    """

    def __init__(self, message: str, *, position: int | None = None) -> None:
        super().__init__(message)
        self.position = position


class TemperatureError(LabelError):
    """A temperature lies outside of what the record can serve."""


class CacheNotFoundError(SoftcacheError, FileNotFoundError):
    """There is no cache at this place."""


class ManifestError(SoftcacheError, ValueError):
    """A manifest or a unit marker is malformed, of another version, or points out of the cache."""


class IdentityError(SoftcacheError, ValueError):
    """A cache was made from another teacher, source, transform, policy or codec."""


class UnknownKeyError(SoftcacheError, KeyError):
    """A cache has no sample of this key."""

    __str__ = Exception.__str__  # KeyError shows the repr of its argument


class IncompleteCacheError(SoftcacheError, LookupError):
    """Rows were asked for whose unit is not finished."""


class CorruptionError(SoftcacheError, ValueError):
    """Stored bytes differ from what was written: checksum, size or shape."""


class AlignmentError(SoftcacheError, ValueError):
    """What the student sees is not what the teacher labeled."""


class StorageError(SoftcacheError, OSError):
    """The storage refused: unwritable, full, or gone."""


class LostProcessError(SoftcacheError, ConnectionError):
    """Another process of a run is gone, or does not answer."""


class EngineError(SoftcacheError, RuntimeError):
    """A serving engine that runs a teacher cannot start, has failed, or is out of memory."""


class RunError(SoftcacheError, ValueError):
    """An output directory holds another run, or a run cannot be resumed."""


class DivergedError(RunError):
    """A student's loss or weights are no longer finite; its last checkpoint is from before that."""


class UnitsFailedError(SoftcacheError, RuntimeError):
    """Some units failed on every worker that tried them; the others are done."""
