"""Commands, targets, links, paths and Python examples of README, --help and docs exist."""

import re

import click
import pytest
import torch

from softcache import open_cache
from softcache.data import sources
from softcache.stages.cli import softcache
from softcache.stages.commands import COMMANDS
from tests.support.caches import ROOT

README = (ROOT / "README.md").read_text()
TABLE = (ROOT / "docs/how-to/command-line.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)[1].split()


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_help_and_a_line_in_the_table(target):
    assert re.search(rf"^{target}:.*  ## \w", MAKEFILE, re.M), f"make help does not list {target}"
    assert f"make {target}`" in TABLE or f"make {target} " in TABLE


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help_with_an_example_and_a_line_in_the_table(name):
    command = softcache.get_command(click.Context(softcache), name)
    assert command.name == name
    assert len(COMMANDS[name][1]) <= 80, "one line of the list"
    assert re.search(rf"softcache {name} (--|r|bash)", command.help), "an example"
    assert f"`softcache {name}" in TABLE
    for option in command.params:
        assert option.param_type_name == "argument" or option.help, f"{name} {option.name} has no help"


def test_the_table_of_the_environment_has_what_is_read_from_it():
    read = set()
    for path in (*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("stages/*.py")):
        for line in re.findall(r".*\b(?:environ|user_cache_folder)\b.*", path.read_text()):
            read |= set(re.findall(r"\"([A-Z]+_[A-Z_]+)\"", line))
    # Of launchers, and those that are set for what is started.
    read -= {"LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TOKENIZERS_PARALLELISM"}
    read = {name for name in read if not name.startswith(("TORCHELASTIC_", "AWS_", "XDG_", "TRITON_"))}
    read.add("OMP_NUM_THREADS")  # by torch
    assert read == set(re.findall(r"`([A-Z]+_[A-Z_]+)`(?=[^|]*\|[^|]*\|[^|]*\|\n)", TABLE))


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130


def test_every_link_and_config_of_the_docs_exists():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text()
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name} links to {link}"
        for path in re.findall(r"`((?:configs|docs|tests|pipeline|benchmarks)/[\w./-]+)`", text):
            assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_the_python_of_the_readme_runs(shared_cache):
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "DataLoader" in block)
    code = code.replace("runs/digits/cache", shared_cache[2].url)
    code = code.replace(
        '"name": "digits"', '"name": "digits", "max_train_samples": 300, "max_eval_samples": 100'
    )
    student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    names = {"student": student, "normalize": lambda images: images.float() / 255}
    exec(compile(code, "README.md", "exec"), names)
    assert names["loss"].isfinite()
    names["loss"].backward()


def test_public_names():
    import softcache

    for name in softcache.__all__:
        assert getattr(softcache, name) is not None
    assert open_cache is softcache.open_cache
    assert sources.open_source
