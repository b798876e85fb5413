"""Build the data from the flags, for training, evaluation, reports and benchmarks."""

from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import torch

from dataset.clips import Clips, Feed, choose_cache, make_clips, room_for_fixed, step_bytes
from dataset.folder import Folder, Part, load_folder, split_by_actor, split_validation
from dataset.lists import read_record
from dataset.specs import DatasetSpec, description, get_spec, spec_of
from utils import distributed
from utils.acceleration import computed_in
from utils.console import some
from utils.errors import UserError
from utils.graphs import GRAPHS


class Data(NamedTuple):
    """A checked training folder, its parts, and those that are used as batches. `cache` is the data path and why."""

    spec: DatasetSpec
    folder: Folder
    parts: dict[str, Part]
    clips: dict[str, Clips]
    cache: tuple[str, str]

    @property
    def classes(self) -> list[str]:
        return self.folder.classes

    def describe(self) -> dict:
        """Description of the data for config.json."""
        clips = {name: len(part) for name, part in self.clips.items()}
        return {"classes": self.classes, "clips": clips, "missing": len(self.folder.missing),
                "split": self.folder.split, "modalities": list(self.spec.names)}  # fmt: skip

    def input(self) -> dict:
        """Description of the input for checkpoints, to classify clips without the training folder.

        The content of a dataset.json, the shape of each array, and the prepare.json of the folder ({}: made by others).
        """
        shapes = {name: list(shape) for name, shape in self.folder.shapes.items()}
        return description(self.spec) | {"shapes": shapes, "prepared": read_record(self.folder.root, "prepare.json")}

    def lines(self) -> list[str]:
        """Notes about the data, printed before the run."""
        sizes = ", ".join(f"{len(part)} {name}" for name, part in self.clips.items())
        where = {"device": "resident on the GPU", "ram": "resident in memory", "none": "read from files"}[self.cache[0]]
        told = [f"{self.spec.name}: {sizes} clips of {len(self.classes)} classes, {', '.join(self.spec.names)}; "
                f"{where} ({self.cache[1]})"]  # fmt: skip
        if self.folder.missing:
            told.append(f"left out: {len(self.folder.missing)} clips with missing files (--allow_missing); config.json "
                        "has their number")  # fmt: skip
        told += self.folder.notes
        for name, part in self.clips.items():
            present = set(part.labels.tolist())
            absent = [label for i, label in enumerate(self.classes) if i not in present]
            if absent:
                told.append(
                    f"warning: {name} has no clip of {len(absent)} of {len(self.classes)} classes: {some(absent)}"
                )
        return told


def build_data(args: Namespace, device: torch.device, only: tuple[str, ...] | None = None) -> Data:
    """Build the data selected by the flags in `args`, on `device`; with `only`, just these parts.

    Raises `UserError` for problems of the folder and for flags that do not fit it; under torchrun on every
    process, in one line.
    """
    with distributed.together():
        folder, parts = load_parts(args, only)
    used = {name: part for name, part in parts.items() if only is None or name in only}
    spec = folder.spec
    feed = Feed(spec.modalities, args.image_size, device, args.cache, args.num_workers, spec.crop_area, spec.mirror,
                args.pack_size, args.precision == "official", computed_in(args.precision))  # fmt: skip
    step = step_bytes(args.batch_size, feed, folder.shapes)
    if args.compile in GRAPHS:  # the memory of CUDA graphs is kept apart from that of eager steps
        step *= 2
    cache = choose_cache(folder.root, used, folder.shapes, feed, step)
    feed = feed._replace(cache=cache[0])
    feed = feed._replace(keep_fixed=cache[0] != "none" and room_for_fixed(used, folder.shapes, feed, step))
    clips = {name: make_clips(folder.root, name, part, folder.shapes, feed) for name, part in used.items()}
    if folder.known is not None:
        if feed.cache != "none" and distributed.is_first_here():
            folder.known.save()
        folder.known.forget()
    return Data(spec, folder, parts, clips, cache)


def load_parts(args: Namespace, only: tuple[str, ...] | None = None) -> tuple[Folder, dict[str, Part]]:
    """The checked training folder and its parts train, test and, where asked for or there, val; or `only` some of them.

    The demo is made first where it is missing.
    """
    spec, root = spec_of(args.dataset, Path(args.data_root)), Path(args.data_root)
    if args.dataset == "demo" and root == get_spec("demo").root:
        with distributed.together():
            if distributed.is_main():
                from dataset.prepare.demo import ensure_demo  # late: offline code that no other dataset needs

                ensure_demo(root)
    recut = args.split == "actor" and spec.by_actor
    folder = load_folder(root, spec, args.allow_missing, None if recut else only)
    prepared = folder.split.get("name", "official")
    if args.split not in (None, prepared):
        if not recut:
            raise UserError(f"--split {args.split}: {root} has the {prepared} split; leave the flag out, or "
                            f"prepare another folder with --split {args.split} (data/README.md)")  # fmt: skip
        folder = split_by_actor(folder)
    if args.n_classes not in (None, len(folder.classes)):
        raise UserError(f"--n_classes {args.n_classes}: {root}/stat.csv names {len(folder.classes)} classes")
    parts = dict(folder.parts)
    if args.val_fraction and only is None:
        if "val" in parts:
            raise UserError(f"--val_fraction: {root} has a val.csv already; leave the flag out")
        parts["train"], parts["val"] = split_validation(parts["train"], args.val_fraction, folder.groups)
    return folder, parts
