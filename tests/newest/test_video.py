"MediaPipe for real: `GCODE_ML_VIDEO_PYTHON` names the Python of an environment with mediapipe==0.10.21; without it these tests are skipped."

import os
import subprocess
from pathlib import Path

import matplotlib
import pytest

from gcode_ml.core.errors import InputError
from gcode_ml.sign.checks import check
from gcode_ml.sign.skeleton import Preparation
from gcode_ml.sign.video import extract_clip

PYTHON = os.environ.get("GCODE_ML_VIDEO_PYTHON", "")
if not PYTHON:
    pytest.skip("GCODE_ML_VIDEO_PYTHON is not set", allow_module_level=True)

FILM = """
import cv2, sys
picture = cv2.imread(sys.argv[1]); h,w = (n-n%2 for n in picture.shape[:2])
film = cv2.VideoWriter(sys.argv[2], cv2.VideoWriter_fourcc(*'mp4v'), 15, (w,h))
for i in range(6): film.write(picture[:h,:w])
film.release()
"""


def test_a_person_in_a_video(tmp_path):
    "The portrait that matplotlib ships, six frames of it: shoulders, nose and face are found where they are, no hand is; the file passes its check and the clip can be prepared."
    picture = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    subprocess.run([PYTHON, "-c", FILM, str(picture), str(tmp_path / "film.mp4")], check=True)
    clip = extract_clip(tmp_path / "film.mp4", python=PYTHON, target=tmp_path / "film.npz")
    assert len(clip) == 6
    assert (clip.width, clip.height) == (512, 600)
    assert clip.timestamps_ms.tolist() == [0, 67, 133, 200, 267, 333]
    assert clip.seen[:, [0, 11, 12]].all()
    assert clip.seen[:, 67:].all()
    assert not clip.seen[:, 25:67].any()
    nose, left, right = clip.points[0, [0, 11, 12]]
    # a person's left is on the right of the picture
    assert right[0] < nose[0] < left[0]
    assert nose[1] < min(left[1], right[1])
    assert list(check(tmp_path / "film.npz")) == []
    assert Preparation(frames=None).fit([clip])(clip).shape[0] == 6


def test_no_video(tmp_path):
    "Bytes that are none, in one sentence."
    (tmp_path / "film.mp4").write_bytes(b"no video")
    with pytest.raises(InputError, match="a video with frames"):
        extract_clip(tmp_path / "film.mp4", python=PYTHON)
