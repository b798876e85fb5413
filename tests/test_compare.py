"""run_compare: which runs are planned, what is reused, resumed or refused, and what happens when one fails.

Most tests put a fake train.py in the real one's place, which writes a run's folder in no time; one uses the real one.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import make_folder

from report import compare, write
from report.runs import find_runs
from utils.errors import UserError

REPO = Path(__file__).resolve().parents[1]

# argv as train.py's. $FAKE holds a folder: plan.json has the flags by run name, starts.txt gets a line per start,
# and what a run is to do stands in <run name>.txt (fail, stop after an epoch, sleep).
FAKE_TRAIN = """
import json, os, sys, time
from pathlib import Path
fake = Path(os.environ["FAKE"])
name = sys.argv[sys.argv.index("--run_name") + 1]
flags = json.loads((fake / "plan.json").read_text())[name]
folder = Path(flags["log_path"]) / name
assert sys.argv[sys.argv.index("--resume") + 1] == "auto"
resumed = (folder / "last.pth").exists()
with open(fake / "starts.txt", "a") as file:
    file.write(f"{name} {'resume' if resumed else 'start'} {os.environ.get('OMP_NUM_THREADS')}\\n")
todo = fake / f"{name}.txt"
action = todo.read_text() if todo.exists() else ""
todo.unlink(missing_ok=True)
folder.mkdir(exist_ok=True)
(folder / "config.json").write_text(json.dumps(flags | {"command": " ".join(sys.argv)}))
if action == "fail":
    print("Traceback (most recent call last):\\nRuntimeError: the sky fell\\n")
    sys.exit(1)
if action == "sleep":
    time.sleep(8)
done = (folder / "metrics.jsonl").read_text().count("\\n") if resumed else 0
with open(folder / "metrics.jsonl", "a" if resumed else "w") as file:
    for epoch in range(done, flags["epochs"]):
        line = dict.fromkeys(["test_acc", "test_acc_audio", "test_acc_video", "test_f1_macro"], 0.5)
        file.write(json.dumps(line | {"epoch": epoch, "phase": "joint", "n_audio": None, "seconds_train": 1}) + "\\n")
        (folder / "last.pth").write_text("weights")
        if action in ("stop", "interrupted"):
            sys.exit(75 if action == "interrupted" else 1)
(folder / "summary.json").write_text(json.dumps({"epochs": flags["epochs"]}))
"""


class Comparison:
    """Runs `run_compare` with the fake in a folder of its own and tells which runs it started."""

    def __init__(self, root: Path):
        self.root, self.runs = root, root / "runs"
        (root / "starts.txt").touch()

    def __call__(self, words: str = "--methods baseline,remix --seeds 0,1") -> list[str]:
        before = self._starts()
        self.status = compare.main([*words.split(), "--epochs", "3", "--warmup", "1", "--log_path", str(self.runs)])
        return self._starts()[len(before) :]

    def _starts(self) -> list[str]:
        return [" ".join(line.split()[:2]) for line in (self.root / "starts.txt").read_text().splitlines()]

    def tell(self, run: str, action: str) -> None:
        (self.root / f"{run}.txt").write_text(action)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch) -> Comparison:
    (tmp_path / "fake_train.py").write_text(FAKE_TRAIN)
    make_plan = compare.make_plan

    def noted(*arguments) -> list:
        plan = make_plan(*arguments)
        (tmp_path / "plan.json").write_text(json.dumps({run.name: run.flags for run in plan}))
        return plan

    monkeypatch.setattr(compare, "make_plan", noted)
    monkeypatch.setattr(compare, "TRAIN", str(tmp_path / "fake_train.py"))
    monkeypatch.setattr(write, "write_figures", lambda *_: {})  # most of a report's time, and tests/test_report.py's
    monkeypatch.setattr(compare, "check_data", lambda flags: None)
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.05)))
    monkeypatch.setenv("FAKE", str(tmp_path))
    return Comparison(tmp_path)


def plan_of(words: str) -> list[compare.Planned]:
    return compare.make_plan(*compare.parse_args(words.split()))


# ------------------------------------------------------------------------------------------------------------- plan


def test_the_default_is_four_methods_over_five_seeds_of_the_demo() -> None:
    plan = plan_of("")
    assert len(plan) == 20 and {run.flags["method"] for run in plan} == {"baseline", "remix", "audio", "video"}
    assert [run.name for run in plan[:4]] == [f"demo_{m}_seed0" for m in ("baseline", "remix", "audio", "video")]
    assert {run.flags["random_seed"] for run in plan} == {0, 1, 2, 3, 4}
    assert all(run.flags["log_path"] == "runs/compare" and run.flags["train"] for run in plan)


def test_variants_are_flags_of_a_method() -> None:
    joint, random = plan_of("--methods joint_only,remix_random --seeds 7")
    assert (joint.flags["method"], joint.flags["alpha"], joint.flags["beta"]) == ("baseline", 0, 0)
    assert (random.flags["method"], random.flags["score"], random.name) == (
        "remix",
        "random",
        "demo_remix_random_seed7",
    )


def test_a_grid_is_every_value_with_every_other_but_once_for_methods_that_do_not_read_it() -> None:
    plan = plan_of("--methods baseline,remix --seeds 0 --grid warmup=2,3 --grid learning_rate=0.01,0.001 --epochs 9")
    assert [run.name for run in plan] == [
        "demo_baseline_learning_rate-0.01_seed0", "demo_baseline_learning_rate-0.001_seed0",
        "demo_remix_warmup-2_learning_rate-0.01_seed0", "demo_remix_warmup-2_learning_rate-0.001_seed0",
        "demo_remix_warmup-3_learning_rate-0.01_seed0", "demo_remix_warmup-3_learning_rate-0.001_seed0",
    ]  # fmt: skip
    assert (plan[-1].flags["warmup"], plan[-1].flags["learning_rate"], plan[-1].flags["epochs"]) == (3, 0.001, 9)


def test_every_modality_of_the_dataset_is_a_method(tmp_path: Path) -> None:
    fields = [{"name": name, "kind": "array", "folder": name} for name in ("text", "touch", "smell")]
    (tmp_path / "dataset.json").write_text(json.dumps({"modalities": fields}))
    words = f"--dataset folder --data_root {tmp_path} --seeds 0"
    assert [run.flags["method"] for run in plan_of(words)] == ["baseline", "remix", "text", "touch", "smell"]
    assert plan_of(f"{words} --methods touch")[0].argv[:3] == ["--train", "--method", "touch"]
    with pytest.raises(UserError, match=r"--methods audio: unknown; allowed: .*text, touch, smell"):
        plan_of(f"{words} --methods audio")


def test_a_grid_over_balance_methods_with_options() -> None:
    plan = plan_of("--methods baseline,audio --seeds 0 --grid balance=none,ogm_ge:alpha=0.5,pmr+mmpareto")
    assert [(run.name, run.flags["balance"], list(run.flags["balance_options"])) for run in plan] == [
        ("demo_baseline_balance-none_seed0", "none", []),
        ("demo_baseline_balance-ogm_ge-alpha-0.5_seed0", "ogm_ge:alpha=0.5", ["ogm_ge"]),
        ("demo_baseline_balance-pmr+mmpareto_seed0", "pmr,mmpareto", ["pmr", "mmpareto"]),
        ("demo_audio_seed0", "none", []),
    ]
    assert plan[1].flags["balance_options"]["ogm_ge"]["alpha"] == 0.5


def test_runs_are_started_and_resumed_by_the_same_command() -> None:
    run = plan_of("--methods remix --seeds 0 --log_path there")[0]
    assert run.argv[-6:] == ["--log_path", "there", "--run_name", run.name, "--resume", "auto"]


def test_other_data_is_in_the_name() -> None:
    assert plan_of("--methods audio --seeds 0 --data_root data/demo_speech")[0].name == "demo-demo_speech_audio_seed0"


@pytest.mark.parametrize(
    "words, message",
    [
        ("--methods remixx", "--methods remixx: unknown; allowed: remix, baseline"),
        ("--methods remix,remix", "each once"),
        ("--seeds 0,,1", "--seeds 0,,1: give comma separated"),
        ("--seeds a", "--seeds a: give whole numbers"),
        ("--grid warmup", "give FLAG=A,B"),
        ("--grid random_seed=1,2", "use --seeds"),
        ("--grid warmup=1,2 --warmup 3", "--warmup: set for each run"),
        ("--method remix", "--method: set for each run by this command; use --methods"),
        ("--random_seed=3", "use --seeds"),
        ("--grid speed=1,2", "unrecognized arguments: --speed"),
        ("--grid warmup=1,two", "'two' is not a whole number"),
        ("--epocs 3", "unrecognized arguments: --epocs"),
        ("--methods remix_random --score loss", "--score: the method remix_random sets it"),
        ("--methods remix --warmup 9 --epochs 3", "Remix would never start"),
    ],
)
def test_a_mistake_is_told_before_any_run(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        plan_of(words)


# ------------------------------------------------------------------------------------------- reuse, resume, refuse


def test_runs_then_reports_then_has_nothing_left_to_do(fake: Comparison, capsys) -> None:
    assert sorted(fake()) == [f"demo_{m}_seed{s} start" for m in ("baseline", "remix") for s in (0, 1)]
    assert fake.status == 0 and (fake.runs / "report" / "report.md").is_file()
    assert (fake.runs / "demo_remix_seed1.log").is_file()
    text = (fake.runs / "report" / "report.md").read_text()
    assert "    bash scripts/run_compare.sh --methods baseline,remix --seeds 0,1 --epochs 3 --warmup 1" in text
    assert fake() == [] and "4 finished already" in capsys.readouterr().out
    started = sorted(fake("--methods baseline,remix --seeds 0,1,2"))  # two at a time: either may start first
    assert started == ["demo_baseline_seed2 start", "demo_remix_seed2 start"]


def test_finished_runs_of_other_code_are_named(fake: Comparison, capsys, monkeypatch) -> None:
    monkeypatch.setattr(compare, "git_commit", lambda: "1" * 40)
    fake()
    note = "note: 1 finished runs were made by another commit of this code, such as demo_remix_seed1"
    for commit, notes in (("1" * 40, 0), ("0" * 40, 1)):
        path = fake.runs / "demo_remix_seed1" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"git_commit": commit}))
        capsys.readouterr()
        assert fake() == [] and capsys.readouterr().out.count(note) == notes


def test_an_interrupted_comparison_resumes(fake: Comparison) -> None:
    fake.tell("demo_remix_seed0", "stop")
    fake()
    torn = fake.runs / "demo_remix_seed1"  # stopped in its first epoch: a config and nothing to go on from
    for name in ("summary.json", "metrics.jsonl", "last.pth"):
        (torn / name).unlink()
    stale = fake.runs / "demo_baseline_seed1"  # looks finished, but its last epoch is not there
    (stale / "metrics.jsonl").write_text("".join((stale / "metrics.jsonl").read_text().splitlines(True)[:-1]))
    kept = (fake.runs / "demo_baseline_seed0" / "metrics.jsonl").stat().st_mtime_ns
    assert sorted(fake()) == ["demo_baseline_seed1 resume", "demo_remix_seed0 resume", "demo_remix_seed1 start"]
    assert fake.status == 0 and not any(run.problem for run in find_runs([fake.runs]))
    assert (fake.runs / "demo_baseline_seed0" / "metrics.jsonl").stat().st_mtime_ns == kept


def test_an_interrupted_run_is_no_failed_one(fake: Comparison, capsys) -> None:
    fake.tell("demo_remix_seed0", "interrupted")
    fake()
    err = capsys.readouterr().err
    assert fake.status == 75
    assert "demo_remix_seed0: interrupted after 1 epochs; the same command resumes it" in err
    assert "FAILED" not in err
    assert fake() == ["demo_remix_seed0 resume"] and fake.status == 0


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_a_run_made_with_other_flags_is_refused_by_name(fake: Comparison, state: str) -> None:
    fake("--methods remix --seeds 0")
    if state == "unfinished":
        (fake.runs / "demo_remix_seed0" / "summary.json").unlink()
    with pytest.raises(UserError, match=r"demo_remix_seed0: made with --batch_size 64 \(now 8\); .*--log_path"):
        fake("--methods remix --seeds 0 --batch_size 8")
    assert fake("--methods remix --seeds 0 --num_workers 3 --cache none --device cpu") == (
        [] if state == "finished" else ["demo_remix_seed0 resume"]
    )


def test_flags_a_method_never_reads_and_flags_older_than_the_run_are_no_difference(fake: Comparison) -> None:
    fake("--methods baseline --seeds 0")
    path = fake.runs / "demo_baseline_seed0" / "config.json"
    config = json.loads(path.read_text())
    del config["encoder_lr_decay"]
    path.write_text(json.dumps(config))
    assert fake("--methods baseline --seeds 0 --score loss --gamma1 3") == []
    with pytest.raises(UserError, match=r"--encoder_lr_decay 1.0 \(now 0.5\)"):
        fake("--methods baseline --seeds 0 --encoder_lr_decay 0.5")


def test_a_flag_younger_than_the_run_had_the_default_of_its_dataset(fake: Comparison) -> None:
    words = "--methods baseline --seeds 0 --dataset CREMAD"
    fake(words)
    path = fake.runs / "CREMAD_baseline_seed0" / "config.json"
    config = json.loads(path.read_text())
    for name in ("image_size", "learning_rate", "encoder"):  # the demo has others
        del config[name]
    path.write_text(json.dumps(config))
    assert fake(words) == []


def test_a_run_without_diagnostics_is_not_taken_for_one_with(fake: Comparison) -> None:
    fake("--methods baseline --seeds 0")
    with pytest.raises(UserError, match="--diagnose False"):
        fake("--methods baseline --seeds 0 --diagnose")


def test_what_is_no_run_is_left_alone(fake: Comparison) -> None:
    folder = fake.runs / "demo_remix_seed0"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match=r"demo_remix_seed0: has thesis\.txt"):
        fake("--methods remix --seeds 0")
    assert (folder / "thesis.txt").read_text() == "years"


# ------------------------------------------------------------------------------------------------------------ running


def test_a_failure_is_told_and_the_others_go_on(fake: Comparison, capsys) -> None:
    fake.tell("demo_baseline_seed0", "fail")
    assert len(fake()) == 4 and fake.status == 1
    said = capsys.readouterr()
    assert "error: demo_baseline_seed0: FAILED: RuntimeError: the sky fell (full log:" in said.err
    assert "left out:" in said.out and "demo_baseline_seed0: unfinished: 0 of 3 epochs" in said.out
    assert fake() == ["demo_baseline_seed0 start"] and fake.status == 0


def test_if_all_fail_there_is_no_report(fake: Comparison, capsys) -> None:
    fake.tell("demo_remix_seed0", "fail")
    fake("--methods remix --seeds 0")
    assert fake.status == 1 and "nothing to report" in capsys.readouterr().out


def test_cores_and_gpus_are_shared_out(monkeypatch) -> None:
    import torch

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert [env["OMP_NUM_THREADS"] for env in compare.environments(None, "auto")] == ["1"] * 8
    assert [env["OMP_NUM_THREADS"] for env in compare.environments(3, "auto")] == ["2"] * 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # the user's word stands
    assert compare.environments(2, "cpu")[0]["OMP_NUM_THREADS"] == "5"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert len(compare.environments(None, "auto")) == 1  # train.py takes all GPUs by itself
    assert [env["CUDA_VISIBLE_DEVICES"] for env in compare.environments(3, "auto")] == ["0", "1", "0"]
    assert len(compare.environments(None, "cpu")) == 8


def test_two_comparisons_do_not_share_a_folder(tmp_path: Path) -> None:
    holder = "import sys, time\nfrom pathlib import Path\nfrom report.compare import alone_in\n"
    holder += "with alone_in(Path(sys.argv[1])):\n    print('locked', flush=True)\n    time.sleep(60)\n"
    first = subprocess.Popen([sys.executable, "-c", holder, tmp_path], cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "locked\n"
    words = f"--methods remix --seeds 0 --epochs 3 --warmup 1 --log_path {tmp_path}"
    command = [sys.executable, "-m", "report.compare", *words.split()]
    second = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert (second.returncode, second.stdout) == (2, "")
    message = "another comparison is running here; wait for it, or choose another --log_path"
    assert second.stderr == f"error: {tmp_path}: {message}\n"
    first.kill()  # the system releases the lock, whatever ends the process
    first.communicate()
    for _ in range(2):
        with compare.alone_in(tmp_path), pytest.raises(UserError, match="another comparison"):
            compare.alone_in(tmp_path).__enter__()


def test_real_runs_stopped_by_a_signal_and_resumed(tmp_path: Path) -> None:
    make_folder(tmp_path / "data", train=24, test=6)
    words = f"--dataset folder --data_root {tmp_path}/data --encoder resnet18_thin --image_size 32 --batch_size 8 "
    words += f"--epochs 8 --warmup 1 --methods remix --seeds 0 --log_path {tmp_path}/runs --device cpu"
    command = [sys.executable, "-m", "utils.compare", *words.split()]  # the former name
    run = tmp_path / "runs" / "folder-data_remix_seed0"
    first = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for _ in range(3000):
        if (run / "last.pth").exists() or first.poll() is not None:
            break
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=60)[0]
    assert first.returncode == 143, said
    assert not (run / "summary.json").exists()
    with compare.alone_in(tmp_path / "runs"):  # nobody is left at work
        lines = (run / "metrics.jsonl").read_text().count("\n")
    second = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=400)
    assert second.returncode == 0, second.stderr
    assert "0 to start, 1 to resume, 0 finished already" in second.stdout
    log = (tmp_path / "runs" / "folder-data_remix_seed0.log").read_text()
    resumed = log.split(f"resumed after epoch {lines}")[1]
    assert f"epoch {lines + 1:>3}/8" in resumed and f"epoch {lines:>3}/8" not in resumed
    assert "(n=1" not in second.stdout and "| remix" in second.stdout  # alone, without a baseline to compare with
