"""A server is asked for every sample once: bounded, retried, resumed; the file is what `softcache import` reads."""

import fcntl
import json
import socket
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner

from softcache.errors import AlignmentError, EngineError, LabelError, SourceError, StorageError
from softcache.runs import open_data
from softcache.stages.query import query_command
from softcache.tools.import_logprobs import find_responses, import_labels
from softcache.tools.query import Server, query_server
from tests.support.fake_vllm import MODEL, Handler, answer
from tests.support.text_caches import text_config

DOCUMENTS = {"packing": "documents", "max_train_samples": 20, "max_eval_samples": 8}


class Faulty(Handler):
    """Answers as vLLM; `fault` of the server gives for the number of a request a status, or changes its answer."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.requests.append((request, self.headers.get("Authorization")))
            server.under_way += 1
            server.most = max(server.most, server.under_way)
            fault = server.fault(len(server.requests) - 1)
        body = answer(request)
        if callable(fault):
            fault(body)
        with server.lock:
            server.under_way -= 1
        if isinstance(fault, int):
            self.send_response(fault)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"busy")
        else:
            self._send(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Faulty) as found:
        found.lock, found.requests, found.fault = threading.Lock(), [], lambda number: None
        found.under_way = found.most = 0
        found.url = f"http://127.0.0.1:{found.server_port}/v1"
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return text_config(tmp_path_factory.mktemp("texts"), source=DOCUMENTS)


@pytest.fixture(scope="module")
def data(config):
    return open_data(config).train


def keys_of(path):
    return [json.loads(line)["key"] for line in path.read_text().splitlines()]


def ask(server, data, path, **given):
    return query_server(Server(server.url, **given.pop("how", {})), data.source, path, **{"k": 5} | given)


def test_every_sample_is_asked_once_and_imported(server, config, data, tmp_path):
    path = tmp_path / "out" / "responses.jsonl"
    report = ask(server, data, path, concurrency=3, how={"api_key": "secret"})
    keys = [data.source.key(number) for number in range(len(data.source))]
    assert (report.found, report.answered, report.retries) == (0, len(keys), 0)
    assert sorted(keys_of(path)) == sorted(keys)
    assert server.most <= 3
    assert {authorization for _, authorization in server.requests} == {"Bearer secret"}
    request = server.requests[0][0]
    assert {key: request[key] for key in ("model", "max_tokens", "prompt_logprobs", "return_token_ids")} == {
        "model": MODEL,
        "max_tokens": 1,
        "prompt_logprobs": 5,
        "return_token_ids": True,
    }
    found = find_responses([path], data.source)
    cache, _ = import_labels(found, data, str(tmp_path / "cache"), k=5, settings=config.capture)
    assert not cache.missing_units
    assert ask(server, data, path).answered == 0
    assert len(server.requests) == len(keys)


def test_what_may_pass_is_tried_again(server, data, tmp_path):
    server.fault = lambda number: (503, 429, 500, None)[number % 4]
    report = ask(server, data, tmp_path / "a.jsonl", concurrency=1)
    assert (report.answered, report.retries) == (len(data.source), 3 * len(data.source))
    server.fault = lambda number: 503
    with pytest.raises(
        EngineError, match=r"sample '.*': status 503: busy in the last of 3 attempts; answers so far are kept"
    ):
        ask(server, data, tmp_path / "b.jsonl", how={"attempts": 3})


def test_a_run_that_ended_goes_on(server, data, tmp_path):
    path = tmp_path / "responses.jsonl"
    server.fault = lambda number: 400 if number == 7 else None
    with pytest.raises(
        EngineError, match=r"status 400 of /completions: busy; check the URL .*\(sample '.*'\)"
    ):
        ask(server, data, path, concurrency=1)
    assert len(keys_of(path)) == 7
    path.write_bytes(path.read_bytes()[:-30])  # killed while it wrote
    server.fault = lambda number: None
    report = ask(server, data, path)
    assert (report.found, report.answered) == (6, len(data.source) - 6)
    assert len(set(keys_of(path))) == len(keys_of(path)) == len(data.source)


def test_a_file_of_another_model_or_of_fewer_tokens_is_not_gone_on_with(server, data, tmp_path):
    path = tmp_path / "responses.jsonl"
    ask(server, data, path, k=3)
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:4]))
    asked = len(server.requests)
    with pytest.raises(
        LabelError, match=r"jsonl, line 1, .*: [34] tokens a position; expected 6, .*--out another"
    ):
        ask(server, data, path, k=6)
    with pytest.raises(
        LabelError, match=r"line 1, .*: of model 'Qwen/Qwen3-8B'; expected 'other', .*--out another"
    ):
        ask(server, data, path, k=3, model="other")
    assert len(server.requests) == asked
    assert ask(server, data, path, k=2).found == 4


def test_a_command_that_is_stopped_does_not_wait_for_a_server_that_is_silent(config, tmp_path):
    settings = (
        "import sys; from softcache.runs import open_data; from tests.support.text_caches import text_config; "
        "from pathlib import Path; from softcache.tools.query import Server, query_server; import signal; "
        "signal.signal(signal.SIGTERM, lambda *a: sys.exit(9)); "
        f"source = open_data(text_config(Path({str(Path(config.source.path).parent)!r}), source={DOCUMENTS!r})).train.source; "
        "query_server(Server(sys.argv[1], None, 1, 3600), source, sys.argv[2], k=3, model='m')"
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = subprocess.Popen([sys.executable, "-c", settings, url, str(tmp_path / "a.jsonl")])
        try:
            connection, _ = silent.accept()  # a request is under way
            process.terminate()
            assert process.wait(timeout=120) == 9  # an hour, where its threads are waited for
            connection.close()
        finally:
            process.kill()


def test_what_is_wrong_has_one_message(server, data, tmp_path):
    path = tmp_path / "responses.jsonl"
    server.fault = lambda number: lambda body: body["choices"][0].update(prompt_logprobs=None)
    with pytest.raises(LabelError, match="no log-probabilities: expected prompt_logprobs"):
        ask(server, data, path)
    server.fault = lambda number: lambda body: body["choices"][0]["prompt_token_ids"].__setitem__(0, 299)
    with pytest.raises(AlignmentError, match=r"it saw \d+ tokens that are not the \d+ sent"):
        ask(server, data, path)
    path.write_text('{"key": "another@0", "response": {}}\n')
    with pytest.raises(LabelError, match="no such sample; the file is of another source: give --out"):
        ask(server, data, path)
    path.unlink()
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="another process writes it"):
            ask(server, data, path)
    with pytest.raises(StorageError, match=r"cannot be appended to; write a plain file"):
        ask(server, data, tmp_path / "responses.jsonl.gz")


def test_the_command(server, config, tmp_path):
    (tmp_path / "my.toml").write_text(
        '[source]\nmodality = "text"\nname = "hf"\nkey_column = "id"\ntokenizer = "bpe?vocab_size=300"\nseq_len = 32\n'
        f'eval_share = 0.2\npacking = "documents"\npath = "{config.source.path}"\ndata_dir = "{config.source.data_dir}"\n'
        "[labels]\nk = 4\n"
    )
    out = tmp_path / "responses.jsonl"
    options = ["--config", str(tmp_path / "my.toml"), "--out", str(out)]
    done = CliRunner().invoke(query_command, [server.url, *options], catch_exceptions=False)
    assert f"{len(keys_of(out))} of {len(keys_of(out))} samples" in done.stdout
    assert server.requests[0][0]["prompt_logprobs"] == 4
    done = CliRunner().invoke(query_command, [server.url, *options, "--json"], catch_exceptions=False)
    assert json.loads(done.stdout)["found"] == len(keys_of(out))
    asked = len(server.requests)
    for packing in ("packed", "best_fit"):
        done = CliRunner().invoke(query_command, [server.url, *options, "--set", f"source.packing={packing}"])
        assert isinstance(done.exception, SourceError)
        assert "a server lets a prompt see all of itself" in str(done.exception)
    assert len(server.requests) == asked
