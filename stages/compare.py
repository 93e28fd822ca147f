"""Train the same student from the cache, with the online teacher, and on hard labels, over several seeds.

make compare
softcache compare --config configs/fashion-mnist.toml --seeds 3
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import click

from softcache.modalities import modality_of
from softcache.reader.cache import Cache

from .options import cache_option, config_options, json_option, print_json, print_table, student_option

if TYPE_CHECKING:
    from softcache.config.run import RunConfig

__all__ = ["compare"]


@click.command()
@config_options
@cache_option
@student_option
@click.option("--seeds", default=3, type=click.IntRange(1), help="Runs per kind of labels.")
@json_option
def compare(
    config: RunConfig,
    url: str | None,
    model: str | None,
    seeds: int,
    as_json: bool,
) -> None:
    """Compare cache (1 view, all views), online teacher and hard labels over several seeds.

    \b
    Example:
      softcache compare --config configs/digits.toml --seeds 3
    """
    from softcache.runs import open_data, open_labels, open_teacher, train_student, with_cached_labels

    cache = open_labels(config, url)
    config = with_cached_labels(config, cache)
    data = open_data(config)
    model = model or config.student.model
    teacher = open_teacher(config, data)
    kinds: dict[str, dict[str, Any]] = {"hard labels": {"labels": "ground_truth"}}
    for num_views in sorted({1, cache.num_views}):
        name = f"cache{modality_of(config).describe_views(num_views)}"
        kinds[name] = {"labels": "cache", "cache": cache, "num_views": num_views}
    # Refuses a student that the online teacher cannot supervise, before any is trained.
    data.task(config, model, teacher)
    kinds["online teacher"] = {"labels": "online", "teacher": teacher}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
    for seed in range(seeds):  # seeds outside, so that a drift of the machine affects every kind alike
        for name, how in kinds.items():
            run = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
            results[name].append(train_student(run, data, model=model, **how))
    _print(config, model, cache, results, as_json)


def _print(
    config: RunConfig,
    model: str,
    cache: Cache,
    results: dict[str, list[dict[str, Any]]],
    as_json: bool,
) -> None:
    from softcache.runs.tables import advice

    score = modality_of(config).score
    metric = score.metric
    teacher = getattr(cache.manifest.teacher, score.of_teacher)
    figures = {
        name: {
            metric: [run[metric] for run in runs],
            "mean": statistics.mean(run[metric] for run in runs),
            "std": statistics.stdev(run[metric] for run in runs) if len(runs) > 1 else None,
            "seconds": statistics.median(run["seconds"] for run in runs),
        }
        for name, runs in results.items()
    }
    hard = figures["hard labels"]
    best = max(
        (row for name, row in figures.items() if name.startswith("cache")),
        key=lambda row: row["mean"] if score.larger_is_better else -row["mean"],
    )
    spread = max(hard["std"] or 0.0, best["std"] or 0.0)
    line = advice(config.loss, score, best["mean"], hard["mean"], spread=spread)
    if as_json:
        print_json(
            {
                "config": config.name,
                "student": model,
                "teacher": teacher,
                "students": figures,
                "advice": line,
            }
        )
        return
    rows: list[tuple[str, ...]] = [("teacher", score.format(teacher), "", "", "")]
    for name, row in figures.items():
        mean, spread = score.format(row["mean"]), score.format_std(row["std"])
        rows.append((name, mean, spread, str(len(row[metric])), f"{row['seconds']:.1f}"))
    columns = (score.title, score.std_title)
    print_table(f"{model} on {config.name}", ("learns from", *columns, "seeds", "seconds"), rows)
    if line is not None:
        click.echo(line)
