"""Let an encoder-decoder teacher translate its training texts, and write them as a source to learn from (Seq-KD).

softcache teacher-generate --config configs/translation.toml --out runs/translation/generated
"""

import click

from softcache.cache.storage.base import is_bucket
from softcache.cache.storage.open import open_objects
from softcache.errors import ConfigError
from softcache.runtime.logging import progress_bar

from .options import complete_file, config_options

__all__ = ["teacher_generate"]


@click.command("teacher-generate")
@config_options
@click.option(
    "--out",
    metavar="SOURCE",
    shell_complete=complete_file,
    required=True,
    help="Where the source goes: an empty folder, or one that this command began.",
)
def teacher_generate(config_path: str, overrides: tuple[str, ...], out: str) -> None:
    """Write the teacher's own translations of the training texts, by beam search, as a source of its own.

    Kill it at any moment and run it again: it writes what is missing, and the same bytes. The [generate] table says how
    it searches. Use what it wrote with source.name = "generated" and source.path = SOURCE: hard labels on it are
    sequence-level distillation, cached labels on it are both.

    \b
    Example:
      softcache teacher-generate --config configs/translation.toml --out runs/translation/generated
    """
    from softcache.config.load import load_config
    from softcache.modalities.translation.data import TranslationData
    from softcache.runs import make_teacher, open_data, open_teacher
    from softcache.teacher.generate import generate_source
    from softcache.teacher.language import LanguageTeacher

    config = load_config(config_path, overrides)
    if is_bucket(out):
        raise ConfigError(
            f"--out {out}: a source of pairs is read from a folder; give one, and copy it where you like"
        )
    data = open_data(config)
    if not isinstance(data, TranslationData):
        raise ConfigError(
            f"config {config.name}: source.modality is {config.source.modality}; expected translation: a teacher writes "
            "translations of a source of pairs"
        )
    make_teacher(config, data)
    teacher = open_teacher(config, data)
    assert isinstance(teacher, LanguageTeacher)
    with progress_bar("teacher: translate", len(data.train), "pairs") as advance:
        report = generate_source(
            open_objects(out, create=True), data, teacher, config.generate, progress=advance
        )
    click.echo(
        f"source {out}: {report.num_pairs:,} pairs ({report.num_silent} without a word); {report.parts_done} parts made "
        f"now, {report.parts_found} were there"
    )
