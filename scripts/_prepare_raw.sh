# Common part of prepare_cremad.sh and prepare_ks.sh, which set DATASET. Arguments: RAW [OUT] [flags]
set -euo pipefail
[ $# -ge 1 ] || {
    echo "error: usage: bash scripts/$(basename "$0") RAW [OUT] [flags]" >&2
    exit 2
}
case $1 in -h | --help)
    source "$(dirname "$0")/_env.sh"
    exec "$PYTHON" -m dataset.prepare --help
    ;;
esac
here=$PWD # _env.sh changes the directory; relative paths refer to the caller's
full() { case $1 in /*) echo "$1" ;; *) echo "$here/$1" ;; esac; }
raw=$(full "$1") out=data/$DATASET
shift
case ${1:---} in --*) ;; *) out=$(full "$1") && shift ;; esac
flags=()
while [ $# -gt 0 ]; do
    case $1 in
        --split_dir=*) flags+=(--split_dir "$(full "${1#*=}")") ;;
        --split_dir) flags+=(--split_dir "$(full "${2:-}")") && shift ;;
        *) flags+=("$1") ;;
    esac
    [ $# -eq 0 ] || shift
done
source "$(dirname "$0")/_env.sh"
exec "$PYTHON" -m dataset.prepare --dataset "$DATASET" --raw "$raw" --out "$out" ${flags[@]+"${flags[@]}"}
