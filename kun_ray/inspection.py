"""What whoever shares an export must know of its rows: personal data that prepare masked, examination questions in them.

`export.export` calls it for the data card. It reads what other stages have written down and searches no text itself.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import PurePosixPath
from typing import Any, Final

import numpy as np
import orjson
import pyarrow.compute as pc

from kun_ray import card, checksums
from kun_ray.cleaning import MASKS
from kun_ray.config import ConfigError, KunError, without_credentials
from kun_ray.store import MANIFEST, SUMMARY, Folder, input_fingerprint

KINDS: Final = tuple(MASKS)
"""Kinds of personal data; a row's set of kinds is a bit mask in this order."""
FOLDER: Final = "contamination"
ROWS: Final = "rows.jsonl"
"""What `evaluate/contamination.py` writes: a folder with summary.json and a line for each row and question."""

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Contamination:
    """A finished check of a stage's ok rows against examinations."""

    counts: dict[str, Any]
    """`ngram`, `rows`, `rows_with_questions`, and `suites`: name → questions, unusable, found, nearly_whole."""
    doc_ids: Array
    """Rows that share an n-gram with a question, each once, bytes."""


def masked_kinds(meta: Any) -> Array:
    """The kinds of personal data that prepare has masked in each row, uint8 [rows]: a bit mask over KINDS.

    Args:
        meta: the rows' column `meta`, JSON.
    """
    found: Array = np.zeros(len(meta), dtype=np.uint8)
    for place in np.flatnonzero(
        pc.fill_null(pc.match_substring(meta, '"masked"'), False).to_numpy(zero_copy_only=False)
    ):
        kinds = json.loads(meta[int(place)].as_py()).get("masked")
        found[place] = sum(1 << KINDS.index(kind) for kind in kinds if kind in KINDS) if isinstance(kinds, dict) else 0
    return found


def count_kinds(masks: Array) -> dict[str, int]:
    """Rows by kind; a row with two kinds counts in both."""
    return {kind: int(np.count_nonzero(masks & (1 << bit))) for bit, kind in enumerate(KINDS)}


def chain(stage: Folder) -> list[Folder]:
    """A finished stage and those before it, the last one first, as the inputs in their manifests lead back to prepare.

    It ends early where an input is no longer where it was, nor beside its reader, or is another one.
    """
    found = [stage]
    while len(found) < 16:  # a manifest that names itself would never end
        manifest = found[-1].read_json(MANIFEST)
        given = str((manifest.get("config") or {}).get("input") or "")
        beside = found[-1].beside(PurePosixPath(given.partition("?")[0]).name)
        digest = manifest["fingerprint"].get("input")
        before = next((f for f in (Folder(given), beside) if given and _is_input(f, digest)), None)
        if before is None:
            break
        found.append(before)
    return found


def personal_data_actions(stages: list[Folder]) -> dict[str, str] | None:
    """What prepare did with each kind of personal data: `mask`, `reject` or `keep`; None where `stages` do not lead to it."""
    for stage in stages:
        filters = stage.read_json(MANIFEST)["fingerprint"].get("filters")
        if isinstance(filters, dict) and "pii" in filters:
            own = dict(filters.get("pii_kinds") or {})
            return {kind: str(own.get(kind, filters["pii"])) for kind in KINDS}
    return None


def trained_on(training: Folder) -> dict[str, list[str]]:
    """The data of a finished training by name, each with a line of name and terms for every corpus that an export was made of.

    What is no export, or no longer where it was, has no lines.
    """
    found: dict[str, list[str]] = {}
    if not training.exists(MANIFEST):
        return found
    for entry in training.read_json(MANIFEST)["fingerprint"].get("data") or []:
        path = str(entry["path"])
        name, data = PurePosixPath(path.partition("?")[0]).name, Folder(path)
        try:
            settings = data.read_json(MANIFEST)["fingerprint"] if data.exists(SUMMARY) else {}
            sources = data.read_json(SUMMARY)["sources"] if "selection" in settings else {}
        except (KunError, OSError):  # storage that cannot be reached from here
            settings, sources = {}, {}
        given = {source: card.SourceConfig(**own) for source, own in settings.get("sources", {}).items()}
        corpora = [card.source_of(source, given) for source in sources]
        found[str(settings.get("dataset_name") or name)] = [f"{corpus.name}: {corpus.licence}" for corpus in corpora]
    return found


def read_contamination(uri: str, source: str, num_ok: int) -> Contamination:
    """The result of a check of `source`, a generate stage with `num_ok` ok rows.

    Raises:
        ConfigError: there is no such result, or it is one of other data.
    """
    folder, again = _result(uri), f"run jobs/evaluate.py with contamination.data={without_credentials(source)}"
    counts = folder.read_json(SUMMARY)
    if Folder(str(counts["data"])).path != Folder(without_credentials(source)).path or counts["rows"] != num_ok:
        raise ConfigError(
            f"contamination: {without_credentials(uri)} is about {counts['rows']:,} rows of {counts['data']}, not about the "
            f"{num_ok:,} ok rows of {without_credentials(source)}: {again}"
        )
    with folder.filesystem.open_input_stream(folder.child(ROWS)) as stream:
        ids = {str(orjson.loads(line)["row"]).encode() for line in stream.read().splitlines()}
    return Contamination(
        {name: counts[name] for name in ("ngram", "rows", "rows_with_questions", "suites")},
        np.array(sorted(ids), dtype="S32"),
    )


def contaminated(found: Contamination, doc_id: Array) -> Array:
    """Which rows share an n-gram with a question, bool [rows]. Raises KunError when a row of the check is not there."""
    held: Array = np.isin(doc_id, found.doc_ids)
    expected = found.counts["rows_with_questions"]
    if not np.count_nonzero(held) == len(found.doc_ids) == expected:
        raise KunError(
            f"contamination: {expected} rows of the check hold questions, its list names {len(found.doc_ids)}, and "
            f"{np.count_nonzero(held)} of these are in the input: the input was made anew; run the check again"
        )
    return held


def digest(uri: str) -> str:
    """Identity of a check's result. Raises ConfigError when there is none."""
    return checksums.digests(_result(uri), ROWS).blake2b


def _result(uri: str) -> Folder:
    folder = next((f for f in (Folder(uri), Folder(uri).below(FOLDER)) if f.exists(ROWS) and f.exists(SUMMARY)), None)
    if folder is None:
        raise ConfigError(
            f"contamination: {without_credentials(uri)} holds no {FOLDER}/{ROWS}: give the output of a jobs/evaluate.py that ran "
            "with contamination.data=<the input of this export>"
        )
    return folder


def _is_input(folder: Folder, digest: str | None) -> bool:
    try:
        return folder.exists(MANIFEST) and input_fingerprint(folder) == digest
    except (KunError, OSError):  # storage that cannot be reached from here
        return False
