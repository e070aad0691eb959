#!/usr/bin/env bash
# Finds a Python that has what a requirements file asks for, or makes one in .venv; prints its path, and nothing else, on stdout.
# demo.sh and test.sh call it; nothing else in this project installs anything.
#
#   PYTHON=$(bash scripts/setup.sh requirements.txt)        to run the program
#   PYTHON=$(bash scripts/setup.sh requirements-dev.txt)    to run the tests
#
# Looks at $PYTHON, else .venv (bin/python, on Windows Scripts/python.exe), else python3, which
# must be 3.10 or newer. One that has everything is used as it is. Otherwise .venv is made on it:
# where it imports torch and torchvision these are shared, not downloaded again. A second call is
# instant; a call that finds a half-made .venv makes it again.
set -euo pipefail
trap 'exit 130' INT
trap 'exit 143' TERM
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
wanted=${1:-requirements.txt}
venv=$root/.venv
half=$venv/half-made  # there from before the first file until everything imports
packages="torch torchvision numpy pillow imageio matplotlib tqdm"
if [ "$wanted" = requirements-dev.txt ]; then packages="$packages pytest xdist markdown_it ruff"; fi

say() { echo "$*" >&2; }
die() { say "error: $*"; exit 2; }

# The Python of .venv.
own() {
  local windows=$venv/Scripts/python.exe
  if [ -x "$windows" ]; then echo "$windows"; else echo "$venv/bin/python"; fi
}

# probe PYTHON PROGRAM ARGUMENTS: quiet, in a folder whose files shadow no package
probe() { (cd "$root" && "$1" -c "$2" "${@:3}" </dev/null 2>/dev/null); }

runs() { probe "$1" 'import sys; sys.exit(sys.version_info < (3, 10))'; }

# Prints the packages that PYTHON lacks: really imported, or (quickly) only looked for.
lacking() {
  # shellcheck disable=SC2086
  probe "$1" '
import importlib, importlib.util, sys
find = importlib.import_module if sys.argv[1] == "import" else importlib.util.find_spec
for package in sys.argv[2:]:
    try:
        found = find({"pillow": "PIL.Image"}.get(package, package))
        if package == "torch" and sys.argv[1] == "import" and tuple(map(int, found.__version__.split(".")[:2])) < (2, 6):
            found = None
    except Exception:
        found = None
    if found is None:
        print(package, end=" ")  # no newline, which on Windows has a carriage return' "$2" $packages
}
complete() { local missing; missing=$(lacking "$1" import) && [ -z "$missing" ]; }
has_torch() { packages="torch torchvision" complete "$1"; }
shares_torch() { probe "$1" 'import sys, torch, torchvision; sys.exit(torch.__file__.startswith(sys.prefix))'; }

# The state of the requirements that a stamp in .venv records.
stamp() { if [ "$1" = requirements.txt ]; then cksum <"$root/requirements.txt"; else cat "$root"/requirements{,-dev}.txt | cksum; fi; }
stamped() { [ "$(cat "$venv/installed-$wanted" 2>/dev/null)" = "$(stamp "$wanted")" ]; }

find_python() {
  local name=${PYTHON:-python3}
  base=$("$name" -c 'import sys; print(sys.executable, end="")' 2>/dev/null) && runs "$base" ||
    die "${PYTHON:+PYTHON=}$name is not Python 3.10 or newer; name one that is with PYTHON=/path/to/python3"
}

make_venv() {
  local share=() tool
  has_torch "$base" && share=(--system-site-packages)
  say "setup: making .venv on $base${share:+, sharing its torch}"
  trap '[ ! -e "$half" ] || rm -rf "$venv"' EXIT  # the other scripts would take a half-made one for whole
  mkdir -p "$venv" && : >"$half"
  if ! "$base" -m venv ${share[@]+"${share[@]}"} "$venv" >/dev/null 2>&1; then
    # Debian's python3 comes without ensurepip; virtualenv brings its own pip, and may sit anywhere
    tool=$venv/virtualenv-tool
    "$base" -m virtualenv --version >/dev/null 2>&1 || "$base" -m pip install --quiet --target "$tool" virtualenv >/dev/null 2>&1 ||
      die "$base has neither venv nor pip; install them (Debian and Ubuntu: apt install python3-venv)"
    rm -rf "$venv/bin" "$venv/lib" "$venv/lib64" "$venv/include" "$venv/pyvenv.cfg"
    PYTHONPATH=$tool "$base" -m virtualenv --quiet ${share[@]+"${share[@]}"} "$venv" >&2 || die "$base: virtualenv could not make $venv"
    rm -rf "$tool"
  fi
  if [ ${#share[@]} -gt 0 ] && ! has_torch "$(own)"; then
    # a venv made on another venv sees only what lies under both: name the other's folder
    probe "$base" 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' \
      >"$(probe "$(own)" 'import sysconfig; print(sysconfig.get_path("purelib"), end="")')/shared_packages.pth"
  fi
}

install() {
  local list=$venv/to-install.txt
  cat "$root/requirements.txt" >"$list"
  if [ "$wanted" != requirements.txt ]; then grep -v '^-r' "$root/$wanted" >>"$list"; fi
  if shares_torch "$(own)"; then grep -v '^torch' "$list" >"$list.small" && mv "$list.small" "$list"; fi
  say "setup: installing into .venv what $wanted asks for"
  "$(own)" -m pip install --disable-pip-version-check -r "$list" >&2 || die "pip could not install $wanted into $venv (see above)"
  rm -f "$list"
}

[ -f "$root/$wanted" ] || die "$root/$wanted: no such file"

if [ -n "${PYTHON:-}" ]; then
  find_python
  if complete "$base"; then echo "$base"; exit 0; fi
fi

# One setup at a time, held on a file that is there anyway.
exec 9<"$root/requirements.txt"
if command -v flock >/dev/null && ! flock -n 9; then
  say "setup: waiting for another setup of this folder"
  flock 9
fi

if [ -e "$venv" ] || [ -L "$venv" ]; then
  if [ -e "$half" ] || ! runs "$(own)" || ! probe "$(own)" 'import pip'; then
    say "setup: .venv is half-made or its Python is gone; making it again"
    rm -rf "$venv"
  fi
fi
if [ ! -e "$venv" ]; then
  find_python
  if complete "$base"; then echo "$base"; exit 0; fi
  make_venv
elif stamped && missing=$(lacking "$(own)" find) && [ -z "$missing" ]; then
  own
  exit 0
fi

install
if ! complete "$(own)"; then
  broken=$(lacking "$(own)" import)
  say "setup: installed but broken, so once more:" $broken
  # shellcheck disable=SC2086
  "$(own)" -m pip uninstall --quiet --yes $broken >&2 || true
  install
  complete "$(own)" || die "$venv does not import" $(lacking "$(own)" import)": remove .venv and call again"
fi
stamp requirements.txt >"$venv/installed-requirements.txt"
if [ "$wanted" != requirements.txt ]; then stamp "$wanted" >"$venv/installed-$wanted"; fi
rm -f "$half"
own
