"""Real Chinese pages in the layouts of WuDao, WanJuan and SkyPile: `make corpora` runs this for the benchmarks.

The text is that of five Debian packages, downloaded with apt-get, never committed: manual pages (simplified and
traditional, much of it half English), LibreOffice's help, Debian's reference and FAQ, fortunes (jokes, poems, near
duplicates, ANSI codes). What can be said without reading the corpora back is in truth.json. The same packages give the
same bytes.

    python bench/corpora.py build/corpora [--check]
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from plain_text import from_html, from_roff, pages

from kun_ray.demo.layout import (
    Item,
    as_json,
    key,
    write_array,
    write_cut_gzip,
    write_lines,
    write_parquet,
    wudao_record,
)

PACKAGES = ("manpages-zh", "libreoffice-help-zh-cn", "fortunes-zh", "debian-reference-zh-cn", "debian-faq-zh-cn")
FILE_RECORDS = 1000
MODULES = {
    "scalc": "电子表格",
    "swriter": "文档",
    "simpress": "演示",
    "sdraw": "绘图",
    "sbasic": "编程",
    "smath": "公式",
}


class Article(NamedTuple):
    """One source file below `origin`'s root: its paragraphs in order; headings begin with `#` and a blank."""

    origin: str
    title: str
    paragraphs: list[str]


# --- packages


def fetch(folder: Path) -> dict[str, str]:
    """Downloads and unpacks the packages into `folder`; their versions by name. Exits with advice if that fails."""
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            sys.exit(f"{program} is missing: these corpora are made on Debian or Ubuntu (a container will do)")
    download = ["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", *PACKAGES]
    done = subprocess.run(download, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{done.stderr.strip()}\n\n{' '.join(download)} failed: run `apt-get update`, then try again")
    versions = {}
    for file in sorted(folder.glob("*.deb")):
        name, version, _ = file.name.split("_")
        versions[name] = version.replace("%3a", ":")
        subprocess.run(["dpkg", "-x", file.name, "."], cwd=folder, check=True)
    return versions


def articles(root: Path, folder: str, suffix: str, parse: Callable[[str], tuple[str, list[str]]]) -> Iterator[Article]:
    """The articles in the files below `folder` whose names end in `suffix`, in order; links are left out."""
    for path in sorted((root / folder).rglob(f"*{suffix}")):
        if path.is_file() and not path.is_symlink():
            data = gzip.decompress(path.read_bytes()) if suffix.endswith(".gz") else path.read_bytes()
            title, paragraphs = parse(data.decode("utf-8", "replace"))
            if paragraphs:
                yield Article(str(path.relative_to(root / folder)), title or path.name.split(".")[0], paragraphs)


# --- articles → corpora


def questions(article: Article) -> tuple[list[tuple[str, str]], list[str]]:
    """The questions of the FAQ with their answers, and the paragraphs that stand under no question."""
    asked: list[tuple[str, list[str]]] = []
    others: list[str] = []
    answer: list[str] | None = None
    for paragraph in article.paragraphs:
        if paragraph.startswith("# "):
            question = re.sub(r"^# [\d.\s]+", "", paragraph)
            answer = [] if question.endswith(("？", "?")) else None
            if answer is not None:
                asked.append((question, answer))
                continue
        (others if answer is None else answer).append(paragraph)
    return [(question, "\n".join(answer)) for question, answer in asked], others


def write_all(root: Path, folder: Path) -> dict[str, tuple[int, int]]:
    """Writes the three corpora; per corpus the number of rows that reading gives, and how many of them are failed."""
    manuals = list(articles(root, "usr/share/man/zh_CN", ".gz", from_roff))
    traditional = list(articles(root, "usr/share/man/zh_TW", ".gz", from_roff))
    help_pages = list(articles(root, "usr/share/libreoffice/help/zh-CN/text", ".html", from_html))
    reference = list(articles(root, "usr/share/debian-reference", ".html", from_html))
    faq = [questions(article) for article in articles(root, "usr/share/doc/debian/FAQ/zh-cn", ".html", from_html)]
    fortunes = [
        fortune.strip("\n")
        for path in sorted((root / "usr/share/games/fortunes").iterdir())
        if path.suffix == "" and not path.is_symlink()
        for fortune in re.split(r"^%$", path.read_text("utf-8", "replace"), flags=re.MULTILINE)
    ]

    wudao: list[tuple[str, str, str]] = []
    for article in help_pages:
        category = MODULES.get(article.origin.split("/")[0], "软件")
        wudao += [(article.title, category, page) for page in pages(article.paragraphs)]
    for article in _section(manuals, "23"):
        wudao += [(article.title, "编程", page) for page in pages(article.paragraphs)]
    subsets = {
        "WebText-cn": _pages_of(_section(manuals, "168")),
        "Wiki-cn": _pages_of(_section(manuals, "457")),
        "TextBook-cn": _pages_of(reference) + [page for _, others in faq for page in pages(others)],
    }
    exams = [pair for pairs, _ in faq for pair in pairs]
    skypile = [page for fortune in fortunes for page in pages(fortune.split("\n\n"))]
    return {
        "wudao": (_write_wudao(folder / "wudao", wudao), 1),
        "wanjuan": (_write_wanjuan(folder / "wanjuan" / "raw" / "nlp" / "CN", subsets, exams), 0),
        "skypile": (_write_skypile(folder / "skypile", skypile + _pages_of(traditional)), 1),
    }


def _section(manuals: Sequence[Article], sections: str) -> list[Article]:
    return [article for article in manuals if article.origin[3] in sections]


def _pages_of(found: Sequence[Article]) -> list[str]:
    return [page for article in found for page in pages(article.paragraphs)]


def _write_wudao(folder: Path, records: Sequence[tuple[str, str, str]]) -> int:
    lines = [
        as_json(wudao_record(number, title, category, text.replace("\n", "")))
        for number, (title, category, text) in enumerate(records, 1)
    ]
    shards = _shards(lines)
    return sum(
        write_array(
            folder / f"part-2021{9337 + 1121 * index:06}.json", shard, wrapped=index == 1, cut=index == len(shards) - 1
        )
        for index, shard in enumerate(shards)
    )


def _write_wanjuan(folder: Path, subsets: dict[str, list[str]], exams: Sequence[tuple[str, str]]) -> int:
    num_rows = 0
    for subset, texts in subsets.items():
        records = [{"id": key(subset, number), "content": text} for number, text in enumerate(texts)]
        for index, shard in enumerate(_shards(list(map(as_json, records)))):
            suffix = (".jsonl.tar.gz", ".jsonl", ".jsonl.gz")[index % 3]
            num_rows += write_lines(folder / subset / f"part-{index:06}-{key(subset, index)[:8]}{suffix}", shard)
    lines = []
    for number, (question, answer) in enumerate(exams):
        options: dict[str, object] = {f"option_{letter}": "" for letter in "abcde"}
        record = {"id": key("exam", number), "q_type": None, "q_main": question, **options, "std_ans": "",
                  "answer": answer, "answer_detail": "", "grade": "", "major": "计算机", "keypoint": ""}  # fmt: skip
        lines.append(as_json(record))
    return num_rows + write_lines(folder / "Exam-cn" / f"part-000000-{key('exam', 0)[:8]}.jsonl.tar.gz", lines)


def _write_skypile(folder: Path, texts: Sequence[str]) -> int:
    num_rows = 0
    for index, shard in enumerate(_shards(texts)):
        name = f"2020-40_zh_{'head' if index % 2 == 0 else 'middle'}_{index // 2:04}"
        lines = [as_json({"text": text}) for text in shard]
        if index == 0:  # one file whose copying was interrupted
            num_rows += write_cut_gzip(folder / f"{name}.jsonl.gz", lines)
        elif index % 3 == 0:
            num_rows += write_parquet(folder / f"{name}.parquet", shard)
        else:
            num_rows += write_lines(folder / f"{name}.jsonl{'.gz' if index % 3 == 1 else ''}", lines)
    return num_rows


def _shards(items: Sequence[Item]) -> list[list[Item]]:
    """All items in a fixed random order, as crawls have none."""
    shuffled = list(items)
    random.Random(2308_06259).shuffle(shuffled)
    return [shuffled[start : start + FILE_RECORDS] for start in range(0, len(shuffled), FILE_RECORDS)]


def check(folder: Path, truth: dict[str, tuple[int, int]]) -> None:
    """Exits unless kun_ray's readers find as many rows, and as many failed ones, as were written."""
    from kun_ray.corpora import CorpusConfig, list_files, read_file  # imports Ray: seconds that writing does not need

    for name, promised in truth.items():
        corpus = CorpusConfig(name, name, [str(folder / name)])
        found = [row for file in list_files(corpus) for table in read_file(corpus, file) for row in table.to_pylist()]
        counts = len(found), sum(row["status"] == "failed" for row in found)
        if counts != promised or len({row["doc_id"] for row in found}) != len(found):
            sys.exit(f"{name}: {promised} rows and failed ones were written, {counts} are read")
    print("the readers find just that")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where wudao/, wanjuan/, skypile/ and truth.json go")
    parser.add_argument("--check", action="store_true", help="read everything back and compare")
    args = parser.parse_args()
    folder: Path = args.folder
    old = [folder / name for name in ("wudao", "wanjuan", "skypile") if (folder / name).exists()]
    if old and not (folder / "truth.json").exists():
        sys.exit(f"{old[0]} exists and there is no truth.json beside it: name another folder, or remove it")
    with tempfile.TemporaryDirectory() as temporary:
        versions = fetch(Path(temporary))
        fresh = folder / "unfinished"
        shutil.rmtree(fresh, ignore_errors=True)
        counts = write_all(Path(temporary), fresh)
    for corpus in old:
        shutil.rmtree(corpus)
    for name in counts:
        (fresh / name).rename(folder / name)
    fresh.rmdir()
    sizes = {name: [path.stat().st_size for path in (folder / name).rglob("*.*") if path.is_file()] for name in counts}
    truth = {
        "records": {name: num_rows for name, (num_rows, _) in counts.items()},
        "failed": {name: num_failed for name, (_, num_failed) in counts.items()},
        "files": {name: len(found) for name, found in sizes.items()},
        "bytes": {name: sum(found) for name, found in sizes.items()},
        "packages": versions,
    }
    (folder / "truth.json").write_text(json.dumps(truth, indent=2) + "\n")
    for name, found in sizes.items():
        print(f"{name:8} {counts[name][0]:6} records {len(found):4} files {sum(found) / 1e6:6.1f} MB")
    if args.check:
        check(folder, counts)


if __name__ == "__main__":
    main()
