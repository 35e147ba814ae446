"""Runs label, score and polish over prepared documents, on pools of vLLM engines.

python jobs/generate.py conf/generate.yaml input=runs/demo/prepare output=runs/demo/generate
"""

from kun_ray.config import run_job
from kun_ray.generate import GenerateConfig, generate


def main(config: GenerateConfig) -> None:
    generate(config)


if __name__ == "__main__":
    run_job(GenerateConfig, main, __doc__)
