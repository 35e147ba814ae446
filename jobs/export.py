"""Writes a finished generate stage as a dataset: Alpaca, ShareGPT, Parquet, and a data card.

python jobs/export.py conf/export.yaml input=runs/demo/generate output=runs/demo/export
"""

from kun_ray.config import run_job
from kun_ray.export import ExportConfig, export

if __name__ == "__main__":
    run_job(ExportConfig, export, __doc__)
