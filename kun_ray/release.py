"""jobs/publish.py: what of a finished folder is shared, what must be true of it first, and the verified copy of it.

Nothing leaves without `push=true`; hub.py talks to the hub. Only what is listed is ever copied: data or model files,
README.md, dataset_info.json, a licence's text, SHA256SUMS; never checkpoints, logs, metrics or manifests.
"""

from __future__ import annotations

import dataclasses
import posixpath
import re
import shlex
import uuid
from pathlib import Path
from typing import Any, Final

import yaml
from omegaconf import MISSING
from pyarrow import fs

from kun_ray import card, checksums, inspection, leaks
from kun_ray.checksums import CHECKSUMS, Digests
from kun_ray.config import ConfigError, KunError, require, without_credentials
from kun_ray.modelcard import model_card
from kun_ray.store import MANIFEST, SUMMARY, Folder
from kun_ray.train.config import CARD, STAGING

LICENCES: Final = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
"""Files of yours that are published along with the rest, where they lie in the folder."""
_HUB_ID: Final = re.compile(r"\w[\w.-]*/[\w.-]+")


@dataclasses.dataclass
class PublishConfig:
    """jobs/publish.py: shares a finished folder."""

    input: str = MISSING
    """Folder of a finished export, of a finished training, or the model in one. May be given without `input=`."""
    to: str = MISSING
    """A path (or URI) that does not exist yet, or `owner/name` on the Hugging Face hub; also written `--to X`. A relative path
    of two parts begins with `./`."""
    push: bool = False
    """Whether to publish; false only shows what would be published."""
    private: bool = True
    """Whether a repository of the hub is private."""
    licence: str | None = None
    """Licence of a model, as a Hugging Face identifier such as `apache-2.0`; a dataset's was given to jobs/export.py."""

    def is_hub(self) -> bool:
        """Whether `to` is a repository of the hub."""
        owner = Path(self.to.partition("/")[0])
        return _HUB_ID.fullmatch(self.to) is not None and not owner.is_dir()


@dataclasses.dataclass
class Release:
    """What is published."""

    kind: str
    """`dataset` or `model`, as the hub calls them."""
    folder: Folder
    files: dict[str, Digests]
    """Every file that is taken from the folder, as it was read and found right."""
    texts: dict[str, str]
    """Files that publishing writes: SHA256SUMS, and a model's README.md if it has none."""
    licence: str | None
    terms: list[str]
    """A line for each source."""
    unsaid: list[str]
    """What has to be said before everybody may see it, with the key to say it."""

    def sums(self) -> dict[str, str]:
        """Path → SHA-256 of everything but SHA256SUMS itself."""
        return checksums.read_text(self.texts[CHECKSUMS])


def publish(config: PublishConfig) -> Release:
    """Checks a folder, shows what would be published, and publishes it if `push`.

    Raises:
        ConfigError: what is published, or where, is not clear; or a public dataset lacks its licence.
        KunError: a file is not what it was, holds credentials, or the target refuses.
    """
    release = read_release(config)
    show(release, config)
    if config.is_hub() and not config.private and release.unsaid:
        raise ConfigError(
            f"not for a public repository: {'; '.join(release.unsaid)}. Or keep it private (private=true)"
        )
    for line in release.unsaid:
        print(f"warning: {line}, before others see it")
    if not config.push:
        print(f"a dry run: nothing was written. This publishes it:\n  {command(config)}", flush=True)
    elif config.is_hub():
        from kun_ray import hub

        hub.upload(release, config.to, config.private)
    else:
        copy(release, config.to)
    return release


def read_release(config: PublishConfig) -> Release:
    """What a folder has to publish, read and verified file by file. Raises KunError as `publish` does."""
    given, shown = Folder(config.input), without_credentials(config.input)
    if given.exists(f"model/{CARD}"):
        _require_complete(given)
        release = _model(given.below("model"), given.read_json(SUMMARY), inspection.trained_on(given), config)
    elif given.exists(CARD) and posixpath.basename(given.path) != STAGING:
        release = _model(given, {}, {}, config)
    elif given.exists(MANIFEST) and "selection" in (given.read_json(MANIFEST).get("fingerprint") or {}):
        _require_complete(given)
        require(config.licence is None, "licence: a dataset's is on its card already; give it to jobs/export.py")
        release = _dataset(given)
    else:
        raise KunError(
            f"{shown} is neither an export nor a trained model: input= must be a folder that export or train finished"
        )
    for name in release.files:
        leaks.refuse_secrets(release.folder, name)
    for name, text in release.texts.items():
        leaks.refuse_secrets_in(name, text)
    return release


def show(release: Release, config: PublishConfig) -> None:
    """Prints what would be published."""
    where = (
        f"{'private' if config.private else 'PUBLIC'} {release.kind} {config.to} on the hub"
        if config.is_hub()
        else config.to
    )
    print(f"{release.kind} {without_credentials(release.folder.uri)} → {without_credentials(where)}")
    print(f"licence: {release.licence or 'not given'}")
    print("".join(f"source {line}\n" for line in release.terms), end="")
    sizes = {name: file.num_bytes for name, file in release.files.items()}
    sizes |= {name: len(text.encode()) for name, text in release.texts.items()}
    for name in sorted(sizes):
        print(f"{sizes[name]:>16,}  {name}")
    print(f"{sum(sizes.values()):>16,}  bytes in {len(sizes)} files; the checksums of all that were recorded are right")
    others = sorted({name.partition("/")[0] for name in _names(release.folder)} - {n.partition("/")[0] for n in sizes})
    if others:
        print(f"stays here: {', '.join(others)}")
    for name in release.files:
        found = leaks.local_paths(release.folder, name)
        if found:
            print(f"note: {name} names paths of this cluster, such as {found[0]}")


def copy(release: Release, to: str) -> None:
    """Copies into a temporary name beside `to`, verifies the copy, renames it.

    Object stores have no rename: there SHA256SUMS comes last, and what lacks it is half a copy.

    Raises:
        KunError: `to` holds something else, cannot be written, or the copy is not the same.
    """
    target, shown = Folder(to), without_credentials(to)
    if target.filesystem.get_file_info(target.path).is_file:
        raise KunError(f"{shown} is a file: give a folder that is not there yet")
    held = _names(target)
    if held:
        if set(held) == {*release.files, *release.texts} and checksums.read(target) == release.sums():
            _verify(target, release)
            print(f"{shown} holds exactly this already: nothing to do")
            return
        raise KunError(f"{shown} holds something else ({', '.join(held[:3])}, …): give another `to`, or delete it")
    base, mark, options = to.partition("?")
    renames = target.filesystem.type_name in ("local", "hdfs")
    staging = Folder(f"{base.rstrip('/')}.tmp-{uuid.uuid4().hex[:8]}{mark}{options}") if renames else target
    try:
        for name in release.files:
            staging.filesystem.create_dir(posixpath.dirname(staging.child(name)), recursive=True)
            fs.copy_files(
                release.folder.child(name), staging.child(name), release.folder.filesystem, staging.filesystem
            )
        for name in sorted(release.texts, key=lambda name: name == CHECKSUMS):
            with staging.filesystem.open_output_stream(staging.child(name)) as stream:
                stream.write(release.texts[name].encode())
        _verify(staging, release)
        if renames:
            target.filesystem.move(staging.path, target.path)
    except OSError as error:
        raise KunError(f"cannot publish to {shown}: {error}; what is there now is not whole") from None
    finally:
        if renames and staging.exists():
            staging.filesystem.delete_dir(staging.path)
    print(f"published to {shown}; the copy is verified, and `sha256sum -c {CHECKSUMS}` there does it again", flush=True)


def command(config: PublishConfig) -> str:
    """The command that publishes."""
    more = [f"licence={config.licence}"] if config.licence else []
    more += [] if config.private else ["private=false"]
    return shlex.join(["python", "jobs/publish.py", config.input, "--to", config.to, *more, "push=true"])


def _dataset(folder: Folder) -> Release:
    summary, settings = folder.read_json(SUMMARY), folder.read_json(MANIFEST)["fingerprint"]
    recorded, sums = {file["path"]: file["sha256"] for file in summary["files"]}, checksums.read(folder)
    if not sums or any(sums.get(path) != sha for path, sha in recorded.items()):
        raise KunError(
            f"{folder.uri}: {CHECKSUMS} does not hold what {SUMMARY} does: run this export again into another folder"
        )
    files = {}
    for name, expected in sums.items():
        files[name] = _digests(folder, name)
        if files[name].sha256 != expected:
            raise KunError(_changed(folder, name, expected, files[name].sha256))
    files |= {name: _digests(folder, name) for name in LICENCES if folder.exists(name)}
    given = {name: card.SourceConfig(**entry) for name, entry in settings["sources"].items()}
    sources = {name: card.source_of(name, given) for name in summary["sources"]}
    licence = str(settings["licence"])
    unsaid = [f"give licence=… to jobs/export.py, for it is {licence!r}"] if licence == "other" else []
    unsaid += [
        f"give sources.{name}.licence=… to jobs/export.py, for the terms of {name} are not stated"
        for name, source in sources.items()
        if source.licence == card.NOT_STATED
    ]
    terms = [f"{name}: {source.name}; {source.licence}" for name, source in sources.items()]
    return Release("dataset", folder, files, {CHECKSUMS: _sums(files, {})}, licence, terms, unsaid)


def _model(folder: Folder, summary: dict[str, Any], data: dict[str, list[str]], config: PublishConfig) -> Release:
    described = folder.read_json(CARD)
    files = {}
    for name, expected in described["files"].items():
        files[name] = _digests(folder, name)
        if files[name].blake2b != expected:
            raise KunError(_changed(folder, name, expected, files[name].blake2b))
    files |= {name: _digests(folder, name) for name in ("README.md", *LICENCES) if folder.exists(name)}
    texts = {}
    licence = config.licence
    if "README.md" in files:
        require(licence is None, f"licence: {folder.uri}/README.md says its own; change it there")
        licence = _licence_in(leaks.text(folder, "README.md"))
    else:
        name = posixpath.basename(config.to.partition("?")[0].rstrip("/"))
        texts["README.md"] = model_card(name, described, summary, data, licence)
    unsaid = [] if licence else ["give licence=…, for nothing says under which one this model is"]
    terms = [f"base model: {described['base']}, whose own terms hold too"]
    terms += [f"{name}: {line}" for name, corpora in data.items() for line in corpora]
    if any(data.values()):
        print(
            f"warning: the corpora below have terms of their own; check that {licence or 'your licence'} agrees with them"
        )
    return Release("model", folder, files, {**texts, CHECKSUMS: _sums(files, texts)}, licence, terms, unsaid)


def _sums(files: dict[str, Digests], texts: dict[str, str]) -> str:
    found = {name: file.sha256 for name, file in files.items()}
    return checksums.write(found | {name: checksums.sha256(text) for name, text in texts.items()})


def _verify(folder: Folder, release: Release) -> None:
    for name, expected in release.sums().items():
        found = _digests(folder, name)
        if found.sha256 != expected:
            raise KunError(f"the copy is not the same: {_changed(folder, name, expected, found.sha256)}")


def _digests(folder: Folder, name: str) -> Digests:
    try:
        return checksums.digests(folder, name)
    except OSError as error:
        raise KunError(
            f"{without_credentials(folder.uri)}/{name} cannot be read: {error}; make the folder anew"
        ) from None


def _changed(folder: Folder, name: str, expected: str, found: str) -> str:
    place = f"{without_credentials(folder.uri)}/{name}"
    return f"{place} has changed since it was written ({expected[:12]}… then, {found[:12]}… now): put it back, or make the folder anew"


def _require_complete(folder: Folder) -> None:
    if not folder.is_complete():
        raise KunError(
            f"{without_credentials(folder.uri)} is not complete (no _SUCCESS): run its job again, then publish"
        )


def _names(folder: Folder) -> list[str]:
    """Every file below a folder, by its path in it."""
    selector = fs.FileSelector(folder.path, recursive=True, allow_not_found=True)
    found = [info.path for info in folder.filesystem.get_file_info(selector) if info.is_file]
    return sorted(path[len(folder.path) :].lstrip("/") for path in found)


def _licence_in(readme: str) -> str | None:
    match = re.match(r"---\n(.*?)\n---", readme, re.DOTALL)
    header = yaml.safe_load(match[1]) if match else None
    return str(header["license"]) if isinstance(header, dict) and header.get("license") else None
