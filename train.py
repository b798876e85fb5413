"""Data Remixing (ICML 2025) and its baselines for audio-visual classification: one loop for all of them.

    python train.py --train                                              # Remix on the demo data
    python train.py --train --method baseline                            # joint training
    python train.py --train --dataset CREMAD --epochs 60 --warmup 10     # DESIGN of the paper
    python train.py --dataset CREMAD --checkpoint runs/NAME/best.pth     # evaluate

Read it downward: flags, predict and evaluate, one training epoch, main. An epoch's plan is a list of batches, each
(clip indices, kept modality); joint training keeps both, Remix one. Everything else is the same.
"""

import argparse
import copy
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import balance as balances
import remix
from balance import Balance
from dataset.clips import CACHES, Clips, Feed, choose_cache, make_clips, step_bytes
from dataset.demo import ensure_demo
from dataset.folder import Folder, Part, digest, load_folder, split_by_actor, split_validation
from dataset.specs import SPECS, get_spec
from models import FUSIONS, MODELS, AVClassifier, Output
from utils import distributed
from utils.acceleration import PRECISIONS, compile_in_place, compiled, default_precision, set_precision, use_huge_pages
from utils.checkpoint import load_checkpoint, load_weights, model_weights, save_checkpoint
from utils.cli import Parser, id_list, interval, interval_of, number, path_name, resume_command
from utils.console import epoch_line, progress, result_table
from utils.diagnostics import diagnose_model, partition_moves, under_name
from utils.errors import Interrupted, UserError, run_main
from utils.interrupt import Interrupt
from utils.logging import RunLog, claim_folder, environment
from utils.metrics import accuracy, confusion, f1_macro
from utils.plots import plot_confusion, plot_curves
from utils.seeding import epoch_generator, rng_state, seed_everything, set_rng_state

# ---------------------------------------------------------------------------------------------------------- flags

METHODS = ("remix", "baseline", "audio", "video")

# What a preset fills in for flags that were not given. `fair` leaves one learning rate for every method: the data
# set's. `official` is the official code's behaviour, its two unexplained learning rates included.
OFFICIAL = {
    "batch_size": 64,
    "epochs": 60,
    "warmup": 10,
    "optimizer": "adam",
    "lr_decay_step": 30,
    "lr_decay_ratio": 0.1,
    "alpha": 0.5,
    "beta": 0.5,
    "gamma1": 1.0,
    "gamma2": 1.0,
    "fusion_method": "concat",
    "score": "kl",
    "keep": "hard",
    "rescore_every": 1,
    "batch_order": "sequential",
}
PRESETS = {
    "fair": OFFICIAL | {"masked_encoder": "skip", "batchnorm": "refreshed"},
    "official": OFFICIAL | {"masked_encoder": "run", "batchnorm": "running"},
}
OFFICIAL_RATES = {"remix": 5e-5, "baseline": 1e-3, "audio": 1e-3, "video": 1e-3}
MANY = 10**6  # no count or factor is sensibly larger; beyond it something was mistyped
REFRESH_CLIPS = 1024  # training clips that BatchNorm's statistics are estimated from after an epoch
PROBE_BATCHES = 4  # of training clips, on which --diagnose takes gradients
# What may differ when a run goes on: where it runs and how long, not what it computes.
RESUMABLE = {"resume", "epochs", "num_workers", "cache", "log_path", "gpu_ids", "device", "data_root",
             "diagnose", "save_every", "checkpoint", "compile"}  # fmt: skip
AS_TRAINED = ("method", "model", "fusion_method", "image_size", "pack_size")  # a checkpoint is evaluated with these
interrupt = Interrupt()  # SIGTERM and Ctrl-C, asked for after every step


def make_parser() -> Parser:
    p = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)

    g = p.add_argument_group("data")
    g.add_argument("--dataset", default="demo", choices=SPECS, help="data set (demo)")
    g.add_argument("--data_root", type=path_name, metavar="DIR", help="training folder (data/<data set>)")
    g.add_argument(
        "--n_classes", type=number(int, 2, MANY), metavar="N", help="classes, checked against the data (theirs)"
    )
    g.add_argument("--val_fraction", type=number(float, 0, 0.9), default=0.0, help="share of train held out (0)")
    g.add_argument("--split", choices=("official", "actor"), help="train and test; actor: CREMA-D, no actor in both "
                   "(as prepared)")  # fmt: skip
    g.add_argument("--allow_missing", action="store_true",
                   help="go on without clips of which a file is missing, or broken at first sight (off)")  # fmt: skip
    g.add_argument(
        "--image_size", type=number(int, 8, 4096), metavar="S", help="side frames are fed at, pixels (data set's)"
    )
    g.add_argument("--cache", default="auto", choices=CACHES, help="where decoded clips are held (auto)")
    g.add_argument("--pack_size", type=number(int, 8, 4096), metavar="P",
                   help="shorter side decoded frames are kept at, pixels (as stored)")  # fmt: skip
    g.add_argument("--num_workers", type=number(int, 0, 1024), default=min(8, os.cpu_count() or 1),
                   help="processes that read files with --cache none (cores, 8 at most)")  # fmt: skip

    g = p.add_argument_group("model")
    g.add_argument("--model", choices=MODELS, help="trunk of either modality (data set's)")
    g.add_argument("--fusion_method", choices=FUSIONS, help="joint head (concat)")
    g.add_argument(
        "--checkpoint", type=path_name, metavar="FILE", help="weights to evaluate, or to start --train from (none)"
    )

    g = p.add_argument_group("method")
    g.add_argument("--method", default="remix", choices=METHODS,
                   help="Data Remixing, joint training, or one modality alone (remix)")  # fmt: skip
    g.add_argument("--preset", default="fair", choices=PRESETS, help="defaults of the flags not given (fair)")
    g.add_argument("--warmup", type=number(int, 0, MANY), metavar="N", help="joint epochs before Remix (10)")
    g.add_argument("--score", choices=remix.SCORES, help="difficulty of a clip in a modality (kl)")
    g.add_argument("--keep", choices=remix.KEEP, help="modality a clip keeps (hard)")
    g.add_argument("--rescore_every", type=number(int, 1, MANY), metavar="K", help="epochs between two scorings (1)")
    g.add_argument("--batch_order", choices=remix.ORDERS, help="order of the homogeneous batches (sequential)")
    g.add_argument("--masked_encoder", choices=("skip", "run"), help="in a batch of the other modality (skip)")
    g.add_argument("--batchnorm", choices=("refreshed", "running"),
                   help="statistics to score and evaluate with: estimated anew after each epoch, or the running ones "
                        "(refreshed)")  # fmt: skip
    g.add_argument("--alpha", type=number(float, 0, MANY), help="weight of the audio loss in joint batches (0.5)")
    g.add_argument("--beta", type=number(float, 0, MANY), help="weight of the video loss in joint batches (0.5)")
    g.add_argument("--gamma1", type=number(float, 0, MANY), help="weight of the video loss in video batches (1)")
    g.add_argument("--gamma2", type=number(float, 0, MANY), help="weight of the audio loss in audio batches (1)")
    g.add_argument("--diagnose", action="store_true", help="measure clash, imbalance, calibration each epoch (off)")

    balances.add_flags(p)

    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", "--epoch", type=number(int, 1, MANY), metavar="N", help="epochs, warm-up included (60)")
    g.add_argument("--batch_size", type=number(int, 2, MANY), metavar="B", help="clips a step, over all processes (64)")
    g.add_argument("--optimizer", choices=("adam", "sgd"), help="adam, or sgd with momentum 0.9 (adam)")
    g.add_argument("--learning_rate", type=number(float, 0, MANY, True), help="at the start (data set's)")
    g.add_argument("--lr_decay_step", type=number(int, 1, MANY), metavar="N", help="epochs between decays (30)")
    g.add_argument("--lr_decay_ratio", type=number(float, 0, 1, open_low=True), help="factor at a decay (0.1)")
    g.add_argument("--encoder_lr_decay", type=number(float, 0, MANY), default=1.0, help="encoders' rate is times (1)")
    g.add_argument("--random_seed", type=number(int, 0, 2**32 - 1), default=42, help="seed (42)")

    g = p.add_argument_group("system")
    g.add_argument("--train", action="store_true", help="train; without it --checkpoint is evaluated (off)")
    g.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="CUDA where there is one (auto)")
    g.add_argument("--gpu_ids", type=id_list, metavar="IDS", help="GPUs, comma separated (all visible)")
    g.add_argument("--precision", choices=PRECISIONS, help="arithmetic of the network (fp32; on a GPU tf32)")
    g.add_argument("--compile", action="store_true", help="compile the encoders when the run starts (off)")
    g.add_argument("--log_path", type=path_name, default="runs", metavar="DIR", help="folder of the runs (runs)")
    g.add_argument("--run_name", type=path_name, metavar="NAME", help="this run's folder (made of data, method, time)")
    g.add_argument("--resume", action="store_true", help="go on with --run_name from its last.pth (off)")
    g.add_argument("--save_every", type=interval, default="1epochs", metavar="N[steps]",
                   help="epochs, or steps as in 200steps, from last.pth to last.pth (1)")  # fmt: skip
    return p


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.checkpoint and not (args.train or args.resume):
        evaluate_as_trained(args, parser.typed(argv))

    spec = get_spec(args.dataset)
    preset = dict(PRESETS[args.preset])
    preset["learning_rate"] = OFFICIAL_RATES[args.method] if args.preset == "official" else spec.learning_rate
    preset |= {"model": spec.model, "image_size": spec.image_size, "data_root": str(spec.root)}
    preset["precision"] = default_precision(args.device)
    args.from_preset = {name: value for name, value in preset.items() if getattr(args, name) is None}
    vars(args).update(args.from_preset)
    balances.settle(args)
    check_args(args)
    return args


def evaluate_as_trained(args: argparse.Namespace, typed: set[str]) -> None:
    """Take what the checkpoint's network and its input were from its config, where that was not typed.

    Raises `UserError` if another network or input was typed; a checkpoint that says nothing (the official code's) takes
    what was typed.
    """
    config = load_checkpoint(args.checkpoint).get("config", {})
    for name in AS_TRAINED:
        if name in typed and name in config and getattr(args, name) != config[name]:
            was = f"{args.checkpoint} was trained with --{name} {config[name]}"
            raise UserError(f"--{name} {getattr(args, name)}: {was}; leave it out")
    same_data = "dataset" not in typed or args.dataset == config.get("dataset")
    names = (*AS_TRAINED, "dataset", "split", "precision", *(["data_root"] if same_data else []))
    vars(args).update({name: config[name] for name in names if name in config and name not in typed})


def check_args(args: argparse.Namespace) -> None:
    """What no single flag can know. Raises `UserError`."""
    if not args.train and not args.checkpoint:
        raise UserError("nothing to do: type --train to train, or --checkpoint FILE to evaluate")
    if args.resume and not (args.train and args.run_name):
        raise UserError("--resume: type --train and the --run_name to go on with")
    if args.resume and args.checkpoint:
        raise UserError("--resume and --checkpoint: choose one; --resume reads the run's own last.pth")
    if args.checkpoint and not Path(args.checkpoint).is_file():
        raise UserError(f"{args.checkpoint}: no such checkpoint; give a .pth file, such as runs/NAME/best.pth")
    if args.train and args.method == "remix" and args.warmup > args.epochs:
        raise UserError(f"--warmup {args.warmup}: more than --epochs {args.epochs}; Remix would never start: type a "
                        "lower --warmup, or --method baseline")  # fmt: skip
    if args.split == "actor" and not get_spec(args.dataset).by_actor:
        raise UserError(f"--split actor: the clip ids of {args.dataset} name no actors; leave it out")
    if args.train and not args.val_fraction and not (Path(args.data_root) / "val.csv").is_file():
        for name in balances.needs_validation(args):
            raise UserError(f"--balance {name}: measures on a validation part, never on test; type --val_fraction 0.1")


# ------------------------------------------------------------------------------------------- predict and evaluate


@torch.inference_mode()
def predict(
    model: nn.Module,
    clips: Clips,
    kept: str,
    batch_size: int,
    name: str,
    after_batch: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Logits (N, C) of the heads joint, audio and video for all clips in order: evaluation mode, no augmentation.

    One pass serves evaluation and the scoring of Remix. Every process does its share and gets the whole. Raises
    `UserError` naming the clips if a logit is not finite.
    """
    model.eval()
    plan = remix.batches_of(len(clips), batch_size, kept, generator=None)
    logits: dict[str, Tensor] = {}
    with progress(name, len(clips), distributed.is_main()) as bar:
        for batch in clips.epoch(plan):
            with compiled(batch.total == batch_size):
                output = model(batch.audio, batch.video, kept)
            for head in ("joint", "audio", "video"):
                values = getattr(output, head)
                if values is not None:
                    values = values.float()
                    rows = logits.setdefault(head, values.new_zeros(len(clips), values.shape[1]))
                    if batch.share > 0:  # else the clip is another process's, which counts it
                        rows[batch.clips] = values
            bar.update(batch.total)
            after_batch()
    logits = {head: distributed.sum_over_ranks(values) for head, values in logits.items()}
    sound = torch.stack([values.isfinite().all(dim=1) for values in logits.values()]).all(dim=0)  # (N,)
    if not sound.all():
        bad = [clips.names[i] for i in (~sound).nonzero().flatten().tolist()]
        raise UserError(f"{name}: not finite for {len(bad)} of {len(clips)} clips: {some(bad)}; look at them, or "
                        "train with a lower --learning_rate")  # fmt: skip
    return logits


def evaluate(logits: dict[str, Tensor], labels: Tensor, part: str) -> dict[str, float | None]:
    """Flat numbers of one part ("test" or "val"): accuracies are fractions in [0, 1], None for a head not trained."""
    numbers = {f"{part}_acc": accuracy(logits["joint"], labels)}
    for head in ("audio", "video"):
        numbers[f"{part}_acc_{head}"] = accuracy(logits[head], labels) if head in logits else None
    numbers[f"{part}_f1_macro"] = f1_macro(logits["joint"], labels)
    numbers[f"{part}_loss"] = F.cross_entropy(logits["joint"], labels).item()
    return numbers


def diagnose(model: AVClassifier, clips: dict[str, Clips], inputs: str, args: argparse.Namespace) -> dict:
    """Clash on the same few training clips in every epoch, imbalance and calibration on test. Changes no run."""
    order = torch.Generator().manual_seed(args.random_seed)
    probe = remix.batches_of(len(clips["train"]), args.batch_size, inputs, order)[:PROBE_BATCHES]
    test = remix.batches_of(len(clips["test"]), 4 * args.batch_size, inputs, generator=None)
    feeds = (clips["train"].epoch(probe), clips["test"].epoch(test), clips["test"].labels)
    with compiled(False):  # compiled code gives gradients once; here two losses share a forward pass
        return under_name(diagnose_model(model, *feeds, lambda batch: model(batch.audio, batch.video, batch.kept)))


def diagnose_partition(before: Tensor | None, kept: Tensor, clips: Clips, classes: list[str]) -> dict:
    """How many clips of each class keep audio, and how many changed since the last scoring."""
    keeps_audio = [None if part is None else part == remix.AUDIO for part in (kept, before)]
    return under_name(partition_moves(*keeps_audio, clips.labels.cpu(), classes))


# ------------------------------------------------------------------------------------------------ one training epoch


def loss_terms(output: Output, labels: Tensor, kept: str, args: argparse.Namespace) -> dict[str, Tensor]:
    """The loss of a batch, term by term; their sum is trained on. One formula: a masked modality has no term.

    joint batches      CE(head) + alpha * CE(head_audio) + beta * CE(head_video)
    video batches      CE(head on [0, v]) + gamma1 * CE(head_video)
    audio batches      CE(head on [a, 0]) + gamma2 * CE(head_audio)
    """
    weights = (
        {"audio": args.alpha, "video": args.beta} if kept == "both" else {"audio": args.gamma2, "video": args.gamma1}
    )
    terms = {"joint": F.cross_entropy(output.joint, labels)}
    for head, weight in weights.items():
        logits = getattr(output, head)
        if logits is not None:
            terms[head] = weight * F.cross_entropy(logits, labels)
    return terms


@dataclass
class Position:
    """How far an epoch got: with weights and partition, all it takes to go on in the middle of it.

    `numbers` is what it has to report so far; `kl` (N, 2) what was scored in it, None without scoring; `batches` how
    many of its plan are trained on, which took `seconds`; `losses` by term (batches of the plan,), on the device: the
    losses summed over this process's clips. The host reads them once, at the end.
    """

    numbers: dict = field(default_factory=dict)
    kl: Tensor | None = None
    batches: int = 0
    seconds: float = 0.0
    losses: dict[str, Tensor] = field(default_factory=dict)


def train_epoch(
    model: nn.Module,
    clips: Clips,
    plan: list[remix.Batch],
    optimizer: torch.optim.Optimizer,
    epoch: int,
    args: argparse.Namespace,
    balance: Balance = Balance(),  # noqa: B008  (of no method, and never changed)
    position: Position | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """One epoch over `plan` from `position` on, which it moves; `after_step` may save it or end the run by raising."""
    position = position or Position()
    model.train()
    views = epoch_generator(args.random_seed, epoch, "views")
    clock = time.perf_counter() - position.seconds
    planned = sum(len(batch.clips) for batch in plan)
    with progress(f"epoch {epoch} train", planned, distributed.is_main()) as bar:
        bar.update(sum(len(batch.clips) for batch in plan[: position.batches]))
        for batch in clips.epoch(plan, views, args.masked_encoder == "run", position.batches):
            step = balances.Step(epoch, position.batches, batch.kept, batch.labels, batch.share, batch.total)
            balance.before_forward(step)
            alone = frozen_batchnorm(model) if len(batch.clips) == 1 else nullcontext()
            with alone, compiled(batch.total == args.batch_size):
                output = model(batch.audio, batch.video, batch.kept)
            output = balance.outputs(output, step)
            terms = balance.losses(loss_terms(output, batch.labels, batch.kept, args), output, step)
            # Processes' gradients are averaged: weigh by this one's share, so that the batch's mean comes out.
            loss = sum(terms.values()) * step.weight
            optimizer.zero_grad(set_to_none=True)
            balance.backward(loss, terms, output, step)
            optimizer.step()
            for name, term in terms.items():
                losses = position.losses.setdefault(name, torch.zeros(len(plan), device=term.device))
                losses[position.batches] = term.detach() * (batch.share * batch.total)
            position.batches += 1
            position.seconds = time.perf_counter() - clock
            bar.update(batch.total)
            after_step()


def mean_losses(position: Position, plan: list[remix.Batch], names: list[str], epoch: int) -> dict[str, float]:
    """The mean loss per clip and its terms of what is trained on so far.

    Raises `UserError` with epoch, batch and clips if the loss of a batch is not finite.
    """
    losses = {name: distributed.sum_over_ranks(values.clone()) for name, values in position.losses.items()}
    bad = (~sum(losses.values()).isfinite()).nonzero().flatten().tolist()
    if bad:
        clips = [names[i] for i in plan[bad[0]].clips.tolist()]
        raise UserError(f"epoch {epoch}, batch {bad[0]} of {len(plan)}: loss not finite; clips: "
                        f"{', '.join(clips)}; last.pth is older; try a lower --learning_rate")  # fmt: skip
    planned = sum(len(batch.clips) for batch in plan[: position.batches])
    means = {name: (values.sum() / planned).item() for name, values in losses.items()}
    return {"train_loss": sum(means.values())} | {f"train_loss_{name}": mean for name, mean in means.items()}


def some(names: list[str], most: int = 16) -> str:
    """Names for one line."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class frozen_batchnorm:
    """BatchNorm on its running statistics: those of a single clip are no statistics, and 1 x 1 maps have none."""

    def __init__(self, model: nn.Module):
        self.norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def __enter__(self) -> None:
        for norm in self.norms:
            norm.eval()

    def __exit__(self, *_) -> None:
        for norm in self.norms:
            norm.train()


@torch.no_grad()
def refresh_batchnorm(model: nn.Module, clips: Clips, kept: str, args: argparse.Namespace, epoch: int) -> None:
    """Estimate BatchNorm's running statistics anew for the weights of now: the mean over batches of training clips.

    The running ones are of weights of some ten steps ago, and of an encoder that is skipped of its last few batches,
    which were of the clips that are hard in it. Scored with those, a clip's difficulty is partly an accident, and an
    encoder can look certain, get no more batches and never recover. Clips are seen as they are scored: all of them
    alike, whatever they keep, without augmentation. At most `REFRESH_CLIPS` clips, forward only.
    """
    order = epoch_generator(args.random_seed, epoch, "batchnorm")
    plan = remix.batches_of(torch.randperm(len(clips), generator=order)[:REFRESH_CLIPS], args.batch_size, kept, None)
    plan = [batch for batch in plan if len(batch.clips) >= 2 * distributed.world_size()]  # one clip has no statistics
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    model.train()
    for i, batch in enumerate(clips.epoch(plan)):
        for norm in norms:
            norm.momentum = 1 / (i + 1)  # a plain mean; PyTorch's own (None) reads a counter off the device each time
        with compiled(False):  # one more graph for a pass without gradients would take longer than it saves
            model(batch.audio, batch.video, kept)
    for norm, (momentum, tracked) in zip(norms, before, strict=True):
        norm.momentum = momentum
        norm.num_batches_tracked.copy_(tracked)  # counts training: an epoch that is resumed is refreshed once more
        for statistic in (norm.running_mean, norm.running_var):
            distributed.sum_over_ranks(statistic).div_(distributed.world_size())


# -------------------------------------------------------------------------------------------------------------- set-up


def choose_device(args: argparse.Namespace, typed: bool) -> torch.device:
    """The device of this process. Where several GPUs are to be used and train.py was `typed` as a command, starts it
    anew by torchrun, a process for each; another program that calls `main` keeps to one."""
    available = torch.cuda.device_count() if args.device != "cpu" else 0
    if args.device == "cuda" and not available:
        raise UserError("--device cuda: PyTorch sees no CUDA device here; type --device cpu, or leave the flag out")
    if not available:
        if args.gpu_ids is not None:
            print(f"no CUDA device in use: --gpu_ids {args.gpu_ids} has no effect, running on the CPU")
        return distributed.start([])
    ids = list(range(available)) if args.gpu_ids is None else [int(part) for part in args.gpu_ids.split(",")]
    if max(ids) >= available or len(set(ids)) < len(ids):
        raise UserError(
            f"--gpu_ids {args.gpu_ids}: this machine has {available} GPU(s), numbered from 0, each usable once"
        )
    if typed and args.train and len(ids) > 1 and "WORLD_SIZE" not in os.environ:
        load_parts(args)  # a mistake is told here, in one line, before there are several processes to tell it
        if args.run_name and not args.resume:
            claim_folder(args.log_path, args.run_name, resume=False)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={len(ids)}"]
        os.execv(sys.executable, [sys.executable, *launcher, *sys.argv])
    return distributed.start(ids)


def load_parts(args: argparse.Namespace) -> tuple[Folder, dict[str, Part]]:
    """The checked training folder and its parts train, test and, where asked for or there, val."""
    spec = get_spec(args.dataset)
    root = Path(args.data_root)
    if args.dataset == "demo" and root == spec.root:
        with distributed.together():
            if distributed.is_main():
                ensure_demo(root)
    recut = args.split == "actor" and spec.by_actor
    only = ("test",) if not args.train and not recut else None
    folder = load_folder(root, spec, args.allow_missing, only)
    prepared = folder.split.get("name", "official")
    if args.split not in (None, prepared):
        if not recut:
            raise UserError(f"--split {args.split}: {root} has the {prepared} split; leave the flag out, or "
                            f"prepare another folder with --split {args.split} (data/README.md)")  # fmt: skip
        folder = split_by_actor(folder)
    if args.n_classes not in (None, len(folder.classes)):
        raise UserError(f"--n_classes {args.n_classes}: {root}/stat.csv names {len(folder.classes)} classes")
    parts = dict(folder.parts)
    if args.val_fraction and args.train:
        if "val" in parts:
            raise UserError(f"--val_fraction: {root} has a val.csv already; leave the flag out")
        cut = split_validation(parts["train"], args.val_fraction, folder.groups)
        parts["train"], parts["val"] = cut
    return folder, parts


def make_optimizer(model: AVClassifier, args: argparse.Namespace) -> torch.optim.Optimizer:
    """Adam (betas .9/.999, eps 1e-8) or SGD (momentum .9), weight decay 1e-4: the official settings."""
    encoders = [*model.audio_net.parameters(), *model.visual_net.parameters()]
    inside = {id(parameter) for parameter in encoders}
    heads = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    groups = [{"params": encoders, "lr": args.learning_rate * args.encoder_lr_decay}, {"params": heads}]
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=args.learning_rate, momentum=0.9, weight_decay=1e-4, fused=True)
        # What the first step starts from anyway. Without it PyTorch's fused step fails where some parameters have had
        # theirs and others not: in a homogeneous batch of a run without warm-up.
        for p in model.parameters():
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return optimizer
    return torch.optim.Adam(groups, lr=args.learning_rate, weight_decay=1e-4, fused=True)


def parallel(model: AVClassifier) -> nn.Module:
    """The network as this process trains it.

    In a homogeneous batch the masked encoder has no gradients, on purpose; the processes agree on which one it is.
    """
    return DistributedDataParallel(model, find_unused_parameters=True) if distributed.world_size() > 1 else model


def train_copy(
    model: AVClassifier,
    clips: Clips,
    rates: list[float],
    args: argparse.Namespace,
    after_step: Callable[[], None],
    method: balances.Method,
    kept: str,
    epoch: int,
    epochs: int,
) -> AVClassifier:
    """A copy of the network, trained apart under one balance method, on clips fed as `kept`, with a fresh optimizer.

    With 0 `epochs` it is the network of now, to be compared with a trained copy: with BatchNorm's statistics estimated
    in the same way, which the network itself does not have before its first epoch.
    """
    network = copy.deepcopy(model)
    optimizer = make_optimizer(network, args)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    trained = parallel(network)
    for e in range(epoch, epoch + epochs):
        plan = remix.batches_of(len(clips), args.batch_size, kept, epoch_generator(args.random_seed, e, "plan"))
        train_epoch(trained, clips, plan, optimizer, e, args, Balance([method]), after_step=after_step)
    distributed.same_buffers(network)
    if args.batchnorm == "refreshed":
        refresh_batchnorm(network, clips, kept, args, max(0, epoch + epochs - 1))
    return network


def flags(args: argparse.Namespace) -> dict:
    return {name: value for name, value in vars(args).items() if name != "from_preset"}


def check_same_run(args: argparse.Namespace, data: dict[str, str], state: dict) -> list[str]:
    """Which flags differ from the run to be resumed. Raises `UserError` if one may not, or if the data differ."""
    now = flags(args)
    # An older run may not know a flag: it did then what the flag's default does now.
    before = flags(parse_args(["--train"])) | state["config"]
    changed = {name: f"--{name} {before[name]} (now {value})" for name, value in now.items()
               if name not in ("resume", "run_name") and value != before[name]}  # fmt: skip
    fixed = [text for name, text in changed.items() if name not in RESUMABLE]
    if fixed:
        raise UserError(f"--resume: the run was started with {', '.join(fixed)}; only these may change: "
                        f"{', '.join(sorted(RESUMABLE - {'resume'}))}")  # fmt: skip
    parts = [name for name in {**state["data"], **data} if state["data"].get(name) != data.get(name)]
    if parts:
        raise UserError(f"--resume: {args.data_root} has other clips or labels in {' and '.join(parts)} than the run "
                        "had at first; put them back, or start a new --run_name")  # fmt: skip
    args.checkpoint = before["checkpoint"]  # read when the run began; config.json is to go on saying so
    return [text for name, text in changed.items() if name != "checkpoint"]


def read_state(path: Path) -> dict:
    """The checkpoint of a run to go on with. Raises `UserError` if it is not one of ours."""
    state = load_checkpoint(path)
    wanted = ("optimizer", "scheduler", "epoch", "best", "kept", "rng", "config", "data", "position", "seconds")
    missing = [name for name in wanted if name not in state]
    if missing:
        raise UserError(f"--resume: {path} has no {', '.join(missing)}; only a run of this version can go on")
    return state


def go_on_at(middle: dict | None, device: torch.device) -> Position | None:
    """The position in a checkpoint, None between epochs. Of another number of processes the first takes all losses."""
    if middle is None:
        return None
    position = Position(**middle)
    for name, rows in position.losses.items():
        same = len(rows) == distributed.world_size()
        mine = rows[distributed.rank()] if same else rows.sum(0) * float(distributed.is_main())
        position.losses[name] = mine.to(device)
    return position


def describe_run(args: argparse.Namespace, folder: Folder, clips: dict[str, Clips], device: torch.device) -> dict:
    """What config.json holds: every flag, what a preset filled in, the data, versions, commit and hardware."""
    data = {
        "classes": folder.classes,
        "clips": {name: len(part) for name, part in clips.items()},
        "missing": len(folder.missing),
        "split": folder.split,
    }
    return flags(args) | {"from_preset": args.from_preset, "data": data} | environment(device, distributed.world_size())


def announce(
    args: argparse.Namespace, folder: Folder, clips: dict[str, Clips], cache: tuple[str, str], run: Path
) -> None:
    sizes = ", ".join(f"{len(part)} {name}" for name, part in clips.items())
    where = {"device": "resident on the GPU", "ram": "resident in memory", "none": "read from files"}[cache[0]]
    print(f"{args.dataset}: {sizes} clips of {len(folder.classes)} classes, {where} ({cache[1]})")
    if folder.missing:
        print(f"left out: {len(folder.missing)} broken clips (--allow_missing); config.json counts them")
    filled = ", ".join(f"{name} {value}" for name, value in args.from_preset.items())
    print(f"preset {args.preset}: {filled}")
    for name, part in clips.items():
        present = set(part.labels.tolist())
        absent = [label for i, label in enumerate(folder.classes) if i not in present]
        if absent:
            print(f"warning: {name} has no clip of {len(absent)} of {len(folder.classes)} classes: {some(absent)}")
    for note in balances.notes(args):
        print(note)
    if args.method == "remix" and args.warmup == args.epochs:
        print(f"warning: all {args.epochs} epochs are warm-up: no epoch of Remix, unless --resume adds some")
    balance = f" with {args.balance}" if args.balance != "none" else ""
    print(f"{args.method}{balance} for {args.epochs} epochs; run folder {run}")


# --------------------------------------------------------------------------------------------------------------- main


@interrupt
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.device != "cuda":
        use_huge_pages()
    device = choose_device(args, typed=argv is None)
    started = time.perf_counter()

    # run folder and seed
    method = args.method if args.balance == "none" else f"{args.method}+{args.balance.replace(',', '+')}"
    run_name = args.run_name or f"{args.dataset}_{method}_seed{args.random_seed}_{datetime.now():%Y%m%d-%H%M%S}"
    with distributed.together():
        run = claim_folder(args.log_path, run_name, args.resume) if args.train and distributed.is_main() else None
    seed_everything(args.random_seed)

    # data
    with distributed.together():
        folder, parts = load_parts(args)
    used = {name: part for name, part in parts.items() if args.train or name == "test"}
    spec = get_spec(args.dataset)
    step = step_bytes(args.batch_size, spec.frames, args.image_size, folder.audio_shape)
    cache = choose_cache(args.cache, folder.root, used, folder.audio_shape, device, args.pack_size, step)
    feed = Feed(spec.frames, args.image_size, device, cache[0], args.num_workers, spec.crop_area, spec.mirror,
                args.pack_size)  # fmt: skip
    clips = {name: make_clips(folder.root, name, part, folder.audio_shape, feed) for name, part in used.items()}
    inputs = args.method if args.method in ("audio", "video") else "both"  # what the network is given

    # model
    set_precision(args.precision, device)
    bare = AVClassifier(len(folder.classes), args.model, args.fusion_method, args.precision == "bf16")
    bare = bare.to(device, memory_format=torch.channels_last)
    start = load_checkpoint(args.checkpoint) if args.checkpoint else None
    if start and not args.train:
        balances.adopt(args, start.get("config", {}), args.checkpoint)
        if start.get("classes", folder.classes) != folder.classes:
            raise UserError(f"{folder.root}: its classes ({some(folder.classes, 6)}) are not {args.checkpoint}'s "
                            f"({some(start['classes'], 6)}); give its data by --data_root")  # fmt: skip
    balances.replace_heads(bare, args)
    if args.compile:
        compile_in_place([bare.audio_net, bare.visual_net], device)
    if start:
        load_weights(bare, start["model"], args.checkpoint)

    def predict_part(network: AVClassifier, part: str, kept: str) -> dict[str, Tensor]:
        return predict(network, clips[part], kept, 4 * args.batch_size, f"{part} predictions")

    def predict_all(part: str, name: str = "", after_batch: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
        return predict(bare, clips[part], inputs, 4 * args.batch_size, f"{name}{part} predictions", after_batch)

    if not args.train:
        found = evaluate(predict_all("test"), clips["test"].labels, "test")
        if distributed.is_main():
            left_out = f", {len(folder.missing)} broken ones left out" if folder.missing else ""
            print(f"{args.dataset}, {folder.root}: {len(clips['test'])} test clips{left_out}")
            print(result_table({args.checkpoint: found}))
        distributed.stop()
        return
    model = parallel(bare)

    # optimizer
    optimizer = make_optimizer(bare, args)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.lr_decay_step, args.lr_decay_ratio)

    # balance methods
    def stop_if_asked() -> None:
        """While a copy is trained, of which nothing is kept: the epoch's start is made again."""
        if interrupt.asked():
            leave(f"before epoch {epoch}, while --balance {args.balance} estimated for it")

    def copy_trainer(*how) -> AVClassifier:
        rates = [group["lr"] for group in optimizer.param_groups]
        return train_copy(bare, clips["train"], rates, args, stop_if_asked, *how)

    def refresh(epoch: int) -> None:
        if args.batchnorm == "refreshed":
            refresh_batchnorm(bare, clips["train"], inputs, args, epoch)

    balance = Balance.of(balances.Run(bare, clips, args, predict_part, copy_trainer, refresh))

    # resume, in this order: weights, optimizer, scheduler, generators, methods, then the loop's own state. Epochs draw
    # from (seed, epoch, purpose) alone; the global generators are put back for whatever else may draw.
    first_epoch, best, kept, position = 0, {}, None, None
    last, data = Path(args.log_path) / run_name / "last.pth", {name: digest(part) for name, part in parts.items()}
    if args.resume and last.is_file():  # there is none if the run was killed before its first checkpoint
        state = read_state(last)
        changed = check_same_run(args, data, state)
        load_weights(bare, state["model"], last)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        set_rng_state(state["rng"])
        balance.load_state_dict(state.get("balance", {}))  # {}: of a run before there were methods
        # An epoch resumed after its last step takes none before the scheduler's; PyTorch would take that for a mistake.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        best, kept, first_epoch = state["best"], state["kept"], state["epoch"] + 1
        if args.epochs < first_epoch:
            raise UserError(
                f"--epochs {args.epochs}: the run has done {first_epoch}; type --epochs {first_epoch} at least"
            )
        position, started = go_on_at(state["position"], device), started - state["seconds"]
        if distributed.is_main():
            where = f" after batch {position.batches}" if position and position.batches else ""
            print(f"resumed in epoch {first_epoch}{where}{'; changed: ' if changed else ''}{', '.join(changed)}")

    def save(epoch: int, position: Position | None = None, improved: bool = False) -> None:
        """last.pth: `epoch` is done, and the next one up to `position`. Every process takes part, one writes."""
        middle = position and asdict(position) | {
            "losses": {name: distributed.rows_of_ranks(values) for name, values in position.losses.items()}
        }
        if not torch.stack([parameter.isfinite().all() for parameter in bare.parameters()]).all():
            raise UserError(f"epoch {epoch + 1 if position else epoch}: weights are not finite; {last} is as it was; "
                            "try a lower --learning_rate")  # fmt: skip
        if log:
            state = {"model": model_weights(bare), "optimizer": optimizer.state_dict(), "epoch": epoch, "best": best,
                     "scheduler": scheduler.state_dict(), "kept": kept, "rng": rng_state(), "config": flags(args),
                     "classes": folder.classes, "data": data, "position": middle, "balance": balance.state_dict(),
                     "seconds": time.perf_counter() - started}  # fmt: skip
            if improved:
                save_checkpoint(run / "best.pth", state)
            # After best.pth: a run killed between the two repeats this epoch, and best.pth with it.
            if middle or epoch + 1 == args.epochs or (unit == "epochs" and (epoch + 1) % every == 0):
                save_checkpoint(last, state)

    def pause(trained: bool) -> None:
        """After a step, or a batch of predictions: save where it is time to, and stop where a signal asked for it."""
        nonlocal unsaved
        unsaved += trained and unit == "steps"
        stop = interrupt.asked()
        if position and (stop or unsaved >= every):
            mean_losses(position, plan, clips["train"].names, epoch) if position.batches else None
            save(epoch - 1, position)
            unsaved = 0
        if stop:
            leave(f"in epoch {epoch}, batch {position.batches} of its training" if position else "after the last epoch")

    def leave(where: str) -> None:
        distributed.stop()  # the others wait until the file is written
        words = resume_command(sys.argv[1:] if argv is None else argv, run_name, args.gpu_ids is not None)
        has = f"{last} has it" if last.is_file() else "nothing is saved yet"
        raise Interrupted(f"stopped by {interrupt.noted or 'another process'} {where}; {has}; go on: {words}")

    every, unit = interval_of(args.save_every)
    unsaved = 0  # steps since last.pth, where steps count
    interrupt.listen()  # from here on there is something to lose
    log = RunLog(run, describe_run(args, folder, clips, device), first_epoch) if distributed.is_main() else None
    if log:
        announce(args, folder, clips, cache, run)

    # loop
    for epoch in range(first_epoch, args.epochs):
        remixing = args.method == "remix" and epoch >= args.warmup
        clock = time.perf_counter()
        if position is None:  # else the epoch was begun before the run was interrupted
            balance.start_epoch(epoch)
        position, plan = position or Position(), []
        numbers, earlier = position.numbers, position.seconds
        numbers |= {"epoch": epoch, "phase": "remix" if remixing else "joint"}
        numbers["lr"] = scheduler.get_last_lr()[-1]
        order = epoch_generator(args.random_seed, epoch, "plan")
        if remixing:
            if epoch == 0 and position.batches == 0:
                refresh(epoch)  # without a warm-up nothing has estimated BatchNorm's statistics yet
            if position.batches == 0 and (kept is None or (epoch - args.warmup) % args.rescore_every == 0):
                logits = predict_all("train", f"epoch {epoch}, ", lambda: pause(trained=False))
                low_is_hard = remix.difficulty(logits["audio"], logits["video"], args.score, clips["train"].labels,
                                               epoch_generator(args.random_seed, epoch, "score"))  # fmt: skip
                before, kept = kept, distributed.same(remix.decouple(low_is_hard, args.keep)).cpu()
                # partition.csv shows the KL whatever the score
                position.kl = torch.stack([remix.kl_from_uniform(logits[name]) for name in ("audio", "video")], 1).cpu()
                if args.diagnose:
                    numbers |= diagnose_partition(before, kept, clips["train"], folder.classes)
            if log and position.kl is not None:
                write_partition(log, epoch, clips["train"], folder.classes, position.kl, kept)
            plan = remix.reassemble(kept, args.batch_size, args.batch_order, order)
        else:
            plan = remix.batches_of(len(clips["train"]), args.batch_size, inputs, order)
        for name in ("audio", "video"):
            numbers[f"n_{name}"] = sum(len(b.clips) for b in plan if b.kept == name) if remixing else None
        if log and remixing and 0 in (numbers["n_audio"], numbers["n_video"]):
            print(f"epoch {epoch}: no clip keeps {'audio' if numbers['n_audio'] == 0 else 'video'}; all batches are of "
                  "the other modality")  # fmt: skip
        seconds, clock = lap(clock)
        numbers["seconds_score"] = numbers.get("seconds_score", 0.0) + seconds

        train_epoch(model, clips["train"], plan, optimizer, epoch, args, balance, position,
                    lambda: pause(trained=True))  # fmt: skip
        distributed.same_buffers(bare)
        refresh(epoch)
        numbers |= mean_losses(position, plan, clips["train"].names, epoch) | balance.numbers()
        seconds, clock = lap(clock)
        numbers["seconds_train"] = earlier + seconds

        for part in [name for name in clips if name != "train"]:
            logits = predict_all(part, f"epoch {epoch}, ", lambda: pause(trained=False))
            numbers |= evaluate(logits, clips[part].labels, part)
        numbers["seconds_eval"], clock = lap(clock)
        if args.diagnose:
            numbers |= diagnose(bare, clips, inputs, args)
            numbers["seconds_diagnose"], clock = lap(clock)
        trained = sum(len(batch.clips) for batch in plan)
        numbers["clips_per_second"] = trained / (numbers["seconds_score"] + numbers["seconds_train"])

        improved = update_best(best, numbers)
        scheduler.step()
        if log:
            log.epoch(numbers)
            print(epoch_line(numbers, args.epochs), flush=True)
        save(epoch, improved=improved)
        position = None

    # summary
    logits = predict_all("test", after_batch=lambda: pause(trained=False))
    if log:
        finish(log, args, folder, best, logits, clips["test"].labels, time.perf_counter() - started)
    distributed.stop()


def write_partition(log: RunLog, epoch: int, clips: Clips, classes: list[str], kl: Tensor, kept: Tensor) -> None:
    """partition.csv and the histograms: kl (N, 2), and what each clip keeps."""
    labels = [classes[label] for label in clips.labels.tolist()]
    log.partition(epoch, clips.names, labels, kl, [remix.NAMES[modality] for modality in kept.tolist()])


def update_best(best: dict, numbers: dict) -> bool:
    """Keep the best epochs; True if this one is to be best.pth: by validation where there is some, else by test."""
    better = {
        part: numbers[f"{part}_acc"] > best.get(f"best_{part}_acc", -1)
        for part in ("test", "val")
        if f"{part}_acc" in numbers
    }
    for part, is_better in better.items():
        if is_better:
            best |= {f"best_{part}_acc": numbers[f"{part}_acc"], f"best_{part}_epoch": numbers["epoch"]}
            best[f"at_best_{part}"] = {name: value for name, value in numbers.items() if name.startswith("test_")}
    return better.get("val", better["test"])


def finish(
    log: RunLog,
    args: argparse.Namespace,
    folder: Folder,
    best: dict,
    logits: dict[str, Tensor],
    labels: Tensor,
    seconds: float,
) -> None:
    """summary.json, the pictures and the result table."""
    last = evaluate(logits, labels, "test")
    honest = best.get("at_best_val")
    # At step `epochs`, one beyond the last: a run resumed here drops what it finds from its first epoch on.
    log.figure(
        "curves", plot_curves(log.history, f"{args.dataset}, {args.method}, seed {args.random_seed}"), args.epochs
    )
    matrices = {name: confusion(values, labels) for name, values in logits.items()}
    log.figure(
        "confusion",
        plot_confusion(matrices, folder.classes, f"{args.dataset}, {args.method}, last epoch"),
        args.epochs,
    )
    log.summary({
        "method": args.method, "balance": args.balance, "dataset": args.dataset, "seed": args.random_seed,
        "epochs": args.epochs,
        "best_test_acc": best["best_test_acc"], "best_test_epoch": best["best_test_epoch"],
        "last_test_acc": last["test_acc"], "test_acc_at_best_val": honest["test_acc"] if honest else None,
        "test_acc_audio": last["test_acc_audio"], "test_acc_video": last["test_acc_video"],
        "f1_macro": last["test_f1_macro"], "total_seconds": seconds, "missing": len(folder.missing),
    })  # fmt: skip
    rows = {
        "last epoch": last,
        f"best on test (papers' protocol), epoch {best['best_test_epoch']}": best["at_best_test"],
    }
    if honest:
        rows[f"best on validation, epoch {best['best_val_epoch']}"] = honest
    print(f"\n{result_table(rows)}\n\n{seconds:.0f} s; curves.png, confusion.png and the weights are in {log.folder}")
    print(f"curves of all runs: tensorboard --logdir {shlex.quote(args.log_path)} --host localhost")


def lap(clock: float) -> tuple[float, float]:
    """Seconds since `clock`, the device having finished, and the time now."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    now = time.perf_counter()
    return now - clock, now


if __name__ == "__main__":
    run_main(main)
