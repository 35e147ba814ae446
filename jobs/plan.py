"""Says what a run will need and cost, without taking a GPU: documents, memory, hours, disk, price; and whether it fits.

python jobs/plan.py conf/pipeline/yi-34b.yaml output=/shared/kun seeds=/shared/seeds.jsonl held_out=/shared/held_out.jsonl card=A100-80 price_per_gpu_hour=2
python jobs/plan.py conf/generate.yaml pools.label.model=… pools.chat.model=… input=… output=… card=H100
"""

import sys

from kun_ray.config import KunError, run_job, top_level_keys
from kun_ray.plan import plan, schema_of

if __name__ == "__main__":
    try:
        keys = top_level_keys([arg for arg in sys.argv[1:] if arg not in ("-h", "--help")])
    except KunError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        sys.exit(2)
    run_job(schema_of(keys), plan, __doc__)
