"""Verdicts on pairs → win rates, agreement and intervals: for reviewers' files and for a judge model.

review.py and pairwise.py call it. It reads key.json and reviewers' exports, and never the texts.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kun_ray import store
from kun_ray.config import KunError
from kun_ray.evaluate.statistics import krippendorff_alpha, mean_interval, sign_test, wilson

LEVELS = (1, 2, 3)
CHOICES = ("left", "right", "both_good", "both_bad")
LOW_ALPHA, HIGH_AGREEMENT = 0.2, 0.75
ALIKE = "α is low although they agree: nearly all votes are alike, so that chance alone would agree about as often"
Votes = dict[str, dict[str, Any]]
"""Item → what one reviewer said."""


def win_rate(scores: Sequence[float]) -> dict[str, Any]:
    """How often the second of two models won.

    Args:
        scores: one per pair: 1 the second model won, 0 the first, 0.5 a tie (or between, over several reviewers).
    Returns:
        `wins`, `ties`, `losses` (of the second model), `rate` = mean score, Wilson's `interval` over pairs, and `p`, the
        sign test that neither is better.
    """
    wins, losses = sum(score > 0.5 for score in scores), sum(score < 0.5 for score in scores)
    return {
        "pairs": len(scores),
        "wins": wins,
        "ties": len(scores) - wins - losses,
        "losses": losses,
        "rate": sum(scores) / len(scores) if scores else None,
        "interval": mean_interval(scores) if scores else None,
        "p": sign_test(wins, losses),
    }


def read_back(folder: store.Folder, files: list[str]) -> dict[str, Any]:
    """Reviewers' files → results, printed and written to results.json.

    Raises:
        KunError: there is no key, or a file is unreadable, of another review, or of the same reviewer as another one.
    """
    if not folder.exists("key.json"):
        raise KunError(f"{folder.uri} holds no key.json: give the output= of the command that wrote the page")
    key = folder.read_json("key.json")
    by_reviewer: dict[str, Votes] = {}
    for file in files:
        reviewer, votes = _read_votes(file, key)
        if reviewer in by_reviewer:
            raise KunError(f"{file}: {reviewer} is in another file, too: give each reviewer's newest file alone")
        by_reviewer[reviewer] = votes
    found = {"mode": key["mode"], "items": len(key["items"]), "reviewers": {r: len(v) for r, v in by_reviewer.items()}}
    found |= _compare(key, by_reviewer) if key["mode"] == "pairs" else _rate(key, by_reviewer)
    folder.write_json("results.json", found)
    show(found)
    print(f"written to {folder.uri}/results.json")
    return found


def show(found: dict[str, Any], console: Console | None = None) -> None:
    """Prints a review's results."""
    console = console or Console()
    console.print(
        f"{found['items']} items; " + ", ".join(f"{r}: {n}" for r, n in found["reviewers"].items()), markup=False
    )
    if found["mode"] == "pairs":
        console.print(describe_win(found["second"], found["first"], found), markup=False, highlight=False)
        console.print(describe_agreement(found), markup=False, highlight=False)
        return
    table = Table(box=None, padding=(0, 2))
    for column in ("", "items", "mean of 1–3 [95 %]", "good, % [95 %]", "α", "rated twice", "all agree"):
        table.add_column(Text(column), justify="right" if column else "left")
    for one in found["criteria"].values():
        good_low, good_high = (100 * end for end in one["good_interval"])
        mean = "–" if one["mean"] is None else "{:.2f} [{:.2f}, {:.2f}]".format(one["mean"], *one["interval"])
        good = f"{100 * one['good']:.0f} [{good_low:.0f}, {good_high:.0f}]"
        alpha = "–" if one["alpha"] is None else f"{one['alpha']:.2f}"
        agreement = (alpha, str(one["rated_twice"]), str(one["agreed"]))
        table.add_row(*map(Text, (one["name"], str(one["items"]), mean, good, *agreement)))
    console.print(table)
    if alike := [one["name"] for one in found["criteria"].values() if _is_low_by_likeness(one)]:
        console.print(f"{', '.join(alike)}: {ALIKE}", markup=False, highlight=False)


def describe_win(second: str, first: str, found: dict[str, Any]) -> str:
    """One line about a win rate."""
    if not found["pairs"]:
        return "no pair was judged"
    low, high = (100 * end for end in found["interval"])
    return (
        f"{second} against {first}: {found['wins']} won, {found['ties']} tied, {found['losses']} lost; win rate "
        f"{100 * found['rate']:.1f} % [{low:.1f}, {high:.1f}] (a tie counts half), p = {found['p']:.2g}"
    )


def describe_agreement(found: dict[str, Any]) -> str:
    """What reviewers agree on: plainly, and beyond chance.

    Args:
        found: `alpha`, `rated_twice`, `agreed` (as `read_back` writes them).
    """
    if not found["rated_twice"]:
        return "agreement: not defined (it takes items that two reviewers rated)"
    plain = f"agreement: all agree on {found['agreed']} of {found['rated_twice']} items with two or more reviewers; "
    if found["alpha"] is None:
        return f"{plain}Krippendorff's α is not defined, as all verdicts are the same"
    said = f"{plain}Krippendorff's α = {found['alpha']:.2f} (0 chance, 1 full)"
    return f"{said}\n{ALIKE}" if _is_low_by_likeness(found) else said


def _is_low_by_likeness(found: dict[str, Any]) -> bool:
    """With these limits chance agrees on 69 % of the items at least: 1 - (1 - HIGH_AGREEMENT) / (1 - LOW_ALPHA)."""
    alpha = found["alpha"]
    return alpha is not None and alpha < LOW_ALPHA and found["agreed"] >= HIGH_AGREEMENT * found["rated_twice"]


def _agreement(ratings: list[list[float | None]], items: list[list[float]], ordinal: bool = False) -> dict[str, Any]:
    twice = [item for item in items if len(item) > 1]
    return {
        "alpha": krippendorff_alpha(ratings, ordinal),
        "rated_twice": len(twice),
        "agreed": sum(len(set(item)) == 1 for item in twice),
    }


def _read_votes(file: str, key: dict[str, Any]) -> tuple[str, Votes]:
    filesystem, path = store.resolve(file)
    try:
        with filesystem.open_input_stream(path) as stream:
            found = json.loads(stream.read())
        reviewer, votes = str(found["reviewer"]) or "anonymous", dict(found["votes"])
        allowed = key.get("criteria", {})
        for id, vote in votes.items():
            known = vote.get("choice") in (None, *CHOICES) and all(vote.get(c) in (None, *LEVELS) for c in allowed)
            if id not in key["items"] or not known:
                raise ValueError(f"item {id}: {vote}")
    except OSError as error:
        raise KunError(f"cannot read {file}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise KunError(f"{file} is not what the page exports ({error}): ask the reviewer to export it again") from None
    if found.get("review") != key["review"]:
        raise KunError(f"{file} belongs to another review: its page was not the one beside this key.json")
    needed = ["choice"] if key["mode"] == "pairs" else list(key["criteria"])
    return reviewer, {id: vote for id, vote in votes.items() if any(vote.get(name) for name in needed)}


def _compare(key: dict[str, Any], by_reviewer: dict[str, Votes]) -> dict[str, Any]:
    first, second = key["names"]
    sides = {id: item["sides"] for id, item in key["items"].items()}
    ratings: list[list[float | None]] = []
    ties: collections.Counter[str] = collections.Counter()
    lefts = num = 0
    for votes in by_reviewer.values():
        scores: list[float | None] = []
        for id in key["items"]:
            choice = votes.get(id, {}).get("choice")
            num, lefts = num + (choice in ("left", "right")), lefts + (choice == "left")
            winner = sides[id][0 if choice == "left" else 1] if choice in ("left", "right") else None
            ties.update([choice] if choice and winner is None else [])
            scores.append(None if choice is None else 0.5 if winner is None else float(winner == second))
        ratings.append(scores)
    items = [[score for score in item if score is not None] for item in zip(*ratings, strict=True)]
    return {
        "first": first,
        "second": second,
        **win_rate([sum(item) / len(item) for item in items if item]),
        "votes": {"both_good": ties["both_good"], "both_bad": ties["both_bad"], "left": lefts, "sided": num},
        **_agreement(ratings, items),
    }


def _rate(key: dict[str, Any], by_reviewer: dict[str, Votes]) -> dict[str, Any]:
    criteria = {}
    for id, name in key["criteria"].items():
        ratings = [[votes.get(item, {}).get(id) for item in key["items"]] for votes in by_reviewer.values()]
        items = [[level for level in item if level is not None] for item in zip(*ratings, strict=True)]
        means = [sum(item) / len(item) for item in items if item]
        num_good = sum(mean > 2.5 for mean in means)
        criteria[id] = {
            "name": name,
            "items": len(means),
            "mean": sum(means) / len(means) if means else None,
            "interval": mean_interval(means, LEVELS[0], LEVELS[-1]) if means else None,
            "good": num_good / max(1, len(means)),
            "good_interval": wilson(num_good, len(means)),
            **_agreement(ratings, items, ordinal=True),
        }
    return {"names": key["names"], "criteria": criteria}
