"""EngineStats on a real vLLM engine: what it reads is vLLM's own, and vLLM calls that interface unstable."""

from __future__ import annotations

import asyncio
import os

from kun_ray.engine import EngineConfig, engine_arguments, environment
from kun_ray.metrics import EngineStats


def test_a_real_engine_tells_its_cache_its_hits_and_its_requests(model: str) -> None:
    config = EngineConfig(model=model, accelerator="cpu", max_num_seqs=8, max_model_len=512, cpu_threads=1)
    os.environ.update(environment(config, 1))
    stats = EngineStats()

    async def run() -> None:
        from vllm import AsyncEngineArgs, SamplingParams
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(**engine_arguments(config, model))
        engine = AsyncLLM.from_engine_args(arguments, stat_loggers=[stats.stat_logger])
        try:
            sampling = SamplingParams(max_tokens=8, ignore_eos=True)
            for number in range(2):
                async for _ in engine.generate({"prompt_token_ids": list(range(40, 240))}, sampling, str(number)):
                    assert stats.counters.get("kv_cache_usage", 0) >= 0
        finally:
            engine.shutdown()

    asyncio.run(asyncio.wait_for(run(), 300))
    assert stats.counters["prefix_cache_queries"] == 400
    assert 100 <= stats.counters["prefix_cache_hits"] < 200, "the second prompt is the first one again"
    assert stats.counters["preemptions"] == 0 and stats.counters["waiting"] == 0
    finished = stats.take_finished()
    assert [tokens for _, tokens in finished] == [8, 8] and all(seconds > 0 for seconds, _ in finished)
    assert stats.take_finished() == []
