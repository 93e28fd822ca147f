"""Print what makes a shell complete softcache's commands, options, config keys and their values.

softcache completion bash
"""

import click

from .completing import SHELLS, script

__all__ = ["completion"]


@click.command()
@click.argument("shell", type=click.Choice(list(SHELLS)))
def completion(shell: str) -> None:
    """Print the completion script of SHELL.

    bash has to be 4.4 or later; `softcache` has to be on the PATH of the shell that completes.

    \b
    Example:
      softcache completion bash                            (to look at; fish: softcache completion fish | source)
      eval "$(softcache completion bash)"                  (in ~/.bashrc; zsh: in ~/.zshrc, after compinit)
    """
    click.echo(script(shell))
