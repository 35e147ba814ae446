"""The whole Kun loop: train the label and chat models, prepare, label, score, polish, export, train the final model.

python jobs/pipeline.py conf/pipeline/yi-34b.yaml seeds=seeds.jsonl held_out=held_out.jsonl output=/shared/runs/kun corpora='[{name: wudao, format: wudao, paths: [/data/wudao]}]'
python jobs/pipeline.py conf/pipeline/demo.yaml dry_run=true     # what would run, and why
"""

from kun_ray.config import run_job
from kun_ray.graph import PipelineConfig
from kun_ray.pipeline import pipeline

if __name__ == "__main__":
    run_job(PipelineConfig, pipeline, __doc__)
