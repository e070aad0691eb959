#!/usr/bin/env bash
# Finds a Python that has what a requirements file asks for, or makes one in .venv; prints its path,
# and nothing else, on stdout.
# demo.sh and test.sh call it; nothing else in this project installs anything.
#
#   PYTHON=$(bash scripts/setup.sh requirements.txt)        to run the program
#   PYTHON=$(bash scripts/setup.sh requirements-dev.txt)    to run the tests
#
# Looks at $PYTHON, else .venv, else python3 (3.10 or newer). One that has everything is used as it
# is. Otherwise .venv is made on it, and shares its torch and torchvision where it has them.
set -euo pipefail
trap 'exit 130' INT
trap 'exit 143' TERM
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
wanted=${1:-requirements.txt}
venv=$root/.venv
modules="torch torchvision numpy PIL imageio matplotlib tqdm"
if [ "$wanted" = requirements-dev.txt ]; then modules="$modules pytest xdist markdown_it ruff"; fi

say() { echo "$*" >&2; }
die() { say "error: $*"; exit 2; }

# The Python of .venv; on Windows it is in Scripts.
own() {
  local windows=$venv/Scripts/python.exe
  if [ -x "$windows" ]; then echo "$windows"; else echo "$venv/bin/python"; fi
}

# probe PYTHON PROGRAM ARGUMENTS: quiet, in a folder whose files shadow no package
probe() { (cd "$root/scripts" && "$1" -c "$2" "${@:3}" </dev/null 2>/dev/null); }

# has PYTHON MODULES: whether it imports all of them, and its PyTorch is not too old
has() {
  probe "$1" '
import importlib, sys
found = {name: importlib.import_module(name) for name in sys.argv[1:]}
sys.exit(tuple(map(int, found["torch"].__version__.split(".")[:2])) < (2, 6))' "${@:2}"
}

# shellcheck disable=SC2086
complete() { has "$1" $modules; }

find_python() {
  local name=${PYTHON:-python3}
  base=$("$name" -c 'import sys; assert sys.version_info >= (3, 10)
print(sys.executable, end="")' 2>/dev/null) ||
    die "${PYTHON:+PYTHON=}$name is not Python 3.10 or newer; name one with PYTHON=/path/to/python3"
}

make_venv() {
  say "setup: making .venv on $base"
  trap 'rm -rf "$venv"' EXIT  # the other scripts would take a half-made one for whole
  rm -rf "$venv"
  "$base" -m venv "$venv" >/dev/null 2>&1 ||
    die "$base cannot make a virtual environment (Debian and Ubuntu: apt install python3-venv)"
  if has "$base" torch torchvision; then
    local packages
    packages=$(probe "$(own)" 'import sysconfig; print(sysconfig.get_path("purelib"), end="")')
    probe "$base" 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' \
      >"$packages/shared_packages.pth"
  fi
}

[ -f "$root/$wanted" ] || die "$root/$wanted: no such file"
if [ -n "${PYTHON:-}" ]; then
  find_python
  if complete "$base"; then echo "$base"; exit 0; fi
fi
exec 9<"$root/requirements.txt"  # one setup at a time
flock 9 2>/dev/null || true  # some network file systems have no locks, macOS no flock
if complete "$(own)"; then own; exit 0; fi
if ! probe "$(own)" 'import pip'; then
  if [ -z "${PYTHON:-}" ]; then
    find_python
    if complete "$base"; then echo "$base"; exit 0; fi
  fi
  make_venv
fi
say "setup: installing into .venv what $wanted asks for"
# to compile all modules takes as long as to install, so each is compiled when it is first imported;
# but where Python is told not to keep that, every process would compile PyTorch again
compile=--no-compile
if [ -n "${PYTHONDONTWRITEBYTECODE:-}" ]; then compile=--compile; fi
"$(own)" -m pip install "$compile" --disable-pip-version-check -r "$root/$wanted" >&2 ||
  die "pip could not install $wanted into $venv (see above)"
complete "$(own)" || die "$venv does not import $modules: remove .venv and call again"
trap - EXIT
own
