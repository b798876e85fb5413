"""Data Remixing in PyTorch Lightning, around any model that returns logits per modality.

    pip install ".[examples]" && python examples/lightning_module.py     # no data needed; under a minute on a CPU

The model and the data are those of own_loop.py. Two flags of the Trainer matter: `reload_dataloaders_every_n_epochs=1`
requests a new plan before each epoch, and `use_distributed_sampler=False` keeps the planned batches unchanged.
"""

import sys

import lightning
import torch
from own_loop import CLASSES, EPOCHS, NAMES, WARMUP, Classifier, make_clips
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from remix import RemixBatchSampler


class RemixModule(lightning.LightningModule):
    """`model(inputs, fed)` returns logits (B, C) of "joint" and of each fed modality; `clips`: inputs and label."""

    def __init__(self, model: nn.Module, clips: TensorDataset, batch_size: int = 32, warmup: int = WARMUP) -> None:
        super().__init__()
        self.model, self.clips, self.batch_size, self.warmup = model, clips, batch_size, warmup

    def train_dataloader(self) -> DataLoader:
        """Joint batches during warm-up, then batches of one modality: each clip is fed its hardest modality."""
        rank, processes = self.trainer.global_rank, self.trainer.world_size
        self.sampler = RemixBatchSampler(len(self.clips), self.batch_size, NAMES, rank=rank, world_size=processes)
        self.sampler.set_epoch(self.current_epoch)
        if self.current_epoch >= self.warmup:
            self.sampler.remix(self.predict_train())
        return DataLoader(self.clips, batch_sampler=self.sampler)

    @torch.no_grad()
    def predict_train(self) -> dict[str, Tensor]:
        """Unimodal logits (N, C) of all training clips in their order, in eval mode."""
        self.model.eval()
        batches = [[part.to(self.device) for part in batch] for batch in DataLoader(self.clips, batch_size=256)]
        found = [self.model(dict(zip(NAMES, batch, strict=False)), NAMES) for batch in batches]
        self.model.train()
        return {name: torch.cat([logits[name] for logits in found]) for name in NAMES}

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        *inputs, labels = batch
        output = self.model(dict(zip(NAMES, inputs, strict=True)), self.sampler.fed[index])
        return torch.stack([F.cross_entropy(logits, labels) for logits in output.values()]).sum()

    def on_train_epoch_end(self) -> None:
        for name in NAMES:
            count = sum(len(batch.clips) for batch in self.sampler.batches if name in batch.fed)
            self.log(f"clips/{name}", float(count))

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        *inputs, labels = batch
        output = self.model(dict(zip(NAMES, inputs, strict=True)), NAMES)
        for head, logits in output.items():
            self.log(f"accuracy/{head}", (logits.argmax(1) == labels).float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main() -> dict[str, float]:
    lightning.seed_everything(0)
    means = {name: torch.randn(CLASSES, 32) for name in NAMES}
    train = make_clips(600, {"fast": 0.5, "slow": 3.0}, means, seed=1)
    test = make_clips(600, {"fast": 5.0, "slow": 3.0}, means, seed=2)
    trainer = lightning.Trainer(max_epochs=EPOCHS, accelerator="auto", devices=1, logger=False,
                                enable_checkpointing=False, enable_progress_bar=sys.stderr.isatty(),
                                reload_dataloaders_every_n_epochs=1, use_distributed_sampler=False)  # fmt: skip
    trainer.fit(RemixModule(Classifier(), train), val_dataloaders=DataLoader(test, batch_size=256))
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    print("  ".join(f"{name} {value:.3f}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    main()
