"""Available memory and CPU cores, with container and job limits, and formatting of byte counts."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

ASSUMED = 4 * 2**30  # bytes of free memory where the system does not say
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
LIMIT_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))  # version 2, 1


def usable_cores() -> int:
    """The processor cores that this process may use: its affinity where the system has one, else all; at most as many
    as the CPU quota of its container or job is worth, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *map(math.ceil, _quotas())]))


def _quotas() -> Iterator[float]:
    """Cores' worth of CPU time that each control group of this process may take."""
    for folder in _control_groups("cpu"):
        for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):  # version 2, 1
            try:
                quota, period = (int(word) for name in files for word in (folder / name).read_text().split())
            except (OSError, ValueError):  # no such version, or no limit ("max")
                continue
            if quota > 0 and period > 0:  # version 1 has -1 for no limit
                yield quota / period


def load_average() -> float | None:
    """Processes that ran or waited for a core, averaged over the last minute; None where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows has none
        return None


def available_ram() -> int:
    """Bytes of host memory that can be taken without swapping: the machine's, or what a container leaves of it."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, macOS not these names
        free = ASSUMED
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, ValueError, StopIteration):  # not Linux
        pass
    return max(0, min([free, *_left_in_containers()]))


def _left_in_containers() -> Iterator[int]:
    """Free memory of each control group of this process. Cached files count as free: the kernel drops them."""
    for folder in _control_groups("memory"):
        for limit, used in LIMIT_FILES:
            try:
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                pairs = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
                counts = {name: int(value) for name, value in pairs}
            except (OSError, ValueError):  # no such version, or no limit ("max")
                continue
            prefix = "total_" if "total_inactive_file" in counts else ""  # version 1: the groups below it included
            yield left + sum(counts.get(f"{prefix}{kind}_file", 0) for kind in ("inactive", "active"))


def _control_groups(controller: str) -> Iterator[Path]:
    """Folders of this process's control group and those above it, for "memory" or "cpu", in either version of the
    interface."""
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controller if controllers else CGROUPS
        group = root / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder == root or root in folder.parents)


def gigabytes(count: float) -> str:
    """`count` bytes in two digits: 0.54 GB, 13 GB."""
    return f"{count / 1e9:.2g} GB" if count < 1e10 else f"{count / 1e9:.0f} GB"
