#!/usr/bin/env bash
# Writes the submission, LAB4_{STUDENT_ID}_{NAME}.zip, into the current folder: the source, and
# nothing that costs marks.
#
#   bash scripts/package.sh 313553009 林于翔
#   bash scripts/package.sh 313553009 林于翔 --report my_report.pdf
# also checks the report and names it beside the zip.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/scripts/python.sh"
if ! "$python" -c 'import sys; sys.path.insert(0, sys.argv[1]); import utils.cli
sys.exit(sys.version_info < (3, 10))' "$root" 2>/dev/null; then
  echo "error: $python is not Python 3.10 or newer; name one with PYTHON=/path/to/python3" >&2
  exit 2
fi
export PYTHONUTF8=1  # a name in any script, whatever the locale
exec "$python" "$root/scripts/package.py" "$@"
