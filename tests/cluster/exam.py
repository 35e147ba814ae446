"""A fake engine that sits examinations and judges answers, for test_evaluate_ray.py; also the job that this test kills.

Workers import it by name, as fake.py. It reads the prompt alone: of question 第n题 the right option is n mod 4. The model in the
folder `good` knows all, any other every third; as a judge it prefers the answer that holds 妙.
    exam.py JOURNAL YAML [key=value …] runs jobs/evaluate.py with it.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from kun_ray.pool import Pool
from kun_ray.prompts import load_tokenizer
from kun_ray.replies import Reply


class ExamEngine:
    """Answers `choose`; keeps a journal of the questions that it was asked."""

    def __init__(self, journal: str, path: str, service_s: float) -> None:
        self.max_model_len = 2048
        self.first_token_at = self.stats = None
        self._knows_all = Path(path).name == "good"
        self._tokenizer, self._service_s = load_tokenizer(path), service_s
        self._journal = open(Path(journal) / f"{Path(path).name}-{os.getpid()}-{time.time_ns()}", "a", buffering=1)  # noqa: SIM115

    async def choose(self, prompt: list[int], candidates: tuple[int, ...], adapter: str | None = None) -> Reply:
        await asyncio.sleep(self._service_s)
        text = self._tokenizer.decode(prompt)
        if asked := re.findall(r"第(\d+)题", text):
            number = int(asked[-1])
            self._journal.write(f"{number}\n")
            option = number % 4 if self._knows_all or number % 3 == 0 else (number + 1) % 4
        else:
            first, second = re.search(r"【第一个回答】(.*)【第二个回答】(.*)", text, re.DOTALL).groups()
            option = 2 if ("妙" in first) == ("妙" in second) else 0 if "妙" in first else 1
        logprobs = tuple(math.log(0.7 if n == option else 0.1) for n in range(len(candidates)))
        return Reply(len(prompt), 1, "chosen", logprobs=logprobs)


class ExamPool(Pool):
    """A Pool whose engine is an ExamEngine."""

    journal: str
    service_s: float

    def _build_engine(self, path: str, stop_ids: list[int]) -> Any:
        return ExamEngine(self.journal, path, self.service_s)


def pool_class(journal: Path, service_s: float = 0.0) -> type[ExamPool]:
    """The class that stands in for kun_ray.generate.Pool; it travels to the workers by value."""
    journal.mkdir(exist_ok=True)
    return type("ExamPoolWithJournal", (ExamPool,), {"journal": str(journal), "service_s": service_s})


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    import exam

    import kun_ray.generate
    from kun_ray.config import run_job
    from kun_ray.evaluate.choice import EvaluateConfig, evaluate

    kun_ray.generate.Pool = exam.pool_class(Path(sys.argv.pop(1)), service_s=0.3)
    run_job(EvaluateConfig, evaluate, __doc__)
