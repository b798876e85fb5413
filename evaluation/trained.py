"""Training flags and data description stored in a checkpoint. The data themselves are not needed."""

from argparse import Namespace
from pathlib import Path

import balance as balances
from dataset.build import Data, load_parts
from dataset.folder import Folder
from dataset.lists import read_record
from dataset.specs import DatasetSpec, described, spec_of
from utils.checkpoint import load_checkpoint
from utils.cli import agree
from utils.errors import UserError
from utils.run import modern

# Flags that change the network or its input.
AS_TRAINED = ("method", "model", "encoder", "fusion_method", "unimodal", "image_size", "pack_size", "alpha", "beta",
              "gamma1", "gamma2", "balance")  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ flags


def take_flags_of_checkpoint(args: Namespace, typed: dict) -> None:
    """Set the network and input flags that were not given from the config of the checkpoint to evaluate.

    `args.trained` is set to the checkpoint's description of its classes and data. Raises `UserError` if a given flag
    contradicts the checkpoint. A checkpoint without a config (the official code's) is evaluated with the given flags.
    """
    state = load_checkpoint(args.checkpoint, mapped=True)
    args.trained = {name: state[name] for name in ("classes", "input", "epoch") if name in state}
    config = balances.modernise(modern(state.get("config", {})))
    for name in AS_TRAINED:
        if name in typed and name in config and not agree(typed[name], config[name]):
            raise UserError(f"--{name} {typed[name]}: {args.checkpoint} was trained with --{name} {config[name]}; "
                            "leave the flag out")  # fmt: skip
    same_data = "dataset" not in typed or args.dataset == config.get("dataset")
    names = ("dataset", "split", "val_fraction", "precision", *(["data_root"] if same_data else []))
    vars(args).update({name: config[name] for name in AS_TRAINED if name in config})
    vars(args).update({name: config[name] for name in names if name in config and name not in typed})


def check_evaluation(args: Namespace) -> None:
    """Raise `UserError` for evaluation flags that cannot be combined."""
    for name in ("predictions", "clip"):
        if args.train and getattr(args, name):
            raise UserError(f"--{name}: needs a trained network; use --checkpoint FILE, without --train")
    if args.predictions and args.clip:
        raise UserError("--predictions: cannot be combined with --clip; choose one")
    if args.predictions:
        refuse_existing(Path(args.predictions))


def refuse_existing(path: Path) -> None:
    """Raise `UserError` if the predictions file already exists, or if its name does not end in .npz."""
    if path.exists():
        raise UserError(f"--predictions {path}: already exists; delete it, or choose another name")
    if path.suffix != ".npz":
        raise UserError(f"--predictions {path}: choose a name that ends in .npz")


# ------------------------------------------------------------------------------------------------------------- data


def trained_spec(args: Namespace, root: Path) -> DatasetSpec:
    """The spec of the data in `root`; with --clip, or if `root` does not exist, the spec stored in the checkpoint."""
    known = args.trained.get("input")
    if known is not None and (args.clip or not root.is_dir()):
        return described(args.dataset, known)
    return spec_of(args.dataset, root)


def trained_folder(args: Namespace) -> tuple[Folder, dict]:
    """The training folder of `--checkpoint`, without its clips, and its prepare.json ({}: made by other tools).

    Both come from the checkpoint (`Data.input`). Checkpoints of earlier versions contain neither, so the folder itself
    is read. Raises `UserError` if that folder does not exist.
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
