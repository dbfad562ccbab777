#!/usr/bin/env bash
# Everything that only a CUDA card can tell, the most important first: fast equals slow, then how fast.
# Goes on after a failure and says at the end what failed. Rows go to bench/results/<card>.
#
#     bash bench/gpu.sh [GIB]     memory that a step may use, as a smaller card has; default 24
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
cap="${1:-24}"
failed=()

try() {
  echo "+ $*"
  "$@" || failed+=("$*")
}

# In parts, since most of the time is compilation and a failure should not cost all of it. (What is
# compiled ahead of time needs no GPU, and is tested without one.)
try python -m pytest -q -m "not slow" tests/unit/test_qlora.py tests/kernels/test_linear_logprob*.py
try python -m pytest -q -m "not slow" tests/kernels/test_tree_attention_triton.py -k "budget or sizes"
try python -m pytest -q -m "not slow" tests/kernels/test_tree_attention_triton.py -k "not budget and not sizes"
try python -m scmini verify --device cuda
try python -m pytest -q -m "not slow" tests/kernels/test_tree_attention_gpu.py tests/kernels/test_three_ways.py
try python -m pytest -q -m "not slow" tests/gpu
try python -m pytest -q -m gpu tests/unit
try python bench/run.py head --device cuda --skip-tests
try python bench/run.py attention --device cuda --skip-tests
try python bench/run.py packing --device cuda --skip-tests
# its processor's work, at half the size
try python bench/run.py filter --device cuda --skip-tests --prompts 100000 --rounds 3
# needs vLLM here, or SCMINI_VLLM_PYTHON
try python bench/run.py sample --device cuda --skip-tests --rounds 2
for case in 512,256,8 128,128,16 1024,512,16 512,256,16 256,1024,16; do
  try python bench/run.py step --device cuda --skip-tests --case "$case" --cap-gib "$cap" --rounds 3
done
try python bench/plot.py

printf 'failed: %s\n' "${failed[@]:-nothing}"
[ "${#failed[@]}" -eq 0 ]
