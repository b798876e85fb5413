"""train.py, compiled by a backend that generates no code, each rank's network written at its end.

torchrun --nproc_per_node=2 tests/rank_states.py FOLDER <flags of train.py>
"""

import functools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from models.checkpoint import model_weights
from utils import distributed

folder, argv = Path(sys.argv[1]), sys.argv[2:]
torch.compile = functools.partial(torch.compile, backend="eager")
networks, make, stop = [], train.build_model, distributed.stop


def make_and_remember(*arguments):
    networks.append(make(*arguments))
    return networks[-1]


def write_and_stop():
    torch.save(model_weights(networks[0]), folder / f"rank{distributed.rank()}.pth")
    stop()


train.build_model, distributed.stop = make_and_remember, write_and_stop
train.main(argv)
