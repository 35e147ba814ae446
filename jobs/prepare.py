"""Cleans corpora (WuDao, WanJuan, SkyPile, jsonl, Parquet) into documents for the label model.

python jobs/prepare.py conf/prepare.yaml output=runs/mine/prepare tokenizer=models/label
"""

from kun_ray.config import run_job
from kun_ray.prepare import PrepareConfig, prepare

if __name__ == "__main__":
    run_job(PrepareConfig, prepare, __doc__)
