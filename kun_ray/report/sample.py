"""Which rows the report shows: a stratified sample by doc_id, and those rows fetched whole.

`survey` collects ids while it reads, `report` fetches the rows. A doc_id is a hash, so the smallest ids are a uniform
sample, need no random numbers, and are the same documents in every run over the same corpora: runs can be compared row
by row. Memory: at most `size` ids of 16 bytes per stratum.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kun_ray.scan import U64, to_hex
from kun_ray.schema import OK
from kun_ray.store import Folder

Stratum = tuple[str, ...]
"""What the rows of a stratum have in common; the status comes first."""


class StratifiedSample:
    """The `size` smallest ids of each stratum seen so far."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: dict[Stratum, U64] = {}

    def add(self, stratum: Stratum, ids: U64) -> None:
        """Offers ids, shape [rows, 2] (`scan.doc_ids`), of one stratum."""
        kept = self._kept.get(stratum)
        if kept is not None and len(kept) == self._size:
            ids = ids[ids[:, 0] <= kept[-1, 0]]  # most rows of a long scan end here
        merged = ids if kept is None else np.concatenate([kept, ids])
        order = np.lexsort((merged[:, 1], merged[:, 0]))[: self._size]
        self._kept[stratum] = merged[order]

    def take(self, num_rows: int) -> list[str]:
        """About `num_rows` doc_ids: half of them ok rows, the others shared evenly among the strata that are not.

        Every stratum is represented, even if that makes more rows.
        """
        sizes = {stratum: len(ids) for stratum, ids in self._kept.items()}
        good = {stratum: size for stratum, size in sizes.items() if stratum[0] == OK}
        rest = {stratum: size for stratum, size in sizes.items() if stratum not in good}
        num_rest = min(sum(rest.values()), max(num_rows // 2, num_rows - sum(good.values())))
        shares = {**even_shares(good, num_rows - num_rest), **even_shares(rest, num_rest)}
        return [doc_id for stratum, share in shares.items() for doc_id in hex_ids(self._kept[stratum][:share])]


def even_shares(sizes: dict[Stratum, int], total: int) -> dict[Stratum, int]:
    """`total` split over strata as evenly as their sizes allow, at least 1 each."""
    shares: dict[Stratum, int] = {}
    left = total
    for position, (stratum, size) in enumerate(sorted(sizes.items(), key=lambda item: item[1])):
        shares[stratum] = max(1, min(size, left // (len(sizes) - position)))
        left = max(0, left - shares[stratum])
    return shares


def hex_ids(ids: U64) -> list[str]:
    """Ids of `scan.doc_ids` as strings."""
    found: list[str] = to_hex(ids).to_pylist()
    return found


def fetch_rows(folder: Folder, ids: Iterable[str], columns: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """The rows with these doc_ids, by id. Reads ids everywhere, but other columns only of row groups with a hit."""
    wanted = pa.array(sorted(set(ids)), pa.string())
    rows: dict[str, dict[str, Any]] = {}
    if not len(wanted):
        return rows
    for part in folder.parts():
        with folder.filesystem.open_input_file(part) as file, pq.ParquetFile(file) as parquet:
            names = [n for n in parquet.schema_arrow.names if columns is None or n in (*columns, "doc_id")]
            for group in range(parquet.num_row_groups):
                hits = pc.is_in(parquet.read_row_group(group, columns=["doc_id"])["doc_id"], value_set=wanted)
                if pc.any(hits).as_py():
                    table = parquet.read_row_group(group, columns=names).filter(hits)
                    rows |= {row["doc_id"]: row for row in table.to_pylist()}
            if len(rows) == len(wanted):
                break
    return rows
