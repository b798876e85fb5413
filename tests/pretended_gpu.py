"""A pretended CUDA device for tests: CPU tensors that say `cuda:0`, under CUDA's rules.

Which device a tensor is on is noted on its storage, so views and gradients share it, and kernels and autograd are the
CPU's. A run on it therefore gives the values of a run on the CPU, bit for bit, where the code does the same. Inside the
block torch.cuda reports one GPU, and

    with PretendedGPU() as gpu:
        train.main([...])

- an operation on tensors of both devices raises; CUDA allows a host tensor of no dimensions, and so does this
- a generator draws for its own device only
- a tensor on the device has no NumPy array
- `gpu.waits` lists the operations at which the host waits for the device, with the line that asked for each: what
  `torch.cuda.set_sync_debug_mode` reports, and copies from memory that is not pinned
- `gpu.kernels` counts the operations that launch a kernel, by name; an operation can launch more than one
- `gpu.layouts` lists the convolutions whose input is not channels-last
- an operation raises if it reads or writes memory that another stream, or a copy, may still be using: what is not
  ordered by a wait may happen in any order. `gpu.races` lists memory that was freed, and allocated again, while
  another stream used it
- `gpu.uploads` notes of each copy from pinned memory whether it waits for kernels

It does not simulate precision, memory, NCCL, torch.compile or CUDA graphs.
"""

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.counting import computes, name_of

CUDA, HOST = torch.device("cuda", 0), torch.device("cpu")
ROOT = f"{Path(__file__).resolve().parents[1]}/"
PLAIN = torch._C.TensorBase  # its attributes are those of the CPU tensor

# The host reads a value; the output's size depends on values.
READS = {"_local_scalar_dense", "equal", "is_nonzero"}
SIZED = {"nonzero", "argwhere", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive",
         "unique_dim_consecutive", "bincount"}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


class Wait(NamedTuple):
    """A wait of the host: why, in which operation, FILE:LINE of the project that asked for it."""

    why: str
    operation: str
    where: str


def tensors_of(values: Iterable) -> Iterator[Tensor]:
    """Those in nested lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_of(value)


def on_gpu(tensor: Tensor) -> bool:
    return getattr(tensor.untyped_storage(), "on_gpu", False)


def is_pinned(tensor: Tensor) -> bool:
    return getattr(tensor.untyped_storage(), "pinned", False)


def uses_of(tensor: Tensor) -> "Uses | None":
    return getattr(tensor.untyped_storage(), "uses", None)


def track(tensor: Tensor, uses: "Uses") -> "Uses":
    tensor.untyped_storage().uses = uses  # pyright: ignore[reportAttributeAccessIssue]
    return uses


def place(tensor: Tensor, gpu: bool) -> Tensor:
    tensor.untyped_storage().on_gpu = gpu  # pyright: ignore[reportAttributeAccessIssue]
    return tensor


def pin(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().pinned = True  # pyright: ignore[reportAttributeAccessIssue]
    return tensor


class Stream:
    """Work in the order it is given in. `seen`: of each stream, how much work is done before what comes next here."""

    def __init__(self) -> None:
        self.seen: Counter[Stream] = Counter()

    def next(self) -> int:
        self.seen[self] += 1
        return self.seen[self]

    def wait_stream(self, other: Any) -> None:
        self.seen |= other.seen

    wait_event = wait_stream


class Uses:
    """When each stream has last read and written a piece of memory. Kept for memory that not one stream alone uses.

    Once it is freed, `owner`, the stream it was allocated on, can be given it again. `gpu` is told which streams may
    still use it then; None for memory of the host, whose allocator knows.
    """

    def __init__(self, owner: Stream, gpu: "PretendedGPU | None" = None):
        self.owner, self.gpu = owner, gpu
        self.read: Counter[Stream] = Counter()
        self.written: Counter[Stream] = Counter()
        self.recorded = {owner}

    def by(self, stream: Stream, writes: bool, name: str) -> None:
        before = self.read | self.written if writes else self.written
        if not before <= stream.seen:
            raise RuntimeError(f"{name}: {'writes' if writes else 'reads'} memory that another stream may still use")
        (self.written if writes else self.read)[stream] = stream.next()

    def __del__(self) -> None:
        # The allocator waits for what recorded streams were given before now, and for what those waited for.
        left = Counter({stream: when for stream, when in (self.read | self.written).items()
                        if all(own.seen[stream] < when for own in self.recorded)})  # fmt: skip
        if self.gpu is not None and left:
            self.gpu.freed.append((self.owner, left))


def written_by(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The operands that an operation writes to."""
    operands = [(i, operand) for i, operand in enumerate(func._schema.arguments)
                if operand.alias_info is not None and operand.alias_info.is_write]  # fmt: skip
    return list(tensors_of(args[i] if i < len(args) else kwargs.get(operand.name) for i, operand in operands))


class PretendedGPU(TorchDispatchMode):
    """One GPU with `memory` bytes free."""

    def __init__(self, memory: float = 80e9):
        super().__init__()
        self.memory = int(memory)
        self.waits: list[Wait] = []
        self.kernels: Counter[str] = Counter()
        self.layouts: list[tuple[str, tuple[int, ...]]] = []
        self.main, self.host = Stream(), Stream()  # the default stream; what the host does
        self.stream = self.main
        self.streams = [self.main]
        self.freed: list[tuple[Stream, Counter[Stream]]] = []
        self.races: list[str] = []
        self.uploads: list[bool] = []
        self.generators: set[int] = set()  # the device's, by the address of the C++ object
        self.patches = ExitStack()
        self.depth = 0

    def wait(self, why: str, operation: str, *on: Any) -> None:
        """The host waits for `on`, streams or events (none: the current stream)."""
        for done in on or (self.stream,):
            self.host.wait_stream(done)
        if threading.current_thread() is threading.main_thread():  # a thread that writes checkpoints may wait
            self.waits.append(Wait(why, operation, caller()))

    # ---------------------------------------------------------------------------------------------------- streams

    def placed(self, tensor: Tensor) -> Tensor:
        """A new tensor of the device, allocated and written on the current stream."""
        place(tensor, True)
        for owner, left in [own for own in self.freed if own[0] is self.stream]:
            self.freed.remove((owner, left))
            if not left <= owner.seen:
                self.races.append("memory is used again while another stream still uses it (record_stream)")
        if self.stream is not self.main:
            track(tensor, Uses(self.stream, self)).by(self.stream, True, "allocation")
        return tensor

    def order(self, func: Any, args: tuple, kwargs: dict, tensors: list[Tensor], stream: Stream) -> None:
        """Check and note what an operation on `stream` (the host's, for one of the CPU) reads and writes."""
        stream.next()
        if stream not in (self.main, self.host):
            for x in tensors:
                if on_gpu(x) and uses_of(x) is None:
                    track(x, Uses(self.main, self)).written[self.main] = self.main.seen[self.main]
        if any(uses_of(x) for x in tensors):
            written = {x.untyped_storage()._cdata for x in written_by(func, args, kwargs)}
            for x in tensors:
                if uses := uses_of(x):
                    uses.by(stream, x.untyped_storage()._cdata in written, func._schema.name)

    def crosses(self, source: Tensor, into: Tensor) -> None:
        """A copy between the device and pinned memory, which the host does not wait for."""
        if on_gpu(into):
            self.uploads.append(self.stream.seen[self.main] > self.host.seen[self.main])
        self.stream.wait_stream(self.host)  # the device begins it after the host has asked for it
        pinned = source if on_gpu(into) else into
        (uses_of(pinned) or track(pinned, Uses(self.host))).by(self.stream, pinned is into, "copy")

    # ------------------------------------------------------------------------------------------------- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if torch.is_inference_mode_enabled() and func._can_decompose():
            with self:  # outside inference mode PyTorch decomposes before it gets here
                return func.decompose(*args, **(kwargs or {}))
        kwargs, name = dict(kwargs or {}), name_of(func)
        tensors = [*tensors_of(args), *tensors_of(kwargs.values())]
        device = kwargs.get("device")
        made_there = device is not None and torch.device(device).type == "cuda"
        backward = torch._C._current_graph_task_id() != -1
        if made_there:
            kwargs["device"] = HOST
        elif not tensors:  # autograd makes zeros on the device of its tensors, here the CPU
            made_there = backward
        pinned = kwargs.get("pin_memory") and not made_there
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        made_here = device is not None and not made_there and not backward
        made_here = made_here and name.startswith(("new_", "empty_like", "zeros_like"))
        there = made_there or (any(map(on_gpu, tensors)) and not made_here)
        self.check_generator(name, kwargs.get("generator"), there)
        if computes(func):
            self.order(func, args, kwargs, tensors, self.stream if there else self.host)
        if not there:
            out = func(*args, **kwargs)
            return pin(out) if pinned else out
        self.check(func, name, args, kwargs, tensors)
        out = func(*args, **kwargs)
        known = {tensor.untyped_storage()._cdata for tensor in tensors}
        for tensor in tensors_of((out,)):
            if tensor.untyped_storage()._cdata not in known:
                self.placed(tensor)
        return out

    def check_generator(self, name: str, generator: Any, there: bool) -> None:
        if generator is not None and (generator._cdata in self.generators) != there:
            expected, found = ("cuda", "cpu") if there else ("cpu", "cuda")
            raise RuntimeError(f"{name}: Expected a '{expected}' device type for generator but found '{found}'")

    def check(self, func: Any, name: str, args: tuple, kwargs: dict, tensors: list[Tensor]) -> None:
        """An operation that involves the device."""
        if computes(func):
            self.kernels[name] += 1
        if name in READS:
            self.wait("reads a value", name)
        if name in SIZED or (func._schema.overload_name == "Tensor" and name == "repeat_interleave"
                             and kwargs.get("output_size") is None):  # fmt: skip
            self.wait("size depends on values", name)
        if name == "copy_":
            self.check_copy(args[0], args[1], bool(args[2] if len(args) > 2 else kwargs.get("non_blocking")))
        elif name in INDEXING:
            self.check_indexing(name, args)
        elif name != "set_":
            alone = name in ("cat", "stack")  # these take no host tensor at all
            host = [tuple(x.shape) for x in tensors if not on_gpu(x) and (x.dim() or alone)]
            if host:
                raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found at least two "
                                   f"devices, cuda:0 and cpu! (of the host: {host})")  # fmt: skip
        images = name == "convolution" and args[0].dim() == 4 and args[0].shape[1] > 4  # the first layer's have fewer
        if images and not args[0].is_contiguous(memory_format=torch.channels_last):
            self.layouts.append((caller(), tuple(args[0].shape)))

    def check_copy(self, into: Tensor, source: Tensor, non_blocking: bool) -> None:
        if on_gpu(into) == on_gpu(source):
            return
        host = source if on_gpu(into) else into
        if not is_pinned(host):
            self.wait("copies memory that is not pinned", "copy_")
        elif not non_blocking:
            self.wait("copies without non_blocking", "copy_")
        else:
            self.crosses(source, into)

    def check_indexing(self, name: str, args: tuple) -> None:
        array, indices = args[0], [index for index in args[1] if index is not None]
        if not on_gpu(array):
            raise RuntimeError(f"{name}: indices should be on the same device as the indexed tensor (cpu)")
        for index in indices:
            if not on_gpu(index):
                self.wait("copies an index of the host", name)
            elif index.dtype in (torch.bool, torch.uint8):
                self.wait("size depends on values", name)
        if len(args) > 2 and not on_gpu(args[2]) and args[2].dim():
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")

    # ------------------------------------------------------------------------------- tensors as Python sees them

    def to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype, non_blocking, layout = parse_to(*args, **kwargs)
        if device is not None and device.type not in ("cpu", "cuda"):
            return PLAIN.to(tensor, *args, **kwargs)
        crosses = device is not None and (device.type == "cuda") != on_gpu(tensor)
        layout = torch.preserve_format if layout is None else layout
        copy = bool(crosses or kwargs.get("copy"))
        out = PLAIN.to(tensor, dtype=dtype or tensor.dtype, copy=copy, memory_format=layout)
        if crosses:
            out = self.placed(out) if not on_gpu(tensor) else place(out, False)
            if uses := uses_of(tensor):
                uses.by(self.stream, False, "to")
            # From the device `non_blocking` copies to pinned memory, which PyTorch allocates.
            if not non_blocking:
                self.wait("copies without non_blocking", "to")
            elif on_gpu(out) and not is_pinned(tensor):
                self.wait("copies memory that is not pinned", "to")
            else:
                self.crosses(tensor, out)
        return out

    def made(self, function: Any, gpu: bool, *args: Any, **kwargs: Any) -> Tensor:
        """`torch.tensor` and the like: made on the host, then copied."""
        device = kwargs.pop("device", None)
        gpu = gpu if device is None else torch.device(device).type == "cuda"
        if gpu:
            self.wait("copies memory that is not pinned", function.__name__)
        return place(function(*args, **kwargs), gpu)

    def as_tensor(self, values: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        if isinstance(values, Tensor):
            return values.to(device=device or values.device, dtype=dtype or values.dtype)
        gpu = device is not None and torch.device(device).type == "cuda"
        return self.made(AS_TENSOR, True, values, dtype=dtype) if gpu else AS_TENSOR(values, dtype=dtype)

    def numpy(self, tensor: Tensor, **kwargs: Any) -> Any:
        if on_gpu(tensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        return PLAIN.numpy(tensor, **kwargs)

    def tolist(self, tensor: Tensor) -> Any:
        if on_gpu(tensor):
            self.wait("reads values", "tolist")
        return PLAIN.tolist(tensor)

    # ------------------------------------------------------------------------------------------------ the block

    def __enter__(self) -> "PretendedGPU":
        self.depth += 1
        if self.depth == 1:
            self.patch()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.depth -= 1
        try:
            super().__exit__(*error)
        finally:
            if self.depth == 0:
                self.patches.close()

    def patch(self) -> None:
        gpu, zeros = self, torch.zeros(16, dtype=torch.uint8)

        class Generator(torch.Generator):
            """The CPU's, and its numbers; `device` is the one it was asked for."""

            def __new__(cls, device: Any = "cpu") -> "Generator":
                return super().__new__(cls)

            def __init__(self, device: Any = "cpu"):
                self.own = torch.device(device)
                if self.own.type == "cuda":
                    gpu.generators.add(self._cdata)
                    weakref.finalize(self, gpu.generators.discard, self._cdata)

            device = property(lambda self: self.own)  # pyright: ignore[reportAssignmentType]

        class Event:
            """What its stream was given before `record`."""

            def __init__(self, **_: Any):
                self.seen: Counter[Stream] = Counter()

            def record(self, stream: Stream | None = None) -> None:
                self.seen = Counter((stream or gpu.stream).seen)

            def synchronize(self) -> None:
                gpu.wait("synchronizes", "torch.cuda.Event.synchronize", self)

        @contextmanager
        def on_stream(stream: Stream) -> Iterator[None]:
            before, gpu.stream = gpu.stream, stream
            try:
                yield
            finally:
                gpu.stream = before

        def make_stream(*_: Any, **__: Any) -> Stream:
            gpu.streams.append(Stream())
            return gpu.streams[-1]

        def record_stream(tensor: Tensor, stream: Stream) -> None:
            if uses := uses_of(tensor):
                uses.recorded.add(stream)

        class Autocast(torch.autocast):
            def __init__(self, device_type: str, *args: Any, **kwargs: Any):
                super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

        def deepcopy(storage: Any, memo: dict) -> Any:
            made = torch.storage._StorageBase.__deepcopy__(storage, memo)
            made.on_gpu = getattr(storage, "on_gpu", False)
            return made

        def new_tensor(self, *args, **kwargs):
            return gpu.made(TENSOR, on_gpu(self), *args, **({"dtype": self.dtype} | kwargs))

        plain = PLAIN
        tensor_attributes = {
            "device": property(lambda self: CUDA if on_gpu(self) else plain.device.__get__(self)),
            "is_cuda": property(on_gpu),
            "is_cpu": property(lambda self: not on_gpu(self)),
            "get_device": lambda self: 0 if on_gpu(self) else -1,
            "to": lambda self, *args, **kwargs: gpu.to(self, *args, **kwargs),
            "cpu": lambda self, **_: gpu.to(self, HOST),
            "cuda": lambda self, *_, non_blocking=False, **__: gpu.to(self, CUDA, non_blocking=non_blocking),
            "pin_memory": lambda self, *_: self if is_pinned(self) else pin(self.clone()),
            "is_pinned": lambda self, *_: is_pinned(self),
            "numpy": lambda self, **kwargs: gpu.numpy(self, **kwargs),
            "tolist": lambda self: gpu.tolist(self),
            "new_tensor": new_tensor,
            "record_stream": record_stream,
        }
        cuda = {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "_lazy_init": lambda: None,
            "init": lambda: None,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "get_device_name": lambda device=None: "pretended GPU",
            "get_device_capability": lambda device=None: (9, 0),
            "is_bf16_supported": lambda *_: True,
            "mem_get_info": lambda device=None: (gpu.memory, gpu.memory),
            "max_memory_allocated": lambda device=None: 0,
            "reset_peak_memory_stats": lambda device=None: None,
            "empty_cache": lambda: None,
            "synchronize": lambda device=None: gpu.wait("synchronizes", "torch.cuda.synchronize", *gpu.streams),
            "manual_seed": lambda seed: None,
            "manual_seed_all": lambda seed: None,
            "get_rng_state": lambda device="cuda": zeros,
            "set_rng_state": lambda state, device="cuda": None,
            "get_rng_state_all": lambda: [zeros],
            "set_rng_state_all": lambda states: None,
            "is_current_stream_capturing": lambda: False,
            "current_stream": lambda device=None: gpu.stream,
            "graph_pool_handle": lambda: (0, 0),
            "stream": on_stream,
            "Stream": make_stream,
            "Event": Event,
        }
        accelerator = {"is_available": lambda: True, "current_accelerator": lambda *_: torch.device("cuda"),
                       "current_device_index": lambda: 0, "set_device_index": lambda index: None}  # fmt: skip
        others = {
            "Generator": Generator,
            "autocast": Autocast,
            "tensor": lambda *args, **kwargs: gpu.made(TENSOR, False, *args, **kwargs),
            "as_tensor": self.as_tensor,
        }

        def one_hot(labels, num_classes=-1):  # PyTorch's makes a tensor on the CPU tensor's device
            classes = torch.arange(int(labels.max()) + 1 if num_classes == -1 else num_classes, device=labels.device)
            return (labels[..., None] == classes).long()

        def grouped(lists, *args):
            found = GROUPED(lists, *args)
            first = {key: next(t for t in own[0] if t is not None) for key, (own, _) in found.items()}
            return {(first[key].device, key[1]): groups for key, groups in found.items()}

        for owner, attributes in ((torch.Tensor, tensor_attributes), (torch._C._nn, {"_parse_to": parse_to}),
                                  (torch._C, {"_group_tensors_by_device_and_dtype": grouped}),
                                  (torch.nn.functional, {"one_hot": one_hot}), (torch.cuda, cuda), (torch, others),
                                  (torch.accelerator, accelerator),
                                  (torch.backends.cudnn, {"is_acceptable": lambda tensor: False}),
                                  (torch.UntypedStorage, {"__deepcopy__": deepcopy})):  # fmt: skip
            for name, value in attributes.items():
                self.patches.enter_context(mock.patch.object(owner, name, value, create=True))


TENSOR, AS_TENSOR, PARSE_TO = torch.tensor, torch.as_tensor, torch._C._nn._parse_to
GROUPED = torch._C._group_tensors_by_device_and_dtype


def parse_to(*args: Any, **kwargs: Any) -> tuple:
    """The device, dtype, non_blocking and memory format that the arguments of `to` ask for."""
    if args and isinstance(args[0], Tensor):
        return args[0].device, args[0].dtype, bool(kwargs.get("non_blocking")), None
    return PARSE_TO(*args, **kwargs)


def caller() -> str:
    """FILE:LINE of the innermost frame that is the project's."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(ROOT) and path != __file__ and "/.venv/" not in path:
            return f"{path.removeprefix(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
