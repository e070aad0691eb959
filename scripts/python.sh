# Sets $python: $PYTHON, else the project's ./.venv/bin/python, else python3. Sourced by the scripts here, which set $root first.
python=${PYTHON:-$root/.venv/bin/python}
if [ -z "${PYTHON:-}" ] && [ ! -x "$python" ]; then python=python3; fi
