"""scripts/_env.sh with a fake Python and a fake pip: which environment is used, made, finished, and what is said.

The repository's scripts and requirements files are copied to a folder with a space in its name. The fake interpreter
answers `-m venv` and `-m pip` itself and hands everything else to the real one, which sees only the fake packages.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils.threads import SPINS

REPO = Path(__file__).resolve().parents[1]
BASH = shutil.which("bash")

pytestmark = pytest.mark.skipif(BASH is None, reason="no bash on this machine")

FAKE_PYTHON = r"""#!__BASH__
here=$(cd "$(dirname "$0")" && pwd)
case "$1 ${2:-}" in
"-m venv")
    echo "venv" >>"$FAKE_LOG"
    mkdir -p "$3/bin" "$3/site" && cp "$0" "$3/bin/python"
    ;;
"-m pip")
    [ "$3" != --version ] || exit 0
    echo "pip ${*:3}" >>"$FAKE_LOG"
    if [ -n "${FAKE_PIP_SAYS:-}" ]; then echo "ERROR: $FAKE_PIP_SAYS" >&2; exit 1; fi
    until [ -z "${FAKE_PIP_GATE:-}" ] || [ -e "$FAKE_PIP_GATE" ]; do sleep 0.05; done
    while [ $# -gt 0 ]; do
        if [ "$1" = -r ]; then __REAL__ "$FAKE_INSTALL" "$here/../site" "$2"; shift; fi
        shift
    done
    ;;
"-m ruff" | "-m pyright" | "-m pytest")
    echo "$2 ${*:3}" >>"$FAKE_LOG"
    [ "$2" != ruff ] || exit "${FAKE_RUFF:-0}"
    [ "$2" != pyright ] || exit "${FAKE_PYRIGHT:-0}"
    echo "3 passed in 0.01s"
    ;;
*) PYTHONPATH="$here/../site" exec __REAL__ -S "$@" ;;
esac
"""

# argv: site folder, then requirements files or name==version
FAKE_INSTALL = r"""
import re, sys
from pathlib import Path
modules = {"scikit-learn": "sklearn", "opencv-python-headless": "cv2", "pytest-xdist": "xdist", "pyyaml": "yaml"}
for item in sys.argv[2:]:
    for line in Path(item).read_text().splitlines() if Path(item).exists() else [item]:
        line = line.split("#")[0].strip()
        if line:
            name, version = re.match(r"([\w.-]+)(?:\[\w+\])?[>=]=([\d.+\w]+)", line).groups()
            folder = Path(sys.argv[1], modules.get(name, name.replace("-", "_")))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "__init__.py").touch()
            info = Path(sys.argv[1], f"{name.replace('-', '_')}-{version}.dist-info")
            info.mkdir(exist_ok=True)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
"""


class Machine:
    """A copy of the scripts, a fake python3 on PATH, and a log of what it was asked to do."""

    def __init__(self, folder: Path):
        self.repo, self.bin, self.log = folder / "my repo", folder / "bin", folder / "log"
        self.install = folder / "install.py"
        for path in (self.repo, self.bin, folder / "site"):
            path.mkdir(parents=True)
        shutil.copytree(REPO / "scripts", self.repo / "scripts")
        for name in ("requirements.txt", "requirements-dev.txt"):
            shutil.copy(REPO / name, self.repo)
        self.install.write_text(FAKE_INSTALL)
        python = self.bin / "python3"
        python.write_text(FAKE_PYTHON.replace("__BASH__", BASH).replace("__REAL__", f"'{sys.executable}'"))
        python.chmod(0o755)
        self.log.touch()
        self.environ = os.environ | {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "FAKE_LOG": str(self.log),
            "FAKE_INSTALL": str(self.install),
        }
        self.environ.pop("ENV_FILES", None)

    def have(self, *items: str) -> None:
        """Install requirements files of the copy, or name==version, beside python3."""
        items = [str(self.repo / item) if item.endswith(".txt") else item for item in items]
        subprocess.run([sys.executable, self.install, self.bin.parent / "site", *items], check=True)

    def start(self, script: str, **environ: str) -> subprocess.Popen:
        command = [BASH, "-c", script, "bash"]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd="/", env=self.environ | environ | {"REPO": str(self.repo)}, stdout=pipe, stderr=pipe, text=True
        )

    def run(self, script: str = 'source "$REPO/scripts/_env.sh"; echo "$PYTHON"', **environ: str):
        process = self.start(script, **environ)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(script, process.returncode, out.strip(), err)

    def calls(self) -> list[str]:
        """What the fake interpreter was asked to do, first words only."""
        return [line.split()[0] for line in self.log.read_text().splitlines()]

    @property
    def own(self) -> str:
        return str(self.repo / ".venv" / "bin" / "python")


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def wait_until(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def test_the_current_python_is_used_when_it_has_the_packages(machine):
    machine.have("requirements.txt")
    result = machine.run()
    assert (result.returncode, result.stdout, result.stderr) == (0, str(machine.bin / "python3"), "")
    assert machine.calls() == []
    assert not (machine.repo / ".venv").exists()


@pytest.mark.parametrize("newer", ["torch==2.12.1", "torch==2.11.0+cu128", "opencv-python-headless==9.0"])
def test_a_newer_set_of_packages_is_used(machine, newer):
    machine.have(newer)
    for line in (machine.repo / "requirements.txt").read_text().splitlines():
        if line[:1].isalpha() and not line.startswith(newer.split("==")[0] + "="):
            machine.have(line.split("#")[0].strip())
    assert machine.run().stdout == str(machine.bin / "python3")


@pytest.mark.parametrize(
    ("packages", "lacks"),
    [
        ([], "torch"),
        (["torch==2.11.0"], "torchvision"),  # somebody's torch without its companions
        (["torch==2.9.1", "torchvision==0.24.1", "torchaudio==2.9.1"], "==2.11.0 of torch (has 2.9.1)"),
    ],
)
def test_otherwise_venv_is_made_once(machine, packages, lacks):
    machine.have(*packages)
    result = machine.run()
    assert (result.returncode, result.stdout) == (0, machine.own)
    assert f"lacks {lacks}: using .venv" in result.stderr
    assert "minutes" in result.stderr
    assert machine.calls() == ["venv", "pip"]
    again = machine.run()
    assert again.stdout == machine.own
    assert machine.calls() == ["venv", "pip"]


@pytest.mark.parametrize(("version", "enough"), [("4.10.0.84", False), ("4.13.0.92", True)])
def test_cv2_under_its_other_name_counts_if_it_is_new_enough(machine, version, enough):
    machine.have("requirements.txt")
    site = machine.bin.parent / "site"
    for record in site.glob("opencv_python_headless*"):
        record.rename(site / f"opencv_python-{version}.dist-info")
    metadata = f"Metadata-Version: 2.1\nName: opencv-python\nVersion: {version}\n"
    (site / f"opencv_python-{version}.dist-info" / "METADATA").write_text(metadata)
    assert machine.run().stdout == (str(machine.bin / "python3") if enough else machine.own)


def test_an_interrupted_installation_is_finished(machine):
    broken = machine.run(FAKE_PIP_SAYS="Killed")
    assert broken.returncode == 2
    assert broken.stderr.splitlines()[-1].startswith("error: .venv: pip failed")
    mended = machine.run()
    assert mended.stdout == machine.own
    assert "incomplete" in mended.stderr
    assert machine.calls() == ["venv", "pip", "pip"]


def test_a_kill_in_the_middle_of_pip_is_noticed(machine, tmp_path):
    process = machine.start('source "$REPO/scripts/_env.sh"', FAKE_PIP_GATE=str(tmp_path / "gate"))
    wait_until(lambda: "pip" in machine.calls())
    process.kill()
    (tmp_path / "gate").touch()
    process.communicate()
    assert machine.run().stdout == machine.own
    assert machine.calls() == ["venv", "pip", "pip"]


def test_a_venv_whose_python_is_gone_is_made_anew(machine):
    machine.run()
    own = Path(machine.own)
    own.unlink()
    own.symlink_to("/nowhere/python3.10")
    assert machine.run().stdout == machine.own
    assert machine.calls() == ["venv", "pip"] * 2


def test_a_package_removed_from_venv_is_put_back(machine):
    machine.run()
    shutil.rmtree(machine.repo / ".venv" / "site" / "tqdm")
    assert machine.run().stdout == machine.own
    assert machine.calls() == ["venv", "pip", "pip"]


def test_changed_requirements_are_installed(machine):
    machine.run()
    with open(machine.repo / "requirements.txt", "a") as file:
        file.write("einops>=0.8\n")
    result = machine.run()
    assert result.stdout == machine.own
    assert "changed" in result.stderr
    assert (machine.repo / ".venv" / "site" / "einops").is_dir()
    assert machine.calls() == ["venv", "pip", "pip"]


def test_an_activated_half_made_venv_is_finished_from_outside(machine):
    machine.run(FAKE_PIP_SAYS="Killed")
    inside = Path(machine.own)
    shutil.copy(inside, inside.with_name("python3"))
    inside.unlink()
    result = machine.run(PATH=f"{inside.parent}:{machine.environ['PATH']}")
    assert (result.returncode, result.stdout) == (0, machine.own)


def test_two_scripts_at_once_install_once(machine, tmp_path):
    if shutil.which("flock") is None:
        pytest.skip("no flock on this machine")
    script = 'source "$REPO/scripts/_env.sh"; echo "$PYTHON"'
    first = machine.start(script, FAKE_PIP_GATE=str(tmp_path / "gate"))
    wait_until(lambda: "pip" in machine.calls())
    second = machine.start(script)
    assert any("waiting for it" in line for line in second.stderr)  # reads no further than that line
    (tmp_path / "gate").touch()
    assert [process.communicate(timeout=300)[0].strip() for process in (first, second)] == [machine.own] * 2
    assert machine.calls() == ["venv", "pip"]


@pytest.mark.parametrize(
    ("says", "told"),
    [
        ("Could not install packages due to an OSError: [Errno 28] No space left on device", "the disk is full"),
        ("Failed to establish a new connection: [Errno -2] Name or service not known", "cannot be downloaded"),
        ("No matching distribution found for torch==2.11.0", "no build of a package"),
    ],
)
def test_a_failed_installation_is_told_in_one_line(machine, says, told):
    result = machine.run(FAKE_PIP_SAYS=says)
    assert result.returncode == 2
    assert told in result.stderr.splitlines()[-1]
    assert result.stderr.count("error: ") == 1


def test_threads_spin_as_in_train_py_unless_the_user_says_how(machine):
    machine.have("requirements.txt")
    machine.environ = {k: v for k, v in machine.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    script = 'source "$REPO/scripts/_env.sh"; echo "${GOMP_SPINCOUNT-none}"'
    assert machine.run(script).stdout == SPINS
    assert machine.run(script, GOMP_SPINCOUNT="7").stdout == "7"
    assert machine.run(script, OMP_WAIT_POLICY="active").stdout == "none"


def test_tests_get_their_packages_in_venv_and_never_in_the_current_environment(machine):
    machine.have("requirements.txt")
    result = machine.run('bash "$REPO/scripts/run_tests.sh" -k "two words"')
    assert (result.returncode, result.stdout) == (0, "3 passed in 0.01s")
    log = machine.log.read_text().splitlines()
    assert log[0] == "venv"
    assert log[1].endswith("-r requirements.txt -r requirements-dev.txt")
    tests = "pytest -q -n auto --maxprocesses 4 --dist loadfile -k two words"
    types = f"pyright --pythonpath {machine.repo / '.venv' / 'bin' / 'python'}"
    assert log[2:] == ["ruff check .", "ruff format --check .", types, tests]
    assert not (machine.bin.parent / "site" / "pytest").exists()


@pytest.mark.parametrize("tool", ["ruff", "pyright"])
def test_findings_fail_the_run_but_do_not_hide_the_tests(machine, tool):
    machine.have("requirements.txt", "requirements-dev.txt")
    result = machine.run('bash "$REPO/scripts/run_tests.sh"', **{f"FAKE_{tool.upper()}": "1"})
    assert (result.returncode, result.stdout) == (1, "3 passed in 0.01s")
    assert f"error: {tool}" in result.stderr


@pytest.mark.parametrize(
    ("script", "leading"),
    [
        ("run_train.sh", ["--train"]),
        ("run_baseline.sh", ["--train", "--method", "baseline"]),
        ("run_official.sh", ["--train", "--preset", "official", "--dataset", "CREMAD"]),
    ],
)
def test_flags_are_passed_through(machine, script, leading):
    machine.have("requirements.txt")
    (machine.repo / "train.py").write_text("import sys; print(sys.argv[1:])")
    typed = f'bash "$REPO/scripts/{script}" --epochs 2 --log_path "my runs" --data_root=d --checkpoint'
    given = [*leading, "--epochs", "2", "--log_path"]
    # Names of files count from where they were typed; from the repository itself they stay as they are.
    assert machine.run(f'cd "$REPO" && {typed}').stdout == str([*given, "my runs", "--data_root=d", "--checkpoint"])
    assert machine.run(f"cd /tmp && {typed} a/b.pth").stdout == str(
        [*given, "/tmp/my runs", "--data_root=/tmp/d", "--checkpoint", "/tmp/a/b.pth"]
    )
    assert machine.run(f"{typed} /a --run_name /x").stdout == str(
        [*given, "/my runs", "--data_root=/d", "--checkpoint", "/a", "--run_name", "/x"]
    )
    assert machine.run(f'bash "$REPO/scripts/{script}"').stdout == str(leading)


def test_paths_of_the_reproduction_count_from_where_they_were_typed(machine):
    """RAW comes without a flag."""
    machine.have("requirements.txt")
    (machine.repo / "report").mkdir()
    (machine.repo / "report" / "reproduce.py").write_text("import sys; print(sys.argv[1:])")
    typed = 'bash "$REPO/scripts/reproduce.sh" cremad "my raw" --split_dir lists --epochs 2'
    given = ["cremad", "/tmp/my raw", "--split_dir", "/tmp/lists", "--epochs", "2"]
    assert machine.run(f"cd /tmp && {typed}").stdout == str(given)
    assert machine.run('bash "$REPO/scripts/reproduce.sh" ks --estimate').stdout == str(["ks", "--estimate"])


def test_every_script_parses_and_says_what_it_is_for():
    scripts = sorted((REPO / "scripts").glob("*.sh"))
    assert {"run_train.sh", "run_baseline.sh", "run_tests.sh", "prepare_demo.sh"} <= {path.name for path in scripts}
    for path in [*scripts, REPO / "scripts" / "slurm.sbatch", REPO / ".ci" / "run"]:
        subprocess.run([BASH, "-n", path], check=True)
        lines = path.read_text().splitlines()
        assert any(line.startswith("# ") for line in lines[:2]), path
        assert max(map(len, lines)) <= 120, path
    assert os.access(REPO / ".ci" / "run", os.X_OK)
