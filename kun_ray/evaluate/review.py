"""Blind human review: one offline HTML page with N items, and reviewers' files read back into rates and agreement.

jobs/review.py calls `review`. The page holds texts in random order and nothing else; which model wrote which stands in
key.json beside it, which reviewers do not get. The page's own files are review.html, review.css and review.js.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import random
from importlib import resources
from typing import Any

from omegaconf import MISSING

from kun_ray import store
from kun_ray.config import ConfigError, require, to_dict
from kun_ray.evaluate import verdicts
from kun_ray.evaluate.rows import Pair, paired, read_pairs, source_names

PAGE = "review.html"
KEY = "key.json"


@dataclasses.dataclass
class CriterionConfig:
    """One criterion of a single instruction and answer, rated 1 to 3."""

    name: str = MISSING
    """Its name on the page."""
    question: str = MISSING
    """What the reviewer is to ask himself."""


def _kun() -> dict[str, CriterionConfig]:
    return {
        "clarity": CriterionConfig("清晰", "指令的意思清楚吗，读一遍就知道要做什么？"),
        "feasibility": CriterionConfig("可行", "只用文字能完成这条指令吗？"),
        "practicality": CriterionConfig("实用", "现实中会有人这样问吗，答了有用吗？"),
        "agreement": CriterionConfig("相符", "回答是不是针对指令，合乎它的要求？"),
    }


@dataclasses.dataclass
class ReviewConfig:
    """jobs/review.py: writes a page for reviewers, or reads their files."""

    output: str = MISSING
    """Folder of the page and its key, and of the results."""
    answers: list[str] = dataclasses.field(default_factory=list)
    """Two folders or .jsonl files with answers to the same instructions, to compare; or one, whose pairs are rated by criteria."""
    names: list[str] = dataclasses.field(default_factory=list)
    """Names in the results; empty takes those of the folders."""
    num_items: int = 100
    """Items on the page, drawn at random. Two answers that are the same are left out and counted."""
    seed: int = 0
    """Draws the items, their order and their sides."""
    criteria: dict[str, CriterionConfig] = dataclasses.field(default_factory=_kun)
    """What a single pair is rated by: Kun's criteria (arXiv 2401.06477)."""
    results: list[str] = dataclasses.field(default_factory=list)
    """Files that reviewers have exported. Given: they are read and nothing is written but results.json."""

    def __post_init__(self) -> None:
        require(
            bool(self.results) or len(self.answers) in (1, 2),
            "answers: give one folder to rate, or two to compare; or results=[…] to read reviewers' files",
        )
        require(self.num_items >= 1, "num_items must be at least 1")
        require(len(self.criteria) > 0, "criteria: give at least one")


def review(config: ReviewConfig) -> dict[str, Any]:
    """Writes the page, or reads reviewers' files; returns the key or the results.

    Raises:
        ConfigError: the answers cannot be used, or have no instruction in common.
        KunError: the output holds another review, or a reviewer's file belongs to another one.
    """
    return verdicts.read_back(store.Folder(config.output), config.results) if config.results else make(config)


def make(config: ReviewConfig) -> dict[str, Any]:
    """Writes review.html and key.json; the same command writes the same files again."""
    names = source_names(config.answers, config.names)
    items, same = _draw(config)
    key: dict[str, Any] = {"mode": "pairs" if len(names) == 2 else "criteria", "names": names, "same": same}
    if len(names) == 1:
        key["criteria"] = {id: one.name for id, one in config.criteria.items()}
    rng = random.Random(f"{config.seed} sides")
    shown, key["items"] = [], {}
    for number, pair in enumerate(items, 1):
        order = list(range(len(names)))
        rng.shuffle(order)
        shown.append({"id": f"{number}", "instruction": pair.instruction, "answers": [pair.answers[i] for i in order]})
        key["items"][f"{number}"] = {"row": pair.id, "sides": [names[i] for i in order]}
    key["review"] = hashlib.blake2b(json.dumps([key, shown]).encode(), digest_size=16).hexdigest()
    fingerprint = {"answers": key["review"], "names": names, "seed": config.seed}
    folder = store.open_stage(config.output, fingerprint, to_dict(config))
    data = {"review": key["review"], "mode": key["mode"], "items": shown}
    if len(names) == 1:
        data["criteria"] = [
            {"id": id, "name": one.name, "question": one.question} for id, one in config.criteria.items()
        ]
    folder.write_json(KEY, key)
    folder.write_text(PAGE, page(data))
    print(f"{len(items)} items" + (f" ({same} pairs with the same answer left out)" if same else ""))
    print(f"give reviewers {config.output}/{PAGE}, one file that opens offline; keep {KEY} to yourself")
    print(f"then: python jobs/review.py output={config.output} results=[their files]")
    return key


def page(data: dict[str, Any]) -> str:
    """The HTML page. No text of an item can end its script element or run: `<`, `>` and `&` are escaped, scripts are hashed."""
    files = resources.files("kun_ray.evaluate")
    style, script = ((files / name).read_text(encoding="utf-8") for name in ("review.css", "review.js"))
    encoded = json.dumps(data, ensure_ascii=False)
    for letter in "<>&\u2028\u2029":
        encoded = encoded.replace(letter, f"\\u{ord(letter):04x}")
    encoded = encoded.encode("utf-8", "replace").decode()
    pieces = {
        "style_hash": _sha256(style),
        "script_hash": _sha256(script),
        "style": style,
        "script": script,
        "data": encoded,
    }
    text = (files / PAGE).read_text(encoding="utf-8")
    head, *rest = text.split("⟦")  # one pass, so that an item's text is never taken for a place to fill
    return head + "".join(pieces[part.partition("⟧")[0]] + part.partition("⟧")[2] for part in rest)


def _draw(config: ReviewConfig) -> tuple[list[Pair], int]:
    if len(config.answers) == 2:
        pairs, same = paired(config.answers), 0
        different = [pair for pair in pairs if pair.answers[0].strip() != pair.answers[1].strip()]
        same = len(pairs) - len(different)
    else:
        different = [
            Pair(id, instruction, (answer,)) for instruction, (id, answer) in read_pairs(config.answers[0]).items()
        ]
        same = 0
    if not different:
        raise ConfigError(
            f"answers: {' and '.join(config.answers)} hold nothing to review"
            + (f": {same} same answers" if same else "")
        )
    different.sort(key=lambda pair: pair.instruction)  # the draw does not depend on the order of files
    rng = random.Random(f"{config.seed} items")
    return rng.sample(different, min(config.num_items, len(different))), same


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
