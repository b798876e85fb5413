"""Data Remixing in a plain PyTorch loop, on any model that returns logits per modality.

    pip install . && python examples/own_loop.py     # no data needed; seconds on a CPU

The two modalities are class means plus noise. "fast" has little noise in training and much at test; "slow" has the
same noise in both, so it is learned later but is more accurate at test.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from remix import RemixBatchSampler

EPOCHS, WARMUP, CLASSES, NAMES = 20, 5, 5, ("fast", "slow")


class Classifier(nn.Module):
    """One encoder and one head per modality, and a joint head on both features; a masked feature is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({name: nn.Sequential(nn.Linear(32, 64), nn.ReLU()) for name in NAMES})
        self.heads = nn.ModuleDict({name: nn.Linear(64, CLASSES) for name in NAMES})
        self.joint = nn.Linear(128, CLASSES)

    def forward(self, inputs: dict[str, torch.Tensor], fed: tuple[str, ...]) -> dict[str, torch.Tensor]:
        some = next(iter(inputs.values()))
        features = {m: self.encoders[m](inputs[m]) if m in fed else some.new_zeros(len(some), 64) for m in NAMES}
        logits = {m: self.heads[m](features[m]) for m in fed}
        return logits | {"joint": self.joint(torch.cat(list(features.values()), dim=1))}


def make_clips(n: int, noise: dict[str, float], means: dict[str, torch.Tensor], seed: int) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=draw)
    inputs = [means[m][labels] + noise[m] * torch.randn(n, 32, generator=draw) for m in NAMES]
    return TensorDataset(*inputs, labels)


def main() -> float:
    torch.manual_seed(0)
    means = {m: torch.randn(CLASSES, 32) for m in NAMES}
    train = make_clips(600, {"fast": 0.5, "slow": 3.0}, means, seed=1)
    test = make_clips(600, {"fast": 5.0, "slow": 3.0}, means, seed=2)
    model, sampler = Classifier(), RemixBatchSampler(len(train), batch_size=32, names=NAMES)
    optimizer, loader = torch.optim.Adam(model.parameters(), lr=1e-3), DataLoader(train, batch_sampler=sampler)

    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)  # joint batches
        if epoch >= WARMUP:  # score every clip with the model itself, then serve each in its hardest modality
            with torch.no_grad():
                logits = model(dict(zip(NAMES, train.tensors, strict=False)), NAMES)
            sampler.remix({m: logits[m] for m in NAMES})
        for fed, (fast, slow, labels) in zip(sampler.fed, loader, strict=True):
            output = model({"fast": fast, "slow": slow}, fed)
            loss = sum(F.cross_entropy(values, labels) for values in output.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        counts = {m: sum(fed == (m,) for fed in sampler.fed) for m in NAMES} if epoch >= WARMUP else "joint"
        print(f"epoch {epoch + 1:2}/{EPOCHS}  batches {counts}")

    with torch.no_grad():
        predicted = model(dict(zip(NAMES, test.tensors, strict=False)), NAMES)["joint"].argmax(1)
    accuracy = (predicted == test.tensors[-1]).double().mean().item()
    print(f"test accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
