"""The rows of the sample as the page's script gets them: a document, and what each run made of it.

`report` calls cards() with fetched rows. Texts are cut to MAX_CHARS; nothing is escaped here, the page does that.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from typing import Any, Final

import rjieba

from kun_ray.report.survey import RAISED, prepare_step
from kun_ray.schema import OK

MAX_CHARS: Final = 8000
MAX_WORDS: Final = 1500
"""Longest text or answer that is compared word by word: the cost grows with the product of both."""
MIN_SAME_CHARS: Final = 3
"""A shorter stretch that is the same in both counts as changed: a diff of single commas and 的 cannot be read."""

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sampled:
    """One run's rows of the sample."""

    rows: dict[str, Row]
    """By doc_id, from the last stage of the chain."""
    texts: dict[str, str]
    """Texts of rows that this stage no longer holds, from the stage that prepared them."""
    excerpts: dict[str, str]
    """Texts that only the corpus holds."""
    steps: list[str]
    """The engine's steps in the order in which rows passed them."""


def cards(runs: list[Sampled]) -> list[dict[str, Any]]:
    """One entry per document, documents of every run that has them, ok rows first, then the others by reason."""
    ids = dict.fromkeys(doc_id for run in runs for doc_id in run.rows)
    found = [_card(doc_id, runs) for doc_id in ids]
    return sorted(found, key=lambda card: (card["runs"][0]["status"] != OK, card["runs"][0]["reason"], card["id"]))


def settled_by(row: Row, steps: list[str]) -> str:
    """The step that gave a row its reason; "" for an ok row. The same rule as `survey`'s, for one row."""
    if row["status"] == OK:
        return ""
    reached = max((n for n, step in enumerate(steps) if row.get(f"{step}_prompt_tokens") is not None), default=-1)
    if row["reason"] in RAISED:
        reached = min(reached + 1, len(steps) - 1)
    return steps[reached] if reached >= 0 else prepare_step(row["status"], row["reason"] or "")


def changes(text: str, answer: str) -> list[tuple[int, str]] | None:
    """The answer as an edit of the text, word by word: (0, same), (-1, only in the text), (1, only in the answer).

    None where either is too long to compare.
    """
    before, after = rjieba.cut(text), rjieba.cut(answer)
    if max(len(before), len(after)) > MAX_WORDS:
        return None
    edits: list[tuple[int, str]] = []
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for kind, i, j, k, m in matcher.get_opcodes():
        removed, added = "".join(before[i:j]), "".join(after[k:m])
        if kind == "equal" and (len(removed) >= MIN_SAME_CHARS or len(before) == len(after) == j - i):
            edits.append((0, removed))
            continue
        if len(edits) > 1 and edits[-1][0] == 1 and edits[-2][0] == -1:  # one change after another is one change
            removed, added = edits[-2][1] + removed, edits[-1][1] + added
            del edits[-2:]
        edits += [(-1, removed), (1, added)]
    return [(kind, part) for kind, part in edits if part]


def _card(doc_id: str, runs: list[Sampled]) -> dict[str, Any]:
    rows = {number: run.rows[doc_id] for number, run in enumerate(runs) if doc_id in run.rows}
    first = next(iter(rows.values()))
    text, origin = _text(doc_id, runs)
    meta = json.loads(first.get("meta") or "{}")
    return {
        "id": doc_id,
        "source": first["source"],
        "title": _cut(first.get("title")),
        "meta": {key: value for key, value in meta.items() if key not in ("file", "offset", "error")},
        "file": meta.get("file"),
        "offset": meta.get("offset"),
        "error": meta.get("error"),
        "tokens": first.get("tokens"),
        "text": _cut(text),
        "origin": origin,
        "runs": [_fate(number, row, text, runs[number].steps) for number, row in rows.items()],
    }


def _text(doc_id: str, runs: list[Sampled]) -> tuple[str | None, str]:
    for run in runs:
        text = run.rows.get(doc_id, {}).get("text") or run.texts.get(doc_id)
        if text:
            return text, "stage"
    return next(((run.excerpts[doc_id], "corpus") for run in runs if doc_id in run.excerpts), (None, ""))


def _fate(number: int, row: Row, text: str | None, steps: list[str]) -> dict[str, Any]:
    answer = row.get("answer")
    edits = changes(text[:MAX_CHARS], answer[:MAX_CHARS]) if text and answer else None
    same = sum(len(part) for kind, part in edits or [] if kind == 0)
    return {
        "run": number,
        "status": row["status"],
        "reason": row["reason"] or "",
        "step": settled_by(row, steps),
        "perplexity": _finite(row.get("perplexity")),
        "instruction": _cut(row.get("instruction")),
        "verdict": row.get("verdict"),
        "score": _finite(row.get("score")),
        "answer": _cut(answer),
        "edits": edits,
        "kept": same / len(answer) if edits and answer else None,
        "steps": [
            [step, row[f"{step}_prompt_tokens"], row.get(f"{step}_output_tokens"), row.get(f"{step}_finish_reason")]
            for step in steps
            if row.get(f"{step}_prompt_tokens") is not None
        ],
    }


def _finite(value: float | None) -> float | None:
    """JSON has no word for infinity, which is the perplexity of a text that a model holds impossible."""
    return value if value is not None and math.isfinite(value) else None


def _cut(text: str | None) -> str | None:
    return text if text is None or len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}…"
