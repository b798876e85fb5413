"""Optical flow, sequences of any length, PNG frames and casts: what is stored, fed and encoded, on either data path."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import make_folder, run
from torch import distributed, nn
from torch.nn.utils.rnn import pack_padded_sequence

import remix
from dataset import pack as pack_module
from dataset.augment import IMAGENET_MEAN, IMAGENET_STD, reverse_flow
from dataset.clips import Feed, ResidentClips, choose_cache, make_clips
from dataset.folder import Folder, load_folder
from dataset.inspect import inspect_folder, list_frames
from dataset.pack import Rows, in_order, open_pack, pack_bytes
from dataset.prepare.__main__ import main as prepare
from dataset.specs import AUDIO_RECIPES, SPECS, description, logmel, recipe_of, spec_of
from models import build_model
from models.encoders import GRU, MeanSteps, Sequences
from utils.errors import UserError

CPU = torch.device("cpu")
MODALITIES = [
    {"name": "flow", "kind": "frames", "folder": "flow", "frames": 2, "channels": 2, "like": "video"},
    {"name": "audio", "kind": "array", "folder": "audio"},
    {"name": "video", "kind": "frames", "folder": "visual", "frames": 2},
    {"name": "text", "kind": "sequence", "folder": "text"},
    {"name": "touch", "kind": "array", "folder": "touch"},
]
SIZE = (40, 48)


def make_five(root: Path, train: int = 24, test: int = 12) -> Path:
    """Audio, video, sequences of 1 to 9 steps in float64, vectors in column order, and flow.

    The flow is the very pictures of the video, as PNG: ramps from left to right in red, from top to bottom in green.
    """
    make_folder(root, train=train, test=test)
    rng = np.random.default_rng(0)
    for name in ("text", "touch", "flow"):
        (root / name).mkdir()
    for i, clip in enumerate(sorted(path.name for path in (root / "visual").iterdir())):
        shutil.rmtree(root / "visual" / clip)
        for k in range(3 + i % 3):
            picture = np.zeros((*SIZE, 3), np.uint8)
            picture[..., 0] = np.linspace(5 * k, 200 + i, SIZE[1])[None, :]
            picture[..., 1] = np.linspace(10 * k, 150, SIZE[0])[:, None]
            for folder in ("visual", "flow"):
                path = root / folder / clip / f"frame_{k + 1}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), picture[..., ::-1])
        np.save(root / "text" / f"{clip}.npy", rng.normal(size=(1 + i % 9, 5)))
        np.save(root / "touch" / f"{clip}.npy", np.asfortranarray(rng.normal(size=(6, 4)).astype(np.float32)))
    (root / "dataset.json").write_text(json.dumps({"modalities": MODALITIES, "image_size": 32, "crop_area": [0.3, 1]}))
    return root


def load_five(root: Path) -> Folder:
    return load_folder(root, spec_of("folder", root))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Folder:
    return load_five(make_five(tmp_path_factory.mktemp("five") / "data"))


def batches(folder: Folder, cache: str, seed: int | None = None, workers: int = 0, pack_size: int | None = None):
    spec = folder.spec
    feed = Feed(spec.modalities, 32, CPU, cache, workers, spec.crop_area, spec.mirror, pack_size)
    clips = make_clips(folder.root, "train", folder.parts["train"], folder.shapes, feed)
    order = torch.Generator().manual_seed(1)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return clips, list(clips.epoch(remix.batches_of(24, 7, spec.names, order), generator))


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Normalised RGB (B, T, 3, S, S) in levels of 255."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images * std + mean) * 255


# Optical flow ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["ram", "none"])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_flow_is_seen_through_the_videos_window_and_mirrored_as_motion(folder, cache, seed):
    mirrored = 0
    for batch in batches(folder, cache, seed)[1]:
        video, flow = pixels(batch.inputs["video"]), (batch.inputs["flow"] + 1) * 127.5
        assert flow.shape == (len(batch.clips), 2, 2, 32, 32)
        assert (flow[:, :, 1] - video[:, :, 1]).abs().max() < 0.01, "along y: the same frame, the same window"
        reversed_x = video[:, :, 0, :, -1] < video[:, :, 0, :, 0]  # the ramp runs to the left: a mirrored picture
        flips = reversed_x.all(dim=-1)
        assert torch.equal(flips, reversed_x.any(dim=-1))
        mirrored += int(flips.sum())
        x = torch.where(flips[..., None, None], 255 - video[:, :, 0], video[:, :, 0])
        assert (flow[:, :, 0] - x).abs().max() < 0.01
        assert batch.inputs["flow"].abs().max() <= 1
    assert mirrored == 0 if seed is None else 10 < mirrored < 38


def test_rgb_is_fed_as_without_flow(folder):
    """Sharing draws nothing from the generator: adding flow to a dataset changes no crop of its video."""
    alone = folder._replace(spec=spec_of("folder", folder.root))
    without = tuple(modality for modality in alone.spec.modalities if modality.name != "flow")
    feed = Feed(without, 32, CPU, "ram", crop_area=(0.3, 1))
    plan = remix.batches_of(24, 7, ("audio", "video"), torch.Generator().manual_seed(1))
    clips = make_clips(folder.root, "train", folder.parts["train"], folder.shapes, feed)
    for a, b in zip(clips.epoch(plan, torch.Generator().manual_seed(3)), batches(folder, "ram", 3)[1], strict=True):
        assert torch.equal(a.inputs["video"], b.inputs["video"])


def test_reversed_motion_is_the_negative():
    motion = torch.randint(-20, 21, (4, 2, 3, 3)).float()
    levels = (motion + 20) * 255 / 40
    flips = torch.tensor([True, False, True, False])
    back = reverse_flow(levels, flips) * 40 / 255 - 20
    torch.testing.assert_close(back[:, 0], torch.where(flips[:, None, None], -motion[:, 0], motion[:, 0]))
    torch.testing.assert_close(back[:, 1], motion[:, 1])


def test_smaller_flow_is_seen_through_the_same_window(tmp_path):
    root = make_five(tmp_path / "data")
    for path in (root / "flow").rglob("*.png"):
        cv2.imwrite(str(path), cv2.resize(cv2.imread(str(path)), (24, 20), interpolation=cv2.INTER_AREA))
    folder = load_five(root)
    for cache in ("ram", "none"):
        for batch in batches(folder, cache, 0)[1]:
            video, flow = pixels(batch.inputs["video"]), (batch.inputs["flow"] + 1) * 127.5
            assert (flow[:, :, 1] - video[:, :, 1]).abs().mean() < 4, "levels; a pixel of the ramp is 4 to 8"


def test_flow_needs_a_frame_for_each_of_the_videos(tmp_path, capsys):
    root = make_five(tmp_path / "data")
    (root / "flow" / "train_0003" / "frame_1.png").unlink()
    with pytest.raises(UserError, match=r"train_0003: 2 frames; video has 3, and both are picked together") as error:
        load_five(root)
    assert "\n" not in str(error.value)
    assert prepare(["--check", str(root)]) == 1 and "frame_counts: 1" in capsys.readouterr().out
    assert len(load_folder(root, spec_of("folder", root), allow_missing=True).parts["train"].clips) == 23


# Sequences ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cache", "workers"), [("ram", 0), ("none", 0), ("none", 2)])
def test_sequences_are_the_files_without_padding(folder, cache, workers):
    part = folder.parts["train"]
    for batch in batches(folder, cache, 0, workers)[1]:
        text = batch.inputs["text"]
        assert isinstance(text, Sequences)
        whole = [np.load(part.files["text"][i]).astype(np.float32) for i in batch.clips]
        assert np.array_equal(text.rows.numpy(), np.concatenate(whole))
        assert text.lengths.tolist() == [len(steps) for steps in whole] and text.longest == max(map(len, whole))
        padded = text.padded(text.rows).numpy()
        for row, steps in zip(padded, whole, strict=True):
            assert np.array_equal(row[: len(steps)], steps) and not row[len(steps) :].any()
        touch = [np.load(part.files["touch"][i]) for i in batch.clips]
        assert np.array_equal(batch.inputs["touch"][:, 0].numpy(), np.stack(touch)), "column order is no other order"


def ragged(lengths: list[int], width: int = 5, seed: int = 0) -> Sequences:
    rows = torch.randn(sum(lengths), width, generator=torch.Generator().manual_seed(seed))
    return Sequences.of(rows, torch.tensor(lengths))


def test_the_gru_equals_torchs_packed_sequences():
    torch.manual_seed(0)
    encoder, x = GRU(5).eval(), ragged([3, 7, 1, 4])
    packed = pack_padded_sequence(x.padded(encoder.norm(x.rows)), x.lengths, batch_first=True, enforce_sorted=False)
    outputs, counts = nn.utils.rnn.pad_packed_sequence(encoder.gru(packed)[0], batch_first=True)
    reference = outputs.sum(dim=1) / counts[:, None]
    torch.testing.assert_close(encoder(x), reference)
    for i, (start, length) in enumerate(zip((0, 3, 10, 11), (3, 7, 1, 4), strict=True)):
        alone = Sequences.of(x.rows[start : start + length], torch.tensor([length]))
        torch.testing.assert_close(encoder(alone)[0], reference[i])


def test_padding_is_in_no_statistic_and_no_mean():
    x = ragged([3, 7, 1, 4])
    encoder = GRU(5).train()
    encoder(x)
    torch.testing.assert_close(encoder.norm.running_mean, 0.1 * x.rows.mean(dim=0))
    means = torch.stack([steps.mean(dim=0) for steps in x.rows.split(x.lengths.tolist())])
    torch.testing.assert_close(x.mean(x.padded(x.rows)), means)
    mean = MeanSteps(5).eval()
    torch.testing.assert_close(mean(x), mean.mlp(means))


@pytest.mark.parametrize("encoder", [None, "gru", "mean"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_network_takes_sequences_and_flow(folder, encoder, precision):
    modalities = [dict(fields) for fields in MODALITIES]
    modalities[3]["encoder"] = encoder
    (folder.root / "dataset.json").write_text(json.dumps({"modalities": modalities}))
    spec = spec_of("folder", folder.root)
    model = build_model(spec.modalities, folder.shapes, 3, "resnet18_thin", precision=precision)
    assert tuple(model.encoders["flow"].conv1.weight.shape) == (16, 2, 7, 7)
    batch = batches(folder, "ram", 0)[1][0]
    output = model(batch.inputs, spec.names)
    assert all(logits.shape == (7, 3) and logits.dtype == torch.float32 for logits in output.heads.values())
    output.joint.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name.startswith("encoders.text"))
    output = model({"text": batch.inputs["text"]}, ("text",))
    assert not output.features["video"].any() and output.features["text"].any()


def test_ddp_hands_sequences_through(folder, tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = build_model(folder.spec.modalities, folder.shapes, 3, "resnet18_thin").eval()
        batch = batches(folder, "ram", 0)[1][0]
        wrapped = nn.parallel.DistributedDataParallel(model)(batch.inputs, folder.spec.names)
        assert torch.equal(wrapped.joint, model(batch.inputs, folder.spec.names).joint)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.ones(5), r"array of shape \(5,\); a sequence has two dimensions"),
        (np.ones((3, 6)), "steps of 6 numbers, not 5; make it again"),
        (np.ones((0, 5)), r"array of shape \(0, 5\); one or more dimensions of at least 1"),
        (np.full((2, 5), np.nan), "NaN or infinity in it"),
        (np.full((2, 5), 1e200), "a number too large for float32 in it"),
        (np.ones((2, 5), np.complex128), "array of type complex128; real numbers"),
    ],
)
def test_wrong_sequences_are_one_line(tmp_path, capsys, array, reason):
    root = make_five(tmp_path / "data")
    np.save(root / "text" / "train_0001.npy", array)
    with pytest.raises(UserError, match=reason) as error:
        open_pack(root, "train", (found := load_five(root)).parts["train"], {}, {"text": found.shapes["text"]})
    assert "\n" not in str(error.value) and "--check" in str(error.value)
    assert prepare(["--check", str(root), "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["kind"] == "bad_array" and problem["path"].endswith("text/train_0001.npy")


def test_arrays_of_different_lengths_are_told_of_sequences(tmp_path):
    root = make_five(tmp_path / "data")
    np.save(root / "touch" / "train_0001.npy", np.ones((5, 4), np.float32))
    with pytest.raises(UserError, match=r'array of shape \(5, 4\), not \(6, 4\); .* kind "sequence" in dataset.json'):
        load_five(root)
    modalities = [*MODALITIES[:-1], MODALITIES[-1] | {"encoder": "gru"}]
    (root / "dataset.json").write_text(json.dumps({"modalities": modalities}))
    with pytest.raises(UserError, match=r'gru of touch: takes sequences, .* \(6, 4\); give them the kind "sequence"'):
        build_model(spec_of("folder", root).modalities, {"audio": (33, 20), "text": (9, 5), "touch": (6, 4)}, 3)


# Frames and arrays as people have them -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        [f"frame_0000{k}.jpg" for k in (1, 2, 9, 10, 11, 100)],
        [f"{k}.png" for k in (0, 3, 20, 100)],
        ["a2_1.jpg", "a2_10.jpg", "a10_2.jpg"],
        ["1.JPG", "01.jpg", "2.jpeg"],
    ],
)
def test_frames_are_sorted_by_number(tmp_path, names):
    for name in sorted(names):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".hidden.jpg").write_bytes(b"x")
    (tmp_path / "notes.txt").write_bytes(b"x")
    assert [name for name, _ in list_frames(str(tmp_path))] == names


def test_a_frame_in_two_formats_is_refused(tmp_path):
    root = make_five(tmp_path / "data")
    shutil.copy(root / "visual" / "train_0000" / "frame_2.png", root / "visual" / "train_0000" / "frame_2.jpg")
    with pytest.raises(UserError, match="train_0000/frame_2: there with two endings; delete one of the files"):
        load_five(root)


@pytest.mark.parametrize("cut", [8, 40])
def test_a_png_cut_short_is_named(tmp_path, capsys, cut):
    root = make_five(tmp_path / "data")
    path = root / "visual" / "train_0002" / "frame_3.png"
    path.write_bytes(path.read_bytes()[:-cut])
    for cache in ("none", "ram"):
        with pytest.raises(UserError, match=r"frame_3.png: truncated PNG \(no end marker\); python -m dataset.prepare"):
            batches(load_five(root), cache, 0)
            batches(load_five(root), cache, 1)
    assert prepare(["--check", str(root)]) == 1 and "truncated PNG" in capsys.readouterr().out


def test_casts_are_told_once(folder):
    report = inspect_folder(folder.root, folder.spec)
    assert report.problems == [] and [warning.kind for warning in report.warnings] == ["cast", "cast"]
    assert sorted(folder.notes) == [
        f"{folder.root}/text: 36 arrays are float64; they are read as float32",
        f"{folder.root}/touch: 36 arrays are column order; they are read as float32",
    ]


def test_clips_with_the_same_names_share_them(folder):
    files = folder.parts["train"].files["video"]
    assert len({id(names) for names in files.names}) == 3 and files.counts.tolist()[:4] == [3, 4, 5, 3]
    assert files.clips is folder.parts["train"].clips
    assert [len(paths) for paths in files[:2]] == [3, 4] and len(list(files)) == len(files) == 24


# Packs in shards ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", [1, 1000, 20_000])
def test_shards_hold_and_feed_the_same(tmp_path, monkeypatch, shard):
    folder = load_five(make_five(tmp_path / "data"))
    part, shapes = folder.parts["train"], folder.shapes
    sizes = {"video": SIZE, "flow": SIZE}
    whole = batches(folder, "ram", 0)[1]
    wanted = open_pack(folder.root, "train", part, sizes, shapes)
    monkeypatch.setattr(pack_module, "SHARD", shard)
    pack = open_pack(folder.root, "train", part, sizes, shapes)
    rows = np.array([5, 0, 23, 5, 22])
    for name, array in pack.arrays.items():
        assert (len(array.shards) > 1 or array[:].nbytes <= shard) and array.shape == wanted.arrays[name].shape
        assert np.array_equal(np.asarray(array), np.asarray(wanted.arrays[name]))
        assert np.array_equal(array[rows], wanted.arrays[name][rows]) and np.array_equal(
            array[3:9], wanted.arrays[name][3:9]
        )
        assert all(len(one) == 1 or one.nbytes <= shard for one in array.shards)
    assert sum(np.asarray(array).nbytes for array in pack.arrays.values()) == pack_bytes(part, sizes, shapes)
    clips, found = batches(folder, "ram", 0)
    assert isinstance(clips, ResidentClips) and len(clips.arrays["video"].shards) > 1
    for a, b in zip(found, whole, strict=True):
        for name in folder.spec.names:
            left, right = (x if isinstance(x, torch.Tensor) else x.rows for x in (a.inputs[name], b.inputs[name]))
            assert torch.equal(left, right)
    (folder.root / ".pack").rename(tmp_path / "away")
    (folder.root / ".pack").write_text("in the way")
    held = open_pack(folder.root, "train", part, sizes, shapes)
    for name, array in held.arrays.items():
        assert np.array_equal(np.asarray(array), np.asarray(pack.arrays[name]))


def test_rows_index_as_one_array():
    whole = np.arange(23 * 2).reshape(23, 2)
    rows = Rows([whole[start : start + 5] for start in range(0, 23, 5)], 5)
    assert rows.shape == (23, 2) and len(rows) == 23 and rows.dtype == whole.dtype
    assert np.array_equal(rows[22], whole[22]) and np.array_equal(rows[4:17:3], whole[4:17:3])
    assert np.array_equal(rows[np.array([22, 0, 0])], whole[[22, 0, 0]]) and np.array_equal(np.asarray(rows), whole)


def test_few_clips_are_decoded_ahead():
    from concurrent.futures import ThreadPoolExecutor

    begun = []
    with ThreadPoolExecutor(3) as pool:
        results = in_order(pool, lambda i: (begun.append(i), i)[1], range(1000), ahead=6)
        for i in range(50):
            assert next(results) == i and len(begun) <= i + 6
        results.close()
    assert len(begun) < 60


def test_flow_counts_two_channels_and_sequences_their_steps(folder, monkeypatch):
    spec = folder.spec
    feed = Feed(spec.modalities, 32, CPU, "auto", crop_area=spec.crop_area)
    frames = sum(2 * ((3 + i % 3) // 2) for i in range(12, 36))  # that can be fed; test clips sort first
    steps = sum(1 + i % 9 for i in range(12, 36))
    needed = frames * 5 * SIZE[0] * SIZE[1] + 4 * (24 * (33 * 20 + 24) + steps * 5)
    sizes = {"video": SIZE, "flow": SIZE}
    assert pack_bytes(folder.parts["train"], sizes, folder.shapes) == needed
    parts = {"train": folder.parts["train"]}
    assert choose_cache(folder.root, parts, folder.shapes, feed)[0] == "ram"


# dataset.json ---------------------------------------------------------------------------------------------------------


def test_recipes_with_parameters():
    assert recipe_of("logmel") is AUDIO_RECIPES["logmel"] == logmel() and logmel().shape == (32, 32)
    found = recipe_of({"name": "logmel", "rate": 16_000, "seconds": 1.5, "bands": 64, "hop": 160})
    assert found.shape == (64, 150) and found.samples == 24_000
    for recipe in (found, *AUDIO_RECIPES.values()):
        assert recipe_of(json.loads(json.dumps(recipe.fields))) == recipe


@pytest.mark.parametrize("name", list(SPECS))
def test_a_spec_survives_its_description(tmp_path, name):
    (tmp_path / "dataset.json").write_text(json.dumps(description(SPECS[name])))
    found = spec_of("folder", tmp_path)
    for field in ("modalities", "image_size", "encoder", "learning_rate", "crop_area", "mirror"):
        assert getattr(found, field) == getattr(SPECS[name], field)


def test_the_recipe_decides_the_shape(tmp_path):
    root = make_five(tmp_path / "data")
    recipe = {"name": "logmel", "rate": 8000, "seconds": 0.64, "bands": 33}
    modalities = [MODALITIES[1] | {"recipe": recipe}, *MODALITIES[2:]]
    (root / "dataset.json").write_text(json.dumps({"modalities": modalities}))
    assert load_five(root).shapes["audio"] == (33, 20)
    (root / "prepare.json").write_text(json.dumps({"audio_recipe": recipe | {"bands": 40}}))
    with pytest.raises(UserError, match=r"array of shape \(33, 20\), not \(40, 20\); prepare the folder again"):
        load_five(root)
    (root / "prepare.json").write_text(json.dumps({"audio_recipe": "mp3"}))
    with pytest.raises(UserError, match=r"prepare.json: audio_recipe 'mp3' is unknown; .*prepare the folder again"):
        load_five(root)


def with_field(place: int, **fields) -> dict:
    modalities = [dict(own) for own in MODALITIES]
    modalities[place] |= fields
    return {"modalities": modalities}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "an object"),
        ({"modalities": 3}, "missing or no list"),
        ({}, "missing or no list"),
        ({"modalities": [3, 4]}, "modality 3: an object of fields"),
        ({"modalities": [{"name": "a", "kind": "array"}]}, "modality 'a': field 'folder' is missing"),
        ({"modalities": MODALITIES[1:2]}, "at least two are needed"),
        ({"modalities": MODALITIES, "mirror": "false"}, "mirror 'false'; true or false"),
        ({"modalities": MODALITIES, "crop_area": [2, 3]}, "crop_area [2, 3]; two shares"),
        ({"modalities": MODALITIES, "crop_area": 0.5}, "crop_area 0.5; two shares"),
        ({"modalities": MODALITIES, "image_size": "64"}, "image_size '64'; a whole number"),
        ({"modalities": MODALITIES, "learning_rate": 0}, "learning_rate 0; a number above 0"),
        ({"modalities": MODALITIES, "encoder": 18}, "encoder 18; the name of an encoder"),
        ({"modalities": MODALITIES, "fps": 1}, "unknown field 'fps'"),
        (with_field(0, like="audio"), "flow: like 'audio'; the name of another modality of frames"),
        (with_field(0, like="flow"), "flow: like 'flow'; the name of another"),
        (with_field(0, frames=3), "flow: 3 frames are fed; video, whose picks it shares, has 2"),
        (with_field(0, pick="last"), "flow: pick 'last'; allowed: random, first"),
        (with_field(0, pick="first"), "flow: pick 'first'; video, whose picks it shares, has random"),
        (with_field(0, channels=4), "flow: channels 4; 3 (RGB) or 2 (optical flow)"),
        (with_field(0, frames=True), "modality 'flow': frames True is of the wrong type"),
        (with_field(0, frames=0), "flow: frames 0; a whole number from 1"),
        (with_field(0, folder=".."), "folder '..' must be a plain folder name"),
        (with_field(0, folder=""), "folder '' must be a plain folder name"),
        (with_field(0, size=3), "modality 'flow': unknown field 'size'; allowed: name, kind"),
        (with_field(0, kind="film"), "flow: kind 'film'; allowed: frames, array, sequence"),
        (with_field(0, recipe="fbank"), "flow: a recipe makes arrays"),
        (with_field(1, recipe="mp3"), "modality 'audio': recipe 'mp3' is unknown; allowed: logstft, fbank, logmel"),
        (with_field(1, recipe={"name": "fbank", "rate": 8000}), "recipe fbank: unknown field 'rate'"),
        (with_field(1, recipe={"name": "logmel", "rate": 10}), "recipe logmel: rate 10; allowed: 1000 to 400000"),
        (with_field(1, recipe={"name": "logmel", "bands": 2.5}), "recipe logmel: bands 2.5; a number"),
        (with_field(1, name="joint"), "modality 'joint': a plain word"),
    ],
)
def test_mistakes_in_dataset_json_are_one_line(tmp_path, content, reason):
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        spec_of("folder", tmp_path)
    text = str(error.value)
    assert text.startswith(f"{tmp_path / 'dataset.json'}: ") and reason in text and "\n" not in text


# A run ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_five_modalities_train(tmp_path, capsys, cache):
    root = make_five(tmp_path / "data")
    made = run(root, tmp_path / "runs", cache, "--epochs", "2", "--warmup", "1", "--cache", cache, "--num_workers", "0")
    printed = capsys.readouterr().out
    assert printed.count("36 arrays are float64; they are read as float32") == 1
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    assert sum(lines[1][f"n_{fields['name']}"] for fields in MODALITIES) == 24
    assert all(0 <= lines[1][f"test_acc_{fields['name']}"] <= 100 for fields in MODALITIES)
    assert json.loads((made / "config.json").read_text())["data"]["modalities"] == [own["name"] for own in MODALITIES]
