"""What a training run is: data, schedule, parallelism, checkpoints, publishing. Read by every room of kun_ray/train."""

from __future__ import annotations

import dataclasses
from typing import Any

from omegaconf import MISSING

from kun_ray.config import RayConfig, one_of, require
from kun_ray.lease import LEASE_S
from kun_ray.steps import StepsConfig

CARD = "kun_ray.json"
"""Beside the weights: digests of every file, tensor names and shapes, and the trainer's log-probabilities on the probes."""
STAGING = "model.tmp"
TASKS = ("chat", "label", "score", "polish")


@dataclasses.dataclass
class DataConfig:
    """One set of conversations."""

    path: str = MISSING
    """Alpaca or ShareGPT file (.jsonl or .json), or the folder of an export."""
    split: str = "train"
    """Of an export's folder: `train` or `valid`."""
    task: str = "chat"
    """What is learnt of a record: `chat`, instruction → output; `label`, the fields swapped: output → instruction; `score` and
    `polish`, their prompts → output. The prompts are those of inference, from `steps`; `chat` has none but the instruction."""
    system: str | None = None
    """The system's turn of every sample, such as Humpback's marks for seed and made-up data; null leaves a record its own."""
    weight: float = 1.0
    """How often each sample is seen in an epoch: 2 is twice, 0.25 is every fourth, others each epoch."""
    max_samples: int | None = None
    """Takes only the first so many; null takes all."""

    def __post_init__(self) -> None:
        one_of("data.split", self.split, ("train", "valid"))
        one_of("data.task", self.task, TASKS)
        require(self.weight > 0, "data.weight must be above 0")


@dataclasses.dataclass
class ZeroConfig:
    """DeepSpeed ZeRO-3: what is sharded, and what leaves the GPU (arXiv 1910.02054, 2104.07857, 2306.10209)."""

    offload_optimizer: str = "none"
    """`none`, `cpu` or `nvme`: where the optimizer's 12 bytes per parameter lie."""
    offload_parameters: str = "none"
    """`none` or `cpu`: where the bf16 parameters lie between two uses."""
    nvme_path: str = "/local_nvme"
    """Folder on each node for offload_optimizer: nvme."""
    pin_memory: bool = True
    """Page-locked host memory for offloading: faster copies, memory that the node cannot use otherwise."""
    hpz_partition_size: int = 1
    """ZeRO++ hpZ: ranks (those of one node) that hold a second whole copy of the parameters, so that the backward pass does
    not gather them across nodes. 1 leaves it out."""
    bucket_elements: int = 50_000_000
    """Elements that one reduction or prefetch moves at once."""
    persist_elements: int = 100_000
    """Smaller parameters stay on every rank."""
    max_live_parameters: int = 1_000_000_000
    """Gathered parameters that one rank may hold at once."""
    overlap_comm: bool = True
    """Moves gradients while the backward pass goes on."""

    def __post_init__(self) -> None:
        one_of("zero.offload_optimizer", self.offload_optimizer, ("none", "cpu", "nvme"))
        one_of("zero.offload_parameters", self.offload_parameters, ("none", "cpu"))
        require(self.hpz_partition_size >= 1, "zero.hpz_partition_size must be at least 1")


@dataclasses.dataclass
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) through peft: the base stays as it is."""

    rank: int = 16
    """Rank of the update ΔW = α/r · B·A."""
    alpha: int = 32
    """Its scale."""
    targets: list[str] = dataclasses.field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Names of the linear layers that get one."""
    merge: bool = False
    """Publishes the base with the update added, instead of the adapter alone."""

    def __post_init__(self) -> None:
        require(1 <= self.rank <= 512, "lora.rank must lie between 1 and 512, which is the most that vLLM serves")
        require(len(self.targets) > 0, "lora.targets names no layer")


@dataclasses.dataclass
class PublishConfig:
    """How the trained weights become a model that pools may use."""

    dtype: str = "bfloat16"
    """`bfloat16` or `float32` of the published weights."""
    max_shard_gb: float = 5.0
    """Size of one safetensors file."""
    keep_checkpoints: bool = False
    """Keeps the checkpoints of a finished run, 12 bytes per parameter each; off, they go once the model is admitted."""
    num_probes: int = 8
    """Held-out samples (of the training data if none are held out) on which engine and trainer must agree."""
    admission: bool = True
    """Loads the published model into a vLLM engine and compares log-probabilities before the stage may finish."""
    tensor_parallel_size: int = 1
    """GPUs of admission's engine."""
    engine: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Any other vLLM engine argument for admission, by its own name."""
    tolerance: float = 0.05
    """Mean |Δ log p| in nats per token that admission lets pass; bf16 kernels differ by about 0.01."""

    def __post_init__(self) -> None:
        one_of("publish.dtype", self.dtype, ("bfloat16", "float32"))
        require(self.num_probes >= 1, "publish.num_probes must be at least 1")


@dataclasses.dataclass
class TrainConfig:
    """jobs/train.py: supervised fine-tuning of one model."""

    model: str = MISSING
    """Base model: folder (local, s3://…, hdfs://…) or hub id, in safetensors."""
    output: str = MISSING
    """Folder of this stage, on storage that all nodes share. The same command continues a stopped run."""
    data: list[DataConfig] = dataclasses.field(default_factory=list)
    """What to learn from."""
    valid: list[DataConfig] = dataclasses.field(default_factory=list)
    """What to measure the held-out loss on."""
    steps: StepsConfig = dataclasses.field(default_factory=StepsConfig)
    """The prompts of inference, for data with task label, score or polish: `extends: conf/prompts.yaml`."""
    chat_template: str | None = None
    """null takes the model's own; `chatml`, or the path of a Jinja file."""
    trust_remote_code: bool = False
    """Runs Python code that comes with the model. Only for models whose code you have read."""
    max_tokens: int = 2048
    """Longer samples are left out and counted, never cut."""
    epochs: int = 1
    """Passes over the data."""
    max_steps: int | None = None
    """Ends earlier, after so many optimizer steps."""
    batch_size: int = 32
    """Samples of one optimizer step, over all ranks. The steps do not depend on the number of ranks or on packing."""
    tokens_per_micro_batch: int = 4096
    """Most tokens that one rank computes at once."""
    packing: bool = True
    """Puts several samples into one sequence, each seeing only itself; off, samples are padded to the longest."""
    lr: float = 1e-5
    """Peak learning rate of AdamW."""
    schedule: str = "cosine"
    """`cosine`, `linear` or `constant` after the warm-up."""
    warmup: float = 0.03
    """Part of all steps in which the rate rises from 0."""
    min_lr_ratio: float = 0.0
    """Last rate as a part of the peak's."""
    weight_decay: float = 0.0
    """AdamW's."""
    betas: list[float] = dataclasses.field(default_factory=lambda: [0.9, 0.95])
    """AdamW's."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it."""
    seed: int = 0
    """Decides the order of the samples and the LoRA weights."""
    dtype: str = "bfloat16"
    """`bfloat16` (with float32 master weights) or `float32`."""
    attention: str = "auto"
    """`auto` takes flash_attention_2 where it is installed, else sdpa, and packed on CPUs; or a name that transformers knows.
    `packed` computes only the pairs of tokens within each sample; sdpa computes all of a packed row and masks the rest."""
    gradient_checkpointing: bool = True
    """Computes activations again in the backward pass instead of keeping them."""
    lora: LoraConfig | None = None
    """null trains all weights."""
    zero: ZeroConfig = dataclasses.field(default_factory=ZeroConfig)
    """Sharding and offloading."""
    accelerator: str = "gpu"
    """`gpu`, or `cpu` (gloo)."""
    num_workers: int = 1
    """Ranks: one per GPU."""
    cpus_per_worker: float = 4.0
    """CPUs that each rank reserves."""
    accelerator_type: str | None = None
    """Only GPUs of this Ray accelerator type, such as A100: Ray does not tell cards of 40 and 80 GB apart."""
    resources: dict[str, float] = dataclasses.field(default_factory=dict)
    """Custom Ray resources that each rank reserves, such as {train: 1} on nodes set apart for training."""
    wait_for_resources_s: float = 600.0
    """How long to wait for GPUs that others hold, before giving up and naming them."""
    save_every_steps: int | None = None
    """Checkpoints after so many steps; null: at the end of every epoch."""
    keep_last: int = 2
    """Checkpoints kept; one takes 12 bytes per parameter (413 GB for 34B)."""
    eval_every_steps: int | None = None
    """Measures the held-out loss after so many steps, and at the end; null: at the end of every epoch."""
    max_failures: int = 3
    """Lost workers or nodes that the run survives, each time from the newest complete checkpoint."""
    publish: PublishConfig = dataclasses.field(default_factory=PublishConfig)
    """From trained weights to a model that pools may use."""
    dry_run: bool = False
    """Checks everything that can be checked without a GPU, prints memory and time, and ends."""
    model_config: str | None = None
    """dry_run only: a config.json to take sizes from when the model itself is not at hand."""
    host_memory_gb: float | None = None
    """dry_run refuses a run that would need more memory than this on one node, of `gpus_per_node` ranks."""
    gpus_per_node: int = 8
    """dry_run only: ranks that share a node's memory."""
    gpu_memory_gb: float | None = None
    """Memory of one GPU, such as 80; null takes that of the cluster's cards before a training, and does not check in a dry run."""
    lease_s: float = LEASE_S
    """A run that gave no sign of life for so many seconds counts as dead: another one may go on in its output."""
    ray: RayConfig = dataclasses.field(default_factory=RayConfig)
    """The Ray cluster."""

    def __post_init__(self) -> None:
        require(len(self.data) > 0, "data: give at least one, such as data=[{path: seeds.jsonl}]")
        for entry in [*self.data, *self.valid]:
            require(
                entry.task == "chat" or getattr(self.steps, entry.task) is not None,
                f"data.task is {entry.task}, but steps.{entry.task} has no prompt: let the YAML file extend conf/prompts.yaml",
            )
        one_of("schedule", self.schedule, ("cosine", "linear", "constant"))
        one_of("dtype", self.dtype, ("bfloat16", "float32"))
        one_of("accelerator", self.accelerator, ("cpu", "gpu"))
        for name in ("epochs", "batch_size", "num_workers", "keep_last", "max_tokens"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1")
        require(
            self.tokens_per_micro_batch >= self.max_tokens,
            f"tokens_per_micro_batch ({self.tokens_per_micro_batch}) must hold the longest sample (max_tokens {self.max_tokens})",
        )
        require(0 <= self.warmup <= 1, "warmup is a part of all steps: it must lie in [0, 1]")
        require(len(self.betas) == 2, "betas needs two values")
        for name in ("save_every_steps", "eval_every_steps", "max_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, or null")
