#!/usr/bin/env bash
# Train N seeds into OUT/seed0/, OUT/seed1/, ..., test with the mean of their predictions, print PSNR alone and together.
#
#   bash scripts/train_seeds.sh DATA OUT N [--jobs N] [any Trainer flags]
#   bash scripts/train_seeds.sh data seeds 4 --fast_train --max_minutes 60
#
# Called again, it skips the seeds that are done and resumes the others. Details: scripts/train_seeds.py.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/scripts/python.sh"
exec "$python" "$root/scripts/train_seeds.py" "$@"
