#!/usr/bin/env bash
# Rewrites requirements/cpu.txt from setup.cfg. Needs `pip install uv`. Run after any change of dependencies.
set -euo pipefail
cd "$(dirname "$0")/.."
uv pip compile setup.cfg requirements/torch-needs.in --extra cpu --extra train --extra dev --universal --python-version 3.11 \
  --override requirements/overrides.txt --no-emit-find-links --no-emit-index-url --no-annotate --no-header \
  -o requirements/cpu.txt "$@"
