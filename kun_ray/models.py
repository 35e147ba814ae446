"""Where a model's files are: local folders, object stores, hub ids; copies on a node; identity of the weights.

generate and prepare call it on the driver, pools on their nodes. It reads files and never loads a model.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import huggingface_hub
from pyarrow import fs

from kun_ray.config import ConfigError
from kun_ray.store import Folder, resolve

WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")
"""What families of models call the longest context in config.json."""


OTHER_FILES = ("revision", "code_revision", "tokenizer_revision", "hf_overrides", "hf_config_path")
"""vLLM arguments with which an engine would go by other files than kun_ray, which renders prompts with the model's
tokenizer, takes the context from its config.json and its identity from the folder or the hub id."""


def refuse_other_files(engine: dict[str, Any], key: str) -> None:
    """Raises ConfigError when vLLM arguments name other files than the model's own."""
    for name in OTHER_FILES:
        if engine.get(name):
            raise ConfigError(
                f"{key}.{name}: kun_ray would not know of it. Download the revision that you want into a folder (`hf download "
                "<id> --revision <revision> --local-dir <folder>`), change its config.json there, and give that folder as model"
            )


def is_missing_folder(model: str) -> bool:
    """Whether a model is written like a path or URI (not like a hub id, `owner/name`) and is not there."""
    if "://" in model:
        return not Folder(model).exists()
    if os.path.isdir(os.path.expanduser(model)):
        return False
    owner, _, name = model.partition("/")
    return not name or "/" in name or model.startswith((".", "/", "~")) or Path(owner).is_dir()


def require_on_hub(model: str, key: str) -> None:
    """Raises ConfigError, within seconds, when a hub id is neither in this machine's cache nor to be had from the hub."""
    from huggingface_hub import constants, get_token, try_to_load_from_cache

    if (
        "://" in model
        or Path(model).expanduser().is_dir()
        or isinstance(try_to_load_from_cache(model, "config.json"), str)
    ):
        return
    neither = f"{key}: there is no folder {model} here"
    if constants.is_offline_mode():
        raise ConfigError(f"{neither}, and HF_HUB_OFFLINE forbids to look for it on the hub")
    url = f"{constants.ENDPOINT}/{model}/resolve/main/config.json"
    headers = {"authorization": f"Bearer {token}"} if (token := get_token()) else {}
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD", headers=headers), timeout=8).close()
    except urllib.error.HTTPError as error:
        raise ConfigError(f"{neither}, and {constants.ENDPOINT} answers {error.code} for it ({error.reason})") from None
    except OSError as error:
        raise ConfigError(f"{neither}, and {constants.ENDPOINT} cannot be reached ({error}): mend the path") from None


def absolute(path: str) -> str:
    """A local path as other processes can use it, whose working folder may be another; URIs and hub ids as they are."""
    local = os.path.expanduser(path)
    return os.path.abspath(local) if "://" not in path and os.path.exists(local) else path


def fetch_model(model: str, weights: bool = True) -> str:
    """A model as something transformers and vLLM can load: object-store folders are copied to this node once.

    Local folders and hub ids are returned as they are. A copy appears under its final name only when it is whole.
    With `weights=False` only its small files are copied: tokenizer and configuration.
    """
    if "://" not in model:
        return os.path.abspath(os.path.expanduser(model)) if os.path.isdir(os.path.expanduser(model)) else model
    filesystem, source = resolve(model)
    cache = Path(os.environ.get("KUN_RAY_CACHE", Path.home() / ".cache" / "kun_ray")) / "models"
    target = cache / hashlib.blake2b(f"{model} {model_digest(model)} {weights}".encode(), digest_size=12).hexdigest()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache.parent / f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # replicas of one node start together; the first copies, the others wait
        _copy_model(filesystem, source, target, weights)
    return str(target)


def context_length(path: str, key: str) -> float:
    """The longest input in tokens that a model's config.json allows; infinite where it says nothing.

    Read as JSON: transformers' own classes for it import torch, which takes longer than all other checks together.

    Args:
        path: what `fetch_model` returned.
        key: of the configuration, for the message.

    Raises:
        ConfigError: config.json is missing or is not a model's.
    """
    try:
        file = f"{path}/config.json" if os.path.isdir(path) else huggingface_hub.hf_hub_download(path, "config.json")
        config = json.loads(Path(file).read_text())
        if "model_type" not in config:
            raise ValueError("its config.json names no model_type")
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{key}: {path} cannot be read as a model: {str(error).splitlines()[0]}") from None
    config = config.get("text_config") or config
    lengths = [config[name] for name in CONTEXT_NAMES if isinstance(config.get(name), int)]
    return min(lengths, default=math.inf)


def local_folder(model: str) -> str:
    """A folder on this node that holds the model, weights and all; a hub id is downloaded into the hub's cache."""
    path = fetch_model(model)
    if os.path.isdir(path):
        return path
    return huggingface_hub.snapshot_download(
        path, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack"]
    )


def _copy_model(filesystem: fs.FileSystem, source: str, target: Path, weights: bool) -> None:
    cache = target.parent
    if not target.is_dir():
        staging = tempfile.mkdtemp(dir=cache)
        try:
            for info in filesystem.get_file_info(fs.FileSelector(source)):
                if info.is_file and (weights or not info.base_name.endswith(WEIGHTS)):
                    fs.copy_files(info.path, f"{staging}/{info.base_name}", filesystem, fs.LocalFileSystem())
            os.rename(staging, target)
        except OSError:
            if not target.is_dir():  # else another replica on this node was faster
                raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def model_digest(model: str) -> str:
    """Identity of a model's files: names, sizes, whole small files and both ends of large ones; a hub id stands for itself."""
    if "://" not in model and not os.path.isdir(os.path.expanduser(model)):
        return model
    filesystem, path = resolve(model)
    digest = hashlib.blake2b(digest_size=16)
    for info in sorted(filesystem.get_file_info(fs.FileSelector(path)), key=lambda i: i.base_name):
        if info.is_file:
            digest.update(f"{info.base_name} {info.size}\n".encode())
            with filesystem.open_input_file(info.path) as file:
                digest.update(file.read(1 << 20))
                digest.update(file.read_at(min(info.size, 1 << 20), max(0, info.size - (1 << 20))))
    return digest.hexdigest()


def read_chat_template(chat_template: str | None) -> str | None:
    """A pool's chat template with a file's path replaced by its content, so that workers and the fingerprint have it."""
    if chat_template is None or chat_template == "chatml" or "{" in chat_template:
        return chat_template
    path = Path(chat_template).expanduser()
    if not path.is_file():
        raise ConfigError(f"chat_template: no file {chat_template} (give `chatml` or the path of a Jinja file)")
    return path.read_text()


def file_digest(path: str) -> str:
    """Identity of a large file, wherever it lies: its size and both ends."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(f"{size} ".encode() + file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        digest.update(file.read())
    return digest.hexdigest()
