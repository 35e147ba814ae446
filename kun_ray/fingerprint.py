"""What decides a generate stage's output, for its manifest: a rerun with something else in it is refused."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from kun_ray import models, store
from kun_ray.config import to_dict

if TYPE_CHECKING:
    from kun_ray.generate import GenerateConfig

ONLY_SPEED = frozenset(
    [
        "aggregate_engine_logging",
        "async_scheduling",
        "attention_backend",
        "block_size",
        "collect_detailed_traces",
        "compilation_config",
        "cpu_distributed_timeout_seconds",
        "cpu_offload_gb",
        "cpu_offload_params",
        "cudagraph_capture_sizes",
        "cudagraph_metrics",
        "custom_histogram_buckets",
        "data_parallel_size",
        "data_parallel_backend",
        "device_ids",
        "disable_cascade_attn",
        "disable_custom_all_reduce",
        "disable_hybrid_kv_cache_manager",
        "disable_log_stats",
        "distributed_executor_backend",
        "distributed_timeout_seconds",
        "download_dir",
        "enable_chunked_prefill",
        "enable_expert_parallel",
        "enable_flashinfer_autotune",
        "enable_logging_iteration_details",
        "enable_prefix_caching",
        "enable_sleep_mode",
        "enforce_eager",
        "gpu_memory_utilization",
        "kernel_config",
        "kv_cache_memory_bytes",
        "kv_cache_metrics",
        "kv_cache_metrics_sample",
        "kv_offloading_backend",
        "kv_offloading_size",
        "log_level",
        "logging_config",
        "long_prefill_token_threshold",
        "max_cudagraph_capture_size",
        "max_long_partial_prefills",
        "max_num_batched_tokens",
        "max_num_partial_prefills",
        "max_parallel_loading_workers",
        "mm_processor_cache_gb",
        "model_loader_extra_config",
        "num_gpu_blocks_override",
        "numa_bind",
        "numa_bind_cpus",
        "numa_bind_nodes",
        "offload_backend",
        "offload_group_size",
        "offload_num_in_group",
        "offload_params",
        "offload_prefetch_step",
        "optimization_level",
        "otlp_traces_endpoint",
        "performance_mode",
        "prefix_caching_hash_algo",
        "profiler_config",
        "pt_load_map_location",
        "ray_workers_use_nsight",
        "safetensors_load_strategy",
        "scheduling_policy",
        "served_model_name",
        "show_hidden_metrics_for_version",
        "shutdown_timeout",
        "stream_interval",
        "swap_space",
        "use_tqdm_on_load",
        "watermark",
    ]
)
"""vLLM arguments that change how fast an engine answers, not what. Any other one is taken to decide the output."""


def fingerprint(config: GenerateConfig, source: store.Folder) -> dict[str, Any]:
    """What decides this stage's output."""
    steps = to_dict(config)["steps"]
    used = [step for pool in config.pools.values() for step in pool.steps]
    return {
        "input": store.input_fingerprint(source),
        "pools": {
            name: {
                "model": pool.model,
                "weights": models.model_digest(pool.model),
                "chat_template": pool.chat_template,
                "max_model_len": pool.max_model_len,
                "steps": list(pool.steps),
                "engine": {key: value for key, value in pool.engine.items() if key not in ONLY_SPEED},
            }
            for name, pool in config.pools.items()
        },
        "steps": {name: steps[name] for name in used},
        "adapters": {
            name: models.model_digest(adapter) for name in used if (adapter := (steps[name] or {}).get("adapter"))
        },
    }


def identity(config: GenerateConfig) -> dict[str, Any]:
    """What decides this stage's output, of a configuration that has not run yet. Raises KunError without its input."""
    pools = {
        name: dataclasses.replace(pool, chat_template=models.read_chat_template(pool.chat_template))
        for name, pool in config.pools.items()
    }
    return fingerprint(dataclasses.replace(config, pools=pools), store.require_complete(config.input))
