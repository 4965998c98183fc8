#!/bin/sh
# Builds the CUDA source for the CPU under sanitizers and compares it with the CPU kernels.
#     tests/cuda_on_cpu/run.sh [sanitizers, default address,undefined] [folder for what it builds]
set -eu
sanitizers=${1:-address,undefined}
out=${2:-build/cuda_on_cpu}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")"
source=../../csrc/reparam
flags="-std=c++20 -O1 -g -pthread -ffp-contract=off -fno-math-errno -Wno-maybe-uninitialized"
flags="$flags -fsanitize=$sanitizers -fno-sanitize-recover=all"
${CXX:-c++} $flags -DPEGASUS_LEVEL=baseline -c $source/cpu_kernels.cpp -o "$out/cpu.o"
${CXX:-c++} $flags -DPEGASUS_MAX_BLOCKS=2 -I. -I$source compare.cpp "$out/cpu.o" -o "$out/compare"
"$out/compare" quick
