"""I20 to I30 and I80 to I82: what the numbers of classes with a sigmoid each must be.

Shape suffixes: `P` rows, `K` slots.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from softcache.cache.codecs.precision import ARITHMETIC, END, Error
from softcache.cache.invariants.catalog import Violation, arithmetic, first_violation

__all__ = ["independent_violations"]


def independent_violations(
    arrays: Mapping[str, np.ndarray], num_classes: int, error: Error
) -> list[Violation]:
    """Returns the invariants that rows break.

    Args:
        arrays: `ids`, `logits`, `dropped_bound` and `dropped_mass`, [P, ...] by name.
        error: of the stored logits.
    """
    ids_PK, out = arrays["ids"], []
    if not len(ids_PK):
        return []
    out += first_violation("I20", ids_PK >= num_classes, "ids", ids_PK, f"0 to {num_classes - 1}")
    order_PK = np.sort(ids_PK, axis=1)
    out += first_violation(
        "I21", order_PK[:, 1:] == order_PK[:, :-1], "ids", order_PK[:, 1:], "each class once"
    )
    for name in ("logits", "dropped_bound", "dropped_mass"):
        out += first_violation("I30", ~(arrays[name] < np.inf), name, arrays[name], "a number")
    if out:
        return out
    logits_PK = arrays["logits"].astype(np.float32)
    bound_P, mass_P = (arrays[name].astype(np.float64) for name in ("dropped_bound", "dropped_mass"))
    rises = logits_PK[:, 1:] > logits_PK[:, :-1]
    out += first_violation("I80", rises, "logits", logits_PK[:, 1:], "no more than in the slot before")
    left = num_classes - ids_PK.shape[1]
    last_P = logits_PK[:, -1].astype(np.float64)
    finite_P = np.where(np.isfinite(last_P), last_P, 0.0)
    wrong_P = (bound_P > last_P + error.of(finite_P) + arithmetic(finite_P)) & (np.abs(finite_P) < END)
    wrong_P |= (left == 0) & (bound_P > -np.inf)
    out += first_violation(
        "I81", wrong_P, "dropped_bound", bound_P, "at most the last logit, -inf where K = V"
    )
    # As a difference of logs it would lose what is next to nothing.
    share_P = np.exp(-np.logaddexp(0.0, -np.where(bound_P > -np.inf, bound_P, -1e4)))
    slack = 2 * (
        ARITHMETIC.absolute + ARITHMETIC.relative * np.abs(np.where(bound_P > -np.inf, bound_P, 0.0))
    )
    wrong_P = (mass_P < share_P * (1 - slack) - 2.0**-126) | (
        mass_P > left * share_P * (1 + slack) + 2.0**-126
    )
    return out + first_violation(
        "I82", wrong_P, "dropped_mass", mass_P, f"1 to {left} times sigmoid(dropped_bound)"
    )
