#!/usr/bin/env bash
# Run ruff, pyright and all tests. Arguments go to pytest: bash scripts/run_tests.sh -k remix -x
# Needs 2 CPU cores and no GPU, network or data; tests that need one of these are skipped with a message.
ENV_FILES="requirements.txt requirements-dev.txt"
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

# ruff and pyright run before the tests and fail the script after them, so that one run reports everything
lint=0 types=0
"$PYTHON" -m ruff check . || lint=1
"$PYTHON" -m ruff format --check . || lint=1
PYRIGHT_PYTHON_IGNORE_WARNINGS=1 "$PYTHON" -m pyright --pythonpath "$PYTHON" || types=1 # do not suggest a newer pyright
# One test file per process, because its tests share fixtures; one thread per process, because they share the cores.
tests=0
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -n auto --maxprocesses 4 --dist loadfile "$@" || tests=$?
if [ "$lint" -ne 0 ]; then
    echo "error: ruff reported problems (see above the tests); run: ruff check --fix . && ruff format ." >&2
fi
if [ "$types" -ne 0 ]; then
    echo "error: pyright reported problems (see above the tests)" >&2
fi
[ $((lint + types)) -eq 0 ] || exit 1
exit "$tests"
