"""Optical flow: the motion that was drawn, in the field's two 8-bit channels, beside every frame that is kept."""

import av
import cv2
import numpy as np
import pytest

from dataset.prepare.flow import BOUND, REST, flow_between, flow_picture, motion_of
from dataset.prepare.video import Choice, extract_frames


def texture(height=120, width=160, seed=0):
    noise = np.random.default_rng(seed).integers(0, 255, (height, width)).astype(np.uint8)
    grey = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2.5), None, 0, 255, cv2.NORM_MINMAX)
    return np.repeat(grey[..., None], 3, axis=2)


def moved(picture, x, y):
    """The picture with its content moved by whole pixels, `x` to the right and `y` down."""
    return np.roll(picture, (y, x), axis=(0, 1))


INNER = np.s_[24:-24, 24:-24]


@pytest.mark.parametrize(("x", "y"), [(0, 0), (3, 0), (0, -2), (-4, 3), (6, 5)])
def test_flow_is_the_motion_that_was_drawn(x, y):
    flow = flow_between(texture(), moved(texture(), x, y))
    assert flow.shape == (120, 160, 2) and np.abs(flow[INNER] - (x, y)).mean() < 0.05


def test_picture_is_the_fields_convention():
    flow = np.zeros((4, 5, 2), np.float32)
    flow[0, 0], flow[0, 1], flow[0, 2] = (20, -20), (1e3, -1e3), (10, 5)
    picture = flow_picture(flow)
    assert picture.dtype == np.uint8 and picture.shape == (4, 5, 3)
    assert picture[0, 0].tolist() == picture[0, 1].tolist() == [REST, 0, 255], "blue, y, x in OpenCV's order"
    assert picture[0, 2].tolist() == [REST, round(25 * 255 / 40), round(30 * 255 / 40)]
    assert (picture[1:] == 128).all()
    values = np.random.default_rng(0).uniform(-BOUND, BOUND, (50, 50, 2)).astype(np.float32)
    assert np.abs(motion_of(flow_picture(values)) - values).max() <= BOUND / 255 + 1e-5


def write_moving(path, steps, size=(160, 120), rate=10):
    """A video of a texture that moves by each of `steps` from frame to frame; lossless."""
    picture = texture(size[1], size[0])
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "bgr0"
        for x, y in [(0, 0), *steps]:
            picture = moved(picture, x, y)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="bgr24").reformat(format="bgr0")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def read_flow(folder):
    return [motion_of(cv2.imread(str(path))) for path in sorted(folder.iterdir())]


def test_a_flow_picture_beside_every_frame(tmp_path):
    """Frame to next frame of the file, whatever lies between the kept ones; the last of all: from the one before."""
    steps = [(i % 5 - 2, 3 - i % 4) for i in range(20)]
    path = write_moving(tmp_path / "a.mkv", steps)
    for choice, kept in ((Choice(fps=10), range(21)), (Choice(fps=5), range(0, 21, 2)), (Choice(), (0, 10, 20))):
        extract_frames(path, tmp_path / "rgb", choice, tmp_path / "flow")
        names = [[file.name for file in sorted((tmp_path / folder).iterdir())] for folder in ("rgb", "flow")]
        assert names[0] == names[1] and len(names[0]) == len(kept)
        for index, flow in zip(kept, read_flow(tmp_path / "flow"), strict=True):
            assert np.abs(flow[INNER].mean((0, 1)) - steps[min(index, 19)]).max() < 0.2, index
            assert np.abs(flow[INNER] - steps[min(index, 19)]).mean() < 0.3, "what JPEG costs"


def test_pixels_of_the_stored_frame(tmp_path):
    path = write_moving(tmp_path / "a.mkv", [(8, -4)] * 3, size=(320, 240))
    extract_frames(path, tmp_path / "rgb", Choice(fps=10, size=120), tmp_path / "flow")
    extract_frames(path, tmp_path / "crop", Choice(fps=10, crop=(40, 20, 160, 120)), tmp_path / "cropflow")
    assert np.abs(np.median(read_flow(tmp_path / "flow")[0][INNER], (0, 1)) - (4, -2)).max() < 0.2
    assert np.abs(np.median(read_flow(tmp_path / "cropflow")[0][INNER], (0, 1)) - (8, -4)).max() < 0.2


def test_one_frame_has_no_motion(tmp_path):
    extract_frames(write_moving(tmp_path / "a.mkv", []), tmp_path / "rgb", Choice(fps=1), tmp_path / "flow")
    picture = cv2.imread(str(next((tmp_path / "flow").iterdir())))
    assert np.abs(picture.astype(int) - REST).max() <= 1


def test_twice_gives_the_same_bytes(tmp_path):
    path = write_moving(tmp_path / "a.mkv", [(2, 1)] * 8)
    for name in ("one", "two"):
        extract_frames(path, tmp_path / f"rgb{name}", Choice(fps=5), tmp_path / name)
    one, two = ([file.read_bytes() for file in sorted((tmp_path / name).iterdir())] for name in ("one", "two"))
    assert one == two and len(one) == 5
