"""Texts that an encoder-decoder model writes: as a source of its own for students, and to be scored.

settings.py    [generate]
searching.py   batched greedy or beam search, and the log-probability of what was found
writing.py     a teacher's translations of a whole source, part by part, resumable
scores.py      chrF and BLEU per language
"""

from pipeline.generation.scores import corpus_scores
from pipeline.generation.searching import Found, translate
from pipeline.generation.settings import GenerateSettings
from pipeline.generation.writing import GenerateReport, Original, generate_source

__all__ = [
    "Found",
    "GenerateReport",
    "GenerateSettings",
    "Original",
    "corpus_scores",
    "generate_source",
    "translate",
]
