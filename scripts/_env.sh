# Environment setup, sourced by every script: changes to the repository root and sets $PYTHON to a suitable interpreter.
#
# The current python3 is used, unmodified, if it has the required packages. Otherwise the script creates .venv,
# completes it after an interruption, and updates it when a requirements file changes. ENV_FILES lists the
# requirements files.
# Compatible with bash 3.2 (macOS).
set -euo pipefail
TYPED_IN=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ENV_FILES=${ENV_FILES:-requirements.txt}
ENV_GB=6 # size of .venv with the CUDA build of torch

# Prints the first requirement that is not met by the interpreter. Only names and versions are read, because importing
# torch would take seconds at every start. Only lower bounds are checked (`==` counts as one): newer packages are the
# user's own choice.
ENV_CHECK='
import re, sys
from importlib import metadata, util
# Imported by another name.
MODULES = {"scikit-learn": "sklearn", "opencv-python-headless": "cv2", "pytest-xdist": "xdist",
           "pyyaml": "yaml"}
SAME = ["opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless"]  # cv2 too
def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text.split("+")[0])[:3]]
def lacks(line):
    name = re.match(r"[\w.-]+", line)[0]
    if util.find_spec(MODULES.get(name, name.replace("-", "_"))) is None:
        return name
    found = ""
    for title in [name, *SAME] if "opencv" in name else [name]:
        try:
            found = found or metadata.version(title)
        except metadata.PackageNotFoundError:
            pass
    if not found:
        return name if name.startswith("torch") else ""  # some distributions keep no record; torch always does
    lowest = re.search(r"[>=]=\s*([\d.]+)", line)
    return f"{lowest[0]} of {name} (has {found})" if lowest and numbers(found) < numbers(lowest[1]) else ""
if sys.version_info < (3, 11):
    print("Python 3.11")
    sys.exit()
for path in sys.argv[1:]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            line = line.split("#")[0].strip()
            if line and lacks(line):
                print(lacks(line))
                sys.exit()
'

# env_paths FLAG...: sets ARGS to the arguments, with relative paths resolved against the caller's working directory.
env_paths() {
    ARGS=()
    while [ $# -gt 0 ]; do
        case $1 in
            --data_root | --log_path | --checkpoint | --predictions | --out | --speech | --doc | --split_dir | \
                --sources | --data | --readme)
                ARGS+=("$1")
                [ $# -lt 2 ] || { ARGS+=("$(env_full "$2")") && shift; }
                ;;
            --data_root=* | --log_path=* | --checkpoint=* | --predictions=* | --out=* | --speech=* | --doc=* | \
                --split_dir=* | --sources=* | --data=* | --readme=*)
                ARGS+=("${1%%=*}=$(env_full "${1#*=}")")
                ;;
            *) ARGS+=("$1") ;;
        esac
        shift
    done
}

env_full() {
    case $1 in
        /* | --* | "") echo "$1" ;;
        *) [ "$TYPED_IN" -ef . ] && echo "$1" || echo "${TYPED_IN%/}/$1" ;;
    esac
}

env_say() { echo "env: $*" >&2; }

env_stop() {
    echo "error: $*" >&2
    exit 2
}

# env_lacks PYTHON [FILE...]: prints the first missing requirement, or nothing if all are met
env_lacks() {
    local python=$1
    shift
    "$python" -c "$ENV_CHECK" "$@" 2>/dev/null </dev/null || echo "an interpreter that starts"
}

# Prints each NAME found on PATH, except in .venv, which can be active and incomplete.
env_on_path() {
    local name found
    for name in "$@"; do
        while IFS= read -r found; do
            [ "$(dirname "$found")" -ef .venv/bin ] || echo "$found"
        done < <(type -ap "$name")
    done
}

env_sum() { cksum <"$1"; }

# The markers are written last, so a .venv without them is incomplete.
env_whole() {
    local file
    for file in $ENV_FILES; do
        [ "$(cat ".venv/.installed-$file" 2>/dev/null)" = "$(env_sum "$file")" ] || return 1
    done
    [ -z "$(env_lacks .venv/bin/python $ENV_FILES)" ]
}

env_make_interpreter() {
    local base python free
    while IFS= read -r python; do
        [ -n "$(env_lacks "$python")" ] || { base=$python && break; }
    done < <(env_on_path python3 python python3.14 python3.13 python3.12 python3.11)
    [ -n "${base:-}" ] || env_stop "Python: found none of 3.11 or newer; install one and run this again"
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1024 / 1024) }')
    [ "$(uname -s)" != Linux ] || [ "${free:-$ENV_GB}" -ge "$ENV_GB" ] ||
        env_stop ".venv: needs about $ENV_GB GB, the disk has $free GB left; free some and run this again"
    find .venv -mindepth 1 -maxdepth 1 ! -name .lock -exec rm -rf {} + # leftovers of a broken environment
    "$base" -m venv .venv ||
        env_stop ".venv: '$base -m venv .venv' failed (see above); on Debian or Ubuntu: sudo apt install python3-venv"
}

env_install() {
    local log=.venv/.install.log file lack flags=() status=0 again="run this again to continue where it stopped"
    for file in $ENV_FILES; do flags+=(-r "$file"); done
    # pip's errors go to the terminal and to a log, its progress bars to the terminal only
    { .venv/bin/python -m pip install --disable-pip-version-check "${flags[@]}" 2>&1 >&3 | tee "$log" >&2; } 3>&1 ||
        status=$?
    if [ "$status" -ne 0 ]; then
        if grep -qi "no space left" "$log"; then
            env_stop ".venv: the disk is full; free about $ENV_GB GB (twice that while unpacking) and $again"
        elif grep -qiE "name resolution|new connection|unreachable|timed out|proxyerror|not known" "$log"; then
            env_stop ".venv: the packages cannot be downloaded (no network?); connect and $again"
        elif grep -qi "no matching distribution" "$log"; then
            env_stop ".venv: no build of a package for $(.venv/bin/python -V) on $(uname -sm); try another Python"
        fi
        env_stop ".venv: pip failed (see above); $again"
    fi
    lack=$(env_lacks .venv/bin/python $ENV_FILES)
    [ -z "$lack" ] || env_stop ".venv: $lack is missing after installation; delete .venv and run this again"
    for file in $ENV_FILES; do
        env_sum "$file" >".venv/.tmp-marker" && mv ".venv/.tmp-marker" ".venv/.installed-$file"
    done
}

env_make() {
    local lack
    mkdir -p .venv 2>/dev/null || env_stop ".venv: cannot be created in $PWD; check permissions, and that it is no file"
    if command -v flock >/dev/null; then # macOS has no flock: do not start two scripts at once the first time
        exec 9>.venv/.lock
        flock -n 9 || { env_say "another script is creating .venv, waiting for it" && flock 9; }
    fi
    if ! env_whole; then
        lack=$(env_lacks .venv/bin/python)
        if [ -n "$lack" ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
            env_say "creating .venv for $ENV_FILES: about $ENV_GB GB, a few minutes, once"
            env_make_interpreter
        else
            env_say ".venv is incomplete or $ENV_FILES changed: installing missing packages (up to $ENV_GB GB, minutes)"
        fi
        env_install
        env_say ".venv is ready"
    fi
    exec 9>&-
}

env_pick() {
    local current lack
    current=$(type -p python3 || type -p python || true)
    if [ -n "$current" ] && ! [ "$(dirname "$current")" -ef .venv/bin ]; then
        lack=$(env_lacks "$current" $ENV_FILES)
        if [ -z "$lack" ]; then
            PYTHON=$current
            return
        fi
    fi
    if ! env_whole; then
        [ -z "${lack:-}" ] || env_say "$current lacks $lack: using .venv (or activate another environment)"
        env_make
    fi
    PYTHON=$PWD/.venv/bin/python
}

env_pick

# Threads that wait for others sleep early, so that training shares the cores with other processes (utils/threads.py).
[ -n "${GOMP_SPINCOUNT+set}${OMP_WAIT_POLICY+set}" ] || export GOMP_SPINCOUNT=1000
