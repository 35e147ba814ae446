#!/usr/bin/env bash
# Makes the CPU environment: install-cpu.sh PYTHON VENV
# torch comes first, as a CPU build: from the configured indexes if they have one, else from PyTorch's own CPU index.
# Everything else comes from the lock without looking at dependencies, because vLLM's CPU build names CUDA builds of
# torchvision, torchaudio and torchcodec, which it does not need and which break transformers on a CPU machine.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:?usage: install-cpu.sh PYTHON VENV}
venv=${2:?usage: install-cpu.sh PYTHON VENV}
torch="torch==2.13.0+cpu"

"$python" - <<'PY' || exit 1
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 12):
    sys.exit(f"kun_ray needs Python 3.11 or 3.12, this is {sys.version.split()[0]}: run make PYTHON=python3.11 …")
PY
command -v g++ >/dev/null || { echo "kun_ray needs a C++ compiler (g++) for kenlm and DeepSpeed" >&2; exit 1; }
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

echo "installing torch (CPU build) …"
pip install -q --no-deps "$torch" 2>/dev/null || pip install -q --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch"
echo "installing the lock (some minutes the first time) …"
pip install -q "setuptools==$(sed -n 's/^setuptools==//p' requirements/cpu.txt)" wheel
pip install -q --no-deps --no-build-isolation -r requirements/cpu.txt
pip install -q --no-deps --no-build-isolation -e .
