"""`make demo`: the whole Kun loop on embedded data: inputs → jobs/pipeline.py's stages → a table.

Every stage is the one that a cluster runs; only conf/demo differs. Run from the project's folder:
    python -m kun_ray.demo [--gpu] [--model FOLDER_OR_HUB_ID] [--only-inputs]
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
from kun_ray.generate import GenerateConfig
from kun_ray.graph import PipelineConfig
from kun_ray.pipeline import pipeline
from kun_ray.schema import FAILED, OK, REJECTED

CONF = Path("conf/pipeline")
INPUTS = Path("runs/demo/inputs")
ROWS = {"prepare": "documents, with reasons", "label": "with instructions", "curate": "with verdicts and answers"}
"""Stages whose rows are one for each record."""
PAGE = """<!DOCTYPE html><meta charset="UTF-8"><style>{stylesheet} body {{ color: {foreground}; background: {background}; }}
pre {{ font: 15px/1.35 "Noto Sans Mono CJK SC", monospace; margin: 1em; }}</style><pre>$ make demo\n{code}</pre>"""
"""The picture's page: wide characters are exactly two columns in this font."""


def main() -> None:
    """Runs the demo; a second call finds everything done and only shows it."""
    parser = argparse.ArgumentParser(
        prog="python -m kun_ray.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", action="store_true", help="train and run all models on one GPU")
    parser.add_argument("--model", help="with --gpu: run this model for every step and train none")
    parser.add_argument("--only-inputs", action="store_true", help="write corpora, seed pairs and base model, and end")
    parser.add_argument("--picture", type=Path, metavar="FILE.html", help="also save the final table as a picture")
    options = parser.parse_args()
    if not CONF.is_dir():
        sys.exit(f"there is no {CONF} here: run the demo from the project's folder")
    if options.model and not options.gpu:
        sys.exit("--model needs --gpu: on a CPU only the tiny models are fast enough")
    started, console = time.monotonic(), Console(width=None if sys.stdout.isatty() else 110)

    console.rule("inputs")
    num_records = write_inputs(INPUTS)
    if options.only_inputs:
        return
    kind = "smoke-model" if options.model else "smoke-gpu" if options.gpu else "demo"
    given = [f"models.{role}={options.model}" for role in ("label", "score", "polish")] if options.model else []
    config = load(PipelineConfig, [str(CONF / f"{kind}.yaml"), *given])
    console.rule(f"python jobs/pipeline.py {CONF}/{kind}.yaml {' '.join(given)}")
    pipeline(config)
    run = Path(config.output)
    show(console, run, num_records)
    if options.picture:
        drawn = Console(record=True, width=110, file=io.StringIO())
        show(drawn, run, num_records)
        drawn.save_html(str(options.picture), theme=MONOKAI, code_format=PAGE)
    console.print(f"done in {time.monotonic() - started:.0f} s")


def write_inputs(folder: Path) -> int:
    """Corpora, seed pairs and base model; returns the number of records in the corpora."""
    truth = layout.write_corpora(folder / "corpora")
    print(f"{sum(truth.values())} records in three corpora's layouts: {folder / 'corpora'}")
    steps = load(GenerateConfig, ["conf/demo/generate.yaml"]).steps
    texts = layout.clean_texts()
    pairs = tiny.write_seeds(folder, texts, steps)
    print(f"{len(pairs)} seed pairs to learn from, others held out: {folder}/*.jsonl")
    tiny.build_base(folder / "base", texts, pairs, steps)
    return sum(truth.values())


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
    for stage in ROWS:
        summary = _summary(run, stage)
        if (
            summary["rows_in"] != num_records
            or sum(summary[status] for status in (OK, REJECTED, FAILED)) != num_records
        ):
            raise KunError(f"{run / stage}: {num_records} records went in, but {summary} came out")
        reasons = "  ".join(f"{reason.partition('/')[2]} {count}" for reason, count in summary["reasons"].items())
        table.add_row(
            stage, f"{summary['rows_in']}", *(f"{summary[status]}" for status in (OK, REJECTED, FAILED)), reasons
        )
    summary = _summary(run, "export")
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
    for task, stages in (("instruction from answer", ("train_label",)), ("answer", ("train_chat", "train_final"))):
        losses = {stage: _summary(run, stage) for stage in stages if (run / stage).is_dir()}
        if losses:
            base = next(iter(losses.values()))["valid_loss_before"]
            after = ", ".join(f"{stage} {summary['valid_loss']:.2f}" for stage, summary in losses.items())
            console.print(f"  held-out loss, {task}: base model {base:.2f}, {after} nats/token")
    trained = [(stage, "model/, loss.png, metrics.jsonl") for stage in ("train_label", "train_chat", "train_final")]
    for stage, what in (*ROWS.items(), ("export", "Alpaca, ShareGPT, Parquet, data card"), *trained):
        if (run / stage).is_dir():
            console.print(f"  {run / stage}/  {what}")
    console.print(
        f"  {run}/logs/  what each stage said.  See what became of the documents: python jobs/report.py {run}"
    )


def _summary(run: Path, stage: str) -> dict[str, Any]:
    return dict(store.Folder(str(run / stage)).read_json(store.SUMMARY))


def samples(run: Path, num: int = 5) -> list[dict[str, Any]]:
    """The finished rows with the highest scores: text, instruction, verdict, answer."""
    rows: pa.Table = store.Folder(str(run / "curate")).dataset().to_table()
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
