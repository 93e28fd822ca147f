"""Who samples rollouts, and whether they and the labels are of one teacher.

Lightning OPD (Wu, Han, Cai 2026, arXiv 2604.13010) calls it teacher consistency: the teacher of the supervised fine-tuning
and that of on-policy distillation must be the same model; otherwise the gradient has a bias that no training removes, and
both the offline and the online form converge to a suboptimal fixed point. So the teacher that the sampling policy was
fine-tuned on, as the rollouts name it, is compared with that of the labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softcache.config.run import RunConfig
from softcache.data.sources.text.parts import PartsTexts
from softcache.data.sources.text.rollouts import RolloutTexts, read_manifest
from softcache.errors import ConfigError, IdentityError, SoftcacheError
from softcache.models.spec import is_same_origin
from softcache.reader.open import open_cache
from softcache.runs.teacher import make_teacher, open_teacher
from softcache.runtime.files import read_json
from softcache.teacher.base import TeacherSettings
from softcache.teacher.language import LanguageTeacher

if TYPE_CHECKING:
    from softcache.modalities.text.data import TextData

__all__ = ["check_teacher_consistency", "open_policy", "sft_teacher_of_run"]

NONE, UNKNOWN = "none", "unknown"
"""In place of a teacher: the policy was fine-tuned on no teacher, and: nothing is known of it."""


def check_teacher_consistency(config: RunConfig, teacher: Mapping[str, Any], where: str) -> None:
    """Raises unless the sampling policy of a source of rollouts was fine-tuned on the teacher of the labels.

    Args:
        teacher: the part of an identity, with `spec` and `weights_digest`.
        where: the labels are from, for messages.

    Raises:
        IdentityError: it was fine-tuned on another one, on none, or that is not known, and `source.other_sft_teacher` does
            not name it.
    """
    for source in _sources(config.source):
        manifest = source.manifest
        found = source.sft_teacher or (manifest or {}).get("sft_teacher", UNKNOWN)
        if _is_teacher(found, teacher):
            continue
        accepted = source.other_sft_teacher
        if accepted is not None and _names(accepted, found):
            continue
        raise IdentityError(
            f"source {source.path}: rollouts of a policy fine-tuned on {_described(found)}; expected the teacher of "
            f"{where}, {_described(teacher)}: labels of another teacher bias the gradient of on-policy distillation "
            "(teacher consistency, arXiv 2604.13010); label the rollouts with that teacher, fine-tune the policy on this "
            "one, name the teacher as source.sft_teacher where the rollouts do not, or accept it by "
            f'source.other_sft_teacher = "{_name(found)}"'
        )


def _sources(source: Any) -> list[RolloutTexts]:
    if isinstance(source, PartsTexts):
        return [part for n in source.part_numbers for part in _sources(source.settings_of(n))]
    return [source] if isinstance(source, RolloutTexts) else []


def _is_teacher(found: Mapping[str, Any] | str, teacher: Mapping[str, Any]) -> bool:
    """Whether what the rollouts name is the teacher: by its weights where both are known, else by its spec."""
    if isinstance(found, str):
        return found == teacher["weights_digest"] or (
            found not in (NONE, UNKNOWN) and is_same_origin(found, teacher["spec"])
        )
    digests = found["weights_digest"], teacher["weights_digest"]
    if UNKNOWN in digests:
        return is_same_origin(found["spec"], teacher["spec"])
    return digests[0] == digests[1]


def _names(accepted: str, found: Mapping[str, Any] | str) -> bool:
    return (
        accepted == found if isinstance(found, str) else accepted in (found["spec"], found["weights_digest"])
    )


def _name(found: Mapping[str, Any] | str) -> str:
    if isinstance(found, str):
        return found
    return str(found["spec"] if found["weights_digest"] == UNKNOWN else found["weights_digest"])


def _described(found: Mapping[str, Any] | str) -> str:
    if isinstance(found, str):
        words = {NONE: "no teacher", UNKNOWN: "a teacher that is not known"}
        return words.get(found, found)
    return f"{found['spec']} (weights {str(found['weights_digest'])[:12]}…)"


def open_policy(config: RunConfig, data: TextData) -> tuple[LanguageTeacher, Mapping[str, Any] | str]:
    """Returns the policy of [rollouts] with its weights, and the teacher that it was fine-tuned on.

    Raises:
        ConfigError: it is of a run that is not finished, or whose teacher is not known any more.
    """
    settings = config.rollouts
    if settings.policy is None:
        make_teacher(config, data)
        policy = open_teacher(config, data)
        if not isinstance(policy, LanguageTeacher):
            raise ConfigError(
                "rollouts.policy: missing, and the teacher runs in an engine, which does not sample here; sample with that "
                "engine and give its output as source.path, or name a policy"
            )
        named: Mapping[str, Any] | str = {"spec": policy.spec, "weights_digest": policy.weights_digest}
        return policy, settings.sft_teacher or named
    run, model, weights = Path(settings.policy).expanduser(), settings.policy, settings.policy_weights
    sft_teacher: Mapping[str, Any] | str = settings.sft_teacher or UNKNOWN
    if (run / "resolved.json").is_file():
        if not (run / "metrics.json").is_file():
            raise ConfigError(
                f"rollouts.policy {settings.policy}: a run that is not finished; run `softcache train-student` to its end"
            )
        model, weights = f"hf:{run / 'hf'}", None
        if not (run / "hf").is_dir():
            model, weights = _resolved(run)["student"]["model"], str(run / "model.safetensors")
        sft_teacher = settings.sft_teacher or sft_teacher_of_run(run)
    policy = data.teacher(config, TeacherSettings(model=model, weights=weights))
    assert isinstance(policy, LanguageTeacher)
    return policy, sft_teacher


def sft_teacher_of_run(run: Path) -> Mapping[str, Any] | str:
    """Returns the teacher that a student's run was trained on: that of its labels, or of the responses that it read.

    Raises:
        ConfigError: it is that of a cache which is not there any more.
    """
    resolved, identity = _resolved(run), read_json(run / "config.json", "", error=ConfigError)
    labels, source = resolved["train"]["labels"], resolved["source"]
    if labels == "online":
        teacher = identity["teacher"]
        return {"spec": teacher["spec"], "weights_digest": teacher["weights"]}
    if labels == "cache":
        place = resolved["cache"] or f"runs/{resolved['name']}/cache"
        try:
            cache = open_cache(place)
            if cache.manifest_sha256 != identity["cache"]:
                raise ConfigError(f"cache {place}: another one than the run's")
        except SoftcacheError as error:
            raise ConfigError(
                f"rollouts.policy {run}: trained from a cache that is not there: {error}; name its teacher as "
                "rollouts.sft_teacher, by spec or weights digest"
            ) from error
        teacher = cache.manifest.identity["teacher"]
        return {"spec": teacher["spec"], "weights_digest": teacher["weights_digest"]}
    if source["name"] == "rollouts":
        manifest = read_manifest(source["path"])
        if manifest is None:
            return UNKNOWN
        return {key: manifest["policy"][key] for key in ("spec", "weights_digest")}
    return NONE


def _resolved(run: Path) -> dict[str, Any]:
    return read_json(run / "resolved.json", "", error=ConfigError)
