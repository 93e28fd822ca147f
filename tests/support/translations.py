"""Small runs on pairs of texts: a catalogue, a file of pairs, and a run with a tiny teacher of a fixed seed."""

import json
import random

import torch

from softcache.config.load import build_config
from softcache.models.language import build_translation_model
from tests.support.tables import merged

CATALOGUE = """
msgid ""
msgstr ""
"Content-Type: text/plain; charset=utf-8\\n"
"Plural-Forms: nplurals=2; plural=(n != 1);\\n"

msgid "Save"
msgstr "Speichern"

msgid "  Delete "
msgstr "Löschen"

#, fuzzy
msgid "Guess"
msgstr "Vielleicht"

msgid "Nobody did this"
msgstr ""

msgid "%(count)s / {total} <b>%d</b>"
msgstr "%(count)s / {total} <b>%d</b>"

msgctxt "month"
msgid "May"
msgstr "Mai"

msgctxt "verb"
msgid "May"
msgstr "Dürfen"

msgid "%d file"
msgid_plural "%d files"
msgstr[0] "%d Datei"
msgstr[1] "%d Dateien"

#~ msgid "Old"
#~ msgstr "Alt"
"""

NOUNS = {"cat": "Katze", "dog": "Hund", "house": "Haus", "tree": "Baum", "bird": "Vogel", "child": "Kind"}
VERBS = {"sees": "sieht", "knows": "kennt", "finds": "findet", "hears": "hört"}


def write_package(folder, name="shipped", languages=("de",), kind="po"):
    """A package with one catalogue per language; returns its folder."""
    from io import BytesIO

    from babel.messages.mofile import write_mo
    from babel.messages.pofile import read_po

    for language in languages:
        place = folder / name / "locale" / language / "LC_MESSAGES"
        place.mkdir(parents=True)
        (folder / name / "__init__.py").touch()
        if kind == "po":
            (place / "django.po").write_text(CATALOGUE)
        else:
            with (place / "django.mo").open("wb") as stream:
                write_mo(stream, read_po(BytesIO(CATALOGUE.encode())))
    return folder / name


def write_pairs(path, num_pairs=40, languages=("de",)):
    """A JSON-lines file of short sentences and their translations, a word at a time."""
    draw, lines, seen = random.Random(0), [], set()
    while len(seen) < num_pairs:
        words = [
            draw.choice(list(NOUNS)),
            draw.choice(list(VERBS)),
            *draw.choices(list(NOUNS), k=draw.randint(1, 4)),
        ]
        if tuple(words) in seen:
            continue
        seen.add(tuple(words))
        target = " ".join((NOUNS | VERBS)[word] for word in words)
        for language in languages:
            translated = target if language == "de" else target[::-1]
            lines.append(
                {
                    "key": f"{language}{len(seen):03d}",
                    "source": " ".join(words),
                    "target": translated,
                    "language": language,
                }
            )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def translation_config(folder, **tables):
    """A run on `folder`/pairs.jsonl; tables are merged key by key."""
    if not (folder / "pairs.jsonl").exists():
        write_pairs(folder / "pairs.jsonl", languages=("de", "ed"))
    base = {
        "name": "test-translation",
        "source": {
            "modality": "translation",
            "name": "files",
            "path": str(folder / "pairs.jsonl"),
            "tokenizer": "bpe?vocab_size=300",
            "eval_share": 0.2,
            "data_dir": str(folder / "data"),
        },
        "teacher": {"model": "tests.support.translations:known"},
        "labels": {"k": 6},
        "capture": {"unit_samples": 16, "chunk_samples": 4, "batch_size": 4, "device": "cpu", "chunk_positions": 7},
        "generate": {"beams": 2, "batch_size": 8, "part_pairs": 24},
        "student": {"model": "t5?width=16&depth=1&heads=2"},
        "train": {"epochs": 1, "batch_size": 8, "device": "cpu", "eval_batch_size": 8},
    }  # fmt: skip
    return build_config(merged(base, tables), "test")


def known(vocab_size, context, tokens, spec="marian?width=16&depth=1&heads=2"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        model = build_translation_model(spec, vocab_size=vocab_size, context=context, tokens=tokens)
        with torch.no_grad():  # fresh weights are all but uniform; a teacher has opinions
            model.get_output_embeddings().weight.mul_(8)
            if hasattr(model, "final_logits_bias"):
                model.final_logits_bias.normal_()
    return model


def other(vocab_size, context, tokens):
    """Another teacher of the same tokens."""
    return known(vocab_size, context, tokens, spec="t5?width=16&depth=1&heads=2")
