"""How many rows of a stage have which status and reason, read back from its files: the proof in every summary.json."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kun_ray.config import KunError, without_credentials
from kun_ray.schema import OK, STATUSES
from kun_ray.store import Folder


def count_rows(folder: Folder) -> dict[str, Any]:
    """Reads a folder back and counts its rows.

    Returns:
        `rows`, one count per status, `reasons` ("status/reason" → count), `repeated_ids` (rows beyond the first with
        the same doc_id).
    """
    statuses: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    keys, filled = np.empty(folder.num_rows(), dtype="S16"), 0
    for batch in folder.batches(["doc_id", "status", "reason"]):
        for group in batch.to_struct_array().field("status").value_counts().to_pylist():
            statuses[group["values"]] += group["counts"]
        both = pa.table({"s": batch["status"], "r": batch["reason"]})
        for pair in both.group_by(["s", "r"]).aggregate([([], "count_all")]).to_pylist():
            if pair["s"] != "ok":
                reasons[f"{pair['s']}/{pair['r']}"] += pair["count_all"]
        keys[filled : filled + len(batch)] = np.frombuffer(
            b"".join(map(_key, batch["doc_id"].to_pylist())), dtype="S16"
        )
        filled += len(batch)
    rows = sum(statuses.values())
    keys.sort()
    unique = min(rows, 1) + int(np.count_nonzero(keys[1:] != keys[:-1]))
    by_status = {status: statuses.pop(status, 0) for status in STATUSES}
    return {
        "rows": rows,
        **by_status,
        **statuses,
        "reasons": dict(reasons.most_common()),
        "repeated_ids": rows - unique,
    }


def _key(doc_id: str) -> bytes:
    """16 bytes for an id: a billion rows, sorted in place, need 16 GB where the ids themselves would need several times 32."""
    return hashlib.blake2b(doc_id.encode(), digest_size=16).digest()


def prove_counts(folder: Folder, num_expected: int) -> dict[str, Any]:
    """`count_rows`, checked: rows = expected = ok + rejected + failed and no doc_id twice. Raises KunError otherwise."""
    counts = count_rows(folder)
    total = sum(counts[status] for status in STATUSES)
    if not (counts["rows"] == num_expected == total and counts["repeated_ids"] == 0):
        raise KunError(
            f"{without_credentials(folder.uri)}: the counts do not add up: {num_expected} rows in, {counts['rows']} out "
            f"({', '.join(f'{counts[s]} {s}' for s in STATUSES)}; {counts['repeated_ids']} twice). Nothing was published."
        )
    return counts


def count_statuses(folder: Folder) -> dict[str, int]:
    """Rows in a stage's files so far, by status."""
    counts: Counter[str] = Counter()
    for batch in folder.batches(["status"]):
        counts.update({item["values"]: item["counts"] for item in pc.value_counts(batch["status"]).to_pylist()})
    return {status: counts[status] for status in STATUSES}


def totals(folder: Folder, columns: list[str]) -> dict[str, int]:
    """The sum of each of a stage's columns of integers so far; rows without a value count nothing."""
    found = dict.fromkeys(columns, 0)
    for batch in folder.batches(columns):
        for column in columns:
            found[column] += pc.sum(batch[column]).as_py() or 0
    return found


def warn_if_none_ok(counts: dict[str, Any]) -> None:
    """Prints a warning when a finished stage holds no row that a later one could use, with what became of all.

    Args:
        counts: as `count_rows` gives them.
    """
    if not counts[OK]:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in counts["reasons"].items())
        print(f"warning: no row is ok, so no later stage has anything to do: {reasons or 'the input holds none'}")
