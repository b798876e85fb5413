"""Load the trained network and the data of a finished run, for reports that need more than the run's files."""

from argparse import Namespace
from pathlib import Path

import train
from dataset.build import Data, build_data
from models import MultimodalClassifier
from utils import distributed
from utils.errors import UserError
from utils.run import read_config


def load_run(folder: Path | str, data_root: Path | str | None = None) -> tuple[Namespace, Data, MultimodalClassifier]:
    """The flags, data and network (last.pth) of a run. `data_root` names the data if they have moved.

    Raises `UserError` if the run or the data do not exist, or if the data have other classes than the run.
    """
    root = ["--data_root", str(data_root)] if data_root else []
    args = train.parse_args(["--resume", str(folder), *root])
    args.resume, args.checkpoint = None, str(Path(folder) / "last.pth")
    device = distributed.start(args.device, args.gpu_ids)
    data, classes = build_data(args, device), read_config(Path(folder)).get("data", {}).get("classes")
    if classes not in (None, data.classes):
        raise UserError(f"{data.folder.root}: classes differ from those of {folder}; pass its data with --data_root")
    return args, data, train.make_model(args, data, device)
