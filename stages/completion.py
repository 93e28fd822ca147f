"""Print the script that makes a shell complete softcache's commands, options and files.

softcache completion bash
"""

import click
from click.shell_completion import get_completion_class

__all__ = ["COMPLETE_VAR", "completion"]

COMPLETE_VAR = "_SOFTCACHE_COMPLETE"
"""Environment variable by which a shell's script asks `softcache` for completions."""


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of SHELL.

    bash has to be 4.4 or later; `softcache` has to be on the PATH of the shell that completes.

    \b
    Example:
      softcache completion bash                            (to look at; fish: softcache completion fish | source)
      eval "$(softcache completion bash)"                  (in ~/.bashrc; zsh: in ~/.zshrc, after compinit)
    """
    complete = get_completion_class(shell)
    assert complete is not None
    click.echo(complete(context.find_root().command, {}, "softcache", COMPLETE_VAR).source())
