"""Train the teacher of a config on hard labels, for users who have none.

softcache train-teacher --config configs/digits.toml     # seconds on a CPU
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from softcache.runtime.kernels import compile_kernels

from .options import config_options, json_option, print_json, track_option

if TYPE_CHECKING:
    from softcache.config.run import RunConfig

__all__ = ["train_teacher_command"]


@click.command("train-teacher")
@config_options
@track_option
@json_option
def train_teacher_command(config: RunConfig, as_json: bool) -> None:
    """Train the config's teacher on hard labels, with the settings of its [train_teacher] table.

    \b
    Example:
      softcache train-teacher --config configs/fashion-mnist.toml
    """
    compile_kernels()  # what the capture after it needs, too
    from softcache.runs import format_score, open_data, train_teacher

    metrics, weights = train_teacher(config, open_data(config))
    if as_json:
        print_json(
            {key: value for key, value in metrics.items() if key != "history"} | {"weights": str(weights)}
        )
        return
    click.echo(
        f"teacher {metrics.get('model')}: {metrics['num_parameters']:,} parameters, {format_score(metrics)}, "
        f"loss {metrics['eval_loss']:.4f} on {metrics['eval_samples']:,} samples; weights in {weights}"
    )
