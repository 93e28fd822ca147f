"""Generate a training set: a teacher's translations, or a policy's rollouts on the prompts of a text.

softcache teacher-generate --config configs/translation.toml --out runs/translation/generated
softcache teacher-generate --config configs/on-policy.toml --out runs/on-policy/rollouts
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from softcache.cache.storage.open import open_objects
from softcache.errors import ConfigError
from softcache.runtime.logging import progress_bar

from .options import LOCAL, config_options

if TYPE_CHECKING:
    from softcache.config.run import RunConfig
    from softcache.modalities import Data
    from softcache.teacher.generate import GenerateReport

__all__ = ["teacher_generate"]


@click.command("teacher-generate")
@config_options
@click.option(
    "--out",
    metavar="SOURCE",
    type=LOCAL,
    required=True,
    help="The folder of the training set: empty, or one that this command began.",
)
def teacher_generate(config: RunConfig, out: str) -> None:
    """Generate a training set: teacher translations (sequence-level KD), or rollouts of a policy on a text's prompts.

    A rerun after a kill writes what is missing, with the same bytes. Pairs of texts: the teacher searches by the table
    [generate]; train with source.name = "generated" and source.path = SOURCE. Texts: the policy of [rollouts], a student
    or the teacher, samples, and its log-probabilities are kept; label and train with source.name = "rollouts".

    \b
    Example:
      softcache teacher-generate --config configs/translation.toml --out runs/translation/generated
    """
    from softcache.runs import open_data

    data = open_data(config)
    report, rows = _generate(config, data, out)
    click.echo(
        f"source {out}: {report.num_rows:,} {rows} ({report.num_silent} empty); {report.parts_done} parts made "
        f"now, {report.parts_found} found"
    )


def _generate(config: RunConfig, data: Data, out: str) -> tuple[GenerateReport, str]:
    from softcache.modalities.text.data import TextData
    from softcache.modalities.translation.data import TranslationData
    from softcache.runs import make_teacher, open_teacher
    from softcache.runs.rollouts import open_policy
    from softcache.teacher.generate import generate_source
    from softcache.teacher.language import LanguageTeacher
    from softcache.teacher.rollouts import generate_rollouts, rollout_prompts

    if isinstance(data, TranslationData):
        make_teacher(config, data)
        teacher = open_teacher(config, data)
        assert isinstance(teacher, LanguageTeacher)
        with progress_bar("teacher: translate", len(data.train), "pairs") as advance:
            objects = open_objects(out, create=True)
            return generate_source(objects, data, teacher, config.generate, progress=advance), "pairs"
    if not isinstance(data, TextData):
        raise ConfigError(
            f"config {config.name}: source.modality is {config.source.modality}; expected translation or text, of which a "
            "model writes a source"
        )
    policy, sft_teacher = open_policy(config, data)
    prompts = rollout_prompts(data, config.rollouts)
    with progress_bar(f"sample {policy.spec}", len(prompts), "rollouts") as advance:
        report = generate_rollouts(
            open_objects(out, create=True),
            data,
            policy,
            config.rollouts,
            prompts,
            sft_teacher=sft_teacher,
            progress=advance,
        )
    return report, "rollouts"
