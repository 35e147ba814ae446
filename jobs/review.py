"""Writes a page for blind human review, one HTML file that opens offline; and reads what reviewers export.

python jobs/review.py conf/review.yaml answers=[runs/a/answers,runs/b/answers] output=runs/review
python jobs/review.py output=runs/review results=[wang.json,li.json]
"""

from kun_ray.config import run_job
from kun_ray.evaluate.review import ReviewConfig, review

if __name__ == "__main__":
    run_job(ReviewConfig, review, __doc__)
