"""Exact and near duplicates over a whole corpus: one search over the signatures in its Parquet files.

prepare writes `exact` and `minhash` beside each document (signatures.py) and then calls `find_duplicates`, whose tasks
run wherever the given `run_parallel` puts them. What is kept depends on the documents alone: not on the order of files
or rows, nor on how the work is split. Memory is linear in rows and lies in numpy arrays; texts are never read again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from scipy.sparse import coo_array  # type: ignore[import-untyped]
from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]

from kun_ray.scan import I64, NO_IDS, U64, Bools, Scan, count_rows, doc_ids, fixed_bytes, to_binary, to_hex
from kun_ray.signatures import DedupConfig, band_name

RunParallel = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
"""Maps (function, items) to the function's results, in the order of the items."""

DUPLICATES: Final = pa.schema([("doc_id", pa.string()), ("reason", pa.string()), ("duplicate_of", pa.string())])

_NEIGHBOURS = 4  # a document is compared with its bucket's hub and with this many that follow it in signature order
_PAIRS_AT_ONCE = 200_000


def find_duplicates(
    files: Sequence[str], filesystem: pafs.FileSystem, config: DedupConfig, run_parallel: RunParallel
) -> pa.Table:
    """Every duplicate among the rows with status ok: doc_id, reason, and the kept document that it duplicates.

    Exact duplicates go first; the smallest doc_id of each set stands for it in the search for near duplicates. Those
    form connected components of which the smallest doc_id is kept. A task reads one band (or the exact hashes) of all
    files; checking needs, on the caller's side, 150 bytes per document that shares a band with another.

    Args:
        files: Parquet files with `doc_id` (32 hex digits), `status` and the columns of `signatures`.
        filesystem: where they lie; it must be picklable if `run_parallel` leaves the process.
        config: as given to `signatures`.
        run_parallel: how to map a function over items.
    Raises:
        KunError: a file lacks a column, or holds a doc_id of another form or signatures of another configuration.
    """
    paths = sorted(files)
    num_rows = np.array(
        list(run_parallel(functools.partial(count_rows, filesystem=filesystem, config=config), paths)), np.int64
    )
    scan = Scan(paths, np.concatenate([[0], np.cumsum(num_rows)]).astype(np.int64), filesystem, config)
    splits = max(1, -(-int(num_rows.sum()) // config.rows_per_task))
    dropped, kept = NO_IDS, NO_IDS
    if config.exact:
        found = list(run_parallel(functools.partial(_exact_duplicates, scan, splits), range(splits)))
        dropped, kept = (np.concatenate([NO_IDS, *(pair[side] for pair in found)]) for side in (0, 1))
    reasons = np.zeros(len(dropped), np.int8)
    if config.near:
        near_dropped, near_kept = _near_duplicates(scan, splits, run_parallel)
        kept = _follow(kept, near_dropped, near_kept)
        dropped, kept = np.concatenate([dropped, near_dropped]), np.concatenate([kept, near_kept])
        reasons = np.concatenate([reasons, np.ones(len(near_dropped), np.int8)])
    order = np.lexsort((dropped[:, 1], dropped[:, 0]))
    reason = pa.array(np.array(["duplicate", "near_duplicate"])[reasons[order]], pa.string())
    columns = [to_hex(dropped[order]), reason, to_hex(kept[order])]
    return pa.Table.from_arrays(columns, schema=DUPLICATES)


# Exact -------------------------------------------------------------------------------------------------------------


def _exact_duplicates(scan: Scan, splits: int, part: int) -> tuple[U64, U64]:
    """doc_ids of the exact duplicates whose hash falls into `part`, and of what is kept for each."""
    all_hashes, all_ids = [NO_IDS], [NO_IDS]
    for _, table in scan.rows(["doc_id", "exact"]):
        hashes = fixed_bytes(table["exact"], 16).view("<u8")
        mine = hashes[:, 0] % np.uint64(splits) == part
        all_hashes.append(hashes[mine])
        all_ids.append(doc_ids(table["doc_id"])[mine])
    hashes, ids = np.concatenate(all_hashes), np.concatenate(all_ids)
    order = np.lexsort((ids[:, 1], ids[:, 0], hashes[:, 1], hashes[:, 0]))
    hashes, ids = hashes[order], ids[order]
    return _all_but_first(np.any(hashes[1:] != hashes[:-1], axis=1), ids)


def _all_but_first(changes: Bools, ids: U64) -> tuple[U64, U64]:
    """Of ids sorted by group and id: those that are not the first of their group, and the first of their group."""
    first = np.concatenate([np.ones(min(1, len(ids)), bool), changes])
    heads = np.maximum.accumulate(np.where(first, np.arange(len(ids)), 0))
    dropped = np.any(ids != ids[heads], axis=1)  # compares ids, since a row read twice must not drop itself
    return ids[dropped], ids[heads][dropped]


# Near --------------------------------------------------------------------------------------------------------------


def _near_duplicates(scan: Scan, splits: int, run_parallel: RunParallel) -> tuple[U64, U64]:
    bands, rows = scan.config.bands
    items = [(band, part) for band in range(bands) for part in range(splits)]
    buckets = list(run_parallel(functools.partial(_band_buckets, scan, splits), items))
    candidates = np.unique(np.concatenate([members for members, _ in buckets]))
    if len(candidates) == 0:
        return NO_IDS, NO_IDS
    cuts = np.searchsorted(candidates, scan.starts)
    wanted = [
        (i, candidates[cuts[i] : cuts[i + 1]] - scan.starts[i]) for i in range(len(scan.paths)) if cuts[i] < cuts[i + 1]
    ]
    gathered = list(run_parallel(functools.partial(_gather, scan), wanted))
    ids = np.concatenate([ids for ids, _ in gathered])
    sketches = np.concatenate([sketch for _, sketch in gathered])
    labels = np.arange(len(candidates))
    for (band, _), (members, opens) in zip(items, buckets, strict=True):
        left, right = _pairs(np.searchsorted(candidates, members), opens, sketches, (band + 1) * rows)
        for start in range(0, len(left), _PAIRS_AT_ONCE):
            a, b = left[start : start + _PAIRS_AT_ONCE], right[start : start + _PAIRS_AT_ONCE]
            apart = labels[a] != labels[b]
            labels = _join(labels, *_similar(a[apart], b[apart], sketches, scan.config.least_match))
    order = np.lexsort((ids[:, 1], ids[:, 0], labels))
    return _all_but_first(np.diff(labels[order]) != 0, ids[order])


def _band_buckets(scan: Scan, splits: int, item: tuple[int, int]) -> tuple[I64, Bools]:
    """Row numbers of the documents that share the band's hash with another, bucket by bucket, each by doc_id, and where
    a bucket opens. Exact duplicates are there once."""
    band, part = item
    rows = scan.config.bands[1]
    columns = ["doc_id", f"minhash.{band_name(band)}", *(["exact"] if scan.config.exact else [])]
    pieces: list[tuple[U64, U64, I64, U64]] = []
    for numbers, table in scan.rows(columns):
        present = table["minhash"].is_valid()
        table, numbers = table.filter(present), numbers[present]
        values = fixed_bytes(pc.struct_field(table["minhash"], [0]), 4 * rows).view("<u4")
        keys = np.zeros(len(values), np.uint64)
        for place in range(rows):
            keys = keys * np.uint64(0x9E3779B97F4A7C15) + values[:, place]
            keys ^= keys >> np.uint64(32)
        mine = keys % np.uint64(splits) == part
        exact = fixed_bytes(table["exact"], 16).view("<u8")[:, 0] if scan.config.exact else numbers.astype(np.uint64)
        pieces.append((keys[mine], doc_ids(table["doc_id"])[mine], numbers[mine], exact[mine]))
    if not pieces:
        return np.empty(0, np.int64), np.empty(0, bool)
    keys, ids, numbers, exact = (np.concatenate(column) for column in zip(*pieces, strict=True))
    del pieces
    shared = np.argsort(keys)
    shared = shared[_in_company(keys[shared])]  # most documents are alone: only the others are sorted by all their keys
    shared = shared[np.lexsort((ids[shared, 1], ids[shared, 0], exact[shared], keys[shared]))]
    first_of_exact = np.ones(len(shared), bool)
    first_of_exact[1:] = (keys[shared][1:] != keys[shared][:-1]) | (exact[shared][1:] != exact[shared][:-1])
    shared = shared[first_of_exact]
    shared = shared[_in_company(keys[shared])]
    shared = shared[np.lexsort((ids[shared, 1], ids[shared, 0], keys[shared]))]
    return numbers[shared], np.diff(keys[shared], prepend=~keys[shared][:1]) != 0


def _in_company(sorted_keys: U64) -> Bools:
    same = sorted_keys[1:] == sorted_keys[:-1]
    nothing = np.zeros(min(1, len(sorted_keys)), bool)
    company: Bools = np.concatenate([same, nothing]) | np.concatenate([nothing, same])
    return company


def _gather(scan: Scan, item: tuple[int, I64]) -> tuple[U64, npt.NDArray[np.uint8]]:
    """doc_ids and sketches of some rows of one file, given in order. A sketch is the low byte of every MinHash value: by
    chance 1 in 256 agrees, for which `_similar` corrects."""
    index, wanted = item
    bands, rows = scan.config.bands
    ids, sketches = [NO_IDS], [np.empty((0, bands * rows), np.uint8)]
    start = 0
    with scan.filesystem.open_input_file(scan.paths[index]) as source:
        for batch in pq.ParquetFile(source, pre_buffer=True).iter_batches(columns=["doc_id", "minhash"]):
            low, high = np.searchsorted(wanted, [start, start + len(batch)])
            if low < high:
                table = pa.Table.from_batches([batch]).take(wanted[low:high] - start)
                values = [
                    fixed_bytes(pc.struct_field(table["minhash"], [band]), 4 * rows)[:, ::4] for band in range(bands)
                ]
                sketches.append(np.concatenate(values, axis=1))
                ids.append(doc_ids(table["doc_id"]))
            start += len(batch)
    return np.concatenate(ids), np.concatenate(sketches)


def _pairs(members: I64, opens: Bools, sketches: npt.NDArray[np.uint8], rotation: int) -> tuple[I64, I64]:
    """Pairs to check: every member with its bucket's first, and with its followers in the order of the other bands, so
    that in a huge bucket of many different documents the alike stand together."""
    if len(members) == 0:
        return members, members
    bucket = np.cumsum(opens)
    hubs = members[opens][bucket - 1]
    columns = (rotation + np.arange(8)) % sketches.shape[1]
    order = np.lexsort((np.ascontiguousarray(sketches[members][:, columns]).view(">u8")[:, 0], bucket))
    members_by_signature = members[order]
    left, right = [hubs[~opens]], [members[~opens]]
    for step in range(1, _NEIGHBOURS + 1):
        together = bucket[step:] == bucket[:-step]  # sorting inside buckets leaves the bucket numbers in place
        left.append(members_by_signature[:-step][together])
        right.append(members_by_signature[step:][together])
    return np.concatenate(left), np.concatenate(right)


def _similar(left: I64, right: I64, sketches: npt.NDArray[np.uint8], least_match: float) -> tuple[I64, I64]:
    equal = np.count_nonzero(sketches[left] == sketches[right], axis=1) / sketches.shape[1]
    alike = (equal - 1 / 256) / (1 - 1 / 256) >= least_match
    return left[alike], right[alike]


def _join(labels: I64, left: I64, right: I64) -> I64:
    """The labels after the components that hold left[i] and right[i] have become one."""
    if len(left) == 0:
        return labels
    size = int(labels.max()) + 1
    graph = coo_array((np.ones(len(left), bool), (labels[left], labels[right])), shape=(size, size))
    joined: I64 = connected_components(graph, directed=False)[1].astype(np.int64)[labels]
    return joined


def _follow(kept: U64, dropped: U64, kept_instead: U64) -> U64:
    """`kept` with every id that was itself dropped replaced by what was kept instead of it."""
    place = pc.index_in(to_binary(kept), value_set=to_binary(dropped))
    moved = np.asarray(place.is_valid())
    kept = kept.copy()
    kept[moved] = kept_instead[place.drop_null().to_numpy()]
    return kept
