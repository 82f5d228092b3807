#!/usr/bin/env bash
# What a GPU has to say about this library, in two calls of a few minutes each:
#
#     benchmarks/gpu.sh [--dry-run] [--only PART,...] [first | second | both]
#
#     call     part     what                                                        seconds at most
#     first    check    tests/gpu/test_parity.py: whether every route is right,     45
#                       and nothing more if one is not
#              bench    fusedpo bench kernels routes: each over its floor, and      130
#                       over the bare products that it makes
#              tune     python -m tools.tune                                        45
#     second   tests    tests/gpu: the engine on the device                         110
#              kernels  tests/kernels: the kernels, compiled                        90
#              more     fusedpo bench routes at other shapes, and tiles             90
#
# The first takes at most 230 s, the second at most 300 s; ``both``, the default, is one after the
# other. Each leaves one archive in $OUT (build/gpu), first.tgz and second.tgz, with logs, answers
# (JSON), plots and the tests' reports (XML), and prints in its last lines, at most 60, what failed.
# A part that fails does not stop the next one, except where a route is wrong. One that runs out of
# time is interrupted (SIGINT); the questions that it has answered are kept. The exit status is 1 if
# one failed.
#
# PYTHON (python3) has to have torch with CUDA, triton, numpy, pytest, hypothesis and mpmath.
# pytest-xdist is used where it is installed; without, tests run one after the other. Where nothing
# can be installed, unpack wheels into a folder and name it in PYTHONPATH. The repository need not
# be installed. Other questions: python -m fusedpo bench length --device cuda, and so on.
#
# --only runs some of the parts. --dry-run tries the parts on the CPU at tiny sizes, tests in
# Triton's interpreter and benchmarks by PyTorch; no number of it means anything.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    echo "usage: benchmarks/gpu.sh [--dry-run] [--only PART,...] [first | second | both]" >&2
    exit 2
}
python=${PYTHON:-python3}
out=${OUT:-build/gpu}
dry= only= calls=
while [ $# -gt 0 ]; do
    case $1 in
    --dry-run) dry=1 ;;
    --only)
        [ $# -gt 1 ] || usage
        only=$2
        shift
        ;;
    first | second) calls=$1 ;;
    both) calls="first second" ;;
    *) usage ;;
    esac
    shift
done
for part in ${only//,/ }; do
    case $part in
    check | bench | tune | tests | kernels | more) ;;
    *) usage ;;
    esac
done
only=${only/bench/check,bench} # nothing is measured of a route that is wrong
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
[ -z "$dry" ] || export OMP_NUM_THREADS=1

failed=0
left() { echo $((limit - SECONDS)); }

# part NAME SECONDS COMMAND...: run it for at most so many seconds of what is left of the call
part() {
    local name=$1 most=$2 begin=$SECONDS status=0
    shift 2
    [ -z "$only" ] || [[ ",$only," == *",$name,"* ]] || return 0
    most=$((most * slack))
    if [ "$(left)" -lt "$most" ]; then most=$(left); fi
    if [ "$most" -lt 10 ]; then
        verdicts+=("$name: no time was left for it")
        return 0
    fi
    echo "=== $name: $*"
    # in a script that runs in the background, an interrupt would be ignored
    env --default-signal=INT timeout --signal=INT --kill-after=10 "$most" "$@" 2>&1 |
        tee "$work/$name.log" || status=$?
    local took="$((SECONDS - begin)) s"
    case $status in
    0) verdicts+=("$name: passed in $took") ;;
    124 | 137)
        failed=1
        verdicts+=("$name: RAN OUT OF TIME after $took")
        ;;
    *)
        failed=1
        verdicts+=("$name: FAILED with status $status after $took; see $name.log")
        ;;
    esac
}

# tests NAME SECONDS ARGUMENTS...
tests() {
    local name=$1 most=$2
    shift 2
    part "$name" "$most" "$python" -m pytest -q -rfEs --tb=short -p no:cacheprovider --maxfail=40 \
        "--junitxml=$work/$name.xml" "${workers[@]}" "$@"
}

# bench NAME SECONDS SECONDS-A-SHAPE QUESTION-OR-OPTION...
bench() {
    local name=$1 most=$2 each=(--seconds "$3" --device cuda)
    shift 3
    [ -z "$dry" ] || each=(--seconds 1 --quick --threads 1 --shapes 16,32,300 32,32,300)
    part "$name" "$most" "$python" -m fusedpo bench "$@" "${each[@]}" --no-verify \
        --output "$work/$name"
}

first() {
    local tiles=(--seconds 40 --rounds 10) right="planner_chooses or losses_equal"
    [ -z "$dry" ] || right="planner_chooses and triton" tiles=(--dry-run)
    tests check 45 tests/gpu/test_parity.py -k "$right"
    if [[ "${verdicts[*]}" == check:* && "${verdicts[*]}" != "check: passed"* ]]; then
        verdicts+=("a route is wrong: nothing else was run")
        return
    fi
    bench bench 130 45 kernels routes
    # compiled at once, since compiling takes longer than measuring
    part tune 45 "$python" -m tools.tune "${tiles[@]}" --processes "$processes" \
        --json "$work/tune.json"
}

second() {
    # what needs no GPU is tested without one
    local elsewhere=(--ignore tests/kernels/test_machine_code.py
        --ignore tests/kernels/test_tune.py --ignore tests/kernels/test_launches.py)
    local which=("${elsewhere[@]}" tests/kernels)
    [ -z "$dry" ] || which=(tests/kernels/test_tail.py -k links_with_their_options)
    # examples of a property are of new shapes, most of which are compiled anew
    export FUSEDPO_TEST_EXAMPLES=8
    tests tests 110 tests/gpu
    tests kernels 90 "${which[@]}"
    bench more 90 10 routes tiles --shapes 1024,4096,128256 16384,4096,128256 8192,4096,32000 \
        8192,4096,262144
}

# what failed, in at most 60 lines
table() {
    grep -hE "^(FAILED|ERROR) |WRONG|MISSED" "$work"/*.log | cut -c 1-160 | head -50 || true
    printf '%s\n' "${verdicts[@]}"
}

workers=() processes=1 slack=1
cores=$(nproc)
if [ -z "$dry" ]; then
    export FUSEDPO_TEST_DEVICE=cuda
    processes=$((cores < 12 ? cores : 12))
    # much of the time goes into compiling kernels
    ! "$python" -c 'import xdist' 2>/dev/null || workers=(-n "$processes" --dist loadgroup)
else
    export FUSEDPO_TEST_DEVICE=cpu
    processes=2 slack=3 # the interpreter, on any machine
fi

for call in ${calls:-first second}; do
    limit=$((SECONDS + 230 * slack)) verdicts=()
    [ "$call" = first ] || limit=$((SECONDS + 300 * slack))
    begin=$SECONDS
    work=$(mktemp -d)
    "$call"
    table >"$work/table.txt"
    tar -czf "$out/$call.tgz" -C "$work" .
    echo
    echo "=== the $call call took $((SECONDS - begin)) s; all of it is in $out/$call.tgz"
    cat "$work/table.txt"
    rm -r "$work"
    if grep -q "a route is wrong" <<<"${verdicts[*]}"; then break; fi
done
exit "$failed"
