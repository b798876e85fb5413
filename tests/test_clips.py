"""The two data paths: the same clips from memory and from files, and which of them is chosen. Packs: test_pack.py."""

import os
import shutil

import cv2
import numpy as np
import pytest
import torch
from helpers import make_folder
from networks import network

import remix
from dataset import augment, fixed
from dataset import clips as clips_module
from dataset import pack as pack_module
from dataset.clips import Feed, FileClips, ResidentClips, choose_cache, make_clips, room_for_fixed, step_bytes
from dataset.folder import load_folder
from dataset.pack import open_pack, pack_bytes, stored_size
from dataset.specs import get_spec
from utils.errors import UserError

CPU = torch.device("cpu")
BOTH = ("audio", "video")
SIZES, SHAPES = {"video": (40, 48)}, {"audio": (33, 20)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return load_folder(make_folder(tmp_path_factory.mktemp("data"), train=21, test=9), get_spec("folder"))


def feed(cache: str, size: int = 32, workers: int = 0) -> Feed:
    return Feed(get_spec("folder").modalities, size, CPU, cache, workers)


def load(folder, cache: str, plan, seed=None, part="train", workers=0, **options):
    clips = make_clips(folder.root, part, folder.parts[part], folder.shapes, feed(cache, workers=workers))
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return clips, list(clips.epoch(plan, generator, **options))


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_files_and_memory_feed_the_same(folder, seed, workers):
    plan = remix.batches_of(21, 8, BOTH, torch.Generator().manual_seed(0))
    plain, from_files = load(folder, "none", plan, seed, workers=workers)
    resident, from_memory = load(folder, "ram", plan, seed)
    assert isinstance(plain, FileClips) and isinstance(resident, ResidentClips)
    for a, b, batch in zip(from_files, from_memory, plan, strict=True):
        assert torch.equal(a.clips, batch.clips) and torch.equal(b.clips, batch.clips)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.labels, torch.as_tensor(folder.parts["train"].labels)[batch.clips])
        assert torch.equal(a.inputs["audio"], b.inputs["audio"])
        assert a.inputs["video"].shape == (len(batch.clips), 2, 3, 32, 32)
        # one level of 255 in normalised units is 1 / 255 / 0.225; torchvision rounds to whole levels, ours does not
        assert (a.inputs["video"] - b.inputs["video"]).abs().max() < 1.5 / 255 / 0.224


def test_audio_is_the_file_and_evaluation_frames_are_the_segments_middle(folder):
    plan = [remix.Batch(torch.tensor([4, 2]), BOTH)]
    _, (batch,) = load(folder, "ram", plan)
    part = folder.parts["train"]
    for row, clip in enumerate((4, 2)):
        assert np.array_equal(batch.inputs["audio"][row, 0].numpy(), np.load(part.files["audio"][clip]))
    views = clips_module.draw_views(torch.tensor([3, 3]), torch.tensor([[40, 48]] * 2), 2, None)
    assert views.picks.tolist() == [[0, 1], [0, 1]]  # three frames, two segments of one


def test_a_homogeneous_batch_loads_only_its_modality(folder):
    plan = [remix.Batch(torch.arange(5), ("audio",)), remix.Batch(torch.arange(5, 9), ("video",))]
    for cache in ("none", "ram"):
        for masked_too in (False, True):
            _, batches = load(folder, cache, plan, seed=0, load_masked=masked_too)
            assert [batch.fed for batch in batches] == [("audio",), ("video",)]
            loaded = [BOTH, BOTH] if masked_too else [("audio",), ("video",)]
            assert [tuple(batch.inputs) for batch in batches] == loaded


def test_processes_share_a_batch_without_overlap_and_see_one_processes_crops(folder, monkeypatch):
    plan = [remix.Batch(torch.tensor([0, 1, 2, 3, 4]), BOTH), remix.Batch(torch.tensor([7]), BOTH)]
    _, whole = load(folder, "ram", plan, seed=5)
    shares = []
    for process in (0, 1):
        monkeypatch.setattr(clips_module, "rank", lambda process=process: process)
        monkeypatch.setattr(clips_module, "world_size", lambda: 2)
        shares.append(load(folder, "ram", plan, seed=5)[1])
    assert torch.equal(shares[0][0].inputs["video"], whole[0].inputs["video"][[0, 2, 4]])
    assert torch.equal(shares[1][0].inputs["video"], whole[0].inputs["video"][[1, 3]])
    assert [s[0].share for s in shares] == [3 / 5, 2 / 5]
    # A single clip goes to both, and counts once.
    assert [(s[1].clips.tolist(), s[1].share, s[1].weight) for s in shares] == [([7], 1 / 2, 1 / 2)] * 2
    assert torch.equal(shares[0][1].inputs["video"], shares[1][1].inputs["video"])
    assert [s[0].weight for s in shares] == [1, 1]


def test_more_processes_than_clips_in_a_batch(folder, monkeypatch):
    plan = [remix.Batch(torch.tensor([4, 2]), BOTH), remix.Batch(torch.tensor([7]), BOTH)]
    monkeypatch.setattr(clips_module, "world_size", lambda: 5)
    shares = []
    for process in range(5):
        monkeypatch.setattr(clips_module, "rank", lambda process=process: process)
        shares.append(load(folder, "ram", plan, seed=5)[1])
    for share in shares:  # each has the batch whole, and all of them together count it once
        for batch, expected in zip(share, ([4, 2], [7]), strict=True):
            assert batch.clips.tolist() == expected and batch.total == len(expected)
            assert batch.share == pytest.approx(1 / 5) and batch.weight == pytest.approx(1 / 5)


def test_frames_of_another_size_are_resized_to_the_most_common(tmp_path):
    root = make_folder(tmp_path / "data", train=6)
    other = make_folder(tmp_path / "other", train=6, size=(60, 48))
    shutil.rmtree(root / "visual" / "train_0000")
    shutil.copytree(other / "visual" / "train_0000", root / "visual" / "train_0000")
    folder = load_folder(root, get_spec("folder"))
    part = folder.parts["train"]
    assert stored_size([frames[0] for frames in part.files["video"]]) == (40, 48)
    assert clips_module.stored_sizes(part, feed("ram")) == SIZES
    assert open_pack(root, "train", part, SIZES, SHAPES).arrays["video"].shape[2:] == (40, 48)


@pytest.mark.parametrize("size", [(90, 60), (45, 120)])
def test_frames_of_another_shape_are_cropped_alike_on_either_path(tmp_path, size):
    """A box is drawn for the frame as it was: kept at another shape, it is found again there."""
    root = make_folder(tmp_path / "data", train=8, size=(60, 80))
    ramp = np.linspace(0, 200, size[0])[:, None, None] + np.linspace(0, 55, size[1])[None, :, None] + np.zeros(3)
    for path in (root / "visual" / "train_0003").glob("*.jpg"):
        cv2.imwrite(str(path), ramp.round().astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 100])
    folder = load_folder(root, get_spec("folder"))
    plan = remix.batches_of(8, 8, BOTH, None)
    for seed in (None, 0, 1, 2):
        fed = {}
        for cache in ("none", "ram"):
            clips, (fed[cache],) = load(folder, cache, plan, seed)
            assert clips.sizes["video"][3].tolist() == list(size)
        apart = (
            (fed["none"].inputs["video"] - fed["ram"].inputs["video"]).abs().amax(dim=(1, 2, 3, 4)) * 255 * 0.225
        )  # in levels
        assert apart[3] < 6 and apart[[0, 1, 2, 4, 5, 6, 7]].max() < 1.5, apart  # a pixel of the ramp is 2 to 5 levels


def test_auto_takes_the_fastest_path_that_fits_and_says_why(folder, monkeypatch):
    needed = 30 * 2 * 3 * 40 * 48 + 30 * 4 * 33 * 20  # 30 clips; of three frames two can be fed; 424,800 bytes

    def choose(cache="auto", device=CPU, free=10**10, on_gpu=0, step=0):
        monkeypatch.setattr(clips_module, "available_ram", lambda: free)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (on_gpu, 10**11))
        asked = feed(cache)._replace(device=device)
        return choose_cache(folder.root, folder.parts, folder.shapes, asked, step)

    gpu = torch.device("cuda", 0)
    assert choose() == ("ram", "--cache auto: 0.00042 GB, 10 GB of memory free")
    assert choose(free=2 * needed - 9)[0] == "none" and choose(free=2 * needed + 9)[0] == "ram"
    assert "over 50% of the 1e-06 GB" in choose(free=1000)[1]
    assert choose(device=gpu, on_gpu=2 * needed) == ("device", "--cache auto: 0.00042 GB, 0.00085 GB free on the GPU")
    assert choose(device=gpu, on_gpu=needed)[0] == "ram"
    assert choose(device=gpu, on_gpu=9 * needed, step=7 * needed)[0] == "device"
    assert choose(device=gpu, on_gpu=9 * needed, step=8 * needed)[0] == "ram"  # no room for the step itself
    assert choose(device=gpu, on_gpu=needed, free=1000)[0] == "none"
    assert choose("none") == ("none", "--cache none")
    with pytest.raises(UserError, match=r"--cache device: .*--pack_size"):
        choose("device", device=gpu, on_gpu=needed - 1)


def test_where_no_pack_can_be_written_auto_counts_a_copy_for_each_process(tmp_path, monkeypatch):
    folder = load_folder(make_folder(tmp_path / "data", train=6, test=3), get_spec("folder"))
    needed = 9 * (2 * 3 * 40 * 48 + 4 * 33 * 20)
    monkeypatch.setattr(clips_module, "local_processes", lambda: 4)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**10, 10**11))

    def choose(free, device=CPU):
        monkeypatch.setattr(clips_module, "available_ram", lambda: free)
        asked = feed("auto")._replace(device=device)
        return choose_cache(folder.root, folder.parts, folder.shapes, asked)[0]

    gpu = torch.device("cuda", 0)
    assert choose(7 * needed) == "ram" and choose(7 * needed, gpu) == "device"
    monkeypatch.setattr(pack_module.os, "access", lambda path, mode: False)
    assert choose(7 * needed) == "none" and choose(9 * needed) == "ram"
    assert choose(7 * needed, gpu) == "none" and choose(9 * needed, gpu) == "device"  # each decodes it first
    for name, part in folder.parts.items():  # packs that somebody else made: one file for all
        open_pack(folder.root, name, part, SIZES, SHAPES)
    assert choose(7 * needed) == "ram" and choose(7 * needed, gpu) == "device"


def test_what_a_step_takes_is_not_underestimated():
    """The activations that autograd keeps, counted on the full-size network without computing anything."""
    batch, frames, side, shape = 4, 2, 224, (257, 188)
    model = network(6, "resnet18", device="meta")
    fed = {"audio": (batch, 1, *shape), "video": (batch, frames, 3, side, side)}
    fed = {name: torch.empty(*size, device="meta") for name, size in fed.items()}
    kept = {}

    def keep(tensor):
        kept[id(tensor.untyped_storage())] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(fed, BOTH)
    weights = sum(p.untyped_storage().nbytes() for p in model.parameters())
    activations = sum(size for _, size in kept.values()) - weights
    values = batch * (frames * side**2 + shape[0] * shape[1])
    assert output.joint.shape == (batch, 6) and 300 < activations / values < 500
    assert activations + 4 * weights < step_bytes(
        batch, feed("ram", side), {"audio": shape}
    )  # weights, gradients, two of Adam


@pytest.mark.parametrize(("pack_size", "stored"), [(None, (90, 120)), (60, (60, 80)), (200, (90, 120))])
def test_frames_are_kept_at_the_pack_size_on_either_path(tmp_path, pack_size, stored):
    folder = load_folder(make_folder(tmp_path / "data", train=5, size=(90, 120)), get_spec("folder"))
    part, plan = folder.parts["train"], remix.batches_of(5, 5, BOTH, None)
    fed = {}
    for cache in ("none", "ram"):
        clips = make_clips(folder.root, "train", part, folder.shapes, feed(cache)._replace(pack_size=pack_size))
        assert clips.sizes["video"].tolist() == [list(stored)] * 5
        (fed[cache],) = clips.epoch(plan, torch.Generator().manual_seed(0))
    pixels, taken = clips.arrays["video"], pack_bytes(part, {"video": stored}, SHAPES)
    assert pixels.shape == (10, 3, *stored) and taken == 5 * (2 * 3 * stored[0] * stored[1] + 4 * 33 * 20)
    assert torch.equal(
        fed["none"].inputs["video"], fed["ram"].inputs["video"]
    )  # large frames: resized by the same code, one by one
    image = cv2.imread(str(part.files["video"][2][1]), cv2.IMREAD_COLOR_RGB)
    expected = cv2.resize(image, stored[::-1], interpolation=cv2.INTER_AREA)  # its own size: unchanged
    assert np.array_equal(pixels[5].permute(1, 2, 0).numpy(), expected)


def private_bytes() -> int:
    """Memory that is this process's alone, pages of mapped files aside."""
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Anonymous:"))


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux")
def test_clips_in_memory_are_the_mapped_pack_and_no_copy(tmp_path):
    data = make_folder(tmp_path / "data", train=60, test=3, size=(360, 480))
    folder = load_folder(data, get_spec("folder"))
    part, plan = folder.parts["train"], remix.batches_of(60, 4, BOTH, None)
    open_pack(folder.root, "train", part, {"video": (360, 480)}, SHAPES)
    size = pack_bytes(part, {"video": (360, 480)}, SHAPES)
    assert size > 60e6
    before, most = private_bytes(), 0
    clips = make_clips(folder.root, "train", part, folder.shapes, feed("ram"))
    total = 0
    for batch in clips.epoch(plan, torch.Generator().manual_seed(0)):
        total += batch.inputs["video"].sum().item()
        most = max(most, private_bytes() - before)
    assert np.isfinite(total) and most < size / 3, (most, size)


def test_a_file_that_vanishes_or_breaks_is_one_line(tmp_path):
    root = make_folder(tmp_path / "data", train=8)
    folder = load_folder(root, get_spec("folder"))
    part = folder.parts["train"]
    clips = make_clips(root, "train", part, folder.shapes, feed("none"))
    frames, arrays = part.files["video"], part.files["audio"]
    frames[2][0].write_bytes(b"\xff\xd8 not a picture")
    with pytest.raises(UserError, match=f"{part.clips[2]}.*truncated JPEG"):
        list(clips.epoch(remix.batches_of(8, 4, BOTH, None)))
    np.save(arrays[1], np.full(SHAPES["audio"], np.nan, np.float32))
    with pytest.raises(UserError, match=f"{part.clips[1]}.*NaN"):
        list(clips.epoch(remix.batches_of(8, 4, ("audio",), None)))


# ------------------------------------------------------------------------------------------- evaluation frames, kept


def frames_of(clips, plan, seed=None):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.cat([batch.inputs["video"] for batch in clips.epoch(plan, generator)])


@pytest.mark.parametrize("as_pil", [False, True])
def test_evaluation_frames_are_resized_once_and_stay_the_same(tmp_path, monkeypatch, as_pil):
    folder = load_folder(make_folder(tmp_path / "data", train=9, size=(90, 120)), get_spec("folder"))
    part, plan = folder.parts["train"], remix.batches_of(9, 4, BOTH, None)
    options = feed("ram")._replace(as_pil=as_pil)
    plain = make_clips(folder.root, "train", part, folder.shapes, options._replace(keep_fixed=False))
    kept = make_clips(folder.root, "train", part, folder.shapes, options)
    assert not plain.fixed and set(kept.fixed) == {"video"}
    expected = [frames_of(plain, plan), frames_of(plain, plan, 3)]
    shuffled = remix.batches_of(9, 4, BOTH, torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(frames_of(kept, plan[:1]), expected[0][:4])  # fills four clips, in a pass without gradients
    order = torch.cat([batch.clips for batch in shuffled])
    assert torch.equal(frames_of(kept, shuffled), expected[0][order])  # some are there, some are not
    calls = []
    resize = clips_module.crop_resize
    monkeypatch.setattr(clips_module, "crop_resize", lambda *args: calls.append(1) or resize(*args))
    assert torch.equal(frames_of(kept, plan), expected[0]) and torch.equal(
        frames_of(kept, shuffled), expected[0][order]
    )
    assert not calls
    assert torch.equal(frames_of(kept, plan, 3), expected[1]) and len(calls) == len(plan)  # training: crops as ever


def test_frames_stored_at_the_fed_size_are_not_resized_for_evaluation(tmp_path, monkeypatch):
    folder = load_folder(make_folder(tmp_path / "data", train=6, size=(32, 32)), get_spec("folder"))
    clips = make_clips(folder.root, "train", folder.parts["train"], folder.shapes, feed("ram"))
    plan = remix.batches_of(6, 4, BOTH, None)
    (first, second) = ([batch.inputs["video"] for batch in clips.epoch(plan)] for _ in range(2))
    rows = torch.stack([clips.arrays["video"][row] for row in (0, 1)])  # three frames, two segments of one
    assert torch.equal(first[0][0], clips_module.normalise(rows.float())) and torch.equal(first[1], second[1])
    whole, no = torch.tensor([[0, 0, 32, 32]] * 2), torch.zeros(2, dtype=torch.bool)
    assert torch.equal(clips_module.crop_resize(rows, whole, no, 32), rows.float()) and not clips.fixed


def test_small_frames_keep_their_fractions_on_a_cpu_and_are_rounded_on_a_gpu(folder, monkeypatch):
    plan = remix.batches_of(9, 4, BOTH, None)
    cpu, _ = load(folder, "ram", plan, part="test")
    assert not cpu.fixed
    exact = frames_of(cpu, plan)
    for module in (augment, fixed):
        monkeypatch.setattr(module, "saves_traffic", lambda device: True)
    gpu, _ = load(folder, "ram", plan, part="test")
    rounded = [frames_of(gpu, plan), frames_of(gpu, plan)]
    assert gpu.fixed["video"].done.all() and torch.equal(*rounded)
    levels = (rounded[0] - exact).abs() * 255 * torch.tensor(augment.IMAGENET_STD)[:, None, None]
    assert 0 < levels.max() < 0.51


def test_evaluation_frames_are_kept_only_where_they_fit(folder, monkeypatch):
    packed = 30 * 2 * 3 * 40 * 48 + 30 * 4 * 33 * 20  # of three frames, two can be fed
    views = 30 * 2 * 3 * 32 * 32

    def room(free, cache="ram", device=CPU, step=0):
        monkeypatch.setattr(clips_module, "available_ram", lambda: free)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
        return room_for_fixed(folder.parts, folder.shapes, feed(cache)._replace(device=device), step)

    gpu = torch.device("cuda", 0)
    assert room(2 * (packed + views) + 9) and not room(2 * (packed + views) - 9)
    assert room(packed + views + 9, "device", gpu) and not room(packed + views + 9, "device", gpu, step=10)
    assert room(views + 9, "ram", gpu) and not room(views - 9, "ram", gpu)
    monkeypatch.setattr(clips_module, "local_processes", lambda: 2)
    assert not room(2 * (packed + views) + 9) and room(2 * (packed + 2 * views) + 9)
