"""README.md of a trained model, for those that get it: a Hugging Face model card from what training has recorded.

release.py calls it for a model folder without a README.md of its own. Everything here turns values into text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml


def model_card(
    name: str, described: dict[str, Any], summary: dict[str, Any], data: dict[str, list[str]], licence: str | None
) -> str:
    """The card's text.

    Args:
        name: of the model, for the title.
        described: kun_ray.json in the model's folder: base, kind, dtype, version.
        summary: the training's summary.json; empty if only the model is there.
        data: what it was trained on, by name, each with the names and terms of its corpora.
        licence: for the header; None leaves it out.
    """
    base, is_adapter = str(described["base"]), described["kind"] == "adapter"
    on_hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", base) is not None and not Path(base).exists()
    header = {
        "language": ["zh"],
        **({"license": licence} if licence else {}),
        **({"base_model": base} if on_hub else {}),
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["kun_ray"],
    }
    shown = base if on_hub else base.rstrip("/").rpartition("/")[2]
    sections = [
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---",
        f"# {name}",
        f"{'LoRA adapters for' if is_adapter else 'A model trained from'} {shown}, in {described['dtype']}, made with kun_ray "
        f"{described['kun_ray']} (DeepSpeed ZeRO-3) by the method of Kun (arXiv 2401.06477).",
        *_training(summary),
        *_data(data),
    ]
    return "\n\n".join(sections) + "\n"


def _training(summary: dict[str, Any]) -> list[str]:
    if not summary:
        return []
    rows = [("steps", summary["steps"]), ("last loss", summary["loss"])]
    rows += [("loss on held-out pairs before", summary["valid_loss_before"]), ("and after", summary["valid_loss"])]
    rows += [
        (f"{split}: {what.replace('_', ' ')}", f"{counts[what]:,}")
        for split, counts in summary["data"].items()
        for what in ("samples", "supervised_tokens")
    ]
    lines = [f"| {key} | {value} |" for key, value in rows if value is not None]
    return ["## Training", "\n".join(["| | |", "|---|---|", *lines])]


def _data(data: dict[str, list[str]]) -> list[str]:
    if not data:
        return []
    lines = [line for name, corpora in data.items() for line in (f"- {name}", *(f"  - {c}" for c in corpora))]
    terms = "The terms are what the corpora's publishers are known to state: check them before you share the model."
    return ["## Training data", "\n".join(lines), *([terms] if any(data.values()) else [])]
