"""A student on many processes: the same samples, the same student, one voice, and an end that is the same for all."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState

from softcache.cache.storage.local import LocalObjects
from softcache.errors import ConfigError, LostProcessError, RunError
from softcache.reader.open import open_cache
from softcache.runs import open_data, train_student
from softcache.runtime import distributed
from softcache.runtime.distributed import check_same, claim_error_report, on_cpu, translate_errors
from softcache.runtime.logging import log_info, progress_bar
from softcache.runtime.signals import Interrupted, handle_signals
from softcache.stages.cli import main
from softcache.student.checkpoint import RunDirectory
from softcache.student.loop import Trainer
from tests.student.test_huggingface_models import FAMILIES, save_model
from tests.student.test_run import RESTLESS, Killed, dies_at, distance, fit, watched
from tests.support.caches import ROOT, make_cache
from tests.support.process_groups import run_ranks
from tests.support.text_caches import make_text_cache, text_config

SAMPLES = {
    "source": {"max_train_samples": 303, "max_eval_samples": 101}
}  # 303 and 101 divide by no number of ranks


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A cache of 303 images: seven batches of 50, the last one of 3."""
    return make_cache(tmp_path_factory.mktemp("images") / "cache", **SAMPLES)[2].url


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with a cache of documents of very different lengths, of which every second position has a label."""
    folder = tmp_path_factory.mktemp("texts")
    make_text_cache(folder / "cache", folder, **TEXT)
    return folder


TEXT = {
    "source": {"packing": "documents"},
    "labels": {"positions": {"policy": "random", "share": 0.5, "seed": 3}},
}


@contextmanager
def recorded():
    """Yields a list of (epoch, step, view, samples) of what this rank trains on."""
    seen, update = [], Trainer._update

    def spy(loop, batch):
        order = loop.feed.order
        if order.share(order.step - 1)[0]:
            seen.append((order.epoch, order.step - 1, batch.view, batch.samples.tolist()))
        update(loop, batch)

    Trainer._update = spy
    try:
        yield seen
    finally:
        Trainer._update = update


def train_images(url, out, *, tables=None, **options):
    """Two epochs on the 303 images; returns this rank's batches, and the metrics."""
    tables = {"train": {"epochs": 2, **(tables or {}).get("train", {})}, **SAMPLES}
    with recorded() as seen:
        metrics = fit(open_cache(url), out, tables=tables, **options)
    return seen, metrics


def train_texts(folder, out):
    config = text_config(folder, **TEXT, train={"epochs": 2, "batch_size": 5, "eval_batch_size": 3})
    with recorded() as seen:
        metrics = train_student(
            config,
            open_data(config),
            model=config.student.model,
            labels="cache",
            cache=open_cache(folder / "cache"),
            out=out,
        )
    return seen, metrics


def together(*of_ranks):
    """The samples of each (epoch, step, view), over all ranks; a sample that comes twice in an epoch is an error."""
    steps = {}
    for seen in of_ranks:
        for epoch, step, view, samples in seen:
            steps.setdefault((epoch, step, view), []).extend(samples)
    for epoch in {epoch for epoch, _, _ in steps}:
        in_epoch = [sample for key, samples in steps.items() if key[0] == epoch for sample in samples]
        assert len(in_epoch) == len(set(in_epoch))
    return {key: sorted(samples) for key, samples in steps.items()}


def curves(metrics):
    return {
        name: [row[name] for row in metrics["history"]] for name in ("train_loss", "eval_loss", "accuracy")
    }


def assert_same_student(one, other, *, within=2e-5):
    assert distance(one, other) < within
    first, second = (curves(json.loads((out / "metrics.json").read_text())) for out in (one, other))
    for name in ("train_loss", "eval_loss"):
        assert first[name] == pytest.approx(second[name], rel=1e-5), name
    assert first["accuracy"] == second["accuracy"]


def may_write_nothing():
    """From here on a write into the run's directory, or an export, is an error; of random states it is not."""

    def refuse(*args, **kwargs):
        raise AssertionError("a process that is not the first one writes")

    for owner, name in ((RunDirectory, "_write_json"), (RunDirectory, "save_weights")):
        setattr(owner, name, refuse)
    from softcache.student.tasks import ImageTask, TokenTask

    ImageTask.export = TokenTask.export = refuse


# -- as one process ----------------------------------------------------------------------------------------


def _trains_everything(rank, images, texts, out):
    if rank > 0:
        may_write_nothing()
    found = {"images": train_images(images, out / "images")}
    found["pieces"] = train_images(images, out / "pieces", tables={"train": {"accumulation_steps": 3}})
    found["hard"] = train_images(images, out / "hard", labels="ground_truth")
    found["texts"] = train_texts(texts, out / "texts")
    found["again"] = train_images(images, out / "images")
    found["draws"] = _draws(images, out / "draws")
    with pytest.MonkeyPatch.context() as patch, watched(patch, dies_at(6)), pytest.raises(Killed):
        train_images(images, out / "broken", model=RESTLESS, tables=HALVES)
    train_images(images, out / "broken", model=RESTLESS, tables=HALVES)
    print("printed once")
    return found


# Of 101 samples each rank has 50: batch normalisation cannot train on one alone.
HALVES = {"train": {"batch_size": 101}}


def _draws(images, out):
    """Trains a student with dropout and running statistics; returns its next random number, and the statistics."""
    statistics, weights = [], RunDirectory.load_checkpoint

    def keep(directory, accelerator, *hooks):
        statistics.append(accelerator._models[0])
        return weights(directory, accelerator, *hooks)

    RunDirectory.load_checkpoint = keep
    _, metrics = train_images(images, out, model=RESTLESS, tables=HALVES)
    model = statistics[0]
    buffers = {name.removeprefix("module."): value.tolist() for name, value in model.named_buffers()}
    return float(torch.rand(())), buffers, curves(metrics)


def test_two_processes_train_the_student_that_one_trains(tmp_path, images, texts):
    ended = run_ranks(tmp_path / "ranks", 2, _trains_everything, images, texts, tmp_path / "two")
    assert [end.code for end in ended] == [0, 0], ended
    one = {
        "images": train_images(images, tmp_path / "one/images"),
        "hard": train_images(images, tmp_path / "one/hard", labels="ground_truth"),
        "texts": train_texts(texts, tmp_path / "one/texts"),
    }
    for name, (seen, _) in one.items():
        parts = [end.value[name][0] for end in ended]
        assert all(parts)
        assert together(*parts) == together(seen), f"{name}: the batches of one process, cut in two"
        assert_same_student(tmp_path / "two" / name, tmp_path / "one" / name)
    assert_same_student(tmp_path / "two/pieces", tmp_path / "one/images")
    # What each rank has: the same figures, the first one's files, and random numbers of its own.
    first, second = (end.value for end in ended)
    assert first["images"][1] == second["images"][1]
    assert first["again"] == ([], first["images"][1]), "finished, and reported"
    assert first["draws"][0] != second["draws"][0], "one dropout mask for both halves of a batch"
    assert first["draws"][1:] == second["draws"][1:], "what was evaluated is what was saved"
    whole, broken = (
        (tmp_path / "two" / name / "model.safetensors").read_bytes() for name in ("draws", "broken")
    )
    assert whole == broken, "each rank's random numbers went on where the checkpoint was"
    assert "holds this run, finished; reporting it" in ended[0].err
    assert "606/606 samples" in ended[0].err, "progress counts the samples of all"
    assert ended[1].err == ""


# -- another number of processes ---------------------------------------------------------------------------


def _until(rank, url, out, step):
    """Goes on until `step` steps from here, and is then killed, on every rank."""
    with pytest.MonkeyPatch.context() as patch, watched(patch, dies_at(step)), recorded() as seen:
        try:
            fit(open_cache(url), out, tables={"train": {"epochs": 2}, **SAMPLES})
        except Killed:
            return seen, json.loads((out / "checkpoint/progress.json").read_text())["step"]
    raise AssertionError("it was not killed")


def test_an_epoch_goes_on_with_any_other_number_of_processes(tmp_path, images):
    """One process, then two, then four, then one; a checkpoint after steps 2, 4, 6 … of seven in an epoch."""
    whole, _ = train_images(images, tmp_path / "whole")
    by_step = {}
    for count, dies, reached in ((1, 3, 2), (2, 4, 4), (4, 3, 6)):
        ended = run_ranks(tmp_path / f"{count}", count, _until, images, tmp_path / "run", dies)
        assert [end.code for end in ended] == [0] * count, ended
        assert {end.value[1] for end in ended} == {reached}
        # What came after the checkpoint is done again: the later run counts.
        by_step |= together(*(end.value[0] for end in ended))
    seen, _ = train_images(images, tmp_path / "run")
    assert seen[0][:2] == (0, 6)
    assert by_step | together(seen) == together(whole)
    assert_same_student(tmp_path / "run", tmp_path / "whole")


# -- ends --------------------------------------------------------------------------------------------------


def _is_asked_to_end(rank, url, out, asked_rank):
    """Trains until a signal to one rank has ended all of them; returns the signal, and where the checkpoint is."""
    steps = itertools.count(1)

    def on_step(samples):
        if next(steps) == 3 and rank == asked_rank:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, watched(patch, on_step), handle_signals():
        try:
            fit(open_cache(url), out, tables={"train": {"epochs": 2}, **SAMPLES})
        except Interrupted as stopped:
            progress = json.loads((out / "checkpoint/progress.json").read_text())
            return stopped.signum, progress["epoch"], progress["step"]
    raise AssertionError("it was not stopped")


def test_a_signal_to_any_process_ends_all_at_one_step_and_a_rerun_goes_on(tmp_path, images):
    """They agree after eight steps, of which an epoch has seven."""
    ended = run_ranks(tmp_path / "ranks", 2, _is_asked_to_end, images, tmp_path / "run", 1)
    assert [end.code for end in ended] == [0, 0], ended
    assert [end.value for end in ended] == [(signal.SIGTERM, 1, 1)] * 2
    seen, _ = train_images(images, tmp_path / "run")
    assert seen[0][:2] == (1, 1)
    train_images(images, tmp_path / "whole")
    assert_same_student(tmp_path / "run", tmp_path / "whole")


def _command(rank, place, url, *options):
    """`softcache train-student` as its user types it."""
    os.chdir(place)
    sys.argv = ["softcache", "train-student", "--config", "small.toml", "--cache", url, *options]
    main()


CONFIG = """
name = "small"
[source]
name = "digits"
max_train_samples = 303
max_eval_samples = 101
[views]
crop = "padded"
padding = 1
mean = [0.3]
std = [0.4]
[student]
model = "mlp?width=8"
[loss]
temperature = 4
[train]
epochs = 2
batch_size = 50
device = "cpu"
checkpoint_steps = 2
"""


def _sees_another_pixel(rank, place, url):
    if rank == 1:
        from softcache.data.transforms import Views

        apply = Views.apply_batch

        def changed(self, images, *, keys, view):
            viewed = apply(self, images, keys=keys, view=view)
            viewed[-1][0, 3, 3] ^= 1
            return viewed

        Views.apply_batch = changed
    _command(rank, place, url, "--out", "out", "--no-baseline")


def _prints_and_then_differs(rank, place, url):
    with pytest.raises(SystemExit, match=r"^0$"):
        _command(rank, place, url, "--out", "good", "--no-baseline")
    _sees_another_pixel(rank, place, url)


def test_the_table_is_printed_once_and_an_error_of_one_rank_ends_all_with_its_message(tmp_path, images):
    (tmp_path / "small.toml").write_text(CONFIG)
    ended = run_ranks(tmp_path / "ranks", 2, _prints_and_then_differs, tmp_path, images)
    assert [end.code for end in ended] == [1, 1], ended
    assert ended[0].out.count("students from") == 1
    assert ended[1].out == ""
    lines = [line for line in ended[1].err.splitlines() if line]
    assert len(lines) == 1, ended[1].err
    assert lines[0].startswith(f"softcache: cache {images}: sample 'digits/")
    assert "the teacher saw content" in lines[0]
    assert "softcache:" not in ended[0].err
    assert "Traceback" not in ended[0].err
    assert not (tmp_path / "out/metrics.json").exists()


def _ends_otherwise(rank, place, url, step, end):
    """Rank 1 is killed, or sleeps, before a step."""
    steps, update = iter(range(1, step)), Trainer._update

    def until(loop, batch):
        if rank == 1 and next(steps, None) is None:
            os.kill(os.getpid(), signal.SIGKILL) if end == "killed" else time.sleep(60)
        update(loop, batch)

    Trainer._update = until
    _command(rank, place, url, "--out", "out", "--no-baseline", "--set", "train.ddp_timeout_seconds=20")


# For the other process to end by itself, on a busy machine; one that was silent is killed by the test soon after.
GRACE = {"killed": 30.0, "silent": 1.0}


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("killed", "another process of this run has ended without a word"),
        pytest.param("silent", "does not answer", marks=pytest.mark.chaos),
    ],
)
def test_a_process_that_is_gone_or_silent_ends_the_run_and_a_rerun_goes_on(tmp_path, images, end, message):
    (tmp_path / "small.toml").write_text(CONFIG)
    ended = run_ranks(
        tmp_path / "ranks", 2, _ends_otherwise, tmp_path, images, 4, end, grace_seconds=GRACE[end]
    )
    assert ended[0].code == 1, "within its time, " + ended[0].err
    assert ended[1].code == -signal.SIGKILL, "of the test, where it was silent"
    lines = [line for line in ended[0].err.splitlines() if line.startswith("softcache:")]
    assert len(lines) == 1, ended[0].err
    assert message in lines[0]
    assert "goes on from the last checkpoint" in lines[0]
    assert "Traceback" not in ended[0].err
    assert json.loads((tmp_path / "out/checkpoint/progress.json").read_text())["step"] == 2


# -- the parts ---------------------------------------------------------------------------------------------


STEP = {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "8"}
"""Of the second process of `srun --ntasks 2` in a job of eight, on its second machine."""


@pytest.fixture
def second_of_two(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, (3, 4)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, (1, 2)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, (0, 1)),  # an array of independent jobs
        ({**STEP, "MASTER_ADDR": "node1"}, (1, 2)),
        (STEP, (0, 1)),
        # A batch script, which is one process of a job of two, and what torchrun starts in a step of its own.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "MASTER_ADDR": "node1"}, (0, 1)),
        ({**STEP, "MASTER_ADDR": "node1", "RANK": "5", "WORLD_SIZE": "8"}, (5, 8)),
        ({"RANK": "3"}, (0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
        ({"RANK": "", "WORLD_SIZE": "many"}, (0, 1)),
    ],
)
def test_a_launcher_says_which_process_this_is(monkeypatch, environment, expected):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (distributed.rank(), distributed.num_ranks()) == expected
    assert distributed.is_rank_zero() == (expected[0] == 0)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (STEP, ("1", "2", "0", "29500")),
        ({**STEP, "MASTER_PORT": "7"}, ("1", "2", "0", "7")),
        (
            {
                "OMPI_COMM_WORLD_RANK": "9",
                "OMPI_COMM_WORLD_SIZE": "16",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "MASTER_PORT": "7",
            },
            ("9", "16", "1", "7"),
        ),
    ],
)
def test_accelerate_is_told_what_srun_and_mpirun_call_otherwise(monkeypatch, environment, expected):
    """On GPUs it reads torchrun's names alone, and found one process of one."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in {**environment, "MASTER_ADDR": "node1"}.items():
        monkeypatch.setenv(name, value)
    told = []

    def state(**options):
        told.append(tuple(os.environ.get(name) for name in names))
        return SimpleNamespace(num_processes=int(os.environ["WORLD_SIZE"]))

    monkeypatch.setattr("accelerate.PartialState", state)
    distributed.join(cpu=False, timeout_seconds=1)
    assert told == [expected]


@pytest.mark.parametrize("number", ["0", "1"])
def test_jobs_of_a_launcher_without_an_address_are_independent(monkeypatch, tmp_path, shared_cache, number):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name in ("PMI", "OMPI_COMM_WORLD", "MV2_COMM_WORLD"):
        monkeypatch.setenv(f"{name}_SIZE", "2")
        monkeypatch.setenv(f"{name}_RANK", number)
    monkeypatch.setattr(PartialState, "_shared_state", {})
    tables = {"train": {"epochs": 1, "device": "cpu"}}
    fit(shared_cache[2], tmp_path / number, tables=tables)
    assert (tmp_path / number / "metrics.json").exists()
    expected = r"another run works on it.*set OMPI_COMM_WORLD_SIZE=2 and no MASTER_ADDR, so its processes are independent"
    with (
        LocalObjects(tmp_path / "shared").claim(".lock"),
        pytest.raises(RunError, match=expected),
    ):
        fit(shared_cache[2], tmp_path / "shared", tables=tables)


def test_a_launcher_of_one_run_without_an_address_is_refused(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(RunError, match="set WORLD_SIZE=2 and no MASTER_ADDR"):
        distributed.join(cpu=True, timeout_seconds=1)


def test_several_processes_without_an_accelerator_are_on_cpus_without_being_told(second_of_two, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert on_cpu("auto")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert (on_cpu("auto"), on_cpu("cpu")) == (False, True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not on_cpu("auto"), "one process finds its device by itself"


def test_only_the_first_process_tells_how_far_it_is(second_of_two, monkeypatch, capsys):
    def speak():
        log_info("a line")
        with progress_bar("a step", 10) as advance:
            advance(10)
        return capsys.readouterr()

    assert speak() == ("", "")
    monkeypatch.setenv("RANK", "0")
    assert "a line" in speak().err


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:554] Connection closed by peer"),
            "has ended without a word",
        ),
        (
            RuntimeError("[gloo/transport/unbound_buffer.cc] Timed out waiting 5ms for recv"),
            "does not answer",
        ),
        (torch.distributed.DistBackendError("NCCL error: remote process exited"), "has ended without a word"),
    ],
)
def test_a_broken_exchange_is_a_lost_process(second_of_two, raised, message):
    with (
        pytest.raises(LostProcessError, match=rf"process 1 of 2: another process of this run {message}"),
        translate_errors(),
    ):
        raise raised


def test_other_errors_are_left_as_they_are(second_of_two, monkeypatch):
    with pytest.raises(RuntimeError, match="a bug"), translate_errors():
        raise RuntimeError("a bug")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RuntimeError, match=r"^Connection closed$"), translate_errors():
        raise RuntimeError("Connection closed")


def test_processes_that_disagree_about_the_run_are_refused(second_of_two, monkeypatch):
    here = {"source": "sha256:1", "train": {"lr": 1.0}, "model": "mlp"}
    monkeypatch.setattr(
        "softcache.runtime.distributed.broadcast_from_rank0", lambda value: here | {"source": "sha256:2"}
    )
    with pytest.raises(
        RunError, match=r"process 1 of 2: the run differs .*: source: 'sha256:2'; 'sha256:1'; give"
    ):
        check_same("the run", here)
    monkeypatch.setattr("softcache.runtime.distributed.broadcast_from_rank0", lambda value: dict(here))
    check_same("the run", here)


def test_the_first_to_fail_speaks_once_in_every_attempt_of_the_launcher(second_of_two, monkeypatch):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    assert [claim_error_report() for _ in range(3)] == [True, False, False]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert [claim_error_report() for _ in range(2)] == [True, False]


def test_without_a_store_every_process_speaks(second_of_two, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert [claim_error_report() for _ in range(2)] == [True, True]


def test_a_launcher_whose_processes_form_no_group_is_refused(
    second_of_two, tmp_path, shared_cache, monkeypatch
):
    """Each would train the whole run, into one directory."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "1")
        PartialState(cpu=True)
    with pytest.raises(RunError, match=r"process 1: the launcher set 2 processes .*accelerate finds 1"):
        fit(shared_cache[2], tmp_path)


def test_accelerates_own_accumulation_setting_does_not_divide_the_loss_again(
    tmp_path, shared_cache, monkeypatch
):
    parts = {"train": {"epochs": 1, "clip_norm": 0.1, "accumulation_steps": 4}}
    fit(shared_cache[2], tmp_path / "without", tables=parts)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    fit(shared_cache[2], tmp_path / "with", tables=parts)
    assert distance(tmp_path / "without", tmp_path / "with") == 0


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("GRADIENT_ACCUMULATION_STEPS", "64", r"expected '1'.*; set train\.accumulation_steps"),
        ("MIXED_PRECISION", "bf16", r"expected 'no'.*; set train\.precision"),
        ("MIXED_PRECISION", "fp8", r"expected 'no'.*; set train\.precision"),
        ("DYNAMO_BACKEND", "INDUCTOR", r"dynamo_backend .*; set train\.compile = true"),
        ("USE_FSDP", "true", r'use_fsdp .*; set train\.parallel = "fsdp"'),
        ("USE_DEEPSPEED", "true", r'use_deepspeed .*; set train\.parallel = "fsdp"'),
        ("USE_PARALLELISM_CONFIG", "1", r'use_parallelism_config .*; set train\.parallel = "fsdp"'),
    ],
)
def test_what_accelerate_launch_is_asked_for_and_a_run_would_ignore_is_refused(
    tmp_path, shared_cache, monkeypatch, variable, value, message
):
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    with pytest.raises(ConfigError, match=message):
        fit(shared_cache[2], tmp_path, tables={"train": {"epochs": 1}})


def test_what_accelerate_launch_is_asked_for_and_a_run_does_is_accepted(tmp_path, shared_cache, monkeypatch):
    for name, value in (("MIXED_PRECISION", "bf16"), ("DYNAMO_BACKEND", "NO"), ("USE_CPU", "True")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    fit(shared_cache[2], tmp_path, tables={"train": {"epochs": 1, "precision": "bf16", "device": "cpu"}})


def test_a_loss_meter_of_one_process_from_before_there_were_many_is_read(tmp_path, images):
    with pytest.MonkeyPatch.context() as patch, watched(patch, dies_at(4)), pytest.raises(Killed):
        train_images(images, tmp_path / "run")
    progress = tmp_path / "run/checkpoint/progress.json"
    state = json.loads(progress.read_text())
    progress.write_text(json.dumps(state | {"loss": state["loss"][0]}))
    train_images(images, tmp_path / "run")
    train_images(images, tmp_path / "whole")
    assert_same_student(tmp_path / "run", tmp_path / "whole", within=1e-12)


# -- long ones: make chaos ---------------------------------------------------------------------------------


def launch(place, url, count, *options, launcher=("torch.distributed.run",)):
    return subprocess.Popen(
        [
            *(
                sys.executable,
                "-m",
                *launcher,
                f"--nproc-per-node={count}",
                "-m",
                "softcache",
                "train-student",
            ),
            *("--config", "small.toml", "--cache", url, *options),
        ],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def workers_of(process):
    """The processes that a launcher started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return sorted(int(child) for child in children)


@pytest.mark.chaos
def test_processes_of_torchrun_are_killed_again_and_again_and_the_student_is_the_same(tmp_path, images):
    draw = random.Random(5)
    (tmp_path / "small.toml").write_text(CONFIG)
    options = ("--no-baseline", "--set", "train.epochs=60", "--out")
    whole = launch(tmp_path, images, 1, *options, "whole")
    assert whole.wait(120) == 0
    for count in (2, 4, 2, 3, 2):
        before = (tmp_path / "out/checkpoint").exists() and progress_of(tmp_path / "out")
        run = launch(tmp_path, images, count, *options, "out")
        deadline = time.monotonic() + 120
        while progress_of(tmp_path / "out") in (None, before) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(draw.random() * 0.2)
        os.kill(draw.choice(workers_of(run)), signal.SIGKILL)
        out, err = run.communicate(timeout=60)
        assert run.returncode == 1, err
        assert "SIGKILL" in err
        assert sum(line.startswith("softcache:") for line in err.splitlines()) <= 1, err
        assert out == ""
    out, err = launch(tmp_path, images, 2, *options, "out").communicate(timeout=120)
    assert out.count("students from") == 1, err
    assert_same_student(tmp_path / "out", tmp_path / "whole", within=1e-3)


def progress_of(out):
    try:
        state = json.loads((out / "checkpoint/progress.json").read_text())
    except FileNotFoundError:
        return None
    return state["epoch"], state["step"]


@pytest.mark.chaos
@pytest.mark.parametrize("count", [2, 4])
def test_accelerate_launch_starts_it_too(tmp_path, images, count):
    (tmp_path / "small.toml").write_text(CONFIG)
    how = ("accelerate.commands.accelerate_cli", "launch", "--multi_gpu", f"--num_processes={count}")
    run = subprocess.run(
        [
            *(sys.executable, "-m", *how, "--module", "softcache", "train-student"),
            *("--config", "small.toml", "--cache", images, "--out", "out", "--no-baseline"),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("students from") == 1
    train_images(images, tmp_path / "one")
    assert_same_student(tmp_path / "out", tmp_path / "one")
    assert len(list((tmp_path / "out/checkpoint").glob("random_states_*"))) == count


@pytest.mark.chaos
@pytest.mark.parametrize("count", [2, 4])
def test_one_ranks_error_is_the_one_message_under_torchrun(tmp_path, images, count):
    (tmp_path / "small.toml").write_text(CONFIG)
    (tmp_path / "one_differs.py").write_text(
        "import os\n"
        "from tests.student.test_many_processes import _sees_another_pixel\n"
        f"_sees_another_pixel(int(os.environ['RANK']), {str(tmp_path)!r}, {str(images)!r})\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", "one_differs.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 1
    lines = [line for line in run.stderr.splitlines() if line.startswith("softcache:")]
    assert len(lines) == 1, run.stderr
    assert "the teacher saw content" in lines[0]
    assert "exitcode  : 1" in run.stderr


def train_adapters(folder, out):
    model = f"hf:{folder / 'pretrained'}"
    train = {
        "epochs": 2,
        "batch_size": 5,
        "eval_batch_size": 3,
        "optimizer": "adafactor",
        "schedule": "linear",
        "log_every_steps": 2,
        "eval_every_steps": 3,
        "weight_decay": 0.1,
    }
    config = text_config(folder, **TEXT, train=train, student={"lora": {"rank": 4}})
    with pytest.MonkeyPatch.context() as patch:
        logged = []
        patch.setattr("softcache.runs.fit.event", lambda name, **row: logged.append((name, row)))
        metrics = train_student(
            *(config, open_data(config)),
            model=model,
            labels="cache",
            cache=open_cache(folder / "cache"),
            out=out,
        )
    return metrics, [row for name, row in logged if name == "step"]


def _trains_adapters(rank, folder, out):
    if rank > 0:
        may_write_nothing()
    return train_adapters(folder, out)


def test_adapters_and_reports_within_an_epoch_are_those_of_one_process(tmp_path, texts):
    tokenizer = open_data(text_config(texts, **TEXT)).tokenizer
    save_model(texts / "pretrained", FAMILIES["llama"], tokenizer)
    ended = run_ranks(tmp_path / "ranks", 2, _trains_adapters, texts, tmp_path / "two")
    assert [end.code for end in ended] == [0, 0], ended
    one, steps = train_adapters(texts, tmp_path / "one")
    assert_same_student(tmp_path / "two", tmp_path / "one")
    two, steps_of_two = ended[0].value
    assert two == ended[1].value[0]
    assert one["evaluations"]
    for found, expected in zip(two["evaluations"], one["evaluations"], strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    keys = ("epoch", "step", "loss", "lr")
    for found, expected in zip(steps_of_two, steps, strict=True):
        assert [found[k] for k in keys] == pytest.approx([expected[k] for k in keys], rel=1e-4)
