"""How torch's threads wait, as the command sets it before torch is imported."""

import os
import subprocess
import sys

import pytest

from tests.support.caches import ROOT

PROGRAM = """
import os, sys
from softcache.stages import cli
assert "torch" not in sys.modules
sys.argv = ["softcache", *sys.argv[1:]]
try:
    cli.main()
except SystemExit:
    print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"))
"""


@pytest.mark.parametrize(
    ("command", "given", "found"),
    [
        ("teacher-logits", {}, "10000 None"),
        ("teacher-logits", {"GOMP_SPINCOUNT": "7"}, "7 None"),
        ("teacher-logits", {"OMP_WAIT_POLICY": "active"}, "None active"),
        ("train-student", {}, "None None"),
    ],
)
def test_a_capture_has_them_share_cores_unless_a_variable_is_set(command, given, found):
    kept = {name: x for name, x in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, command, "--help"],
        env=kept | given,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == found
