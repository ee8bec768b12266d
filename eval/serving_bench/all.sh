#!/bin/sh
# Everything that README.md here reports, in one go: sh eval/serving_bench/all.sh CONFIG_DIR OUT [more SGLang arguments]
# CONFIG_DIR holds a DeepSeek-V4 config.json of few layers and a tokenizer. SGLang and this package must be importable by python3;
# SECONDS_OF_LOAD bounds the measurement (the loads that matter most come first), MINUTES the soak.
set -eu
config=$1 out=$(mkdir -p "$2" && cd "$2" && pwd)
shift 2
export PYTHONSAFEPATH=1 HOPPER_MOE_KERNEL=${HOPPER_MOE_KERNEL:-mxfp4_mega}
here="python3 -m hopper_moe.eval.serving_bench"
# A tenth of the tokens is the pool of the sliding window, in pages of 256: 128 requests need 2 million, or they queue for pages.
common="--context-length 65536 --mem-fraction-static 0.85 --max-total-tokens 2097152 --max-running-requests 128 --enable-metrics $*"
model=$out/checkpoint
test -e "$model/config.json" || $here.random_checkpoint "$config" "$model"

# The reference first, alone: nothing else may be slowed down by it, nor it by anything.
$here.serve "$model" --kernel reference --port 30900 --log "$out/server-reference.log" \
    --run "$here.compare ask \$SERVER_URL $out/reference.json" -- $common || echo "the reference server failed"

cat > "$out/then.sh" <<'THEN'
for name in hopper_moe marlin flashinfer_mxfp4 flashinfer_mxfp4_fp8; do
    eval "url=\${URL_$(echo "$name" | tr a-z A-Z):-}"
    test -n "$url" || continue
    for c in 64 1; do $HERE.breakdown "$url" --concurrency $c --out "$OUT/step_${c}_$name.json" || true; done
    $HERE.compare ask "$url" "$OUT/ask-$name.json" || true
done
for pair in "ask-hopper_moe reference" "ask-marlin ask-flashinfer_mxfp4" "ask-marlin reference"; do
    set -- $pair
    echo "# $1 $2"; $HERE.compare diff "$OUT/$1.json" "$OUT/$2.json" || true
done > "$OUT/answers.txt"
$HERE.batches "$URL_HOPPER_MOE" --out "$OUT/batches.json" || true
$HERE.soak "$URL_HOPPER_MOE" --minutes "${MINUTES:-1}" --log "$OUT/server-hopper_moe.log" --out "$OUT/soak.json" || true
curl -s "$URL_HOPPER_MOE/metrics" | grep '^hopper_moe:' > "$OUT/metrics.txt" || true
THEN
# FlashInfer tunes itself at its start, so each server starts when the one before it answers.
HERE=$here $here.bench "$model" --backends flashinfer_mxfp4,flashinfer_mxfp4_fp8,marlin,hopper_moe --concurrency 64,1,8,32,128 \
    --also 8192:64,1 --batches 1 --seconds "${SECONDS_OF_LOAD:-720}" --out "$out" --then "sh $out/then.sh" -- $common --cuda-graph-max-bs-decode 128
$here.report "$out"
