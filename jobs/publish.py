"""Shares a finished export or a trained model: a verified copy in a folder, or a repository of the Hugging Face hub.

python jobs/publish.py runs/demo/export --to /shared/datasets/kun        # what would be published: a dry run
python jobs/publish.py runs/demo/export --to me/kun-52k push=true        # publishes it, in a private repository
"""

from kun_ray.config import run_job
from kun_ray.release import PublishConfig, publish

if __name__ == "__main__":
    run_job(PublishConfig, publish, __doc__, positional="input")
