"""Everything that was measured → one HTML text. The only file that writes markup, and Jinja escapes all that goes into it.

`report` calls render(). A policy in the page (Content-Security-Policy) forbids it to load anything and to run any
script but its own, so that even markup that slipped through would stay dead.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from pathlib import Path
from typing import Any, Final

import jinja2
import yaml
from markupsafe import Markup

from kun_ray import __version__
from kun_ray.config import without_credentials
from kun_ray.report import plots, tables
from kun_ray.report.reasons import explain
from kun_ray.report.runs import Stage, differences, stages_of_some
from kun_ray.report.tables import Measured

HERE: Final = Path(__file__).parent
SECTIONS: Final = (
    ("differences", "what differs"), ("funnel", "funnel"), ("reasons", "reasons"), ("distributions", "distributions"),
    ("instructions", "instructions"), ("sources", "sources"), ("throughput", "throughput"), ("samples", "samples"), ("configuration", "configuration"),
)  # fmt: skip
FIGURES: Final = (
    ("tokens", "Tokens", "of a document, for the label model", "tokens", ",.0f"),
    ("perplexity", "Perplexity", "where it was measured", "perplexity", ",.4g"),
    ("score", "Score", "P(good) of every scored instruction", "score", ".3f"),
    ("instruction", "Instruction", "characters, of ok rows", "characters of the instruction", ",.0f"),
    ("answer", "Answer", "characters, of ok rows", "characters of the answer", ",.0f"),
)
"""Histogram, name, what is measured, the axis, how a value is written."""
CURVES: Final = (
    ("rows_per_s", "Rows per second", "rows/s"),
    ("tokens_per_s", "Tokens per second", "tokens/s"),
    ("in_flight", "Rows in engines", "rows in flight"),
)


def render(runs: list[Measured], cards: list[dict[str, Any]]) -> str:
    """The page for one or more runs.

    Args:
        runs: what was read of each.
        cards: the sample (`cards.cards`).
    """
    script = (HERE / "page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=False
    )
    curves = _curves(runs)
    seen = [found for r in runs for found in r.throughput.values() if found is not None]
    names = [r.run.name for r in runs]
    return environment.get_template("page.html").render(
        title=names[0] if len(names) == 1 else " · ".join(names),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        css=Markup((HERE / "page.css").read_text()),
        sections=SECTIONS if len(runs) > 1 else SECTIONS[1:],
        runs=[
            {
                "name": r.run.name,
                "uri": without_credentials(r.run.uri),
                "stages": [{"name": stage.name, "state": tables.state(stage)} for stage in r.run.stages],
            }
            for r in runs
        ],
        notes=_notes(runs),
        tiles=tables.tiles(runs),
        funnel=tables.funnel(runs),
        reasons=tables.reasons(runs),
        figures=_figures(runs),
        openings=tables.openings(runs),
        sources=tables.sources(runs),
        curves=curves,
        num_restarts=sum(len(found.restarts_s) for found in seen),
        num_losses=sum(len(found.losses_s) for found in seen),
        stages=tables.stages(runs),
        sample_note=_sample_note(runs, cards),
        differences=differences([r.run for r in runs]) if len(runs) > 1 else [],
        stages_of_some=stages_of_some([r.run for r in runs]),
        configurations=[
            {"run": number, "stage": stage.name, "created": stage.created, "text": _as_yaml(stage)}
            for number, r in enumerate(runs)
            for stage in r.run.stages
        ],
        version=__version__,
        made=time.strftime("%F %T"),
        data=as_script_data({"runs": names, "cards": cards, "explain": _explanations(cards)}),
    )


def as_script_data(value: Any) -> Markup:
    """JSON that may stand inside a <script> element: no `<`, `>`, `&` or line separator is left in it as itself."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def _figures(runs: list[Measured]) -> list[dict[str, Any]]:
    figures = []
    for key, name, what, axis, form in FIGURES:
        series = [r.survey.histograms[key] for r in runs]
        if not any(histogram.total for histogram in series):
            continue
        lines = [
            {
                "run": r.run.name,
                "values": [
                    f"{h.total:,}",
                    *(format(h.percentile(percent), form) if h.total else "–" for percent in (5, 50, 95)),
                ],
            }
            for r, h in zip(runs, series, strict=True)
        ]
        svg = Markup(plots.histogram(axis, series, log=key == "perplexity"))
        figures.append({"name": name, "what": what, "svg": svg, "lines": lines})
    return figures


def _curves(runs: list[Measured]) -> list[dict[str, Any]]:
    """Of the last stage with rows: that is where the time goes."""
    found = [r.throughput.get(r.run.rows.name) for r in runs]
    if not any(found):
        return []
    curves = []
    stage = " · ".join(dict.fromkeys(r.run.rows.name for r in runs))
    restarts = [one.restarts_s if one else [] for one in found]
    losses = [one.losses_s if one else [] for one in found]
    for key, name, axis in CURVES:
        kinds = list(dict.fromkeys(kind for one in found if one for kind in one.curves if kind.endswith(key)))
        if not kinds:
            continue
        series = [
            [(one.seconds, one.curves[kind]) for kind in kinds if kind in one.curves] if one else [] for one in found
        ]
        dashes = [kind.removesuffix(key).strip() for kind in kinds if kind != key]
        svg = Markup(plots.lines(axis, series, restarts, losses))
        curves.append({"name": name, "dashes": dashes, "svg": svg, "stage": stage})
    return curves


def _notes(runs: list[Measured]) -> list[str]:
    notes = []
    for r in runs:
        stage, name = r.run.rows, f"{r.run.name}: " if len(runs) > 1 else ""
        if tables.state(stage) != "complete":
            notes.append(
                f"{name}{stage.name} is unfinished: the page shows the {r.survey.num_rows:,} rows written so far."
            )
        elif stage.summary.get("rows") not in (None, r.survey.num_rows):
            notes.append(
                f"{name}{stage.name} holds {r.survey.num_rows:,} rows, but its summary.json says "
                f"{stage.summary['rows']:,}: a part was added or removed."
            )
        if r.run.left_out:
            notes.append(
                f"{name}not shown, because they belong to another chain: {', '.join(r.run.left_out)}. "
                "Give such a stage's own folder to see it."
            )
    return notes


def _sample_note(runs: list[Measured], cards: list[dict[str, Any]]) -> str:
    most = max(r.survey.num_rows for r in runs)
    if len(cards) >= most:
        return "All documents."
    return (
        f"{len(cards):,} of {most:,} documents: about half of them ok, the others spread over all reasons and sources. "
        "The same documents in every run. To see a certain one: find=[part of it, or its doc_id]."
    )


def _explanations(cards: list[dict[str, Any]]) -> dict[str, str]:
    return {reason: explain(reason) for reason in {fate["reason"] for card in cards for fate in card["runs"]}}


def _as_yaml(stage: Stage) -> str:
    text = yaml.safe_dump(stage.config or stage.fingerprint, allow_unicode=True, sort_keys=False, width=100)
    return without_credentials(str(text)).strip()
