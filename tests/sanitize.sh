#!/bin/sh
# sanitize.sh [cuda [pytest's arguments]]
# The op and kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer, with extensions of their own in
# build/; "cuda": of the kernels for CUDA, on the CPU, the values alone. Leaks are left to test_no_leak: CPython's own would drown ours. torch.compile is left out, it builds
# and loads libraries that no sanitizer has seen.
set -eu
cd "$(dirname "$0")/.."
root=$PWD
python=$(command -v "${PYTHON:-python3}")
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
cuda=off place=$root/build/sanitize only=test_
if [ "${1:-}" = cuda ]; then
  cuda=on_cpu place=$root/build/sanitize-cuda only=TestValues
  shift
fi

flags="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-wrapv"
"$python" -m pip install -q --disable-pip-version-check "setuptools>=77"
WHISPERKV_CUDA=$cuda WHISPERKV_CFLAGS="$flags" WHISPERKV_LDFLAGS="$flags" \
  "$python" setup.py -q build_ext --build-temp "$place/objects" --build-lib "$place"
cp -r whisperkv/*.py whisperkv/data "$place/whisperkv"

tests=$(ls "$root"/tests/test_fuzz.py "$root"/tests/test_ops.py "$root"/tests/test_cross_ops.py "$root"/tests/test_frames_ops.py \
  "$root"/tests/test_linear_ops.py "$root"/tests/test_step_ops.py "$root"/tests/test_choose_ops.py "$root"/tests/test_prune_ops.py \
  "$root"/tests/test_shim.py "$root"/tests/test_numpy*.py "$root"/tests/test_kernels*.py 2>/dev/null || true)
cd "$place" # so that Python finds whisperkv here
# libstdc++ is named for ASan to find torch's exceptions; -s shows what a sanitizer says before it aborts.
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  "$python" -m pytest -q -s -p no:cacheprovider -k "$only and not compile and not leak and not prototypes and not build_time" \
  "$@" $tests
