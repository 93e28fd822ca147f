"""Files that are there whole or not at all."""

import os

from softcache.runtime.files import staged_file


def test_containers_of_one_process_number_have_a_file_each(tmp_path, monkeypatch):
    """Each pod's program is process 1: two of them wrote into one staged file of a folder that they share."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    path = tmp_path / "report.html"
    with staged_file(path) as one:
        one.write_text("one, long")
        with staged_file(path) as other:
            other.write_text("two")
            assert one.read_text() == "one, long"
        assert path.read_text() == "two"
    assert path.read_text() == "one, long"
    assert list(tmp_path.iterdir()) == [path]
