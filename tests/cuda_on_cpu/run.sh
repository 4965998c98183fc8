#!/bin/sh
# Builds the CUDA source for the CPU under sanitizers and compares it with the CPU kernels.
#     tests/cuda_on_cpu/run.sh [sanitizers, default address,undefined] [folder for what it builds]
set -eu
sanitizers=${1:-address,undefined}
out=${2:-build/cuda_on_cpu}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")"
flags="-std=c++20 -O1 -g -pthread -ffp-contract=off -fno-math-errno -fsanitize=$sanitizers -fno-sanitize-recover=all"
${CXX:-c++} $flags -DPEGASUS_LEVEL=baseline -Wno-maybe-uninitialized -c ../../csrc/cpu.cpp -o "$out/cpu.o"
${CXX:-c++} $flags -DPEGASUS_MAX_BLOCKS=2 -I. -I../../csrc compare.cpp "$out/cpu.o" -o "$out/compare"
"$out/compare" quick
