"""Data Remixing (ICML 2025) and its baselines for multimodal classification: one loop for all of them.

    python train.py --train                                              # Remix on the demo data
    python train.py --train --method baseline                            # joint training
    python train.py --train --dataset CREMAD --epochs 60 --warmup 10     # the paper's setting
    python train.py --checkpoint runs/NAME/best.pth                      # evaluate

Read it from top to bottom: flags, loss terms, one training epoch, the plan of an epoch (the method), main. The plan of
an epoch is a list of batches, each with clip indices and fed modalities. Joint training feeds all modalities, Remix
feeds one. Everything else is the same.
"""

import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path

import utils.threads  # noqa: F401  (before PyTorch)

# isort: split
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import balance as balances
import remix
from balance import Balance, Context, Step
from balance.diagnostics import diagnose, partition_moves
from dataset.build import Data, build_data
from dataset.clips import CACHES, Clips
from dataset.folder import digest
from dataset.specs import SPECS, VIDEO, get_spec
from evaluation.checkpoint import evaluate_checkpoint
from evaluation.numbers import evaluate, fed_to, trained_heads
from evaluation.trained import check_evaluation, take_flags_of_checkpoint, trained_spec
from models import FUSIONS, MODELS, UNIMODAL, MultimodalClassifier, Output, build_model, check_model, encoder_list
from models.batchnorm import batchnorm_of_one_clip, reestimate, synchronise_batchnorm
from models.checkpoint import load_weights, model_weights
from models.inference import predict
from models.padding import few_sizes
from models.pretrained import check_files, load_initial
from models.rates import make_optimizer
from utils import distributed
from utils.acceleration import PRECISIONS, compile_in_place, compiled, default_precision, set_precision
from utils.cli import Parser, check_modalities, each, factors, id_list, number, path_name, with_default
from utils.console import epoch_line, lap, progress, start_lines
from utils.errors import UserError, run_main
from utils.graphs import COMPILE, compiles_encoders, detached, graphed
from utils.memory import usable_cores
from utils.metrics import Tally
from utils.run import Run, check_same_run, continues, environment, take_flags_of_run, update_best
from utils.seeding import epoch_generator, seed_everything

# ---------------------------------------------------------------------------------------------------------- flags

Names = tuple[str, ...]  # of modalities, in the dataset's order
METHODS = ("remix", "baseline")  # or the name of a modality, which is then trained alone

# Defaults of flags that are not given. `fair` uses the dataset's learning rate for every method. `official` reproduces
# the official code, including its two learning rates, which the paper does not explain.
SHARED = {"batch_size": 64, "epochs": 60, "warmup": 10, "optimizer": "adam", "lr_decay_step": 30, "lr_decay_ratio": 0.1,
          "alpha": 0.5, "beta": 0.5, "gamma1": 1.0, "gamma2": 1.0, "fusion_method": "concat", "score": "kl",
          "keep": "hard", "rescore_every": 1, "reassemble": "sequential"}  # fmt: skip
PRESETS = {"fair": SHARED | {"masked_encoder": "skip", "batchnorm": "refreshed"},
           "official": SHARED | {"masked_encoder": "run", "batchnorm": "running", "precision": "official"}}  # fmt: skip
OFFICIAL_RATES = {"remix": 5e-5}  # every other method: 1e-3
OFFICIAL_FLAGS = ("dataset", "n_classes", "batch_size", "epoch", "warmup", "optimizer", "learning_rate",
                  "lr_decay_step", "lr_decay_ratio", "encoder_lr_decay", "alpha", "beta", "gamma1", "gamma2", "train",
                  "log_path", "random_seed", "gpu_ids", "fusion_method")  # fmt: skip
MANY = 10**6  # upper limit of counts and factors
# Flags that may change when a run is resumed: where and how long it runs, not what it computes.
RESUMABLE = {"resume", "epochs", "num_workers", "cache", "log_path", "run_name", "gpu_ids", "device", "data_root",
             "diagnose", "compile", "checkpoint"}  # fmt: skip
DERIVED = ("from_preset", "joint_weights", "alone_weights", "trained")  # of the Namespace, not flags


# fmt: off
def make_parser() -> Parser:
    count, factor = number(int, 1, MANY), number(float, 0, MANY)
    p = Parser(description=(__doc__ or "").split("\n")[0], abbreviated=OFFICIAL_FLAGS)
    g = p.add_argument_group("data")
    g.add_argument("--dataset", default="demo", choices=SPECS, help="dataset (default: demo)")
    g.add_argument("--data_root", type=path_name, metavar="DIR", help="training folder (default: data/<dataset>)")
    g.add_argument("--n_classes", type=number(int, 2, MANY), metavar="N",
                   help="expected number of classes, checked against the data (default: the data's)")
    g.add_argument("--val_fraction", type=number(float, 0, 0.9), default=0.0, metavar="F",
                   help="fraction of train held out for validation, the same clips for every seed (default: 0)")
    g.add_argument("--split", choices=("official", "actor"), help="split into train and test; actor: no actor is in "
                   "both (default: as prepared)")
    g.add_argument("--allow_missing", action="store_true", help="skip clips with missing files (default: stop)")
    g.add_argument("--image_size", type=number(int, 8, 4096), metavar="S",
                   help="side length in pixels of the frames fed to the network (default: the dataset's)")
    g.add_argument("--cache", default="auto", choices=CACHES, help="where to store decoded clips (default: auto)")
    g.add_argument("--pack_size", type=number(int, 8, 4096), metavar="P",
                   help="shorter side in pixels of the decoded frames in the cache (default: as stored)")
    g.add_argument("--num_workers", type=number(int, 0, 1024), default=min(8, usable_cores()), metavar="N",
                   help="worker processes that read files with --cache none (default: CPU cores, at most 8)")

    g = p.add_argument_group("model")
    g.add_argument("--model", default="late", choices=MODELS, help="architecture; late: the modalities are fused in "
                   "the joint head; mmtm, centralnet: between the stages of the encoders (default: late)")
    g.add_argument("--encoder", type=encoder_list, metavar="NAME", help="encoder of images and spectrograms, or "
                   "audio=NAME,video=NAME; see docs/encoders.md (default: the dataset's)")
    g.add_argument("--pretrained", type=each(path_name), metavar="FILE", help="initial weights of the encoders, or "
                   "audio=FILE,video=FILE (default: none)")
    g.add_argument("--fusion_method", choices=FUSIONS, help="fusion head (default: concat)")
    g.add_argument("--unimodal", default="heads", choices=UNIMODAL, help="source of unimodal predictions: unimodal "
                   "heads, or the joint head with other modalities masked and no heads' losses (default: heads)")
    g.add_argument("--checkpoint", type=path_name, metavar="FILE", help="weights to evaluate, or to start "
                   "from with --train (default: none)")
    g.add_argument("--predictions", type=path_name, metavar="FILE", help="with --checkpoint: write the logits and "
                   "features of all clips to this .npz file (default: none)")
    g.add_argument("--clip", nargs="+", type=path_name, metavar="FILE", help="with --checkpoint: classify these raw "
                   "video and audio files instead of the dataset (default: none)")

    g = p.add_argument_group("method")
    g.add_argument("--method", default="remix", metavar="NAME", help="training method: remix, baseline (joint "
                   "training), or the name of a modality to train it alone (default: remix)")
    g.add_argument("--preset", default="fair", choices=PRESETS, help="set of defaults; official: those of the "
                   "official code, see docs/fidelity.md (default: fair)")
    g.add_argument("--warmup", type=number(int, 0, MANY), metavar="N", help="joint epochs before Remix (default: 10)")
    g.add_argument("--score", choices=remix.SCORES, help="difficulty score of a clip per modality (default: kl)")
    g.add_argument("--keep", choices=remix.KEEP, help="modality that each clip keeps (default: hard)")
    g.add_argument("--rescore_every", type=count, metavar="K", help="score the clips every K epochs (default: 1)")
    g.add_argument("--reassemble", choices=(*remix.ORDERS, *remix.ABLATIONS), help="order of homogeneous batches; off: "
                   "mixed batches with a mask per clip (decouple only); unmasked: homogeneous batches without masks "
                   "(reassemble only) (default: sequential)")
    g.add_argument("--masked_encoder", choices=("skip", "run", "run_heads"), help="encoder of a masked modality: skip "
                   "it, run it, or run it and also update its head (default: skip)")
    g.add_argument("--batchnorm", choices=("refreshed", "running"), help="BatchNorm statistics for scoring and "
                   "evaluation: re-estimated after each epoch, or running statistics (default: refreshed)")
    g.add_argument("--alpha", type=factor, metavar="F", help="weight in joint batches of the losses of audio and "
                   "all other modalities except video (default: 0.5)")
    g.add_argument("--beta", type=factor, metavar="F", help="weight of the video loss in joint batches (default: 0.5)")
    g.add_argument("--gamma1", type=factor, metavar="F", help="weight of the video loss in video batches (default: 1)")
    g.add_argument("--gamma2", type=factor, metavar="F", help="as --alpha, in batches of one modality (default: 1)")
    g.add_argument("--diagnose", action="store_true", help="log clash, imbalance and calibration (default: off)")
    g.add_argument("--balance", default="none", metavar="NAME[:OPTION=VALUE...][,NAME...]",
                   help="balance methods, on top of baseline or remix; list: python -m balance (default: none)")

    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", "--epoch", type=count, metavar="N", help="epochs, warm-up included (default: 60)")
    g.add_argument("--batch_size", type=number(int, 2, MANY), metavar="B", help="global batch size (default: 64)")
    g.add_argument("--optimizer", choices=("adam", "adamw", "sgd"), help="sgd has momentum 0.9 (default: adam)")
    g.add_argument("--learning_rate", type=number(float, 0, MANY, True), metavar="LR",
                   help="initial learning rate (default: the dataset's)")
    g.add_argument("--lr_decay_step", type=count, metavar="N", help="decay the rate every N epochs (default: 30)")
    g.add_argument("--lr_decay_ratio", type=number(float, 0, 1, True), help="factor of each decay (default: 0.1)")
    g.add_argument("--encoder_lr_decay", type=each(factor), default=1.0, metavar="F", help="learning-rate multiplier "
                   "for the encoders, or audio=F,video=F; 0 freezes an encoder (default: 1)")
    g.add_argument("--layer_decay", type=number(float, 0, 1, True), default=1.0, metavar="F",
                   help="layer-wise learning-rate decay: multiplier for each layer below the heads (default: 1)")
    g.add_argument("--random_seed", type=number(int, 0, 2**32 - 1), default=42, metavar="N", help="seed (default: 42)")

    g = p.add_argument_group("system")
    g.add_argument("--train", action="store_true", help="train; without it, evaluate --checkpoint (default: off)")
    g.add_argument("--device", default="auto", choices=distributed.DEVICES, help="auto: CUDA or CPU (default: auto)")
    g.add_argument("--gpu_ids", type=id_list, metavar="IDS", help="comma-separated GPUs, one process each "
                   "(default: the first visible)")
    g.add_argument("--precision", choices=PRECISIONS, help="precision (default: fp32 on a CPU, bf16 on a GPU, "
                   "tf32 where it has no bfloat16)")
    g.add_argument("--compile", nargs="?", const=COMPILE[0], default=False, choices=COMPILE, help="torch.compile for "
                   "the encoders (no value), CUDA graphs of whole training steps, or all (default: off)")
    g.add_argument("--log_path", type=path_name, default="runs", metavar="DIR", help="folder of runs (default: runs)")
    g.add_argument("--run_name", type=path_name, metavar="NAME", help="folder's name (default: from flags and time)")
    g.add_argument("--resume", nargs="?", const="auto", type=path_name, metavar="RUN",
                   help="resume this run folder; auto: resume --run_name, or start it (default: off)")
    return p
# fmt: on


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Parse the flags. Fill in those not given from the resumed run, the checkpoint, the preset and the dataset.

    Raises a one-line `UserError` for invalid flags and for flags that exclude each other.
    """
    parser = make_parser()
    args, typed = parser.parse_args(argv), parser.typed(argv)
    args.trained = {}  # what the evaluated checkpoint records about its data
    if args.resume not in (None, "auto"):
        take_flags_of_run(args, typed)
    elif args.checkpoint and not args.train:
        take_flags_of_checkpoint(args, typed)
    root = str(get_spec(args.dataset).root)
    spec, official = trained_spec(args, Path(args.data_root or root)), args.preset == "official"
    preset = PRESETS[args.preset] | {"encoder": spec.encoder, "image_size": spec.image_size, "data_root": root}
    preset["learning_rate"] = OFFICIAL_RATES.get(args.method, 1e-3) if official else spec.learning_rate
    preset.setdefault("precision", default_precision(args.device, args.gpu_ids))
    filled = {name: value for name, value in preset.items() if getattr(args, name) is None}
    args.from_preset = getattr(args, "from_preset", {}) | filled  # a resumed run has some already
    vars(args).update(filled, encoder=with_default(args.encoder or spec.encoder, spec.encoder))
    args.joint_weights, args.alone_weights = loss_weights(args, spec.names)
    balances.settle(args, spec.names)
    check_args(args, spec.names)
    return args


def loss_weights(args: Namespace, names: Names) -> tuple[dict[str, float], dict[str, float]]:
    """Weights of the unimodal losses in joint and in homogeneous batches.

    The official flags are for audio and video. All other modalities have audio's weights.
    """
    if args.unimodal == "masked":
        return dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    joint = {name: args.beta if name == VIDEO else args.alpha for name in names}
    return joint, {name: args.gamma1 if name == VIDEO else args.gamma2 for name in names}


def check_args(args: Namespace, names: Names) -> None:
    """Check combinations of flags. Raises `UserError`."""
    if args.method not in (*METHODS, *names):
        raise UserError(f"--method {args.method}: unknown; allowed: {', '.join((*METHODS, *names))}")
    if not args.train and not args.checkpoint:
        raise UserError("nothing to do: use --train to train, --resume runs/NAME to continue a run, or --checkpoint "
                        "FILE to evaluate")  # fmt: skip
    if args.resume and not (args.train and args.run_name):
        raise UserError("--resume: no run given; use --resume runs/NAME, or --train --run_name NAME --resume auto")
    check_evaluation(args)
    if args.checkpoint and not continues(args) and not Path(args.checkpoint).is_file():
        raise UserError(f"{args.checkpoint}: no such checkpoint; give a .pth file, such as runs/NAME/best.pth")
    if args.train and args.method == "remix" and args.warmup > args.epochs:
        raise UserError(f"--warmup {args.warmup}: more than --epochs {args.epochs}, so Remix would never start; lower "
                        "--warmup, or use --method baseline")  # fmt: skip
    check_model(args.model, args.fusion_method, args.compile)
    check_modalities(args, names, "encoder", "pretrained", "encoder_lr_decay")
    if args.pretrained and not continues(args):
        check_files(args.pretrained, args.checkpoint)
    if args.split == "actor" and not get_spec(args.dataset).by_actor:
        raise UserError(f"--split actor: the clip ids of {args.dataset} contain no actor; omit the flag")
    if args.train and not args.val_fraction and not (Path(args.data_root) / "val.csv").is_file():
        for name in balances.needs_validation(args):
            raise UserError(f"--balance {name}: needs a validation part (test is never used); use --val_fraction 0.1")


def flags(args: Namespace) -> dict:
    """The flags as saved in config.json and checkpoints."""
    return {name: value for name, value in vars(args).items() if name not in DERIVED}


# ------------------------------------------------------------------------------------------------------ loss terms


def cross_entropies(output: Output, labels: Tensor, given: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Cross entropy of the joint head and of each fed modality's head, averaged over the batch. labels (B,).

    In a mixed batch, a clip contributes only to the heads of the modalities it is fed: `given`, (B,) bool per modality.
    The average is still over the whole batch, so that all clips have the same weight.
    """
    found = {}
    for head, logits in output.heads.items():
        if given and head in given:
            found[head] = (F.cross_entropy(logits, labels, reduction="none") * given[head]).mean()
        else:
            found[head] = F.cross_entropy(logits, labels)
    return found


def loss_terms(entropies: dict[str, Tensor], weights: dict[str, float]) -> dict[str, Tensor]:
    """The terms of a batch's loss, which is their sum. A masked modality has no term.

    joint batches          CE(head) + sum_m w_m CE(head_m)
    homogeneous batches    CE(head with the other features zero) + g_m CE(head_m), m the fed modality
    mixed batches          the mean over clips of the homogeneous loss, m the modality that the clip keeps
    """
    return {head: value if head == "joint" else weights[head] * value for head, value in entropies.items()}


# ------------------------------------------------------------------------------------------------ one training epoch


def train_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, balance: Balance, args: Namespace, step: Step
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Train on one batch: the logits (B, C) and the cross entropy of each head, and the loss, without gradients."""
    batch, given = step.source, step.masks(args.joint_weights)
    balance.before_forward(step)
    alone = batchnorm_of_one_clip(network, args.batchnorm == "running") if batch.total == 1 else nullcontext()
    with alone, compiled(batch.total == args.batch_size):
        output = network(batch.inputs, batch.fed, batch.mask)
    output = balance.outputs(output, step)
    entropies = cross_entropies(output, batch.labels, given)
    terms = loss_terms(entropies, args.joint_weights if step.joint else args.alone_weights)
    terms = balance.losses(terms, output, step)
    first, *others = terms.values()
    loss = sum(others, first)
    optimizer.zero_grad(set_to_none=True)
    # Gradients are averaged over processes: weight by this process's share to get the mean over the batch.
    balance.backward(loss * step.weight, terms, output, step)
    if args.masked_encoder == "run_heads":
        distributed.fill_gradients(network)
    optimizer.step()
    return detached((output.heads, entropies, loss))


def train_epoch(
    model: MultimodalClassifier,
    clips: Clips,
    plan: list[remix.Batch],
    optimizer: torch.optim.Optimizer,
    epoch: int,
    args: Namespace,
    balance: Balance | None = None,
    after_step: Callable[[], None] = lambda: None,
    run_step: Callable[..., tuple] = train_step,
) -> dict[str, float | None]:
    """Train for one epoch over `plan` and return losses and training accuracies. `after_step` stops the run by raising.

    Raises `UserError` with epoch, batch and clips if the loss of a batch is not finite.
    """
    balance, tally = balance or Balance(), Tally(len(plan), ("joint", *trained_heads(args)))
    model.train()
    network = few_sizes(model, args, next(model.parameters()).device)
    views = epoch_generator(args.random_seed, epoch, "views")
    with progress(f"epoch {epoch + 1} train", sum(len(batch.clips) for batch in plan), distributed.is_main()) as bar:
        for i, batch in enumerate(clips.epoch(plan, views, args.masked_encoder != "skip")):
            step = Step(epoch, i, batch, len(batch.fed) > 1 and batch.mask is None)
            heads, entropies, loss = run_step(network, optimizer, balance, args, step)
            tally.add(i, loss, entropies, heads, batch.labels, batch.share * batch.total, step.masks(clips.modalities))
            bar.update(batch.total)
            after_step()
    tally.check_finite(epoch, [batch.clips for batch in plan], clips.names)
    return tally.numbers(("joint", *clips.modalities)) | balance.numbers()


# ------------------------------------------------------------------------------------------- the plan of an epoch


def plan_epoch(
    model: MultimodalClassifier,
    data: Data,
    fed: Names,
    keep: Tensor | None,
    epoch: int,
    args: Namespace,
    run: Run,
    balance: Balance | None = None,
) -> tuple[list[remix.Batch], Tensor | None, dict]:
    """The batches of an epoch, the partition (N, M) they are built from, and numbers to log.

    Joint epochs feed all modalities of every clip. After the warm-up, Remix scores the difficulty of each clip in each
    modality, keeps the hardest modality of each clip, and builds batches of a single modality (paper section 3).
    """
    clips, order, balance = data.clips["train"], epoch_generator(args.random_seed, epoch, "plan"), balance or Balance()
    if args.method != "remix" or epoch < args.warmup:
        counts = {f"n_{name}": None for name in model.names}
        plan = balance.plan(remix.batches_of(len(clips), args.batch_size, fed, order), epoch)
        return plan, keep, {"phase": "joint"} | counts

    numbers: dict = {"phase": "remix"}
    if keep is None or (epoch - args.warmup) % args.rescore_every == 0:
        if epoch == 0 and args.batchnorm == "refreshed":  # without a warm-up there is no estimate yet
            reestimate(model, clips, fed, args.batch_size, args.random_seed, epoch)
        logits = predict(model, clips, fed, 4 * args.batch_size, f"epoch {epoch + 1} scoring", run.check)
        unimodal = [logits[name] for name in model.names]
        scores = epoch_generator(args.random_seed, epoch, "score")
        kl = remix.difficulty(unimodal)  # (N, M), recorded for any --score
        hard = kl if args.score == "kl" else remix.difficulty(unimodal, args.score, clips.labels, scores)  # (N, M)
        before, keep = keep, distributed.same(remix.decouple(hard, args.keep)).cpu()  # (N, M)
        recorded = dict(zip(model.names, kl.cpu().unbind(1), strict=True))
        labels = clips.labels.cpu()
        run.partition(epoch, clips.names, [data.classes[label] for label in labels.tolist()], recorded, keep)
        if args.diagnose:
            numbers |= partition_moves(keep, before, model.names, labels, data.classes)
    plan = balance.plan(remix.reassemble(keep, model.names, args.batch_size, args.reassemble, order), epoch)
    for name, count in zip(model.names, keep.sum(0).tolist(), strict=True):
        numbers[f"n_{name}"] = count
        if numbers[f"n_{name}"] == 0 and run.writes:
            print(f"epoch {epoch + 1}: no clip keeps {name}; its encoder is not trained in this epoch")
    return plan, keep, numbers


# ------------------------------------------------------------------------------------------------------------ main


def make_model(args: Namespace, data: Data, device: torch.device) -> MultimodalClassifier:
    """Build the network, with the heads of the balance methods and the weights of `--checkpoint` or `--pretrained`.

    Raises `UserError` for weights that do not fit or were trained for other classes.
    """
    set_precision(args.precision, device)
    model = build_model(data.spec.modalities, data.folder.shapes, len(data.classes), args.encoder, args.fusion_method,
                        args.precision, device, args.unimodal, args.model, args.image_size)  # fmt: skip
    balances.replace_heads(model, args)
    synchronise_batchnorm(model, device)
    if compiles_encoders(args.compile):
        compile_in_place(list(model.encoders.values()), device)
    model.freeze(name for name, factor in factors(args.encoder_lr_decay, model.names).items() if factor == 0)
    if not continues(args):
        load_initial(model, args, data.classes, data.folder.root)
    return model


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = distributed.start(args.device, args.gpu_ids, relaunch=argv is None and args.train)
    with distributed.together():
        if args.train and args.batch_size < (least := 2 * distributed.world_size()):
            raise UserError(f"--batch_size {args.batch_size}: BatchNorm needs 2 clips per process; use {least} or more")
    if not args.train:
        evaluate_checkpoint(args, device, make_model)
    else:
        named = [args.dataset, "+".join([args.method, *args.balance_options]), f"seed{args.random_seed}"]
        args.run_name = args.run_name or "_".join([*named, f"{datetime.now():%Y%m%d-%H%M%S}"])
        with Run(args.log_path, args.run_name, args.resume == "auto") as run:
            train(args, device, run)
    distributed.stop()


def train(args: Namespace, device: torch.device, run: Run) -> None:
    """One training run: data, model, optimizer, method, resume, loop, summary."""
    started = time.perf_counter()
    seed_everything(args.random_seed)

    # data and model
    data = build_data(args, device)
    clips, names = data.clips["train"], data.spec.names
    fed, size = fed_to(args, names), 4 * args.batch_size  # of joint batches and predictions, of predictions
    model = make_model(args, data, device)
    distributed.parallel(model, model.encoders.values())
    run_step = graphed(train_step, args, device)

    # optimizer
    optimizer = make_optimizer(model, args)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.lr_decay_step, args.lr_decay_ratio)

    # balance methods
    balance = balances.make_balance(Context(model, data.clips, args, optimizer, train_epoch, run.check))

    # resume, in this order: flags and data, weights, optimizer, scheduler, balance methods, generators, state of the
    # loop. Epochs draw from (seed, epoch, purpose) only; the global generators are restored for any other code.
    first, best, keep = 0, {}, None
    digests, state = {name: digest(part) for name, part in data.parts.items()}, run.state()
    if state:
        check_same_run(flags(args), state["config"], digests, state["data"], RESUMABLE)
        load_weights(model, state["model"], run.last)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        balance.load_state_dict(state["balance"])
        first, best, keep, started = state["epoch"] + 1, state["best"], state["keep"], started - state["seconds"]
        if args.epochs < first:
            raise UserError(f"--epochs {args.epochs}: the run has finished {first}; use --epochs {first} or more")
    about = {"from_preset": args.from_preset, "data": data.describe()}
    run.begin(flags(args) | about | environment(device, distributed.world_size()), first)
    if run.writes:
        usual = PRESETS["fair"] | {"learning_rate": data.spec.learning_rate}
        told = [*data.lines(), *balances.notes(args), *start_lines(args, usual, device, run.folder, first)]
        print("\n".join(told), flush=True)

    about = {"config": flags(args), "classes": data.classes, "input": data.input()}

    # loop
    logits: dict[str, dict[str, Tensor]] = {}
    for epoch in range(first, args.epochs):
        clock = time.perf_counter()
        balance.start_epoch(epoch)
        plan, keep, found = plan_epoch(model, data, fed, keep, epoch, args, run, balance)
        numbers: dict = {"epoch": epoch} | found | {"lr": scheduler.get_last_lr()[-1]}
        numbers["seconds_score"], clock = lap(clock)

        numbers |= train_epoch(model, clips, plan, optimizer, epoch, args, balance, run.check, run_step)
        distributed.same_buffers(model)
        if args.batchnorm == "refreshed":
            reestimate(model, clips, fed, args.batch_size, args.random_seed, epoch)
        numbers["seconds_train"], clock = lap(clock)

        for part in [name for name in data.clips if name != "train"]:
            logits[part] = predict(model, data.clips[part], fed, size, f"epoch {epoch + 1} {part}", run.check, True)
            numbers |= evaluate(logits[part], data.clips[part].labels, part, args)
        numbers["seconds_eval"], clock = lap(clock)
        if args.diagnose:
            numbers |= diagnose(model, data.clips, fed, args.batch_size, args.random_seed, keep)
            numbers["seconds_diagnose"], clock = lap(clock)
        numbers["n_fed"] = sum(len(batch.clips) for batch in plan)
        numbers["clips_per_second"] = numbers["n_fed"] / (numbers["seconds_score"] + numbers["seconds_train"])

        improved = update_best(best, numbers)
        scheduler.step()
        numbers |= run.snapshot(model_weights(model), about, {
            "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "balance": balance.state_dict(),
            "epoch": epoch, "best": best, "keep": keep, "data": digests, "seconds": time.perf_counter() - started,
        }, improved)  # fmt: skip
        run.epoch(numbers, last=epoch + 1 == args.epochs)
        if run.writes:
            print(epoch_line(numbers, names, args.epochs, run.history), flush=True)

    # summary
    if "test" not in logits:  # resumed after the last epoch
        logits["test"] = predict(model, data.clips["test"], fed, size, "test", run.check)
    if run.writes:
        from utils.summary import finish  # late: matplotlib is needed only here

        about = {"total_seconds": time.perf_counter() - started, "missing": len(data.folder.missing)}
        labels = data.clips["test"].labels
        finish(run, args, names, data.classes, best, run.history[-1], logits["test"], labels, about)


if __name__ == "__main__":
    run_main(main)
