#!/usr/bin/env bash
# Raw clips to a training folder: own clips by a table or a folder per class, or a published dataset.
#
#   bash scripts/prepare.sh --table clips.csv --raw RAW --out OUT       # columns file,label; clip,start,end,part,group
#   bash scripts/prepare.sh --raw RAW --out OUT                         # a folder per class: RAW/<class>/*.mp4
#   bash scripts/prepare.sh --dataset GRID --raw RAW --role digit --out OUT
#   python train.py --train --dataset folder --data_root OUT            # then train; nothing else is needed
# All flags: --help. Interrupt it whenever you like and start it again. docs/own-data.md and data/README.md say more.
set -euo pipefail
here=$PWD # _env.sh changes the directory; paths count from where they were typed
full() { case $1 in /* | "") echo "$1" ;; *) echo "$here/$1" ;; esac; }
words=()
while [ $# -gt 0 ]; do
    case $1 in
        --table | --raw | --out | --split_dir | --annotations | --check)
            words+=("$1")
            [ $# -lt 2 ] || { words+=("$(full "$2")") && shift; }
            ;;
        --table=* | --raw=* | --out=* | --split_dir=* | --annotations=* | --check=*)
            words+=("${1%%=*}=$(full "${1#*=}")")
            ;;
        --arrays)
            words+=("$1")
            [ $# -lt 2 ] || { words+=("${2%%=*}=$(full "${2#*=}")") && shift; }
            ;;
        *) words+=("$1") ;;
    esac
    shift
done
source "$(dirname "$0")/_env.sh"
exec "$PYTHON" -m dataset.prepare ${words[@]+"${words[@]}"}
