"""Archives and Parquet files as bytes, also such as no honest program writes."""

from __future__ import annotations

import io
import tarfile
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def tar(*members: tuple[str, bytes] | tarfile.TarInfo, format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def with_size(data: bytes, field: bytes) -> bytes:
    """A tar whose first header claims another size, its checksum mended."""
    head = bytearray(data[:512])
    head[124:136] = field
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + data[512:]


def parquet(columns: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), buffer, **options)
    return buffer.getvalue()


def lying(*values: bytes) -> pa.Array:
    """Strings that are none: Arrow believes what the file says."""
    return pa.StringArray.from_buffers(len(values), *pa.array(values, pa.binary()).buffers()[1:])
