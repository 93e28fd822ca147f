"""Small real caches of tokens with labels at some positions only, of packed texts and of chats."""

import json

import numpy as np

from softcache.runs import capture_labels, open_data, open_teacher
from tests.data.test_text_source import CHAT, save_tokenizer
from tests.support.text_caches import text_config

STUDENT = "llama?width=16&depth=1&heads=2"
POLICIES = {
    "every": {"policy": "every", "every": 3},
    "random": {"policy": "random", "share": 0.3, "seed": 5},
    "entropy": {"policy": "entropy", "share": 0.3},
}


def chat_source(folder):
    """Chats of one to four turns, so that a sample's rows are some of its positions."""
    draw = np.random.default_rng(0)
    with (folder / "chats.jsonl").open("w") as file:
        for _ in range(30):
            messages = [
                {
                    "role": role,
                    "content": " ".join(f"w{n}" for n in draw.integers(4, 60, draw.integers(1, 9))),
                }
                for _ in range(draw.integers(1, 5))
                for role in ("user", "assistant")
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return {
        "path": str(folder / "chats.jsonl"),
        "key_column": None,
        "messages_column": "messages",
        "packing": "documents",
        "tokenizer": save_tokenizer(folder / "tokenizer", chat_template=CHAT),
    }


class Made:
    """A source, its cache of all positions, and one of each policy, made when first asked for."""

    def __init__(self, folder, source=None):
        self.folder, self.source = folder, source or {}
        self.caches = {}
        self.data = open_data(self.config())

    def config(self, policy="all", **tables):
        labels = {"positions": POLICIES.get(policy, {"policy": "all"})} | tables.pop("labels", {})
        source = self.source | tables.pop("source", {})
        return text_config(self.folder, source=source, labels=labels, **tables)

    def cache(self, policy="all"):
        if policy not in self.caches:
            config, url = self.config(policy), str(self.folder / f"cache-{policy}")
            self.caches[policy], _ = capture_labels(config, self.data, open_teacher(config, self.data), url)
        return self.caches[policy]


def stored_positions(cache, sample):
    return cache.read_stored([sample]).positions.tolist()
