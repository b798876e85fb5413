"""A server of forks: programs as one process, or as two of one group as torchrun starts them.

python tests/pairs.py    # a request per line: {"folder": ..., "commands": [[word, ...], ...], "alone": false}

What the programs say goes to <folder>/<i>.out and .err; the answer is a line of their exit statuses. PyTorch and what a
run imports late are imported once for all of them.
"""

import json
import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import IO

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
# Before the fork, with what a run imports late: each process would take seconds for it.
import matplotlib.pyplot  # noqa: E402, F401  (by TensorBoard, for pictures)
import sklearn.cluster  # noqa: E402, F401
import torch  # noqa: E402
import torch._dynamo  # noqa: E402  (by the first optimizer)
import torch.utils.tensorboard  # noqa: E402
from helpers import bare_pictures  # noqa: E402

import train  # noqa: E402, F401
import utils.summary  # noqa: E402, F401


def fork(words: list[str], environ: dict[str, str], out: int | None = None, err: int | None = None) -> int:
    """Run `words[0]` with the other words as flags in a copy of this process; its process id.

    `out` and `err` are file descriptors for what it says.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    status = 99
    try:
        os.environ.update(environ)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # requests are not the program's
        torch.set_num_threads(1)  # the threads of this process are not there any more
        if out is not None and err is not None:
            os.dup2(out, 1)
            os.dup2(err, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        sys.argv = list(words)
        runpy.run_path(str(REPO / words[0]), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def start(*words: str, out: Path | None = None, alone: bool = False) -> list[int]:
    """Fork a process if `alone`, or else two of one group; their process ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": str(port), "MASTER_ADDR": "127.0.0.1"}
    ranks = [{}] if alone else [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    said = [os.open(out.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            for suffix in (".out", ".err")] if out else []  # fmt: skip
    pids = [fork(list(words), environ, *said) for environ in ranks]
    for file in said:
        os.close(file)
    return pids


def end(pids: list[int]) -> list[int]:
    """Their exit statuses."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


class Forked:
    """What `report.compare` needs of subprocess.Popen, for tests of something else than the start of a process."""

    def __init__(self, words: list[str], env: dict[str, str], stdout: IO, **_):
        self.pid = fork(words[1:], env, stdout.fileno(), stdout.fileno())
        self.returncode: int | None = None

    def poll(self, options: int = os.WNOHANG) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int | None:
        return self.poll(0)

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


if __name__ == "__main__":
    sys.modules["pairs"] = sys.modules["__main__"]  # a program that imports it gets this one
    with bare_pictures():
        for line in sys.stdin:
            request = json.loads(line)
            ended = []
            for i, words in enumerate(request["commands"]):
                out = Path(request["folder"], f"{i}.out")
                ended.append(end(start(*words, out=out, alone=request["alone"])))
            print(json.dumps(ended), flush=True)
