"""What people read while a run goes on and when it ends. Plain numbers in, lines out."""

from tqdm import tqdm

HEADS = {"multimodal": "test_acc", "audio": "test_acc_audio", "video": "test_acc_video"}


def progress(name: str, clips: int, shown: bool) -> tqdm:
    """A bar over `clips` with a rate, gone when done."""
    return tqdm(total=clips, desc=name, unit="clip", leave=False, disable=not shown, mininterval=0.5)


def epoch_line(numbers: dict, epochs: int) -> str:
    """One epoch's numbers in a line."""
    shown = {name: numbers.get(key) for name, key in (HEADS | {"val": "val_acc"}).items()}
    accuracies = "  ".join(f"{name} {value:.3f}" for name, value in shown.items() if value is not None)
    kept = f"  kept audio/video {numbers['n_audio']}/{numbers['n_video']}" if numbers["n_audio"] is not None else ""
    head = f"epoch {numbers['epoch']:>3}/{epochs} {numbers['phase']:<6} loss {numbers['train_loss']:.4f}"
    return f"{head}  {accuracies}{kept}  {numbers['clips_per_second']:.0f} clips/s"


def result_table(rows: dict[str, dict]) -> str:
    """A line per protocol: test accuracy of the three heads and macro F1, `-` for a head that was not trained."""
    width = max(map(len, rows)) + 2
    lines = [f"{'':{width}}" + "".join(f"{name:>12}" for name in (*HEADS, "macro F1"))]
    for name, numbers in rows.items():
        values = [numbers[key] for key in (*HEADS.values(), "test_f1_macro")]
        cells = (f"{value:>12.4f}" if value is not None else f"{'-':>12}" for value in values)
        lines.append(f"{name:{width}}" + "".join(cells))
    return "\n".join(lines)
