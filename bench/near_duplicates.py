"""Near duplicates: documents/s and memory of signing and searching as their number grows; recall and precision on planted ones.

    python bench/near_duplicates.py [--sizes 10000 100000 1000000] [--out bench/results]
    python bench/near_duplicates.py --short                              3,000 documents: a check that it works

Documents are random rows of real clauses (`make corpora`; the demo's text if that is not there), so that unrelated ones have
next to nothing in common. To 8% of them a changed copy is made: clauses replaced in one place, or single characters
everywhere. The true Jaccard similarity of each pair is counted over the same n-grams that signatures.py hashes, exactly.
Signing and searching are prepare's own functions on prepare's own files, each in a process of its own, on one
core, without Ray; seconds are CPU seconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from machine import PASSING, RESULTS, material, versions, write

from kun_ray.dedup import find_duplicates
from kun_ray.schema import OK, doc_id
from kun_ray.signatures import DedupConfig, _core, signature_fields, signatures

CONFIG = DedupConfig()
ROWS_PER_FILE = 20_000
BATCH = 1024
CLAUSES = (12, 36)
"""Fewest and most clauses of a document: about 100 to 400 characters, of which Kun keeps those up to 512 tokens."""
CHANGED = (0.02, 0.26)
"""Least and most share of a document that a copy has otherwise: true similarities from 0.5 to 0.97."""
COPIES = 0.08
BINS = [0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0]
TOLERANCE = 0.1
"""A reported pair whose true similarity is more than so much below the threshold is a false one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--corpora", type=Path, default=Path("build/corpora"))
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--out", type=Path, help="default: bench/results; build/bench with --short")
    parser.add_argument("--part", choices=("sign", "search"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        size = options.sizes[0]
        found = sign(options.folder, size, options.corpora) if options.part == "sign" else search(options.folder)
        print(json.dumps(found))
        return
    sizes = []
    for size in [3_000] if options.short else options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            sizes.append(measure(Path(folder), size, options.corpora))
        print(json.dumps(sizes[-1]), flush=True)
    bands, rows = CONFIG.bands
    result = {
        "source": material(options.corpora)[0],
        "settings": {"threshold": CONFIG.threshold, "ngram": CONFIG.ngram, "bands": bands, "rows_per_band": rows},
        "sizes": sizes,
        "growth": growth(sizes),
        "versions": versions("rensa", "numpy", "pyarrow", "scipy"),
    }
    path = write(options.out or (PASSING if options.short else RESULTS), "near_duplicates", result)
    print(json.dumps(result["growth"], indent=2))
    print(f"written to {path}")


def measure(folder: Path, size: int, corpora: Path) -> dict[str, Any]:
    """Both parts for one number of documents, one after the other."""
    found: dict[str, Any] = {"documents": size}
    for part in ("sign", "search"):
        command = [sys.executable, __file__, "--part", part, "--folder", str(folder), "--sizes", str(size)]
        environment = {**os.environ, "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run([*command, "--corpora", str(corpora)], capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            raise RuntimeError(done.stderr[-3000:])
        found[part] = json.loads(done.stdout.splitlines()[-1])
    return {**found, **quality(folder)}


def growth(sizes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How much longer each part took when there were so many times more documents, and bytes for each further one."""
    steps = []
    for small, large in itertools.pairwise(sizes):
        step: dict[str, Any] = {"documents": round(large["documents"] / small["documents"], 2)}
        for part in ("sign", "search"):
            step[f"{part}_seconds"] = round(large[part]["seconds"] / small[part]["seconds"], 2)
            more = (large[part]["peak_mb"] - small[part]["peak_mb"]) * 1e6
            step[f"{part}_bytes_per_document"] = round(more / (large["documents"] - small["documents"]))
        steps.append(step)
    return steps


# Documents ---------------------------------------------------------------------------------------------------------


def documents(size: int, corpora: Path) -> Iterator[tuple[list[str], list[int]]]:
    """Texts, file by file, and for each the number of the document that it is a changed copy of, or −1."""
    _, texts = material(corpora)
    clauses = np.array(
        sorted({clause for text in texts for clause in re.findall(r"[\u4e00-\u9fff]{6,20}", text)}), object
    )
    before: list[str] = []
    for start in range(0, size, ROWS_PER_FILE):
        random = np.random.default_rng([size, start])
        num_rows = min(ROWS_PER_FILE, size - start)
        lengths = random.integers(*CLAUSES, num_rows - int(COPIES * num_rows))
        chosen = clauses[random.integers(0, len(clauses), int(lengths.sum()))]
        ends = np.cumsum(lengths).tolist()
        fresh = ["，".join(chosen[end - length : end]) for end, length in zip(ends, lengths.tolist(), strict=True)]
        copies = int(COPIES * num_rows)
        first, bases = (start, fresh) if not before else (start - ROWS_PER_FILE, before)
        at = copies if before else 0  # of the file before, so that pairs lie in two files; no document is copied twice
        texts = fresh + [changed(base, clauses, random) for base in bases[at : at + copies]]
        yield texts, [-1] * len(fresh) + list(range(first + at, first + at + copies))
        before = fresh


def changed(text: str, clauses: Any, random: np.random.Generator) -> str:
    """A copy with a share of it replaced: one stretch, or single characters, each of which costs n n-grams."""
    share = random.uniform(*CHANGED)
    if random.random() < 0.5:
        length = int(share * len(text))
        at = int(random.integers(0, len(text) - length))
        other = "".join(clauses[random.integers(0, len(clauses), length // 6 + 1)])
        return text[:at] + other[:length] + text[at + length :]
    chars = list(text)
    for at in random.integers(0, len(text), max(1, int(share * len(text) / CONFIG.ngram))).tolist():
        chars[at] = clauses[int(random.integers(0, len(clauses)))][0]
    return "".join(chars)


def jaccard(left: str, right: str) -> float:
    """The true similarity of two texts, over the n-grams that are hashed."""
    one, other = (
        {core[at : at + CONFIG.ngram] for at in range(len(core) - CONFIG.ngram + 1)}
        for core in (_core(left), _core(right))
    )
    return len(one & other) / len(one | other)


# Parts -------------------------------------------------------------------------------------------------------------


def sign(folder: Path, size: int, corpora: Path) -> dict[str, Any]:
    """Signs all documents into files as prepare does; only `signatures` is timed. Writes the truth beside them."""
    seconds, num_chars, start = 0.0, 0, 0
    names = ["doc_id", "status", *(field.name for field in signature_fields(CONFIG))]
    pairs: list[tuple[str, str, float]] = []
    known: dict[int, tuple[str, str]] = {}
    for texts, copy_of in documents(size, corpora):
        ids = [doc_id("bench", "", start + row, text) for row, text in enumerate(texts)]
        batches = []
        for at in range(0, len(texts), BATCH):
            began = time.process_time()
            signed = signatures(texts[at : at + BATCH], CONFIG)
            seconds += time.process_time() - began
            columns = [pa.array(ids[at : at + BATCH]), pa.array([OK] * len(signed["exact"])), *signed.values()]
            batches.append(pa.Table.from_arrays(columns, names))
        pq.write_table(pa.concat_tables(batches), folder / f"part-{start:09d}.parquet")
        own = dict(enumerate(zip(ids, texts, strict=True), start))
        known |= own
        for row, base in enumerate(copy_of):
            if base >= 0:
                pairs.append((known[base][0], ids[row], round(jaccard(known[base][1], texts[row]), 4)))
        num_chars += sum(map(len, texts))
        start += len(texts)
        known = own
    (folder / "pairs.json").write_text(json.dumps(pairs))
    return {**cost(seconds, size), "mean_characters": round(num_chars / size)}


def search(folder: Path) -> dict[str, Any]:
    """Finds the duplicates in the signed files, one task after the other in this process."""
    files = sorted(str(path) for path in folder.glob("*.parquet"))
    before = peak_mb()
    began = time.process_time()
    found = find_duplicates(files, pafs.LocalFileSystem(), CONFIG, lambda function, items: map(function, items))
    seconds = time.process_time() - began
    size = sum(pq.read_metadata(file).num_rows for file in files)
    pq.write_table(found, folder / "found.parquet.result")
    return {**cost(seconds, size), "peak_mb_before": before}


def cost(seconds: float, size: int) -> dict[str, Any]:
    return {"seconds": round(seconds, 2), "documents_per_s": round(size / seconds), "peak_mb": peak_mb()}


def peak_mb() -> int:
    """The largest resident size of this process so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


def quality(folder: Path) -> dict[str, Any]:
    """What was found against what was planted."""
    pairs = json.loads((folder / "pairs.json").read_text())
    found = pq.read_table(folder / "found.parquet.result").to_pylist()
    root = {row["doc_id"]: row["duplicate_of"] for row in found}
    together = np.array([root.get(a, a) == root.get(b, b) for a, b, _ in pairs])
    truth = np.array([similarity for _, _, similarity in pairs])
    planted = {frozenset((a, b)): similarity for a, b, similarity in pairs}
    reported = [planted.get(frozenset((row["doc_id"], row["duplicate_of"]))) for row in found]
    good = sum(similarity is not None and similarity >= CONFIG.threshold - TOLERANCE for similarity in reported)
    recall = {}
    for low, high in itertools.pairwise(BINS):
        inside = (truth >= low) & (truth < high)
        if inside.any():
            recall[f"{low:.2f}–{high:.2f}"] = {
                "pairs": int(inside.sum()),
                "found": round(float(together[inside].mean()), 4),
            }
    at = (truth >= CONFIG.threshold) & (truth < CONFIG.threshold + 0.05)
    above = truth >= CONFIG.threshold
    return {
        "planted_pairs": len(pairs),
        "recall_at_threshold": round(float(together[at].mean()), 4),
        "recall_from_threshold_up": round(float(together[above].mean()), 4),
        "reported": len(found),
        "reported_unrelated": sum(similarity is None for similarity in reported),
        "precision": round(good / max(1, len(found)), 4),
        "found_by_true_similarity": recall,
    }


if __name__ == "__main__":
    main()
