"""Reports on run folders written here: statistics against SciPy, what counts and what does not, what is said of it."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import make_folder, run
from run_folders import by_label, edit_metrics, groups_of, make_run
from scipy import stats

from report import __main__ as command
from report import tables, write
from report.partition import read_partition
from report.people import compare_with_people, read_votes, recognition
from report.runs import (
    epoch_cost,
    find_runs,
    group_runs,
    paired_difference,
    read_run,
    reference_of,
    spread,
    values,
)
from report.share import public_command
from utils.errors import UserError

REPO = Path(__file__).resolve().parents[1]
SUMMARY_TABLE = REPO.parent / "shared" / "data" / "cremad" / "summaryTable.csv"


@pytest.fixture
def figures() -> None:
    """For the tests that look at the figures; the others go without, which take most of a report's time."""


@pytest.fixture(autouse=True)
def no_figures(request, monkeypatch) -> None:
    if "figures" not in request.fixturenames:
        monkeypatch.setattr(write, "write_figures", lambda *_: {})


def make_report(*arguments: Path | str) -> None:
    command.main([str(argument) for argument in arguments])


# ------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_statistics_are_numpys_and_scipys(n: int) -> None:
    rng = np.random.default_rng(n)
    ours, theirs = rng.normal(0.8, 0.02, n), rng.normal(0.75, 0.03, n)
    found = spread(ours)
    assert (found.n, found.mean, found.std) == (n, pytest.approx(ours.mean()), pytest.approx(ours.std(ddof=1)))
    difference = paired_difference(dict(enumerate(ours)), dict(enumerate(theirs)))
    interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))
    assert difference.mean == pytest.approx((ours - theirs).mean())


def test_pairs_are_of_the_same_seed_only() -> None:
    ours, theirs = {0: 0.9, 1: 0.8, 7: 0.1}, {1: 0.5, 0: 0.5, 9: 0.9}
    assert paired_difference(ours, theirs)[:2] == (2, pytest.approx(0.35))
    assert paired_difference(ours, {9: 0.9}) is None
    assert paired_difference(ours, {7: 0.2}) == (1, pytest.approx(-0.1), None, None)
    assert spread([]) is None


def test_every_protocol_reads_its_own_epoch(tmp_path: Path) -> None:
    make_run(tmp_path, "baseline", 0, (0.5, 0.8, 0.8, 0.7), val=(0.9, 0.1, 0.9, 0.2))
    group = groups_of(tmp_path)[0]
    expected = {"last": 0.7, "best_test": 0.8, "best_val": 0.5}  # the first of equally good epochs
    for protocol, accuracy in expected.items():
        assert values(group, "multimodal", protocol) == {0: accuracy}
        assert values(group, "audio", protocol) == {0: accuracy - 0.1}
        assert values(group, "video", protocol) == {0: accuracy - 0.2}
        assert values(group, "macro F1", protocol) == {0: accuracy - 0.01}


def test_csv_and_json_hold_what_numpy_says(tmp_path: Path, figures) -> None:
    last = {"baseline": [0.70, 0.72, 0.68], "remix": [0.75, 0.80, 0.70]}
    for method, accuracies in last.items():
        for seed, accuracy in enumerate(accuracies):
            make_run(tmp_path / "runs", method, seed, (0.5, 0.6, 0.9, accuracy))
    make_report(tmp_path / "runs", "--out", tmp_path / "out")
    with open(tmp_path / "out" / "report.csv", newline="") as file:
        rows = {(r["label"], r["quantity"], r["protocol"]): r for r in csv.DictReader(file)}
    row = rows["remix", "audio", "last"]
    assert (int(row["n"]), row["reference"], int(row["pairs"])) == (3, "baseline", 3)
    assert float(row["mean"]) == pytest.approx(np.mean(last["remix"]) - 0.1)
    assert float(row["std"]) == pytest.approx(np.std(last["remix"], ddof=1))
    interval = stats.ttest_rel(last["remix"], last["baseline"]).confidence_interval()
    assert [float(row["low95"]), float(row["high95"])] == pytest.approx([interval.low, interval.high])
    assert rows["remix", "multimodal", "best_val"]["mean"] == ""  # no validation part
    assert float(rows["remix", "multimodal", "best_test"]["std"]) == 0
    whole = json.loads((tmp_path / "out" / "report.json").read_text())["datasets"]["demo"]
    assert whole[1]["numbers"][0]["by_seed"] == {"0": 0.75, "1": 0.80, "2": 0.70}
    assert whole[1]["minutes"]["mean"] == pytest.approx(2)
    text = (tmp_path / "out" / "report.md").read_text().replace("\xa0", " ")
    assert re.search(r"\| remix +\| 75.0 ± 5.0 \| 65.0 ± 5.0 \| 55.0 ± 5.0 \|", text)
    assert "+5.0 [-2.5, +12.5]" in text and "papers' protocol" in text
    for picture in ("curves", "differences", "shares"):
        assert (tmp_path / "out" / f"demo-{picture}.png").stat().st_size > 5000


# ------------------------------------------------------------------------------------------------- what a user meets


def test_no_run_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"contains no run.*run_compare\.sh"):
        make_report(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        make_report(tmp_path / "absent")
    with pytest.raises(UserError, match="give runs"):
        make_report()


def test_unfinished_runs_are_told_and_never_averaged(tmp_path: Path, capsys) -> None:
    make_run(tmp_path, "baseline", 0)
    stopped = make_run(tmp_path, "baseline", 1, (0.1, 0.1))
    (stopped / "summary.json").unlink()
    longer = make_run(tmp_path, "baseline", 2, (0.1,) * 4)  # its summary is of before it was resumed for more epochs
    config = json.loads((longer / "config.json").read_text())
    (longer / "config.json").write_text(json.dumps(config | {"epochs": 8}))
    torn = make_run(tmp_path, "baseline", 3, (0.1,) * 4)
    (torn / "metrics.jsonl").write_text((torn / "metrics.jsonl").read_text()[:-30])
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    make_report(tmp_path, "--out", tmp_path / "out")
    assert values(groups_of(tmp_path)[0], "multimodal") == {0: 0.7}
    said = capsys.readouterr().out
    text = (tmp_path / "out" / "report.md").read_text()
    for folder, why in ((stopped, "2 of 4 epochs"), (longer, "4 of 8"), (torn, "3 of 4"), (foreign, "not of train.py")):
        assert re.search(f"{folder.name}: .*{why}", said) and re.search(f"{folder.name}: .*{why}", text)


def test_only_unfinished_runs_are_an_error_that_names_them(tmp_path: Path) -> None:
    (make_run(tmp_path, "remix", 0, (0.1,)) / "summary.json").unlink()
    with pytest.raises(UserError, match=r"no finished run among 1: .*remix_0_0: unfinished: 1 of 4 epochs.*--resume"):
        make_report(tmp_path)
    assert not (tmp_path / "report").exists()


def test_one_seed_has_no_interval_and_says_so(tmp_path: Path, capsys) -> None:
    make_run(tmp_path, "baseline", 0)
    make_run(tmp_path, "remix", 0, (0.5, 0.6, 0.8, 0.75))
    make_report(tmp_path)
    said = capsys.readouterr().out
    assert "+5.0 (n=1: no interval)" in said and "±" not in said and "nan" not in said
    assert "The variation between seeds is unknown" in (tmp_path / "report" / "report.md").read_text()


def test_runs_of_other_flags_are_another_row(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path, "remix", seed)
        make_run(tmp_path, "remix", seed, warmup=3)
        make_run(tmp_path, "baseline", seed)
        make_run(tmp_path, "baseline", seed + 2, warmup=3)  # the baseline has no warm-up: the same experiment
    groups = by_label(tmp_path)
    assert list(groups) == ["baseline", "remix", "remix, warmup 3"]
    assert [len(group.runs) for group in groups.values()] == [4, 2, 2]


def test_what_does_not_change_a_result_does_not_split_a_row(tmp_path: Path) -> None:
    make_run(tmp_path, "remix", 0)
    make_run(tmp_path, "remix", 1, device="cuda", cache="none", num_workers=3, gpu_ids="1", learning_rate=1e-3)
    assert len(groups_of(tmp_path)) == 1


def test_rows_of_two_presets_are_called_after_them(tmp_path: Path) -> None:
    for preset, rate in (("fair", 1e-3), ("official", 5e-5)):
        path = make_run(tmp_path, "remix", 0, preset=preset, learning_rate=rate) / "config.json"
        config = json.loads(path.read_text())
        config["from_preset"]["learning_rate"] = rate
        path.write_text(json.dumps(config))
    assert list(by_label(tmp_path)) == ["remix, preset fair", "remix, preset official"]
    make_run(tmp_path, "remix", 0, preset="fair", learning_rate=1e-2)
    assert sorted(by_label(tmp_path)) == ["remix, learning_rate 0.01", "remix, preset fair", "remix, preset official"]


def test_presets_that_differ_in_flags_nobody_gave_are_told_apart(tmp_path: Path) -> None:
    make_run(tmp_path, "remix", 0)
    official = make_run(tmp_path, "remix", 0)
    config = json.loads((official / "config.json").read_text())
    config["from_preset"]["learning_rate"] = config["learning_rate"] = 5e-5
    (official / "config.json").write_text(json.dumps(config))
    assert set(by_label(tmp_path)) == {"remix, learning_rate 0.001", "remix, learning_rate 5e-05"}


def test_variants_have_names_and_untrained_heads_no_numbers(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path, "baseline", seed)
        make_run(tmp_path, "baseline", seed, alpha=0.0, beta=0.0)
        make_run(tmp_path, "remix", seed, score="random")
    groups = by_label(tmp_path)
    assert list(groups) == ["baseline", "joint_only", "remix_random"]
    assert values(groups["joint_only"], "audio") == {} and len(values(groups["joint_only"], "multimodal")) == 2
    assert reference_of(groups["joint_only"], list(groups.values())).label == "baseline"
    make_report(tmp_path)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "joint_only is baseline with `--alpha 0` `--beta 0`." in text and "Not like for like" not in text


def test_a_group_is_compared_with_the_baseline_of_its_own_flags(tmp_path: Path) -> None:
    for rate in (1e-3, 1e-4):
        make_run(tmp_path, "baseline", 0, learning_rate=rate)
        make_run(tmp_path, "remix", 0, learning_rate=rate)
    groups = by_label(tmp_path)
    for rate in ("0.001", "0.0001"):
        group = groups[f"remix, learning_rate {rate}"]
        assert reference_of(group, list(groups.values())).label == f"baseline, learning_rate {rate}"


def test_a_comparison_of_unlike_runs_says_so(tmp_path: Path) -> None:
    make_run(tmp_path, "baseline", 0)
    make_run(tmp_path, "remix", 0, learning_rate=5e-5)
    make_report(tmp_path)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "† **Not like for like**: remix and baseline also differ in learning_rate (5e-05, 0.001)." in text


def test_a_repeated_run_counts_once(tmp_path: Path) -> None:
    make_run(tmp_path, "baseline", 0, (0.1,) * 4, name="older")
    os.utime(tmp_path / "older" / "summary.json", (1, 1))
    make_run(tmp_path, "baseline", 0, name="newer")
    datasets, left_out = group_runs(find_runs([tmp_path, tmp_path / "newer"]))
    assert values(datasets["demo"][0], "multimodal") == {0: 0.7}
    assert [(run.folder.name, "newer" in why) for run, why in left_out] == [("older", True)]


def test_numbers_of_a_table_are_not_broken_over_two_lines() -> None:
    text = tables.table(["row", "a, b"], [["x ± 1, y", "81.2 ± 0.5"], ["two words", "**+3.1† [+1.2, -5.0]**"]])
    assert "81.2\xa0±\xa00.5" in text and "+3.1† [+1.2,\xa0-5.0]" in text and "two words" in text and "1, y" in text


def test_every_data_set_has_its_own_table(tmp_path: Path) -> None:
    make_run(tmp_path, "baseline", 0)
    make_run(tmp_path, "baseline", 0, data_root="data/demo_speech")
    make_run(tmp_path, "baseline", 0, data={"train": 50, "test": 10})  # the demo, but other clips
    make_run(tmp_path, "baseline", 0, dataset="folder", data_root="/somewhere/else/mine")
    datasets, _ = group_runs(find_runs([tmp_path]))
    assert list(datasets) == ["demo, 50 + 10 clips", "demo, 90 + 30 clips", "demo_speech", "mine"]
    assert all(len(groups) == 1 and len(groups[0].runs) == 1 for groups in datasets.values())
    make_report(tmp_path)
    assert (tmp_path / "report" / "report.md").read_text().count("\n## ") == 4


def test_a_held_out_part_is_the_same_data_set_but_another_row(tmp_path: Path) -> None:
    make_run(tmp_path, "baseline", 0)
    clips = {"train": 81, "test": 30, "val": 9}
    make_run(tmp_path, "baseline", 0, val=(0.1, 0.2, 0.3, 0.1), data=clips, val_fraction=0.1)
    assert set(by_label(tmp_path)) == {"baseline", "baseline, val_fraction 0.1"}
    make_report(tmp_path)
    assert "best on validation" in (tmp_path / "report" / "report.md").read_text()


# ------------------------------------------------------------------------------------------------- generated documents


def rows_of(path: Path, head: str) -> dict[str, dict[str, str]]:
    """Method -> column -> cell of the first table whose first line starts with `head`."""
    lines = path.read_text().split(head, 1)[1].split("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in (head + lines).splitlines()]
    return {row[0]: dict(zip(cells[0][1:], row[1:], strict=True)) for row in cells[2:]}


def test_results_and_readme_come_from_the_same_data(tmp_path: Path, figures) -> None:
    for seed in (0, 1):
        make_run(tmp_path / "runs", "remix", seed)
        make_run(tmp_path / "runs", "baseline", seed)
    note = {"bash scripts/run_compare.sh --seeds 0,1": [path.name for path in (tmp_path / "runs").iterdir()]}
    (tmp_path / "runs" / "compare.json").write_text(json.dumps(note))
    readme, results = tmp_path / "README.md", tmp_path / "docs" / "results.md"
    readme.write_text(f"# Title\n\n{write.START}\nold\n{write.END}\n\ntail\n")
    make_report(tmp_path / "runs", "--results", results, "--readme", readme)
    text = readme.read_text()
    assert text.startswith("# Title\n\n<!-- results:start -->\n| method") and text.endswith(
        "<!-- results:end -->\n\ntail\n"
    )
    assert "old" not in text
    write.replace_block(readme, write.readme_block(group_runs(find_runs([tmp_path / "runs"]))[0]))
    assert readme.read_text() == text
    short, full = (rows_of(path, "| method") for path in (readme, results))
    assert list(short) == ["baseline", "remix"]
    for method, cells in short.items():  # the same numbers as in the main table, fewer columns
        assert cells == {name: full[method][name] for name in cells}
        assert {"multimodal", "audio", "video", "n"} <= set(cells)
    for method in ("baseline", "remix"):
        line = f"for seed in 0 1; do python train.py --train --method {method} --random_seed $seed; done"
        assert line in results.read_text()
    assert "    bash scripts/run_compare.sh --seeds 0,1\n" in results.read_text()
    for picture in re.findall(r"\]\((.+?\.png)\)", results.read_text()):
        assert (results.parent / picture).is_file()


@pytest.mark.parametrize("text", ["", "<!-- results:start -->", "<!-- results:end -->\n<!-- results:start -->"])
def test_a_readme_without_markers_is_not_touched(tmp_path: Path, text: str) -> None:
    make_run(tmp_path / "runs", "remix", 0)
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(UserError, match=r"README\.md: needs a line <!-- results:start -->"):
        make_report(tmp_path / "runs", "--readme", readme)
    assert readme.read_text() == text


@pytest.mark.parametrize("module", ["report", "utils.report"])
def test_a_mistake_is_one_line_and_status_2(tmp_path: Path, module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, tmp_path], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_ablations_are_told_with_the_standard_error_of_paired_differences(tmp_path: Path, capsys) -> None:
    plain, loss, easy = [0.70, 0.74, 0.78], [0.72, 0.75, 0.81], [0.60, 0.90, 0.74]
    for seed in range(3):
        make_run(tmp_path, "baseline", seed, [0.5] * 3 + [0.6])
        make_run(tmp_path, "remix", seed, [0.5] * 3 + [plain[seed]], score="kl")
        make_run(tmp_path, "remix", seed, [0.5] * 3 + [loss[seed]], score="loss")
        make_run(tmp_path, "remix", seed, [0.5] * 3 + [easy[seed]], warmup=2)
        make_run(tmp_path, "remix", seed, [0.5] * 3 + [easy[seed]], warmup=2, alpha=0.1)  # two flags away
    text = tables.ablation_table(groups_of(tmp_path)).replace("\xa0", " ")
    rows = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in text.splitlines()[2:]}
    assert len(rows) == 2  # nothing of the baseline, nor of what differs in two flags

    def told(label: str) -> str:
        return next(cell for name, cell in rows.items() if label in name)

    expected = 100 * (np.array(loss) - plain)
    assert told("score kl -> loss") == f"**+{expected.mean():.1f} ± {stats.sem(expected):.1f}**"
    expected = 100 * (np.array(easy) - plain)
    assert abs(expected.mean()) < stats.sem(expected)
    assert told("warmup 1 -> 2") == f"{expected.mean():+.1f} ± {stats.sem(expected):.1f}"  # not bold
    make_report(tmp_path)
    assert "### One flag at a time" in (tmp_path / "report" / "report.md").read_text()


def test_diagnostics_are_in_the_report_where_runs_have_them(tmp_path: Path, figures) -> None:
    for seed in (0, 1):
        folder = make_run(tmp_path, "remix", seed)
        more = {"diagnose/ece_joint": 0.1 + 0.2 * seed, "diagnose/moved": None}
        edit_metrics(folder, lambda line, more=more: line | more)
    make_report(tmp_path)
    text = (tmp_path / "report" / "report.md").read_text().replace("\xa0", " ")
    assert re.search(r"\| remix +\| +0.200 ± 0.141 \|", text) and "demo-diagnostics.png" in text


# -------------------------------------------------------------------------------------------------- a trained model


@pytest.mark.parametrize("names", [("audio", "video"), ("audio", "video", "text")])
def test_pictures_of_a_model(tmp_path: Path, names: tuple[str, ...], capsys) -> None:
    data = make_folder(tmp_path / "data", train=12, test=9)
    if len(names) == 3:
        add_text(data)
    folder = run(data, tmp_path, "r", "--epochs", "2", "--warmup", "1", "--gamma1", "0", "--beta", "0")
    make_report("--model", folder)
    shown = capsys.readouterr().out
    heads = ("slice", "masked", "probe"), ("head", "slice", "masked", "probe")  # video's own head was never trained
    for name, sources in zip(("video", "audio"), heads, strict=True):
        numbers = r"\d\.\d{4}, ".join(f"{source} " for source in sources)
        assert re.search(rf"^{name}: {numbers}\d\.\d{{4}} \(C = 1\)$", shown, re.MULTILINE)
    for name in ("unimodal", "tsne", "confusion", "classes", "clips"):
        assert (folder / "pictures" / f"{name}.png").stat().st_size > 5000
    (folder / "partition.csv").unlink()
    make_report("--model", folder, "--out", tmp_path / "fewer")
    assert {path.name for path in (tmp_path / "fewer").iterdir()} == {"unimodal.png", "tsne.png", "confusion.png"}
    with pytest.raises(UserError, match="not a run"):
        make_report("--model", tmp_path)
    with pytest.raises(UserError, match="classes"):
        make_report("--model", folder, "--data_root", make_folder(tmp_path / "other", classes=("x", "y", "z")))


def add_text(root: Path) -> None:
    """A third modality of vectors, for every clip, and the dataset.json that names it."""
    fields = ({"name": "audio", "kind": "array", "folder": "audio"},
              {"name": "video", "kind": "frames", "folder": "visual", "frames": 2},
              {"name": "text", "kind": "array", "folder": "text", "encoder": "mlp"})  # fmt: skip
    (root / "dataset.json").write_text(json.dumps({"modalities": fields}))
    (root / "text").mkdir()
    rng = np.random.default_rng(0)
    for path in sorted((root / "audio").iterdir()):
        np.save(root / "text" / path.name, rng.normal(size=5).astype(np.float32))


# ---------------------------------------------------------------------------------------------------------- people

needs_table = pytest.mark.skipif(not SUMMARY_TABLE.is_file(), reason="CREMA-D's summaryTable.csv is not here")


@pytest.fixture(scope="module")
def votes() -> dict:
    return read_votes(SUMMARY_TABLE)


def write_partition(path: Path, rows: list[tuple]) -> Path:
    lines = "".join(f"{clip},{clip.split('_')[2]},{a},{v},{kept}\n" for clip, a, v, kept in rows)
    path.write_text("clip,label,kl_audio,kl_video,kept\n" + lines)
    return path


@needs_table
def test_people_recognise_what_was_published(votes: dict) -> None:
    assert len(votes) == 7442
    found = {sense: round(100 * share, 1) for sense, share in recognition(votes).items()}
    assert found == {"voice": 41.6, "face": 66.3, "both": 72.2}


@needs_table
def test_ties_are_shared_and_have_an_intensity_each(votes: dict) -> None:
    assert votes["1001_IEO_ANG_MD"]["voice"] == (0.5, pytest.approx(0.5 * 0.372))  # A:D, 37.2:58.6
    assert votes["1001_IEO_NEU_XX"]["face"] == (1.0, pytest.approx(0.9222))
    assert votes["1001_IEO_HAP_LO"]["voice"] == (0.0, 0.0)  # N


@needs_table
def test_a_model_that_is_like_people_and_one_that_is_not(votes: dict, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def partition(name: str, noise: float, sign: int) -> dict:
        rows = []
        for clip, vote in votes.items():
            a, v = (sign * vote[sense].level + noise * rng.normal() for sense in ("voice", "face"))
            rows.append((clip, a, v, "audio" if a < v else "video"))
        return compare_with_people(read_partition(write_partition(tmp_path / name, rows)), votes)

    like, unlike, blind = partition("like", 0, 1), partition("unlike", 0, -1), partition("blind", 1e6, 1)
    assert like["correlations"][0]["rho_level"] == pytest.approx(1)
    assert unlike["correlations"][3]["rho_level"] == pytest.approx(-1)
    assert (like["level"]["agrees"], like["level"]["kappa"]) == (1, pytest.approx(1))
    assert unlike["level"]["agrees"] == 0
    assert abs(blind["correlations"][0]["rho_right"]) < 0.04 and abs(blind["right"]["kappa"]) < 0.05
    assert blind["right"]["agrees"] == pytest.approx(blind["right"]["chance"], abs=0.03)
    for result in (like, blind):
        assert result["right"]["n"] + result["right"]["equal_for_people"] == 7442 == np.sum(
            result["right"]["counts"]
        ) + result["right"]["equal_for_people"]  # fmt: skip


@needs_table
def test_rank_correlation_and_test_are_scipys(votes: dict, tmp_path: Path) -> None:
    clips = list(votes)[::9]
    rng = np.random.default_rng(1)
    a, v = rng.normal(size=len(clips)), rng.normal(size=len(clips))
    rows = [(clip, x, y, "audio" if x < y else "video") for clip, x, y in zip(clips, a, v, strict=True)]
    found = compare_with_people(read_partition(write_partition(tmp_path / "p.csv", rows)), votes)
    ease = [votes[clip]["face"].right for clip in clips]
    row = next(row for row in found["correlations"] if (row["modality"], row["sense"]) == ("video", "face"))
    assert row["rho_right"] == pytest.approx(stats.spearmanr(v, ease).statistic)
    assert found["right"]["p"] == pytest.approx(stats.fisher_exact(found["right"]["counts"]).pvalue)


@needs_table
def test_the_command_prints_and_writes(votes: dict, tmp_path: Path, capsys) -> None:
    rows = [(clip, 1.0, 0.5, "video") for clip in list(votes)[:50]] + [("1001_NEW_ANG_XX", 1.0, 0.5, "video")]
    write_partition(tmp_path / "partition.csv", rows)
    make_report("--people", SUMMARY_TABLE, "--partition", tmp_path, "--out", tmp_path / "out")
    said = capsys.readouterr().out
    assert "41.6% from the voice alone" in said and "1 more are not in the table" in said
    assert (tmp_path / "out" / "people.md").read_text() in said
    assert json.loads((tmp_path / "out" / "people.json").read_text())["recognition"]["face"] > 0.66


def test_what_is_no_table_or_no_partition_of_cremad(tmp_path: Path) -> None:
    good = tmp_path / "votes.csv"
    head = "FileName,VoiceVote,VoiceLevel,FaceVote,FaceLevel,MultiModalVote,MultiModalLevel\n"
    good.write_text(head + "1001_IEO_ANG_HI,A:D,50:20,A,50,A,50\n")
    partition = write_partition(tmp_path / "partition.csv", [("digit_0_1", 1.0, 2.0, "audio")])
    for arguments, message in (
        ((good, partition), "none of its clips"),
        ((partition, partition), "no column FileName"),
        ((tmp_path / "absent.csv", partition), "cannot be read"),
        ((good, good), "no column clip"),
    ):
        with pytest.raises(UserError, match=message):
            make_report("--people", arguments[0], "--partition", arguments[1])
    good.write_text(head + "1001_IEO_ANG_HI,A:D,50,A,50,A,50\n")
    with pytest.raises(UserError, match="line 2"):
        make_report("--people", good, "--partition", partition)
    with pytest.raises(UserError, match="only valid together"):
        make_report("--people", good)


def test_reading_a_run_twice_gives_it_once(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "baseline", 0)
    assert len(find_runs([folder, tmp_path, folder])) == 1
    assert read_run(folder).problem == ""


def test_an_epochs_cost_is_in_the_baselines_epochs_over_shared_seeds(tmp_path):
    for seed, (joint, remixed) in {0: (10.0, 8.0), 1: (20.0, 30.0)}.items():
        for method, seconds in (("baseline", joint), ("remix", remixed)):
            timed = {"seconds_train": seconds, "seconds_score": 2.0 if method == "remix" else None}
            edit_metrics(make_run(tmp_path, method, seed), lambda line, timed=timed: line | timed)
    make_run(tmp_path, "remix", 2)  # no baseline of its seed
    groups = by_label(tmp_path)
    assert epoch_cost(groups["remix"], groups["baseline"]) == pytest.approx((10 / 10 + 32 / 20) / 2)
    assert tables.maintable(list(groups.values())).splitlines()[-1].endswith(" 1.30 |")


# ------------------------------------------------------------------------------------------------------------ sharing

SECRETS = ("jdoe", "secret", "/home", "10.0.0.1", "gpu-box")


def private_runs(root: Path) -> Path:
    """Runs of two methods whose flags, folders and commands are full of names that are nobody's business."""
    runs = root / "home" / "jdoe" / "secret-project"
    flags = {"dataset": "CREMAD", "data_root": "/home/jdoe/CREMAD-secret", "pretrained": "audio=/home/jdoe/w.pth"}
    for method, accuracies in (("baseline", (0.70, 0.72)), ("remix", (0.75, 0.80))):
        for seed, accuracy in enumerate(accuracies):
            data = {"train": 6698, "test": 744}
            folder = make_run(
                runs, method, seed, (0.5, 0.6, 0.9, accuracy), data=data, names=("audio", "video"), **flags
            )
            path = folder / "config.json"
            config = json.loads(path.read_text())
            config["command"] = f"/home/jdoe/code/train.py {config['command'].removeprefix('train.py ')}"
            config["data"] |= {
                "classes": list("abcdef"),
                "missing": 3,
                "split": {"name": "actor", "source": "/home/jdoe"},
            }
            config["versions"] = {"python": "3.11.9", "torch": "2.11.0", "cuda": "13.0"}
            config["git_commit"] = "b" * 40 + "-dirty"
            config["hardware"] |= {"device": "NVIDIA H100", "cores": 16}
            path.write_text(json.dumps(config))
    return runs


def test_a_shared_result_has_everything_but_names(tmp_path: Path, capsys) -> None:
    runs = private_runs(tmp_path)
    make_report("--share", runs)
    text = capsys.readouterr().out.replace("\xa0", " ")
    assert [secret for secret in (*SECRETS, str(tmp_path)) if secret in text] == []
    assert "### CREMAD, actor split" in text
    assert "| baseline |" in text and " 71.0 ± 1.4 |" in text and "+6.5 [-12.6, +25.6]" in text
    assert "- data: CREMAD, actor split, 6,698 train, 744 test clips of 6 classes, 3 left out" in text
    assert "epochs 4" in text and "pretrained FILE1" in text
    assert "NVIDIA H100, 1 process(es), a CPU, 16 cores, 1 thread(s); 0.13 hours for 4 runs" in text
    assert "- versions: python 3.11.9, torch 2.11.0, cuda 13.0" in text
    assert f"- code: commit {'b' * 40}, with uncommitted changes" in text
    assert "python train.py --train --method remix --dataset CREMAD --data_root PATH --pretrained PATH" in text
    assert not (runs / "report").exists()


def test_the_command_of_a_comparison_is_shared_once_without_paths(tmp_path: Path, capsys) -> None:
    runs = private_runs(tmp_path)
    command = (
        "bash scripts/reproduce.sh cremad RAW --split_dir secret --data_root=/home/jdoe/d --clip a b --seeds 0,1 x/y"
    )
    (runs / "compare.json").write_text(json.dumps({command: [path.name for path in runs.iterdir()]}))
    unfinished = make_run(runs, "remix", 7, data={"train": 6698, "test": 744}, dataset="CREMAD")
    (unfinished / "summary.json").unlink()
    make_report("--share", runs)
    text = capsys.readouterr().out
    shared = "bash scripts/reproduce.sh cremad RAW --split_dir PATH --data_root=PATH --clip PATH PATH --seeds 0,1 PATH"
    assert f"```\n{shared}\n```" in text and "Left out: 1 of 5 runs" in text
    assert [secret for secret in SECRETS if secret in text] == []


@pytest.mark.parametrize(("typed", "shared"), [
    ("/opt/jdoe/train.py --train --resume C:\\\\jdoe --epochs 2", "train.py --train --resume PATH --epochs 2"),
    ("bash /home/jdoe/scripts/run_compare.sh --grid pretrained=/a,/b", "bash scripts/run_compare.sh --grid PATH"),
    ("train.py --pretrained=audio=/home/jdoe/a.pth --method remix", "train.py --pretrained=PATH --method remix"),
    ("train.py --log_path ~jdoe --balance ogm_ge:alpha=0.8", "train.py --log_path PATH --balance ogm_ge:alpha=0.8"),
])  # fmt: skip
def test_paths_leave_a_command(typed: str, shared: str) -> None:
    assert public_command(typed) == shared


def test_runs_on_other_folders_and_weights_stay_apart(tmp_path: Path, capsys) -> None:
    """Hiding a path must not merge two experiments."""
    for i, root in enumerate(("/home/jdoe/a", "/home/jdoe/b")):
        make_run(tmp_path, "remix", 0, (0.1, 0.2, 0.3, 0.4 + i / 10), dataset="CREMAD", data_root=root)
    for name in ("x", "y"):
        make_run(tmp_path, "remix", 0, dataset="KineticSound", pretrained=f"/home/jdoe/{name}.pth")
    make_report("--share", tmp_path)
    text = capsys.readouterr().out
    assert "### CREMAD\n" in text and "### CREMAD-2\n" in text and " 40.0 " in text and " 50.0 " in text
    assert "remix, pretrained FILE1" in text and "remix, pretrained FILE2" in text and "jdoe" not in text


def test_share_prints_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    assert command.parse_args(["--share"]).runs == [Path("runs")]
    with pytest.raises(UserError, match="--share: only prints"):
        command.parse_args(["--share", "runs", "--readme", "README.md"])
    (make_run(tmp_path, "remix", 0) / "summary.json").unlink()
    with pytest.raises(UserError, match="no finished run among 1: there is nothing to share yet"):
        make_report("--share", tmp_path)
