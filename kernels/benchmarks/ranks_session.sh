#!/bin/bash
# Everything about several ranks that needs a host with several H200, in about 4 minutes: same bits, delays, graph replays, a killed
# rank; then times with uniform and Zipf routing, FP8 combine and FP4 dispatch on and off. Needs pytest importable, and nvcc.
#   kernels/benchmarks/ranks_session.sh OUT [RANKS]    from the root of the repository; a step that fails does not stop the next one
out=${1:?"give a folder for the results"}
ranks=${2:-4}
python=${PYTHON:-python3}
(cd tests && timeout 240 $python -m pytest -q -m gpu test_mega_moe_ranks_gpu.py -k "$ranks" --replays 5000)
bench="$python -m hopper_moe.kernels.benchmarks.mega_moe --ranks $ranks --out $out"
timeout 60 $bench --shape flash --tokens 1 8 64 512 8192
timeout 60 $bench --shape pro --tokens 64 8192
for options in "" --fp8-combine --fp4-dispatch "--fp8-combine --fp4-dispatch"; do
  timeout 60 $bench --shape flash --tokens 8 64 512 8192 --routing zipf $options
done
