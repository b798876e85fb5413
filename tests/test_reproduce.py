"""Reproduction of CREMA-D and Kinetics-Sounds: which runs, in which order, what is repeated, what the estimate says."""

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.raw_samples import EMOTIONS, cremad_names, tone, write_video, write_wav
from dataset.folder import load_folder
from dataset.prepare import engine
from dataset.specs import SPECS
from report import compare, reproduce
from report.compare import Planned
from report.reproduce import Clips, Cost, Prepared, main, make_plan, parse_args, seconds_of
from utils.errors import UserError
from utils.run import write_json

COST = Cost(joint=0.01, remix=0.008, evaluate=0.002, save=0.5, run=20, size=10**8, machine="a GPU")


def plan_of(words: str) -> list[Planned]:
    return make_plan(*parse_args(words.split()))


# ------------------------------------------------------------------------------------------------------------- plan


def test_cremad_is_two_methods_two_presets_two_splits_three_seeds():
    plan = plan_of("cremad RAW")
    assert len(plan) == 24 and len({run.name for run in plan}) == 24
    settings = [(run.flags["method"], run.flags["preset"], run.flags["split"]) for run in plan]
    assert settings[:8] == [
        ("baseline", "fair", None), ("remix", "fair", None),
        ("baseline", "official", None), ("remix", "official", None),
        ("baseline", "fair", "actor"), ("remix", "fair", "actor"),
        ("baseline", "official", "actor"), ("remix", "official", "actor"),
    ]  # fmt: skip
    assert [run.flags["random_seed"] for run in plan] == [0] * 8 + [1] * 8 + [2] * 8
    rates = {(run.flags["method"], run.flags["preset"]): run.flags["learning_rate"] for run in plan}
    assert rates["remix", "official"] == 5e-5 and rates["remix", "fair"] == rates["baseline", "fair"] == 1e-3
    assert {run.flags["log_path"] for run in plan} == {"runs/reproduce-cremad"}
    assert all(run.flags["dataset"] == "CREMAD" and run.argv[-2:] == ["--resume", "auto"] for run in plan)


def test_kinetics_sounds_has_one_split_and_flags_are_passed_on():
    plan = plan_of("ks RAW --epochs 2 --warmup 1 --image_size 32 --allow_missing")
    assert len(plan) == 12 and {run.flags["split"] for run in plan} == {None}
    assert {(run.flags["dataset"], run.flags["epochs"], run.flags["image_size"]) for run in plan} == {
        ("KineticSound", 2, 32)
    }
    assert all(run.flags["allow_missing"] for run in plan)
    assert len(plan_of("ks RAW --presets fair --seeds 4")) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "usage: bash scripts/reproduce.sh cremad|ks RAW [flags]"),
        ("cremad", "RAW is the folder of the raw download"),
        ("imagenet RAW", "usage: bash scripts/reproduce.sh cremad|ks RAW"),
        ("cremad RAW --method remix", "--method: set for each run by this command"),
        ("cremad RAW --preset=official", "--preset: set for each run by this command; use --presets instead"),
        ("cremad RAW --dataset demo", "--dataset: set for each run by this command; use the first word instead"),
        ("cremad RAW --split actor", "use --splits instead"),
        ("cremad RAW --seeds 1,x", "--seeds 1,x: give whole numbers"),
        ("cremad RAW --presets fair,fair", "--presets fair,fair: give one or more of fair, official"),
        ("ks RAW --splits actor", "--splits actor: give one or more of official,"),
        ("cremad RAW --epocs 2", "unrecognized arguments: --epocs"),
        ("cremad RAW --epochs 3 --warmup 9", "Remix would never start"),
    ],
)
def test_a_mistake_is_told_before_anything_is_read(words, message):
    with pytest.raises(UserError, match=re.escape(message)):
        plan_of(words)


# --------------------------------------------------------------------------------------------------------- estimate


def test_the_seconds_of_a_run_are_those_of_its_epochs():
    clips = Clips(train=1000, test=100, left=0)
    baseline, remix = plan_of("cremad RAW --epochs 10 --warmup 4 --presets fair --splits official --seeds 0")
    evaluation = 10 * (100 * 0.002 + 0.5)
    assert seconds_of(COST, baseline, 0, clips) == pytest.approx(10 * 10 + evaluation + 20)
    assert seconds_of(COST, remix, 0, clips) == pytest.approx(4 * 10 + 6 * 8 + evaluation + 20)
    assert seconds_of(COST, remix, 3, clips) == pytest.approx(1 * 10 + 6 * 8 + 0.7 * evaluation + 20)
    assert seconds_of(COST, remix, 7, clips) == pytest.approx(3 * 8 + 0.3 * evaluation + 20)


def test_the_estimate_is_of_what_is_left(tmp_path):
    words = f"cremad RAW --epochs 10 --warmup 4 --presets fair --splits official --seeds 0,1 --log_path {tmp_path}"
    args, args.rest = parse_args(words.split())
    actions = ["done", "done", "start", "start"]
    stock = list(zip(make_plan(args, args.rest), actions, strict=True))
    clips, prepared = Clips(1000, 100, 1100), Prepared(start=2, seconds=0.2, bytes=3e5, check=0.01, packed=1e3)
    text = "\n".join(reproduce.estimate_lines(args, stock, clips, prepared, {"fair": COST}, ready=False))
    assert "preparation and check: 1,100 clips, 3.9 min, 0.33 GB" in text
    assert "preset fair: 2 runs (baseline 2.1 min, remix 1.9 min each), 4.0 min, 0.2 GB" in text
    assert "in all: 7.9 min, 0.53 GB without decoded clips" in text
    clips = clips._replace(left=0)
    text = "\n".join(reproduce.estimate_lines(args, stock, clips, prepared, {"fair": COST}, ready=True))
    assert "preparation" not in text and "in all: 4.0 min, 0.2 GB" in text
    prepared = prepared._replace(packed=1e12)
    text = "\n".join(reproduce.estimate_lines(args, stock, clips, prepared, {"fair": COST}, ready=True))
    assert "do not fit in memory: every epoch reads files" in text


def test_a_disk_without_room_is_one_line(tmp_path):
    reproduce.check_disk({tmp_path / "data": 1.0, tmp_path / "runs": 1.0})
    with pytest.raises(
        UserError, match=r"data: needs about \d+ GB, the disk has .* free; free some, or choose another"
    ):
        reproduce.check_disk({tmp_path / "data": 1e18, tmp_path / "runs": 1.0})


# ------------------------------------------------------------------------------------------------------- whole command


@pytest.fixture
def raw(tmp_path) -> Path:
    """Twelve clips of two actors in CREMA-D's layout; their lists are in `lists` beside it."""
    raw, lists = tmp_path / "raw", tmp_path / "lists"
    names = cremad_names(12, 2)
    video = write_video(raw / "VideoFlash" / f"{names[0]}.flv", 1, 10, (32, 24))
    for i, name in enumerate(names):
        write_wav(raw / "AudioWAV" / f"{name}.wav", 0.2, seed=i)
        if i:
            shutil.copy(video, raw / "VideoFlash" / f"{name}.flv")
    lists.mkdir()
    rows = [f"{name},{name.split('_')[2]}\n" for name in names]
    (lists / "train.csv").write_text("".join(rows[4:]))
    (lists / "test.csv").write_text("".join(rows[:4]))
    (lists / "stat.csv").write_text("".join(f"{name}\n" for name in EMOTIONS))
    return raw


class Reproduction:
    """The command with training, its timing and the report replaced; `steps` are what it did."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder, self.steps = folder, []
        in_process = lambda clips, out, options, _: ((c, engine.make_clip(c, out, options)) for c in clips)  # noqa: E731
        monkeypatch.setattr(engine, "_pooled", in_process)
        monkeypatch.setattr(reproduce, "_time_run", self.time_run)
        monkeypatch.setattr(reproduce, "train_missing", self.train)
        monkeypatch.setattr(reproduce, "report", lambda *_: self.steps.append("report"))
        prepare = reproduce.prepare
        monkeypatch.setattr(reproduce, "prepare", lambda words: self.steps.append(words[0]) or prepare(words))

    def time_run(self, run: Planned, folder: Path, sizes: dict[str, int], envs: list[dict]) -> Cost:
        found = load_folder(run.flags["data_root"], SPECS[run.flags["dataset"]])
        assert {part: len(own.clips) for part, own in found.parts.items()} == sizes
        assert (run.flags["epochs"], run.flags["warmup"], run.flags["method"]) == (2, 1, "remix")
        self.steps.append(f"time {run.flags['preset']}")
        return COST._replace(size=10)

    def train(self, stock, log_path: Path, jobs: int) -> list:
        self.steps += [action for _, action in stock]
        for run, _ in stock:
            (log_path / run.name).mkdir(exist_ok=True)
            write_json(log_path / run.name / "config.json", run.flags)
        return []

    def __call__(self, *flags: str, name: str = "cremad") -> list[str]:
        self.steps.clear()
        words = [name, str(self.folder / "raw"), "--split_dir", str(self.folder / "lists"), "--data_root"]
        words += [str(self.folder / "data"), "--log_path", str(self.folder / "runs"), "--batch_size", "4"]
        self.status = main([*words, "--seeds", "0", "--splits", "official", "--device", "cpu", *flags])
        return list(self.steps)


@pytest.fixture
def command(tmp_path, monkeypatch) -> Reproduction:
    return Reproduction(tmp_path, monkeypatch)


def test_every_step_once_in_order_and_nothing_twice(raw, command, capsys):
    assert command() == ["time fair", "time official", "--dataset", "--check", *["start"] * 4, "report"]
    printed = capsys.readouterr().out
    assert printed.index("in all:") < printed.index("\npreparation: ") < printed.index("\ncheck: ")
    assert "preparation and check: 12 clips" in printed and "training folder of CREMAD: valid" in printed
    assert f"python -m report --share {command.folder / 'runs'}" in printed and command.status == 0
    note = json.loads((command.folder / "runs" / "compare.json").read_text())
    assert next(iter(note)).startswith("bash scripts/reproduce.sh cremad RAW --split_dir")
    assert not list((command.folder / "runs").glob(".tmp-*")), "the sample is gone"

    shutil.rmtree(raw)  # its space may be needed
    assert command() == [*["start"] * 4, "report"], "neither prepared, nor checked, nor measured again"
    assert "by an earlier start; delete" in capsys.readouterr().out
    (command.folder / "data" / "train.csv").write_text("")
    with pytest.raises(UserError, match=r"raw: no such folder; give the folder of the raw download"):
        command()


def test_only_the_estimate(raw, command, capsys):
    assert command("--estimate", "--presets", "fair") == ["time fair"]
    assert not (command.folder / "data" / "train.csv").exists() and "in all:" in capsys.readouterr().out


def test_missing_clips_stop_it_unless_allowed(raw, command):
    next((raw / "AudioWAV").iterdir()).unlink()
    with pytest.raises(UserError, match=r"clips are missing or broken .* or add --allow_missing to train without them"):
        command()
    assert command.steps == ["time fair", "time official", "--dataset"]
    assert command("--allow_missing") == [
        "time fair", "time official", "--dataset", "--check", *["start"] * 4, "report",
    ]  # fmt: skip
    assert command("--allow_missing") == [*["start"] * 4, "report"]


def test_a_wrong_raw_folder_is_one_line_and_starts_nothing(raw, command):
    for path in (*raw.rglob("*.flv"), *raw.rglob("*.wav")):
        path.unlink()
    with pytest.raises(UserError, match=r"none of the 12 listed clips is there .* wrong folder\?"):
        command()
    with pytest.raises(UserError, match=r"no my_train\.txt in it"):
        command(name="ks")
    shutil.rmtree(raw)
    with pytest.raises(UserError, match="raw: no such folder"):
        command()
    assert command.steps == [] and not (command.folder / "runs").exists()


def test_kinetics_sounds_from_mp4(tmp_path, command):
    """Clips are found by the archive's names, and the 31 classes are there even where the lists name fewer."""
    raw, lists = tmp_path / "raw", tmp_path / "lists"
    lists.mkdir()
    video = write_video(tmp_path / "one.mp4", 2, 10, (32, 24), tone(2, 16_000))
    (raw / "k400").mkdir(parents=True)
    for part, end in (("train", "_000002_000012"), ("test", "_2")):
        classes = {f"{part}{c:02d}".ljust(11, "_"): c for c in (0, 7, 30)}
        for clip in classes:
            shutil.copy(video, raw / "k400" / f"{clip}_000002_000012.mp4")
        (lists / f"my_{part}.txt").write_text("".join(f"{clip}{end},10,{c}\n" for clip, c in classes.items()))
    steps = command(name="ks")
    assert steps == ["time fair", "time official", "--dataset", "--check", *["start"] * 4, "report"]
    assert len(list((tmp_path / "data" / "audio").iterdir())) == 6


def test_a_timed_run_is_read_by_phase(tmp_path, monkeypatch):
    """The last epoch of each phase, divided by the clips; scoring counts for every K-th epoch."""
    plan = plan_of(f"cremad RAW --log_path {tmp_path} --rescore_every 4")
    numbers = {"seconds_score": [0, 0, 8, 1], "seconds_train": [9, 5, 7, 3], "seconds_eval": [1, 1, 1, 2]}

    class Done:
        def __init__(self, run, action, log_path, env):
            self.folder, self.process = log_path / run.name, self
            self.returncode = 0
            self.folder.mkdir()
            write_json(self.folder / "config.json", {"hardware": {"device": "cpu", "cpu": "a CPU", "threads": 2}})
            (self.folder / "last.pth").write_bytes(b"x" * 1000)
            lines = [json.dumps({key: own[i] for key, own in numbers.items()}) for i in range(4)]
            (self.folder / "metrics.jsonl").write_text("\n".join(lines))

        def wait(self):
            return self.returncode

        def ask_to_stop(self):
            pass

        def last_words(self):
            return "error: out of GPU memory"

    monkeypatch.setattr(compare, "Worker", Done)
    cost = reproduce._time_run(plan[1], tmp_path, {"train": 100, "test": 10}, [{}])
    assert cost[:3] == (5 / 100, (8 / 4 + 3) / 100, 2 / 10)
    assert cost.run == 0 and cost.size > 1000 and cost.machine == "a CPU, 2 threads"
    every = plan_of(f"cremad RAW --log_path {tmp_path} --seeds 7")[1]
    assert reproduce._time_run(every, tmp_path, {"train": 100, "test": 10}, [{}]).remix == (1 + 3) / 100
    monkeypatch.setattr(Done, "wait", lambda self: setattr(self, "returncode", 2))
    with pytest.raises(UserError, match="the timed run failed: out of GPU memory"):
        reproduce._time_run(plan[3], tmp_path, {"train": 100, "test": 10}, [{}])


def test_the_command_resumes_what_compare_resumes(raw, command):
    """The stock is that of run_compare.sh: unfinished runs are resumed, others are refused."""
    command("--presets", "fair")
    folder = command.folder / "runs" / "CREMAD-data_remix_preset-fair_seed0"
    (folder / "last.pth").touch()
    assert command("--presets", "fair") == ["start", "resume", "report"]
    with pytest.raises(UserError, match=r"made with --batch_size 4 \(now 6\)"):
        command("--presets", "fair", "--batch_size", "6")
    assert compare.take_stock(plan_of(f"cremad R --log_path {command.folder}")[0], command.folder) == "start"
