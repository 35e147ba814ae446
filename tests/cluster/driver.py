"""jobs/generate.py with fake engines, as a process of its own that a test can kill: driver.py PLAN.json [YAML …] [key=value …]"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import fake

import kun_ray.generate
from kun_ray.config import run_job

if __name__ == "__main__":
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
    # for the workers of the Ray that this process starts
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    plan = fake.Plan(**json.loads(Path(sys.argv.pop(1)).read_text()))
    kun_ray.generate.Pool = fake.pool_class(plan)
    run_job(kun_ray.generate.GenerateConfig, kun_ray.generate.generate, __doc__)
