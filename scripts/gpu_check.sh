#!/usr/bin/env bash
# What a machine with one GPU can tell within ten minutes, without network: do the tests pass there,
# does the recommended command train, what does it cost. Needs PyTorch 2.6 and Python 3.10 or newer.
#
#   bash scripts/gpu_check.sh OUT                        # OUT/summary.md is for docs/PERFORMANCE.md
#   bash scripts/gpu_check.sh OUT tests profile          # these steps again, the others stay
#   GPU_CHECK_DEVICE=cpu bash scripts/gpu_check.sh OUT   # at tiny sizes, which measures nothing
#
# Every step has its own time limit and its log in OUT; one that fails does not stop the next. Exit
# status 0 only when all steps pass.
set -u
[ $# -ge 1 ] || { echo "usage: bash scripts/gpu_check.sh OUT [STEP...]" >&2; exit 2; }
steps=" data train rollout profile benchmark tests train_compiled benchmark_compiled fallbacks "
for name in "${@:2}"; do
    case $steps in *" $name "*) ;; *) echo "STEP $name: expected one of$steps" >&2; exit 2 ;; esac
done
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/scripts/python.sh"
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
shift
chosen=" $* "
export GPU_CHECK_DEVICE=${GPU_CHECK_DEVICE:-cuda}  # read by the tests and gpu_report.py too
cd "$root"

frames=1200 sequence=630 runs=3 rollout=100 patience=1 sizes=() tiny=() training=training
workers=$(nproc)  # most of the tests' time is compiling, by the CPU
[ "$workers" -le 6 ] || workers=6
if [ "$GPU_CHECK_DEVICE" = cpu ]; then
    frames=64 sequence=12 runs=1 rollout=4 patience=6 tiny=(--quick) training= workers=0
    sizes=(--frame_H 16 --frame_W 16 --F_dim 16 --L_dim 8 --N_dim 4 --D_out_dim 16 --val_vi_len 12)
    export TORCHDYNAMO_DISABLE=1  # --compile is passed, but kernels take a CPU minutes to build
fi

mkdir -p "$out/steps"
failed=0
step() {  # step NAME SECONDS COMMAND...
    local name=$1 limit=$(($2 * patience)) began=$SECONDS status=0
    case $chosen in "  " | *" $name "*) ;; *) return ;; esac
    shift 2
    echo "== $name (at most $limit s): $*"
    timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1 || status=$?
    printf '{"status": %s, "seconds": %s, "limit": %s}\n' \
        "$status" "$((SECONDS - began))" "$limit" > "$out/steps/$name.json"
    [ $status -eq 0 ] || { failed=1; echo "   exit status $status:"; tail -n 3 "$out/$name.log"; }
}

device=(--device "$GPU_CHECK_DEVICE")
data=(--DR "$out/data")
train=("$python" Trainer.py "${data[@]}" --fast_train --num_epoch 2 --tfr_sde 1 --tfr_d_step 1
       "${device[@]}" "${sizes[@]}")
bench=("$python" scripts/benchmark.py "${data[@]}" --runs "$runs" --rollout_frames "$rollout"
       "${device[@]}" "${tiny[@]}")

step data 15 "$python" scripts/make_demo_data.py "$out/data" --train_frames "$frames" \
    --sequence_frames "$sequence"
step train 75 "${train[@]}" --save_root "$out/train"
step rollout 40 "$python" Tester.py "${data[@]}" --save_root "$out/rollout" \
    --ckpt_path "$out/train/best.ckpt" "${device[@]}"
step profile 50 "$python" scripts/gpu_report.py profile "$out"
step benchmark 75 "${bench[@]}" --only $training pool rollout memory \
    --json "$out/benchmark.json"
step tests 135 "$python" -m pytest -q -n "$workers" --dist worksteal -m gpu tests/test_gpu.py \
    --junitxml "$out/tests.xml"
step train_compiled 110 "${train[@]}" --save_root "$out/train_compiled" --compile
step benchmark_compiled 80 "${bench[@]}" --only pool --compile --json "$out/benchmark_compiled.json"
step fallbacks 3 bash -c '! grep -sE "no CUDA graph|does not work here" "$0"/*.log' "$out"
"$python" scripts/gpu_report.py summary "$out" || failed=1
exit $failed
