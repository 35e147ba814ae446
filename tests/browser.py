"""A real headless Chromium for tests of pages: their scripts run, and the page is read as they leave it.

Chromium is not installed by `make venv`: `apt-get install chromium`, or name one in CHROMIUM.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium")
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--virtual-time-budget=4000",
    "--dump-dom",
]


def browse(path: Path, profile: Path, fragment: str = "") -> str:
    """Opens a file and returns the page as it is after its scripts have run."""
    command = [str(CHROMIUM), *OPTIONS, f"--user-data-dir={profile}", f"file://{path}{fragment}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
