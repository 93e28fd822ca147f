"""The diagnosis of `softcache doctor`: the machine, and stores that work and that do not."""

import json
import os

import pytest
from click.testing import CliRunner

from softcache.cache.storage.local import LocalObjects
from softcache.errors import StorageError
from softcache.stages.cli import softcache
from softcache.tools.doctor import store_access, versions

STEPS = ["open", "write", "list", "read", "delete"]


def test_a_relative_folder_that_is_there_is_not_said_to_be_missing(tmp_path, monkeypatch):
    (tmp_path / "runs/cache").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for url in ("runs/cache", "~/runs/cache"):
        assert store_access(url)["tried"] == url
        assert store_access(url)["failed"] is None
    assert store_access("runs/new")["tried"] == str(tmp_path / "runs")


def test_a_folder_that_works_is_left_as_it_was(tmp_path):
    (tmp_path / "mine").write_text("kept")
    found = store_access(str(tmp_path))
    assert (found["done"], found["failed"]) == (STEPS, None)
    assert sorted(os.listdir(tmp_path)) == ["mine"]


def test_a_folder_that_is_not_there_is_tried_above_and_not_made(tmp_path):
    found = store_access(str(tmp_path / "runs/new/cache"))
    assert (found["tried"], found["failed"]) == (str(tmp_path), None)
    assert os.listdir(tmp_path) == []


def test_a_file_in_the_place_of_a_folder_is_told(tmp_path):
    (tmp_path / "taken").write_text("")
    failed = store_access(str(tmp_path / "taken"))["failed"]
    assert failed["step"] == "open"
    assert "taken: is a file" in failed["message"]


@pytest.mark.parametrize("step", ["list", "get", "delete"])
def test_the_step_that_fails_is_named_with_what_to_do(tmp_path, monkeypatch, step):
    def refuse(self, *args, **kwargs):
        raise StorageError(f"{step}: denied")

    with monkeypatch.context() as patched:
        patched.setattr(LocalObjects, step, refuse)
        found = store_access(str(tmp_path))
    expected = {"get": "read"}.get(step, step)
    assert found["done"] == STEPS[: STEPS.index(expected)]
    assert found["failed"]["step"] == expected
    assert found["failed"]["message"] == f"{step}: denied"
    assert found["failed"]["to_do"]


def test_bytes_that_come_back_changed_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(LocalObjects, "get", lambda self, path: b"other")
    assert "other bytes than were written" in store_access(str(tmp_path))["failed"]["message"]
    assert os.listdir(tmp_path) == []


def test_extras_are_those_that_softcache_declares():
    found = versions()["extras"]
    assert found["cloud"].keys() == {"obstore"}
    assert "dev" not in found


def test_an_extra_that_is_missing_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr("softcache.tools.doctor._extras", lambda: {"text": ["no-such-package"]})
    shown = CliRunner().invoke(softcache, ["doctor"])
    assert shown.exit_code == 0, shown.output
    assert "pip install 'softcache[text]'" in shown.output
    assert "work with images, not with text" in shown.output


def test_a_store_that_fails_fails_the_command(tmp_path):
    (tmp_path / "taken").write_text("")
    shown = CliRunner().invoke(softcache, ["doctor", str(tmp_path), str(tmp_path / "taken"), "--json"])
    assert shown.exit_code == 1
    found = json.loads(shown.stdout)
    assert found["broken"] == [str(tmp_path / "taken")]
    assert [store["failed"] is None for store in found["stores"]] == [True, False]
    assert found["devices"]["cpu_cores"] >= 1
    assert all(place["free_bytes"] > 0 for place in found["free_space"].values())


def test_a_scheme_that_is_not_served_is_told():
    shown = CliRunner().invoke(softcache, ["doctor", "ftp://host/place"])
    assert shown.exit_code == 1
    assert "ftp:// is not served" in shown.stderr
