"""Asks models the questions of C-Eval and CMMLU, and looks for these questions in training data.

python jobs/evaluate.py conf/evaluate.yaml models=[models/yi-6b,models/kun-6b] output=runs/evaluate
python jobs/evaluate.py conf/evaluate.yaml contamination.data=runs/mine/export output=runs/evaluate
"""

from kun_ray.config import run_job
from kun_ray.evaluate.choice import EvaluateConfig, evaluate

if __name__ == "__main__":
    run_job(EvaluateConfig, evaluate, __doc__)
