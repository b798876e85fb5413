"""Tiny training folders for tests, made in a second, and runs on them."""

from pathlib import Path

import cv2
import numpy as np

# A run on such a folder: seconds on one core.
TINY = ["--dataset", "folder", "--model", "resnet18_thin", "--image_size", "32", "--batch_size", "8", "--cache", "ram"]


def make_folder(
    root: Path,
    train: int = 24,
    test: int = 12,
    classes: tuple[str, ...] = ("a", "b", "c"),
    frames: int = 3,
    size: tuple[int, int] = (40, 48),
    audio_shape: tuple[int, int] = (33, 20),
    seed: int = 0,
) -> Path:
    """A sound training folder whose pictures and spectrograms tell the class, with noise. `size` is height, width."""
    rng = np.random.default_rng(seed)
    for name, count in (("train", train), ("test", test)):
        rows = []
        for i in range(count):
            label, clip = i % len(classes), f"{name}_{i:04d}"
            rows.append(f"{clip},{classes[label]}\n")
            folder = root / "visual" / clip
            folder.mkdir(parents=True)
            for k in range(frames):
                image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
                image[:, :, label % 3] //= 3
                cv2.imwrite(str(folder / f"frame_{k + 1:05d}.jpg"), image)
            (root / "audio").mkdir(exist_ok=True)
            sound = rng.normal(size=audio_shape).astype(np.float32)
            sound[label :: len(classes)] += 1.0
            np.save(root / "audio" / f"{clip}.npy", sound)
        (root / f"{name}.csv").write_text("".join(rows))
    (root / "stat.csv").write_text("".join(f"{label}\n" for label in classes))
    return root


def run(data: Path, runs: Path, name: str, *flags: str) -> Path:
    """Train on `data` in this process; returns the run's folder, `runs/name`."""
    import train  # late: most tests want a folder and no PyTorch

    train.main([*TINY, "--train", "--data_root", str(data), "--log_path", str(runs), "--run_name", name, *flags])
    return runs / name
