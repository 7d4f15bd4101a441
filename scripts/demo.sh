#!/usr/bin/env bash
# The demo: set up, make the digits' image folder, train ResNet-152 on it.
#   scripts/demo.sh [--json] [key=value ...]     for example: scripts/demo.sh train.epochs=3
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh

python scripts/make_digits.py data/digits >&2

# Two workers on CPU cores; with GPUs, a worker for each of at most two.
num_gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
workers=2
if [ "$num_gpus" -eq 1 ]; then workers=1; fi

exec pipeline train configs/digits.yaml "cluster.workers=$workers" "$@"
