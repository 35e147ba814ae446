"""`make demo`: the whole inference side on embedded data: corpora → models → prepare → generate → export → a table.

Every stage is the one that a cluster runs; only conf/demo differs. Run from the project's folder:
    python -m kun_ray.demo [--gpu] [--model FOLDER_OR_HUB_ID]
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.table import Table
from rich.terminal_theme import MONOKAI
from rich.text import Text

from kun_ray import store
from kun_ray.config import KunError, load
from kun_ray.demo import layout, tiny
from kun_ray.export import ExportConfig, export
from kun_ray.generate import GenerateConfig, generate
from kun_ray.prepare import PrepareConfig, prepare
from kun_ray.schema import FAILED, OK, REJECTED

CONF = Path("conf/demo")
RUN = Path("runs/demo")
PAGE = """<!DOCTYPE html><meta charset="UTF-8"><style>{stylesheet} body {{ color: {foreground}; background: {background}; }}
pre {{ font: 15px/1.35 "Noto Sans Mono CJK SC", monospace; margin: 1em; }}</style><pre>$ make demo\n{code}</pre>"""
"""The picture's page: wide characters are exactly two columns in this font."""


def main() -> None:
    """Runs the demo; a second call finds everything done and only shows it."""
    parser = argparse.ArgumentParser(
        prog="python -m kun_ray.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", action="store_true", help="run both engines on one GPU")
    parser.add_argument("--model", help="use this model for every step instead of the tiny ones that the demo fits")
    parser.add_argument(
        "--effort", type=float, default=1.0, help="multiplies the epochs of the tiny models (default 1)"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE.html", help="also save the final table as a picture")
    options = parser.parse_args()
    if not CONF.is_dir():
        sys.exit(f"there is no {CONF} here: run the demo from the project's folder")
    started, console = time.monotonic(), Console(width=None if sys.stdout.isatty() else 110)
    kind = "-".join(
        [
            "smoke-gpu" if options.gpu else "demo",
            *([options.model.strip("/").replace("/", "_")] if options.model else []),
        ]
    )
    run = RUN.with_name(kind)

    console.rule("corpora")
    truth = layout.write_corpora(RUN / "corpora")
    console.print(f"{sum(truth.values())} records in three corpora's layouts: {RUN / 'corpora'}")
    models = [f"pools.{pool}.model={options.model}" for pool in ("label", "chat")] if options.model else []
    overlay = [str(CONF / "gpu.yaml")] if options.gpu else []
    generation = load(
        GenerateConfig,
        [str(CONF / "generate.yaml"), *overlay, f"input={run}/prepare", f"output={run}/generate", *models],
    )
    if not options.model:
        console.rule("models")
        tiny.build_models(RUN / "models", layout.clean_texts(), generation.steps, options.effort)
    tokenizer = generation.pools["label"].model
    stages: tuple[tuple[str, Any, Any], ...] = (
        (
            "prepare",
            prepare,
            load(PrepareConfig, [str(CONF / "prepare.yaml"), f"output={run}/prepare", f"tokenizer={tokenizer}"]),
        ),
        ("generate", generate, generation),
        (
            "export",
            export,
            load(ExportConfig, [str(CONF / "export.yaml"), f"input={run}/generate", f"output={run}/export"]),
        ),
    )
    for name, stage, config in stages:
        console.rule(f"{name}: python jobs/{name}.py {CONF}/{name}.yaml")
        stage(config)
    show(console, run, sum(truth.values()))
    if options.picture:
        drawn = Console(record=True, width=110, file=io.StringIO())
        show(drawn, run, sum(truth.values()))
        drawn.save_html(str(options.picture), theme=MONOKAI, code_format=PAGE)
    console.print(f"done in {time.monotonic() - started:.0f} s")


def show(console: Console, run: Path, num_records: int) -> None:
    """The counts of every stage, which must add up, and five rows before and after."""
    console.rule("result", characters="-")
    table = Table(box=None, padding=(0, 2))
    for column, justify in (
        ("stage", "left"),
        ("rows in", "right"),
        (OK, "right"),
        (REJECTED, "right"),
        (FAILED, "right"),
        ("reasons", "left"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for stage in ("prepare", "generate"):
        summary = store.Folder(str(run / stage)).read_json(store.SUMMARY)
        if (
            summary["rows_in"] != num_records
            or sum(summary[status] for status in (OK, REJECTED, FAILED)) != num_records
        ):
            raise KunError(f"{run / stage}: {num_records} records went in, but {summary} came out")
        reasons = "  ".join(f"{reason.partition('/')[2]} {count}" for reason, count in summary["reasons"].items())
        table.add_row(
            stage, f"{summary['rows_in']}", *(f"{summary[status]}" for status in (OK, REJECTED, FAILED)), reasons
        )
    summary = store.Folder(str(run / "export")).read_json(store.SUMMARY)
    left_out = "  ".join(f"{reason} {count}" for reason, count in summary["not_selected"].items() if count)
    exported = summary["train"] + summary["valid"]
    table.add_row(
        "export",
        f"{summary['rows']}",
        f"{exported}",
        "",
        "",
        f"train {summary['train']}  valid {summary['valid']}  {left_out}",
    )
    console.print(table)
    console.print(f"{num_records} records read = {num_records} rows written by every stage, each once.\n")
    for row in samples(run):
        lines = Table.grid(padding=(0, 2))
        lines.add_column(style="dim", no_wrap=True)
        lines.add_column(overflow="fold")
        for name in ("text", "instruction", "answer"):
            lines.add_row(f"  {name}", Text(_short(row[name], 150), style="bold" if name == "instruction" else ""))
        console.print(f"[green]{row['source']}[/] {row['verdict']} {row['score']:.2f}", lines, "", sep="\n")
    for stage, what in (
        ("prepare", "documents, with reasons"),
        ("generate", "every row with instruction, verdict, answer"),
        ("export", "Alpaca, ShareGPT, Parquet, data card"),
    ):
        console.print(f"  {run / stage}/  {what}")


def samples(run: Path, num: int = 5) -> list[dict[str, Any]]:
    """The finished rows with the highest scores: text, instruction, verdict, answer."""
    rows: pa.Table = store.Folder(str(run / "generate")).dataset().to_table()
    finished = [row for row in rows.to_pylist() if row["status"] == OK]
    finished.sort(key=lambda row: (-row["score"], row["doc_id"]))
    return finished[:num]


def _short(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


if __name__ == "__main__":
    try:
        main()
    except KunError as error:
        sys.exit(f"error: {error}")
