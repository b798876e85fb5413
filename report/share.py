"""The result of finished runs as a Markdown block for an issue: tables, data, protocol, machine, versions, commands.

It holds no path, host name or user name. Flags that name files are numbered (`FILE1`), training folders are called
after their dataset, and in commands every word with a path in it is `PATH`.
"""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

from report.runs import Group, Run, command_of, group_runs, seconds
from report.tables import maintable, notes, protocol
from utils.errors import UserError

PATH_FLAGS = ("data_root", "log_path", "run_name", "checkpoint", "predictions", "clip", "pretrained", "resume", "out",
              "split_dir", "doc")  # fmt: skip
HIDDEN = "PATH"


def share(runs: list[Run]) -> str:
    """The block. Raises `UserError` where no run is finished."""
    datasets, left_out = group_runs(without_paths(runs))
    if not datasets:
        raise UserError(f"no finished run among {len(runs)}: there is nothing to share yet")
    parts = []
    for name, groups in datasets.items():
        parts += [f"### {name}", maintable(groups), notes(groups), "\n".join(facts(groups))]
        parts += ["```\n" + "\n".join(commands(groups)) + "\n```"]
    if left_out:
        parts += [f"Left out: {len(left_out)} of {len(runs)} runs (unfinished, or repeated)."]
    return "\n\n".join(parts) + "\n"


def without_paths(runs: list[Run]) -> list[Run]:
    """The runs with configs that hold no path. Equal values get equal names, so that groups stay the same."""
    roots: dict[str, dict[str, str]] = {}  # dataset -> training folder -> name
    files: dict[str, str] = {}
    found = []
    for run in runs:
        config = dict(run.config)
        for flag in ("checkpoint", "pretrained"):
            if config.get(flag):
                config[flag] = files.setdefault(str(config[flag]), f"FILE{len(files) + 1}")
        if {"dataset", "data_root"} <= config.keys():
            own = roots.setdefault(config["dataset"], {})
            number = len(own) + 1
            name = config["dataset"] if number == 1 else f"{config['dataset']}-{number}"
            config["data_root"] = own.setdefault(str(config["data_root"]), name)
        config["command"] = public_command(config.get("command", ""))
        found.append(run._replace(config=config))
    return found


def public_command(command: str) -> str:
    """A command without the values of flags that name files, and without any other word that holds a path."""
    words, hide = [], False
    for i, word in enumerate(shlex.split(command)):
        flag, equals, _ = word.partition("=")
        if word.startswith("--"):
            hide = flag.removeprefix("--") in PATH_FLAGS
            words.append(f"{flag}={HIDDEN}" if equals and (hide or _is_path(word)) else word)
        elif i < 2 and _is_path(word):  # the program: train.py, or bash scripts/run_compare.sh
            name = re.split(r"[/\\]", word)[-1]
            words.append(f"scripts/{name}" if name.endswith(".sh") else name)
        else:
            words.append(HIDDEN if hide or _is_path(word) else word)
    return shlex.join(words)


def _is_path(word: str) -> bool:
    return "/" in word or "\\" in word or word.startswith("~")


def facts(groups: list[Group]) -> list[str]:
    """Lines on data, protocol, machine, versions and code, of all runs of the groups."""
    runs = [run for group in groups for run in group.runs.values()]

    def of(read: Callable[[dict], object]) -> str:
        return "; ".join(sorted({str(read(run.config)) for run in runs}))

    return [
        f"- data: {of(_data)}",
        *(f"- protocol, {line}" for line in protocol(groups)),
        f"- machine: {of(_machine)}; {sum(map(seconds, runs)) / 3600:.2g} hours for {len(runs)} runs",
        f"- versions: {of(_versions)}",
        f"- code: {of(_commit)}",
    ]


def _data(config: dict) -> str:
    data = config.get("data", {})
    clips = ", ".join(f"{count:,} {part}" for part, count in data.get("clips", {}).items())
    classes = f" clips of {len(data['classes'])} classes" if "classes" in data else " clips"
    split = data.get("split", {}).get("name") or "unknown"
    missing = f", {data['missing']:,} left out" if data.get("missing") else ""
    return f"{config['dataset']}, {split} split, {clips}{classes}{missing}"


def _machine(config: dict) -> str:
    known = {"device": "?", "processes": "?", "cpu": "?", "cores": "?", "threads": "?"} | config.get("hardware", {})
    return "{device}, {processes} process(es), {cpu}, {cores} cores, {threads} thread(s)".format(**known)


def _versions(config: dict) -> str:
    versions = {"python": "?", "torch": "?", "cuda": "none"} | config.get("versions", {})
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _commit(config: dict) -> str:
    commit = config.get("git_commit")
    if not commit:
        return "commit unknown (no git)"
    return f"commit {commit.removesuffix('-dirty')}, " + (
        "with uncommitted changes" if commit.endswith("-dirty") else "no uncommitted changes"
    )


def commands(groups: list[Group]) -> list[str]:
    """The commands that made the runs: of a comparison where there was one, else one for each group."""
    found: dict[str, None] = {}
    for group in groups:
        noted = {command: None for run in group.runs.values() for command in _noted(run.folder)}
        found |= noted or {command_of(group): None}
    return list(found)


def _noted(folder: Path) -> list[str]:
    path = folder.parent / "compare.json"
    notes = json.loads(path.read_text()) if path.is_file() else {}
    return [public_command(command) for command, names in notes.items() if folder.name in names]
