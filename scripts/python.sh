# Sets $python: $PYTHON, else the project's .venv (bin/, on Windows Scripts/), else python3.
# Sourced by the scripts here, which set $root first.
python=${PYTHON:-}
for own in "$root/.venv/bin/python" "$root/.venv/Scripts/python.exe"; do
  if [ -z "$python" ] && [ -x "$own" ]; then python=$own; fi
done
python=${python:-python3}
