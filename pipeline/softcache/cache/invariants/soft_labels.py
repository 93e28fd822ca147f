"""I20 to I71: what the numbers of one distribution over all classes must be.

Every bound is the codec's stated error (`Precision`), carried through the sum or difference that is looked at, and what a
writer's float32 arithmetic may add (`ARITHMETIC`). Masses are compared as intervals: a class with log p within e of x has
a mass within x e^-e and x e^e.

Shape suffixes: `P` rows, `K` slots, `E` exact slots, `G` grid of temperatures, `N` nodes in beta.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from softcache.cache.codecs.precision import ARITHMETIC, END, EXACT, Error, Precision
from softcache.cache.codecs.soft_labels import SoftLabelCodec
from softcache.cache.invariants.catalog import Violation, arithmetic, first_violation

__all__ = ["RowFacts", "soft_label_violations"]


@dataclass(frozen=True)
class RowFacts:
    """What a manifest states of its rows.

    Attributes:
        precision: of the stored numbers.
        takes_largest: whether the policy drops no class that is likelier than one that it keeps exactly.
        is_exact_target: whether the ground truth's number is that of its slot, also where it is not known which class it is.
        moved: error of log p of classes that were moved into the tail.
        mass: how far the masses of a served distribution may be from 1.
        lacks_targets: whether the ground truth's number may be unknown where it was dropped.
    """

    precision: Precision
    takes_largest: bool = True
    is_exact_target: bool = True
    moved: Error = EXACT
    mass: float = 0.0
    lacks_targets: bool = False


def soft_label_violations(
    codec: SoftLabelCodec,
    arrays: Mapping[str, np.ndarray],
    facts: RowFacts,
    targets_P: np.ndarray | None = None,
) -> list[Violation]:
    """Returns the invariants that rows break.

    Args:
        arrays: unpacked, [P, ...] by name.
        targets_P: the ground truth, -1 where there is none; None where it is not known.
    """
    found = slot_violations(codec, arrays)
    if found:  # everything else would be computed from them
        return found
    return _Rows(codec, arrays, facts).violations(arrays, targets_P)


def slot_violations(codec: SoftLabelCodec, arrays: Mapping[str, np.ndarray]) -> list[Violation]:
    """Returns which of I20 to I30 rows break: what can be known without arithmetic."""
    ids, num_classes, out = arrays["ids"], codec.num_classes, []
    if not len(ids):
        return []
    out += first_violation("I20", ids > num_classes, "ids", ids, f"0 to {num_classes}")
    unused = ids >= num_classes
    if unused.any():
        behind = unused[:, :-1] & ~unused[:, 1:]
        out += first_violation("I20", behind, "ids", ids[:, 1:], f"{num_classes} behind an unused slot")
        out += first_violation("I20", unused[:, 0], "ids", ids[:, 0], f"a class, below {num_classes}")
        wrong = unused & (arrays["log_probs"] > -np.inf)
        out += first_violation("I22", wrong, "log_probs", arrays["log_probs"], "-inf in an unused slot")
    order = np.sort(ids, axis=1)
    repeated = (order[:, 1:] == order[:, :-1]) & (order[:, 1:] < num_classes)
    out += first_violation("I21", repeated, "ids", order[:, 1:], "each class once")
    if "counts" in arrays:
        counts = arrays["counts"]
        out += first_violation("I22", unused & (counts > 0), "counts", counts, "0 in an unused slot")
    for name in ("log_probs", "log_tail", "stats", "log_threshold", "target_log_prob"):
        if name in arrays:
            values = arrays[name]
            wrong = values == np.inf if name == "target_log_prob" else ~(values < np.inf)
            wrong |= (values == -np.inf) if name == "stats" else False
            out += first_violation("I30", wrong, name, values, "a number")
    return out


class _Rows:
    """Some rows, and what several invariants need of them; float64 where it is one number a row."""

    def __init__(self, codec: SoftLabelCodec, arrays: Mapping[str, np.ndarray], facts: RowFacts) -> None:
        self._codec, self._facts = codec, facts
        sampling = codec.sampling
        self._exact = codec.k if sampling is None else sampling.exact
        stored_PK = arrays["log_probs"]
        self._log_probs_PK = stored_PK.astype(np.float32) if stored_PK.dtype.itemsize < 4 else stored_PK
        exact_PE = self._log_probs_PK[:, : self._exact]
        self._alive_PE = exact_PE > -np.inf
        self._lp_PE = np.where(self._alive_PE, exact_PE, 0)
        p_PE = np.exp(exact_PE)
        self._size_PE = -p_PE * self._lp_PE
        # Sums in pairs, of as many numbers as there are slots: float32 loses less than the allowance.
        self._kept_P, self._entropy_P = (x.sum(axis=1).astype(np.float64) for x in (p_PE, self._size_PE))
        self._tail_PG = arrays["log_tail"].astype(np.float64)
        self._dropped_P = self._tail_PG[:, 0] > -np.inf
        self._inside_P = self._tail_PG.min(axis=1) > -END
        count_P = self._alive_PE.sum(axis=1)
        self._num_dropped_P = None
        if codec.stats:
            self._num_dropped_P = arrays["stats"][:, 3].astype(np.float64) - count_P
        most_P = (
            codec.num_classes - count_P.astype(np.float64)
            if self._num_dropped_P is None
            else self._num_dropped_P
        )
        self._log_count_P = np.log(np.maximum(most_P, 1.0))
        used_PE = arrays["ids"][:, : self._exact] < codec.num_classes
        # Of an impossible class that was kept, -inf: nothing that was dropped is more likely.
        self._last_P = np.where(used_PE, exact_PE, np.inf).min(axis=1, initial=np.inf).astype(np.float64)
        self._tail_error_PG = self._error_of_tail()
        self._tail_growth_P = np.expm1(np.minimum(self._tail_error_PG[:, 0], 100.0))

    def _error_of_tail(self) -> np.ndarray:
        precision, grid = self._facts.precision, len(self._codec.temperatures)
        tail_PG = np.where(self._dropped_P[:, None] & (self._tail_PG > -np.inf), self._tail_PG, 0.0)
        absolute = np.array([precision.tail_at_one.absolute, *[precision.tail.absolute] * (grid - 1)])
        error_PG = absolute + arithmetic(tail_PG)
        moved = self._facts.moved
        if moved != EXACT:
            # The mean of beta |log p| over the tail is at most its entropy, log count at most, less log_tail.
            size_PG = np.maximum(self._log_count_P[:, None] - tail_PG, 0.0)
            error_PG += moved.relative * size_PG * (1 + 2.0**-6) + moved.absolute
        return error_PG

    def _error(self, values: np.ndarray, *errors: Error) -> np.ndarray:
        total = arithmetic(values)
        for error in (*errors, self._facts.moved):
            total = total + error.of(values)
        return total

    def violations(self, arrays: Mapping[str, np.ndarray], targets_P: np.ndarray | None) -> list[Violation]:
        out = [*self._order(arrays["ids"]), *self._mass(), *self._tail(), *self._largest()]
        if self._codec.stats:
            out += self._stats(arrays["stats"].astype(np.float64))
        out += (
            self._target(arrays["target_log_prob"], arrays["ids"], targets_P)
            if "target_log_prob" in arrays
            else []
        )
        return out + self._draws(arrays)

    # -- I31 to I33 --------------------------------------------------------------------------------------------

    def _order(self, ids_PK: np.ndarray) -> list[Violation]:
        log_probs_PK = self._log_probs_PK
        out = first_violation(
            "I31", log_probs_PK > ARITHMETIC.absolute, "log_probs", log_probs_PK, "at most 0"
        )
        rises = log_probs_PK[:, 1:] > log_probs_PK[:, :-1]
        if 0 < self._exact < self._codec.k:
            rises[:, self._exact - 1] = False
        return out + first_violation(
            "I32", rises, "log_probs", log_probs_PK[:, 1:], "no more than in the slot before"
        )

    def _mass(self) -> list[Violation]:
        error = self._facts.precision.log_probs + self._facts.moved
        kept_P, spread_P = self._kept_P, self._entropy_P  # which is also the mean of |log p|
        tail_P = np.where(self._dropped_P, np.exp(np.minimum(self._tail_PG[:, 0], 700.0)), 0.0)
        total_P = kept_P + tail_P
        slack_P = (
            error.relative * spread_P * (1 + 2.0**-6) + ARITHMETIC.absolute + ARITHMETIC.relative * spread_P
        )
        slack_P += tail_P * self._tail_growth_P + self._facts.mass
        below_P = 1 - total_P > slack_P + kept_P * np.expm1(error.absolute)
        above_P = total_P - 1 > slack_P - kept_P * np.expm1(-error.absolute)
        return first_violation("I33", below_P | above_P, "log_probs and log_tail[0]", total_P, "a mass of 1")

    # -- I40 to I44 --------------------------------------------------------------------------------------------

    def _tail(self) -> list[Violation]:
        tail_PG, error_PG = self._tail_PG, self._tail_error_PG
        none_PG = tail_PG == -np.inf
        out = first_violation(
            "I40", none_PG != none_PG[:, :1], "log_tail", tail_PG, "-inf, or a number, as at T = 1"
        )
        if self._num_dropped_P is not None:
            wrong_P = (self._num_dropped_P >= 1) != self._dropped_P
            expected = np.where(self._dropped_P, "-inf: as many classes are kept as have p > 0", "a number")
            for violation in (
                first_violation("I44", wrong_P, "log_tail", tail_PG[:, 0], "") if wrong_P.any() else ()
            ):
                out.append(violation._replace(detail=f"{violation.detail}{expected[violation.row]}"))
        rows = np.flatnonzero(self._dropped_P & ~none_PG.any(axis=1) & self._inside_P)
        if not len(rows) or out:
            return out
        falls = np.zeros(tail_PG.shape, bool)
        falls[rows, 1:] = np.diff(tail_PG[rows], axis=1) < -(error_PG[rows, 1:] + error_PG[rows, :-1])
        out += first_violation("I41", falls, "log_tail", tail_PG, "no less than at the temperature before")
        beta_N = 1.0 / np.array(self._codec.temperatures)[::-1]
        value_PN, error_PN = tail_PG[rows, ::-1], error_PG[rows, ::-1]
        if self._num_dropped_P is not None:
            beta_N = np.concatenate([[0.0], beta_N])
            value_PN = np.concatenate([self._log_count_P[rows, None], value_PN], axis=1)
            error_PN = np.concatenate([np.zeros((len(rows), 1)), error_PN], axis=1)
        if len(beta_N) > 2:
            share_M = (beta_N[2:] - beta_N[1:-1]) / (beta_N[2:] - beta_N[:-2])
            chord_PM = share_M * value_PN[:, :-2] + (1 - share_M) * value_PN[:, 2:]
            slack_PM = share_M * error_PN[:, :-2] + (1 - share_M) * error_PN[:, 2:] + error_PN[:, 1:-1]
            above = np.zeros((len(tail_PG), len(share_M)), bool)
            above[rows] = value_PN[:, 1:-1] > chord_PM + slack_PM
            middle = np.zeros(above.shape)
            middle[rows] = value_PN[:, 1:-1]
            out += first_violation(
                "I42", above, "log_tail", middle, "no more than the chord of its neighbors"
            )
        elif self._num_dropped_P is not None:
            high = np.zeros(len(tail_PG), bool)
            high[rows] = value_PN[:, -1] > value_PN[:, 0] + error_PN[:, -1]
            out += first_violation(
                "I42", high, "log_tail", tail_PG[:, 0], "at most log of the dropped classes"
            )
        return out

    def _largest(self) -> list[Violation]:
        """From one node to the next the tail falls by at least |log p| of its likeliest class."""
        if not self._facts.takes_largest or not self._exact:
            return []
        last_P, dropped_P = self._last_P, self._dropped_P
        impossible = dropped_P & (last_P == -np.inf)
        out = first_violation(
            "I43", impossible, "log_tail", self._tail_PG[:, 0], "-inf: the last slot is impossible"
        )
        rows = np.flatnonzero(dropped_P & self._inside_P & (last_P > -END) & (last_P < np.inf))
        if not len(rows):
            return out
        last_p = np.minimum(last_P[rows], 0.0)
        beta_G, tail_pG = 1.0 / np.array(self._codec.temperatures), self._tail_PG[rows]
        error_p = self._error(last_p, self._facts.precision.log_probs)
        most_pG = self._log_count_P[rows, None] + beta_G * last_p[:, None]
        wrong = np.zeros(self._tail_PG.shape, bool)
        wrong[rows] = tail_pG > most_pG + beta_G * error_p[:, None] + self._tail_error_PG[rows]
        step_G = beta_G[:-1] - beta_G[1:]
        falls_pG = tail_pG[:, 1:] - tail_pG[:, :-1]
        slack_pG = self._tail_error_PG[rows, 1:] + self._tail_error_PG[rows, :-1]
        wrong[rows, 1:] |= falls_pG < -step_G * (last_p + error_p)[:, None] - slack_pG
        return out + first_violation(
            "I43", wrong, "log_tail", self._tail_PG, "what classes no likelier than the last exact slot have"
        )

    # -- I50 to I53 --------------------------------------------------------------------------------------------

    def _stats(self, stats_P4: np.ndarray) -> list[Violation]:
        entropy_P, mean_P, deviation_P, support_P = stats_P4.T
        moments = self._facts.precision.moments
        used_P = (self._log_probs_PK > -np.inf).sum(axis=1)
        wrong_P = (support_P != np.rint(support_P)) | (support_P < np.maximum(used_P, 1))
        wrong_P |= support_P > self._codec.num_classes
        out = first_violation(
            "I50", wrong_P, "stats.support", support_P, "a whole number, 1 to V, at least those kept"
        )
        if out:
            return out
        log_support_P = np.log(support_P)
        slack_P = self._error(entropy_P, moments)
        wrong_P = (entropy_P < -slack_P) | (entropy_P > log_support_P + slack_P)
        out += first_violation("I51", wrong_P, "stats.entropy", entropy_P, "0 to log support")
        out += self._entropy(entropy_P, slack_P)
        wrong_P = (mean_P > -log_support_P + self._error(mean_P, moments)) & (np.abs(mean_P) < END)
        out += first_violation("I53", wrong_P, "stats.logit_mean", mean_P, "at most -log support")
        return out + first_violation("I53", deviation_P < 0, "stats.logit_std", deviation_P, "at least 0")

    def _entropy(self, entropy_P: np.ndarray, slack_P: np.ndarray) -> list[Violation]:
        error = self._facts.precision.log_probs + self._facts.moved
        kept_P, mass_P = self._entropy_P, self._kept_P
        square_P = -(self._size_PE * self._lp_PE).sum(axis=1).astype(np.float64)
        grown = np.exp(error.absolute)
        slack_P = slack_P + grown * (
            error.absolute * (mass_P + kept_P) + error.relative * (kept_P + square_P) * 1.02
        )
        slack_P += (
            ARITHMETIC.absolute
            + ARITHMETIC.relative * (kept_P + square_P)
            + 2 * self._facts.mass * (1 + kept_P)
        )
        log_tail_P = np.where(self._dropped_P, np.minimum(self._tail_PG[:, 0], 0.0), 0.0)
        tail_P = np.where(self._dropped_P, np.exp(log_tail_P), 0.0)
        least_P = -log_tail_P
        if self._facts.takes_largest and self._exact:
            least_P = np.maximum(least_P, np.where(np.isfinite(self._last_P), -self._last_P, 0.0))
            last_P = np.where(np.isfinite(self._last_P), self._last_P, 0.0)
            slack_P += tail_P * self._error(last_P, self._facts.precision.log_probs)
        slack_P += tail_P * self._tail_growth_P * (1 + np.abs(log_tail_P) + self._log_count_P)
        low_P, high_P = kept_P + tail_P * least_P, kept_P + tail_P * (self._log_count_P - log_tail_P)
        wrong_P = (entropy_P < low_P - slack_P) | (entropy_P > high_P + slack_P)
        if not wrong_P.any():
            return []
        row = int(np.flatnonzero(wrong_P)[0])
        return first_violation(
            "I52", wrong_P, "stats.entropy", entropy_P, f"{low_P[row]:.6g} to {high_P[row]:.6g} nats"
        )

    # -- I60 to I62 --------------------------------------------------------------------------------------------

    def _target(
        self, target_P: np.ndarray, ids_PK: np.ndarray, targets_P: np.ndarray | None
    ) -> list[Violation]:
        target_P = target_P.astype(np.float64)
        out = first_violation("I60", target_P > ARITHMETIC.absolute, "target_log_prob", target_P, "at most 0")
        if targets_P is not None:
            missing_P = targets_P < 0
            wrong_P = np.isnan(target_P) & ~missing_P
            if self._facts.lacks_targets:
                wrong_P &= (ids_PK == targets_P[:, None]).any(axis=1)
            out += first_violation(
                "I60", wrong_P, "target_log_prob", target_P, "a number: there is a ground truth"
            )
            wrong_P = ~np.isnan(target_P) & missing_P
            out += first_violation(
                "I60", wrong_P, "target_log_prob", target_P, "NaN: there is no ground truth"
            )
        if out or not self._exact:
            return out
        there_P = ~np.isnan(target_P)
        target_P = np.where(there_P, target_P, -np.inf)
        errors = self._facts.precision.log_probs, self._facts.precision.target
        finite_P = np.where(target_P > -np.inf, target_P, 0.0)
        slack_P = self._error(finite_P, *errors)
        slot_PE = self._log_probs_PK[:, : self._exact]

        def is_near(slots: np.ndarray, like: tuple[Any, ...]) -> np.ndarray:
            """Whether numbers of slots are the target's, [P] or [P, E]."""
            target, slack = target_P[like], slack_P[like]
            with np.errstate(invalid="ignore"):  # -inf less -inf
                near = (np.abs(slots - target) <= slack) | (slots == target)
            return near | ((slots <= -END) & (target <= -END))

        if targets_P is not None:
            is_target_PE = ids_PK[:, : self._exact] == targets_P[:, None]
            place_P1 = is_target_PE.argmax(axis=1)[:, None]
            in_slot_P = np.take_along_axis(is_target_PE, place_P1, 1)[:, 0] & there_P
            slot_P = np.take_along_axis(slot_PE, place_P1, 1)[:, 0].astype(np.float64)
            wrong_P = in_slot_P & ~is_near(slot_P, (slice(None),))
            out += first_violation("I61", wrong_P, "target_log_prob", target_P, slot_P)
            outside_P = there_P & ~in_slot_P
        elif self._facts.is_exact_target:
            target_P, slack_P = target_P.astype(np.float32), slack_P.astype(np.float32)
            outside_P = there_P & ~is_near(slot_PE, (slice(None), None)).any(axis=1)
        else:
            return out
        if self._facts.takes_largest:
            with np.errstate(invalid="ignore"):
                wrong_P = outside_P & (target_P > self._last_P + slack_P) & (target_P > -END)
            out += first_violation(
                "I62", wrong_P, "target_log_prob", target_P, "at most that of the last exact slot"
            )
        tail_P = self._tail_PG[:, 0]
        wrong_P = (
            outside_P & (target_P > -np.inf) & ~(target_P <= tail_P + slack_P + self._tail_error_PG[:, 0])
        )
        wrong_P &= target_P > -END
        return out + first_violation("I62", wrong_P, "target_log_prob", target_P, tail_P)

    # -- I70, I71 ----------------------------------------------------------------------------------------------

    def _draws(self, arrays: Mapping[str, np.ndarray]) -> list[Violation]:
        sampling, out = self._codec.sampling, []
        if sampling is None:
            return []
        used_PK = arrays["ids"] < self._codec.num_classes
        if sampling.replacement:
            counts_PK = arrays["counts"]
            out += first_violation(
                "I70", used_PK & (counts_PK < 1), "counts", counts_PK, "at least 1 in a used slot"
            )
            sum_P = counts_PK.sum(axis=1, dtype=np.int64)
            out += first_violation(
                "I70", sum_P != sampling.draws, "sum of counts", sum_P, f"{sampling.draws} draws"
            )
        else:
            drawn_P = used_PK[:, sampling.exact :].sum(axis=1)
            wrong_P = (arrays["log_threshold"] > -np.inf) & (drawn_P < sampling.draws)
            out += first_violation("I71", wrong_P, "slots of drawn classes", drawn_P, f"{sampling.draws}")
        return out
