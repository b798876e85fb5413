"""Precision and compilation: faster computation of the same network."""

import os
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.memory import usable_cores

PRECISIONS = ("fp32", "tf32", "bf16", "official")


def gpu_count(device: str) -> int:
    """The number of CUDA GPUs for a value of `--device`.

    Raises `UserError` where PyTorch counts GPUs and cannot use them: it asks the driver for their number without
    starting CUDA, which may be too new for that driver.
    """
    count = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if count:
        try:
            torch.cuda.init()
        except Exception as error:  # RuntimeError, AssertionError, DeferredCudaCallError, by the cause
            why = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0].rstrip(".")
            raise UserError(f"--device {device}: PyTorch {torch.__version__} cannot use the GPU ({why}); update the "
                            "driver, install a PyTorch build for it, or use --device cpu") from None  # fmt: skip
    return count


def chosen_gpus(gpu_ids: str | None, available: int) -> list[int]:
    """The GPUs that `--gpu_ids` names; without the flag the first ones, one for each process of torchrun."""
    if gpu_ids is not None:
        return [int(part) for part in gpu_ids.split(",")]
    return list(range(min(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), available)))


def has_bfloat16(gpu: int | torch.device) -> bool:
    """Whether a CUDA GPU computes in bfloat16: Ampere and later (PyTorch would emulate it on older ones)."""
    return torch.cuda.get_device_capability(gpu)[0] >= 8


def computed_in(precision: str) -> torch.dtype:
    """The type in which encoders of this `--precision` compute, and that images for them have on a GPU."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def default_precision(device: str, gpu_ids: str | None = None) -> str:
    """For the values of `--device` and `--gpu_ids`: bf16 where all these GPUs have it, else tf32; fp32 on a CPU."""
    if not (count := gpu_count(device)):
        return "fp32"
    return "bf16" if all(has_bfloat16(gpu) for gpu in chosen_gpus(gpu_ids, count) if gpu < count) else "tf32"


def limit_threads() -> None:
    """Use no more CPU threads than this process may use cores: PyTorch's own default does not know of CPU quotas."""
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > (cores := usable_cores()):
        torch.set_num_threads(cores)


def device_name(device: torch.device) -> str:
    """The name of the GPU; "MPS" for Apple's, "CPU" for none."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def in_double(values: Tensor) -> Tensor:
    """`values` in float64, on the host where the device does not compute in it (MPS)."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def synchronise() -> None:
    """Wait until the device is done with everything that it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def set_precision(precision: str, device: torch.device) -> None:
    """Whether float32 products on the GPU may round their factors to TF32 (10 bits of mantissa); the CPU never does.

    fp32 forbids it, tf32 allows it, official allows it in convolutions alone: PyTorch's defaults, which the official
    code keeps. That code also asks cuDNN for deterministic algorithms. bf16 is the network's own affair: with it, what
    stays in float32 is computed as by tf32. Raises `UserError` where the GPU has no bfloat16.

    These are the only TF32 settings of the project, and both belong to PyTorch's older interface, which keeps the newer
    one (`fp32_precision`) up to date. Written through the newer one, they could no longer be read through the older,
    which `torch.backends.cudnn.flags` and torch._dynamo do (RuntimeError in torch 2.11).
    """
    if device.type != "cuda":
        return
    if precision == "bf16" and not has_bfloat16(device):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"--precision bf16: {name} does not support bfloat16; use --precision fp32")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.deterministic = precision == "official"
    torch.set_float32_matmul_precision("highest" if precision in ("fp32", "official") else "high")


def compile_in_place(modules: list[nn.Module], device: torch.device) -> None:
    """Compile `modules` where they are, so that their parameters keep their names; each when it is first called.

    Every shape gets code of its own, which is kept in ~/.cache/torchinductor unless TORCHINDUCTOR_CACHE_DIR is set:
    PyTorch's own place is below /tmp. Raises `UserError` where PyTorch cannot compile.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.expanduser("~/.cache/torchinductor"))
    try_to_compile(device)
    for module in modules:
        module.compile(dynamic=False)


def try_to_compile(device: torch.device) -> None:
    """Raises `UserError` where PyTorch cannot compile here, found out by compiling one small function.

    What it takes (a C++ compiler, Python's headers, Triton on a GPU) differs between its versions.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and shutil.which(compiler.split()[0]) is None:
        raise UserError(f"--compile: no C++ compiler ({compiler}) found; install one (Debian, Ubuntu: sudo apt install "
                        "g++), set CXX, or leave the flag out")  # fmt: skip
    try:
        torch.compile(lambda x: x.cos() + 1)(torch.ones(64, device=device))
    except Exception as error:  # a compiler fails in more ways than can be listed; all of them mean the same here
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(f"--compile: PyTorch cannot compile here ({lines[0].strip()}); leave the flag out") from None


def compiled(full: bool) -> AbstractContextManager:
    """Use compiled modules only for full batches.

    The last batch of a modality has another size in every epoch, for which recompiling would cost more than it
    saves, and code for any size would be slower for all.
    """
    if full or "torch._dynamo" not in sys.modules:  # importing it takes seconds; without it nothing was ever compiled
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
