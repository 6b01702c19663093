#!/usr/bin/env bash
# Everything that needs a GPU, in at most ten minutes: the CUDA tests, then the speed tables, whose CSVs go to
# benchmarks/results. What fails does not stop the rest; what is out of time is left out. The last lines say which.
#
#     benchmarks/gpu.sh [SOURCE]
#
# SOURCE: images, as for `ijepa benchmark --source`; the built-in synthetic ones if left out.
# PYTHON: the interpreter. It needs torch, numpy and pillow; pytest, hypothesis and scikit-learn for the tests; and
#     timm, vit-pytorch and transformers where those are to be compared with.
# LIMIT: seconds for everything, 600 if not set.
# SMALL=1: small sizes, to see on a CPU that it runs end to end; merging, which has no smaller size, is left out.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
source=${1:-synthetic}
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
limit=${LIMIT:-600}
summary=()
failed=0

# part TITLE COMMAND...
part() {
    local title=$1 started=$SECONDS left=$((limit - SECONDS)) state=done code=0
    shift
    printf '\n== %s ==\n' "$title"
    if [ "$left" -le 0 ]; then
        state='left out, no time'
        failed=1
    else
        timeout "$left" "$@" || code=$?
        if [ "$code" -ne 0 ]; then
            state="failed, code $code"
            [ "$code" -eq 124 ] && state='stopped, no time'
            failed=1
        fi
    fi
    summary+=("$title: $state, $((SECONDS - started)) s")
}

benchmark() {
    local theme=$1
    shift
    part "$theme $*" "$PYTHON" -m "ijepa_enhanced.benchmarks.$theme" --csv "$@"
}

# By name: other files need libraries that a bare GPU image lacks.
mapfile -t tests < <(grep -rl --include='*.py' 'mark\.gpu' tests | sort)
part 'CUDA tests' "$PYTHON" -m pytest -q -m gpu "${tests[@]}"
if [ -n "${SMALL:-}" ]; then
    benchmark attention --tokens 512
    benchmark step --source "$source" --variant Ti --patch 16 --tokens 512
    benchmark embed --source "$source" --variant Ti --images 3
else
    benchmark attention
    benchmark step --source "$source"
    benchmark embed --source "$source"
    benchmark embed --source "$source" --variant H --patch 14 --images 64
    benchmark merging --source "$source"
fi
benchmark packing --source "$source"
# Last, as compiling takes minutes.
[ -n "${SMALL:-}" ] || benchmark step --source "$source" --variant L --compile

printf '\n'
printf '%s\n' "${summary[@]}"
exit "$failed"
