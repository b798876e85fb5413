"""UMT: each encoder also learns the features of a teacher that was trained on its modality alone.
Du et al., ICML 2023.

loss += lambda * sum_m mean((z_m - z_m^T)^2), a mean over clips and dimensions, over the modalities that a clip is fed.
The teachers z^T are encoders trained alone with CE(h_m), frozen, in evaluation mode, and see the same views.
They start from the run's own initial weights and train for as many epochs as the run, at its learning rates. That costs
about as much as another joint training, before the first epoch (in its `seconds_score`); finished runs of the same
encoders (`--method audio`) can be given instead.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from balance.gblend import OneLoss
from balance.method import Balance, Context, Method, Option, Step
from models import MultimodalClassifier, Output
from models.checkpoint import official_name
from models.rates import make_optimizer
from remix import batches_of
from utils import distributed
from utils.checkpoint import load_checkpoint
from utils.cli import number, path_name
from utils.errors import UserError
from utils.seeding import epoch_generator


class UMT(Method):
    name = "umt"
    options = (
        Option("lambda", number(float, 0), 10.0, "weight of the distance to the teachers"),
        Option("epochs", number(int, 1), None, "epochs that the teachers train (default: --epochs)"),
        Option("teachers", path_name, None, "finished unimodal runs, as runs/demo_{}_seed0 (default: train them)"),
    )
    acts_in = ("joint", "homogeneous", "mixed")
    needs_heads = True

    def __init__(self, context: Context):
        super().__init__(context)
        self.teacher: MultimodalClassifier | None = None  # its encoders are the teachers

    @classmethod
    def refuse(cls, args, opt) -> str | None:
        if opt.teachers and opt.epochs:
            return "epochs applies only if teachers are trained here; leave epochs or teachers out"
        if opt.teachers and not args.resume:
            if "{}" not in opt.teachers:
                return f"teachers={opt.teachers}: put {{}} in place of the modality's name: runs/demo_{{}}_seed0"
            for name in args.joint_weights:
                if not (path := teacher_path(opt.teachers, name)).is_file():
                    return f"teachers={opt.teachers}: {path} does not exist; train it with --method {name}"
        return None

    def start_epoch(self, epoch: int) -> None:
        if self.teacher is None and getattr(self.opt, "lambda") > 0:
            pattern = self.opt.teachers
            found = {name: self.load(name, pattern) if pattern else self.train(name) for name in self.names}
            self.keep(found)

    def keep(self, encoders: dict[str, nn.Module]) -> None:
        self.teacher = copy.deepcopy(self.model)
        self.teacher.encoders = nn.ModuleDict(encoders)
        self.teacher.eval().requires_grad_(False)

    def load(self, name: str, pattern: str) -> nn.Module:
        """The encoder of a finished run. Raises `UserError` if it does not fit."""
        path = teacher_path(pattern, name)
        start = official_name(f"encoders.{name}.")
        weights = load_checkpoint(path)["model"]
        encoder = copy.deepcopy(self.model.encoders[name])
        try:
            encoder.load_state_dict({k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)})
        except RuntimeError:
            raise UserError(f"--balance umt: {path}: its {name} encoder is not that of this run; use teachers trained "
                            "with the same --encoder") from None  # fmt: skip
        return encoder

    def train(self, name: str) -> nn.Module:
        """The encoder of a copy of the network, trained on one modality with its unimodal loss only."""
        run, args = self.context, self.context.args
        epochs = self.opt.epochs or args.epochs
        network, clips = copy.deepcopy(self.model), run.clips["train"]
        optimizer = make_optimizer(network, args)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.lr_decay_step, args.lr_decay_ratio)
        distributed.parallel(network, network.encoders.values())
        alone = Balance([OneLoss(run, name)])
        for epoch in range(epochs):
            plan = batches_of(len(clips), args.batch_size, (name,), epoch_generator(args.random_seed, epoch, "plan"))
            run.train_epoch(network, clips, plan, optimizer, epoch, args, alone, run.check)
            scheduler.step()
        distributed.same_buffers(network)
        self.reestimate(network, (name,), epochs - 1)
        return network.encoders[name]

    def losses(self, terms: dict[str, Tensor], output: Output, step: Step) -> dict[str, Tensor]:
        strength = getattr(self.opt, "lambda")
        if strength == 0:
            return terms
        assert self.teacher is not None  # made by start_epoch
        added = output.joint.new_zeros(())
        for name in step.fed:
            with torch.no_grad():
                target = self.teacher.encode(name, step.inputs[name])
            distances = (output.features[name] - target).square().mean(1)  # (B,)
            given = step.given(name, self.names)
            self.note(f"distance_{name}", step.sum(distances if given is None else distances * given) / step.total)
            added = added + strength * step.mean(distances, given)
        return terms | {"umt": added}

    def state_dict(self) -> dict:
        teachers = self.teacher and {name: encoder.state_dict() for name, encoder in self.teacher.encoders.items()}
        return {"teachers": teachers}

    def load_state_dict(self, state: dict) -> None:
        if state["teachers"] is None:
            return
        encoders = {name: copy.deepcopy(self.model.encoders[name]) for name in self.names}
        for name, encoder in encoders.items():
            encoder.load_state_dict(state["teachers"][name])
        self.keep(encoders)


def teacher_path(pattern: str, name: str) -> Path:
    """The checkpoint that the pattern names for a modality: a file, or `last.pth` in a run's folder."""
    path = Path(pattern.replace("{}", name))
    return path / "last.pth" if path.is_dir() else path
