"""Export a trained network to one file that PyTorch runs without this project.

    python -m report.export --checkpoint runs/NAME/best.pth --out model.pt2

See docs/evaluation.md for how to run it.
"""

from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import train
from evaluation.export import describe, example_inputs, export_network, save_program
from evaluation.trained import trained_folder, without_clips
from utils import distributed
from utils.cli import Parser, path_name
from utils.errors import UserError, run_main


def parse_args(argv: list[str] | None = None) -> Namespace:
    p = Parser(prog="python -m report.export", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", type=path_name, metavar="FILE", help="weights to export (required)")
    p.add_argument("--out", type=path_name, metavar="FILE", default="model.pt2",
                   help="output file (default: model.pt2)")  # fmt: skip
    args = p.parse_args(argv)
    if args.checkpoint is None:
        raise UserError("--checkpoint: missing; give the weights to export, such as runs/NAME/best.pth")
    if not args.out.endswith(".pt2"):
        raise UserError(f"--out {args.out}: choose a name that ends in .pt2")
    if Path(args.out).exists():
        raise UserError(f"--out {args.out}: already exists; delete it, or choose another name")
    return args


def main(argv: list[str] | None = None) -> None:
    given = parse_args(argv)
    args, out = train.parse_args(["--checkpoint", given.checkpoint, "--device", "cpu"]), Path(given.out)
    folder, record = trained_folder(args)
    model = train.make_model(args, without_clips(folder), distributed.start("cpu"))
    inputs = example_inputs(folder, args.image_size)
    save_program(out, export_network(model, inputs), describe(folder, inputs, record))
    shapes = ", ".join(f"{name} {tuple(values.shape[1:])}" for name, values in inputs.items())
    print(f"{out}: {len(folder.classes)} classes; inputs of a clip: {shapes}")


if __name__ == "__main__":
    run_main(main)
