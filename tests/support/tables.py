"""Config tables of tests, merged."""

from typing import Any

from softcache.labels.sparsify import POLICIES


def merged(base: dict[str, Any], tables: dict[str, Any]) -> dict[str, Any]:
    """Returns base with tables merged key by key; keys of base's [labels] that another policy does not read are dropped."""
    out = dict(base)
    for name, table in tables.items():
        is_table = isinstance(base.get(name), dict) and isinstance(table, dict)
        out[name] = {**base[name], **table} if is_table else table
    policy = tables.get("labels", {}).get("policy")
    if policy in POLICIES:
        given = {*tables["labels"], *POLICIES.get(policy).model_fields}
        out["labels"] = {key: value for key, value in out["labels"].items() if key in given}
    return out
