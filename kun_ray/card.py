"""What stands beside exported data: the data card (README.md) and LLaMA-Factory's dataset_info.json.

`export.export` calls it with the counts it has proved. Everything here turns values into text; nothing touches a file.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, Final

import yaml

from kun_ray.changes import PREPARE, flatten, stage_of


@dataclasses.dataclass
class SourceConfig:
    """How the data card names one source."""

    name: str | None = None
    """Full name of the corpus; null takes the known one of WuDaoCorpora, WanJuan or SkyPile, else the source's word."""
    licence: str | None = None
    """Terms that you use the corpus under, in a sentence; null states what its publisher says, for you to check."""


KNOWN_SOURCES: Final = {
    "wudao": SourceConfig(
        "WuDaoCorpora 2.0 base (BAAI)",
        "downloaded under BAAI's user agreement, which the BigScience catalogue lists as non-commercial",
    ),
    "wanjuan": SourceConfig(
        "WanJuan 1.0 (OpenDataLab, Shanghai AI Laboratory)",
        "CC BY 4.0 as a whole; its authors say that some subsets may carry other terms",
    ),
    "skypile": SourceConfig(
        "SkyPile-150B (Skywork)",
        "Skywork Community License, which allows commercial use on conditions; may hold personal data",
    ),
}
"""What the publishers' repositories and cards state; for WuDao, bigscience-workshop/data_tooling#199 on GitHub."""

NOT_STATED: Final = "not stated: fill it in"
"""Terms of a source that nobody has given; such an export is not published to everybody."""

_CHECK_TERMS: Final = (
    "The terms are what the publishers are known to state, not legal advice. **Check each corpus's current licence "
    "before you share or sell this data or a model trained on it.** Web text can hold personal data, errors and bias, "
    "and so can what is made of it."
)
_SIZES: Final = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
)


def source_of(source: str, given: dict[str, SourceConfig]) -> SourceConfig:
    """The name and licence of a source: as configured, else as known for the corpus whose name it contains."""
    known = next((entry for word, entry in KNOWN_SOURCES.items() if word in source.lower()), SourceConfig())
    own = given.get(source, SourceConfig())
    return SourceConfig(own.name or known.name or source, own.licence or known.licence or NOT_STATED)


def dataset_info(dataset_name: str, files: list[dict[str, Any]]) -> dict[str, Any]:
    """LLaMA-Factory's registry: set `dataset_dir` to the export and `dataset` to one of these keys.

    Args:
        files: the export's data files, each with `format`, `split` and `path`.
    """
    entries: dict[str, Any] = {}
    for file in files:
        key = f"{dataset_name}_{file['format']}" + ("" if file["split"] == "train" else f"_{file['split']}")
        if file["format"] == "alpaca":
            columns = {"prompt": "instruction", "query": "input", "response": "output"}
            entries[key] = {"file_name": file["path"], "formatting": "alpaca", "columns": columns}
        elif file["format"] == "sharegpt":
            entries[key] = {
                "file_name": file["path"],
                "formatting": "sharegpt",
                "columns": {"messages": "conversations"},
                "tags": {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"},
            }
    return entries


def data_card(
    dataset_name: str,
    licence: str,
    given: dict[str, SourceConfig],
    selection: dict[str, Any],
    summary: dict[str, Any],
    stages: list[dict[str, Any]],
) -> str:
    """README.md of an export: a Hugging Face dataset card whose every figure comes from the proved summary.

    Args:
        given: names and licences per source, as configured.
        selection: the settings that decided which rows were taken.
        summary: export's summary.json: counts, sources, lengths, files.
        stages: the fingerprints of the generate stage and of those before it, as far as they are known, the last one first.
    """
    names = {source: source_of(source, given) for source in summary["sources"]}
    sections = [
        _header(dataset_name, licence, summary["train"] + summary["valid"], summary["files"]),
        _opening(dataset_name, summary),
        _usage(dataset_name, summary["files"]),
        "## Sources",
        _table(
            ("source", "corpus", "terms", "rows read", "exported"),
            (
                (s, names[s].name, names[s].licence, f"{c['rows']:,}", f"{c['exported']:,}")
                for s, c in summary["sources"].items()
            ),
        ),
        _CHECK_TERMS,
        "## Counts\n\nEvery row read is either exported or named here with the reason.",
        _table(("outcome", "rows"), ((outcome, f"{count:,}") for outcome, count in _outcomes(summary))),
        "Status and reason of the rows when generation ended:",
        _table(("status", "reason", "rows"), _reasons(summary)),
        "## Selection",
        _table(("setting", "value"), _settings(selection)),
        *_personal_data(summary),
        *_contamination(summary["contamination"]),
        "## Lengths of exported rows, in characters",
        _table(
            ("field", "mean", "5 %", "median", "95 %", "longest"),
            (
                (field, *(f"{n[key]:,}" for key in ("mean", "p5", "p50", "p95", "max")))
                for field, n in summary["lengths"].items()
            ),
        ),
        *_generation(stages, summary["generate_digest"]),
        "## Checksums",
        _table(
            ("file", "rows", "bytes", "sha256"),
            ((f["path"], f"{f['rows']:,}", f"{f['bytes']:,}", f"`{f['sha256']}`") for f in summary["files"]),
        ),
    ]
    return "\n\n".join(sections) + "\n"


def size_category(num_rows: int) -> str:
    """The Hugging Face `size_categories` value of a dataset."""
    return next((name for bound, name in _SIZES if num_rows < bound), "n>1B")


def _loadable(files: list[dict[str, Any]]) -> list[str]:
    """The formats that can be configs of one dataset: `datasets` 5.2 reads all of them with the first one's reader."""
    names = list(dict.fromkeys(file["format"] for file in files))
    return [name for name in names if name != "parquet"] or names


def _header(dataset_name: str, licence: str, num_rows: int, files: list[dict[str, Any]]) -> str:
    configs = [
        {
            "config_name": name,
            "data_files": [
                {"split": {"valid": "validation"}.get(file["split"], file["split"]), "path": file["path"]}
                for file in files
                if file["format"] == name
            ],
            **({"default": True} if position == 0 else {}),
        }
        for position, name in enumerate(_loadable(files))
    ]
    header = {
        "pretty_name": dataset_name,
        "language": ["zh"],
        "license": licence,
        "task_categories": ["text-generation"],
        "size_categories": [size_category(num_rows)],
        "tags": ["instruction-tuning", "synthetic", "kun_ray"],
        "configs": configs,
    }
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---"


def _opening(dataset_name: str, summary: dict[str, Any]) -> str:
    train, valid = summary["train"], summary["valid"]
    return (
        f"# {dataset_name}\n\n{train + valid:,} Chinese instruction/response pairs ({train:,} train, {valid:,} valid), "
        "made from web text with kun_ray by instruction back-translation (Kun, arXiv 2401.06477; Humpback, arXiv "
        "2308.06259). Models wrote the instructions; no person has checked each pair. Rows keep the order of the "
        "corpora: shuffle before training."
    )


def _outcomes(summary: dict[str, Any]) -> Iterator[tuple[str, int]]:
    yield "read", summary["rows"]
    yield "exported: train", summary["train"]
    yield "exported: valid", summary["valid"]
    for reason, count in summary["not_selected"].items():
        yield f"not selected: {reason}", count


def _reasons(summary: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for status in ("ok", "rejected", "failed"):
        yield status, "", f"{summary[status]:,}"
        for reason, count in summary["reasons"].items():
            if reason.startswith(f"{status}/"):
                yield "", reason.removeprefix(f"{status}/"), f"{count:,}"


def _personal_data(summary: dict[str, Any]) -> Iterator[str]:
    """What prepare did about personal data, by kind; nothing is said to be absent that was not looked for."""
    actions, masked = summary["personal_data"]["actions"], summary["personal_data"]["masked"]
    yield "## Personal data and contamination"
    words = {"mask": "masked", "reject": "document rejected", "keep": "kept"}
    rows: list[tuple[str, ...]] = []
    for kind, num_masked in masked.items():
        rejected = summary["reasons"].get(f"rejected/pii_{kind}", 0)
        action = actions[kind] if actions else None
        checked = bool(action != "keep" and actions) or rejected or num_masked
        counts = (f"{rejected:,}", f"{num_masked:,}") if checked else ("not checked", "not checked")
        rows.append((kind, words.get(action or "", "not known"), *counts))
    yield _table(("in documents", "what was done", "documents rejected", "exported rows with it masked"), rows)
    yield (
        ("" if actions else "prepare's folder is no longer there, so what it looked for is not known. ")
        + "Patterns find these kinds, not names or addresses. What models wrote was not searched."
    )


def _contamination(found: dict[str, Any] | None) -> Iterator[str]:
    """In how many rows questions of examinations stand."""
    if found is None:
        yield "Questions of examinations in these rows: not checked."
        return
    yield (
        f"Of the {found['rows']:,} rows that were ok, {found['rows_with_questions']:,} share {found['ngram']} characters or words "
        f"in a row with a question of an examination; {found['exported']:,} of them are in this export."
    )
    keys = ("questions", "unusable", "found", "nearly_whole")
    yield _table(
        ("examination", "questions", "too short to look for", "found in ok rows", "of these nearly whole"),
        ((name, *(f"{counts[key]:,}" for key in keys)) for name, counts in found["suites"].items()),
    )


def _usage(dataset_name: str, files: list[dict[str, Any]]) -> str:
    folder = "path/to/this/folder"
    configs = _loadable(files)
    others = dict.fromkeys(file["format"] for file in files if file["format"] not in configs)
    lines = [
        "from datasets import load_dataset",
        *(f'load_dataset("{folder}", "{name}")' for name in configs),
        *(f'load_dataset("{folder}/{name}")' for name in others),
    ]
    text = "## Use\n\n```python\n" + "\n".join(lines) + "\n```"
    keys = list(dataset_info(dataset_name, files))
    return text + (
        f"\n\nLLaMA-Factory: `dataset_dir` is this folder, `dataset` one of {', '.join(f'`{key}`' for key in keys)}."
        if keys
        else ""
    )


def _generation(stages: list[dict[str, Any]], digest: str) -> Iterator[str]:
    """What every generate stage ran, in the order in which rows passed them."""
    passed = [stage for stage in reversed(stages) if stage_of(stage) != PREPARE]
    yield "## Models, prompts and sampling"
    if len(passed) == len(stages):
        yield "What ran before the first of these stages is not known: its folder is no longer there."
    for number, stage in enumerate(passed, 1):
        title = f"### {' + '.join(stage.get('steps') or ['generate'])}\n\n" if len(passed) > 1 else ""
        known = f"; its digest is `{digest}`" if number == len(passed) else ""
        yield f"{title}The generate stage's fingerprint{known}."
        yield _fingerprint(stage)


def _fingerprint(generate: dict[str, Any]) -> str:
    """Short settings as a table, prompts and other long text whole in code blocks."""
    short: list[tuple[str, str]] = []
    long: list[tuple[str, str]] = []
    for key, value in _settings(generate):
        (long if "\n" in value or len(value) > 120 else short).append((key, value))
    blocks = []
    for key, value in long:
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", value)), default=0))
        blocks.append(f"`{key}`:\n\n{fence}text\n{value}\n{fence}")
    return "\n\n".join([_table(("setting", "value"), short), *blocks])


def _settings(value: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = flatten(value)
    return [(key, item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)) for key, item in pairs]


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    cells = ["| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *cells])
