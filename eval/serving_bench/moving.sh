#!/bin/sh
# Weights and experts that move under a running server, bit for bit: sh eval/serving_bench/moving.sh CONFIG_DIR N OUT
# CONFIG_DIR holds a DeepSeek-V4 config.json of few layers and a tokenizer; N: GPUs, 1 or more. Two checkpoints of random weights,
# a fresh server of the second, a refresh of the first by every call of a trainer (by checkpoint-engine's on one GPU, where it is
# installed), sleep, bad updates; on several GPUs EPLB under load, too. PARTS (refresh,rebalance) names the parts, STEPS the steps
# of the refresh. A part that fails does not stop the next one; the exit code says so.
set -u
config=$1 gpus=$2 out=$(mkdir -p "$3" && cd "$3" && pwd)
export PYTHONSAFEPATH=1 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NCCL_NVLS_ENABLE=0 HOPPER_MOE_KERNEL="${HOPPER_MOE_KERNEL:-mxfp4_mega}"
here="python3 -m hopper_moe.eval.serving_bench"
common="--context-length 65536 --mem-fraction-static 0.5 --max-total-tokens 524288 --max-running-requests 64 \
    --cuda-graph-max-bs-decode 32 --enable-metrics"
[ "$gpus" = 1 ] || common="--tp $gpus --dp $gpus --enable-dp-attention --ep $gpus --disable-custom-all-reduce $common"
steps=same,other,load,many,sleep,distributed,bad
# SGLang takes updates from checkpoint-engine without data parallelism only.
if [ "$gpus" = 1 ] && python3 -c 'import checkpoint_engine' 2> /dev/null; then steps=$steps,ipc; fi
failed=0
runs() { case ",${PARTS:-refresh,rebalance}," in *",$1,"*) ;; *) return 1 ;; esac; }

test -e "$out/ckpt/config.json" || $here.random_checkpoint "$config" "$out/ckpt" --mtp || exit 1
test -e "$out/ckpt1/config.json" || $here.random_checkpoint "$config" "$out/ckpt1" --mtp --seed 1 || exit 1

# One server after the other: each reads the free memory of the GPUs, and a second one's ports may be the first one's.
if runs refresh; then
    $here.serve "$out/ckpt1" --port 31000 --log "$out/other.log" --ready-timeout 600 \
        --run "$here.refresh record \$SERVER_URL $out/other.json" -- $common || failed=1
    $here.serve "$out/ckpt" --port 31000 --log "$out/refresh.log" --ready-timeout 600 \
        --run "$here.refresh measure \$SERVER_URL $out/ckpt --other $out/ckpt1 --other-answers $out/other.json --ranks $gpus \
            --steps ${STEPS:-$steps} --group-backend gloo \
            --log $out/refresh.log --out $out/refresh.json" \
        -- $common --enable-memory-saver || failed=1
fi
if [ "$gpus" -gt 1 ] && runs rebalance; then
    $here.serve "$out/ckpt" --port 31000 --log "$out/rebalance.log" --ready-timeout 600 \
        --run "$here.rebalance \$SERVER_URL --log $out/rebalance.log --out $out/rebalance.json" \
        -- $common --enable-eplb --ep-num-redundant-experts 16 --eplb-rebalance-num-iterations 150 || failed=1
fi
exit $failed
