"""Whether two checkouts make the same caches and the same students: a refactoring changes names and nothing else.

    python benchmarks/same_outputs.py BEFORE AFTER [CONFIG …]

BEFORE and AFTER are checkouts (or installed trees) of softcache; each runs in a process of its own, with this Python.
Every shipped config is cut to a few samples and one epoch, on data that is made here where it is not embedded. For each,
the teacher is trained, its cache is written, and a student is trained from it. Compared are, byte by byte: every file of
the cache (of the manifest and the markers all but softcache's version and the paths of models), and the student's and the
teacher's weights. The exit status is 1 where anything differs. Takes about ten minutes on two cores.
"""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FEW = ["train_teacher.epochs=1", "train.epochs=1"]
MNIST = [
    *FEW,
    "source.max_train_samples=600",
    "source.max_eval_samples=100",
    "source.root=data/fashion",
    "labels.num_views=2",
]
SMALL = ["source.max_train_samples=64", "source.max_eval_samples=16"]
PNG = [
    "student.source.root=data/fashion",
    "student.source.max_train_samples=600",
    "student.source.max_eval_samples=100",
]
CONFIGS: dict[str, list[str]] = {
    "digits": FEW,
    "adaptive-digits": FEW,
    "bytes-student": FEW,
    "lowres-student": FEW,
    "sweep-digits": FEW,
    "digits-fusion": FEW,
    "fashion-mnist": MNIST,
    "bytes-fashion": [*MNIST, *PNG],
    "lowres-fashion": MNIST,
    "scenes-detection": [*FEW, *SMALL],
    "imagefolder": [
        *(*FEW, "source.root=data/images", "views.size=32", "labels.k=2", "labels.num_views=2"),
        *("teacher.model=timm:test_efficientnet", "student.model=timm:test_resnet"),
        *("capture.dtype=float32", "capture.workers=0", "reader.workers=0"),
        *(
            "train.batch_size=8",
            "train.precision=no",
            "train_teacher.batch_size=8",
            "train_teacher.precision=no",
        ),
    ],
    "stdlib-lm": [*FEW, *SMALL, "source.tokenizer=bpe?vocab_size=512", "source.seq_len=128"],
    "translation": FEW,
    "hf-causal-lm": [
        *(
            "source.path=data/texts.jsonl",
            "source.tokenizer=data/model",
            "source.seq_len=64",
            "source.subset=",
        ),
        *(
            "teacher.model=hf:data/model",
            "student.model=hf:data/model",
            "labels.k=8",
            "source.eval_share=0.2",
        ),
        *(
            "train.precision=no",
            "train.batch_size=8",
            "train.accumulation_steps=2",
            "train.eval_batch_size=8",
        ),
    ],
}
FUSED = {"cnn": "cnn?width=16", "narrow": "cnn?width=8", "deep": "cnn?width=8&stages=2"}


def make_data(folder: Path) -> None:
    """Writes images, Fashion-MNIST-like files, texts and a tiny language model below a folder."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("eval", 4)):
        for name in ("cat", "dog", "owl"):
            (folder / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (40, 48, 3), np.uint8)
                Image.fromarray(pixels).save(folder / "images" / split / name / f"{number}.png")
    raw = folder / "fashion" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 60000), ("t10k", 10000)):
        images = random.integers(0, 256, (count, 28, 28), np.uint8)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes()
        )
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 2049, count) + bytes(random.integers(0, 10, count, np.uint8))
        )
    words = ["alpha", "beta", "gamma", "delta", "omega", "sum", "of", "the", "and"]
    texts = [" ".join(random.choice(words, 40)) for _ in range(120)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=304, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder / "model")


def command(checkout: Path) -> tuple[list[str], dict[str, str]]:
    """Returns how the checkout's command line is started, and with which variables."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
    if (checkout / "pipeline" / "softcache").exists():
        start = (
            "import sys, importlib.util as u\n"
            f"sys.path.insert(0, {str(checkout / 'pipeline')!r})\n"
            f"s = u.spec_from_file_location('softcache.stages', {str(checkout / 'stages' / '__init__.py')!r}, "
            f"submodule_search_locations=[{str(checkout / 'stages')!r}])\n"
            "import softcache; m = u.module_from_spec(s); sys.modules['softcache.stages'] = m; s.loader.exec_module(m)\n"
            "softcache.stages = m\n"
            "from softcache.stages.cli import main; main()"
        )
        return [sys.executable, "-c", start], environment
    environment["PYTHONPATH"] = str(checkout)
    return [sys.executable, "-m", "stages.cli"], environment


def run(checkout: Path, place: Path, *words: str) -> None:
    start, environment = command(checkout)
    done = subprocess.run(
        [*start, *words], cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(
            f"{checkout}: {' '.join(words)}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )


def make(checkout: Path, place: Path, name: str, settings: list[str]) -> None:
    """Trains the teacher, fills the cache and trains the student of a config."""
    config = ["--config", str(checkout / "configs" / f"{name}.toml")]
    sets = [
        word
        for setting in [*settings, "capture.device=cpu", "train.device=cpu"]
        for word in ("--set", setting)
    ]
    if name == "digits-fusion":
        for part, model in FUSED.items():
            weights = f"runs/teacher-{part}/teacher/model.safetensors"
            more = [
                "--set",
                f"teacher.model={model}",
                "--set",
                f"teacher.weights={weights}",
                "--set",
                f"name=teacher-{part}",
            ]
            run(
                checkout,
                place,
                "teacher-logits",
                *config,
                *sets,
                *more,
                "--cache",
                f"runs/digits-fusion/{part}",
            )
    else:
        run(checkout, place, "teacher-logits", *config, *sets, "--cache", f"runs/{name}/cache")
    run(
        checkout,
        place,
        "train-student",
        *config,
        *sets,
        *([] if name == "digits-fusion" else ["--cache", f"runs/{name}/cache"]),
    )


def digests(place: Path) -> dict[str, str]:
    """Returns the digest of every file of caches and of every weights file, by path."""
    found = {}
    for path in sorted((place / "runs").rglob("*")):
        relative = str(path.relative_to(place))
        if not path.is_file():
            continue
        in_cache = any((parent / "manifest.json").exists() for parent in path.parents)
        if not in_cache and path.suffix not in (".safetensors", ".pt"):
            continue
        if "checkpoint" in relative:
            continue
        data = path.read_bytes()
        if path.name == "manifest.json" or (path.suffix == ".json" and in_cache):
            data = json.dumps(without_names(json.loads(data)), sort_keys=True).encode()
        found[relative] = hashlib.sha256(data).hexdigest()[:16]
    return found


def without_names(value: object) -> object:
    """Returns JSON without softcache's version and what follows from it."""
    if isinstance(value, dict):
        return {
            key: without_names(inner)
            for key, inner in value.items()
            if key not in ("softcache_version", "created")
        }
    return [without_names(inner) for inner in value] if isinstance(value, list) else value


def main() -> None:
    before, after, *names = sys.argv[1:]
    differs = False
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder, "data"))
        for name in names or CONFIGS:
            made = []
            for checkout in (before, after):
                place = Path(folder, "place")
                place.mkdir()
                (place / "data").symlink_to(Path(folder, "data"))
                make(Path(checkout).resolve(), place, name, CONFIGS[name])
                made.append(digests(place))
                shutil.rmtree(place)
            one, other = made
            unequal = sorted(path for path in {*one, *other} if one.get(path) != other.get(path))
            differs |= bool(unequal)
            caches = sum(not path.endswith((".safetensors", ".pt")) for path in one)
            result = "equal" if not unequal else f"DIFFER: {', '.join(unequal[:5])}"
            print(
                f"{name:18} {caches:4} files of caches, {len(one) - caches} of weights: {result}", flush=True
            )
    sys.exit(differs)


if __name__ == "__main__":
    main()
