#!/bin/bash
# Everything about the kernels beside mxfp4_mega that needs one H200, in about 5 minutes: contract tests, w4a16 at the published
# shapes, all kernels on one layer, the accuracy table. Needs pytest, sglang, flashinfer and deep_gemm importable, and nvcc.
#   kernels/benchmarks/h200_session.sh OUT    from the root of the repository; a step that fails does not stop the next one
out=${1:?"give a folder for the results"}
tokens="1 2 4 8 16 32 64 128 512 2048"
python=${PYTHON:-python3}
for shape in flash pro v3; do
  $python -m hopper_moe.eval.layer_bench.compile_deep_gemm --shape $shape --tokens $tokens &
done
(cd tests && timeout 120 $python -m pytest -q -m gpu test_w4a16_gpu.py)
(cd tests && timeout 240 $python -m pytest -q -m gpu test_kernel_contract.py)
wait
bench="$python -c 'from hopper_moe.eval.layer_bench.cli import main; main()'"
for shape in flash pro v3; do
  eval timeout 150 "$bench" backends --shape $shape --tokens $tokens --out "$out" --update-auto
done
eval timeout 90 "$bench" accuracy
