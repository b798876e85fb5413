"""What a container leaves of the machine's memory and cores: made-up files of both versions of control groups."""

import os

import pytest

from utils import acceleration, memory
from utils.memory import available_ram, gigabytes, usable_cores

GB = 10**9


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Writes files of a machine with 200 GB free; (path below proc or cgroup, text)."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")

    def write(path: str, text: object) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{text}\n")

    write("proc/meminfo", f"MemTotal: 1 kB\nMemAvailable: {200 * GB // 1024} kB")
    return write


def group(write, folder: str, version: int, limit: object, used: int, cached: int = 0, below: int = 0) -> None:
    names = {2: ("memory.max", "memory.current"), 1: ("memory.limit_in_bytes", "memory.usage_in_bytes")}[version]
    for name, value in zip(names, (limit, used), strict=True):
        write(f"cgroup/{folder}/{name}", value)
    stat = f"anon 1\ninactive_file {cached // 4}\nactive_file {cached - cached // 4}"
    if version == 1:
        stat += f"\ntotal_inactive_file {cached + below}\ntotal_active_file 0"
    write(f"cgroup/{folder}/memory.stat", stat)


def test_without_a_container_it_is_the_machines(host):
    assert available_ram() == 200 * GB // 1024 * 1024
    host("proc/self/cgroup", "0::/")
    assert available_ram() == 200 * GB // 1024 * 1024
    group(host, ".", 2, "max", 16 * GB)
    assert available_ram() == 200 * GB // 1024 * 1024


def test_a_limit_counts_and_cached_files_are_free(host):
    host("proc/self/cgroup", "0::/")
    group(host, ".", 2, 32 * GB, 16 * GB, cached=15 * GB)
    assert available_ram() == 31 * GB


def test_the_tightest_of_nested_groups_counts(host):
    host("proc/self/cgroup", "0::/slurm/job_7/step_0")
    group(host, "slurm/job_7/step_0", 2, "max", 1 * GB)
    group(host, "slurm/job_7", 2, 24 * GB, 4 * GB)
    group(host, "slurm", 2, 150 * GB, 10 * GB)
    assert available_ram() == 20 * GB


def test_version_1(host):
    host("proc/self/cgroup", "12:cpu,cpuacct:/user\n5:memory:/user/job\n1:name=systemd:/")
    group(host, "memory/user/job", 1, 16 * GB, 10 * GB, cached=GB, below=2 * GB)
    group(host, "memory", 1, 2**63 - 4096, 40 * GB)
    assert available_ram() == 9 * GB
    host("proc/self/cgroup", "5:memory:/not/to/be/seen/from/inside")
    group(host, "memory", 1, 12 * GB, 10 * GB)
    assert available_ram() == 2 * GB
    group(host, "memory", 1, 12 * GB, 13 * GB)
    assert available_ram() == 0


def test_a_quota_of_cpu_time_is_worth_so_many_cores(host, monkeypatch):
    """The tightest of nested groups, rounded up; none is no limit."""
    monkeypatch.setattr(memory.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    host("proc/self/cgroup", "0::/slurm/job_7")
    assert usable_cores() == 64
    host("cgroup/slurm/job_7/cpu.max", "max 100000")
    assert usable_cores() == 64
    host("cgroup/slurm/job_7/cpu.max", "1600000 100000")
    host("cgroup/slurm/cpu.max", "250000 100000")
    assert usable_cores() == 3
    host("proc/self/cgroup", "4:cpu,cpuacct:/job\n0::/")
    assert usable_cores() == 64
    for quota, cores in ((-1, 64), (150_000, 2), (5_000, 1), (12_800_000, 64)):
        host("cgroup/cpu/job/cpu.cfs_quota_us", quota)
        host("cgroup/cpu/job/cpu.cfs_period_us", 100_000)
        assert usable_cores() == cores
    host("cgroup/cpu/job/cpu.cfs_quota_us", 150_000)
    asked = []
    monkeypatch.setattr(acceleration.torch, "set_num_threads", asked.append)
    monkeypatch.setattr(acceleration.torch, "get_num_threads", lambda: 64)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    acceleration.limit_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # the user's
    acceleration.limit_threads()
    assert asked == [2]


def test_on_this_machine():
    assert 1e8 < available_ram() < 1e14
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


def test_gigabytes():
    assert [gigabytes(n) for n in (5.4e8, 9.94e9, 1.3e10, 1e6)] == ["0.54 GB", "9.9 GB", "13 GB", "0.001 GB"]
