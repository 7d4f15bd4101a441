#!/usr/bin/env bash
# Set up, then linters, types and the tests of a few minutes.
#   scripts/test.sh [pytest arguments]           for example: scripts/test.sh -m 'e2e or chaos'
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh

ruff check .
ruff format --check .
mypy
if [ $# -eq 0 ]; then set -- -n 2 --dist worksteal -m "not (e2e or chaos or gpu)"; fi
exec pytest "$@"
