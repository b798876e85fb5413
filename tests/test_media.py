"""The table of odd media files: what is refused though it can be decoded is found, and named."""

import csv
import shutil
import sys

import pytest

from benchmarks import media
from benchmarks.raw_samples import tone, write_video, write_wav
from utils.errors import UserError

PROBE = "file,bytes,dur,vcodec,pix,acodec,ch,err\n"


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["media", *map(str, flags)])
    return media.main()


def test_table_of_a_folder(tmp_path, monkeypatch, capsys):
    raw, out = tmp_path / "raw", tmp_path / "media.csv"
    write_video(raw / "a.mp4", 1.0, 10, (64, 48), tone(1.0, 16_000), 16_000)
    write_wav(raw / "b.wav", 0.5)
    (raw / "c.bin").write_bytes(b"nothing" * 99)
    probes = ["a.mp4,1,1.0,mpeg4,yuv420p,aac,1,", "b.wav,1,0.5,,,pcm_s16le,1,", "c.bin,1,1.0,h264,yuv420p,,0,"]
    (raw / "probe.csv").write_text(PROBE + "\n".join(probes) + "\n")
    assert run(monkeypatch, raw, "--out", out, "--workers", 1) == 1, "c.bin is called decodable and is not"
    rows = {row["file"]: row for row in csv.DictReader(out.open())}
    assert [rows[name]["refused"] for name in ("a.mp4", "b.wav", "c.bin")] == ["", "", "video"]
    assert rows["a.mp4"]["video"] == "1 frames of 64x48" and rows["b.wav"]["sound"] == "0.500 s at 16000 Hz"
    assert rows["c.bin"]["video"].startswith("broken_video") and rows["c.bin"]["sound"].startswith("broken_sound")
    if shutil.which("ffmpeg"):
        assert rows["a.mp4"]["frame_max"] == "0" and float(rows["b.wav"]["sound_max"]) < 1e-6
    assert "refused of these: ['c.bin']" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "words"), [([], "give the folder"), (["nowhere"], "no such folder")])
def test_mistakes(monkeypatch, flags, words):
    with pytest.raises(UserError, match=words):
        run(monkeypatch, *flags)
