"""One line of a server's answers: the sample's key, and the answer or why there is none.

Each line is one JSON object with the sample's key as `key` or `custom_id`. The answer is the object itself, its
`response`, or `response.body` (the output files of OpenAI's batch API and of `vllm run-batch`; a line with an
`error`, or with a `status_code` other than 200, counts as not answered). Where it has `choices` there is exactly one,
and a field is looked up there first, then in the answer, then in the line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from softcache.errors import LabelError

__all__ = ["Answer", "LineLocation", "expect", "parse_line"]


@dataclass(frozen=True)
class LineLocation:
    """A line of a file, for messages."""

    path: Path
    line: int
    key: str | None = None

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}" + ("" if self.key is None else f", key {self.key!r}")


@dataclass(frozen=True)
class Answer:
    """One line.

    Attributes:
        failed: why there is no answer; empty if there is one.
        holders: where its fields are looked up, in this order.
    """

    place: LineLocation
    key: str
    model: str | None
    failed: str
    holders: tuple[Mapping[str, Any], ...]

    def field(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """Returns a field, or None if it is null or missing everywhere."""
        for holder in self.holders:
            value = holder.get(name)
            if value is not None:
                return expect(self.place, name, value, kind)
        return None


def expect(place: LineLocation, name: str, value: Any, kind: type | tuple[type, ...]) -> Any:
    """Returns the value.

    Raises:
        LabelError: it is of another type.
    """
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise LabelError(
            f"{place}: {name} is of type {type(value).__name__}; expected {' or '.join(one.__name__ for one in kinds)}; see "
            "docs/how-to/import-logprobs.md"
        )
    return value


def parse_line(line: bytes, place: LineLocation) -> Answer:
    """Returns the answer of a line; its `place` then has the key.

    Raises:
        LabelError: it is not a JSON object with a key, or its answer is not of the form above.
    """
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LabelError(f"{place}: not JSON: {error}; give one JSON object per line") from error
    expect(place, "the line", content, dict)
    key = content.get("key", content.get("custom_id"))
    if not isinstance(key, str):
        raise LabelError(f"{place}: no key; give the sample's key as text, in `key` or `custom_id`")
    place = replace(place, key=key)
    body, failed = content, ""
    if content.get("response") is not None:
        response = expect(place, "response", content["response"], dict)
        body = response.get("body", response)
        if (response.get("status_code") or 200) != 200:
            failed = f"status {response['status_code']}"
    if content.get("error") is not None:
        failed = f"error {str(content['error'])[:200]}"
    if failed or body is None:
        return Answer(place, key, None, failed or "no body", ())
    expect(place, "response.body", body, dict)
    model = body.get("model", content.get("model"))
    holders = [body] if body is content else [body, content]
    if body.get("choices") is not None:
        choices = expect(place, "choices", body["choices"], list)
        if len(choices) != 1:
            raise LabelError(
                f"{place}: {len(choices)} choices; expected 1; send one prompt per request, with n = 1"
            )
        holders.insert(0, expect(place, "choices[0]", choices[0], dict))
    return Answer(place, key, None if model is None else str(model), "", tuple(holders))
