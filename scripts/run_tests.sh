#!/usr/bin/env bash
# Lint, formatting, types and every test; flags go to pytest: bash scripts/run_tests.sh -k remix -x
# Runs on 2 CPU cores without GPU, network or data; tests that need one of them skip and say so.
ENV_FILES="requirements.txt requirements-dev.txt"
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

# ruff and pyright report before the tests and are counted after them, so that one run tells everything
lint=0 types=0
"$PYTHON" -m ruff check . || lint=1
"$PYTHON" -m ruff format --check . || lint=1
PYRIGHT_PYTHON_IGNORE_WARNINGS=1 "$PYTHON" -m pyright --pythonpath "$PYTHON" || types=1 # asks for no newer one
# A file at a time per process, since its tests share fixtures; one thread each, since they share the cores.
tests=0
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -n auto --maxprocesses 4 --dist loadfile "$@" || tests=$?
if [ "$lint" -ne 0 ]; then
    echo "error: ruff found something, see above the tests; type: ruff check --fix . && ruff format ." >&2
fi
if [ "$types" -ne 0 ]; then
    echo "error: pyright found something, see above the tests" >&2
fi
[ $((lint + types)) -eq 0 ] || exit 1
exit "$tests"
