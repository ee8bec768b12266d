#!/bin/sh
# One server over N GPUs, tokens and experts split N ways: sh eval/serving_bench/ranks.sh CHECKPOINT N OUT [more SGLang arguments]
# Asks for greedy answers (one request at a time, so all ranks but one are idle), then loads all ranks with bursts, aborts and
# prompts longer than a rank's prefill chunk for MINUTES, and writes what every rank's kernel counted. NVLink multicast stays off.
set -eu
model=$1 ranks=$2 out=$(mkdir -p "$3" && cd "$3" && pwd)
shift 3
export PYTHONSAFEPATH=1 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NCCL_NVLS_ENABLE=0
here="python3 -m hopper_moe.eval.serving_bench"
cat > "$out/check.sh" <<'CHECK'
set -u
$HERE.compare ask "$SERVER_URL" "$OUT/ask.json"
curl -s "$SERVER_URL/metrics" | grep '^hopper_moe:' > "$OUT/metrics-one-at-a-time.txt"
$HERE.soak "$SERVER_URL" --minutes "${MINUTES:-1}" --log "$SERVER_LOG" --out "$OUT/soak.json"; soaked=$?
$HERE.compare ask "$SERVER_URL" "$OUT/ask-again.json"
$HERE.compare diff "$OUT/ask.json" "$OUT/ask-again.json"
curl -s "$SERVER_URL/metrics" | grep '^hopper_moe:' | tee "$OUT/metrics.txt"
exit $soaked
CHECK
OUT=$out HERE=$here $here.serve "$model" --kernel "${HOPPER_MOE_KERNEL:-mxfp4_mega}" --port "${PORT:-31000}" --log "$out/server.log" \
    --ready-timeout "${READY:-600}" --run "sh $out/check.sh" -- --tp "$ranks" --dp "$ranks" --enable-dp-attention --ep "$ranks" \
    --disable-custom-all-reduce --context-length 65536 --mem-fraction-static 0.85 --max-total-tokens 1048576 \
    --max-running-requests 128 --cuda-graph-max-bs-decode 64 --enable-metrics "$@"
