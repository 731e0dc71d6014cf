#!/bin/sh
# Measure the library on a GPU, in steps of at most nine minutes.
#
#   benchmarks/on_gpu.sh list
#   benchmarks/on_gpu.sh STEP [--out DIR]      leaves DIR/STEP/results.json and results.md (DIR: on_gpu)
#   benchmarks/on_gpu.sh all [--out DIR]       every step in turn, each with nine minutes
#   benchmarks/on_gpu.sh --tiny [--out DIR]    every step with small sizes: a test that a CPU passes in two minutes
#
# Needs no network and no installation of raekit; PYTHON names the interpreter (python3). tools/make_wheels.py collects
# the packages that a machine lacks. RAEKIT_SHARED names the folder with the reference cases. A step that runs out of
# time keeps the tables that were finished; the exit status is 124.

set -u
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root/src:$root/benchmarks:$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
limit=540

step=${1:?"give a step, list, all or --tiny"}
shift
case $step in
    --tiny) exec timeout "$limit" "$python" -m gpu all --tiny "$@" ;;
    all)
        worst=0
        for name in $("$python" -m gpu list | cut -d' ' -f1); do
            timeout "$limit" "$python" -m gpu "$name" "$@" || worst=$?
        done
        exit $worst
        ;;
    *) exec timeout "$limit" "$python" -m gpu "$step" "$@" ;;
esac
