"""Whether vLLM is here and knows the arguments that `engine:` gives it; generate and train ask before anything starts.

Reads vLLM's source and never imports it: that would cost a preflight five seconds.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from pathlib import Path

from kun_ray.config import ConfigError, require
from kun_ray.engine import EngineConfig


def check_engine_arguments(config: EngineConfig) -> None:
    """Raises ConfigError, naming the nearest valid name, if `engine:` holds what vLLM does not know."""
    if not config.engine:
        return
    known = _engine_argument_names()
    require(
        config.engine.get("data_parallel_size", 1) == 1, "engine.data_parallel_size: a pool has `replicas` for that"
    )
    require("hf_token" not in config.engine, "engine.hf_token would stand in logs and in manifest.json: set HF_TOKEN")
    for name in config.engine:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean `{close[0]}`?" if close else "; see the engine arguments in vLLM's documentation"
        require(name in known, f"vLLM has no engine argument `{name}`{hint}")


def _engine_argument_names() -> set[str]:
    """Fields of vLLM's AsyncEngineArgs, read from its source."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0], "engine", "arg_utils.py").read_text()
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    return {
        field.target.id
        for found in classes
        if found.name in ("EngineArgs", "AsyncEngineArgs")
        for field in found.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


def check_engine_installed(config: EngineConfig) -> None:
    """Raises ConfigError when this environment has no vLLM."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(f"vLLM is not installed here: run `make {'venv' if config.accelerator == 'cpu' else 'gpu'}`")
