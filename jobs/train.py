"""Fine-tunes a model on instruction pairs: DeepSpeed ZeRO-3 under Ray Train, from a base model to one that pools can serve.

python jobs/train.py conf/train/label.yaml conf/train/yi-34b-8xa100.yaml model=01-ai/Yi-34B output=/shared/runs/label
"""

from kun_ray.config import run_job
from kun_ray.train.config import TrainConfig
from kun_ray.train.launch import train

if __name__ == "__main__":
    run_job(TrainConfig, train, __doc__)
