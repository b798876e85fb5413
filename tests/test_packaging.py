"""What people install and cite: extras, requirements files and lock agree, workflows run what exists, code imports
without POSIX."""

import getpass
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
import yaml
from helpers import REPO
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OF_CUDA = ("nvidia-", "cuda-", "triton")  # named by torch itself
Names = tuple[str, ...]
OF_PYTHON = ("pip", "setuptools", "wheel")


def read(name: str) -> dict[str, Requirement]:
    """The requirements in a file, by name."""
    lines = (line.split("#")[0].strip() for line in (REPO / name).read_text(encoding="utf-8").splitlines())
    found = [Requirement(line) for line in lines if line]
    return {canonicalize_name(one.name): one for one in found}


def extra(name: str) -> dict[str, str]:
    """An extra's requirements with those of the extras it includes, by name."""
    found = {}
    for text in PROJECT["optional-dependencies"][name]:
        one = Requirement(text)
        if one.name == PROJECT["name"]:
            for included in one.extras:
                found |= extra(included)
        else:
            found[canonicalize_name(one.name)] = str(one)
    return found


def texts(requirements: dict[str, Requirement]) -> dict[str, str]:
    return {name: str(one) for name, one in requirements.items()}


# ------------------------------------------------------------------------------------------------------- requirements


def test_extras_are_the_requirements_files():
    assert extra("prepare") == texts(read("requirements.txt"))
    assert extra("dev") == texts(read("requirements-dev.txt"))
    assert set(extra("train")) < set(extra("prepare"))
    assert [Requirement(text).name for text in PROJECT["dependencies"]] == ["torch"]


def test_the_lock_satisfies_every_requirement():
    lock = read("requirements-lock.txt")
    assert all(re.fullmatch(r"==[\w.+]+", str(one.specifier)) and not one.url for one in lock.values())
    for name, one in (read("requirements.txt") | read("requirements-dev.txt")).items():
        pinned = str(lock[name].specifier).removeprefix("==")
        assert one.specifier.contains(pinned, prereleases=True), (str(one), pinned)


def test_the_lock_is_closed():
    """Whatever a package of the lock requires is in the lock, by the metadata of those that are installed as locked."""
    lock, looked = read("requirements-lock.txt"), 0
    waiting, seen = [*read("requirements.txt").values(), *read("requirements-dev.txt").values()], set()
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        if (name, frozenset(one.extras)) in seen or name in OF_PYTHON or name.startswith(OF_CUDA):
            continue
        seen.add((name, frozenset(one.extras)))
        assert name in lock, f"{name} is not in the lock"
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if found.version.split("+")[0] != str(lock[name].specifier).removeprefix("==").split("+")[0]:
            continue  # another version may require something else
        looked += 1
        for text in found.requires or ():
            needed = Requirement(text)
            wanted = [{"extra": extra} for extra in one.extras] or [{"extra": ""}]
            if needed.marker is None or any(needed.marker.evaluate(extra) for extra in wanted):
                waiting.append(needed)
    if looked < 20:
        pytest.skip(f"only {looked} packages are installed as locked")


# ------------------------------------------------------------------------- workflows, container, issues, citation


def files_named(text: str) -> list[str]:
    """The repository's scripts, tests and requirements files that a command names."""
    return re.findall(r"(?:(?:scripts|tests|examples)/[\w./-]+|\.ci/\w+|requirements[\w-]*\.txt)", text)


def test_the_workflow_runs_what_exists():
    """Every file that a step names is there; Linux runs .ci/run on the oldest and a recent Python."""
    workflow = yaml.safe_load((REPO / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert {"push", "pull_request"} <= set(workflow[True])  # YAML 1.1 reads `on` as a truth value
    jobs = workflow["jobs"]
    for job in jobs.values():
        assert job["timeout-minutes"] <= 60
        for step in job["steps"]:
            assert "uses" in step or "run" in step
            for name in files_named(step.get("run", "")):
                assert (REPO / name).is_file(), name
    linux = jobs["linux"]
    assert "bash .ci/run" in [step.get("run") for step in linux["steps"]]
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert oldest in linux["strategy"]["matrix"]["python"] and len(linux["strategy"]["matrix"]["python"]) == 2
    assert jobs["other-systems"]["strategy"]["matrix"]["os"] == ["macos-latest", "windows-latest"]


def test_issue_forms_are_valid():
    """As GitHub's schema wants them: a name, a description, fields with unique ids and labels."""
    forms = [path for path in (REPO / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert len(forms) == 4
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert form["name"] and form["description"]
        ids = [field["id"] for field in form["body"]]
        assert len(set(ids)) == len(ids)
        assert {field["type"] for field in form["body"]} <= {"textarea", "input"}
        assert all(field["attributes"]["label"] for field in form["body"])


def test_the_image_copies_what_exists_and_no_data():
    """COPY names files that are there and that .dockerignore does not exclude; data sets and git are excluded."""
    lines = (REPO / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    for line in lines:
        if line.startswith("COPY"):
            *sources, _ = line.split()[1:]
            assert all((REPO / source).exists() for source in sources), line
    ignored = (REPO / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {".git", "data/*", "runs", "**/*.pth"} <= set(ignored)
    assert not {name for line in lines for name in files_named(line) if name in ignored}


def test_the_image_names_users_without_an_account(monkeypatch):
    """`docker run --user ID` and the image's own user have no entry in /etc/passwd; PyTorch asks getpass for a name."""
    accounts = pytest.importorskip("pwd")
    lines = (REPO / "Dockerfile").read_text(encoding="utf-8").splitlines()
    given = dict(word.split("=") for line in lines if line.startswith("ENV ") for word in line.split()[1:])
    monkeypatch.setattr(accounts, "getpwuid", {}.__getitem__)  # KeyError for every id
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert getpass.getuser() == "remix"


def test_the_paper_is_the_preferred_citation():
    cited = yaml.safe_load((REPO / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert cited["license"] == PROJECT["license"]
    paper = cited["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Ma", "Chen", "Deng"]
    assert paper["identifiers"][0]["value"] == "arXiv:2506.11550" and paper["year"] == 2025
    assert paper["title"] in " ".join((REPO / "README.md").read_text(encoding="utf-8").split())


# ------------------------------------------------------------------------------------------------- other machines


def project_modules() -> Names:
    """All modules but the benchmarks, which say themselves where they run."""
    folders = ("utils", "remix", "models", "dataset", "balance", "evaluation", "report")
    paths = [REPO / "train.py", *(path for folder in folders for path in (REPO / folder).rglob("*.py"))]
    names = (path.relative_to(REPO).with_suffix("").as_posix().replace("/", ".") for path in paths)
    return tuple(sorted(name.removesuffix(".__init__") for name in names if not name.endswith("__main__")))


IMPORTS = """
import importlib, json, os, sys
before, blocked, attributes, modules = json.loads(sys.stdin.read())
for name in before:
    importlib.import_module(name)
for name in blocked:
    for known in [known for known in sys.modules if known == name or known.startswith(name + ".")]:
        del sys.modules[known]
    sys.modules[name] = None
for name in attributes:
    if hasattr(os, name):
        delattr(os, name)
for name in modules:
    importlib.import_module(name)
"""
# What the code is built on knows of other systems itself: imported before anything is taken away.
BUILT_ON = ("torch", "torch.distributed", "torchvision", "sklearn.manifold", "scipy.stats", "cv2", "filelock",
            "tqdm", "matplotlib.figure", "concurrent.futures", "multiprocessing.connection", "tempfile",
            "platform")  # fmt: skip
POSIX_MODULES = ("fcntl", "resource", "termios", "pty", "tty", "pwd", "grp", "syslog", "posix")
POSIX_ATTRIBUTES = ("fork", "forkpty", "register_at_fork", "sched_getaffinity", "sched_setaffinity", "getloadavg",
                    "sysconf", "statvfs", "openpty", "getuid", "geteuid", "getgid", "killpg", "setsid", "mkfifo",
                    "nice", "WNOHANG", "uname", "posix_fallocate", "fchmod", "chown")  # fmt: skip


def import_without(blocked: Names, attributes: Names, modules: Names, before: Names = BUILT_ON) -> str:
    """Import `modules` where others and some of `os` do not exist; returns the error, empty if there is none."""
    words = json.dumps([before, blocked, attributes, modules])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", IMPORTS], input=words, env=env, capture_output=True, text=True)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def test_everything_imports_without_posix_and_with_the_extra_train_alone():
    """As on Windows, where CI only imports and runs unit tests, and where nothing is prepared."""
    of_preparation = ("librosa", "soundfile", "av", "torchaudio")
    assert import_without((*POSIX_MODULES, *of_preparation), POSIX_ATTRIBUTES, project_modules()) == ""


@pytest.mark.parametrize("source", ["import fcntl", "import os\nos.sched_getaffinity(0)"])
def test_a_module_of_posix_is_found(tmp_path, monkeypatch, source):
    (tmp_path / "planted.py").write_text(source)
    monkeypatch.setattr(sys.modules[__name__], "REPO", tmp_path)
    assert import_without(POSIX_MODULES, POSIX_ATTRIBUTES, ("planted",), ()) != ""
