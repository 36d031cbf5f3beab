#!/usr/bin/env bash
# Makes the environment: torch first and alone, in the build this machine can run, then everything else at the
# pinned versions. Anything that lets torch float downloads gigabytes of CUDA libraries onto machines without a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
extras="espeak${2:+,$2}"  # `dev,kernels` adds what the tests need: an S3 server, references, Triton
here=infra

say() { printf '== %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 2; }

if [ -n "${MIRRORS:-}" ]; then
    [ -f "$here/mirrors-$MIRRORS.env" ] || fail "there is no infra/mirrors-$MIRRORS.env; unset MIRRORS or write one"
    set -a; . "$here/mirrors-$MIRRORS.env"; set +a
fi
export PIP_INDEX_URL="${PIP_INDEX_URL:-${UV_DEFAULT_INDEX:-}}"
[ -n "$PIP_INDEX_URL" ] || unset PIP_INDEX_URL

python=
for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate; break
    fi
done
[ -n "$python" ] || fail "Python 3.11 or newer is needed; install one, or name it: make setup PYTHON=/path/to/python"

if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$venv"
    "$python" -m venv "$venv" || fail "$python cannot make environments; install its venv module (Debian: apt install python3-venv)"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

torch=$(grep '^torch==' "$here/constraints.txt")
answers() { "$venv/bin/python" - "$1" <<'PY'
import sys, urllib.request
try:
    urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=5).read(1)
except Exception:
    sys.exit(1)
PY
}
wheels=${TORCH_WHEELS:-https://download.pytorch.org/whl}
index=()
if [ -n "${TORCH_INDEX:-}" ]; then
    build="the build at TORCH_INDEX"; index=(--index-url "$TORCH_INDEX")
elif driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) && [ -n "$driver" ]; then
    cuda=cu130; [ "${driver%%.*}" -ge 580 ] || cuda=cu128
    build="the $cuda build, for driver $driver (about 3 GB)"
    index=(--index-url "$wheels/$cuda")
elif pip install --dry-run --quiet --no-index --no-deps "$torch" >/dev/null 2>&1; then
    build="the build in the configured find-links"; index=(--no-index --no-deps)
elif answers "$wheels/cpu"; then
    build="the CPU build (about 200 MB)"; index=(--index-url "$wheels/cpu")
else
    build="whatever the configured index has (may be a CUDA build of several GB)"
fi
if pip show --quiet torch 2>/dev/null; then
    say "torch is already installed"
else
    say "installing $torch: $build"
    pip install --quiet ${index[@]+"${index[@]}"} "$torch"
fi

if [ -n "${2:-}" ]; then say "adding what the tests need (about 500 MB to download)"
else say "installing nanochat-omni and what it needs (about 400 MB to download)"; fi
pip install --quiet --constraint "$here/constraints.txt" --editable ".[$extras]"
say "ready: $venv/bin/omni --help"
