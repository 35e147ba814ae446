"""Typed configuration: dataclasses + a YAML file + `key=value` arguments, merged by OmegaConf. Every job starts here.

Each stage declares its own dataclass beside its code, with a sentence under every field; this module loads, checks and
explains them, and holds what all jobs share. It never starts Ray and never reads data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import re
import signal
import sys
import threading
import time
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue

from kun_ray.helptext import dataclass_in, describe, fields

T = TypeVar("T")
EXTENDS = "extends"
"""In a YAML file: one file or a list of files, relative to it, that it builds upon."""

_unshown: list[str] = []
"""The resolved configuration of this process's job, until `show_config` prints it."""
PARENT = "KUN_RAY_PARENT"
"""Environment variable of a job that a pipeline has started: the pipeline's process, whose end is the job's too."""
_CREDENTIALS = re.compile(r"(?<=://)[!#-&(-?A-~]*:[!#-&(-?A-~]*@")
_SECRET_OPTIONS = re.compile(
    r"([?&](?:[\w-]*(?:secret|token|password|signature|credential|access_?key)[\w-]*|sig)=)[^&\s\"'\\]+", re.IGNORECASE
)


class KunError(Exception):
    """An error for the person who runs the job: what was found, where, and what to do. Printed without a traceback.

    Its message never holds credentials, whatever URI was put into it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_credentials(message))


class ConfigError(KunError):
    """The configuration cannot be used; nothing has been started."""


@dataclasses.dataclass
class RayConfig:
    """How the job meets the Ray cluster."""

    address: str | None = None
    """Cluster to join, such as `auto` or `ray://head:10001`; null joins a running one if RAY_ADDRESS names it, else starts a local one."""
    num_cpus: int | None = None
    """Logical CPUs of a local Ray that this job starts; null takes the machine's, and at least what the job reserves.
    Ignored when joining a cluster."""
    autoscaling: bool = False
    """Whether the cluster adds nodes on demand: then it need not hold all pools when the job starts."""
    object_store_gb: float | None = None
    """Object store of a local Ray in GB; null takes Ray's default."""
    log_every_s: float = 5.0
    """Seconds between two progress lines (and two lines of metrics.jsonl)."""


def load(schema: type[T], argv: list[str]) -> T:
    """`schema` filled from YAML files and `key=value` arguments, later ones winning.

    Args:
        schema: a dataclass; fields set to `omegaconf.MISSING` must be given.
        argv: paths of YAML files first, then dotted overrides such as `pools.label.replicas=4`.
    Raises:
        ConfigError: unreadable file, unknown key (the nearest valid one is named), wrong type, missing value.
    """
    try:
        config = OmegaConf.to_object(merge(schema, argv))
    except MissingMandatoryValue as error:
        raise ConfigError(
            f"`{error.full_key}` has no value: give it in the YAML file or as {error.full_key}=…"
        ) from None
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"`{getattr(error, 'full_key', None) or 'configuration'}`: {_first_line(error)}") from None
    return typing.cast(T, config)


def merge(schema: type, argv: list[str]) -> DictConfig:
    """As `load`, but nothing is checked that needs all values: fields may still be missing."""
    merged: Any = OmegaConf.structured(schema)
    for arg in argv:
        try:
            key, is_setting, value = arg.partition("=")
            if is_setting and any(part.isdigit() for part in key.split(".")):  # an item of a list: data.0.path=…
                _require_item(merged, key)
                OmegaConf.update(merged, key, _parse(f"value={value}").value, merge=True)
            else:
                merged = OmegaConf.merge(merged, _parse(arg))
        except ConfigKeyError as error:
            key = error.full_key or str(error.key)
            raise ConfigError(f"unknown key `{key}` in `{arg}`{_nearest(schema, key)}") from None
        except ConfigError:
            raise
        except Exception as error:  # OmegaConf lets errors of its parsers and converters through as they are
            raise ConfigError(f"`{getattr(error, 'full_key', None) or arg}` in `{arg}`: {_first_line(error)}") from None
    return typing.cast(DictConfig, merged)


def _require_item(config: DictConfig, key: str) -> None:
    """Raises ConfigError when `key` (data.0.path) goes through an item that its list does not have."""
    parts = key.split(".")
    for place, part in enumerate(parts):
        before = ".".join(parts[:place])
        items = OmegaConf.select(config, before) if part.isdigit() else None
        if isinstance(items, ListConfig) and int(part) >= len(items):
            has = f"only {len(items)}, counted from 0" if len(items) else "none"
            raise ConfigError(f"`{key}`: {before} has no item {part}, it has {has}; write {before}=[{{…}}]")


def top_level_keys(argv: list[str]) -> set[str]:
    """The first parts of all keys that YAML files and `key=value` arguments set. Raises ConfigError as `load` does."""
    return {str(key) for arg in _without_dashes(argv) for key in _parse(arg)}


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain JSON-able values."""
    return dataclasses.asdict(config)


def without_credentials(text: str) -> str:
    """`text` without the `user:password@` of the URIs in it and the values of their secret options (`?sig=…`), for
    whatever is printed or kept."""
    return _SECRET_OPTIONS.sub(r"\1…", _CREDENTIALS.sub("", text))


def run_job(schema: type[T], main: Callable[[T], object], doc: str | None, positional: str | None = None) -> None:
    """The body of every script under jobs/: parse, call `main` (which may call `show_config`), exit with a status.

    With `positional`, arguments that are neither a YAML file nor key=value are values of that field, which is a list or
    takes one. `--key value` and `--key=value` are key=value.

    Exits 0 when `main` returns, 1 with one message on a KunError, 2 on a wrong configuration, 130 on Ctrl-C or SIGTERM.
    Any other exception keeps its traceback.
    """
    if any(arg in ("-h", "--help") for arg in sys.argv[1:]):
        plain = f" {positional.upper()}{' …' if _is_list(schema, positional) else ''}" if positional else ""
        usage = f"usage: python {sys.argv[0]}{plain} [conf/FILE.yaml …] [key=value …]"
        with contextlib.suppress(BrokenPipeError):  # --help | head
            print(f"{(doc or '').strip()}\n\n{usage}\n\n{describe(schema)}", flush=True)
        return
    for signum in (signal.SIGINT, signal.SIGTERM):  # in a shell's background, processes begin with SIGINT ignored
        signal.signal(signum, signal.default_int_handler)
    if PARENT in os.environ:
        threading.Thread(target=_end_with, args=(int(os.environ[PARENT]),), name="parent", daemon=True).start()
    try:
        argv = _without_dashes(sys.argv[1:], list(_known_keys(schema)))
        config = load(schema, _with_positional(argv, positional, _is_list(schema, positional)) if positional else argv)
        resolved = yaml.safe_dump(to_dict(config), allow_unicode=True, sort_keys=False)
        _unshown[:] = ["# " + without_credentials(resolved).strip().replace("\n", "\n# ")]
        main(config)
    except ConfigError as error:
        sys.exit(_say(f"configuration error: {error}", 2))
    except KunError as error:
        sys.exit(_say(f"error: {error}", 1))
    except KeyboardInterrupt:
        sys.exit(_say("stopped: what was finished is kept; run the same command again to continue", 130))


def show_config() -> None:
    """Prints the job's resolved configuration, once. A job that makes data calls it when all its checks have passed, so that
    an error that they find is not buried under 150 lines. Does nothing in a process that `run_job` has not started."""
    while _unshown:
        print(_unshown.pop(), flush=True)


def _end_with(parent: int) -> None:
    """Stops this job as Ctrl-C does when the process that has started it is gone."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGINT)  # raise_signal would leave the main thread asleep


def require(condition: bool, message: str) -> None:
    """Raises ConfigError(message) unless `condition` holds: one line per check in a dataclass's __post_init__."""
    if not condition:
        raise ConfigError(message)


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ConfigError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(f"`{name}` is {value!r}, but must be one of {', '.join(allowed)}")


def _without_dashes(argv: list[str], known: Sequence[str] = ()) -> list[str]:
    """`argv` with `--key value` and `--key=value` as key=value, and `--a-key` as a_key where that is a `known` one."""
    found: list[str] = []
    rest = iter(argv)
    for arg in rest:
        key = arg.removeprefix("--")
        if key != arg and "=" not in key:
            value = next(rest, None)
            require(value is not None, f"{arg} has no value: write {arg} <value>, or {key}=<value>")
            key = f"{key}={value}"
        name, mark, value = key.partition("=")
        plain = name.replace("-", "_")
        found.append(plain + mark + value if key != arg and plain in known else key)
    return found


def _is_list(schema: type, field: str) -> bool:
    return any(known.name == field and typing.get_origin(hint) is list for known, hint in fields(schema))


def _with_positional(argv: list[str], field: str, is_list: bool) -> list[str]:
    """`argv` with its plain arguments gathered into one `field=[…]`, or the only one as `field=…`, which comes last."""
    plain = [arg for arg in argv if not _is_setting(arg)]
    if not plain:
        return argv
    require(is_list or len(plain) == 1, f"one {field} is taken, but there are {len(plain)}: {' '.join(plain)}")
    given = [arg for arg in argv if arg.startswith(f"{field}=")]
    require(
        not given, f"`{given[0] if given else ''}` and the plain arguments {' '.join(plain)} say the same: give one"
    )
    return [
        *(arg for arg in argv if _is_setting(arg)),
        f"{field}={json.dumps(plain if is_list else plain[0], ensure_ascii=False)}",
    ]


def _is_setting(arg: str) -> bool:
    """Whether it is a YAML file or key=value, and not a folder or a URI (which may hold `=` too)."""
    if "://" in arg.partition("=")[0] or Path(arg).is_dir():
        return False
    return "=" in arg or arg.endswith((".yaml", ".yml"))


def _parse(arg: str) -> DictConfig:
    if "=" in arg:
        return OmegaConf.from_dotlist([arg])
    return _read(Path(arg), ())


def _read(path: Path, extending: tuple[Path, ...]) -> DictConfig:
    if not path.is_file():
        raise ConfigError(f"no configuration file {path} (overrides are written key=value)")
    if path.resolve() in extending:
        raise ConfigError(f"{path} extends itself, by way of {' and '.join(file.name for file in extending)}")
    try:
        content = OmegaConf.load(path)
    except Exception as error:  # a YAML library's own error classes: any of them means the same to the user
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path} must hold a mapping of keys to values")
    bases = content.pop(EXTENDS, None) or []
    bases = [bases] if isinstance(bases, str) else bases
    merged = OmegaConf.merge(*(_read(path.parent / str(base), (*extending, path.resolve())) for base in bases), content)
    return typing.cast(DictConfig, merged)


def _say(message: str, status: int) -> int:
    print(without_credentials(message), file=sys.stderr, flush=True)
    return status


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _nearest(schema: type, key: str) -> str:
    known = list(_known_keys(schema))
    if "." in key and not any(name.startswith(key.rsplit(".", 1)[0]) for name in known):
        known += [f"{key.rsplit('.', 1)[0]}.{name.rsplit('.', 1)[-1]}" for name in known if "<" in name or "." in name]
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in known}
    close = difflib.get_close_matches(key, known, 1, 0.6)
    if not close:
        close = [by_leaf[leaf] for leaf in difflib.get_close_matches(key.rsplit(".", 1)[-1], list(by_leaf), 1, 0.6)]
    return (
        f"; did you mean `{close[0]}`?"
        if close
        else f"; valid keys: {', '.join(sorted({n.split('.')[0] for n in known}))}"
    )


def _known_keys(schema: type, prefix: str = "") -> typing.Iterator[str]:
    for field, hint in fields(schema):
        yield prefix + field.name
        nested = dataclass_in(hint)
        if nested is not None:
            middle = "<name>." if typing.get_origin(hint) is dict else ""
            yield from _known_keys(nested, f"{prefix}{field.name}.{middle}")
