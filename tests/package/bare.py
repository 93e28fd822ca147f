"""What an environment without torch can do: run by `make package` in one that holds the wheel and nothing else.

python bare.py GOLDEN      GOLDEN is tests/golden

All of it runs in a folder whose own modules have the names of softcache's folders, which must not be imported.
"""

import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

golden = Path(sys.argv[1]).resolve()
top_level = {file.parts[0] for file in distribution("softcache").files or () if file.parts[0] != ".."}
assert {name for name in top_level if not name.endswith(".dist-info")} == {"softcache"}, top_level

foreign = tempfile.TemporaryDirectory()
os.chdir(foreign.name)
for name in ("pipeline.py", "stages.py", "labels.py", "data.py", "reader.py"):
    Path(name).write_text(f"raise RuntimeError('{name} of the current folder was imported')\n")

started = time.perf_counter()
import softcache  # noqa: E402

seconds = time.perf_counter() - started
heavy = sorted({"torch", "numba", "zarr", "tensorstore", "pyarrow", "pydantic"} & set(sys.modules))
assert not heavy, f"`import softcache` takes {heavy} along"
for name in ("torch", "torchvision", "timm", "sklearn", "transformers", "matplotlib"):
    assert find_spec(name) is None, f"{name} is there: this is no bare environment"
assert (Path(softcache.__file__).parent / "py.typed").exists()

import numpy as np  # noqa: E402

expected = np.load(golden / "v1" / "expected.npz")
places = {name: golden / "v1" / name for name in ("zarr", "parquet")}
for store, place in places.items():
    cache = softcache.open_cache(place)
    for view in range(cache.num_views):
        labels = cache.read(range(len(cache)), view=view)
        for name in ("ids", "log_probs", "log_tail"):
            assert np.array_equal(getattr(labels, name), expected[f"{store}/{name}"][view]), (store, name)
        soft = labels.at_temperature(2.0)
        assert np.allclose(np.exp(soft.log_probs).sum(1) + np.exp(soft.log_tail), 1, atol=1e-5), store
from softcache.testing import validate, vectors  # noqa: E402

assert "pytest" not in sys.modules
assert vectors()["packed"]
assert [validate(place) for place in places.values()] == [[], []]

for manifest in sorted((golden / "v1-packed").rglob("manifest.json")):
    assert len(softcache.open_cache(manifest.parent).read([0], view=0)) >= 1, manifest

script = f"from softcache import open_cache; print(len(open_cache({str(places['zarr'])!r})))"
done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
assert done.returncode == 0, done.stderr

message = ""
try:
    softcache.losses  # noqa: B018
except ImportError as error:
    message = str(error)
assert "softcache[vision]" in message, message or "softcache.losses came without torch"


def softcache(*words: str) -> subprocess.CompletedProcess:
    command = Path(sys.executable).with_name("softcache")
    return subprocess.run([command, *words], capture_output=True, text=True, check=False)


for words in (
    ["--help"],
    ["inspect", str(places["zarr"])],
    ["status", str(places["parquet"])],
    ["verify", str(places["zarr"])],
):
    done = softcache(*words)
    assert done.returncode == 0, (words, done.stderr)
done = softcache("train-student", "--config", "digits.toml")
assert done.returncode == 1, done
assert done.stderr.startswith("softcache: softcache train-student: "), done.stderr
assert "pip install 'softcache[vision]'" in done.stderr, done.stderr
print(f"bare environment: import {seconds * 1000:.0f} ms, golden caches read, commands ran")
