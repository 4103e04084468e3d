#!/usr/bin/env bash
# What only a GPU can show, in parts that take at most nine minutes each:
#
#   scripts/gpu_day.sh PART OUT      # needs a GPU
#
#   check    the kernels' tests at full size and the loop's tests against servers with CUDA graphs
#            and overlap, side by side; also compiles what `kernels` measures
#   kernels  one table of ours and of what one would use instead; profile of a training step
#   serve    what AURORA costs a server of Qwen3-8B's shape, outputs compared, swaps under load
#   learn    the demo on a target that is trained here first
#   control  draft steps by cost, rollback, a start without a draft; never slower than plain? With
#            what `learn` left in OUT
#
# Each part writes text and JSON to OUT and goes on after a failure; the last line says what failed.
# PYTHON (default python3) needs torch for CUDA, SGLang, this project, pytest and hypothesis.
# AURORA_SERVER_ARGS are added to every server, AURORA_TEST_TARGET and LEARN_TARGET name targets
# that are there.
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:?"expected a part: check, kernels, serve, learn or control"}
out=$(realpath -m "${2:?expected a directory for what is found}")
python=${PYTHON:-python3}
mkdir -p "$out"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
failed=()
# What a server compiles at its first request would take a third of the time that there is.
eager=(TORCHDYNAMO_DISABLE=1)

# run NAME SECONDS COMMAND...: its output goes to OUT/NAME.txt
run() {
  local name=$1 seconds=$2 began=$SECONDS
  shift 2
  timeout --kill-after 10 "$seconds" "$@" >"$out/$name.txt" 2>&1
  local status=$?
  echo "$name: exit $status after $((SECONDS - began)) s"
  return $status
}

# Waits for what was started beside one another, and remembers what failed.
gather() {
  local pair
  for pair in "$@"; do wait "${pair#*:}" || failed+=("${pair%:*}"); done
}

check() {
  local loop=(tests/loop/test_replay.py tests/loop/test_capture_reference.py)
  run kernel-tests 220 "$python" -m pytest -n 6 tests/kernels \
    --ignore tests/kernels/test_interpreter.py --ignore tests/kernels/test_compile.py &
  local kernels=$!
  run loop-tests 220 env "${eager[@]}" "$python" -m pytest --tb=short "${loop[@]}" &
  local loop_tests=$!
  run flywheel-tests 220 env "${eager[@]}" \
    "$python" -m pytest --tb=short tests/loop/test_on_gpu.py tests/loop/test_flywheel.py &
  local flywheel=$!
  run compile-ahead 200 "$python" scripts/bench_kernels.py --only attention --minutes 3 &
  local ahead=$!
  gather "kernel-tests:$kernels" "loop-tests:$loop_tests" "flywheel-tests:$flywheel"
  wait "$ahead"
}

kernels() {
  run bench-kernels 240 "$python" scripts/bench_kernels.py --minutes 3 --out "$out/bench-kernels.json" \
    || failed+=(bench-kernels)
  run profile-step 90 "$python" scripts/profile_step.py --shape qwen3-8b --device cuda \
    --out "$out/profile-step.json" || failed+=(profile-step)
}

serve() {
  run serve 480 env "${eager[@]}" "$python" scripts/bench_cuda.py --out "$out/serve.json" --logs "$out" \
    || failed+=(serve)
}

learn() {
  local target=${LEARN_TARGET:-$out/target}
  [ -d "$target" ] || run target 240 "$python" scripts/make_target.py --out "$target" \
    --set minutes=3 vocab_size=8192 layers=8 hidden=512 intermediate=1536 heads=8 kv_heads=8 \
    batch_tokens=32768 row_tokens=512 matrix_lr=0.004 other_lr=0.002 unloop_from=0.85 \
    || failed+=(target)
  run learn 270 env "${eager[@]}" "$python" scripts/demo.py --target "$target" --home "$out/home" --minutes 1.5 \
    --frozen-every 8 || failed+=(learn)
  cp "$out"/home/demo-random/{summary.json,accept_length.png} "$out"
}

control() {
  local weights=$out/home/demo-random/weights
  run control-tests 240 env "${eager[@]}" \
    "$python" -m pytest --tb=short tests/loop/test_control.py tests/loop/test_no_draft.py \
    || failed+=(control-tests)
  run bench-control 290 env "${eager[@]}" "$python" scripts/bench_control.py \
    --target "${LEARN_TARGET:-$out/target}" --good "$weights/$(cat "$weights/CURRENT")" \
    --drafts untrained good --clients 1 8 32 --rounds 3 --seconds 3 --out "$out/control.json" \
    || failed+=(bench-control)
}

case $part in
  check | kernels | serve | learn | control) "$part" ;;
  *) echo "gpu_day: no part $part; expected check, kernels, serve, learn or control" >&2; exit 2 ;;
esac
echo "failed: ${failed[*]:-nothing}"
[ ${#failed[@]} = 0 ]
