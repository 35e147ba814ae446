"""The Hugging Face hub: a release as a repository there. release.publish calls it; nothing else uploads.

Only a folder of links to exactly the release's files is handed to huggingface_hub, so nothing else can leave.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, constants, errors, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from pyarrow import fs

from kun_ray import __version__
from kun_ray.config import ConfigError, KunError, without_credentials

if TYPE_CHECKING:
    from huggingface_hub import DatasetInfo, ModelInfo

    from kun_ray.release import Release

TRANSPORT: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
"""The error of whichever HTTP client this huggingface_hub uses."""
GIT: tuple[str, ...] = (".gitattributes", ".gitignore")
"""What the hub itself puts into a repository."""


def upload(release: Release, repo: str, private: bool) -> None:
    """Makes the repository if need be, uploads everything in it, and compares what the hub then holds.

    Raises:
        ConfigError: no token, no network allowed, or a repository that is there and public where private was asked for,
            or private where public.
        KunError: the hub refuses or cannot be reached, the repository holds something else, or a file arrived otherwise.
    """
    if constants.is_offline_mode():
        raise ConfigError("HF_HUB_OFFLINE forbids to reach the hub: unset it")
    if get_token() is None:
        raise ConfigError("the hub wants a token that may write: run `hf auth login`, or set HF_TOKEN")
    names = {*release.files, *release.texts}
    with tempfile.TemporaryDirectory(prefix="kun_ray-") as folder, _explained(repo):
        stage(release, Path(folder))
        api = HfApi()
        _require_own(api, release.kind, repo, private, names)
        api.create_repo(repo, repo_type=release.kind, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            repo_type=release.kind,
            folder_path=folder,
            commit_message=f"Publish with kun_ray {__version__}",
        )
        _verify(api, release, repo)
    where = f"{constants.ENDPOINT}/{'datasets/' if release.kind == 'dataset' else ''}{repo}"
    print(f"published to {where} ({'private' if private else 'public'}); what the hub holds was compared", flush=True)


def stage(release: Release, folder: Path) -> None:
    """Fills a folder with links to the release's files, and the texts; files of an object store are copied."""
    local = release.folder.filesystem.type_name == "local"
    for name in release.files:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if local:
            os.symlink(release.folder.child(name), place)
        else:
            fs.copy_files(release.folder.child(name), str(place), release.folder.filesystem, fs.LocalFileSystem())
    for name, text in release.texts.items():
        (folder / name).write_text(text)


def _require_own(api: HfApi, kind: str, repo: str, private: bool, names: set[str]) -> None:
    """Refuses a repository that others can see against the wish, or that holds what is not part of this release."""
    try:
        found = _info(api, kind, repo)
    except RepositoryNotFoundError:
        return
    if private and found.private is False:
        raise ConfigError(f"{repo} is there already and is PUBLIC: give private=false, or another `to`")
    if not private and found.private:
        raise ConfigError(
            f"{repo} is there already and is private: make it public in its settings on the hub, or leave out private=false"
        )
    foreign = sorted({file.rfilename for file in found.siblings or []} - names - set(GIT))
    if foreign:
        raise KunError(
            f"{repo} holds something else ({', '.join(foreign[:3])}): give another `to`, or delete that there"
        )


def _info(api: HfApi, kind: str, repo: str, sizes: bool = False) -> DatasetInfo | ModelInfo:
    info = api.dataset_info if kind == "dataset" else api.model_info
    return info(repo, files_metadata=sizes)


def _verify(api: HfApi, release: Release, repo: str) -> None:
    """Compares size, and SHA-256 where the hub has one, of every file."""
    found = {file.rfilename: file for file in _info(api, release.kind, repo, True).siblings or []}
    sizes = {name: file.num_bytes for name, file in release.files.items()}
    sizes |= {name: len(text.encode()) for name, text in release.texts.items()}
    for name, size in sizes.items():
        there, expected = found.get(name), release.sums().get(name)
        same = there is not None and there.size == size and (there.lfs is None or there.lfs.sha256 == expected)
        if not same:
            raise KunError(f"{repo} does not hold {name} as it is here: run the same command again")


@contextlib.contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Errors of the hub and of the way to it, as one message."""
    said = {401: "the token is not valid (hf auth login)", 403: f"the token may not write to {repo}"}
    try:
        yield
    except ValueError as error:  # a wrong name, or a card that the hub cannot read: an unknown licence in its header
        raise ConfigError(f"the hub refuses this: {' '.join(str(error).split())}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        detail = without_credentials(str(error.server_message or error).strip().splitlines()[0])
        raise KunError(
            f"the hub answers {status}: {said.get(status, detail)}. What was uploaded is kept; run again"
        ) from None
    except (TRANSPORT, OSError) as error:
        raise KunError(f"{constants.ENDPOINT} cannot be reached, or the upload broke off: {error}; run again") from None
