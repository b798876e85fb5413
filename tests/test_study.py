"""The studies: noise and parts of their data, choices on validation only, plans, and the page against slow NumPy."""

import csv
import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from run_folders import make_run
from scipy import stats

from report import study, study_data, study_page
from report.runs import protocol_line, read_run
from utils.errors import UserError
from utils.run import read_metrics

# --------------------------------------------------------------------------------------------------------------- data


def tones(count: int, samples: int = 4000) -> list[np.ndarray]:
    """Recordings that can be told apart in a mixture: sines of whole numbers of periods, of different loudness."""
    time = np.arange(samples) / samples
    return [(0.02 * (i + 1) * np.sin(2 * np.pi * (20 + 7 * i) * time)).astype(np.float32) for i in range(count)]


def shares(mixed: np.ndarray, waves: list[np.ndarray]) -> np.ndarray:
    """Amplitude of each tone in a mixture, by projection on its sine and cosine (any shift in time)."""
    time = np.arange(len(mixed)) / len(mixed)
    found = []
    for i in range(len(waves)):
        angle = 2 * np.pi * (20 + 7 * i) * time
        found.append(2 * np.hypot(np.mean(mixed * np.sin(angle)), np.mean(mixed * np.cos(angle))))
    return np.array(found)


@pytest.mark.parametrize("snr", [10.0, 0.0, -10.0])
def test_babble_is_six_equally_loud_others_at_the_ratio_asked_for(snr) -> None:
    waves = tones(9)
    mixed = study_data.babble(2, waves, snr, np.random.default_rng(0))
    found = shares(mixed, waves)
    others = np.delete(found, 2)
    loud = others[others > 1e-4]
    assert len(loud) == 6 and np.ptp(loud) < 1e-3 * loud.mean()
    assert 10 * np.log10(found[2] ** 2 / (loud**2).sum()) == pytest.approx(snr, abs=0.05)
    assert np.abs(mixed).max() < 1


def test_the_parts_are_stratified_and_share_no_sound(tmp_path, monkeypatch) -> None:
    """A quarter of each class is test, and the babble of a clip has sounds of its own part only."""
    raw = tmp_path / "sources" / "grid_s1"
    raw.mkdir(parents=True)
    clips = [f"c{i:02d}" for i in range(32)]
    rows = [f"{clip},digit,{'one' if i % 2 else 'two'},1.0,1.5\n" for i, clip in enumerate(clips)]
    (raw / "words.csv").write_text("clip,role,word,start,end\n" + "".join(rows))
    waves, table, mixed = tones(32), {}, {}
    monkeypatch.setattr(study_data, "sound", lambda path: waves[clips.index(Path(path).stem)])
    monkeypatch.setattr(study_data, "write_wave", lambda path, samples: mixed.update({path.stem: samples}))
    monkeypatch.setattr(study_data, "describe", lambda out, **fields: None)

    def prepared(words) -> None:
        with open(words[1], newline="") as file:
            table.update({row["clip"]: row for row in csv.DictReader(file)})

    monkeypatch.setattr(study_data, "run", prepared)
    study_data.grid(tmp_path / "sources", tmp_path / "out", "digit", 0.0)
    part = {clip: row["part"] for clip, row in table.items()}
    for word in ("one", "two"):
        assert sum(part[clip] == "test" for clip in clips if table[clip]["label"] == word) == 4
    for clip in clips:
        heard = {clips[i] for i in np.flatnonzero(shares(mixed[clip], waves) > 1e-4)}
        assert len(heard) == 7 and {part[name] for name in heard} == {part[clip]}
        assert (float(table[clip]["start"]), float(table[clip]["end"])) == (0.94, 1.56)


def test_a_folder_is_made_whole_or_not_at_all(tmp_path, monkeypatch) -> None:
    def broken(sources, out) -> None:
        out.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setitem(study_data.RECIPES, "mosi", broken)
    with pytest.raises(KeyboardInterrupt):
        study_data.make("mosi", tmp_path, tmp_path / "data")
    assert not (tmp_path / "data" / "mosi").exists()
    monkeypatch.setitem(study_data.RECIPES, "mosi", lambda sources, out: out.mkdir())
    assert study_data.make("mosi", tmp_path, tmp_path / "data").is_dir()  # the remains are no obstacle
    with pytest.raises(UserError, match="--sources"):
        study_data.make("views3", tmp_path / "nowhere", tmp_path / "data")


# ------------------------------------------------------------------------------------------------------------ choices


def run_of(root: Path, val, test, method="baseline", seed=0, **given):
    given = {"epochs": len(val), "warmup": 6, "lr_decay_step": 8} | given
    return read_run(make_run(root, method, seed, test, val, **given))


def test_the_epoch_is_chosen_after_the_warm_up_on_validation_alone(tmp_path) -> None:
    validated, unvalidated = (study.Setting("d", "D", (), "d", validated=value) for value in (True, False))
    val = [0.1, 0.99, 0.2, 0.3, 0.4, 0.5, 0.6, 0.9, 0.9, 0.7]
    for test in (np.linspace(0, 0.9, 10), np.linspace(0.9, 0, 10)):
        run = run_of(tmp_path, val, test.tolist())
        assert (
            protocol_line(run, validated.protocol, study.WARMUP)["epoch"] == 7
        )  # not 1, of the warm-up; not 8, which is as good and later
        assert protocol_line(run, unvalidated.protocol, study.WARMUP)["epoch"] == 9


def test_the_rate_is_the_one_with_the_best_validation_after_the_decay(tmp_path) -> None:
    early = run_of(tmp_path, [0.9] * 8 + [0.5, 0.6], [1.0] * 10)  # best before the decay
    late = run_of(tmp_path, [0.1] * 8 + [0.6, 0.7], [0.0] * 10)  # worst on test
    found = study.choose_rates({("d", "r", "3e-4"): early, ("d", "r", "1e-3"): late, ("d", "r", "3e-3"): late})
    assert found == {("d", "r"): "1e-3"}  # of equals the lower
    assert study.tuning_score(late) == pytest.approx(0.65)


@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", "c"), tuple("abcdef")])
def test_keep_all_with_the_same_steps_has_the_same_steps(names) -> None:
    """After the warm-up each of its epochs has a joint epoch's steps once per modality."""
    flags = dict(study.entries(names)["keep_all_steps"].flags)
    assert study.WARMUP + (int(flags["epochs"]) - study.WARMUP) * len(names) == study.EPOCHS
    assert int(flags["warmup"]) == study.WARMUP < int(flags["lr_decay_step"]) < int(flags["epochs"])


# --------------------------------------------------------------------------------------------------------------- plan


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Training folders that have a description only: plans need no clips."""

    def make(name: str, sources: Path, root: Path) -> Path:
        out = root / name
        out.mkdir(parents=True, exist_ok=True)
        kinds = {"views3": ("x", "y", "z"), "grid_flow_m10": ("audio", "video", "flow")}
        modalities = [{"name": key, "kind": "array", "folder": key} for key in kinds.get(name, ("audio", "video"))]
        (out / "dataset.json").write_text(json.dumps({"modalities": modalities, "encoder": "mlp"}))
        return out

    monkeypatch.setattr(study, "make", make)
    return tmp_path


def start(data: Path, *words: str) -> Namespace:
    args, rest = study.parse_args([*words, "--data", str(data / "data"), "--log_path", str(data / "runs")])
    assert not rest
    return args


def test_all_rows_share_the_schedule_and_the_validation_part(data, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(study, "run_all", lambda runs, log_path, jobs: seen.extend(runs) or 1)
    study.train_study(start(data, "evidence", "grid_digits_m10"), [])
    flags = [run.flags for run in seen]
    assert len(seen) == 8 * len(study.RATES)  # the grid only: it failed
    assert {(run["epochs"], run["warmup"], run["lr_decay_step"]) for run in flags} == {(24, 6, 18), (15, 6, 12)}
    assert {run["val_fraction"] for run in flags} == {0.15} and {run["random_seed"] for run in flags} == {0}
    assert {Path(run["data_root"]).name for run in flags} == {"grid_digits_0"}  # where the rates are chosen
    assert {run["learning_rate"] for run in flags} == {3e-4, 1e-3, 3e-3}


def test_a_row_that_the_dataset_of_the_rates_lacks_uses_the_baselines(data, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(study, "run_all", lambda runs, log_path, jobs: seen.extend(runs) or 1)
    found, _ = study.train_study(start(data, "evidence", "grid_flow_m10", "--rows", "flow"), [])
    assert [run.flags["method"] for run in seen] == ["baseline"] * len(study.RATES)
    assert found._replace(rates={("grid_digits_0", "baseline"): "3e-3"}).rate_of(found.settings[0], "flow") == "3e-3"


def test_the_page_names_the_command() -> None:
    for study_name, command in study.COMMANDS.items():
        args, _ = study.parse_args([study_name, "grid_digits_m10"])
        assert args.command == f"{command} grid_digits_m10"
        script = Path(command.split()[1])
        assert script.suffix != ".sh" or f"report.study {study_name}" in script.read_text()
    assert study.COMMANDS.keys() == study.STUDIES.keys()


def test_combinations_that_train_refuses_are_recorded(data, monkeypatch) -> None:
    monkeypatch.setattr(study, "run_all", lambda runs, log_path, jobs: 1)
    found, _ = study.train_study(start(data, "benchmark", "views3"), [])
    assert "two modalities" in found.refused["views3", "opm"]
    assert {"mmpareto", "mmpareto+remix", "baseline", "remix"} <= found.rows["views3"].keys()
    assert not {row for _, row in found.refused} & found.rows["views3"].keys()


@pytest.mark.parametrize(("words", "said"), [
    ([], "nothing to do"), (["evidenc"], "evidenc: give one of"), (["evidence", "mnist"], "mnist: unknown"),
])  # fmt: skip
def test_mistakes_are_one_line(words, said) -> None:
    with pytest.raises(UserError, match=said):
        study.parse_args(words)
    with pytest.raises(UserError, match="--rows nothing"):
        study.rows_of(study.STUDIES["evidence"][0], ("audio", "video"), "nothing")


# --------------------------------------------------------------------------------------------------------------- page


def test_the_page_has_the_numbers_of_the_chosen_epochs(data, monkeypatch, capsys) -> None:
    """Runs are made by hand; means, intervals and p values are compared with NumPy and SciPy."""
    rng = np.random.default_rng(0)

    def train(runs, log_path, jobs) -> int:
        for run in runs:
            if not (log_path / run.name).exists():
                flags = {key: value for key, value in run.flags.items() if key not in ("method", "random_seed",
                         "run_name", "from_preset")}  # fmt: skip
                epochs = run.flags["epochs"]
                gain = 0.3 if run.flags["method"] == "remix" and run.flags["score"] == "kl" else 0.0
                values = rng.uniform(0.4, 0.5, size=(2, epochs)) + gain
                make_run(log_path, run.flags["method"], run.flags["random_seed"], values[0].tolist(),
                         values[1].tolist(), run.name, names=("audio", "video"), **flags)  # fmt: skip
        return 0

    monkeypatch.setattr(study, "run_all", train)
    readme = data / "README.md"
    readme.write_text("before\n<!-- results:start -->\nold\n<!-- results:end -->\nafter\n")
    words = ["evidence", "grid_digits_m10", "grid_digits_clean", "--data", str(data / "data"), "--log_path",
             str(data / "runs"), "--doc", str(data / "results.md"), "--readme", str(readme)]  # fmt: skip
    assert study.main(words) == 0
    saved = json.loads((data / "runs" / "study.json").read_text())["grid_digits_m10"]["rows"]
    about = json.loads((data / "runs" / "study.json").read_text())["about"]
    assert (
        about["command"] == "bash scripts/evidence.sh grid_digits_m10 grid_digits_clean" and "a CPU" in about["origin"]
    )
    fused = {}
    for key, row in {"baseline": "baseline", "remix": "remix"}.items():
        fused[key] = []
        for seed in range(5):
            folder = data / "runs" / f"folder-grid_digits_m10_{row}_learning_rate-{saved[key]['rate']}_seed{seed}"
            lines = [line for line in read_metrics(folder) if line["epoch"] >= 6]
            best = lines[int(np.argmax([line["val_acc"] for line in lines]))]
            assert saved[key]["chosen"]["multimodal"][str(seed)] == best["test_acc"]
            fused[key].append(best["test_acc"])
    difference = np.subtract(fused["remix"], fused["baseline"])
    low, high = stats.t.interval(0.95, 4, difference.mean(), stats.sem(difference))
    found = saved["remix"]["difference"]
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((difference.mean(), low, high))
    assert saved["remix"]["p"] == pytest.approx(stats.ttest_rel(fused["remix"], fused["baseline"]).pvalue)
    page = (data / "results.md").read_text()
    assert f"{100 * difference.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]" in page
    assert "Remix +" in page.split("## GRID digits, clean sound")[1].split("Significant at 5 %")[1]
    assert all((data / f"results-{name}.png").stat().st_size > 5_000 for name in ("forest", "gap", "why"))
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| GRID digits, clean sound " in text
    assert "written" in capsys.readouterr().out


def test_a_ranked_table_is_in_the_order_of_accuracy(tmp_path) -> None:
    names, rows = ("audio", "video"), study.entries(("audio", "video"))
    runs = {}
    for key, level in {"baseline": 0.5, "agm": 0.7, "cml": 0.6}.items():
        runs["d", key] = {seed: run_of(tmp_path, [0.5] * 8, [level] * 8, seed=seed, names=names, warmup=1,
                                       name=f"{key}{seed}", lr_decay_step=4) for seed in range(2)}  # fmt: skip
    setting = study.Setting("d", "D", (), "d", ranked=True)
    found = study.Study(
        [setting], {"d": {key: rows[key] for _, key in runs}}, runs, {("d", "baseline"): "1e-3"}, {}, {}
    )
    results = study_page.results_of(found, setting)
    lines = study_page.dataset_table(found, setting, results).splitlines()[2:]
    assert [line.split("|")[2].strip() for line in lines] == ["agm", "cml", "baseline"]
    assert [line.split("|")[1].strip() for line in lines] == ["1", "2", "3"]
    assert all(line.split("|")[-2].strip() == "10.0" for line in lines)  # audio - 0.1, video - 0.2
