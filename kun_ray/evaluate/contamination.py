"""Do questions of an examination stand in the training data? n-gram overlap after NFKC, streaming, offending rows listed.

choice.evaluate calls it. Units are Han characters and whole words of other scripts, so no tokenizer is needed and the answer
is the same for every model. 13 units are about 8 Chinese words: GPT-3 (arXiv 2005.14165, appendix C) took 13 English words,
later work 8 to 13. Shorter runs are phrases that texts on one subject share; longer ones miss a question with one word changed.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import unicodedata
import zlib
from typing import Any, Final

import orjson

from kun_ray import store
from kun_ray.config import ConfigError, require, without_credentials
from kun_ray.evaluate.benchmarks import Benchmark, unify_radicals
from kun_ray.evaluate.rows import read_rows
from kun_ray.inspection import FOLDER, ROWS

_HAN: Final = r"\u3400-\u9fff\U00020000-\U0003ffff"
_UNIT: Final = re.compile(rf"[{_HAN}]|[^\W_{_HAN}]+")
_LABEL: Final = re.compile(r"(?:题目|选项|答案|解析)\s*:")
"""What examinations write before a question's parts, after NFKC."""
_IS_HAN: Final = re.compile(f"[{_HAN}]")


@dataclasses.dataclass
class ContaminationConfig:
    """Looks for the questions of the suites in training data."""

    data: str | None = None
    """Folder of an export or of a generate stage; null does not look."""
    ngram: int = 13
    """Units (Han characters, or words of other scripts) in a row that must be the same."""
    max_shared: int = 10
    """n-grams that more questions than this have in common are phrases of examinations, and are left out (GPT-3 does so)."""
    columns: list[str] = dataclasses.field(default_factory=lambda: ["instruction", "input", "output", "answer"])
    """Columns that a model is trained on; those that the data do not have are passed over. `text` if it is the reply."""

    def __post_init__(self) -> None:
        require(self.ngram >= 4, "contamination.ngram must be at least 4")
        require(self.max_shared >= 1, "contamination.max_shared must be at least 1")


@dataclasses.dataclass(frozen=True)
class Index:
    """Every n-gram of the questions that tells something."""

    ngram: int
    questions: list[tuple[str, str, str]]
    """(suite, subject, question id) by number."""
    sizes: list[int]
    """Usable n-grams of each question; 0: it is too short, or holds common phrases alone."""
    grams: dict[str, tuple[int, ...]]
    """n-gram → numbers of the questions that hold it."""


def units(text: str) -> str:
    """`text` after NFKC, in small letters, without blanks and punctuation, one character per unit.

    A word of another script becomes one private character, by a hash; a wrong match would need a whole n-gram of them.
    Labels such as `选项：` and single Latin letters are left out: they stand before a question's parts, in the data or here.
    """
    plain = unify_radicals(unicodedata.normalize("NFKC", text)).lower()
    return "".join(
        unit if _IS_HAN.match(unit) else chr(0xF0000 + zlib.crc32(unit.encode()) % 0x1FFFE)
        for unit in _UNIT.findall(_LABEL.sub(" ", plain))
        if not "a" <= unit <= "z" or len(unit) > 1
    )


def build_index(suites: list[Benchmark], ngram: int, max_shared: int) -> Index:
    """Indexes the stem of each question together with its options, since many stems are shorter than an n-gram."""
    questions: list[tuple[str, str, str]] = []
    holders: dict[str, list[int]] = collections.defaultdict(list)
    for suite in suites:
        for question in suite.questions:
            number = len(questions)
            questions.append((suite.name, question.subject, question.id))
            letters = units("\n".join((question.stem, *question.options)))
            for gram in {letters[i : i + ngram] for i in range(len(letters) - ngram + 1)}:
                holders[gram].append(number)
    grams = {gram: tuple(numbers) for gram, numbers in holders.items() if len(numbers) <= max_shared}
    sizes = collections.Counter(number for numbers in grams.values() for number in numbers)
    return Index(ngram, questions, [sizes[number] for number in range(len(questions))], grams)


def matches(index: Index, text: str) -> dict[int, tuple[float, str]]:
    """Questions of which a text holds an n-gram → (share of the question's n-grams that it holds, the first one)."""
    letters, n, grams = units(text), index.ngram, index.grams
    found: dict[int, set[str]] = collections.defaultdict(set)
    for start in range(len(letters) - n + 1):
        gram = letters[start : start + n]
        if gram in grams:
            for number in grams[gram]:
                found[number].add(gram)
    return {
        number: (len(held) / index.sizes[number], min(held, key=letters.find)) for number, held in sorted(found.items())
    }


def require_text(config: ContaminationConfig) -> None:
    """Raises ConfigError when the data cannot be read as such, or no row has text in any of the columns; reads up to the
    first that has."""
    assert config.data is not None
    if not any(row.get(name) for row in read_rows(config.data) for name in config.columns):
        where = without_credentials(config.data)
        raise ConfigError(f"contamination.data: {where} has no row with text in {', '.join(config.columns)}")


def check(config: ContaminationConfig, suites: list[Benchmark], output: store.Folder) -> dict[str, Any]:
    """Streams the data, which `require_text` has passed, and writes `contamination/rows.jsonl` and `summary.json` below `output`.

    Returns:
        `rows`, `rows_with_questions`, and for each suite `questions`, `unusable` (too short), `found`, `nearly_whole` (at
        least 80 % of the n-grams in one row).
    Raises:
        KunError: a line is no JSON object.
    """
    assert config.data is not None
    index = build_index(suites, config.ngram, config.max_shared)
    best: dict[int, float] = {}
    num_rows = num_hit = 0
    folder = output.below(FOLDER)
    folder.filesystem.create_dir(folder.path, recursive=True)
    unfinished = folder.child(f"{ROWS}.tmp")
    with folder.filesystem.open_output_stream(unfinished) as stream:
        for row in read_rows(config.data):
            texts = [row[name] for name in config.columns if row.get(name)]
            num_rows += 1
            hits = matches(index, "\n".join(texts))
            num_hit += bool(hits)
            for number, (share, gram) in hits.items():
                best[number] = max(best.get(number, 0.0), share)
                suite, subject, question = index.questions[number]
                line = {
                    "row": row["id"],
                    "source": row.get("source"),
                    "suite": suite,
                    "subject": subject,
                    "question": question,
                }
                stream.write(orjson.dumps({**line, "share": round(share, 3), "match": _readable(gram)}) + b"\n")
    folder.filesystem.move(unfinished, folder.child(ROWS))
    by_suite: dict[str, collections.Counter[str]] = {suite.name: collections.Counter() for suite in suites}
    for number, (suite, _, _) in enumerate(index.questions):
        share = best.get(number, 0.0)
        by_suite[suite].update(
            questions=1, unusable=index.sizes[number] == 0, found=share > 0, nearly_whole=share >= 0.8
        )
    summary = {
        "digests": {suite.name: suite.digest() for suite in suites},
        "data": without_credentials(config.data),
        "ngram": config.ngram,
        "rows": num_rows,
        "rows_with_questions": num_hit,
        "suites": {name: dict(counts) for name, counts in by_suite.items()},
    }
    folder.write_json(store.SUMMARY, summary)
    show(summary, f"{output.uri}/{FOLDER}/{ROWS}")
    return summary


def show(summary: dict[str, Any], rows: str) -> None:
    """Prints what was found."""
    print(
        f"{summary['rows_with_questions']:,} of {summary['rows']:,} rows share {summary['ngram']} units in a row with a question"
    )
    for name, counts in summary["suites"].items():
        print(
            f"  {name}: {counts['found']:,} of {counts['questions']:,} questions found, {counts['nearly_whole']:,} of them "
            f"nearly whole; {counts['unusable']:,} are too short to look for"
        )
    if summary["rows_with_questions"]:
        print(f"  every such row, with the question and the shared words: {rows}")


def dirty_questions(
    output: store.Folder, suites: list[Benchmark]
) -> tuple[dict[str, Any] | None, set[tuple[str, str, str]]]:
    """What the last check below `output` has found of these questions; it may be one of another run, on other data.

    Returns:
        Its summary, and (suite, subject, question id) of each question found; None where there was no check of these suites.
    """
    folder = output.below(FOLDER)
    if not (folder.exists(ROWS) and folder.exists(store.SUMMARY)):
        return None, set()
    summary = folder.read_json(store.SUMMARY)
    checked = summary.get("digests", {})
    same = {suite.name for suite in suites if checked.get(suite.name) == suite.digest()}
    if others := sorted({suite.name for suite in suites} & set(summary["suites"]) - same):
        print(f"{folder.uri}: its check was of other questions of {', '.join(others)}, and does not count for them")
    if not same:
        return None, set()
    with folder.filesystem.open_input_stream(folder.child(ROWS)) as stream:
        lines = [orjson.loads(line) for line in stream.read().splitlines()]
    return summary, {(line["suite"], line["subject"], line["question"]) for line in lines if line["suite"] in same}


def _readable(gram: str) -> str:
    return re.sub(r"[\U000f0000-\U0010ffff]+", "…", gram)
