"""Our half of bench/ingest.py: one turn of the readers and filters that prepare's tasks call, without Ray, on one core.

    python bench/kun_ray_side.py TURN.json [--readers]

Prints one JSON object: the seconds of every part of the filters, and the documents that they keep. With --readers it reads
what is named on each line of its input, and answers with the seconds.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from same_rows import same_rows

from kun_ray import cleaning
from kun_ray.corpora import CorpusConfig, list_files, read_file
from kun_ray.filters import CountTokens, FilterConfig, build_filters, filter_texts
from kun_ray.prepare import PrepareConfig, clean_block
from kun_ray.prompts import count_tokens, load_tokenizer
from kun_ray.schema import DOCUMENT, OK, doc_id, to_table
from kun_ray.signatures import signatures

BATCH = 1024
COMPARABLE = FilterConfig(max_markup_share=None, max_boilerplate_share=None, language=False)
"""Less what datatrove's chain has no counterpart for, or needs a download for (its language model)."""


def main() -> None:
    turn = json.loads(Path(sys.argv[1]).read_text())
    os.sched_setaffinity(0, {turn["core"]})
    if "--readers" in sys.argv:
        serve(turn)
        return
    corpus = CorpusConfig("bench", "jsonl", ["-"])
    config = PrepareConfig([corpus], "-", tokenizer=turn["tokenizer"])
    count = functools.partial(count_tokens, load_tokenizer(turn["tokenizer"], chat_template="chatml"))
    all_texts, texts = turn["all_texts"], turn["texts"]
    rows = [
        {"doc_id": doc_id("bench", "", number, text), "source": "bench", "text": text, "meta": "{}", "status": OK}
        for number, text in enumerate(all_texts)
    ]
    table = to_table(rows, DOCUMENT)
    list(clean_block(table.slice(0, 20), config))  # loads models and tables

    seconds = {}
    seconds["filters"] = timed(lambda: chain(all_texts, config.filters, None))
    seconds["filters, tokens"] = timed(lambda: chain(all_texts, config.filters, count))
    seconds["whole task"] = timed(lambda: list(clean_block(table, config)))
    seconds["comparable"] = timed(lambda: chain(texts, COMPARABLE, None))
    seconds["comparable, tokens"] = timed(lambda: chain(texts, COMPARABLE, count))
    seconds |= by_filter(texts, config, count)
    kept = chain(texts, config.filters, count)
    print(json.dumps({"seconds": seconds, "kept": [index for index, reason in enumerate(kept) if reason is None]}))


def serve(turn: dict[str, Any]) -> None:
    """Answers each line of the input, `read LAYOUT` or `same_rows LAYOUT`, with the seconds that it took."""
    for layout in turn["layouts"].values():
        check_same_rows(CorpusConfig(**layout["config"]))
    for line in sys.stdin:
        kind, _, name = line.strip().partition(" ")
        corpus = CorpusConfig(**turn["layouts"][name]["config"])
        work = functools.partial({"read": read, "same_rows": read_same_rows}[kind], corpus)
        found: list[int] = []
        print(timed(lambda: found.append(work())), flush=True)  # noqa: B023 - called at once
        assert found == [turn["layouts"][name]["rows"]], f"{line.strip()}: {found} rows"


def timed(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def read(corpus: CorpusConfig) -> int:
    """One file of a corpus, as its read task reads it. Returns its rows."""
    return sum(table.num_rows for file in list_files(corpus) for table in read_file(corpus, file))


def read_same_rows(corpus: CorpusConfig) -> int:
    """The same file by the reader that gives the same rows and does nothing else. Returns its rows."""
    return sum(
        table.num_rows for file in list_files(corpus) for table in same_rows(corpus.format, file.path, file.name)
    )


def check_same_rows(corpus: CorpusConfig) -> None:
    """Raises AssertionError unless both readers give the same table."""
    for file in list_files(corpus):
        ours = pa.concat_tables(read_file(corpus, file)).combine_chunks()
        assert ours.equals(pa.concat_tables(same_rows(corpus.format, file.path, file.name)).combine_chunks()), file.path


def chain(texts: Sequence[str], config: FilterConfig, count: CountTokens | None) -> list[str | None]:
    """The filters as a task runs them, batch by batch. Returns why each text is dropped."""
    reasons: list[str | None] = []
    for start in range(0, len(texts), BATCH):
        found = filter_texts(texts[start : start + BATCH], build_filters(config), config, count)
        reasons += [result.reason for result in found]
    return reasons


def by_filter(texts: Sequence[str], config: PrepareConfig, count: CountTokens) -> dict[str, float]:
    """Seconds of each filter by itself, every text through every filter, in the order in which they run."""
    strip: Callable[[str], Any] = cleaning.strip_markup
    cleaned = [cleaning.clean(strip(text)) for text in texts]
    seconds = {
        "strip markup": timed(lambda: [strip(text) for text in texts]),
        "clean": timed(lambda: [cleaning.clean(text) for text in texts]),
    }
    for judge in build_filters(config.filters):
        seconds[judge.func.__name__] = timed(lambda judge=judge: [judge(text) for text in cleaned])  # type: ignore[attr-defined, misc]
    seconds["personal data"] = timed(
        lambda: [cleaning.mask_personal(text, cleaning.find_personal(text)) for text in cleaned]
    )
    batches = [cleaned[start : start + BATCH] for start in range(0, len(cleaned), BATCH)]
    seconds["tokens"] = timed(lambda: [count(batch) for batch in batches])
    seconds["signatures"] = timed(lambda: [signatures(batch, config.dedup) for batch in batches])
    return {f"filter: {name}": elapsed for name, elapsed in seconds.items()}


if __name__ == "__main__":
    main()
