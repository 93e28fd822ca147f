"""chrF and BLEU of translations, per language, by sacrebleu with its default settings (Post 2018, arXiv 1804.08771)."""

from __future__ import annotations

from collections.abc import Iterable

from softcache.errors import MissingExtraError

__all__ = ["corpus_scores"]


def corpus_scores(said: Iterable[tuple[str, str, str]]) -> dict[str, float]:
    """Returns `chrf_LANG` and `bleu_LANG` (0 to 100) of each language, and their means over languages, `chrf` and `bleu`.

    Args:
        said: (language, what was said, reference) of each pair.

    Raises:
        MissingExtraError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise MissingExtraError(
            f"chrF and BLEU need sacrebleu ({error}); pip install 'softcache[translation]', or set generate.score_beams = 0"
        ) from error
    by_language: dict[str, tuple[list[str], list[str]]] = {}
    for language, text, reference in said:
        texts, references = by_language.setdefault(language, ([], []))
        texts.append(text)
        references.append(reference)
    scores: dict[str, float] = {}
    for name, metric in (("chrf", CHRF()), ("bleu", BLEU())):
        values = {
            language: metric.corpus_score(texts, [references]).score
            for language, (texts, references) in sorted(by_language.items())
        }
        scores[name] = sum(values.values()) / max(1, len(values))
        scores |= {f"{name}_{language}": value for language, value in values.items() if language}
    return scores
