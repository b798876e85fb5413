"""Programs as two processes of one group, forked as torchrun starts them: PyTorch is imported once for many of them.

python tests/pairs.py FOLDER COMMANDS    # a JSON list of lists of words; what they say goes to FOLDER/<i>.out and .err
"""

import json
import os
import runpy
import socket
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
import train  # noqa: E402, F401  (before the fork)


def start(*words: str, out: Path | None = None) -> list[int]:
    """Fork two processes that run `words[0]` with the other words as flags; their process ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(2):
        pids.append(os.fork())
        if pids[-1]:
            continue
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in group.items()}, MASTER_ADDR="127.0.0.1")
        if out:
            for number, suffix in ((1, ".out"), (2, ".err")):
                os.dup2(os.open(out.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
        sys.argv, status = list(words), 99
        try:
            runpy.run_path(str(REPO / words[0]), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code or 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return pids


def end(pids: list[int]) -> list[int]:
    """Their exit statuses."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


if __name__ == "__main__":
    folder, commands = Path(sys.argv[1]), json.loads(sys.argv[2])
    print(json.dumps([end(start(*words, out=folder / f"{i}.out")) for i, words in enumerate(commands)]))
