#!/usr/bin/env bash
# Runs the tests, after installing what they need into .venv (only what is missing: see
# scripts/setup.sh).
#
#   bash scripts/test.sh                 every test
#   bash scripts/test.sh -k package -x   any pytest flags
set -euo pipefail
trap 'exit 143' TERM
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=$(bash "$root/scripts/setup.sh" requirements-dev.txt)
export PYTHON  # the tests start other scripts, which take the same Python
cd "$root"
# a file at a time, as what it trains once serves all of its tests, and files with few, long tests
# not last; one process more than cores, as many tests wait
workers=$("$PYTHON" -c 'import os
print(len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else os.cpu_count())')
exec "$PYTHON" -m pytest -q -n "$workers" --no-loadscope-reorder tests "$@"
