#!/usr/bin/env bash
# Set up, then linters, types and all tests but those that need a GPU.
#   scripts/test.sh [pytest arguments]           for example: scripts/test.sh -m 'not e2e and not gpu'
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh

ruff check .
ruff format --check .
mypy
if [ $# -eq 0 ]; then set -- -m "not gpu"; fi
exec pytest "$@"
