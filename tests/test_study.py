"""The studies: noise and parts of their data, choices on validation only, plans, and the page against slow NumPy."""

import csv
import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from run_folders import make_run
from scipy import stats

from report import compare, ranking, study, study_data, study_page
from report.runs import Difference, protocol_line, read_run
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
    validated, unvalidated = (study.Setting("d", "D", (), validated=value) for value in (True, False))
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
    monkeypatch.setattr(study, "epoch_seconds", lambda root, args, rest: 10.0)
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
    assert {Path(run["data_root"]).name for run in flags} == {"grid_digits_m10"}
    assert {run["learning_rate"] for run in flags} == {3e-4, 1e-3, 3e-3, 1e-2}


def test_the_hours_are_printed_first(data, monkeypatch, capsys) -> None:
    """Four rows: a grid of four rates each, then four more seeds; finished runs are not counted."""
    monkeypatch.setattr(study, "run_all", lambda runs, log_path, jobs: 1)
    words = ("evidence", "views3", "--rows", "baseline,remix,random,x", "--jobs", "2")
    study.train_study(start(data, *words), [])
    assert "32 runs left, about 1.1 hours with 2 at a time (views3 32 of about 240 s)" in capsys.readouterr().out
    done = {"folder-views3_baseline_learning_rate-1e-3_seed0", "folder-views3_x_learning_rate-3e-4_seed4"}
    monkeypatch.setattr(study, "take_stock", lambda run, log_path: "done" if run.name in done else "start")
    study.train_study(start(data, *words), [])
    assert "30 runs left" in capsys.readouterr().out
    monkeypatch.setattr(study, "take_stock", lambda run, log_path: "done")
    study.train_study(start(data, *words), [])
    assert "runs left" not in capsys.readouterr().out


def test_the_seconds_of_an_epoch_are_those_of_the_second(tmp_path, monkeypatch) -> None:
    class Timed:
        def __init__(self, run, action, log_path, env) -> None:
            assert run.flags["epochs"] == 2 and run.flags["method"] == "baseline"
            self.folder, self.process = log_path, Namespace(wait=lambda: None, returncode=0)
            lines = [{"epoch": 0, "seconds_train": 9.0}, {"epoch": 1, "seconds_train": 2.0, "seconds_eval": 0.5}]
            (log_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

        def ask_to_stop(self) -> None: ...

        def last_words(self) -> str:
            return "error: broken"

    monkeypatch.setattr(compare, "Worker", Timed)
    root = tmp_path / "views"
    root.mkdir()
    (root / "dataset.json").write_text(json.dumps({"modalities": [
        {"name": name, "kind": "array", "folder": name} for name in ("x", "y")], "encoder": "mlp"}))  # fmt: skip
    args = Namespace(log_path=str(tmp_path / "runs"), jobs=1)
    assert study.epoch_seconds(root, args, []) == 2.5
    assert not list((tmp_path / "runs").iterdir())
    monkeypatch.setattr(Timed, "__init__", lambda self, *_: setattr(self, "folder", tmp_path) or setattr(
        self, "process", Namespace(wait=lambda: None, returncode=2)))  # fmt: skip
    with pytest.raises(UserError, match="the timed run failed: broken"):
        study.epoch_seconds(root, args, [])


def test_a_single_rate_is_not_tuned(data, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(study, "run_all", lambda runs, log_path, jobs: seen.extend(runs) or 1)
    study.train_study(start(data, "evidence", "mosi", "--rows", "baseline,remix"), [])
    assert [(run.flags["method"], run.flags["learning_rate"]) for run in seen] == [("baseline", 1e-3), ("remix", 1e-3)]


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


def trained_by_hand(runs, log_path: Path, values) -> int:
    """In place of `run_all`: finished runs whose validation and test accuracies by epoch are `values(run)`."""
    for run in runs:
        if not (log_path / run.name).exists():
            flags = {key: value for key, value in run.flags.items() if key not in ("method", "random_seed",
                     "run_name", "from_preset")}  # fmt: skip
            val, test = (each.tolist() for each in values(run))
            make_run(log_path, run.flags["method"], run.flags["random_seed"], test, val, run.name,
                     names=("audio", "video"), **flags)  # fmt: skip
    return 0


def is_remix(run) -> bool:
    return run.flags["method"] == "remix" and run.flags["score"] == "kl"


@pytest.mark.parametrize(("gain", "rows", "words", "seeds"), [
    (0.0, "baseline,remix,random,video", (), 10), (0.3, "baseline,remix,random,video", (), 5),
    (0.0, "baseline,remix", (), 10), (0.0, "baseline,video", (), 5),
    (0.0, "baseline,remix,random,video", ("--seeds", "0,1,2,3,4"), 5)])  # fmt: skip
def test_more_seeds_follow_where_remix_is_undecided(data, monkeypatch, gain, rows, words, seeds) -> None:
    """For the baseline, Remix and the random modality; the protocol's rule, unless --seeds says which."""
    rng = np.random.default_rng(1)

    def values(run) -> np.ndarray:
        return 0.5 + gain * is_remix(run) + rng.normal(0, 0.01, (2, run.flags["epochs"]))

    monkeypatch.setattr(study, "run_all", lambda runs, log_path, jobs: trained_by_hand(runs, log_path, values))
    found, status = study.train_study(start(data, "evidence", "grid_digits_0", "--rows", rows, *words), [])
    expected = {row: range(5 if row == "video" else seeds) for row in rows.split(",")}
    assert status == 0 and {row: sorted(runs) for (_, row), runs in found.runs.items()} == {
        row: list(each) for row, each in expected.items()}  # fmt: skip
    if seeds == 10:  # the first five decide, also when the others have finished
        again, _ = study.train_study(start(data, "evidence", "grid_digits_0", "--rows", rows, *words), [])
        assert {key: sorted(runs) for key, runs in again.runs.items()} == {
            key: sorted(runs) for key, runs in found.runs.items()}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- page


def test_the_page_has_the_numbers_of_the_chosen_epochs(data, monkeypatch, capsys) -> None:
    """Runs are made by hand; means, intervals and p values are compared with NumPy and SciPy."""
    rng = np.random.default_rng(0)

    def values(run) -> np.ndarray:
        return rng.uniform(0.4, 0.5, size=(2, run.flags["epochs"])) + 0.3 * is_remix(run)

    monkeypatch.setattr(study, "run_all", lambda runs, log_path, jobs: trained_by_hand(runs, log_path, values))
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


def test_a_study_of_one_dataset_shows_the_differences_of_its_rows(data, monkeypatch) -> None:
    rng = np.random.default_rng(2)
    drawn = {}

    def values(run) -> np.ndarray:
        return rng.uniform(0.4, 0.5, size=(2, run.flags["epochs"]))

    monkeypatch.setattr(study, "run_all", lambda runs, log_path, jobs: trained_by_hand(runs, log_path, values))
    monkeypatch.setattr(study_page, "forest", lambda rows, path, title, **_: drawn.update({path.name: rows}))
    page = data / "ablations.md"
    assert study.main(["ablations", "--data", str(data / "data"), "--log_path", str(data / "runs"), "--seeds", "0,1,2",
                       "--doc", str(page)]) == 0  # fmt: skip
    text = page.read_text()
    assert "All datasets" not in text and "(ablations-forest.png)" in text
    rows = drawn["ablations-forest"]
    assert [row.label for row in rows][:2] == ["Remix", "Remix, masked encoder runs"] and len(rows) == 5
    saved = json.loads((data / "runs" / "study.json").read_text())["grid_digits_m10"]["rows"]
    means = {row["label"]: row["difference"]["mean"] for row in saved.values() if row["difference"]}
    assert {row.label: row.mean for row in rows} == pytest.approx({label: 100 * mean for label, mean in means.items()})


def test_a_ranked_table_is_in_the_order_of_accuracy(tmp_path) -> None:
    names, rows = ("audio", "video"), study.entries(("audio", "video"))
    runs = {}
    for key, level in {"baseline": 0.5, "agm": 0.7, "cml": 0.6}.items():
        runs["d", key] = {seed: run_of(tmp_path, [0.5] * 8, [level] * 8, seed=seed, names=names, warmup=1,
                                       name=f"{key}{seed}", lr_decay_step=4) for seed in range(2)}  # fmt: skip
    setting = study.Setting("d", "D", (), ranked=True)
    found = study.Study(
        [setting], {"d": {key: rows[key] for _, key in runs}}, runs, dict.fromkeys(runs, "1e-3"), {}, {}
    )
    results = study_page.results_of(found, setting)
    lines = study_page.dataset_table(found, setting, results).splitlines()[2:]
    assert [line.split("|")[2].strip() for line in lines] == ["agm", "cml", "baseline"]
    assert [line.split("|")[1].strip() for line in lines] == ["1", "2", "3"]
    assert all(line.split("|")[-2].strip() == "10.0" for line in lines)  # audio - 0.1, video - 0.2


def ranked(folder: Path, levels: dict[str, list[float]]) -> dict[str, study_page.Result]:
    """The rows of a dataset whose runs have these accuracies, by seed."""
    names, rows = ("audio", "video"), study.entries(("audio", "video"))
    runs = {("d", key): {seed: run_of(folder, [0.5] * 8, [level] * 8, seed=seed, names=names, warmup=1,
                                      name=f"{key}{seed}", lr_decay_step=4) for seed, level in enumerate(own)}
            for key, own in levels.items()}  # fmt: skip
    setting = study.Setting("d", "D", (), ranked=True)
    return study_page.results_of(study.Study([setting], {"d": {key: rows[key] for key in levels}}, runs, {}, {}, {}),
                                 setting)  # fmt: skip


def test_methods_are_ranked_over_the_datasets(tmp_path) -> None:
    one = {"baseline": [0.50, 0.52, 0.51], "remix": [0.60, 0.63, 0.60], "agm": [0.40, 0.43, 0.40],
           "agm+remix": [0.45, 0.47, 0.46], "opm": [0.70, 0.72, 0.71]}  # fmt: skip
    other = {"baseline": [0.80, 0.81, 0.80], "remix": [0.70, 0.72, 0.70], "agm": [0.90, 0.92, 0.91],
             "agm+remix": [0.85, 0.84, 0.86]}  # fmt: skip
    found = {"A": ranked(tmp_path / "a", one), "B": ranked(tmp_path / "b", other)}
    places = {"opm": 1, "agm + Remix": (4 + 2) / 2, "Remix": (2 + 4) / 2, "agm": (5 + 1) / 2, "baseline": (3 + 3) / 2}
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in ranking.ranking_table(found).replace("\xa0", " ").splitlines()[2:]
    ]
    assert {line[0]: float(line[1]) for line in lines} == places
    assert lines[0][0] == "opm" and lines[0][3] == "–"
    mean = 100 * np.mean(np.subtract(one["agm"], one["baseline"]))
    assert any(line[0] == "agm" and f"41.0 ({mean:+.1f} [" in line[2] for line in lines)
    gains = ranking.gain_table(found).replace("\xa0", " ")
    low, high = stats.t.interval(0.95, 2, 5.0, 100 * stats.sem(np.subtract(one["agm+remix"], one["agm"])))
    assert f"+5.0 [{low:+.1f}, {high:+.1f}]" in gains and "no balance method" in gains and "opm" not in gains
    (words,) = ranking.agreement(found)
    common = ["baseline", "remix", "agm", "agm+remix"]
    tau = stats.kendalltau([np.mean(one[key]) for key in common], [np.mean(other[key]) for key in common]).statistic
    assert f"{tau:+.2f}" in words
    opposite = words.split("without 0: ")[1]
    assert "agm (" in opposite and "Remix (" in opposite and "opm" not in opposite
    ranking.draw_ranking(found, tmp_path / "methods")
    assert (tmp_path / "methods.png").stat().st_size > 5_000


def test_differences_are_opposed_only_where_both_intervals_exclude_zero() -> None:
    up, down, unsure = Difference(3, 0.1, 0.05, 0.15), Difference(3, -0.1, -0.2, -0.01), Difference(3, -0.1, -0.2, 0.01)
    assert ranking.opposed(up, down) and ranking.opposed(down, up)
    assert not any(ranking.opposed(up, other) for other in (up, unsure, None, Difference(1, -0.1, None, None)))
