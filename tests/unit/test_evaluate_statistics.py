"""Intervals, paired differences and agreement, against published values and first principles."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from scipy import stats

from kun_ray.evaluate.statistics import (
    krippendorff_alpha,
    macro_interval,
    mean_interval,
    paired_difference,
    sign_test,
    wilson,
)
from kun_ray.evaluate.verdicts import read_back
from kun_ray.store import Folder

_ = None
FOUR_OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
    [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
]
"""Krippendorff (2011), example C: four observers, twelve units, gaps."""


def test_alpha_equals_the_published_example():
    assert krippendorff_alpha(FOUR_OBSERVERS) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(FOUR_OBSERVERS, ordinal=True) == pytest.approx(0.815, abs=5e-4)


def test_alpha_of_two_observers_with_two_categories_equals_the_published_example():
    """Krippendorff (2011), example A: ten units, observed disagreement 4 of 10, α = 0.095."""
    one = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    two = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert krippendorff_alpha([one, two]) == pytest.approx(0.095, abs=5e-4)


def test_alpha_at_its_ends():
    assert krippendorff_alpha([[1, 2, 3, 1], [1, 2, 3, 1]]) == pytest.approx(1.0)
    assert krippendorff_alpha([[0, 1] * 50, [1, 0] * 50]) == pytest.approx(-0.99)
    assert krippendorff_alpha([[1, 1], [1, 1]]) is None  # no variation: nothing to agree about
    assert krippendorff_alpha([[1, 2, None], [None, None, 2]]) is None  # no item was rated twice
    near, far = [[1, 2, 3, 1], [2, 2, 3, 1]], [[1, 2, 3, 1], [3, 2, 3, 1]]
    assert krippendorff_alpha(near, ordinal=True) > krippendorff_alpha(far, ordinal=True)


def test_wilson_covers_what_it_says():
    assert wilson(0, 5) == (pytest.approx(0.0, abs=1e-9), pytest.approx(0.4345, abs=1e-3))
    low, high = wilson(50, 100)
    assert (low, high) == (pytest.approx(0.4038, abs=1e-3), pytest.approx(0.5962, abs=1e-3))
    assert wilson(0, 0) == (0.0, 1.0)
    for num_right, num in ((0, 5), (5, 5), (13, 40)):
        published = stats.binomtest(num_right, num).proportion_ci(0.95, method="wilson")
        assert wilson(num_right, num) == pytest.approx((published.low, published.high))
    drawn = np.random.default_rng(0).binomial(40, 0.3, 2000)
    covered = np.mean([low <= 0.3 <= high for low, high in (wilson(int(n), 40) for n in drawn)])
    assert 0.93 < covered < 0.975


def test_the_macro_interval_is_about_the_mean_of_subjects_not_of_questions():
    low, high = macro_interval([900, 5], [1000, 10])  # macro 0.70, micro 0.896
    assert low < 0.70 < high and high < 0.88 and high - low > 0.2
    assert macro_interval([30], [100]) == pytest.approx(wilson(30, 100))
    assert macro_interval([5] * 4, [5] * 4) == pytest.approx((1 - (1 - wilson(5, 5)[0]) / 2, 1.0))
    draws = np.random.default_rng(0).binomial([40, 60, 20], [0.9, 0.5, 0.7], (2000, 3))
    covered = np.mean([low <= 0.7 <= high for low, high in (macro_interval(list(row), [40, 60, 20]) for row in draws)])
    assert 0.93 < covered < 0.98


def test_a_paired_difference_is_narrower_than_two_intervals_apart():
    """Two models that agree on 940 of 1,000 questions: 40 only the first gets right, 20 only the second."""
    found = paired_difference([40], [20], [1000])
    low, high = found["micro"]["interval"]
    assert found["micro"]["difference"] == pytest.approx(0.02)
    assert 0.003 < low < 0.007 and 0.033 < high < 0.037  # ±1.96·√(60 − 20²/1000)/1000
    assert found["p"] == pytest.approx(0.0135, abs=1e-3)
    assert found["macro"] == found["micro"]
    uneven = paired_difference([10, 0], [0, 10], [10, 1000])
    assert uneven["macro"]["difference"] == pytest.approx((1 - 0.01) / 2) and uneven["micro"]["difference"] == 0
    assert uneven["p"] == 1.0


def test_sign_test_and_mean_interval():
    assert sign_test(0, 0) == 1.0 and sign_test(8, 0) == pytest.approx(2 / 256)
    low, high = mean_interval([0.0, 1.0] * 200)
    assert low == pytest.approx(0.45, abs=0.012) and high == pytest.approx(0.55, abs=0.012)
    assert mean_interval([1.0] * 10) == pytest.approx(wilson(10, 10)) and mean_interval([0.0, 1.0]) == pytest.approx(
        wilson(1, 2)
    )
    assert mean_interval([2.0] * 10, 1, 3) == pytest.approx([1 + 2 * end for end in wilson(5, 10)])
    assert all(math.isnan(end) for end in mean_interval([]))


@pytest.mark.parametrize(
    ("votes", "said", "explained"),
    [
        ([("right", "right")] * 8 + [("right", "both_good")] * 2, "on 8 of 10 items.*α = -0.06", True),
        ([("right", "right")] * 5 + [("left", "left")] * 5, "on 10 of 10 items.*α = 1.00", False),
        ([("right", "left"), ("left", "right"), ("left", "left")], "on 1 of 3 items.*α = -0.25", False),
        ([("right", "right")] * 3, "on 3 of 3 items.*α is not defined", False),
        ([("right", None)] * 3, "not defined", False),
    ],
)
def test_agreement_is_said_plainly_and_beyond_chance(tmp_path, capsys, votes, said, explained):
    folder = Folder(str(tmp_path))
    items = {f"{n}": {"row": f"{n}", "sides": ["old", "new"]} for n in range(len(votes))}
    folder.write_json("key.json", {"mode": "pairs", "names": ["old", "new"], "items": items, "review": "r"})
    for who in (0, 1):
        given = {f"{n}": {"choice": vote[who]} for n, vote in enumerate(votes)}
        folder.write_json(f"{who}.json", {"review": "r", "reviewer": f"{who}", "votes": given})
    read_back(folder, [f"{tmp_path}/{who}.json" for who in (0, 1)])
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(said, printed) and ("nearly all votes are alike" in printed) == explained


def test_agreement_on_criteria_is_said_plainly_and_beyond_chance(tmp_path, capsys):
    folder = Folder(str(tmp_path))
    items = {f"{n}": {"row": f"{n}", "sides": ["one"]} for n in range(10)}
    names = {"clarity": "清晰", "use": "实用"}
    folder.write_json(
        "key.json", {"mode": "criteria", "names": ["one"], "items": items, "review": "r", "criteria": names}
    )
    for who in (0, 1):
        given = {f"{n}": {"clarity": 2 if n == who else 3, "use": 1 + n % 2} for n in range(10)}
        folder.write_json(f"{who}.json", {"review": "r", "reviewer": f"{who}", "votes": given})
    found = read_back(folder, [f"{tmp_path}/{who}.json" for who in (0, 1)])
    assert {id: (one["agreed"], one["rated_twice"]) for id, one in found["criteria"].items()} == {
        "clarity": (8, 10),
        "use": (10, 10),
    }
    printed = capsys.readouterr().out
    assert "清晰: α is low although they agree" in printed and "实用: α" not in printed
