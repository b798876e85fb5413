"""Which runs share a row, what a difference may be compared with, and datasets of any number of modalities."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from run_folders import by_label, edit_metrics, groups_of, make_run

from report.__main__ import main
from report.figures import looks_of, plot_compared_curves, plot_diagnoses, plot_shares
from report.partition import read_partition
from report.runs import balance_methods, command_of, find_runs, flags_of, group_runs, reference_of, values
from report.tables import maintable, notes, quantitytable
from utils.errors import UserError

NAMES = ("audio", "video", "text")


# ------------------------------------------------------------------------------------------------- like for like


def cell(text: str, label: str, column: str) -> str:
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in text.replace("\xa0", " ").splitlines()]
    return next(row for row in rows if row[0] == label)[rows[0].index(column)]


@pytest.mark.parametrize("given", [{"epochs": 8}, {"learning_rate": 5e-5}, {"pack_size": 64}])
def test_a_difference_to_other_flags_is_marked_at_the_number(tmp_path: Path, given: dict, capsys) -> None:
    accuracies = [0.5] * given.get("epochs", 4)
    for seed in (0, 1):
        make_run(tmp_path, "baseline", seed)
        make_run(tmp_path, "remix", seed)
        make_run(tmp_path, "baseline", seed, accuracies, balance="ogm_ge", **given)
    (unlike,) = [group for group in groups_of(tmp_path) if "balance" in group.flags]
    text = maintable(groups_of(tmp_path))
    column = "multimodal – baseline [95 %]"
    assert cell(text, unlike.label, column) == "-20.0† [-20.0, -20.0]"
    assert "†" not in cell(text, "remix", column) and cell(text, "baseline", column) == "–"
    assert cell(text, unlike.label, "epoch / baseline's") == "1.00†"
    assert quantitytable("macro F1", groups_of(tmp_path)).count("†") == 2  # last epoch and best on test
    (name,) = given
    assert re.search(rf"† \*\*Not like for like\*\*: .*ogm_ge.* also differ in {name}", notes(groups_of(tmp_path)))
    main([str(tmp_path), "--out", str(tmp_path / "report")])
    assert "Not like for like" in capsys.readouterr().out  # beside the printed table too
    with open(tmp_path / "report" / "report.csv", newline="") as file:
        marks = {row["label"]: row["not_like_for_like"] for row in csv.DictReader(file)}
    assert marks == {"baseline": "", "remix": "", unlike.label: name}


def test_epochs_separate_rows_and_choose_the_reference(tmp_path: Path) -> None:
    for epochs in (4, 8):
        make_run(tmp_path, "baseline", 0, [0.5] * epochs, epochs=epochs)
        make_run(tmp_path, "remix", 0, [0.6] * epochs, epochs=epochs)
    groups = by_label(tmp_path)
    assert set(groups) == {f"{method}, epochs {n}" for method in ("baseline", "remix") for n in (4, 8)}
    for n in (4, 8):
        assert reference_of(groups[f"remix, epochs {n}"], list(groups.values())).label == f"baseline, epochs {n}"
    assert "†" not in maintable(list(groups.values()))


def test_a_validation_list_in_the_folder_is_another_row(tmp_path: Path) -> None:
    make_run(tmp_path, "baseline", 0)
    make_run(tmp_path, "baseline", 1, data={"train": 81, "val": 9, "test": 30}, val=(0.1,) * 4)
    assert set(by_label(tmp_path)) == {"baseline", "baseline, val_clips 9"}


def test_balance_options_are_flags_whether_given_or_not_and_however_old_the_run(tmp_path: Path) -> None:
    options = {"alpha": 0.8, "noise": "on"}
    make_run(tmp_path, "remix", 0, balance="ogm_ge:alpha=0.8", balance_options={"ogm_ge": options})
    make_run(tmp_path, "remix", 1, balance="ogm_ge", balance_options={"ogm_ge": options})
    make_run(tmp_path, "remix", 2, balance="ogm_ge", ogm_alpha=0.8, ogm_noise="on", pmr_mu=None)
    other = {"ogm_ge": options | {"alpha": 0.5}, "pmr": {"mu": 0.01}}
    make_run(tmp_path, "remix", 0, balance="ogm_ge:alpha=0.5,pmr", balance_options=other)
    make_run(tmp_path, "remix", 0, balance="ogm_ge:alpha=0.5", balance_options={"ogm_ge": other["ogm_ge"]})
    groups = by_label(tmp_path)
    assert list(groups["remix + ogm_ge, ogm_ge.alpha 0.8"].runs) == [0, 1, 2]
    assert set(groups) - {"remix + ogm_ge, ogm_ge.alpha 0.8"} == {
        "remix + ogm_ge, ogm_ge.alpha 0.5",
        "remix + ogm_ge + pmr",
    }


@pytest.mark.parametrize(
    "text, names",
    [("none", ["none"]), ("ogm_ge", ["ogm_ge"]), ("pmr,ogm_ge:alpha=0.8:noise=off", ["pmr", "ogm_ge"]),
     ("gblend:weights=1/2/3,mmpareto", ["gblend", "mmpareto"])],
)  # fmt: skip
def test_balance_methods_are_read_without_their_options(text: str, names: list[str]) -> None:
    assert balance_methods(text) == names


# -------------------------------------------------------------------------------------------------- untrained heads


def test_heads_that_no_loss_reached_show_a_dash(tmp_path: Path) -> None:
    make_run(tmp_path, "remix", 0, alpha=0.0, beta=0.0, warmup=4)  # an older run: all warm-up, no unimodal loss
    make_run(tmp_path, "remix", 0, alpha=0.5, beta=0.5, gamma1=0.0, gamma2=0.0, warmup=0)  # only homogeneous batches
    none = make_run(tmp_path, "baseline", 0, names=NAMES[:2])
    edit_metrics(none, lambda line: line | {"test_acc_audio": None, "test_acc_video": None})
    groups = groups_of(tmp_path)
    assert len(groups) == 3
    text = maintable(groups)
    assert "audio" not in text.splitlines()[0] and "video" not in text.splitlines()[0]  # no row has a number
    make_run(tmp_path, "baseline", 1, beta=0.1)
    text = maintable(groups_of(tmp_path))
    for group in groups:
        assert cell(text, by_flags(groups_of(tmp_path), group.flags).label, "audio") == "–"
        assert values(group, "video") == {}


def by_flags(groups: list, flags: dict):
    return next(group for group in groups if group.flags == flags)


def test_a_head_that_is_trained_from_some_epoch_on_has_a_curve_from_there(tmp_path: Path) -> None:
    for seed in (0, 1):
        folder = make_run(tmp_path, "remix", seed, warmup=2)
        edit_metrics(folder, lambda line: line | ({"test_acc_audio": None} if line["epoch"] < 2 else {}))
    groups = groups_of(tmp_path)
    line = plot_compared_curves(groups, "t", looks_of(groups)).axes[1].lines[0]
    assert np.isnan(line.get_ydata()).tolist() == [True, True, False, False]


# -------------------------------------------------------------------------------------------------- three modalities


@pytest.fixture
def three(tmp_path: Path) -> Path:
    for seed in (0, 1):
        for method in ("baseline", "remix", *NAMES):
            folder = make_run(tmp_path, method, seed, names=NAMES)
            if method in NAMES:
                edit_metrics(folder, lambda line, method=method: line | {
                    f"test_acc_{name}": None for name in NAMES if name != method})  # fmt: skip
            elif method == "remix":
                keys = ("clash_cosine", "shapley", "kept")
                numbers = {f"diagnose/{key}_{name}": 0.1 for key in keys for name in NAMES}
                edit_metrics(folder, lambda line, numbers=numbers: line | numbers | {"diagnose/ece_joint": 0.2})
    return tmp_path


def test_three_modalities_have_columns_rows_and_panels(three: Path) -> None:
    groups = groups_of(three)
    assert [group.label for group in groups] == ["baseline", "remix", *NAMES]
    text = maintable(groups)
    assert [part.strip() for part in text.splitlines()[0].split("|")[2:7]] == ["multimodal", *NAMES, "macro F1"]
    assert cell(text, "text", "text") == "40.0 ± 0.0" and cell(text, "text", "audio") == "–"
    assert "audio, video and text are networks trained on that modality alone" in notes(groups)
    main([str(three), "--out", str(three / "report")])
    whole = (three / "report" / "report.md").read_text()
    assert "kept_video" in whole and "kept_text" not in whole  # the last one follows from the others
    for kind in ("curves", "differences", "shares", "diagnostics"):
        assert (three / "report" / f"demo-{kind}.png").stat().st_size > 5000
    drawn = looks_of(groups)
    assert [axis.get_title(loc="left") for axis in plot_shares(groups, "t", drawn).axes] == [
        f"{name} kept" for name in NAMES
    ]
    shares = [axis.lines[0].get_ydata().tolist() for axis in plot_shares(groups, "t", drawn).axes]
    assert np.allclose(shares, [[1 / 6] * 3, [2 / 6] * 3, [3 / 6] * 3])
    measured = [axis for axis in plot_diagnoses(groups, "t", drawn).axes if axis.lines]
    assert len(measured) == 3 + 3 + 1 + 2


def test_other_modalities_are_another_dataset(three: Path) -> None:
    make_run(three, "remix", 0)
    datasets, _ = group_runs(find_runs([three]))
    assert set(datasets) == {"demo, 90 + 30 clips, audio and video and text", "demo, 90 + 30 clips, audio and video"}


def test_an_older_run_is_of_the_modalities_it_measured(tmp_path: Path) -> None:
    make_run(tmp_path, "baseline", 0)
    make_run(tmp_path, "baseline", 1, names=("audio", "video"))  # the same experiment
    (group,) = groups_of(tmp_path)
    assert (group.modalities, list(group.runs)) == (("audio", "video"), [0, 1])


def test_partitions_of_any_number_of_modalities(tmp_path: Path) -> None:
    path = tmp_path / "partition.csv"
    path.write_text("clip,label,kl_audio,kl_text,kept\nx,a,0.5,1.5,text\ny,b,1,2,audio+text\nz,b,1,2,both\n")
    found = read_partition(tmp_path)
    assert found["x"] == ("a", {"audio": 0.5, "text": 1.5}, ("text",))
    assert found["y"].kept == found["z"].kept == ("audio", "text")
    with pytest.raises(UserError, match="no column kl_video"):
        read_partition(path, ("audio", "video"))


# -------------------------------------------------------------------------------------------------------- commands


def test_the_command_of_a_row_leaves_out_what_differs_by_machine_and_seed(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "remix", 3)
    config = json.loads((folder / "config.json").read_text())
    words = "train.py --train --method remix --gpu_ids 0 --diagnose --lr_decay_step 5 --random_seed 3 --resume auto"
    (folder / "config.json").write_text(json.dumps(config | {"command": f"{words} --log_path=a --run_name r"}))
    (group,) = groups_of(tmp_path)
    assert command_of(group) == "python train.py --train --method remix --lr_decay_step 5 --random_seed 3"


def test_flags_that_a_method_does_not_read_are_not_its_own() -> None:
    config = {"epochs": 1, "alpha": 0.1, "gamma1": 0.2, "gamma2": 0.3, "warmup": 4, "balance": "none", "data": {}}
    assert flags_of(config | {"method": "audio"}) == {"epochs": 1, "gamma2": 0.3}
    assert flags_of(config | {"method": "video"}) == {"epochs": 1, "gamma1": 0.2}
    assert flags_of(config | {"method": "text"}) == {"epochs": 1, "gamma2": 0.3}  # all but video have audio's weights
    assert flags_of(config | {"method": "baseline"}) == {"alpha": 0.1, "epochs": 1}
    assert flags_of(config | {"method": "remix"}).keys() == {"epochs", "alpha", "gamma1", "gamma2", "warmup"}
