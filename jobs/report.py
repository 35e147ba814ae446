"""Shows one or more runs as one HTML page that opens offline: report.html, or compare.html for several.

python jobs/report.py runs/demo
python jobs/report.py runs/a runs/b output=compare.html find=[part of a document]
"""

from kun_ray.config import run_job
from kun_ray.report import ReportConfig, report

if __name__ == "__main__":
    run_job(ReportConfig, report, __doc__, positional="runs")
