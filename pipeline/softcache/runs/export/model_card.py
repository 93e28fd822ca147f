"""The card of an export: what it is, what goes in and comes out, and the figures, in Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["latency_table", "measurement_note", "model_table", "write_card"]

SHOWN_CLASSES = 100
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def _in_order(figures: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns the models in the order of the tables: teacher, student, exported files."""
    models = figures["models"]
    order = [name for name in ("teacher", "student") if name in models]
    return [(name, models[name]) for name in (*order, *(name for name in models if name not in order))]


def _name(name: str, figures: dict[str, Any]) -> str:
    return f"{name}, {figures[name]}" if name in ("teacher", "student") else name


def model_table(figures: dict[str, Any]) -> Table:
    """Returns sizes, scores and agreement: the column names, and a row of texts per model."""
    is_accuracy = figures["metric"] == "accuracy"
    columns = (
        "model",
        "bytes",
        "parameters",
        "FLOPs",
        "accuracy" if is_accuracy else "held-out loss",
        "largest difference",
        "same predictions",
    )
    rows: list[tuple[str, ...]] = []
    for name, row in _in_order(figures):
        exported = name not in ("teacher", "student")
        rows.append(
            (
                _name(name, figures),
                f"{row['bytes']:,}",
                f"{row['parameters']:,}",
                f"{row['flops']:,}",
                f"{100 * row['accuracy']:.2f}%" if is_accuracy else f"{row['eval_loss']:.4f}",
                f"{row['max_difference']:.2g}" if exported else "-",
                "-"
                if name == "student" or row["same_predictions"] is None
                else f"{100 * row['same_predictions']:.2f}%",
            )
        )
    return columns, rows


def latency_table(figures: dict[str, Any]) -> Table:
    """Returns the latency: the column names, and a row of texts per model."""
    batches = figures["models"]["student"]["latency_seconds"]
    columns = [(f"ms, {batch} row{'' if batch == '1' else 's'}", f"quartiles, {batch}") for batch in batches]
    rows = []
    for name, row in _in_order(figures):
        times = [
            (f"{1e3 * t['median']:.3f}", f"{1e3 * t['lower']:.3f} to {1e3 * t['upper']:.3f}")
            for t in row["latency_seconds"].values()
        ]
        rows.append((_name(name, figures), *(text for pair in times for text in pair)))
    return ("model", *(text for pair in columns for text in pair)), rows


def measurement_note(figures: dict[str, Any]) -> str:
    """Returns a note on how the numbers of the tables were measured."""
    machine = figures["machine"]
    shapes = f"inputs of shape {figures['input']['latency_shape']}"
    if (of_teacher := figures["input"].get("teacher_latency_shape")) not in (
        None,
        figures["input"]["latency_shape"],
    ):
        shapes += f" (the teacher's {of_teacher}: it reads something else)"
    rounds = next(iter(figures["models"]["student"]["latency_seconds"].values()))["rounds"]
    return (
        f"latency: of this machine only ({machine['cpu']}, {machine['threads']} threads for each), median (quartiles) of "
        f"{rounds} rounds in turns, {shapes}; differences are of logits, same "
        "predictions are of held-out rows, both against the torch student; FLOPs of one row, products and convolutions only"
    )


def write_card(path: Path, figures: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Writes the card."""
    tables = [_markdown(*model_table(figures)), _markdown(*latency_table(figures))]
    machine = figures["machine"]
    digests = [
        f"- `{name}`: {entry['bytes']:,} bytes, sha256 `{entry['sha256']}`" for name, entry in files.items()
    ]
    quantized = {
        "static": "weights int8 per channel, activations uint8 with ranges from samples of the training split (QDQ)",
        "dynamic": "weights int8, ranges of activations taken from each input",
    }[figures["quantization"]]
    learnt_from = f" from `{figures['teacher']}`" if figures["teacher"] else ""
    contract = (
        f"Input `{figures['input']['name']}`: {figures['input']['contract']}. Output `logits`: float32 [..., "
        f"{figures['classes']}] or wider where the model's head is padded; the class is the largest."
    )
    made_with = (
        f"`student.int8.onnx`: {quantized}. Made with torch {machine['torch']}, onnx {machine['onnx']}; run with "
        f"onnxruntime {machine['onnxruntime']}."
    )
    parts = [
        f"# {figures['student']}, distilled",
        f"A student with {figures['classes']:,} classes, trained with softcache{learnt_from}.",
        "## Input and output",
        contract,
        *_described(figures),
        "## Figures",
        *tables,
        measurement_note(figures) + ".",
        "## Files",
        "\n".join(digests),
        made_with,
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _described(figures: dict[str, Any]) -> list[str]:
    """Returns the paragraphs on classes and preprocessing."""
    made = {key: value for key, value in figures.get("preprocessing", {}).items() if value is not None}
    parts = (
        ["Preprocessing: " + ", ".join(f"{key} {value}" for key, value in made.items()) + "."] if made else []
    )
    if names := figures.get("class_names"):
        shown = [f"{number} {name}" for number, name in enumerate(names[:SHOWN_CLASSES])]
        rest = f", … ({len(names):,} in `distill.json`)" if len(names) > SHOWN_CLASSES else ""
        parts.append(f"Classes: {', '.join(shown)}{rest}.")
    return parts


def _markdown(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, ("---", *["--:"] * (len(columns) - 1)), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
