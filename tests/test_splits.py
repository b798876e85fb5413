"""Splits: published lists and their sums, no shared actor, class shares."""

import hashlib
import http.server
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dataset.lists import read_clips
from dataset.prepare import published
from dataset.prepare.lists import actor_split
from dataset.prepare.published import SUMS, published_split, read_kinetics_list
from dataset.specs import get_spec
from dataset.splits import actor_of, hold_out, hold_out_groups
from utils.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_lists = pytest.mark.skipif(not (SHARED / "cremad").is_dir(), reason="the published lists are not on this machine")
FOLDERS = {"CREMAD": SHARED / "cremad", "KineticSound": SHARED / "kinetics_sounds"}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(URL, folder that is served, requested paths) of a loopback web server."""
    asked = []
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "www"))

        def log_message(self, *_):
            asked.append(self.path)

    (tmp_path / "www").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}", tmp_path / "www", asked
        web.shutdown()


def serve(www: Path, dataset: str, monkeypatch) -> dict[str, bytes]:
    """Put small lists of our own on the server and let them be the published ones."""
    texts = {
        "CREMAD": {
            "train.csv": b"1001_DFA_ANG_XX,ANG\r\n1002_DFA_SAD_XX,SAD\r\n",
            "test.csv": b"1003_DFA_ANG_XX,ANG\r\n",
            "stat.csv": b"\xef\xbb\xbfNEU\r\nHAP\r\nSAD\r\nFEA\r\nDIS\r\nANG\r\n",
        },
        "KineticSound": {
            "my_train.txt": b"--4-0ihtnBU_000058_000068,10,4\nabc,10,30\n",
            "my_test.txt": b"-3Mwkq-7TV4_2,10,23\n",
        },
    }[dataset]
    (www / dataset).mkdir()
    for name, text in texts.items():
        (www / dataset / name).write_bytes(text)
    monkeypatch.setitem(published.SUMS, dataset, {n: hashlib.sha256(t).hexdigest() for n, t in texts.items()})
    return texts


@pytest.mark.parametrize("dataset", ["CREMAD", "KineticSound"])
def test_download(server, tmp_path, monkeypatch, dataset):
    url, www, asked = server
    serve(www, dataset, monkeypatch)
    split = published_split(dataset, None, tmp_path / "cache", url)
    assert split.record["name"] == "official" and split.record["sha256"] == published.SUMS[dataset]
    assert split.record["clips"] == {"train": 2, "test": 1}
    if dataset == "KineticSound":
        assert split.classes == [f"{i:02d}" for i in range(31)] and split.parts["train"][0][1] == "04"
        assert [split.classes.index(label) for _, label in split.parts["train"]] == [4, 30]
    count = len(asked)
    assert published_split(dataset, None, tmp_path / "cache", url) == split
    assert len(asked) == count, "lists that are there are not downloaded again"


def test_a_wrong_sum_names_url_and_sums(server, tmp_path, monkeypatch):
    url, www, _ = server
    serve(www, "CREMAD", monkeypatch)
    (www / "CREMAD" / "test.csv").write_bytes(b"1003_DFA_ANG_XX,SAD\n")
    with pytest.raises(UserError) as error:
        published_split("CREMAD", None, tmp_path / "cache", url)
    text = str(error.value)
    assert f"{url}/CREMAD/test.csv" in text and published.SUMS["CREMAD"]["test.csv"] in text
    assert hashlib.sha256(b"1003_DFA_ANG_XX,SAD\n").hexdigest() in text and "--split_dir" in text
    assert not (tmp_path / "cache" / "test.csv").exists()


def test_no_answer_names_url_and_way_out(server, tmp_path):
    url, _, _ = server
    with pytest.raises(UserError, match=r"train\.csv: the server answered 404 .*--split_dir"):
        published_split("CREMAD", None, tmp_path / "cache", url)
    with pytest.raises(UserError, match=r"cannot be downloaded .*--split_dir"):
        published_split("CREMAD", None, tmp_path / "cache", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot be downloaded .*--split_dir"):
        published_split("CREMAD", None, tmp_path / "cache", "no url")


def test_other_lists_in_a_folder_are_taken_and_called_given(tmp_path):
    (tmp_path / "stat.csv").write_text("ANG\nSAD\n")
    (tmp_path / "train.csv").write_text("1001_DFA_ANG_XX,ANG\n")
    (tmp_path / "test.csv").write_text("1002_DFA_SAD_XX,SAD\n")
    split = published_split("CREMAD", tmp_path, tmp_path / "cache")
    assert split.record["name"] == "given" and split.record["source"] == "--split_dir"
    (tmp_path / "test.csv").write_text("1001_DFA_ANG_XX,ANG\n")
    with pytest.raises(UserError, match="both lists"):
        published_split("CREMAD", tmp_path, tmp_path / "cache")
    (tmp_path / "test.csv").unlink()
    with pytest.raises(UserError, match=r"no test\.csv in it"):
        published_split("CREMAD", tmp_path, tmp_path / "cache")


@pytest.mark.parametrize("row", ["a,10", "a,10,31", "a,10,-1", "a,10,x", "../a,10,3", "b,10,1"])
def test_bad_kinetics_rows(tmp_path, row):
    (tmp_path / "my_train.txt").write_text(f"b,10,2\n{row}\n")
    with pytest.raises(UserError, match="line 2"):
        read_kinetics_list(tmp_path / "my_train.txt")


@needs_lists
@pytest.mark.parametrize(("dataset", "counts"), [("CREMAD", (6698, 744)), ("KineticSound", (14799, 2597))])
def test_the_published_lists(dataset, counts, tmp_path):
    split = published_split(dataset, FOLDERS[dataset], tmp_path)
    assert tuple(len(split.parts[part]) for part in ("train", "test")) == counts == get_spec(dataset).counts
    assert split.record["name"] == "official" and split.record["sha256"] == SUMS[dataset]
    if dataset == "CREMAD":
        assert split.record["shared_actors"] == 91
        assert Counter(y for _, y in split.parts["train"]) == get_spec("CREMAD").train_class_counts
    else:
        assert len({label for _, label in split.parts["train"]}) == 31


# By actor -------------------------------------------------------------------------------------------------------------


def shares(rows):
    count = Counter(label for _, label in rows)
    return {label: 100 * count[label] / len(rows) for label in count}


@needs_lists
def test_the_actor_split_of_cremad():
    rows = [row for part in ("train", "test") for row in read_clips(SHARED / "cremad" / f"{part}.csv")]
    split = actor_split(rows, get_spec("CREMAD"))
    train, test = split.parts["train"], split.parts["test"]
    assert not {actor_of(clip) for clip, _ in train} & {actor_of(clip) for clip, _ in test}
    assert sorted(train + test) == sorted(rows) and split.record["complete"]
    assert 0.09 < len(test) / len(rows) < 0.11
    for part in (train, test):
        assert all(abs(share - shares(rows)[label]) < 1 for label, share in shares(part).items())
    assert actor_split(rows[::-1], get_spec("CREMAD")) == split, "the order of the clips does not matter"
    assert {actor_of(clip) for clip, _ in test} == {f"10{n}" for n in (11, 21, 23, 27, 35, 44, 81, 84, 85)}
    record = split.record
    assert record["shared_actors"] == 0 and sum(record["actors"].values()) == 91


def made_up(actors=20, each=12):
    clips = [f"{1001 + a}_S{i}_{'ABC'[i % 3]}_XX" for a in range(actors) for i in range(each)]
    return clips, [clip.split("_")[2] for clip in clips]


def test_actors_are_held_out_whole():
    clips, labels = made_up()
    actors = [actor_of(clip) for clip in clips]
    held = hold_out_groups(actors, labels, 0.1, seed=3)
    kept_actors = {actor_of(clip) for clip, h in zip(clips, held, strict=True) if not h}
    assert held.sum() == 24 and not kept_actors & {actor_of(clip) for clip, h in zip(clips, held, strict=True) if h}
    assert (held == hold_out_groups(actors, labels, 0.1, seed=3)).all()
    assert (held != hold_out_groups(actors, labels, 0.1, seed=4)).any()
    chosen = {actor_of(clip) for clip, h in zip(clips, held, strict=True) if h}
    assert chosen == {"1006", "1018"}, "the same on every machine and with every version of NumPy"
    with pytest.raises(UserError, match="1 group"):
        hold_out_groups(actors[:12], labels[:12], 0.1, seed=3)
    with pytest.raises(UserError, match=r"1 actor.*--split official"):
        actor_split([(f"1001_S{i:02d}_ANG_XX", "ANG") for i in range(12)], get_spec("CREMAD"))


def test_hold_out_takes_of_every_class():
    labels = np.repeat([0, 1, 2, 3], [100, 50, 10, 2])
    held = hold_out(labels, 0.1, seed=0)
    assert [int(held[labels == label].sum()) for label in range(4)] == [10, 5, 1, 1]
    assert np.flatnonzero(hold_out(np.repeat([0, 1], [20, 10]), 0.2, seed=0)).tolist() == [4, 10, 14, 16, 26, 28]
    with pytest.raises(UserError, match="empty"):
        hold_out(np.array([0, 1]), 0.1, seed=0)
