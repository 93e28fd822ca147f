"""A server that answers as `vllm serve MODEL --max-logprobs N` does, for the page that asks one: its model is a fixed draw.

    python -m tests.support.fake_vllm PORT

POST /v1/completions takes token ids and gives `prompt_logprobs`, the N likeliest of 300 tokens and the actual one at each
place, with `prompt_token_ids`; GET /health answers when it is up, GET /v1/models names its model.
"""

import json
import random
import sys
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from math import log

NUM_TOKENS = 300
MODEL = "Qwen/Qwen3-8B"


@cache
def log_probs_after(token: int) -> list[float]:
    """Log-probabilities of all tokens behind one token."""
    draw = random.Random(token)
    weights = [draw.expovariate(1.0) ** 4 for _ in range(NUM_TOKENS)]
    return [log(weight / sum(weights)) for weight in weights]


def answer(request: dict) -> dict:
    """The completion of one prompt."""
    prompt, count = request["prompt"], request["prompt_logprobs"]
    rows: list[dict | None] = [None]
    for before, token in pairwise(prompt):
        log_probs = log_probs_after(before)
        ranked = sorted(range(NUM_TOKENS), key=lambda one: -log_probs[one])
        shown = {*ranked[:count], token % NUM_TOKENS}
        rows.append(
            {
                str(n): {"logprob": log_probs[n], "rank": ranked.index(n) + 1, "decoded_token": "?"}
                for n in shown
            }
        )
    choice = {"index": 0, "text": "?", "prompt_logprobs": rows, "prompt_token_ids": prompt}
    return {"object": "text_completion", "model": request["model"], "choices": [choice]}


class Server(ThreadingHTTPServer):
    """As many requests at once as a client likes."""

    request_queue_size = 256


class Handler(BaseHTTPRequestHandler):
    """One request."""

    def do_GET(self) -> None:
        self._send({"data": [{"id": MODEL}]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        self._send(answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

    def _send(self, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
