"""train.py in float64 with BatchNorm on its running statistics: one process and two then differ in sums alone.

python tests/double_run.py FILE <flags of train.py>    # writes the network to FILE, with the process's rank behind
"""

import os
import sys
from pathlib import Path
from unittest import mock

import torch
from helpers import REPO, in_two_processes

import train
from models import build_model


class Plain:
    """A network that is given float32 inputs. A teacher's encoders are called past its `forward`."""

    def forward(self, inputs, fed, mask=None):
        self.plain()
        return super().forward({name: x.double() for name, x in inputs.items()}, fed, mask)

    def encode(self, name, x):
        self.plain()
        return super().encode(name, x.double())

    def plain(self):
        for module in self.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()


def main(path: str, *words: str) -> None:
    networks = []

    def build(*arguments):
        networks.append(build_model(*arguments).double())
        networks[-1].__class__ = type("Network", (Plain, type(networks[-1])), {})
        return networks[-1]

    with mock.patch.object(train, "build_model", build):
        train.main(list(words))
    torch.save(networks[0].state_dict(), path + os.environ.get("RANK", ""))


def by_one_and_by_two(root: Path, data: Path, flags: list[str], together: dict[str, str]) -> Path:
    """For each name of `together`, a run with these `--balance` methods by this process and by two.

    Returns `root`, with the networks <name>_one, <name>_two0 and <name>_two1 and the runs' folders run_<name>_one and
    run_<name>_two.
    """
    commands = []
    for name, methods in together.items():
        text = f"--val_fraction 0.2 --epochs 3 --warmup 2 --data_root {data} --log_path {root} --balance {methods}"
        words = [*flags, *text.split(), "--run_name"]
        main(str(root / f"{name}_one"), *words, f"run_{name}_one")
        commands.append([str(REPO / "tests" / "double_run.py"), str(root / f"{name}_two"), *words, f"run_{name}_two"])
    for statuses, _, errors in in_two_processes(root / "said", *commands):
        assert statuses == [0, 0], errors[-2000:]
    return root


if __name__ == "__main__":
    main(*sys.argv[1:])
