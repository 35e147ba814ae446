"""A full disk and a read-only output: one clear error, no half file, and the same command goes on. Needs root for mounts."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from chains import ids

from kun_ray.config import KunError
from kun_ray.generate import generate


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up(cluster, documents, chain, small_disk):
    source = documents(600)
    job = chain(source, {"label": ["label"]})
    output = small_disk / "generate"
    (small_disk / "filler").write_bytes(bytes((2 << 20) - (160 << 10)))
    with pytest.raises(KunError, match=r"No space left on device(?s:.)*run the same command again"):
        generate(job.config(f"output={output}"))
    parts = sorted(output.glob("part-*.parquet"))
    assert all(pq.read_table(part).num_rows > 0 for part in parts), "no half file"
    assert not (output / "_SUCCESS").exists()

    with pytest.raises(KunError, match="No space left on device"):
        generate(job.config(f"output={output}"))
    (small_disk / "filler").unlink()
    assert generate(job.config(f"output={output}"))["rows"] == 600
    job.output = str(output)
    assert ids(job.folder()) == ids(source)


def test_an_output_that_cannot_be_written(cluster, documents, chain, small_disk):
    source = documents(20)
    job = chain(source, {"label": ["label"]})
    new, begun = small_disk / "new", small_disk / "begun"
    generate(job.config(f"output={begun}"))
    (begun / "_SUCCESS").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for output in (new, begun):
        with pytest.raises(KunError, match=f"cannot write to {output}.*Read-only file system"):
            generate(job.config(f"output={output}"))
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    for output in (new, begun):
        assert generate(job.config(f"output={output}"))["rows"] == 20
