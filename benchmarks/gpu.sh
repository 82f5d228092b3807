#!/usr/bin/env bash
# All that a GPU has to say about this library, in one command of less than ten minutes:
#
#     benchmarks/gpu.sh [--dry-run]
#
#     part        what                                             leaves in $OUT (build/gpu)
#     tests       tests/gpu: the engine on the device              tests.log
#     kernels     tests/kernels: the kernels, compiled             kernels.log
#     bench       python -m fusedpo.benchmarks.gpu                 bench.log, gpu.json
#     tune        python -m fusedpo.kernels.tune, if time is left  tune.log, tune.json
#     budget, length, references, precision: python -m fusedpo.benchmarks.PART --quick, if time is
#                 left                                             PART.log, PART.png, MACHINE.json
#
# A part that fails or runs out of time does not stop the next one. It is named in the last lines,
# and the exit status is 1.
#
# PYTHON (python3) has to have torch with CUDA, triton, numpy, pytest, hypothesis and mpmath.
# pytest-xdist, liger-kernel and trl are used where they are installed; without, tests run one after
# the other, and those programs are missing in the tables. Where nothing can be installed, unpack
# wheels into a folder and name it in PYTHONPATH. The repository need not be installed.
#
# --dry-run tries the parts on the CPU at tiny sizes, in Triton's interpreter; no number of it means
# anything. Of those from budget on, which are one program at heart, it tries the first.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
out=${OUT:-build/gpu}
limit=575 # seconds for everything
dry=
case "${1:-}" in
--dry-run) dry=1 ;;
"") ;;
*)
    echo "usage: benchmarks/gpu.sh [--dry-run]" >&2
    exit 2
    ;;
esac
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
[ -z "$dry" ] || export OMP_NUM_THREADS=1

verdicts=()
failed=0
left() { echo $((limit - SECONDS)); }

# part NAME LIMIT LEAST COMMAND...: run it for at most LIMIT seconds; not at all with fewer than LEAST
part() {
    local name=$1 most=$2 least=$3 begin=$SECONDS status=0
    shift 3
    if [ "$(left)" -lt "$least" ]; then
        verdicts+=("$name: no time was left for it")
        return
    fi
    if [ "$(left)" -lt "$most" ]; then most=$(left); fi
    echo "=== $name: $*"
    timeout --kill-after=5 "$most" "$@" 2>&1 | tee "$out/$name.log" || status=$?
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

pytest=("$python" -m pytest -q --tb=short -p no:cacheprovider --maxfail=40)
if [ -z "$dry" ] && "$python" -c 'import xdist' 2>/dev/null; then
    # much of the time goes into compiling kernels
    workers=$(nproc)
    pytest+=(-n "$((workers < 12 ? workers : 12))" --dist loadgroup)
fi
# what needs no GPU is tested without one
elsewhere=(--ignore tests/kernels/test_machine_code.py --ignore tests/kernels/test_tune.py)

if [ -n "$dry" ]; then
    export FUSEDPO_TEST_DEVICE=cpu
    part tests 120 1 "${pytest[@]}" tests/gpu
    part kernels 60 1 "${pytest[@]}" "${elsewhere[@]}" tests/kernels/test_tail.py \
        -k "links_with_their_options"
    part bench 120 1 "$python" -m fusedpo.benchmarks.gpu --dry-run --json "$out/gpu.json"
    part tune 60 1 "$python" -m fusedpo.kernels.tune --dry-run --json "$out/tune.json"
    tiny=(--device cpu --threads 1 --quick --shapes 64,16,512 --seconds 1)
    part budget 60 1 "$python" -m fusedpo.benchmarks.budget "${tiny[@]}" \
        --peers full_logits fusedpo --output "$out"
else
    export FUSEDPO_TEST_DEVICE=cuda
    part tests 120 1 "${pytest[@]}" tests/gpu
    part kernels 80 1 "${pytest[@]}" "${elsewhere[@]}" tests/kernels
    part bench 340 60 "$python" -m fusedpo.benchmarks.gpu --seconds 290 --json "$out/gpu.json"
    part tune 60 40 "$python" -m fusedpo.kernels.tune --seconds 25 --rounds 10 \
        --json "$out/tune.json"
    # those that compile nothing of their own: there is no time for it
    quick=(--device cuda --quick --seconds 5 --output "$out"
        --peers full_logits linear_cross_entropy trl liger fusedpo)
    part budget 90 60 "$python" -m fusedpo.benchmarks.budget "${quick[@]}"
    part length 90 60 "$python" -m fusedpo.benchmarks.length "${quick[@]}"
    part references 60 45 "$python" -m fusedpo.benchmarks.references "${quick[@]}"
    part precision 60 45 "$python" -m fusedpo.benchmarks.precision "${quick[@]}"
fi

echo
echo "=== after $SECONDS s; results are in $out"
printf '%s\n' "${verdicts[@]}"
exit "$failed"
