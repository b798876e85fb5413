"""The two data paths: the same pictures from memory and from files, and packs that are never half or outdated."""

import os
import shutil

import cv2
import numpy as np
import pytest
import torch
from helpers import make_folder

import remix
from dataset import clips as clips_module
from dataset import pack as pack_module
from dataset.clips import Feed, FileClips, ResidentClips, choose_cache, make_clips, step_bytes
from dataset.folder import load_folder
from dataset.pack import open_pack, pack_bytes, room_for_packs, stored_size
from dataset.specs import get_spec
from models import AVClassifier
from utils.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return load_folder(make_folder(tmp_path_factory.mktemp("data"), train=21, test=9), get_spec("folder"))


def feed(cache: str, size: int = 32, workers: int = 0) -> Feed:
    return Feed(frames=2, image_size=size, device=CPU, cache=cache, workers=workers)


def load(folder, cache: str, plan, seed=None, part="train", workers=0, **options):
    clips = make_clips(folder.root, part, folder.parts[part], folder.audio_shape, feed(cache, workers=workers))
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return clips, list(clips.epoch(plan, generator, **options))


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_files_and_memory_feed_the_same(folder, seed, workers):
    plan = remix.batches_of(21, 8, "both", torch.Generator().manual_seed(0))
    plain, from_files = load(folder, "none", plan, seed, workers=workers)
    resident, from_memory = load(folder, "ram", plan, seed)
    assert isinstance(plain, FileClips) and isinstance(resident, ResidentClips)
    for a, b, batch in zip(from_files, from_memory, plan, strict=True):
        assert torch.equal(a.clips, batch.clips) and torch.equal(b.clips, batch.clips)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.labels, torch.as_tensor(folder.parts["train"].labels)[batch.clips])
        assert torch.equal(a.audio, b.audio)
        assert a.video.shape == (len(batch.clips), 2, 3, 32, 32)
        # one level of 255 in normalised units is 1 / 255 / 0.225; torchvision rounds to whole levels, ours does not
        assert (a.video - b.video).abs().max() < 1.5 / 255 / 0.224


def test_audio_is_the_file_and_evaluation_frames_are_the_segments_middle(folder):
    plan = [remix.Batch(torch.tensor([4, 2]), "both")]
    _, (batch,) = load(folder, "ram", plan)
    part = folder.parts["train"]
    for row, clip in enumerate((4, 2)):
        assert np.array_equal(batch.audio[row, 0].numpy(), np.load(part.spectrograms[clip]))
    views = clips_module.draw_views(torch.tensor([3, 3]), torch.tensor([[40, 48]] * 2), 2, None)
    assert views.picks.tolist() == [[0, 1], [0, 1]]  # three frames, two segments of one


def test_a_homogeneous_batch_loads_only_its_modality(folder):
    plan = [remix.Batch(torch.arange(5), "audio"), remix.Batch(torch.arange(5, 9), "video")]
    for cache in ("none", "ram"):
        _, (audio, video) = load(folder, cache, plan, seed=0)
        assert audio.video is None and audio.audio is not None and audio.kept == "audio"
        assert video.audio is None and video.video is not None and video.kept == "video"
        _, (audio, video) = load(folder, cache, plan, seed=0, load_masked=True)
        assert None not in (audio.audio, audio.video, video.audio, video.video)


def test_processes_share_a_batch_without_overlap_and_see_one_processes_crops(folder, monkeypatch):
    plan = [remix.Batch(torch.tensor([0, 1, 2, 3, 4]), "both"), remix.Batch(torch.tensor([7]), "both")]
    _, whole = load(folder, "ram", plan, seed=5)
    shares = []
    for process in (0, 1):
        monkeypatch.setattr(clips_module, "rank", lambda process=process: process)
        monkeypatch.setattr(clips_module, "world_size", lambda: 2)
        shares.append(load(folder, "ram", plan, seed=5)[1])
    assert torch.equal(shares[0][0].video, whole[0].video[[0, 2, 4]])
    assert torch.equal(shares[1][0].video, whole[0].video[[1, 3]])
    assert [s[0].share for s in shares] == [3 / 5, 2 / 5]
    assert [s[1].share for s in shares] == [1.0, 0.0]  # the last clip counts once


def test_more_processes_than_clips_in_a_batch(folder, monkeypatch):
    plan = [remix.Batch(torch.tensor([4, 2]), "both"), remix.Batch(torch.tensor([7]), "both")]
    monkeypatch.setattr(clips_module, "world_size", lambda: 5)
    shares = []
    for process in range(5):
        monkeypatch.setattr(clips_module, "rank", lambda process=process: process)
        shares.append(load(folder, "ram", plan, seed=5)[1])
    assert [s[0].share for s in shares] == [1 / 2, 1 / 2, 0, 0, 0]
    assert [s[1].share for s in shares] == [1, 0, 0, 0, 0]
    assert [s[0].clips.tolist() for s in shares] == [[4], [2], [4], [4], [4]]  # who has none repeats the first
    assert all(s[1].clips.tolist() == [7] for s in shares)


def test_a_pack_is_made_once_and_again_when_a_source_changes(tmp_path):
    root = make_folder(tmp_path / "data")
    folder = load_folder(root, get_spec("folder"))
    part, size = folder.parts["train"], (40, 48)
    first = open_pack(root, "train", part, size, folder.audio_shape)
    assert first.frames.shape == (72, 3, 40, 48) and first.frames.dtype == np.uint8
    assert sum(p.stat().st_size for p in (root / ".pack").rglob("*.npy")) == pytest.approx(
        pack_bytes(part, size, folder.audio_shape), abs=512
    )
    (made,) = (root / ".pack").iterdir()
    before = (made / "frames.npy").stat().st_mtime_ns
    open_pack(root, "train", part, size, folder.audio_shape)
    assert (made / "frames.npy").stat().st_mtime_ns == before

    np.save(part.spectrograms[3], np.full(folder.audio_shape, 7, np.float32))
    second = open_pack(root, "train", part, size, folder.audio_shape)
    assert (second.spectrograms[3] == 7).all()
    assert made.exists()  # another run may be using it: it stays for a day
    os.utime(made / "pack.json", (0, 0))
    np.save(part.spectrograms[3], np.full(folder.audio_shape, 8, np.float32))
    open_pack(root, "train", part, size, folder.audio_shape)
    assert not made.exists() and len(list((root / ".pack").iterdir())) == 2


def test_a_half_written_pack_is_not_read(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "data")
    folder = load_folder(root, get_spec("folder"))
    part = folder.parts["train"]
    os.remove(part.spectrograms[-1])
    np.save(part.spectrograms[-1], np.zeros((2, 2), np.float32))  # fails at the last clip, after most was written
    with pytest.raises(UserError, match="shape"):
        open_pack(root, "train", part, (40, 48), folder.audio_shape)
    assert list((root / ".pack").iterdir()) == []


def test_a_pack_that_another_process_finished_first_is_used_and_left_alone(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "data")
    folder = load_folder(root, get_spec("folder"))
    asked = (root, "train", folder.parts["train"], (40, 48), folder.audio_shape)
    decode, others = pack_module._decode, []

    def slow(*args):
        monkeypatch.setattr(pack_module, "_decode", decode)
        others.append(open_pack(*asked))  # while this one is at work
        others.append(next((root / ".pack").glob("train-*/frames.npy")).stat().st_ino)
        return decode(*args)

    monkeypatch.setattr(pack_module, "_decode", slow)
    mine = open_pack(*asked)
    assert next((root / ".pack").glob("train-*/frames.npy")).stat().st_ino == others[1]
    assert np.array_equal(mine.frames, others[0].frames) and len(list((root / ".pack").iterdir())) == 1


def test_what_a_killed_run_left_is_cleared_before_room_is_measured(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "data")
    folder = load_folder(root, get_spec("folder"))
    left, usage = root / ".pack" / ".tmp-left", shutil.disk_usage(root)
    full = lambda _: usage._replace(free=0 if left.exists() else 10**9)  # noqa: E731  (it is what fills the disk)
    monkeypatch.setattr(pack_module.shutil, "disk_usage", full)
    for use in (
        lambda: room_for_packs(root) == 10**9,
        lambda: len(open_pack(root, "train", folder.parts["train"], (40, 48), folder.audio_shape).counts) == 24,
    ):
        left.mkdir(parents=True)
        (left / "frames.npy").write_bytes(bytes(1000))
        assert use() and not left.exists()
    assert len(list((root / ".pack").glob("train-*"))) == 1


def test_where_the_folder_cannot_be_written_memory_is_used(tmp_path, monkeypatch, capsys):
    root = make_folder(tmp_path / "data")
    folder = load_folder(root, get_spec("folder"))
    (root / ".pack").write_text("in the way")
    pack = open_pack(root, "train", folder.parts["train"], (40, 48), folder.audio_shape)
    assert pack.frames.shape == (72, 3, 40, 48)
    assert "no pack written" in capsys.readouterr().out


def test_frames_of_another_size_are_resized_to_the_most_common(tmp_path):
    root = make_folder(tmp_path / "data", train=6)
    other = make_folder(tmp_path / "other", train=6, size=(60, 48))
    shutil.rmtree(root / "visual" / "train_0000")
    shutil.copytree(other / "visual" / "train_0000", root / "visual" / "train_0000")
    folder = load_folder(root, get_spec("folder"))
    assert stored_size(folder.parts["train"]) == (40, 48)
    assert open_pack(root, "train", folder.parts["train"], (40, 48), folder.audio_shape).frames.shape[2:] == (40, 48)


@pytest.mark.parametrize("size", [(90, 60), (45, 120)])
def test_frames_of_another_shape_are_cropped_alike_on_either_path(tmp_path, size):
    """A box is drawn for the frame as it was: kept at another shape, it is found again there."""
    root = make_folder(tmp_path / "data", train=8, size=(60, 80))
    ramp = np.linspace(0, 200, size[0])[:, None, None] + np.linspace(0, 55, size[1])[None, :, None] + np.zeros(3)
    for path in (root / "visual" / "train_0003").glob("*.jpg"):
        cv2.imwrite(str(path), ramp.round().astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 100])
    folder = load_folder(root, get_spec("folder"))
    plan = remix.batches_of(8, 8, "both", None)
    for seed in (None, 0, 1, 2):
        fed = {}
        for cache in ("none", "ram"):
            clips, (fed[cache],) = load(folder, cache, plan, seed)
            assert clips.sizes[3].tolist() == list(size)
        apart = (fed["none"].video - fed["ram"].video).abs().amax(dim=(1, 2, 3, 4)) * 255 * 0.225  # in levels
        assert apart[3] < 6 and apart[[0, 1, 2, 4, 5, 6, 7]].max() < 1.5, apart  # a pixel of the ramp is 2 to 5 levels


def test_auto_takes_the_fastest_path_that_fits_and_says_why(folder, monkeypatch):
    needed = 30 * 3 * 3 * 40 * 48 + 30 * 4 * 33 * 20  # 30 clips of three frames, 599,040 bytes

    def choose(cache="auto", device=CPU, free=10**10, on_gpu=0, step=0):
        monkeypatch.setattr(clips_module, "available_ram", lambda: free)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (on_gpu, 10**11))
        return choose_cache(cache, folder.root, folder.parts, folder.audio_shape, device, step=step)

    gpu = torch.device("cuda", 0)
    assert choose() == ("ram", "--cache auto: 0.0006 GB, 10 GB of memory free")
    assert choose(free=2 * needed - 9)[0] == "none" and choose(free=2 * needed + 9)[0] == "ram"
    assert "over 50% of the 1e-06 GB" in choose(free=1000)[1]
    assert choose(device=gpu, on_gpu=2 * needed) == ("device", "--cache auto: 0.0006 GB, 0.0012 GB free on the GPU")
    assert choose(device=gpu, on_gpu=needed)[0] == "ram"
    assert choose(device=gpu, on_gpu=9 * needed, step=7 * needed)[0] == "device"
    assert choose(device=gpu, on_gpu=9 * needed, step=8 * needed)[0] == "ram"  # no room for the step itself
    assert choose(device=gpu, on_gpu=needed, free=1000)[0] == "none"
    assert choose("none") == ("none", "--cache none")
    with pytest.raises(UserError, match=r"--cache device: .*--pack_size"):
        choose("device", device=gpu, on_gpu=needed - 1)


def test_where_no_pack_can_be_written_auto_counts_a_copy_for_each_process(tmp_path, monkeypatch):
    folder = load_folder(make_folder(tmp_path / "data", train=6, test=3), get_spec("folder"))
    needed = 9 * (3 * 3 * 40 * 48 + 4 * 33 * 20)
    monkeypatch.setattr(clips_module, "local_processes", lambda: 4)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**10, 10**11))

    def choose(free, device=CPU):
        monkeypatch.setattr(clips_module, "available_ram", lambda: free)
        return choose_cache("auto", folder.root, folder.parts, folder.audio_shape, device)[0]

    gpu = torch.device("cuda", 0)
    assert choose(7 * needed) == "ram" and choose(7 * needed, gpu) == "device"
    monkeypatch.setattr(pack_module.os, "access", lambda path, mode: False)
    assert choose(7 * needed) == "none" and choose(9 * needed) == "ram"
    assert choose(7 * needed, gpu) == "none" and choose(9 * needed, gpu) == "device"  # each decodes it first
    for name, part in folder.parts.items():  # packs that somebody else made: one file for all
        open_pack(folder.root, name, part, (40, 48), folder.audio_shape)
    assert choose(7 * needed) == "ram" and choose(7 * needed, gpu) == "device"


def test_clips_that_fit_neither_disk_nor_memory_are_one_line(tmp_path, monkeypatch):
    folder = load_folder(make_folder(tmp_path / "data"), get_spec("folder"))
    (folder.root / ".pack").write_text("in the way")
    monkeypatch.setattr(pack_module, "available_ram", lambda: 1000)
    with pytest.raises(UserError, match=r"no pack written .*--cache none"):
        open_pack(folder.root, "train", folder.parts["train"], (40, 48), folder.audio_shape)


def test_what_a_step_takes_is_not_underestimated():
    """The activations that autograd keeps, counted on the full-size network without computing anything."""
    batch, frames, side, shape = 4, 2, 224, (257, 188)
    with torch.device("meta"):
        network = AVClassifier(6, "resnet18")
        fed = torch.empty(batch, 1, *shape), torch.empty(batch, frames, 3, side, side)
    kept = {}

    def keep(tensor):
        kept[id(tensor.untyped_storage())] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network(*fed)
    weights = sum(p.untyped_storage().nbytes() for p in network.parameters())
    activations = sum(size for _, size in kept.values()) - weights
    values = batch * (frames * side**2 + shape[0] * shape[1])
    assert output.joint.shape == (batch, 6) and 300 < activations / values < 500
    assert activations + 4 * weights < step_bytes(batch, frames, side, shape)  # weights, gradients, two of Adam


@pytest.mark.parametrize(("pack_size", "stored"), [(None, (90, 120)), (60, (60, 80)), (200, (90, 120))])
def test_frames_are_kept_at_the_pack_size_on_either_path(tmp_path, pack_size, stored):
    folder = load_folder(make_folder(tmp_path / "data", train=5, size=(90, 120)), get_spec("folder"))
    part, plan = folder.parts["train"], remix.batches_of(5, 5, "both", None)
    fed = {}
    for cache in ("none", "ram"):
        clips = make_clips(folder.root, "train", part, folder.audio_shape, feed(cache)._replace(pack_size=pack_size))
        assert clips.sizes.tolist() == [list(stored)] * 5
        (fed[cache],) = clips.epoch(plan, torch.Generator().manual_seed(0))
    assert clips.pixels.shape == (15, 3, *stored) and pack_bytes(part, stored, (33, 20)) == 5 * (
        3 * 3 * stored[0] * stored[1] + 4 * 33 * 20
    )
    assert torch.equal(fed["none"].video, fed["ram"].video)  # large frames: resized by the same code, one by one
    image = cv2.imread(str(part.frames[2][1]), cv2.IMREAD_COLOR_RGB)
    expected = cv2.resize(image, stored[::-1], interpolation=cv2.INTER_AREA)  # its own size: unchanged
    assert np.array_equal(clips.pixels[7].permute(1, 2, 0).numpy(), expected)


def private_bytes() -> int:
    """Memory that is this process's alone, pages of mapped files aside."""
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Anonymous:"))


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux")
def test_clips_in_memory_are_the_mapped_pack_and_no_copy(tmp_path):
    data = make_folder(tmp_path / "data", train=60, test=3, size=(360, 480))
    folder = load_folder(data, get_spec("folder"))
    part, plan = folder.parts["train"], remix.batches_of(60, 4, "both", None)
    open_pack(folder.root, "train", part, (360, 480), folder.audio_shape)
    size = pack_bytes(part, (360, 480), folder.audio_shape)
    assert size > 90e6
    before, most = private_bytes(), 0
    clips = make_clips(folder.root, "train", part, folder.audio_shape, feed("ram"))
    total = 0
    for batch in clips.epoch(plan, torch.Generator().manual_seed(0)):
        total += batch.video.sum().item()
        most = max(most, private_bytes() - before)
    assert np.isfinite(total) and most < size / 3, (most, size)


def test_a_file_that_vanishes_or_breaks_is_one_line(tmp_path):
    root = make_folder(tmp_path / "data", train=8)
    folder = load_folder(root, get_spec("folder"))
    part = folder.parts["train"]
    clips = make_clips(root, "train", part, folder.audio_shape, feed("none"))
    part.frames[2][0].write_bytes(b"\xff\xd8 not a picture")
    with pytest.raises(UserError, match=f"{part.clips[2]}.*not a readable JPEG"):
        list(clips.epoch(remix.batches_of(8, 4, "both", None)))
    np.save(part.spectrograms[1], np.full(folder.audio_shape, np.nan, np.float32))
    with pytest.raises(UserError, match=f"{part.clips[1]}.*NaN"):
        list(clips.epoch(remix.batches_of(8, 4, "audio", None)))
