#!/usr/bin/env bash
# Build the wheel, install it where there is no compiler, and run its kernels there.
#
#     scripts/check_wheel.sh [WHEEL]       # without WHEEL one is built
#
# On Linux with user namespaces the folders of compilers and headers are covered with empty ones; elsewhere the script
# goes on only if there is no compiler anyway.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
wheel=${1:-}
if [ -z "$wheel" ]; then
    python3 -m pip wheel --quiet --no-deps --wheel-dir "$work" .
    wheel=$(ls "$work"/anybits-*.whl)
fi
echo "wheel: $(basename "$wheel"), $(du -k "$wheel" | cut -f1) KiB"

cat > "$work/inside.sh" <<'INSIDE'
set -euo pipefail
work=$1 wheel=$2 constraints=$3
for folder in /usr/lib/gcc /usr/libexec/gcc /usr/include /usr/lib/llvm*; do
    if [ -d "$folder" ]; then mount -t tmpfs none "$folder" 2>/dev/null || true; fi
done
if echo 'int main() {}' | c++ -x c++ -c -o /dev/null - 2>/dev/null; then
    echo "a C++ compiler still works here, so nothing would be shown"
    exit 1
fi
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet --constraint "$constraints" torch
venv/bin/python -m pip install --quiet --constraint "$constraints" "$wheel"
venv/bin/python - <<'CHECK'
from anybits.kernels import cpu

library = cpu.library()
assert library is not None, "the wheel's kernels did not load"
print("kernels:", cpu.ISAS[library.isa_best()])
CHECK
model=$(venv/bin/python -c 'from pathlib import Path; import anybits; print(Path(anybits.__file__).parent / "demo/model")')
venv/bin/anybits quantize "$model" --out quantized --preset fast --precisions 2-4
for precision in 2 3 4; do
    venv/bin/anybits generate quantized --prompt "def read(path):" --precision "$precision" --max-new-tokens 16
done
INSIDE
inside=(bash "$work/inside.sh" "$work" "$(realpath "$wheel")" "$PWD/constraints.txt")
if unshare -rm true 2>/dev/null; then
    unshare -rm "${inside[@]}"
else
    "${inside[@]}"
fi
