#!/usr/bin/env bash
# What docs/performance.md says of a GPU, measured anew in one call of at most nine minutes:
#
#     bash benchmarks/gpu.sh [OUT]
#
# Each table is bounded in time by itself, so that one that hangs or fails costs only itself. What has
# never been measured comes first. Output goes to OUT (default: gpu-tables), one file a table.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu-tables}
python=${PYTHON:-python}
mkdir -p "$out"
rm -rf "$out/run"  # where an earlier call was cut off, the trainer would not begin again

table() {  # NAME SECONDS COMMAND...
  local name=$1 seconds=$2
  shift 2
  local began=$SECONDS
  timeout --kill-after=5 "$seconds" "$@" >"$out/$name.txt" 2>&1
  echo "== $name: exit $?, $((SECONDS - began)) s: ${*:2}"
  tail -n 40 "$out/$name.txt"
}

table devices 20 nvidia-smi
table memory 110 $python benchmarks/train_torch.py --steps 2 --seconds 80 --cases 3,6,0,1
table draw-kernels 70 $python benchmarks/generate.py --device cuda --kernels --seconds 50
table draw 50 $python benchmarks/generate.py --device cuda --seconds 40
table draw-compiled 80 $python benchmarks/generate.py --device cuda --compile --seconds 60
table encode 80 $python benchmarks/encode_torch.py --device cuda --rounds 3 --seconds 60
table trainer 60 $python -m qlip_cli train emoji-ship --stage 1 --steps 300 --out "$out/run"
# The rates, which the trainer shows once a minute where there is no terminal.
tail -n 3 "$out/run/stage1/metrics.jsonl" | tee "$out/trainer-metrics.txt"
table train 70 $python benchmarks/train_torch.py --steps 4 --seconds 50 --cases 1,4,7
rm -rf "$out/run"
