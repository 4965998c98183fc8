#!/bin/sh
# Builds the CPU kernels here and for 64-bit ARM, runs both (the second under qemu) and compares
# their bits.
#     tests/aarch64/run.sh [folder for what it builds]
# Debian: apt install g++-aarch64-linux-gnu qemu-user
set -eu
out=${1:-build/aarch64}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")"
flags="-std=c++20 -static -O3 -ffp-contract=off -fno-math-errno -Wno-maybe-uninitialized"
kernels="reparam/cpu step/norm step/winograd"
build() {  # build COMPILER PROGRAM
  for name in $kernels; do
    $1 $flags -DPEGASUS_LEVEL=baseline -c "../../csrc/${name}_kernels.cpp" \
      -o "$out/$(basename "$name").o"
  done
  $1 $flags digest.cpp "$out/cpu.o" "$out/norm.o" "$out/winograd.o" -o "$2"
}
build "${CXX:-c++}" "$out/here"
build aarch64-linux-gnu-g++ "$out/arm"
"$out/here" > "$out/here.txt"
qemu-aarch64 "$out/arm" > "$out/arm.txt"
diff "$out/here.txt" "$out/arm.txt"
echo "$(wc -l < "$out/arm.txt") lines: the kernels give the same bits on aarch64"
