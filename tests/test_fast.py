"""Speed that must not change results: compiled code, bfloat16, several processes, and the work in a clip."""

import datetime
import functools
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, in_two_processes, make_folder, run, shown_in_table

import remix
import train
from benchmarks import common, contention, epoch, interruptions, saving, scaling
from benchmarks.common import MODALITIES, flops_per_clip
from dataset.build import build_data
from models import MODELS, build_model
from models.checkpoint import model_weights
from models.inference import predict
from utils import acceleration
from utils.acceleration import set_precision, try_to_compile
from utils.errors import UserError
from utils.run import claim_folder

REPO = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
NAMES = tuple(modality.name for modality in MODALITIES)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def thin(classes: int = 3, precision: str = "fp32"):
    """The network of runs on the tiny folder."""
    return build_model(MODALITIES, {"audio": (33, 20)}, classes, "resnet18_thin", precision=precision)


# ----------------------------------------------------------------------------------------------------------- compile


def test_a_compiled_run_resumes_and_gives_the_same_network(data, tmp_path, monkeypatch):
    sizes = []  # of the images each compiled graph takes

    def backend(module, inputs):  # PyTorch's own takes minutes
        sizes.append(next(x.shape[0] for x in inputs if x.dim() == 4 and not x.requires_grad))
        return module.forward

    flags = ("--warmup", "1", "--learning_rate", "1e-5")
    plain = run(data, tmp_path, "plain", *flags, "--epochs", "2")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(acceleration, "try_to_compile", lambda device: None)
    torch.compiler.reset()
    compiled = run(data, tmp_path, "compiled", *flags, "--epochs", "1", "--compile", "--diagnose")
    run(data, tmp_path, "compiled", *flags, "--epochs", "2", "--compile", "--resume", "auto")
    torch.compiler.reset()
    # Once for each encoder: to train on 8 clips of 2 frames and, from the first Remix epoch on, to score 32. Neither
    # homogeneous batches nor their odd ends (34 = 4 x 8 + 2, 15 test clips) compile anything more.
    assert sorted(sizes) == [8, 16, 32, 64]
    states = [torch.load(folder / "last.pth", weights_only=True) for folder in (plain, compiled)]
    weights = [state["model"] for state in states]
    assert list(weights[0]) == list(weights[1]) == list(model_weights(thin()))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=2e-3, atol=1e-4, msg=name)
    for a, b in zip(metrics(plain), metrics(compiled), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-3)


def test_a_balance_method_compiles_nothing_more(data, tmp_path, monkeypatch):
    sizes = []

    def backend(module, inputs):
        sizes.append(next(x.shape[0] for x in inputs if x.dim() == 4 and not x.requires_grad))
        return module.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(acceleration, "try_to_compile", lambda device: None)
    torch.compiler.reset()
    run(data, tmp_path, "pmr", "--warmup", "1", "--epochs", "2", "--compile", "--balance", "pmr")
    torch.compiler.reset()
    assert sorted(sizes) == [8, 16, 32, 64]  # PMR's prototypes take passes over batches of other sizes


def test_without_a_compiler_there_is_one_line(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"--compile: no C.. compiler .no-such-compiler. found.*leave the flag out"):
        try_to_compile(CPU)

    def broken(function):
        raise RuntimeError("Python.h: no such file\nand forty more lines")

    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UserError, match=r"Python\.h: no such file") as caught:
        try_to_compile(CPU)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------- precision


def test_bfloat16_is_near_and_leaves_weights_and_logits_float32():
    networks = []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        networks.append(thin(4, precision))
    assert all(torch.equal(a, b) for a, b in zip(*(n.state_dict().values() for n in networks), strict=True))
    inputs = {
        "audio": torch.randn(6, 1, 33, 33),  # 33 x 20 would meet a bug of oneDNN (docs/performance.md)
        "video": torch.randn(6, 2, 3, 32, 32),
    }
    for fed in (NAMES, ("audio",), ("video",)):
        with torch.no_grad():
            exact, rough = (network.eval()({name: inputs[name] for name in fed}, fed) for network in networks)
        assert list(exact.logits) == list(rough.logits) == list(fed)
        assert list(exact.features) == list(rough.features) == list(NAMES)
        pairs = [(exact.joint, rough.joint)]
        pairs += [(exact.logits[name], rough.logits[name]) for name in fed]
        pairs += [(exact.features[name], rough.features[name]) for name in NAMES]
        for a, b in pairs:
            assert b.dtype == torch.float32
            torch.testing.assert_close(b, a, rtol=0.05, atol=0.05 * a.abs().max().item())
        assert not torch.equal(exact.joint, rough.joint)  # it did compute otherwise
    networks[1].train()(inputs, NAMES).joint.logsumexp(1).sum().backward()
    encoder = networks[1].encoders["audio"]
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in encoder.parameters())
    assert all(value.dtype in (torch.float32, torch.int64) for value in networks[1].state_dict().values())


def test_precision_is_recorded_and_cannot_change_on_resume(tmp_path):
    data = make_folder(tmp_path / "data", audio_shape=(33, 33))
    flags = ("--method", "baseline", "--epochs", "1")
    folder = run(data, tmp_path, "run", *flags, "--precision", "bf16")
    assert json.loads((folder / "config.json").read_text())["precision"] == "bf16"
    with pytest.raises(UserError, match=r"--precision bf16 .now fp32."):
        run(data, tmp_path, "run", *flags, "--resume", "auto")
    assert train.parse_args(["--train", "--device", "cpu"]).precision == "fp32"


def test_a_gpu_without_bfloat16_is_told_at_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    with pytest.raises(UserError, match="--precision bf16: Old GPU"):
        set_precision("bf16", torch.device("cuda", 0))


# --------------------------------------------------------------------------------------------------------- processes


def test_ranks_end_with_the_same_network_which_is_the_one_saved(data, tmp_path, capsys):
    """Parameters and BatchNorm statistics alike; one process evaluates the checkpoint to what two have reported."""
    command = [str(REPO / "tests" / "rank_states.py"), str(tmp_path), *TINY, "--train", "--data_root", str(data),
               "--log_path", str(tmp_path), "--run_name", "two", "--epochs", "2", "--warmup", "1",
               "--compile"]  # fmt: skip
    ((statuses, _, errors),) = in_two_processes(tmp_path / "said", command)
    assert statuses == [0, 0], errors[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pth", weights_only=True) for rank in (0, 1))
    saved = torch.load(tmp_path / "two" / "last.pth", weights_only=True)["model"]
    torch.manual_seed(42)
    fresh = model_weights(thin())
    assert list(saved) == list(first) == list(second)
    for name, value in saved.items():
        assert torch.equal(first[name], value) and torch.equal(second[name], value), name
        assert not name.endswith(("conv1.weight", "running_mean")) or not torch.equal(fresh[name], value), name

    capsys.readouterr()
    train.main([*TINY, "--data_root", str(data), "--checkpoint", str(tmp_path / "two" / "last.pth")])
    shown = [float(cell) for cell in shown_in_table(capsys.readouterr().out)]
    last = metrics(tmp_path / "two")[-1]
    expected = [last[key] for key in ("test_acc", "test_acc_audio", "test_acc_video", "test_f1_macro")]
    assert shown == pytest.approx(expected, abs=5e-5)


def test_torchrun_starts_processes_of_one_group(data, tmp_path):
    """The launcher itself; tests of several processes fork them as it would, which saves their imports of PyTorch."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(REPO / "train.py"), *TINY, "--train", "--data_root", str(data), "--log_path", str(tmp_path),
               "--batch_size", "3"]  # fmt: skip
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode and said == ["error: --batch_size 3: BatchNorm needs 2 clips per process; use 4 or more"]


# -------------------------------------------------------------------------------------------------------------- work


def resnet18_gflop(channels: int, height: int, width: int) -> float:
    """Of ResNet-18's convolutions, two FLOP per multiply-add; every stride of 2 halves a side, rounding up."""
    height, width = -(-height // 2), -(-width // 2)
    total = height * width * 49 * channels * 64
    height, width, before = -(-height // 2), -(-width // 2), 64  # max pooling
    for stage, after in enumerate((64, 128, 256, 512)):
        if stage:
            height, width = -(-height // 2), -(-width // 2)
            total += height * width * before * after  # the shortcut's 1 x 1 convolution
        total += height * width * 9 * (before * after + 3 * after * after)
        before = after
    return 2 * total / 1e9


def test_a_clip_costs_what_its_layers_do():
    """About 10.7 GFLOP forward: 7.3 for two frames, the rest for a spectrogram (3.57, counted by hand). Training costs
    three times that, less the gradient of the input, which is not computed."""
    flops = flops_per_clip("resnet18", 6, image_size=224, audio_shape=(257, 188))
    forward = {fed: counted["forward"] / 1e9 for fed, counted in flops.items()}
    assert forward["joint"] == pytest.approx(10.7, rel=0.02) and forward["video"] == pytest.approx(7.3, rel=0.01)
    assert forward["audio"] == pytest.approx(resnet18_gflop(1, 257, 188) + 2 * (1024 + 512) * 6 / 1e9, rel=1e-6)
    for fed, counted in flops.items():
        assert 2.9 < counted["train"] / counted["forward"] < 3, fed
    # A Remix epoch, half of the clips each way: 2.5 F, the official way 4 F, a joint epoch 3 F.
    ours = flops["joint"]["forward"] + (flops["audio"]["train"] + flops["video"]["train"]) / 2
    assert ours / flops["joint"]["forward"] == pytest.approx(2.5, abs=0.05)


def test_gates_and_the_central_network_cost_what_their_layers_do():
    counted = {
        name: flops_per_clip("resnet18_thin", 6, 32, (33, 24), model=name)["joint"]["forward"] for name in MODELS
    }
    gates = sum(2 * (2 * width * width + width * 2 * width) for width in (32, 64, 128))  # two modalities, ratio 4
    central = 16 * 32 + 32 * 64 + 64 * 128 + 128 * 6 - 256 * 6  # in the place of the concat head
    assert counted["mmtm"] - counted["late"] == gates
    assert counted["centralnet"] - counted["late"] == 2 * central


def test_the_epoch_benchmark_runs_and_leaves_the_network_as_it_was(capsys, monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")  # which it sets
    threads = torch.get_num_threads()
    try:
        epoch.main(["--preset", "tiny", "--model", "mmtm", "--phases", "remix", "--repeats", "1", "--threads", "1"])
    finally:
        torch.set_num_threads(threads)
    rows = [line for line in capsys.readouterr().out.splitlines() if "| remix |" in line]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == ["ours", "official"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cache", ["ram", "device"])
def test_no_step_waits_for_the_gpu(data, cache):
    device = torch.device("cuda", 0)
    args = train.parse_args([*TINY, "--train", "--data_root", str(data), "--cache", cache])
    built = build_data(args, device)
    clips, model = built.clips["train"], train.make_model(args, built, device)
    optimizer = train.make_optimizer(model, args)
    plan = remix.batches_of(34, 8, NAMES, torch.Generator().manual_seed(0))
    train.train_epoch(model, clips, plan, optimizer, 0, args)  # what is made once is made here
    predict(model, clips, NAMES, 8)
    steps = []

    def no_more_waiting():  # from the first batch on: the epoch's one copy is behind it
        steps.append(len(steps))
        torch.cuda.set_sync_debug_mode("error" if len(steps) < len(plan) else "default")

    try:
        train.train_epoch(model, clips, plan, optimizer, 1, args, after_step=no_more_waiting)
        assert len(steps) == len(plan)
        steps.clear()
        predict(model, clips, NAMES, 8, check=no_more_waiting)
        assert len(steps) == len(plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_the_memory_benchmark_sees_a_process_grow_and_those_below_it():
    before = scaling.memory(os.getpid())["private"]
    # Pages of its own: an array may lie in memory that earlier tests have freed, and the process does not grow.
    held = np.frombuffer(mmap.mmap(-1, 50 * 2**20), np.uint8)
    held[:] = 1
    assert 45e6 < scaling.memory(os.getpid())["private"] - before < 80e6 and held.all()
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert {os.getpid(), child.pid} <= set(scaling.tree(os.getpid()))
    finally:
        child.kill()
        child.wait()
    assert scaling.memory(child.pid) is None


def test_the_contention_benchmark_compares_with_the_same_process_alone():
    shares = [contention.fair_share(threads, busy, 2) for threads in (1, 2) for busy in (1, 2, 4)]
    assert shares == pytest.approx([1, 2 / 3, 2 / 5, 2 / 3, 1 / 2, 1 / 3])
    found = {(2, "default", 0): [100.0, 200.0], (2, "default", 2): [10.0, 40.0],
             (2, "passive", 0): [90.0, 190.0], (2, "passive", 2): [45.0, 95.0]}  # fmt: skip
    _, default, passive = contention.rows(found, contention.parse_args(["--threads", "2", "--busy", "2"]), 2)
    assert default["kept beside 2"] == "0.15 (0.10 to 0.20)" and passive["kept beside 2"] == "0.50 (0.50 to 0.50)"
    assert (passive["clips/s alone"], passive["/ default"]) == ("140", "0.93 (0.90 to 0.95)")


def test_growth_is_fitted_by_a_line():
    rows = [{"way": "ram", "clips": n, "classes": 6, "s": 2 + n / 100, "flat": 3.0, "square": n * n} for n in range(9)]
    fits = {fit["quantity"]: fit for fit in scaling.fit_rows(rows, "clips")}
    assert (fits["s"]["at 0"], fits["s"]["per 1000 clips"], fits["s"]["R2"]) == ("2", "10", "1.0000")
    assert fits["flat"]["R2"] is None and float(fits["square"]["R2"]) < 0.95


def test_a_benchmark_never_overwrites_a_result(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "RESULTS", tmp_path / "results")
    for clips in (1, 2, 3):
        common.save("epoch", {"device": "cpu", "cpu": "A CPU"}, {"Clips": [{"clips": clips}]})
    stem = f"epoch-A-CPU-{datetime.date.today().isoformat()}"
    found = [json.loads((tmp_path / "results" / f"{stem}{n}.json").read_text()) for n in ("", "-2", "-3")]
    assert [result["Clips"][0]["clips"] for result in found] == [1, 2, 3]
    assert len(list((tmp_path / "results").glob("*.md"))) == 3


# ----------------------------------------------------------------------------------------------------- interruptions


def test_the_interruption_benchmark_sees_what_differs():
    def outcome():
        return {"summary": {"best_test_acc": 0.5}, "metrics": [{"epoch": 0, "train_loss": 1.0}], "partition": b"a,b",
                "weights": [{"w": torch.ones(3)}, {"w": torch.ones(3)}]}  # fmt: skip

    assert interruptions.differences(outcome(), outcome()) == []
    for name, value in (("summary", {}), ("metrics", []), ("partition", b"a,c")):
        assert interruptions.differences(outcome() | {name: value}, outcome()) == [name]
    one_bit = torch.nextafter(torch.ones(3), torch.zeros(3))
    assert interruptions.differences(outcome() | {"weights": [{"w": torch.ones(3)}, {"w": one_bit}]}, outcome()) == [
        "weights"
    ]


def test_a_run_killed_between_its_first_best_and_last_checkpoint_starts_again(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "best.pth", "metrics.jsonl"):
        (folder / name).write_text('{"epoch": 0}\n')
    assert claim_folder(str(tmp_path), "run", resume=True) == folder and not list(folder.iterdir())
    assert "starting again" in capsys.readouterr().out
    # After more epochs somebody has deleted last.pth: best.pth is then all there is.
    (folder / "best.pth").write_text("")
    (folder / "metrics.jsonl").write_text('{"epoch": 0}\n{"epoch": 1}\n')
    with pytest.raises(UserError, match=r"holds best\.pth but no last\.pth"):
        claim_folder(str(tmp_path), "run", resume=True)
    assert (folder / "best.pth").exists()
