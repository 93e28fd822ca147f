"""Generate teacher translations of the training texts, as a training set (sequence-level distillation).

softcache teacher-generate --config configs/translation.toml --out runs/translation/generated
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from softcache.cache.storage.base import is_bucket
from softcache.cache.storage.open import open_objects
from softcache.errors import ConfigError
from softcache.runtime.logging import progress_bar

from .options import PATH, config_options

if TYPE_CHECKING:
    from softcache.config.run import RunConfig

__all__ = ["teacher_generate"]


@click.command("teacher-generate")
@config_options
@click.option(
    "--out",
    metavar="SOURCE",
    type=PATH,
    required=True,
    help="The folder of the training set: empty, or one that this command began.",
)
def teacher_generate(config: RunConfig, out: str) -> None:
    """Generate teacher translations of the training texts by beam search, as a training set (sequence-level KD).

    A rerun after a kill writes what is missing, with the same bytes. The [generate] table has the settings of the
    search. Train with source.name = "generated" and source.path = SOURCE: with hard labels that is sequence-level
    distillation, with cached labels it is combined with word-level distillation.

    \b
    Example:
      softcache teacher-generate --config configs/translation.toml --out runs/translation/generated
    """
    from softcache.modalities.translation.data import TranslationData
    from softcache.runs import make_teacher, open_data, open_teacher
    from softcache.teacher.generate import generate_source
    from softcache.teacher.language import LanguageTeacher

    if is_bucket(out):
        raise ConfigError(
            f"--out {out}: a source of pairs is read from a folder; give a local one, and copy it afterwards"
        )
    data = open_data(config)
    if not isinstance(data, TranslationData):
        raise ConfigError(
            f"config {config.name}: source.modality is {config.source.modality}; expected translation, "
            "whose teacher generates the pairs of a source"
        )
    make_teacher(config, data)
    teacher = open_teacher(config, data)
    assert isinstance(teacher, LanguageTeacher)
    with progress_bar("teacher: translate", len(data.train), "pairs") as advance:
        report = generate_source(
            open_objects(out, create=True), data, teacher, config.generate, progress=advance
        )
    click.echo(
        f"source {out}: {report.num_pairs:,} pairs ({report.num_silent} empty); {report.parts_done} parts made "
        f"now, {report.parts_found} found"
    )
