#!/usr/bin/env bash
# The whole lab on drawn data, in six to twelve minutes on two CPU cores: draw, train, test, check
# the CSV, report.
#
#   bash scripts/demo.sh          everything into ./demo
#   bash scripts/demo.sh OUT      or into OUT; a second call resumes where the first one stopped
#
# Installs what is missing into .venv first (see scripts/setup.sh).
set -euo pipefail
trap 'exit 143' TERM  # after the running step has saved what it has
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

case ${1:-} in
  -h | --help)
    awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "${BASH_SOURCE[0]}"
    exit 0
    ;;
  -*) echo "error: $1: demo.sh takes no flag, only the folder to write to" >&2; exit 2 ;;
esac
if [ $# -gt 1 ]; then echo "error: $2: demo.sh takes one folder to write to" >&2; exit 2; fi
out=${1:-demo}
if [ -e "$out" ] && [ ! -d "$out" ]; then
  echo "error: $out: expected a folder to write to, found a file" >&2
  exit 2
fi

PYTHON=$(bash "$root/scripts/setup.sh" requirements.txt)
export PYTHON
if ! mkdir -p -- "$out" 2>/dev/null || [ ! -w "$out" ]; then
  echo "error: $out: cannot write a folder there" >&2
  exit 2
fi

step() { printf '\n== %s\n' "$1" >&2; }

step "1/5  Drawing a data set into $out/data"
"$PYTHON" "$root/scripts/make_demo_data.py" "$out/data" --with_test_truth

step "2/5  Training for four minutes into $out/ckpt"
# few steps: a larger learning rate, and teacher forcing in half of the default's share of the run
"$PYTHON" "$root/Trainer.py" --DR "$out/data" --save_root "$out/ckpt" --fast_train --max_minutes 4 \
  --lr 0.003 --tfr_sde 5 --tfr_d_step 0.2 --seed 0 --resume

step "3/5  Predicting the five test sequences into $out/test"
"$PYTHON" "$root/Tester.py" --DR "$out/data" --ckpt_path "$out/ckpt/best.ckpt" \
  --save_root "$out/test"

step "4/5  Checking the CSV, and scoring it: the drawn test frames are known, unlike the course's"
"$PYTHON" "$root/scripts/check_submission.py" "$out/test/submission.csv" \
  --ground_truth "$out/data/test_truth"

step "5/5  Writing the report of the run into $out/report"
"$PYTHON" "$root/scripts/make_report.py" --best "$out/ckpt" -o "$out/report"

cat <<END

Done. What there is to see:
  $out/report/report.html         the report of this run, to open in a browser
  $out/test/submission.csv        the predictions, 3,150 rows
  $out/test/pred_seq{0..4}.gif    the five predicted sequences
  $out/ckpt/val_pred_large.gif    pose, prediction and ground truth of the validation sequence
  $out/ckpt/psnr_per_frame.png    PSNR per frame in validation
  $out/ckpt/history.csv           one row an epoch
END
