"""TrainConfig → the dictionary that DeepSpeed reads. Nothing else in the package writes a DeepSpeed key.

It also tells transformers that ZeRO-3 is on. Both pitfalls below were measured (docs/architecture.md, "Inside train").
"""

from __future__ import annotations

from typing import Any

from kun_ray.train.config import TrainConfig


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's own configuration for a run; every key is there for a reason that its field's sentence gives."""
    zero = config.zero
    sharding: dict[str, Any] = {
        "stage": 3,
        "overlap_comm": zero.overlap_comm and config.accelerator == "gpu",
        "contiguous_gradients": True,
        "reduce_bucket_size": zero.bucket_elements,
        "stage3_prefetch_bucket_size": zero.bucket_elements,
        "stage3_param_persistence_threshold": zero.persist_elements,
        "stage3_max_live_parameters": zero.max_live_parameters,
        "stage3_max_reuse_distance": zero.max_live_parameters,
        "zero_hpz_partition_size": zero.hpz_partition_size,
    }
    if zero.offload_optimizer != "none":
        sharding["offload_optimizer"] = {"device": zero.offload_optimizer, "pin_memory": zero.pin_memory}
        if zero.offload_optimizer == "nvme":
            sharding["offload_optimizer"]["nvme_path"] = zero.nvme_path
    if zero.offload_parameters != "none":
        sharding["offload_param"] = {"device": zero.offload_parameters, "pin_memory": zero.pin_memory}
    return {
        "train_micro_batch_size_per_gpu": 1,  # unused: loop.py decides what a micro-batch holds
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # steps have unequal numbers of micro-batches
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "data_types": {"keep_in_fp32_modules": ["inv_freq"]},  # in bf16 RoPE is off by radians at 4,096 tokens
        "zero_optimization": sharding,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class Zero3Notice:
    """Tells transformers that ZeRO-3 is on, while it lives. Stands in for HfDeepSpeedConfig, which wants accelerate."""

    def __init__(self, config: dict[str, Any]) -> None:
        from transformers.integrations.deepspeed import set_hf_deepspeed_config

        self.config = config
        set_hf_deepspeed_config(self)

    def is_zero3(self) -> bool:
        """Asked by transformers."""
        return True

    def close(self) -> None:
        """Ends the notice, so that later loads in this process are plain ones."""
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
