"""The rival's half of bench/ingest.py: one turn of datatrove's readers and filters. Runs in datatrove's own environment.

    build/venv-datatrove/bin/python bench/datatrove_side.py TURN.json [--readers]

As kun_ray_side.py: with --readers it answers lines, else it prints one JSON object: the seconds of every part, the
documents that the filters keep, and versions. The filters are
FineWeb-2's for Chinese, with its published thresholds; `characters` is the same chain with characters for words, since
most of the time of the first goes into segmentation (jieba through spaCy).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
from datatrove.pipeline.readers import JsonlReader, ParquetReader
from datatrove.pipeline.tokens import TokensCounter
from datatrove.utils.text import split_into_words
from datatrove.utils.word_tokenizers import WordTokenizer
from loguru import logger

CHINESE = "cmn_Hani"
REPETITION = {  # FineWeb-2, configs/cmn_Hani.yml and its pipeline
    "dup_line_frac": 0.287,
    "dup_para_frac": 0,
    "dup_line_char_frac": 0,
    "dup_para_char_frac": 0,
    "top_n_grams": [(2, 0.256), (3, 0.201), (4, 0.171)],
    "dup_n_grams": [(5, 0.198), (6, 0.182), (7, 0.167), (8, 0.154), (9, 0.14), (10, 0.127)],
}
QUALITY = {
    "min_avg_word_length": 1,
    "max_avg_word_length": 5,
    "max_non_alpha_words_ratio": 0.735,
    "min_stop_words": 2,
    "stop_words": list("的年在月是和日了於·為有被人中为他與後也而由"),
}


class Characters(WordTokenizer):
    """Every character is a word: the least that any segmentation can cost."""

    def word_tokenize(self, text: str) -> list[str]:
        return [char for char in text if not char.isspace()]

    def sent_tokenize(self, text: str) -> list[str]:
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]


def main() -> None:
    logger.remove()
    turn = json.loads(Path(sys.argv[1]).read_text())
    os.sched_setaffinity(0, {turn["core"]})
    if "--readers" in sys.argv:
        serve(turn)
        return
    chain(turn, turn["texts"][:20], CHINESE, tokens=True)  # loads dictionaries and the tokenizer
    seconds: dict[str, float] = {}
    for name, words in (("words", CHINESE), ("characters", Characters())):
        elapsed, kept, _ = chain(turn, turn["texts"], words, tokens=False)
        seconds[f"chain, {name}"] = elapsed
        seconds[f"chain, {name}, tokens"], _, parts = chain(turn, turn["texts"], words, tokens=True)
        if words == CHINESE:
            result = {"kept": kept, "parts": parts}
    started = time.process_time()
    for text in turn["texts"]:
        split_into_words(text, CHINESE)
    seconds["segmentation alone"] = time.process_time() - started
    packages = ("datatrove", "spacy", "jieba", "ftfy", "tokenizers", "orjson", "pyarrow")
    versions = {name: importlib.metadata.version(name) for name in packages}
    print(json.dumps({"seconds": seconds, **result, "versions": versions}))


def serve(turn: dict[str, Any]) -> None:
    """Answers each line of the input, `read LAYOUT`, with the seconds that it took."""
    for line in sys.stdin:
        print(read(**turn["readers"][line.strip().partition(" ")[2]]), flush=True)


def read(folder: str, pattern: str, text_field: str, rows: int) -> float:
    """Seconds to read the files of one layout."""
    kind = ParquetReader if pattern.endswith(".parquet") else JsonlReader
    reader = kind(folder, glob_pattern=pattern, text_key=text_field)
    started = time.process_time()
    num_rows = sum(1 for _ in reader.run())
    elapsed = time.process_time() - started
    assert num_rows == rows, f"{pattern}: {num_rows} of {rows} rows"
    return elapsed


def chain(
    turn: dict[str, Any], texts: list[str], words: Any, tokens: bool
) -> tuple[float, list[int], dict[str, float]]:
    """Seconds of the whole chain, the numbers of the documents kept, and seconds by datatrove's own clocks."""
    steps: list[Any] = [
        FTFYFormatter(),
        GopherRepetitionFilter(language=words, **REPETITION),
        GopherQualityFilter(language=words, **QUALITY),
        PIIFormatter(),
        *([TokensCounter(f"{turn['tokenizer']}/tokenizer.json", batch_size=1024)] if tokens else []),
    ]
    if tokens:
        deque(steps[-1].run(iter([Document(text="", id="")])))  # loads the tokenizer
    documents: Any = (Document(text=text, id=str(number)) for number, text in enumerate(texts))
    for step in steps:
        documents = step.run(documents)
    started = time.process_time()
    kept = [int(document.id) for document in documents]
    elapsed = time.process_time() - started
    return elapsed, kept, {step.name: round(step.stats.time_stats.total, 4) for step in steps}


if __name__ == "__main__":
    main()
