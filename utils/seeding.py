"""Random numbers that depend only on (seed, epoch, purpose), so that an epoch can be repeated exactly."""

import random
import zlib

import numpy as np
import torch

STREAMS = ("plan", "views", "score", "balance", "batchnorm")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (all devices): the network's initial weights come from here."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def epoch_generator(seed: int, epoch: int, stream: str) -> torch.Generator:
    """A CPU generator for one purpose (`STREAMS`) in one epoch, independent of every other and of the run's history.

    So a resumed run draws what the uninterrupted one would have drawn, without any generator's state being saved.
    """
    state = np.random.SeedSequence([seed, epoch, STREAMS.index(stream)]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


def step_generator(
    seed: int, epoch: int, step: int, stream: str, purpose: str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator on `device` for one step of an epoch and one `purpose` in a stream: nothing to save for a resume."""
    words = [seed, epoch, STREAMS.index(stream), step, zlib.crc32(purpose.encode())]
    state = np.random.SeedSequence(words).generate_state(2, np.uint32)
    return torch.Generator(device).manual_seed(int(state[0]) << 32 | int(state[1]))


def rng_state() -> dict:
    """The state of every global generator, in types that `torch.load(weights_only=True)` reads."""
    state = np.random.get_state()
    assert isinstance(state, tuple)  # a dict only with legacy=False
    name, keys, *rest = state
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *map(float, rest)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict) -> None:
    """Put back what `rng_state` gave; CUDA's only where the number of devices is the same."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), int(position), int(has_gauss), cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
