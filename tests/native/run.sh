#!/usr/bin/env bash
# Build the C++ test driver and run it: under sanitizers on this machine, or for 64-bit ARM under qemu.
# Usage: tests/native/run.sh sanitize|arm
set -euo pipefail
cd "$(dirname "$0")/../.."
mode=${1:-sanitize}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
common=(-std=c++17 -Isrc/anybits/csrc -fno-math-errno -fno-trapping-math -Wno-psabi)
if [ "$mode" = arm ]; then
    cxx=(aarch64-linux-gnu-g++ -O2 -static "${common[@]}")
else
    # Leaks of the per-thread buffer at exit are freed by its destructor; anything else is an error.
    cxx=("${CXX:-g++}" -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all "${common[@]}")
fi
declare -A flags
flags[isa_neon_dot]=$([ "$mode" = arm ] || [ "$(uname -m)" = aarch64 ] && echo -march=armv8.2-a+dotprod || true)
if [ "$mode" != arm ] && [ "$(uname -m)" = x86_64 ]; then
    flags[isa_avx2]="-mavx2 -mfma -mf16c"
    flags[isa_avx512]="-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi -mavx512vnni -mgfni"
    flags[step_avx2]=${flags[isa_avx2]}
    flags[step_avx512]=${flags[isa_avx512]}
    flags[step_avx512_bf16]="${flags[isa_avx512]} -mavx512bf16"
    flags[isa_avx512_bf16]=${flags[step_avx512_bf16]}
    flags[isa_amx]="${flags[isa_avx512]} -mamx-tile -mamx-int8"
fi
for source in blob dispatch product layer threads isa_portable isa_avx2 isa_avx512 isa_avx512_bf16 isa_amx isa_neon isa_neon_dot step step_portable step_avx2 step_avx512 step_avx512_bf16; do
    # shellcheck disable=SC2086
    "${cxx[@]}" ${flags[$source]:-} -c "src/anybits/csrc/$source.cpp" -o "$out/$source.o" &
done
"${cxx[@]}" -c tests/native/driver.cpp -o "$out/driver.o"
"${cxx[@]}" -c tests/native/step.cpp -o "$out/step_driver.o"
"${cxx[@]}" -c tests/native/layer.cpp -o "$out/layer_driver.o"
wait
"${cxx[@]}" "$out"/*.o -o "$out/driver" -ldl
if [ "$mode" = arm ]; then
    qemu-aarch64 -cpu cortex-a57 "$out/driver"  # without dot products
    qemu-aarch64 -cpu max "$out/driver"
else
    "$out/driver"
fi
