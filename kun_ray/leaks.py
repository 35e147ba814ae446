"""What must not leave with a file, and what its reader might not want to leave: credentials, paths of the own cluster.

release.py asks before it publishes. Of data only addresses of object stores count: a web page may hold anything else.
"""

from __future__ import annotations

import re
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from kun_ray.config import KunError, without_credentials
from kun_ray.models import WEIGHTS
from kun_ray.store import Folder

_STORE_SECRET: Final = re.compile(r"\b(?:s3a?|gs|gcs|abfss?|wasbs?|hdfs|oss|cosn?|obs)://[^\s/\"'@]*:[^\s/\"'@]*@")
_KEY: Final = re.compile(r"\bAKIA[0-9A-Z]{16}\b|\bhf_[A-Za-z0-9]{34}\b")
"""Key ids of AWS, tokens of the hub."""
_LOCAL_PATH: Final = re.compile(r"(?:^|(?<=[\s\"'`(|]))/(?:[\w.-]+/)+[\w.-]+", re.MULTILINE)
_BINARY: Final = (*WEIGHTS, ".model")
_SETTINGS: Final = ("README.md", "adapter_config.json")
"""Documents in which a configuration's paths stand."""


def refuse_secrets(folder: Folder, name: str) -> None:
    """Raises KunError when a file holds credentials: any in a document or beside Parquet's rows, those of stores in rows."""
    if name.endswith(".jsonl"):
        _refuse_in_lines(folder, name)
    elif not name.endswith(_BINARY):
        refuse_secrets_in(name, text(folder, name))
    if name.endswith(".parquet"):
        _refuse_in_rows(folder, name)


def refuse_secrets_in(name: str, found: str) -> None:
    """The same for a document's text."""
    match = _STORE_SECRET.search(found) or _KEY.search(found)
    if match or without_credentials(found) != found:
        raise KunError(_message(name, match))


def local_paths(folder: Folder, name: str) -> list[str]:
    """Absolute paths in the settings that a file holds."""
    if name.endswith(".parquet") or name in _SETTINGS:
        return list(dict.fromkeys(_LOCAL_PATH.findall(text(folder, name))))
    return []


def text(folder: Folder, name: str) -> str:
    """A document; of a Parquet file, what stands beside its rows."""
    if name.endswith(".parquet"):
        with folder.filesystem.open_input_file(folder.child(name)) as file:
            beside = pq.read_schema(file).metadata or {}
        return "\n".join(value.decode(errors="replace") for key, value in beside.items() if key != b"ARROW:schema")
    with folder.filesystem.open_input_stream(folder.child(name)) as stream:
        return bytes(stream.read()).decode(errors="replace")


def _refuse_in_lines(folder: Folder, name: str) -> None:
    with folder.filesystem.open_input_stream(folder.child(name)) as stream:
        rest = b""
        while chunk := stream.read(8 << 20):
            whole, newline, rest = (rest + chunk).rpartition(b"\n")
            if match := _STORE_SECRET.search((whole + newline).decode(errors="replace")):
                raise KunError(_message(name, match))
    if match := _STORE_SECRET.search(rest.decode(errors="replace")):
        raise KunError(_message(name, match))


def _refuse_in_rows(folder: Folder, name: str) -> None:
    with folder.filesystem.open_input_file(folder.child(name)) as file:
        for batch in pq.ParquetFile(file).iter_batches(1024):
            for column in (column for column in batch.columns if pa.types.is_string(column.type)):
                if match := _STORE_SECRET.search("\n".join(filter(None, column.to_pylist()))):
                    raise KunError(_message(name, match))


def _message(name: str, match: re.Match[str] | None) -> str:
    about = f" ({match[0][:5]}…)" if match else ""
    return f"{name} holds what looks like credentials{about}: nothing was published. Take them out of what made it, and make it anew"
