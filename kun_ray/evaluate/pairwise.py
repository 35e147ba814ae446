"""Two models' answers to the same instructions before a judge model: each pair twice, in both orders; win rate with interval.

jobs/pairwise.py calls `pairwise`. A verdict is the step `choose`: first, second or equal, in one prefill, through generate. A
judge that favours a place contradicts itself when the order is turned round; such a pair is a tie.
"""

from __future__ import annotations

import collections
import dataclasses
import random
import re
from typing import Any

from omegaconf import MISSING

from kun_ray import generate, store
from kun_ray.choose import ChooseConfig
from kun_ray.config import RayConfig, require
from kun_ray.evaluate import asking
from kun_ray.evaluate.rows import Pair, paired, source_names
from kun_ray.evaluate.verdicts import describe_win, win_rate
from kun_ray.formats import digest, json_line
from kun_ray.generate import GenerateConfig
from kun_ray.pool import PoolConfig
from kun_ray.prompts import count_tokens
from kun_ray.schema import FAILED, OK, doc_id

FIELDS = ("instruction", "first", "second")
FIRST, SECOND, EQUAL = range(3)
WORTH = {FIRST: 0.0, SECOND: 1.0, EQUAL: 0.5}
"""What a verdict is worth to the answer in the second place."""


@dataclasses.dataclass
class PairwiseConfig:
    """jobs/pairwise.py: a judge model compares two models' answers."""

    answers: list[str] = MISSING
    """Two folders (generate stages or exports) or .jsonl files with answers to the same instructions. The second is
    measured against the first."""
    names: list[str] = dataclasses.field(default_factory=list)
    """Names in the results; empty takes those of the folders."""
    output: str = MISSING
    """Folder of the verdicts and results. The same command continues a run that was stopped."""
    judge: PoolConfig = dataclasses.field(default_factory=PoolConfig)
    """The judge model and how its engines run, as a pool of generate; `steps` stays empty."""
    prompt: str = MISSING
    """What the judge is asked; {instruction}, {first} and {second} stand for the pair's own."""
    options: list[str] = dataclasses.field(default_factory=lambda: ["A", "B", "C"])
    """The three verdicts: the first is better, the second is better, they are equal."""
    reply_prefix: str = "结论："
    """How the judge's reply begins, up to the verdict."""
    num_pairs: int | None = None
    """Most pairs to judge, drawn at random; null judges all."""
    seed: int = 0
    """Draws the pairs."""
    rows_per_file: int = 512
    """Rows of one output file."""
    stop_grace_s: float = 120.0
    """After Ctrl-C or SIGTERM, seconds for the rows in flight to finish."""
    ray: RayConfig = dataclasses.field(default_factory=RayConfig)
    """The Ray cluster."""

    def __post_init__(self) -> None:
        require(len(self.answers) == 2, "answers: give two folders, as answers=[A,B]")
        require(len(self.options) == 3, "options: give three: first better, second better, equal")
        for name in FIELDS:
            require(f"{{{name}}}" in self.prompt, f"prompt must name {{{name}}}")
        require(not self.judge.steps, "judge.steps stays empty: pairwise runs a step of its own")


def pairwise(config: PairwiseConfig) -> dict[str, Any]:
    """Judges all pairs and returns the results, which are also in results.json; pairs.jsonl has each pair's verdict.

    Raises:
        ConfigError: before any engine starts, when the answers or the judge cannot be used.
        KunError: the output holds another run's data, or counts do not add up.
    """
    names = source_names(config.answers, config.names)
    pairs = paired(config.answers)
    if config.num_pairs is not None and config.num_pairs < len(pairs):
        pairs = random.Random(config.seed).sample(sorted(pairs, key=lambda pair: pair.instruction), config.num_pairs)
    different = [pair for pair in pairs if pair.answers[0].strip() != pair.answers[1].strip()]
    print(
        f"{len(pairs):,} pairs, {len(pairs) - len(different):,} of them the same answer: ties without a judge",
        flush=True,
    )
    folder = store.Folder(config.output)
    verdicts: dict[tuple[str, str], str | None] = {}
    if different:
        run = _prepare(config, pairs)
        generate.generate(run, "judge.accelerator")
        table = store.require_complete(run.output).dataset().to_table(columns=["question_id", "subject", "verdict"])
        verdicts = {(row["question_id"], row["subject"]): row["verdict"] for row in table.to_pylist()}
    else:
        folder.filesystem.create_dir(folder.path, recursive=True)
    found = combine(pairs, verdicts, names, config.options)
    folder.write_text("pairs.jsonl", b"".join(json_line(line) for line in found.pop("lines")).decode())
    folder.write_json("results.json", found)
    print(describe_win(names[1], names[0], found))
    print(describe_judge(found))
    print(f"written to {config.output}: results.json and pairs.jsonl")
    return found


def describe_judge(found: dict[str, Any]) -> str:
    """How far the judge can be trusted: one line, and a warning about one that never decided."""
    said = (
        f"the judge said the same in both orders for {found['consistent']:,} of {found['judged']:,} pairs, and chose the first "
        f"place in {found['first_place']:,} of {found['decided']:,} decided verdicts; {found['unjudged']:,} pairs have no verdict"
    )
    if found["judged"] and not found["decided"]:
        said += "\nwarning: the judge called every pair equal, which says nothing of the models; try another judge or prompt"
    return said


def combine(
    pairs: list[Pair], verdicts: dict[tuple[str, str], str | None], names: list[str], options: list[str]
) -> dict[str, Any]:
    """Two verdicts per pair → win rate of the second model.

    Args:
        pairs: everything that was compared.
        verdicts: (pair's number, order) → option; order `01` shows the first model's answer first, `10` the second's.
        names: of both models.
        options: first better, second better, equal.
    """
    counts: collections.Counter[str] = collections.Counter()
    scores: list[float] = []
    lines: list[dict[str, Any]] = []
    for number, pair in enumerate(pairs):
        score: float | None = 0.5
        said = [verdicts.get((str(number), order)) for order in ("01", "10")]
        if pair.answers[0].strip() != pair.answers[1].strip():
            places = [options.index(one) for one in said if one in options]
            decided = [place for place in places if place != EQUAL]
            counts.update(decided=len(decided), first_place=decided.count(FIRST), unjudged=len(places) < 2)
            score = None
            if len(places) == 2:
                winners = WORTH[places[0]], 1 - WORTH[places[1]]
                score = winners[0] if winners[0] == winners[1] else 0.5
                counts.update(judged=1, consistent=winners[0] == winners[1])
        if score is not None:
            scores.append(score)
        winner = {1.0: names[1], 0.0: names[0], 0.5: "tie", None: None}[score]
        lines.append({"id": pair.id, "instruction": pair.instruction, "winner": winner, "verdicts": said})
    by_name = ("judged", "unjudged", "consistent", "decided", "first_place")
    figures = {name: counts[name] for name in by_name}
    return {"first": names[0], "second": names[1], **win_rate(scores), **figures, "lines": lines}


def fill(prompt: str, pair: Pair, turned: bool) -> str:
    """The judge's text for one pair; `turned` shows the second model's answer first. Braces in answers stay what they are."""
    first, second = reversed(pair.answers) if turned else pair.answers
    values = {"instruction": pair.instruction, "first": first, "second": second}
    return re.sub(r"\{(instruction|first|second)\}", lambda found: values[found.group(1)], prompt)


def _prepare(config: PairwiseConfig, pairs: list[Pair]) -> GenerateConfig:
    """Both orders of every pair whose answers differ, as a checked generate run. Raises ConfigError."""
    pool = dataclasses.replace(config.judge, steps=["choose"])
    choose = ChooseConfig(options=config.options, reply_prefix=config.reply_prefix)
    asked = asking.open_model(pool, choose, "judge.model")
    rows: list[asking.Row] = []
    for number, pair in enumerate(pairs):
        if pair.answers[0].strip() != pair.answers[1].strip():
            for order in ("01", "10"):
                text = fill(config.prompt, pair, turned=order == "10")
                row: asking.Row = {
                    "doc_id": doc_id("pairwise", order, number, text),
                    "source": "pairwise",
                    "meta": "{}",
                }
                rows.append({**row, "subject": order, "question_id": str(number), "text": text, "status": OK})
    for row, tokens in zip(rows, count_tokens(asked.tokenizer, [str(row["text"]) for row in rows]), strict=True):
        row["tokens"] = tokens
        if tokens > asked.budget:
            row |= {"text": None, "status": FAILED, "reason": "over_context"}
    texts = digest([row["text"] for row in rows])
    return asking.prepare_run(asked, rows, store.Folder(config.output), {"texts": texts}, config)
