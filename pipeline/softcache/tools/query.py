"""Asks a server for the log-probabilities of a source's samples; writes the lines that `softcache import` reads.

A sample is one request of token ids to an OpenAI-compatible server that gives `prompt_logprobs` (vLLM). At most
`concurrency` requests are under way. What may pass, a refused connection, a time-out, status 408, 429 or 5xx, is tried
again after 1, 2, 4, … seconds, or after what the server asks for (`Retry-After`); what will not, another status, ends the
run. A line is written when its answer is whole, so a run that was ended goes on with the samples that the file lacks, and
no sample comes twice.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from softcache.data.sources.text.source import TokenSource
from softcache.errors import AlignmentError, EngineError, LabelError, StorageError
from softcache.runtime.files import try_lock
from softcache.runtime.logging import count_found
from softcache.tools.import_logprobs.formats import parse_logprobs
from softcache.tools.import_logprobs.jsonl import LineLocation, parse_line

__all__ = ["QueryReport", "Server", "query_server"]

MAX_WAIT_SECONDS = 60.0
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
"""Statuses after which a request is tried again."""


@dataclass
class QueryReport:
    """What a run did.

    Attributes:
        found: samples that the file had at the start.
        answered: samples that were asked for, and written.
        retries: requests that were made again.
        seconds: wall time.
    """

    found: int = 0
    answered: int = 0
    retries: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server.

    Attributes:
        url: of its API, such as http://localhost:8000/v1.
        api_key: sent as a bearer token; None: none is sent.
        attempts: of one request, before the run ends.
        timeout: seconds that one attempt may take.
    """

    url: str
    api_key: str | None = None
    attempts: int = 8
    timeout: float = 600.0

    def only_model(self) -> str:
        """Returns the name of the model that the server has.

        Raises:
            EngineError: it does not answer, or has several.
        """
        found = self._retried("/models", None, "its models", threading.Event(), lambda: None)
        names = [model.get("id") for model in found.get("data", [])]
        if len(names) != 1:
            raise EngineError(
                f"server {self.url}: it has {len(names)} models ({', '.join(map(str, names))}); choose one by --model"
            )
        return str(names[0])

    def complete(
        self, request: dict[str, Any], *, of: str, stopped: threading.Event, on_retry: Callable[[], None]
    ) -> dict[str, Any]:
        """Returns the answer to a request for a completion, after as many attempts as it takes.

        Args:
            of: what the request is for, in messages.
            stopped: ends the wait before another attempt.

        Raises:
            EngineError: the server refuses the request, or every attempt failed.
        """
        return self._retried("/completions", request, of, stopped, on_retry)

    def _retried(
        self,
        path: str,
        request: dict[str, Any] | None,
        of: str,
        stopped: threading.Event,
        on_retry: Callable[[], None],
    ) -> dict[str, Any]:
        for attempt in range(self.attempts):
            try:
                return self._send(path, request)
            except _TransientError as error:
                if attempt + 1 == self.attempts:
                    raise EngineError(
                        f"server {self.url}, {of}: {error} in the last of {self.attempts} attempts; answers so far "
                        "are kept: run the same command again when the server is back"
                    ) from error
                on_retry()
                pause = min(2.0**attempt * (0.75 + random.random() / 2), MAX_WAIT_SECONDS)
                if stopped.wait(error.retry_after if error.retry_after is not None else pause):
                    raise EngineError(
                        f"server {self.url}, {of}: given up, since the run has ended"
                    ) from error
            except EngineError as error:
                raise EngineError(f"{error} ({of})") from error
        raise AssertionError("attempts is at least 1")

    def _send(self, path: str, request: dict[str, Any] | None) -> dict[str, Any]:
        body = None if request is None else json.dumps(request).encode()
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        asked = urllib.request.Request(self.url + path, body, headers)
        try:
            with urllib.request.urlopen(asked, timeout=self.timeout) as response:
                found = json.load(response)
        except urllib.error.HTTPError as error:
            text = " ".join(error.read(2000).decode(errors="replace").split())[:300]
            if error.code in TRANSIENT:
                raise _TransientError(
                    f"status {error.code}: {text}", error.headers.get("Retry-After")
                ) from error
            raise EngineError(
                f"server {self.url}: status {error.code} of {path}: {text}; check the URL (it ends in /v1), the model, and "
                "that the server gives so many log-probabilities (vllm serve --max-logprobs)"
            ) from error
        except (OSError, ValueError) as error:  # refused, reset, too late, or not JSON
            reason = getattr(error, "reason", error)
            raise _TransientError(f"{type(reason).__name__}: {reason}") from error
        if not isinstance(found, dict):
            raise EngineError(
                f"server {self.url}: {path} gives {type(found).__name__}; expected a JSON object"
            )
        return found


class _TransientError(EngineError):
    """An attempt failed in a way that may pass."""

    def __init__(self, message: str, retry_after: str | None = None) -> None:
        super().__init__(message)
        is_number = retry_after is not None and retry_after.strip().isdigit()
        self.retry_after = min(float(retry_after or 0), MAX_WAIT_SECONDS) if is_number else None


def query_server(
    server: Server,
    source: TokenSource,
    path: str | Path,
    *,
    k: int,
    model: str | None = None,
    concurrency: int = 32,
    progress: Callable[[int], None] = lambda samples: None,
) -> QueryReport:
    """Writes the log-probabilities of every sample that the file lacks, one line each, as they come.

    Args:
        path: of the JSON lines, new or of a run that was ended.
        k: likeliest tokens of each position.
        model: the name that requests have; None: the only one of the server.
        concurrency: requests under way.
        progress: called with a number of samples that are done, those that were there at the start first.

    Raises:
        StorageError: another run writes the file, or it cannot be written.
        LabelError: the file holds something else, such as answers of another model or of fewer tokens, or the server's
            answers have no log-probabilities.
        AlignmentError: the server saw other tokens than it was sent.
        EngineError: the server refuses a request, or every attempt at one failed.
    """
    started, report, path = time.monotonic(), QueryReport(), Path(path)
    with _opened(path) as file:
        keys = source.keys()
        done, models = _answered(file, path, set(keys), k)
        report.found = len(done)
        count_found(progress, len(done))
        pending = (number for number, key in enumerate(keys) if key not in done)
        if len(done) < len(keys):
            model = model or server.only_model()
        if model is not None and (others := {name: place for name, place in models.items() if name != model}):
            name, place = next(iter(others.items()))
            raise LabelError(
                f"{place}: of model {name!r}; expected {model!r}, as the others are asked for; a cache is of one teacher: "
                "give --out another file, or --model its name"
            )
        if len(done) < len(keys):
            request: dict[str, Any] = {"model": model, "max_tokens": 1, "prompt_logprobs": k}
            request |= {"return_token_ids": True, "temperature": 0.0}
            _ask_all(server, source, request, pending, file, path, concurrency, report, progress)
    report.seconds = time.monotonic() - started
    return report


def _ask_all(
    server: Server,
    source: TokenSource,
    request: dict[str, Any],
    pending: Iterator[int],
    file: BinaryIO,
    path: Path,
    concurrency: int,
    report: QueryReport,
    progress: Callable[[int], None],
) -> None:
    stopped, lock = threading.Event(), threading.Lock()

    def count_retry() -> None:
        with lock:
            report.retries += 1

    def ask(number: int) -> bytes:
        key, tokens = source.key(number), source.sample(number).tokens.tolist()
        answer = server.complete(
            request | {"prompt": tokens}, of=f"sample {key!r}", stopped=stopped, on_retry=count_retry
        )
        line = json.dumps({"key": key, "response": answer}, separators=(",", ":")).encode()
        given = parse_logprobs(parse_line(line, LineLocation(path, 0)))
        if given.tokens != tokens:
            raise AlignmentError(
                f"server {server.url}, sample {key!r}: it saw {len(given.tokens)} tokens that are not the {len(tokens)} sent"
            )
        return line + b"\n"

    under_way: set[Future[bytes]] = set()
    try:
        for number in pending:
            under_way.add(_in_thread(partial(ask, number)))
            if len(under_way) >= concurrency:
                under_way = _write_finished(under_way, file, report, progress)
        while under_way:
            under_way = _write_finished(under_way, file, report, progress)
    finally:
        stopped.set()


def _in_thread(work: Callable[[], bytes]) -> Future[bytes]:
    """The result of work in a thread that the process may leave behind.

    Those of an executor are joined at exit: a command that was stopped would wait for a server that does not answer.
    """
    result: Future[bytes] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="softcache-query", daemon=True).start()
    return result


def _write_finished(
    under_way: set[Future[bytes]], file: BinaryIO, report: QueryReport, progress: Callable[[int], None]
) -> set[Future[bytes]]:
    """Waits for the next answers and writes them; returns the requests that are still under way."""
    finished, left = wait(under_way, return_when=FIRST_COMPLETED)
    failed: BaseException | None = None
    for future in finished:
        if (error := future.exception()) is not None:
            failed = failed or error
            continue
        file.write(future.result())
        report.answered += 1
        progress(1)
    file.flush()
    if failed is not None:
        raise failed
    return left


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that this process alone writes.

    Raises:
        StorageError: another process writes it, or it cannot be opened.
    """
    if path.suffix in (".gz", ".bz2", ".xz", ".zst"):
        raise StorageError(
            f"responses {path}: cannot be appended to; write a plain file, and compress it when it is whole"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            if not try_lock(file.fileno()):
                raise StorageError(
                    f"responses {path}: another process writes it; wait for it, or give --out another file"
                )
            yield file
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"responses {path}: cannot be written: {error.strerror or error}") from error


def _answered(file: BinaryIO, path: Path, keys: set[str], k: int) -> tuple[set[str], dict[str, LineLocation]]:
    """Returns the keys of the answers in a file, which then ends with its last whole line, and the first line of each model.

    Raises:
        LabelError: a line is no answer, of no sample of the source, or was asked for fewer than `k` tokens a position.
    """
    done: set[str] = set()
    models: dict[str, LineLocation] = {}
    end = 0
    file.seek(0)
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):
            break  # a write that was cut off
        end += len(line)
        if not line.strip():
            continue
        answer = parse_line(line, LineLocation(path, number))
        if answer.key not in keys:
            raise LabelError(
                f"{answer.place}: the source has no such sample; the file is of another source: give --out another file"
            )
        if answer.failed:
            continue
        given = parse_logprobs(answer)
        # A row has one more where its actual token is not among the likeliest.
        found = min((len(given.read(row)) for row in given.rows if row is not None), default=k)
        if found < k:
            raise LabelError(
                f"{answer.place}: {found} tokens a position; expected {k}, as the others are asked for; give --out another "
                f"file, or --k {found}"
            )
        done.add(answer.key)
        if answer.model is not None:
            models.setdefault(answer.model, answer.place)
    os.ftruncate(file.fileno(), end)
    file.seek(0, os.SEEK_END)
    return done, models
