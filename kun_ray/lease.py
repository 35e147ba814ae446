"""One run at a time in a stage folder: a lease, `_lease.json`, that its holder renews while it lives.

Every stage opens its folder through `opened`. The lease goes through pyarrow.fs like all else, so it holds between hosts
that share no more than an object store. Such stores have no "create if absent" that pyarrow offers: a holder writes
first and then looks whether the last word is its own, at once and at each renewal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyarrow import fs

from kun_ray.config import KunError, without_credentials
from kun_ray.store import Folder, is_local, open_stage

LEASE = "_lease.json"
LEASE_S = 60.0
"""Default of every stage's `lease_s`."""


@contextlib.contextmanager
def opened(
    uri: str, fingerprint: dict[str, Any], config: dict[str, Any], lease_s: float, reopen: bool = False
) -> Iterator[Folder]:
    """`store.open_stage`, and unless the stage is complete, held by this run alone until the end of the block.

    Args:
        uri, fingerprint, config: as for open_stage.
        lease_s: seconds without a sign of life after which the holder counts as dead. A holder on this very host whose
            process is gone counts as dead at once.
        reopen: whether a complete stage is held as well, since rows of it will be replaced.
    Raises:
        KunError: as open_stage; another run holds the folder, or has taken it while this one was cut off from it.
    """
    folder = open_stage(uri, fingerprint, config)
    if folder.is_complete() and not reopen:
        yield folder
        return
    with held(folder, lease_s):
        open_stage(uri, fingerprint, config)  # another run may have begun the folder in the same second
        yield folder


@contextlib.contextmanager
def held(folder: Folder, lease_s: float) -> Iterator[None]:
    """A folder that is there, held by this run alone until the end of the block. Raises KunError as `opened` does."""
    lease = _Lease(folder, lease_s)
    lease.take()
    try:
        yield
    except KeyboardInterrupt:
        lease.end()
        if lease.lost_to is None:
            raise
        raise KunError(
            f"{without_credentials(folder.uri)} was taken over by {_who(lease.lost_to)}: this run had not renewed its lease for "
            f"{lease_s:g} s. What it had written stays; the other run goes on with it."
        ) from None
    finally:
        lease.release()


class _Lease:
    """This process's hold on one folder, renewed by a thread."""

    def __init__(self, folder: Folder, lease_s: float) -> None:
        self._folder, self._lease_s = folder, lease_s
        self._token = uuid.uuid4().hex
        self._since = time.time()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew_forever, name="lease", daemon=True)
        self.lost_to: dict[str, Any] | None = None

    def take(self) -> None:
        """Writes the lease and starts its renewal. Raises KunError when a living run holds the folder."""
        shown = without_credentials(self._folder.uri)
        self._refuse_if_held(shown, read(self._folder))
        try:
            self._write()
        except OSError as error:
            raise KunError(f"cannot write to {shown}: {error}; mend its permissions or space") from None
        time.sleep(0.1 if is_local(self._folder.uri) else 1.0)  # of two that began together, the later one stays
        holder = read(self._folder)
        if holder is None or holder["token"] != self._token:
            self._refuse_if_held(shown, holder)
        self._drop_leftovers()
        self._thread.start()

    def end(self) -> None:
        """No further renewal, and no further signal if the lease is lost."""
        self._ended.set()

    def release(self) -> None:
        """Ends the renewal and removes the lease if it is still this run's."""
        self.end()
        if self._thread.is_alive():
            self._thread.join(self._lease_s)
        with contextlib.suppress(OSError):
            holder = read(self._folder)
            if holder is not None and holder["token"] == self._token:
                self._folder.filesystem.delete_file(self._folder.child(LEASE))

    def _refuse_if_held(self, shown: str, holder: dict[str, Any] | None) -> None:
        if holder is None or not _is_alive(holder, self._lease_s):
            return
        age = time.time() - holder["renewed"]
        raise KunError(
            f"{shown} is in use by {_who(holder)}, which gave a sign of life {age:.0f} s ago. Let it end or stop it, or "
            f"give this run its own output=. If it is dead: its lease ends {max(0.0, self._lease_s - age):.0f} s from now."
        )

    def _drop_leftovers(self) -> None:
        """Deletes files that a killed run was about to rename."""
        infos = self._folder.filesystem.get_file_info(fs.FileSelector(self._folder.path))
        for info in infos:
            if info.is_file and info.base_name.endswith(".tmp") and not info.base_name.startswith(LEASE):
                self._folder.filesystem.delete_file(info.path)

    def _write(self) -> None:
        now = time.time()
        own = {"host": socket.gethostname(), "place": _place(), "pid": os.getpid(), "born": _born(os.getpid())}
        self._folder.write_json(LEASE, {**own, "token": self._token, "since": self._since, "renewed": now})

    def _renew_forever(self) -> None:
        while not self._ended.wait(self._lease_s / 6):
            with contextlib.suppress(OSError):  # a full disk or a cut network: the next turn may do
                holder = read(self._folder)
                if holder is not None and holder["token"] != self._token:
                    self.lost_to = holder
                    break
                self._write()
        while self.lost_to is not None and not self._ended.is_set():  # two writers would give rows twice
            os.kill(os.getpid(), signal.SIGINT)  # the first one only asks generate to finish its rows
            self._ended.wait(2.0)


def holder(folder: Folder, lease_s: float) -> str | None:
    """Who holds a folder now, in words; None if nobody does."""
    found = read(folder)
    return _who(found) if found is not None and _is_alive(found, lease_s) else None


def read(folder: Folder) -> dict[str, Any] | None:
    """The lease in a folder; None when there is none, or when what is there is not one."""
    try:
        found = folder.read_json(LEASE)
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and {"host", "pid", "token", "since", "renewed"} <= set(found) else None


def _is_alive(holder: dict[str, Any], lease_s: float) -> bool:
    if holder.get("place") is not None and holder["place"] == _place() and _born(holder["pid"]) != holder["born"]:
        return False
    return bool(time.time() - holder["renewed"] < lease_s)


def _place() -> str | None:
    """Where a process number means the same process: this boot of this machine, this container. None if unknown."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _born(pid: int) -> str | None:
    """When a process started, so that another one with the same number is not taken for it; None if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _who(holder: dict[str, Any]) -> str:
    since = time.strftime("%F %T", time.localtime(holder["since"]))
    return f"another run (host {holder['host']}, process {holder['pid']}, since {since})"
