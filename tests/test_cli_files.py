"""Files, pipes, terminals and JSON on the command line, as people and programs use them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import run_command as run
from PIL import Image
from processes import run_at_terminal, run_program

import flowmo
from flowmo.cli import main


@pytest.fixture
def weights(tiny_model):
    return tiny_model


def test_decoding_leaves_the_original_alone(capsys, tmp_path, weights, photo):
    original = tmp_path / "photo.png"
    Image.open(photo).save(original)
    content = original.read_bytes()
    assert run(capsys, "encode", original, "--model", weights)[0] == 0
    assert run(capsys, "decode", tmp_path / "photo.flowmo", "--model", weights, "--steps", 1)[0] == 0
    assert original.read_bytes() == content


def test_the_output_can_follow_the_input(capsys, tmp_path, weights, photo):
    """encode photo.jpg photo.flowmo; decode photo.flowmo photo.png, and other formats by the name."""
    file = tmp_path / "codes" / "a.flowmo"
    assert run(capsys, "encode", photo, file, "--model", weights)[0] == 0
    codes = flowmo.load(weights).encode_image(Image.open(photo))
    drawn = flowmo.load(weights).decode_image(codes, steps=1)
    for name, kind in (("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.WEBP", "WEBP"), ("a.ppm", "PPM")):
        assert run(capsys, "decode", file, tmp_path / name, "--model", weights, "--steps", 1)[0] == 0
        with Image.open(tmp_path / name) as decoded:
            assert decoded.format == kind
            assert (decoded.convert("RGB").tobytes() == drawn.tobytes()) == (kind != "JPEG")
    assert list(photo.parent.glob("photo.flowmo")) == [], "nothing beside the photo"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("encode", "a.jpg", "b.jpg", "-o", "c.flowmo"), "Name a folder with --output c/"),
        (("encode", "-", "--out-dir", "d"), "has no name"),
        (("decode", "-", "a.flowmo"), "comes alone"),
        (("decode", "a.flowmo", "-o", "a.mp3"), "ends in .png"),
        (("decode", "a.flowmo", "-o", "a.png", "--ids"), "writes no file"),
        (("decode", "a.flowmo", "a.png", "--ids"), "writes no file"),
    ],
)
def test_outputs_that_make_no_sense(capsys, weights, words, sentence):
    status, _, err = run(capsys, *words, "--model", weights)
    assert status == 2
    assert sentence in err
    assert err.count("\n") == 1


def test_what_cannot_be_written_or_found_is_named_as_it_was_given(capsys, tmp_path, weights, photo):
    (tmp_path / "taken" / "photo.flowmo").mkdir(parents=True)
    status, _, err = run(capsys, "encode", photo, "-o", tmp_path / "taken", "--model", weights)
    assert (status, err) == (2, f"flowmo: Cannot write {tmp_path / 'taken' / 'photo.flowmo'}: Is a directory.\n")
    status, _, err = run(capsys, "decode", tmp_path / "none.flowmo", "--model", weights)
    assert (status, err) == (2, f"flowmo: {tmp_path / 'none.flowmo'}: no such file or directory\n")


def test_codes_through_pipes(capsys, tmp_path, weights, photo):
    """A picture from standard input to standard output and back, as bytes, with nothing else among them."""
    coded = run_program(["encode", "-", "--model", weights], photo.read_bytes())
    assert coded.stdout[:3] == b"FLM"
    assert b"bits per pixel" in coded.stderr
    to_pil = ["decode", "-", "--model", weights, "--steps", "2"]
    decoded = run_program(to_pil, coded.stdout)
    with Image.open(io.BytesIO(decoded.stdout)) as picture:
        assert picture.size == (70, 50)
    broken = run_program(to_pil, b"no codes")
    assert (broken.returncode, broken.stdout) == (2, b"")
    assert broken.stderr.count(b"\n") == 1
    assert "comes alone" in run(capsys, "encode", "-", photo)[2]
    (tmp_path / "tiles.flowmo").write_bytes(coded.stdout)
    assert len(json.loads(run(capsys, "decode", tmp_path / "tiles.flowmo", "--ids", "--model", weights)[1])) == 6


def test_many_files_and_json(capsys, tmp_path, weights, picture_files):
    out = tmp_path / "codes"
    words = ("--out-dir", out, "--fit", "crop", "--model", weights)
    rows = json.loads(run(capsys, "encode", *picture_files[:3], *words, "--json")[1])
    assert [row["bytes"] for row in rows] == [Path(row["output"]).stat().st_size for row in rows]
    assert all(row["bits_per_pixel"] == round(8 * row["bytes"] / 32**2, 5) for row in rows)
    files = sorted(out.iterdir())
    said = run(capsys, "decode", *files, "--model", weights, "--steps", 1, "--out-dir", tmp_path / "pictures")[1]
    assert said.count("32×32 from 6 bytes") == 3
    assert said.splitlines()[-1].startswith("3 images, ")
    assert "3 images: " in run(capsys, "encode", *picture_files[:3], *words, "--force")[1].splitlines()[-1]
    said = run(capsys, "decode", *files, "--model", weights, "--ids")[1].splitlines()
    assert [len(json.loads(line)[0]) for line in said] == [6, 6, 6]
    rows = json.loads(run(capsys, "decode", *files, "--model", weights, "--ids", "--json")[1])
    assert [row["ids"] for row in rows] == [json.loads(line) for line in said]


@pytest.mark.parametrize(("term", "counts"), [("xterm", True), ("dumb", False)])
def test_on_a_terminal(tmp_path, weights, photo, term, counts):
    """A counter where the terminal can go back on its line, colours never, and no bytes of a file."""
    pty = pytest.importorskip("pty")
    command = ["decode", tmp_path / "a.flowmo", "--model", weights]
    main(["encode", str(photo), str(tmp_path / "a.flowmo"), "--model", str(weights)])

    def shown(*words):
        ours, theirs = pty.openpty()
        code = run_at_terminal([*command, *words], os.ttyname(theirs), {**os.environ, "TERM": term})
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # how Linux says that nobody writes any more
            while chunk := os.read(ours, 4096):
                said += chunk
        os.close(ours)
        return code, said

    status, said = shown("--steps", "2")
    assert status == 0
    assert (re.search(rb"a\.flowmo \d of 6", said) is not None) == counts
    assert (b"\033" in said) == counts
    assert re.search(rb"\033\[[\d;]*m", said) is None
    if not counts:
        status, said = shown("--steps", "1", "-o", "-")
        assert status == 2
        assert b"is a terminal" in said


def test_a_reader_that_goes_away(weights, photo):
    """Neither a traceback nor a failure that anyone could mend."""
    command = [sys.executable, "-m", "flowmo", "info", "nano", "--settings"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (1, b"")


def test_json_of_what_only_writes(capsys, tmp_path, weights, tiny, class_folder):
    """Every command that reports does so for programs too."""
    target, tar = tmp_path / "copy.safetensors", tmp_path / "a.tar"
    row = json.loads(run(capsys, "convert", weights, target, "--json")[1])
    assert row == {"file": str(target), "bytes": target.stat().st_size, "tokenizer": tiny.identity()}
    words = ("push", weights, "someone/flowmo", "--folder", tmp_path / "hub", "--json")
    assert json.loads(run(capsys, *words)[1])["files"] == ["README.md", "model.safetensors"]
    words = ("tokenize", class_folder, "--model", weights, "--out", tmp_path / "tokens", "--json")
    row = json.loads(run(capsys, *words)[1])
    assert (row["samples"], row["readable"], row["classes"], row["bytes"]) == (6, 6, 3, 36)
    with tarfile.open(tar, "w") as archive:
        archive.add(class_folder, "pictures")
    (row,) = json.loads(run(capsys, "data", "index", tar, "--json")[1])
    assert (row["images"], row["index"]) == (6, str(tmp_path / "a.index.json"))


def test_completion_in_a_real_shell(capsys, tmp_path):
    pytest.importorskip("shtab")
    shell = shutil.which("bash")
    if shell is None:
        pytest.skip("needs bash")
    script = run(capsys, "completion", "bash")[1]
    assert "_shtab_flowmo_encode_pos_0_COMPGEN=_shtab_compgen_files" in script
    assert "--output" in script
    assert "--out-dir" not in script
    (tmp_path / "flowmo.sh").write_text(script)
    lines = (
        f"source {tmp_path / 'flowmo.sh'}",
        "COMP_WORDS=(flowmo enc)",  # typed so far, and then TAB
        "COMP_CWORD=1",
        r"$(complete -p flowmo | sed 's/.*-F \([^ ]*\) .*/\1/') flowmo",
        "echo ${COMPREPLY[@]}",
    )
    offered = subprocess.run([shell, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert offered.stdout.split() == ["encode"], offered.stderr


def test_two_files_of_codes_are_not_input_and_output(capsys, tmp_path, weights, picture_files):
    """`encode *.flowmo --packed --force` would write the first over the second."""
    files = [tmp_path / name for name in ("a.flowmo", "b.flowmo")]
    for file, picture in zip(files, picture_files, strict=False):
        run(capsys, "encode", picture, file, "--model", weights)
    before = files[1].read_bytes()
    status, _, err = run(capsys, "encode", *files, "--packed", "--force", "--model", weights)
    assert status == 2
    assert "b.flowmo could be an input or the output. Name the output with --output." in err
    assert files[1].read_bytes() == before
    assert run(capsys, "encode", *files, "--packed", "--output", f"{tmp_path}/new/", "--model", weights)[0] == 0
    assert run(capsys, "encode", files[0], tmp_path / "c.flowmo", "--packed", "--model", weights)[0] == 0


def test_a_context_model_without_effect_is_refused(capsys, tmp_path, weights, picture_files):
    for option in ("--context", "--generator"):
        words = ("encode", picture_files[0], tmp_path / "a.flowmo", "--packed", option, "none.safetensors")
        status, _, error = run(capsys, *words, "--model", weights)
        assert (status, "none.safetensors changes nothing: --packed" in error) == (2, True), error


def test_a_file_whose_name_looks_like_a_setting(capsys, tmp_path, weights, photo, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(photo, "shot.v=2.jpg")
    assert run(capsys, "encode", "shot.v=2.jpg", "o.flowmo", "--model", weights)[0] == 0
    assert Path("o.flowmo").read_bytes()[:3] == b"FLM"
