"""Files and output at the end of a run."""

import shlex
from argparse import Namespace
from collections.abc import Sequence

from torch import Tensor

from utils.console import result_table, slice_lines
from utils.metrics import confusion
from utils.plots import plot_confusion, plot_curves
from utils.run import Run


def finish(
    run: Run,
    args: Namespace,
    names: Sequence[str],
    classes: list[str],
    best: dict,
    last: dict,
    logits: dict[str, Tensor],
    labels: Tensor,
    about: dict,
) -> None:
    """summary.json, the pictures and the result table. `last`: the last epoch's numbers; `about` is added."""
    honest, title = best.get("at_best_val"), f"{args.dataset}, {args.method}"
    # At step `epochs`, one beyond the last: a run resumed here drops what it finds from its first epoch on.
    run.figure("curves", plot_curves(run.history, names, f"{title}, seed {args.random_seed}"), args.epochs)
    matrices = {"multimodal" if head == "joint" else head: confusion(logits[head], labels)
                for head in ("joint", *names) if head in logits}  # fmt: skip
    run.figure("confusion", plot_confusion(matrices, classes, f"{title}, last epoch"), args.epochs)
    run.summary({
        "method": args.method, "balance": args.balance, "dataset": args.dataset, "seed": args.random_seed,
        "epochs": args.epochs, "best_test_acc": best["best_test_acc"], "best_test_epoch": best["best_test_epoch"],
        "last_test_acc": last["test_acc"], "test_acc_at_best_val": honest["test_acc"] if honest else None,
        **{f"test_acc_{name}": last[f"test_acc_{name}"] for name in names}, "f1_macro": last["test_f1_macro"], **about,
    })  # fmt: skip
    rows = {"last epoch": last,
            f"best on test (papers' protocol), epoch {best['best_test_epoch'] + 1}": best["at_best_test"]}  # fmt: skip
    if honest:
        rows[f"best on validation, epoch {best['best_val_epoch'] + 1}"] = honest
    shown = [result_table(rows, names), *slice_lines(last, names)]
    print("\n" + "\n".join(shown) + f"\n\n{about['total_seconds']:.0f} s; curves.png, confusion.png and the weights "
          f"are in {run.folder}")  # fmt: skip
    print(f"curves of all runs: tensorboard --logdir {shlex.quote(args.log_path)} --host localhost")
