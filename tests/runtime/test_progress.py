"""Lines of progress where there is no terminal: one every PLAIN_SECONDS while a step runs, and one at its end."""

import logging

from softcache.runtime import logging as progress


def test_the_last_line_is_shown_once(monkeypatch, caplog):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, logger="softcache"), progress.progress_bar("train", 3) as advance:
        for _ in range(3):
            advance(1)
    shown = [record.getMessage().partition(" samples")[0] for record in caplog.records]
    assert shown == ["train: 1/3", "train: 2/3", "train: 3/3"]
