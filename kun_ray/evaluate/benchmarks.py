"""C-Eval and CMMLU as published → questions → few-shot prompts of one model.

choice.py and contamination.py call it. It never loads a model. Layouts: C-Eval has `dev/<subject>_dev.csv`, `val/…`, `test/…`
with id, question, A, B, C, D, answer (not in test), explanation (dev); CMMLU has `dev/<subject>.csv`, `test/…` with an index,
Question, A, B, C, D, Answer.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import unicodedata
from collections.abc import Callable
from typing import Final

from omegaconf import MISSING
from pyarrow import fs

from kun_ray import store
from kun_ray.config import ConfigError, one_of, require
from kun_ray.evaluate.subjects import SUBJECTS, subject
from kun_ray.schema import FAILED, OK, doc_id

LETTERS: Final = ("A", "B", "C", "D")
_RADICALS: Final = {code: unicodedata.normalize("NFKC", chr(code)) for code in (*range(0x2F00, 0x2FD6), 0x2E9F, 0x2EF3)}
_SUPPLEMENT: Final = str.maketrans(
    "⺠⺩⻁⻄⻅⻆⻉⻋⻑⻓⻔⻘⻙⻚⻛⻜⻝⻢⻣⻤⻥⻦⻧⻨⻩⻪⻬⻮⻰",
    "民王虎西见角贝车長长门青韦页风飞食马骨鬼鱼鸟卤麦黄黾齐齿龙",
)
"""Characters of the CJK Radicals Supplement that stand for whole characters; NFKC leaves them (Unicode: EquivalentUnifiedIdeograph)."""


@dataclasses.dataclass
class BenchmarkConfig:
    """One suite of multiple-choice questions."""

    path: str = MISSING
    """Folder as published: it, or its `data` or `formal_ceval`, holds dev/ and the split. s3:// and hdfs:// work too."""
    format: str = "cmmlu"
    """`ceval` or `cmmlu`: file names and columns, subjects and categories."""
    split: str = "test"
    """Which questions: `val` or `test`; those of `dev` are the worked examples, with their answers. C-Eval publishes no answers for `test`: take `val`, or hand in the submission file that is written."""
    subjects: list[str] = dataclasses.field(default_factory=list)
    """File names of the subjects to ask; empty asks all that the folder has."""

    def __post_init__(self) -> None:
        one_of("format", self.format, tuple(SUBJECTS))
        one_of("split", self.split, ("val", "test"))


@dataclasses.dataclass(frozen=True)
class Question:
    """One question; a field that its file lacks is empty."""

    subject: str
    id: str
    stem: str
    options: tuple[str, ...]
    key: str | None

    def block(self) -> str:
        """The question and its options, as they stand in a prompt."""
        options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=True))
        return f"题目：{self.stem}\n{options}"

    def is_whole(self) -> bool:
        """Whether it can be asked at all."""
        return bool(self.stem) and all(self.options) and (self.key is None or self.key in LETTERS)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A suite that has been read."""

    name: str
    format: str
    questions: list[Question]
    examples: dict[str, list[Question]]
    """Subject → worked examples (dev)."""

    def digest(self) -> str:
        """32 hex digits over every question and example."""
        return hashlib.blake2b(repr((self.questions, self.examples)).encode(), digest_size=16).hexdigest()


def unify_radicals(text: str) -> str:
    """`text` with Kangxi radicals and their like (⼈ U+2F08) as the ordinary characters (人 U+4EBA) that they look like.

    CMMLU was taken from PDF files and holds some. All of NFKC would also turn x² into x2, so only radicals are touched.
    """
    return text.translate(_RADICALS).translate(_SUPPLEMENT)


def read_benchmark(name: str, config: BenchmarkConfig) -> Benchmark:
    """Reads one suite. Raises ConfigError when the folder is not laid out as published."""
    filesystem, root = _root(name, config)
    end = {"ceval": f"_{config.split}.csv", "cmmlu": ".csv"}[config.format]
    found = {
        info.base_name.removesuffix(end): info.path
        for info in filesystem.get_file_info(fs.FileSelector(f"{root}/{config.split}"))
        if info.is_file and info.base_name.endswith(end)
    }
    require(len(found) > 0, f"suites.{name}: {root}/{config.split} holds no file *{end}")
    lacking = sorted(set(config.subjects) - set(found))
    require(not lacking, f"suites.{name}.subjects: {root}/{config.split} has no {', '.join(lacking)}")
    chosen = config.subjects or sorted(found)
    questions = [q for one in chosen for q in _read_csv(filesystem, found[one], one)]
    examples = {}
    for one in chosen:
        path = f"{root}/dev/{one}{end.replace(f'_{config.split}', '_dev')}"
        there = filesystem.get_file_info(path).is_file
        examples[one] = [q for q in _read_csv(filesystem, path, one) if q.is_whole() and q.key] if there else []
    return Benchmark(name, config.format, questions, examples)


def build_prompts(
    benchmark: Benchmark, header: str, num_shots: int, budget: int, count: Callable[[list[str]], list[int]]
) -> list[dict[str, object]]:
    """Every question as a row with its few-shot prompt.

    The examples stand first and are the same for a whole subject, so that the prefix cache holds them. A prompt that is
    too long loses its last example, and the next to last, until it fits.

    Args:
        benchmark: questions and examples.
        header: first line; {subject} stands for the subject's Chinese name.
        num_shots: worked examples per prompt.
        budget: most tokens of the text.
        count: texts → tokens of each.
    """
    rows: list[dict[str, object]] = []
    pending: list[tuple[dict[str, object], Question, int]] = []
    for question in benchmark.questions:
        id = doc_id(benchmark.name, question.subject, 0, f"{question.id}\n{question.block()}\n{len(rows)}")
        row: dict[str, object] = {"doc_id": id, "source": benchmark.name, "subject": question.subject, "meta": "{}"}
        row |= {"question_id": question.id, "key": question.key, "status": OK}
        rows.append(row)
        if question.is_whole():
            pending.append((row, question, min(num_shots, len(benchmark.examples[question.subject]))))
        else:
            row |= {"key": None, "status": FAILED, "reason": "missing_field"}
    while pending:
        texts = [_prompt(benchmark, header, question, shots) for _, question, shots in pending]
        again = []
        for (row, question, shots), text, tokens in zip(pending, texts, count(texts), strict=True):
            if tokens <= budget:
                row |= {"text": text, "tokens": tokens, "num_shots": shots}
            elif shots:
                again.append((row, question, shots - 1))
            else:
                row |= {"tokens": tokens, "num_shots": 0, "status": FAILED, "reason": "over_context"}
        pending = again
    return rows


def _prompt(benchmark: Benchmark, header: str, question: Question, shots: int) -> str:
    examples = benchmark.examples[question.subject][:shots]
    lines = [header.replace("{subject}", subject(benchmark.format, question.subject).name)]
    lines += [f"{example.block()}\n答案：{example.key}" for example in examples]
    return "\n\n".join([*lines, question.block()])


def _root(name: str, config: BenchmarkConfig) -> tuple[fs.FileSystem, str]:
    filesystem, path = store.resolve(config.path)
    for root in (path, f"{path}/data", f"{path}/formal_ceval"):
        if filesystem.get_file_info(f"{root}/{config.split}").type == fs.FileType.Directory:
            return filesystem, root
    raise ConfigError(
        f"suites.{name}.path: {config.path} has no folder {config.split}/ (nor data/{config.split}/): give the folder of "
        f"the unpacked {config.format} files, which holds dev/ and {config.split}/, or choose other suites with benchmarks=[…]"
    )


def _read_csv(filesystem: fs.FileSystem, path: str, subject_id: str) -> list[Question]:
    with filesystem.open_input_stream(path) as stream:
        text = stream.read().decode("utf-8-sig", "replace")
    found = []
    for number, raw in enumerate(csv.DictReader(io.StringIO(text))):
        row = {(name or "").strip().lower(): value for name, value in raw.items() if isinstance(value, str)}
        if number == 0 and not {"question", "a", "b", "c", "d"} <= set(row):
            raise ConfigError(
                f"{path} has the columns {', '.join(map(str, raw))}; expected question, A, B, C, D and answer"
            )
        clean = {name: unify_radicals(value).strip() for name, value in row.items()}
        options = tuple(clean.get(letter.lower(), "") for letter in LETTERS)
        id = row.get("id", row.get("", str(number)))
        found.append(Question(subject_id, id, clean.get("question", ""), options, clean.get("answer") or None))
    return found
