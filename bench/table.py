"""The table of all figures in docs/performance.md, made from the results: what must be reached, what was, and where it stands.

python bench/table.py            writes it into docs/performance.md
"""

from __future__ import annotations

import dataclasses
import json
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from machine import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- made by bench/table.py: begin -->\n", "<!-- end -->\n"
COMPARE: dict[str, Callable[[float, float], bool]] = {
    "≥": operator.ge,
    "≤": operator.le,
    "±": lambda value, bound: abs(value) <= bound,
}


@dataclasses.dataclass(frozen=True)
class Figure:
    """One row of the table."""

    name: str
    mark: str
    """`≥ 0.97`, `≤ 60 s`, or `± 0.2` for what may be off both ways; empty where nothing was asked."""
    file: str
    """Its result, without .json."""
    key: str
    """Where it stands in there; `*` is every entry, and the worst of them has to reach the mark."""


FIGURES = [
    Figure("output tokens/s ÷ `vllm.LLM.generate`, label-like", "≥ 0.97", "engine-tiny-label-like", "efficiency"),
    Figure("the same, polish-like", "≥ 0.97", "engine-tiny-polish-like", "efficiency"),
    Figure("rows/s ÷ one `LLM.generate` per file, label-like", "≥ 1.3", "rivals-tiny-label-like", "advantage/per_file"),
    Figure("the same, polish-like", "≥ 1.3", "rivals-tiny-polish-like", "advantage/per_file"),
    Figure("rows/s ÷ `ray.data.llm`, label-like", "≥ 1.1", "rivals-tiny-label-like", "advantage/ray_data_llm"),
    Figure("the same, polish-like", "≥ 1.1", "rivals-tiny-polish-like", "advantage/ray_data_llm"),
    Figure("scoring rows/s, choosing ÷ decoding 256 tokens", "≥ 10", "scoring-tiny", "choose_over_decode_256"),
    Figure("the same, 64 tokens", "≥ 10", "scoring-tiny", "choose_over_decode_64"),
    Figure("the same, 8 tokens", "≥ 10", "scoring-tiny", "choose_over_decode_8"),
    Figure("verdicts of both ways that agree", "≥ 0.95", "verdicts", "agreement"),
    Figure("driver's core for a row, 512 rows in a block", "≤ 100 µs", "rows", "driver_us_per_row"),
    Figure("the same, blocks by default", "≤ 100 µs", "rows", "blocks_by_default/driver_us_per_row"),
    Figure("all processes' cores for a row, 512 in a block, in µs", "", "rows", "cpu_us_per_row"),
    Figure("driver's memory, 1,000,000 beyond 100,000 rows", "≤ 0.1", "rows", "driver_memory_growth"),
    Figure("bytes spilled, up to 1,000,000 rows", "≤ 0", "rows", "sizes/*/spilled_bytes"),
    Figure("resume to the first new file, up to 1,000,000 rows", "≤ 60 s", "rows", "sizes/*/resume_s"),
    Figure("rows/s ÷ linear, 1 to 32 replicas", "≥ 0.95", "replicas", "least_of_linear"),
    Figure("the last 1% of the rows (a row takes 2 s)", "", "replicas", "sizes/*/tail_s"),
    Figure("corpus readers ÷ datatrove's", "≥ 2", "ingest", "readers/*/ratio/median"),
    Figure(
        "a reader of the same rows that checks nothing ÷ datatrove's", "", "ingest", "readers/*/same_rows_ratio/median"
    ),
    Figure("filters and tokens ÷ datatrove's", "≥ 2", "ingest", "chain/comparable filters, tokens/ratio, */median"),
    Figure("the slowest filter", "", "ingest", "slowest_filter"),
    Figure("near duplicates: recall at Jaccard 0.80–0.85", "≥ 0.95", "near_duplicates", "sizes/*/recall_at_threshold"),
    Figure(
        "time to sign ten times as many documents (10 is linear)", "≤ 12", "near_duplicates", "growth/*/sign_seconds"
    ),
    Figure("time to search ten times as many", "≤ 12", "near_duplicates", "growth/*/search_seconds"),
    Figure(
        "supervised tokens/s, packed ÷ padded", "≥ 2", "training", "lengths/*/speed_ratios/packed_over_padded/median"
    ),
    Figure(
        "packed ÷ padded in the order of arrival",
        "≥ 2",
        "training",
        "lengths/*/speed_ratios/packed_over_arrival/median",
    ),
    Figure("packing efficiency", "≥ 0.95", "padding", "useful_share_of_computed_tokens/*/packed/*"),
    Figure("our loop's time beyond plain PyTorch's", "≤ 0.05", "training-loops", "lengths/*/loop_overhead/torch"),
    Figure("our loop's time beyond plain DeepSpeed's", "", "training-loops", "lengths/*/loop_overhead/deepspeed"),
    Figure("start-up: command to the first row", "", "startup", "ways/*/command_to_first_row_s/median"),
    Figure("its largest part", "", "startup", "largest_part"),
    Figure("`jobs/plan.py`: rows/s off by, with a pilot", "± 0.2", "planner", "off_by"),
    Figure("the same, without one", "± 0.2", "planner", "without_a_pilot_off_by"),
    Figure("`jobs/plan.py`: memory off by", "± 0.2", "planner", "memory/*/off_by"),
]


def found(value: Any, key: str) -> Iterator[Any]:
    """The values that a key stands for, less those that were not measured. Raises KeyError where there is no such key."""
    name, _, rest = key.partition("/")
    if not key:
        yield from () if value is None else (value,)
    elif "*" not in name:
        yield from found(value[name], rest)
    else:
        entries = value if isinstance(value, list) else [value[k] for k in value if k.startswith(name.rstrip("*"))]
        for entry in entries:
            yield from found(entry, rest)


def row(figure: Figure, result: dict[str, Any]) -> str:
    """One line of the table. Raises KeyError where the result has no such figure."""
    values = list(found(result, figure.key))
    if not values:
        raise KeyError(f"{figure.file}.json has nothing at {figure.key}")
    sign, _, mark = figure.mark.partition(" ")
    reached = ""
    if sign:
        bound = float(mark.split()[0])
        good = [COMPARE[sign](value, bound) for value in values]
        reached = "yes" if all(good) else "**no**" if not any(good) else f"{sum(good)} of {len(good)}"
    plain = [value if isinstance(value, str) else f"{round(value, 3):,g}" for value in values]
    shown = plain[0] if len(set(plain)) == 1 else ", ".join(plain)
    return f"| {figure.name} | {figure.mark} | {shown} | {reached} | {figure.file}: {figure.key.replace('*', '…')} | {result['date']} |"


def table(results: Path = RESULTS) -> str:
    """The whole table, in Markdown."""
    lines = ["| figure | must be | measured | reached | result and key | date |", "|---|---|---|---|---|---|"]
    for figure in FIGURES:
        lines.append(row(figure, json.loads((results / f"{figure.file}.json").read_text())))
    return "\n".join(lines) + "\n"


def main() -> None:
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.split(END, 1)[1])


if __name__ == "__main__":
    main()
