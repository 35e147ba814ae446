"""Conversations → token ids with a mask of what the assistant says, kept as Parquet for the ranks. Runs on the driver.

Alpaca and ShareGPT files and export folders are read; prompts are rendered as in inference (prompts.py). A sample is left
out, and counted by reason, when it is broken or longer than max_tokens; nothing is ever cut.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from kun_ray.config import ConfigError
from kun_ray.formats import conversation
from kun_ray.prompts import Chat, PromptConfig, build_chat
from kun_ray.steps import StepsConfig
from kun_ray.store import Folder, resolve
from kun_ray.train.config import DataConfig

if TYPE_CHECKING:  # transformers takes seconds to import, and most processes never need it
    from transformers import PreTrainedTokenizerFast

EXPORTED = ("sharegpt/{}.jsonl", "alpaca/{}.jsonl")
"""Files of an export that training reads, the first that is there."""
SAMPLES = pa.schema(
    [("ids", pa.list_(pa.int32())), ("num_prompt", pa.int32()), ("said", pa.binary()), ("data", pa.int16())]
)
"""One row a sample: token ids, tokens before the first reply, packed bits of what the assistant says, index into `data`."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """Tokenised samples of one split, in memory as flat arrays.

    Attributes:
        ids: all samples' tokens one after the other, int32 [tokens].
        said: whether the assistant says the token, bool [tokens].
        starts: where each sample begins, int64 [samples + 1].
        data: which entry of the configuration a sample comes from, int16 [samples].
    """

    ids: np.ndarray[Any, Any]
    said: np.ndarray[Any, Any]
    starts: np.ndarray[Any, Any]
    data: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """Tokens of each sample, int64 [samples]."""
        return np.diff(self.starts)

    def sample(self, index: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """(ids, said) of one sample."""
        window = slice(self.starts[index], self.starts[index + 1])
        return self.ids[window], self.said[window]

    @functools.cached_property
    def num_supervised(self) -> np.ndarray[Any, Any]:
        """Tokens of each sample that the loss counts, int64 [samples]. The first token is never predicted."""
        counted = self.said.copy()
        counted[self.starts[:-1]] = False
        return np.diff(np.concatenate([[0], np.cumsum(counted)])[self.starts])


def tokenize(
    entries: list[DataConfig],
    steps: StepsConfig,
    tokenizer: PreTrainedTokenizerFast,
    max_tokens: int,
    folder: Folder,
    name: str,
) -> dict[str, Any]:
    """Reads and renders every entry and writes `data/<name>.parquet` below `folder`.

    Returns:
        Counts: samples, tokens, supervised tokens, and what was left out by reason; and a digest of the tokens.
    Raises:
        ConfigError: a file is missing, of no known layout, or no sample is left.
    """
    counts: collections.Counter[str] = collections.Counter(samples=0, tokens=0, supervised_tokens=0)
    left_out: collections.Counter[str] = collections.Counter()
    examples: dict[str, str] = {}
    digest = hashlib.blake2b(digest_size=16)
    folder.filesystem.create_dir(folder.child("data"), recursive=True)
    with (
        folder.filesystem.open_output_stream(folder.child(f"data/{name}.parquet.tmp")) as stream,
        pq.ParquetWriter(stream, SAMPLES) as writer,
    ):
        rows: list[dict[str, Any]] = []
        for index, entry in enumerate(entries):
            chats = Chats(tokenizer, prompt_of(entry, steps))
            for where, record in _records(entry):
                sample = _sample(entry, record, chats) if isinstance(record, dict) else "bad_record"
                if not isinstance(sample, str) and len(sample[0]) > max_tokens:
                    sample = "too_long"
                if isinstance(sample, str):
                    left_out[sample] += 1
                    examples.setdefault(sample, where)
                    continue
                ids, said = sample
                counts.update(samples=1, tokens=len(ids), supervised_tokens=sum(said[1:]))
                packed = np.packbits(np.array(said, dtype=bool)).tobytes()
                digest.update(np.array(ids, dtype=np.int32).tobytes() + packed)
                rows.append({"ids": ids, "num_prompt": said.index(True), "said": packed, "data": index})
                if len(rows) == 4096:
                    writer.write_table(pa.Table.from_pylist(rows, SAMPLES))
                    rows = []
        writer.write_table(pa.Table.from_pylist(rows, SAMPLES))
    folder.filesystem.move(folder.child(f"data/{name}.parquet.tmp"), folder.child(f"data/{name}.parquet"))
    if not counts["samples"]:
        why = ", ".join(f"{count} {reason} (first: {examples[reason]})" for reason, count in left_out.items())
        raise ConfigError(f"no sample of {', '.join(e.path for e in entries)} can be used: {why or 'no records'}")
    return {**counts, "left_out": dict(left_out), "first_left_out": examples, "digest": digest.hexdigest()}


def read_samples(folder: Folder, name: str) -> Samples:
    """What `tokenize` wrote."""
    with folder.filesystem.open_input_file(folder.child(f"data/{name}.parquet")) as file:
        table = pq.read_table(file).combine_chunks()
    column = table["ids"].chunk(0) if table.num_rows else pa.array([], SAMPLES.field("ids").type)
    starts = np.asarray(column.offsets, dtype=np.int64)
    lengths = np.diff(starts)
    said = [
        np.unpackbits(np.frombuffer(bits, np.uint8), count=int(n)).astype(bool)
        for bits, n in zip(table["said"].to_pylist(), lengths, strict=True)
    ]
    flat = np.concatenate(said) if said else np.zeros(0, dtype=bool)
    return Samples(np.asarray(column.values), flat, starts, np.asarray(table["data"]))


def prompt_of(entry: DataConfig, steps: StepsConfig) -> PromptConfig:
    """The first user's turn that an entry's samples begin with, as in inference."""
    if entry.task == "chat":
        return PromptConfig(user="{instruction}", system=entry.system)
    prompt: PromptConfig = getattr(steps, entry.task).prompt
    return dataclasses.replace(prompt, system=entry.system) if entry.system else prompt


class Chats:
    """Conversations of one prompt, rendered; each number of turns is laid out once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, prompt: PromptConfig) -> None:
        self.prompt = prompt
        self._tokenizer = tokenizer
        self._laid_out: dict[tuple[int, bool], Chat] = {}

    def render(self, turns: int, system: str | None, values: dict[str, str]) -> tuple[list[int], list[bool]]:
        """(ids, said); a record's own `system` turn is text, and stands where the entry gives none."""
        own = bool(system) and not self.prompt.system
        if (turns, own) not in self._laid_out:
            prompt = dataclasses.replace(self.prompt, system="{title}") if own else self.prompt
            self._laid_out[turns, own] = build_chat(self._tokenizer, prompt, turns)
        return self._laid_out[turns, own].render({**values, "title": system or ""})


def pairs(path: str) -> Iterator[tuple[str, str]]:
    """(user, assistant) of every turn in a file of conversations or an export; what cannot be read is left out."""
    for _, record in _records(DataConfig(path=path)):
        found = conversation(record) if isinstance(record, dict) else None
        yield from found[1] if found is not None else ()


def count(entry: DataConfig) -> tuple[int, int]:
    """(samples, pairs of user and assistant in them) of an entry, as training takes them: what cannot be read, or what
    max_samples cuts off, is left out; too long ones are not, for nothing is tokenised."""
    samples = num_pairs = 0
    for _, record in _records(entry):
        found = conversation(record) if isinstance(record, dict) else None
        if found is not None:
            samples += 1
            num_pairs += 1 if entry.task == "label" else len(found[1])
    return samples, num_pairs


def _sample(entry: DataConfig, record: dict[str, Any], chats: Chats) -> Any:
    """(ids, said) of one record, or the reason why it cannot be used."""
    found = conversation(record)
    if found is None:
        return "bad_record"
    system, turns, extra = found
    question, answer = turns[0]
    fields = chats.prompt.fields()
    if entry.task == "label":
        turns, question = turns[:1], f"{question}\n{extra}" if extra else question
        values = {"text": answer, "reply0": question}
    else:
        if extra and "text" not in fields:
            question = f"{question}\n{extra}"
        values = {"instruction": question, "text": extra}
        values |= {
            f"{who}{n}": text for n, turn in enumerate(turns) for who, text in zip(("user", "reply"), turn, strict=True)
        }
    if not all(values.get(name) for name in fields) or not all(values[f"reply{n}"].strip() for n in range(len(turns))):
        return "empty_field"
    return chats.render(len(turns), system if entry.task == "chat" else None, values)


def is_export(folder: Folder) -> bool:
    """Whether it is an export's folder, or a published copy of one."""
    return folder.exists("dataset_info.json") or folder.exists("_SUCCESS")


def _records(entry: DataConfig) -> Iterator[tuple[str, Any]]:
    """(where it stands, record or None if it is broken) of an entry's file."""
    filesystem, path = resolve(entry.path)
    if is_export(Folder(entry.path)):
        names = [form.format(entry.split) for form in EXPORTED]
        name = next((name for name in names if Folder(entry.path).exists(name)), None)
        if name is None:
            raise ConfigError(f"{entry.path} holds none of {', '.join(names)}: export in the format alpaca or sharegpt")
        path = f"{path}/{name}"
    if not filesystem.get_file_info(path).is_file:
        raise ConfigError(
            f"data.path: there is no file {entry.path}; give a .jsonl or .json file, or an export's folder"
        )
    with filesystem.open_input_stream(path) as stream:
        for number, record in enumerate(_lines(stream, path)):
            if entry.max_samples is not None and number >= entry.max_samples:
                return
            yield f"{path}:{number + 1}", record


def _lines(stream: Any, path: str) -> Iterator[Any]:
    if not path.endswith(".jsonl"):
        try:
            whole = orjson.loads(stream.read())
        except ValueError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}; for one object a line name it .jsonl") from None
        if not isinstance(whole, list):
            raise ConfigError(f"{path} must hold a JSON array of samples")
        yield from whole
        return
    for line in io.BufferedReader(stream):  # type: ignore[type-var]
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError:
                yield None
