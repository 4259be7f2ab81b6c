"""The recipes in ``runs/``, at a size that proves that they work and nothing else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT
from PIL import Image

import flowmo

SMALL = (
    "data.image_size=64 model.hidden_size=64 model.num_heads=1 model.enc_hidden_size=64 model.enc_num_heads=1 "
    "model.dec_depth=1 model.enc_depth=1 data.global_batch_size=2 data.max_microbatch=2 data.num_workers=0 "
    "trainer.compile=false eval.images=2"
)


def test_nano_from_photographs_to_the_file(picture_files, trained_weights, tmp_path):
    """Both stages, the conversion and the figures; a photograph that looks like a held-out one is left out."""
    photographs, held_out = tmp_path / "photographs", tmp_path / "held_out"
    for folder, files in ((photographs, picture_files[:4]), (held_out, picture_files[3:])):
        folder.mkdir()
        for file in files:
            shutil.copy(file, folder)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "FLOWMO_WEIGHTS": str(trained_weights),
        "PROCESSES": "1",
        "IMAGES": "4",
        "POSTTRAIN_IMAGES": "2",
        "SETTINGS": SMALL,
    }
    command = ["bash", ROOT / "runs" / "nano.sh", tmp_path / "out", held_out, photographs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    report = (tmp_path / "out" / "pictures.txt").read_text()
    assert f"held out: {photographs / picture_files[3].name} looks like {held_out / picture_files[3].name}" in report
    assert "3 photographs of 4" in report
    sizes = []
    for path in (tmp_path / "out" / "pictures").rglob("*.jpg"):
        with Image.open(path) as view:
            sizes.append(view.size)
    assert sizes == [(128, 128)] * 6, "each whole and a closer square of it"
    tokenizer = flowmo.load(tmp_path / "out" / "nano.safetensors")
    assert tokenizer.config.model.posttrain_sample
    assert "PSNR" in done.stdout
