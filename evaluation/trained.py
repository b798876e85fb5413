"""What a checkpoint says of the data its network was trained on, where the training folder itself is not needed."""

from argparse import Namespace
from pathlib import Path

from dataset.build import Data, load_parts
from dataset.folder import Folder
from dataset.lists import read_record
from dataset.specs import described


def trained_folder(args: Namespace) -> tuple[Folder, dict]:
    """The training folder of `--checkpoint`, without its clips, and its prepare.json ({}: made by others).

    Both come from the checkpoint (`Data.input`). One of an earlier version holds neither, so the folder is read; raises
    `UserError` if it is not there.
    """
    known, root = args.trained.get("input"), Path(args.data_root)
    if known is None:
        folder, _ = load_parts(args, only=("test",))
        return folder._replace(parts={}), read_record(root, "prepare.json")
    shapes = {name: tuple(shape) for name, shape in known["shapes"].items()}
    spec = described(args.dataset, known)
    return Folder(root, spec, args.trained["classes"], {}, shapes, [], {}, None), known["prepared"]


def without_clips(folder: Folder) -> Data:
    """Enough of `Data` to make the network."""
    return Data(folder.spec, folder, {}, {}, ("none", ""))
