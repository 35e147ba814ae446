"""Signatures of a text for deduplication: an exact hash and a MinHash, row by row. prepare writes them beside each document.

dedup.py compares them. MinHash over character n-grams (Broder 1997), banded as in Leskovec, Rajaraman, Ullman, *Mining
of Massive Datasets*, 3.4.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import rensa  # type: ignore[import-untyped]

from kun_ray.config import require

SIGNATURE_VERSION: Final = f"rensa-rminhash-{rensa.RMinHash.ALGORITHM_VERSION}"
"""Signatures of different versions cannot be compared: part of the fingerprint of prepare."""

_BAND_RECALL = 0.98  # share of pairs at the threshold that must meet in some band; the check costs another 2%
_IGNORED = re.compile(r"[\W_]+")


@dataclasses.dataclass
class DedupConfig:
    """Which documents count as duplicates. The one with the smallest doc_id is kept."""

    exact: bool = True
    """Drop documents that differ in nothing but blanks, punctuation, letter case and width (`duplicate`)."""
    near: bool = True
    """Drop documents whose character n-grams overlap by `threshold` or more (`near_duplicate`)."""
    threshold: float = 0.8
    """Jaccard similarity of two sets of n-grams from which a pair is near duplicate."""
    num_perm: int = 128
    """Most MinHash values of a signature, 4 bytes each; bands and rows are derived from it and the threshold."""
    ngram: int = 5
    """Length of an n-gram in characters."""
    min_chars: int = 50
    """Shortest document, in characters that count, that is compared for near duplicates: below, a few characters decide."""
    seed: int = 42
    """Seed of the hash functions; signatures with other seeds cannot be compared."""
    rows_per_task: int = 20_000_000
    """Most rows whose hashes one task sorts, at about 50 bytes each; larger inputs are split by hash."""

    def __post_init__(self) -> None:
        require(0.3 <= self.threshold < 1, f"`dedup.threshold` is {self.threshold}, but must lie between 0.3 and 1")
        require(16 <= self.num_perm <= 4096, f"`dedup.num_perm` is {self.num_perm}, but must lie between 16 and 4096")
        require(1 <= self.ngram <= 32, f"`dedup.ngram` is {self.ngram}, but must lie between 1 and 32")
        require(
            self.min_chars >= self.ngram,
            f"`dedup.min_chars` is {self.min_chars}, but must be at least ngram {self.ngram}",
        )
        require(self.seed >= 0, f"`dedup.seed` is {self.seed}, but must not be negative")
        require(self.rows_per_task >= 1, f"`dedup.rows_per_task` is {self.rows_per_task}, but must be at least 1")

    @property
    def bands(self) -> tuple[int, int]:
        """Bands and rows per band: the most rows (fewest false candidates) with which 98% of the pairs at the threshold
        meet, 1 − (1 − tʳ)ᵇ."""
        for rows in range(self.num_perm, 1, -1):
            bands = self.num_perm // rows
            if 1 - (1 - self.threshold**rows) ** bands >= _BAND_RECALL:
                return bands, rows
        return self.num_perm, 1

    @property
    def least_match(self) -> float:
        """Least share of equal signature values: two standard deviations of the estimate below the threshold."""
        bands, rows = self.bands
        return self.threshold - 2 * math.sqrt(self.threshold * (1 - self.threshold) / (bands * rows))


def signature_fields(config: DedupConfig) -> list[pa.Field[Any]]:
    """The columns that `signatures` makes. `minhash` is a struct with a field per band, so that a task which needs one
    band reads no more than that from Parquet."""
    bands, rows = config.bands
    band = pa.binary(4 * rows)
    return [
        pa.field("exact", pa.binary(16)),
        pa.field("minhash", pa.struct([pa.field(band_name(index), band) for index in range(bands)])),
    ]


def signatures(texts: Sequence[str | None], config: DedupConfig) -> dict[str, Any]:
    """`exact` (128-bit hash) and `minhash` of every text; null for a null text, `minhash` also for a short one and where
    near duplicates are not looked for.

    Both see the text in NFKC and lower case without blanks and punctuation, so that layout makes no difference.
    """
    exact_field, minhash_field = signature_fields(config)
    core = [None if text is None else _core(text) for text in texts]
    exact = [
        None if text is None else hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        for text in core
    ]
    least = config.min_chars if config.near else float("inf")  # nobody asks for the others
    long_texts = [text for text in core if text is not None and len(text) >= least]
    is_long = np.array([text is not None and len(text) >= least for text in core], bool)
    bands, rows = config.bands
    values = np.zeros((len(core), bands * rows), np.uint32)
    if long_texts:
        values[is_long] = _minhash(long_texts, config)
    by_band = [values[:, rows * band : rows * (band + 1)].tobytes() for band in range(bands)]
    columns = [pa.Array.from_buffers(pa.binary(4 * rows), len(core), [None, pa.py_buffer(data)]) for data in by_band]
    minhash = pa.StructArray.from_arrays(columns, fields=list(minhash_field.type), mask=pa.array(~is_long))
    return {"exact": pa.array(exact, exact_field.type), "minhash": minhash}


def _core(text: str) -> str:
    """What counts of a text; the text itself if it is all blanks and punctuation."""
    return _IGNORED.sub("", unicodedata.normalize("NFKC", text).lower()) or text


def _minhash(texts: list[str], config: DedupConfig) -> npt.NDArray[np.uint32]:
    """(texts, bands · rows) MinHash values. Every text has at least `ngram` characters."""
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    hashes = np.zeros(len(codes) - config.ngram + 1, np.uint64)
    for place in range(config.ngram):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[place : place + len(hashes)]
        hashes ^= hashes >> np.uint64(32)
    grams = lengths - config.ngram + 1
    ends = np.cumsum(lengths)
    inside = np.ones(len(hashes), bool)  # n-grams that reach into the next text are left out
    for back in range(1, config.ngram):
        inside[(ends - back)[ends - back < len(hashes)]] = False
    hashes = hashes[inside] * np.uint64(0xBF58476D1CE4E5B9)
    offsets = np.concatenate([[0], np.cumsum(grams)]).astype(np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        hashes, offsets, num_perm=math.prod(config.bands), seed=config.seed
    )
    return np.array(matrix.to_rows(), np.uint32)


def band_name(index: int) -> str:
    """The field of the struct `minhash` that holds one band."""
    return f"b{index:03d}"
