"""Lets a judge model compare two models' answers to the same instructions, in both orders.

python jobs/pairwise.py conf/pairwise.yaml answers=[runs/a/answers,runs/b/answers] judge.model=models/chat output=runs/judged
"""

from kun_ray.config import run_job
from kun_ray.evaluate.pairwise import PairwiseConfig, pairwise

if __name__ == "__main__":
    run_job(PairwiseConfig, pairwise, __doc__)
