"""The worked examples of docs/architecture.md, followed on a copy of the package, as a reader would."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from kun_ray.config import load
from kun_ray.generate import GenerateConfig

REPO = Path(__file__).parents[2]
DOCS = (REPO / "docs/architecture.md").read_text()


def blocks(heading: str) -> list[str]:
    """The code below a heading, block by block."""
    section = DOCS.split(f"\n### {heading}\n")[1].split("\n### ")[0]
    found = re.findall(r"```\w+\n(.*?)```", section, re.DOTALL)
    assert found, f"no example under {heading}"
    assert all(sum(bool(line.strip()) for line in block.splitlines()) <= 20 for block in found), (
        "shorter examples, please"
    )
    return found


class Copy:
    """A copy of kun_ray that an example is put into."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        shutil.copytree(REPO / "kun_ray", folder / "kun_ray", ignore=shutil.ignore_patterns("__pycache__"))

    def insert(self, file: str, before: str, text: str) -> None:
        """Puts text in front of the one place that holds `before`."""
        path = self._folder / "kun_ray" / file
        source = path.read_text()
        assert source.count(before) == 1, f"{file} holds {before!r} {source.count(before)} times"
        path.write_text(source.replace(before, text + before))

    def append(self, file: str, text: str) -> None:
        with (self._folder / "kun_ray" / file).open("a") as stream:
            stream.write("\n\n" + text)

    def run(self, code: str, *argv: str) -> str:
        """What a Python with this copy prints."""
        ran = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), *argv],
            cwd=self._folder,
            env={**os.environ, "PYTHONPATH": str(self._folder)},
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
        return ran.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def test_a_corpus(copy: Copy, tmp_path: Path) -> None:
    function, lines = blocks("A corpus")
    copy.append("contents.py", function)
    copy.insert("corpora.py", '"jsonl", "parquet")', '"forum", ')
    copy.insert("corpora.py", "    return ExtractFields(", lines)
    copy.insert("corpora.py", "ExtractWanjuan, ", "extract_forum, ")
    threads = [
        {"subject": "怎样煮面", "posts": ["水要多，火要大，面下锅后先搅散。", "谢谢！"], "board": "厨房"},
        {"subject": "空", "posts": []},
    ]
    path = tmp_path / "threads.jsonl"
    path.write_text("".join(json.dumps(thread, ensure_ascii=False) + "\n" for thread in threads))
    found = copy.run(
        """
        import json, sys
        from kun_ray.corpora import CorpusConfig, list_files, read_file
        corpus = CorpusConfig("bbs", "forum", [sys.argv[1]])
        rows = [row for file in list_files(corpus) for table in read_file(corpus, file) for row in table.to_pylist()]
        print(json.dumps([[row["text"], row["title"], row["reason"], json.loads(row["meta"]).get("board")] for row in rows]))
        """,
        str(path),
    )
    assert json.loads(found) == [
        ["水要多，火要大，面下锅后先搅散。", "怎样煮面", None, "厨房"],
        [None, "空", "missing_field", None],
    ]


def test_a_filter(copy: Copy) -> None:
    (example,) = blocks("A filter")
    field, rest = example.split("\n\ndef digits")
    function, line = rest.split(
        "\n    # in build_filters, before `chinese`: price lists have few Han characters, too\n"
    )
    copy.insert("filters.py", "    min_chinese_share: float = 0.4\n", field + "\n")
    copy.insert("filters.py", "def build_filters", f"def digits{function}\n\n")
    copy.insert("filters.py", "    filters.append(functools.partial(chinese", line)
    found = copy.run(
        """
        from kun_ray.filters import FilterConfig, apply_filters, build_filters
        texts = ["这一年的苹果每斤卖三块五毛钱，比往年便宜一些，所以买的人很多。", "苹果 3.50 梨 2.80 桃子 4.20 香蕉 3.90 西瓜 1.20 葡萄 6.50 橙子 5.00",
            "2021 3.5 1200 88% 2022 4.1 1300 90% 2023 4.6 1400 92% 2024 5.0 1500 95%"]  # of test_other_languages_are_not_chinese
        for given in ({"max_digit_share": 0.6}, {"max_digit_share": 0.5}, {}):
            config = FilterConfig(language=None, **given)
            print(*[apply_filters(text, build_filters(config), config).reason for text in texts])
        """
    )
    assert found.splitlines() == ["None not_chinese digits", "None digits digits", "None not_chinese not_chinese"]


def test_a_step(copy: Copy, model_folder: Callable[..., str], tmp_path: Path) -> None:
    config, example = blocks("A step")
    fields, branch, parse = re.split(r"\n    # in build_step, before the line on chosen\.mode\n|\n\n\n", config)
    copy.insert("schema.py", '    "polish": [pa.field("answer"', '    "topic": [pa.field("topic", pa.string())],\n')
    copy.insert("steps.py", '    "polish": ["text", "instruction"],', '    "topic": ["instruction"],\n')
    copy.insert("steps.py", "@dataclasses.dataclass\nclass StepsConfig", f"{fields}\n\n")
    copy.insert("steps.py", "    polish: PolishConfig | None = None\n", "    topic: TopicConfig | None = None\n")
    copy.insert("steps.py", '    if isinstance(chosen, ScoreConfig) and chosen.mode == "choose":', branch + "\n")
    copy.append("steps.py", parse)
    shutil.copy(REPO / "conf/prompts.yaml", tmp_path)
    (tmp_path / "topic.yaml").write_text(example)
    found = copy.run(
        """
        import sys
        from kun_ray.config import load
        from kun_ray.generate import GenerateConfig
        from kun_ray.prompts import load_tokenizer
        from kun_ray.replies import Reply
        from kun_ray.schema import DOCUMENT, with_steps
        from kun_ray.steps import build_step
        model = sys.argv[2]
        config = load(GenerateConfig, [sys.argv[1], "input=i", "output=o", f"pools.chat.model={model}"])
        step = build_step("topic", config.steps, load_tokenizer(model))
        print(config.pools["chat"].steps, len(step.candidates), step.parse(Reply(9, 1, "chosen", logprobs=(-3.0, -0.1, -4.0, -5.0))))
        print(len(step.prompt.render({"instruction": "请解释什么是光合作用"})) > 20, "topic" in with_steps(DOCUMENT, ["topic"]).names)
        """,
        str(tmp_path / "topic.yaml"),
        model_folder(),
    )
    assert found.splitlines() == ["['score', 'topic', 'polish'] 4 {'topic': '科技'}", "True True"]


def test_a_model(tmp_path: Path) -> None:
    for text in blocks("A model"):
        given = yaml.safe_load(text)
        given["extends"] = [str(REPO / "conf" / name) for name in given["extends"]]
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(given))
        config = load(GenerateConfig, [str(tmp_path / "mine.yaml"), "input=/i", "output=/o"])
        assert [step for pool in config.pools.values() for step in pool.steps] == ["label", "score", "polish"]
