"""The examples of docs/how-to/extend.md, as files of a user."""

import re
import tomllib
from pathlib import Path

from tests.support.caches import ROOT


def write_example(heading: str, module: Path) -> dict:
    """Writes the Python block below a heading to a file; returns the tables of the TOML block there."""
    page = (ROOT / "docs/how-to/extend.md").read_text()
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    blocks = dict(re.findall(r"```(python|toml)\n(.*?)```", section, re.DOTALL))
    module.write_text(blocks["python"])
    return tomllib.loads(blocks["toml"])
