#!/usr/bin/env bash
# Rewrites requirements/cpu.txt and gpu.txt from setup.cfg. Needs `pip install uv`. Run after any change of dependencies.
# Arguments go to the resolution of the CPU lock alone, such as --find-links FOLDER for a local CPU build of torch.
set -euo pipefail
cd "$(dirname "$0")/.."
common=(--extra train --extra dev --universal --python-version 3.11 --no-emit-find-links --no-emit-index-url --no-annotate --no-header)
uv pip compile setup.cfg requirements/torch-needs.in --extra cpu "${common[@]}" --override requirements/overrides.txt \
  -o requirements/cpu.txt "$@"
uv pip compile setup.cfg --extra gpu "${common[@]}" -o requirements/gpu.txt
