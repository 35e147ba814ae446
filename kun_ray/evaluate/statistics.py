"""Intervals, paired comparisons and agreement: pure functions on numbers, for every result of this room.

All intervals are of 95 %. The bootstrap draws from a generator with a fixed seed, so that the same data give the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

Array = np.ndarray[Any, Any]
Interval = tuple[float, float]
LEVEL = 0.95
NUM_DRAWS = 10_000


def wilson(num_right: float, num: int) -> Interval:
    """Wilson's score interval of a proportion; (0, 1) when nothing was counted. Unlike ±1.96 σ it holds for 0 of 5."""
    if num == 0:
        return 0.0, 1.0
    rate, z2 = num_right / num, float(stats.norm.ppf((1 + LEVEL) / 2)) ** 2
    middle = rate + z2 / (2 * num)
    half = math.sqrt(z2 * (rate * (1 - rate) / num + z2 / (4 * num * num)))
    return max(0.0, (middle - half) / (1 + z2 / num)), min(1.0, (middle + half) / (1 + z2 / num))


def macro_interval(right: Sequence[int], num: Sequence[int]) -> Interval:
    """Interval of the mean of subjects' accuracies, from their Wilson intervals; it keeps a width where all answers are right.

    MOVER: m ∓ √Σ(wᵢ·distance to the end of interval i)². Source: Zou and Donner, Statistics in Medicine 27 (2008).

    Args:
        right: right answers of each subject. Shape: [subjects].
        num: questions of each subject, all above 0. Shape: [subjects].
    """
    rates = np.asarray(right) / np.asarray(num)
    ends = np.array([wilson(r, n) for r, n in zip(right, num, strict=True)])  # [subjects, low and high]
    below, above = np.sqrt(((ends - rates[:, None]) ** 2).sum(axis=0)) / len(rates)
    return float(rates.mean() - below), float(rates.mean() + above)


def paired_difference(better: Sequence[int], worse: Sequence[int], num: Sequence[int]) -> dict[str, Any]:
    """How much more one model gets right than another on the same questions.

    Args:
        better: of each subject, questions that only the first model got right. Shape: [subjects].
        worse: questions that only the second got right. Shape: [subjects].
        num: questions of each subject, all above 0. Shape: [subjects].
    Returns:
        `micro` (over questions) and `macro` (over subjects), each with `difference` and `interval` by bootstrap of pairs
        within subjects; `p`: exact McNemar test that neither is better.
    """
    more, less, counts = np.asarray(better), np.asarray(worse), np.asarray(num)
    rng = _rng()
    drawn = np.stack(
        [
            rng.multinomial(n, [b / n, w / n, 1 - (b + w) / n], NUM_DRAWS)
            for b, w, n in zip(more, less, counts, strict=True)
        ],
        axis=1,
    )  # [draws, subjects, outcomes]
    gain = drawn[..., 0] - drawn[..., 1]
    micro, macro = gain.sum(axis=1) / counts.sum(), (gain / counts).mean(axis=1)
    return {
        "micro": {"difference": float((more - less).sum() / counts.sum()), "interval": _percentiles(micro)},
        "macro": {"difference": float(((more - less) / counts).mean()), "interval": _percentiles(macro)},
        "p": sign_test(int(more.sum()), int(less.sum())),
    }


def sign_test(num_wins: int, num_losses: int) -> float:
    """Two-sided exact probability of a split at least as uneven if either side were as likely. Ties are left out."""
    num = num_wins + num_losses
    return float(stats.binomtest(num_wins, num).pvalue) if num else 1.0


def mean_interval(values: Sequence[float], lowest: float = 0.0, highest: float = 1.0) -> Interval:
    """Wilson's interval of a mean of values within [lowest, highest], one per item; also where all of them are the same.

    No values of a given mean vary more than those at the ends, so it is rather too wide than too narrow.
    """
    if not values:
        return math.nan, math.nan
    span = highest - lowest
    low, high = wilson(sum(value - lowest for value in values) / span, len(values))
    return lowest + span * low, lowest + span * high


def krippendorff_alpha(ratings: Sequence[Sequence[float | None]], ordinal: bool = False) -> float | None:
    """Krippendorff's α: 1 is full agreement, 0 what chance gives, below 0 worse than chance.

    Takes any number of reviewers and gaps, which Cohen's κ does not. Source: Krippendorff, "Computing Krippendorff's
    Alpha-Reliability" (2011); its example is this function's test.

    Args:
        ratings: reviewers × items; None where a reviewer has not rated. Values are categories, or ranks if `ordinal`.
        ordinal: whether values are ordered: a disagreement weighs more the further apart they are.
    Returns:
        None where it is not defined: no item has two ratings, or all ratings are one value.
    """
    items = [[value for value in item if value is not None] for item in zip(*ratings, strict=True)]
    items = [item for item in items if len(item) > 1]
    values = sorted({value for item in items for value in item})
    if len(values) < 2:
        return None
    index = {value: i for i, value in enumerate(values)}
    coincidence = np.zeros((len(values), len(values)))
    for item in items:
        counts = np.bincount([index[value] for value in item], minlength=len(values))
        coincidence += (np.outer(counts, counts) - np.diag(counts)) / (len(item) - 1)
    totals = coincidence.sum(axis=1)
    if ordinal:
        middle = np.cumsum(totals) - totals / 2
        distance = (middle[:, None] - middle[None, :]) ** 2
    else:
        distance = 1 - np.eye(len(values))
    expected = (np.outer(totals, totals) * distance).sum() / (totals.sum() - 1)
    return float(1 - (coincidence * distance).sum() / expected)


def _rng() -> np.random.Generator:
    return np.random.default_rng(2401_06477)


def _percentiles(draws: Array) -> Interval:
    low, high = np.percentile(draws, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)
