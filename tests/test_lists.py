"""Lists of clips and classes: what is accepted, what is refused and how the refusal reads."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import make_folder
from hypothesis import given
from hypothesis import strategies as st

from dataset import lists
from dataset.folder import digest, load_folder, split_by_actor, split_validation
from dataset.inspect import inspect_folder
from dataset.lists import check_clip_id, read_classes, read_clips, read_record
from dataset.specs import get_spec, spec_of
from utils.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_lists = pytest.mark.skipif(not (SHARED / "cremad").is_dir(), reason="the published lists are not on this machine")


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("text", ["b\na\n", "\ufeffb\r\na\r\n", '"a"\n\n"b"', " a \n b \n"])
def test_classes_are_sorted_whatever_the_dialect(tmp_path, text):
    assert read_classes(write(tmp_path / "stat.csv", text)) == ["a", "b"]


def test_class_names_may_hold_commas_in_quotes(tmp_path):
    assert read_classes(write(tmp_path / "stat.csv", '"playing piano, loud"\nrain\n'))[0] == "playing piano, loud"


@pytest.mark.parametrize(
    ("text", "words"), [("", "no class names"), ("a\nb\na\n", "line 3"), ("a,b\n", "line 1"), (b"a\n\xff\n", "UTF-8")]
)
def test_bad_class_lists(tmp_path, text, words):
    with pytest.raises(UserError, match=words) as error:
        read_classes(write(tmp_path / "stat.csv", text))
    assert "stat.csv" in one_line(error)


@pytest.mark.parametrize("text", ["c2,b\nc1,a\n", "\ufeffc2,b\r\nc1,a\r\n", '"c2","b"\n\nc1, a'])
def test_clips_keep_file_order(tmp_path, text):
    assert read_clips(write(tmp_path / "train.csv", text), ["a", "b"]) == [("c2", "b"), ("c1", "a")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("c1,a\nc2\n", "line 2: 'c2' is not clip,label"),
        ("c1,a\nc2,a,3\n", "line 2"),
        ("c1,a\nc2,z\n", "line 2: label 'z' of clip c2 is not in stat.csv"),
        ("c1,a\nc2,b\nc1,b\n", "line 3: clip c1 is also in line 1"),
        ("../../etc/passwd,a\n", "line 1: clip id '../../etc/passwd'"),
        ("", "no clips"),
        (b"c1,a\n\xff\xfe,b\n", "UTF-8"),
        ("c" * 200_000 + ",a\n", "not a CSV file"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, text, words):
    with pytest.raises(UserError) as error:
        read_clips(write(tmp_path / "train.csv", text), ["a", "b"])
    assert words in one_line(error)
    assert "train.csv" in str(error.value)


def test_a_missing_list_says_so(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_clips(tmp_path / "train.csv")


def test_absurd_files_are_refused_before_they_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(lists, "MAX_ROWS", 10)
    with pytest.raises(UserError, match="more than 10 rows"):
        read_clips(write(tmp_path / "train.csv", "".join(f"c{i},a\n" for i in range(50))))
    monkeypatch.setattr(lists, "MAX_LIST_BYTES", 2**20)
    with open(tmp_path / "big.csv", "wb") as file:
        file.truncate(2**30)  # sparse
    with pytest.raises(UserError, match="larger than 1 MiB"):
        read_clips(tmp_path / "big.csv")


@pytest.mark.parametrize(
    "clip", ["", ".", "..", "../x", "a/b", "a\\b", "a\0b", "a\nb", "a\x7fb", "a\u202eb", ".tmp-x", "x" * 256, "ä" * 130]
)
def test_unsafe_clip_ids(clip):
    with pytest.raises(UserError, match="clip id"):
        check_clip_id(clip)


@pytest.mark.parametrize(
    "clip", ["1001_DFA_ANG_XX", "--4-0ihtnBU_000058_000068", "-3Mwkq-7TV4_2", "clip 1", "тест", "a..b"]
)
def test_real_clip_ids(clip):
    check_clip_id(clip)


@given(st.text(max_size=300))
def test_an_accepted_id_stays_in_its_folder(clip):
    try:
        check_clip_id(clip)
    except UserError:
        return
    path = Path("/data/visual") / clip
    assert path.parent == Path("/data/visual")
    assert path.name == clip
    assert len(f"{clip}.npy".encode()) <= 255


def test_records(tmp_path):
    assert read_record(tmp_path, "split.json") == {}
    write(tmp_path / "split.json", '{"name": "official"}')
    assert read_record(tmp_path, "split.json") == {"name": "official"}
    for text in ("[1]", "{", b"\xff", "[" * 100_000):
        with pytest.raises(UserError, match=r"split\.json"):
            read_record(write(tmp_path / "split.json", text).parent, "split.json")


@needs_lists
def test_the_published_cremad_lists():
    folder = SHARED / "cremad"
    classes = read_classes(folder / "stat.csv")
    assert tuple(classes) == get_spec("CREMAD").classes
    train, test = (read_clips(folder / f"{part}.csv", classes) for part in ("train", "test"))
    assert (len(train), len(test)) == get_spec("CREMAD").counts == (6698, 744)
    assert {name: sum(label == name for _, label in train) for name in classes} == get_spec("CREMAD").train_class_counts
    assert all(clip.split("_")[2] == label for clip, label in train + test)
    assert not {clip for clip, _ in train} & {clip for clip, _ in test}


# The folder -----------------------------------------------------------------------------------------------------------


def test_a_valid_folder_is_listed_in_order(tmp_path):
    root = make_folder(tmp_path / "data", audio_shape=(12, 20))
    folder = load_folder(root, get_spec("folder"))
    assert folder.classes == ["a", "b", "c"]
    assert folder.shapes == {"audio": (12, 20)} and folder.spec == get_spec("folder")
    assert folder.missing == [] and folder.split == {}
    train = folder.parts["train"]
    assert train.clips == [f"train_{i:04d}" for i in range(24)]
    assert train.labels.dtype == "int64" and train.labels.tolist() == [i % 3 for i in range(24)]
    assert [path.name for path in train.files["video"][0]] == [f"frame_{k:05d}.jpg" for k in (1, 2, 3)]
    assert train.files["audio"][5] == root / "audio" / "train_0005.npy"


def make_three(root: Path) -> Path:
    """A folder of three modalities: audio, video and vectors of 7 numbers, as its dataset.json says."""
    make_folder(root)
    (root / "text").mkdir()
    for i, clip in enumerate(sorted(path.name for path in (root / "visual").iterdir())):
        np.save(root / "text" / f"{clip}.npy", np.full(7, i, np.float32))
    modalities = [
        {"name": "audio", "kind": "array", "folder": "audio"},
        {"name": "video", "kind": "frames", "folder": "visual"},
        {"name": "text", "kind": "array", "folder": "text"},
    ]
    write(root / "dataset.json", json.dumps({"modalities": modalities}))
    return root


def test_any_number_of_modalities(tmp_path):
    root = make_three(tmp_path / "data")
    spec = spec_of("folder", root)
    folder = load_folder(root, spec)
    assert folder.shapes == {"audio": (33, 20), "text": (7,)} and folder.spec is spec
    part = folder.parts["test"]
    assert list(part.files) == ["audio", "video", "text"]
    assert part.files["text"][3] == root / "text" / "test_0003.npy" and len(part.files["video"][3]) == 3
    train, val = split_validation(folder.parts["train"], 0.25, None)
    assert [path.stem for path in val.files["text"]] == val.clips and len(train.files["video"]) == len(train.clips)
    np.save(root / "text" / "train_0001.npy", np.zeros(8, np.float32))
    (root / "text" / "train_0002.npy").unlink()
    np.save(root / "text" / "train_0003.npy", np.float32(1))
    with pytest.raises(UserError, match=r"3 problem\(s\)"):
        load_folder(root, spec)
    reasons = {problem.clip: problem.reason for problem in load_folder(root, spec, allow_missing=True).missing}
    assert "array of shape (8,), not (7,)" in reasons["train_0001"] and reasons["train_0002"] == "no such file"
    assert "of shape ()" in reasons["train_0003"]


def test_the_actor_split_keeps_files_with_their_clips(tmp_path):
    folder = load_folder(make_three(tmp_path / "data"), spec_of("folder", tmp_path / "data"))
    renamed = {
        name: part._replace(clips=[f"{1000 + i % 5}_{name}_{i}" for i in range(len(part.clips))])
        for name, part in folder.parts.items()
    }
    files = {clip: part.files["text"][i] for part in renamed.values() for i, clip in enumerate(part.clips)}
    again = split_by_actor(folder._replace(parts=renamed))
    actors = {name: {clip[:4] for clip in part.clips} for name, part in again.parts.items()}
    assert not actors["train"] & actors["test"] and again.split["name"] == "actor"
    for part in again.parts.values():
        assert list(part.files["text"]) == [files[clip] for clip in part.clips]
    assert sum(len(part.clips) for part in again.parts.values()) == 36 and again.groups == {c: c[:4] for c in files}


def test_the_digest_is_of_clips_and_labels(tmp_path):
    part = load_folder(make_folder(tmp_path / "a"), get_spec("folder")).parts["train"]
    other = load_folder(make_folder(tmp_path / "b"), get_spec("folder")).parts["train"]
    assert digest(part) == digest(other) != digest(part._replace(labels=part.labels[::-1]))


def test_faults_stop_unless_allowed_and_are_named(tmp_path):
    root = make_folder(tmp_path / "data")
    (root / "audio" / "train_0003.npy").unlink()
    (root / "visual" / "test_0001" / "frame_00002.jpg").write_bytes(b"")
    with pytest.raises(UserError) as error:
        load_folder(root, get_spec("folder"))
    text = one_line(error)
    assert "2 problem(s)" in text and "train_0003.npy: no such file" in text and "frame_00002.jpg: empty file" in text
    assert f"python -m dataset.prepare --check {root} --dataset folder" in text and "--allow_missing" in text
    folder = load_folder(root, get_spec("folder"), allow_missing=True)
    assert {problem.clip for problem in folder.missing} == {"train_0003", "test_0001"}
    assert len(folder.parts["train"].clips) == 23 and len(folder.parts["test"].clips) == 11
    assert "train_0003" not in folder.parts["train"].clips


def test_faulty_lists_are_no_missing_clips(tmp_path):
    root = make_folder(tmp_path / "data")
    with open(root / "test.csv", "a") as file:
        file.write("train_0000,a\n")
    with pytest.raises(UserError, match="also in train"):
        load_folder(root, get_spec("folder"), allow_missing=True)


def test_a_folder_without_one_valid_clip_in_a_part(tmp_path):
    root = make_folder(tmp_path / "data", test=2)
    for path in (root / "audio").glob("test_*"):
        path.unlink()
    with pytest.raises(UserError, match=r"no valid clip in test\.csv"):
        load_folder(root, get_spec("folder"), allow_missing=True)


def test_classes_of_a_named_dataset_must_agree(tmp_path):
    with pytest.raises(UserError, match="ANG"):
        load_folder(make_folder(tmp_path / "data"), get_spec("CREMAD"))


def test_no_folder_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="prepare it first"):
        load_folder(tmp_path / "nowhere", get_spec("CREMAD"))


def test_validation_part(tmp_path):
    part = load_folder(make_folder(tmp_path / "data", train=60), get_spec("folder")).parts["train"]
    train, val = split_validation(part, 0.2, groups=None)
    assert sorted(train.clips + val.clips) == sorted(part.clips)
    assert [val.labels.tolist().count(label) for label in range(3)] == [4, 4, 4]
    assert split_validation(part, 0.2, groups=None)[1].clips == val.clips
    assert all(path.stem == clip for path, clip in zip(val.files["audio"], val.clips, strict=True))
    for fraction in (0, 1, -1, 1.5):
        with pytest.raises(UserError, match="val_fraction"):
            split_validation(part, fraction, groups=None)


def test_a_validation_part_shares_no_group_with_training(tmp_path):
    root = make_folder(tmp_path / "data", train=60, test=6)
    clips = [row.split(",")[0] for part in ("train", "test") for row in (root / f"{part}.csv").read_text().split()]
    microphone = {clip: f"mic {i // 10}" for i, clip in enumerate(clips)}  # six of ten clips; the test clips' own
    write(root / "groups.csv", "".join(f"{clip},{name}\n" for clip, name in [*microphone.items(), ("unused", "x")]))
    folder = load_folder(root, get_spec("folder"))
    train, val = split_validation(folder.parts["train"], 0.2, folder.groups)
    assert sorted(train.clips + val.clips) == sorted(folder.parts["train"].clips) and len(val.clips) == 10
    assert not {microphone[clip] for clip in train.clips} & {microphone[clip] for clip in val.clips}
    assert set(val.labels.tolist()) == set(train.labels.tolist())
    numbers = inspect_folder(root, get_spec("folder")).numbers
    assert numbers["groups"] == {"train": 6, "test": 1} and numbers["groups_in_train_and_test"] == 0
    write(root / "groups.csv", "".join(f"{clip},one\n" for clip in clips))
    folder = load_folder(root, get_spec("folder"))
    with pytest.raises(UserError, match="1 group"):
        split_validation(folder.parts["train"], 0.2, folder.groups)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("", "no group for clip train_0001"),
        ("train_0001,", "line 2: 'train_0001,' is not clip,group.*no group"),
        ("train_0001", "line 2: 'train_0001' is not clip,group"),
        ("train_0001,a,b", "line 2: 'train_0001,a,b' is not clip,group"),
        ("train_0000,b", "line 2: clip train_0000 is also in line 1"),
        ("a/x,b", "line 2: clip id 'a/x' holds a slash"),
    ],
)
def test_a_faulty_list_of_groups_is_refused_by_line(tmp_path, line, complaint):
    root = make_folder(tmp_path / "data")
    clips = [row.split(",")[0] for part in ("train", "test") for row in (root / f"{part}.csv").read_text().split()]
    assert clips[:2] == ["train_0000", "train_0001"]
    write(root / "groups.csv", "\n".join(["train_0000,a", line, *(f"{clip},b" for clip in clips[2:])]) + "\n")
    for allow_missing in (False, True):
        with pytest.raises(UserError, match=f"groups.csv: {complaint}") as error:
            load_folder(root, get_spec("folder"), allow_missing)
        one_line(error)
