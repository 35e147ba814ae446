"""The numbers of the page: tiles, funnel, reasons, openings, sources and stages, one column or table per run.

`page` calls these; they read what survey() and read_throughput() have kept, never a row.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from typing import Any, Final

from kun_ray.changes import EXPORT
from kun_ray.progress import duration
from kun_ray.report.openings import effective_number
from kun_ray.report.reasons import explain
from kun_ray.report.runs import Run, Stage
from kun_ray.report.survey import PREPARE_STEPS, Survey
from kun_ray.report.throughput import Throughput
from kun_ray.schema import OK, STATUSES

LEFT_AFTER: Final = {
    "read": "read without error", "filter": "passed the filters", "dedup": "not a duplicate",
    "perplexity": "perplexity in range", "label": "has an instruction", "score": "instruction is good",
    "polish": "has an answer",
}  # fmt: skip
TOP_VERBS: Final = 15
TOP_NOUNS: Final = 6


@dataclasses.dataclass(frozen=True)
class Measured:
    """One run with all that was read of it."""

    run: Run
    survey: Survey
    throughput: dict[str, Throughput | None]
    """By stage name."""

    @property
    def num_exported(self) -> int | None:
        """Rows of the newest finished export, both splits; None if there is none."""
        export = self.run.export
        return export.summary.get("train", 0) + export.summary.get("valid", 0) if export else None


def tiles(runs: list[Measured]) -> list[dict[str, Any]]:
    """The figures that come first: name, one value per run, and what a figure counts if its name does not tell."""
    rows = [
        ("documents", [_whole(r.survey.num_rows) for r in runs]),
        ("ok", [_whole(r.survey.num(OK)) for r in runs]),
        ("ok, of documents", [_percent(r.survey.num(OK), r.survey.num_rows) for r in runs]),
        ("failed", [_whole(r.survey.num("failed")) for r in runs]),
        ("exported", ["–" if r.num_exported is None else _whole(r.num_exported) for r in runs]),
        ("tokens written", [_output_tokens(r.run) for r in runs]),
        ("running time", [duration(_elapsed(r)) for r in runs]),
    ]
    timed = ", ".join(dict.fromkeys(stage.name for r in runs for stage in r.run.chain))
    notes = {"running time": f"of {timed}"}  # trainings and exports keep no rows, and their time is not counted
    return [{"name": name, "values": values, "note": notes.get(name, "")} for name, values in rows]


def funnel(runs: list[Measured]) -> list[dict[str, Any]]:
    """Rows left after each step: name, one cell per run (None where a run has no such step)."""
    steps = list(dict.fromkeys(step for r in runs for step in r.survey.steps))
    table: list[dict[str, Any]] = [
        {"name": "documents", "cells": [{"rows": r.survey.num_rows, "of": r.survey.num_rows, "lost": 0} for r in runs]}
    ]
    left = [r.survey.num_rows for r in runs]
    for step in steps:
        cells: list[dict[str, int] | None] = []
        for number, r in enumerate(runs):
            lost = sum(n for (_, _, _, by), n in r.survey.counts.items() if by == step)
            left[number] -= lost
            known = step in r.survey.steps
            cells.append({"rows": left[number], "of": r.survey.num_rows, "lost": lost} if known else None)
        table.append({"name": LEFT_AFTER.get(step, f"after {step}"), "cells": cells})
    if any(r.num_exported is not None for r in runs):
        exported = [
            None
            if r.num_exported is None
            else {"rows": r.num_exported, "of": r.survey.num_rows, "lost": left[number] - r.num_exported}
            for number, r in enumerate(runs)
        ]
        table.append({"name": "exported", "cells": exported})
    return table


def reasons(runs: list[Measured]) -> list[dict[str, Any]]:
    """Steps in order, and below each its reasons with a sentence and one cell per run, most frequent first.

    The last step is the export, whose reasons leave out ok rows; a run without an export has no cell there.
    """
    per_run = [_by(r.survey, lambda key: (key[3], key[1], key[2])) + _not_selected(r.run) for r in runs]
    most = max((n for counts in per_run for (step, _, _), n in counts.items() if step), default=0)
    groups = []
    for step in [*dict.fromkeys(step for r in runs for step in r.survey.steps), EXPORT]:
        keys = {key for counts in per_run for key in counts if key[0] == step}
        rows = [
            {
                "step": step,
                "status": status,
                "reason": reason,
                "explain": explain(reason, step),
                "cells": [
                    {"rows": counts[step, status, reason], "most": most, "of": r.survey.num_rows}
                    if step != EXPORT or r.run.export
                    else None
                    for counts, r in zip(per_run, runs, strict=True)
                ],
            }
            for _, status, reason in sorted(keys, key=lambda key: (-max(c[key] for c in per_run), key))
        ]
        if rows:
            groups.append({"step": step, "rows": rows})
    return groups


def _not_selected(run: Run) -> Counter[Any]:
    """(export, ok, reason) → ok rows that the export left out; what was not ok has its reason at an earlier step."""
    behind = run.export.summary.get("not_selected", {}) if run.export else {}
    return Counter({(EXPORT, OK, reason): n for reason, n in behind.items() if n and reason != "not_ok"})


def openings(runs: list[Measured]) -> list[dict[str, Any]]:
    """For each run its most frequent verbs with their nouns, and how varied they are."""
    result = []
    for r in runs:
        pairs = r.survey.openings
        verbs: Counter[str] = Counter()
        nouns: dict[str, Counter[str]] = defaultdict(Counter)
        for (verb, noun), count in pairs.items():
            verbs[verb] += count
            nouns[verb][noun] += count
        top = verbs.most_common(TOP_VERBS)
        result.append(
            {
                "run": r.run.name,
                "num_instructions": _whole(pairs.total()),
                "num_verbs": _whole(len(verbs)),
                "effective_verbs": f"{effective_number(verbs.values()):.1f}",
                "num_pairs": _whole(len(pairs)),
                "effective_pairs": f"{effective_number(pairs.values()):.1f}",
                "most": top[0][1] if top else 0,
                "total": pairs.total(),
                "rows": [
                    {
                        "verb": verb or "（无动词）",
                        "count": count,
                        "nouns": [(noun, n) for noun, n in nouns[verb].most_common(TOP_NOUNS + 1) if noun][:TOP_NOUNS],
                    }
                    for verb, count in top
                ],
            }
        )
    return result


def sources(runs: list[Measured]) -> list[dict[str, Any]]:
    """For each run a table: source → documents, rows lost by step, ok rows, exported rows; the total comes last."""
    tables = []
    for r in runs:
        export = r.run.export
        exported = export.summary.get("sources", {}) if export else {}
        lost = _by(r.survey, lambda key: (key[0], key[3]))
        steps = [step for step in r.survey.steps if any(by == step for _, by in lost)]
        names = sorted(
            {source for source, _, _, _ in r.survey.counts}, key=lambda name: (-r.survey.num(source=name), name)
        )
        rows: list[dict[str, Any]] = [
            {
                "name": name,
                "documents": r.survey.num(source=name),
                "lost": [lost[name, step] for step in steps],
                "ok": r.survey.num(OK, name),
                "exported": exported.get(name, {}).get("exported"),
            }
            for name in names
        ]
        rows.append(
            {
                "name": "all",
                "documents": r.survey.num_rows,
                "lost": [sum(row["lost"][n] for row in rows) for n in range(len(steps))],
                "ok": r.survey.num(OK),
                "exported": r.num_exported,
            }
        )
        tables.append({"run": r.run.name, "steps": steps, "rows": rows, "has_export": export is not None})
    return tables


def stages(runs: list[Measured]) -> list[dict[str, Any]]:
    """Every stage of every run: state, rows by status, time, speed, tokens by pool, and how often it was started."""
    rows = []
    for number, r in enumerate(runs):
        for stage in r.run.stages:
            summary, seen = stage.summary, r.throughput.get(stage.name)
            elapsed = _seconds(stage, seen)
            num_rows = summary.get("rows")
            numbers = [num_rows, *(summary.get(status) for status in STATUSES)]
            if not summary and stage is r.run.rows:
                numbers = [r.survey.num_rows, *(r.survey.num(status) for status in STATUSES)]
            rate = f"{num_rows / elapsed:,.1f}" if num_rows and elapsed and stage.has_rows else "–"
            pools = summary.get("pools", {})
            tokens = [
                f"{name}: {_whole(pool.get('prompt_tokens', 0))} + {_whole(pool.get('output_tokens', 0))}"
                for name, pool in pools.items()
            ]
            attempts = [f"{a.started} ({_whole(a.rows)})" for a in seen.attempts] if seen else []
            rows.append(
                {
                    "run": number,
                    "name": stage.name,
                    "state": state(stage),
                    "numbers": [*("–" if n is None else _whole(n) for n in numbers), duration(elapsed), rate],
                    "tokens": tokens,
                    "attempts": attempts,
                }
            )
    return rows


def state(stage: Stage) -> str:
    """complete, or running or stopped: a folder does not tell which."""
    return "complete" if stage.folder.is_complete() else "running or stopped"


def step_order(runs: list[Measured]) -> list[str]:
    """The engine's steps of all runs."""
    return [step for step in dict.fromkeys(s for r in runs for s in r.survey.steps) if step not in PREPARE_STEPS]


def _by(survey: Survey, key: Any) -> Counter[Any]:
    counts: Counter[Any] = Counter()
    for found, number in survey.counts.items():
        counts[key(found)] += number
    return counts


def _output_tokens(run: Run) -> str:
    """Of finished stages: until then nobody has added them up."""
    pools = [pool for stage in run.chain for pool in stage.summary.get("pools", {}).values()]
    return _whole(sum(pool.get("output_tokens", 0) for pool in pools)) if pools else "–"


def _elapsed(measured: Measured) -> float:
    return sum(_seconds(stage, measured.throughput.get(stage.name)) or 0 for stage in measured.run.chain)


def _seconds(stage: Stage, seen: Throughput | None) -> float | None:
    """Running time over all attempts: generate's summary knows it, prepare's only the last one's; metrics know nothing of
    what follows the rows."""
    last: float | None = stage.summary.get("elapsed_s")
    if seen is None or "runs" in stage.summary:
        return last
    *earlier, newest = (attempt.elapsed_s for attempt in seen.attempts)
    return float(sum(earlier) + (newest if last is None else last))


def _whole(number: int) -> str:
    return f"{number:,}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"
