"""The course of a training run from its metrics.jsonl: progress lines while it runs, a picture when it is done."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kun_ray.progress import duration
from kun_ray.store import METRICS, Folder


def read_lines(folder: Folder) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl; one that a kill cut short is left out."""
    path = Path(folder.path) / METRICS
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def read_starts(folder: Folder) -> list[dict[str, Any]]:
    """One line for each time that the ranks were started."""
    return [line for line in read_lines(folder) if line.get("event") == "start"]


def read_steps(folder: Folder) -> dict[str, dict[int, float]]:
    """`loss`, `valid_loss`, `lr` and `grad_norm` by step; of steps that ran twice, the later run's."""
    found: dict[str, dict[int, float]] = {name: {} for name in ("loss", "valid_loss", "lr", "grad_norm")}
    for line in read_lines(folder):
        for name, by_step in found.items():
            if line.get(name) is not None and "step" in line:
                by_step[line["step"]] = line[name]
    return found


@contextlib.contextmanager
def follow(folder: Folder, every_s: float) -> Iterator[None]:
    """Prints a line of progress every few seconds while ranks write metrics.jsonl."""
    ended = threading.Event()
    before = len(read_lines(folder))

    def watch() -> None:
        shown = before
        while not ended.wait(every_s):
            lines = read_lines(folder)
            for line in lines[shown:]:
                if line.get("event") == "start":
                    print(
                        f"from step {line['step']} on {line['ranks']} ranks, attention {line['attention']}", flush=True
                    )
            steps = [line for line in lines[shown:] if "loss" in line]
            if steps:
                print(progress(steps), flush=True)
            shown = len(lines)

    thread = threading.Thread(target=watch, name="follow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(5)


def open_tensorboard(folder: Folder) -> Any:
    """A writer for `tensorboard --logdir <run>`, or None where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(Path(folder.path) / "tensorboard"))


def to_tensorboard(board: Any, line: dict[str, Any]) -> None:
    """Every number of a metrics.jsonl line that has a step."""
    for name, value in line.items():
        if "step" in line and name not in ("step", "steps", "epoch") and isinstance(value, int | float):
            board.add_scalar(name, value, line["step"])
    board.flush()


def progress(steps: list[dict[str, Any]]) -> str:
    """One line that sums up the newest steps."""
    last = steps[-1]
    mean_s = sum(step["elapsed_s"] for step in steps) / len(steps)
    left = (last["steps"] - last["step"]) * mean_s
    mfu = f"  MFU {last['mfu']:.1%}" if last.get("mfu") else ""
    return (
        f"{time.strftime('%H:%M:%S')}  step {last['step']}/{last['steps']}  epoch {last['epoch']}  loss {last['loss']:.4f}"
        f"  lr {last['lr']:.2e}  {last['supervised_tokens_per_s']:,.0f} supervised tokens/s  packing {last['packing_efficiency']:.0%}{mfu}"
        f"  ETA {duration(left)}"
    )


def draw(folder: Folder, steps: dict[str, dict[int, float]], title: str) -> None:
    """Writes loss.png: training loss of each step, held-out loss, learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(list(steps["loss"]), list(steps["loss"].values()), color="tab:blue", linewidth=1, label="training")
    if steps["valid_loss"]:
        axes.plot(
            list(steps["valid_loss"]), list(steps["valid_loss"].values()), "o-", color="tab:orange", label="held out"
        )
    axes.set(xlabel="step", ylabel="loss, nats per supervised token", title=title)
    rate = axes.twinx()
    rate.plot(list(steps["lr"]), list(steps["lr"].values()), color="tab:gray", linewidth=0.8, linestyle=":")
    rate.set_ylabel("learning rate (dotted)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(Path(folder.path) / "loss.png", dpi=120)
    plt.close(figure)
