"""Runs label, score and polish over prepared documents, on pools of vLLM engines.

python jobs/generate.py conf/generate.yaml input=runs/demo/prepare output=runs/demo/generate
"""

from kun_ray.config import run_job
from kun_ray.generate import GenerateConfig, generate

if __name__ == "__main__":
    run_job(GenerateConfig, generate, __doc__)
