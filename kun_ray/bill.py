"""The lines of a plan, what they add up to, and the table that jobs/plan.py prints of them. plan.py fills it in."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys

from rich.console import Console
from rich.table import Table

from kun_ray.progress import duration


@dataclasses.dataclass
class Line:
    """One stage of the plan, or one pool of it."""

    stage: str
    what: str
    fits: str = ""
    gpus: int = 0
    seconds: float = 0.0
    disk_gb: float = 0.0
    pool: str = ""
    """Its name where the stage has several."""
    waits_s: float = 0.0
    """For slower pools of its stage: they run together, and all hold their GPUs until the last one ends."""

    @property
    def name(self) -> str:
        return f"{self.stage}.{self.pool}" if self.pool else self.stage

    @property
    def runs(self) -> bool:
        return not self.fits.startswith("no")

    @property
    def gpu_hours(self) -> float:
        return self.gpus * (self.seconds + self.waits_s) / 3600


def parameters(number: float) -> str:
    """How many a model has, as papers write it: 34.39B, 1.05M."""
    return f"{number / 1e9:.2f}B" if number >= 1e8 else f"{number / 1e6:.2f}M"


def hold_together(pools: list[Line], replicas: list[int]) -> list[str]:
    """Lets the pools of one generate stage end together. Returns a note on the slower one, where there are several."""
    if len(pools) == 1 or not all(line.runs for line in pools):
        return []
    second, slowest = sorted(pools, key=lambda line: line.seconds)[-2:]
    for line in pools:
        line.waits_s = slowest.seconds - line.seconds
    held = f"{slowest.stage}: its slowest pool is {slowest.pool}, and the others hold their GPUs until it ends"
    wanted = math.ceil(replicas[pools.index(slowest)] * slowest.seconds / second.seconds) if second.seconds else 0
    return [f"{held}; with {wanted} replicas it would keep up" if wanted > replicas[pools.index(slowest)] else held]


def show(lines: list[Line], missing: list[str], notes: list[str], card: str, price: float | None) -> None:
    """Prints the plan as a table, with its total and what it rests on below; nothing of GPUs where no stage has any.

    Args:
        missing: what is not in `lines` although the run has it, each with the reason.
        price: of one GPU-hour.
    """
    on_gpus = any(line.gpus for line in lines)
    gpu_columns = ("GPUs", "GPU-hours") if on_gpus else ()
    table = Table("stage", "what", "fits", "time", "disk GB", *gpu_columns, box=None, padding=(0, 2))
    for line in lines:
        time = duration(line.seconds) + (f" of {duration(line.seconds + line.waits_s)}" if line.waits_s else "")
        hours = f"{line.gpu_hours:,.1f}" if line.gpus and line.runs else ""
        table.add_row(
            line.name,
            line.what,
            line.fits,
            time if line.runs else "–",
            f"{line.disk_gb:,.1f}",
            *((str(line.gpus or ""), hours) if on_gpus else ()),
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    seconds = gpu_hours = disk_gb = 0.0
    for stage, found in itertools.groupby(lines, key=lambda line: line.stage):
        pools = list(found)
        unfit = [line.pool for line in pools if not line.runs]
        if unfit:
            missing = [*missing, f"{stage} ({' and '.join(filter(None, unfit))}{' ' if unfit[0] else ''}does not fit)"]
            continue
        seconds += max(line.seconds for line in pools)
        gpu_hours += sum(line.gpu_hours for line in pools)
        disk_gb += sum(line.disk_gb for line in pools)
    cost = f", {gpu_hours * price:,.0f} at {price:g} a GPU-hour" if price else ""
    held = f"{gpu_hours:,.1f} GPU-hours on {card}{cost}" if on_gpus else "on CPUs alone"
    without = f"; without: {', '.join(missing)}" if missing else ""
    print(f"\ntotal: {duration(seconds)} if stages follow each other, {held}, {disk_gb:,.0f} GB of disk{without}")
    print("\n".join(f"- {note}" for note in notes))
