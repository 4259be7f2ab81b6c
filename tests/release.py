"""Builds the source archive and the wheel, and tries them in a clean environment of every Python named.

python tests/release.py torch==2.13.0 python3.11 python3.12 python3.13      (make release)

Writes dist/. Needs pip's index for the dependencies and for the packages build and twine.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMANDS = ("encode", "decode", "reconstruct", "info", "demo", "train", "evaluate", "export")
TRIAL = """
import sys
from pathlib import Path
import flowmo
from flowmo.cli import main

installed, pictures, expected = Path(flowmo.__file__), Path(sys.argv[1]), Path(sys.argv[2])
assert installed.is_relative_to(sys.argv[3]), installed
tok = flowmo.load("nano")
image = flowmo.read_image(pictures / "cat.jpg")
codes = tok.encode_image(image, fit="crop")
assert codes.nbytes == 288
assert tok.decode_image(codes).size == (128, 128)
cat = str(pictures / "cat.jpg")
assert main(["encode", cat, "cat.flowmo", "--fit", "crop"]) == 0
assert main(["decode", "cat.flowmo", "cat.png"]) == 0
assert not {"torch._dynamo", "torch.distributed.checkpoint"} & {*sys.modules}, "they import slowly"
assert main(["reconstruct", cat]) == 0
assert main(["evaluate", str(pictures), "--no-lpips", "--features", "none"]) == 0
content = Path("cat.flowmo").read_bytes()
if expected.exists():
    assert content == expected.read_bytes(), "other bytes than the first environment wrote"
expected.write_bytes(content)
"""
"""What is tried: ``python -c TRIAL PICTURES FILE SITE``. FILE keeps the first trial's cat.flowmo, SITE holds flowmo."""


def run(*words: object, **options: object) -> str:
    """Run a program in an environment that knows nothing of this checkout. Returns all that it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHONWARNINGS": "default", "COLUMNS": "100"}
    done = subprocess.run(
        [*map(str, words)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))[:200]}\n{done.stdout}")
    return done.stdout


def install(programs: Path, *words: object) -> None:
    run(programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", *words)


def environment(folder: Path, python: str) -> Path:
    """Make an empty environment. Returns its folder of programs."""
    run(python, "-m", "venv", folder)
    return folder / "bin"


def build(folder: Path) -> tuple[Path, Path]:
    """Build the source archive from this checkout, and the wheel from the archive. Returns both."""
    tools = environment(folder / "tools", sys.executable)
    install(tools, "build", "twine")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    run(tools / "python", "-m", "build", ROOT)
    (archive,), (wheel,) = ((ROOT / "dist").glob(pattern) for pattern in ("*.tar.gz", "*.whl"))
    print(run(tools / "python", "-m", "twine", "check", "--strict", archive, wheel), end="")
    return archive, wheel


def try_out(programs: Path, file: Path, expected: Path) -> None:
    """Try what was installed from a file, in a folder away from the checkout."""
    with tempfile.TemporaryDirectory() as work:
        version = run(programs / "flowmo", "--version", cwd=work).strip()
        run(programs / "python", "-m", "pip", "check")
        for command in COMMANDS:
            assert f"usage: flowmo {command}" in run(programs / "flowmo", command, "--help", cwd=work)
        pictures = ROOT / "examples" / "pictures"
        said = run(programs / "python", "-c", TRIAL, pictures, expected, programs.parent, cwd=work)
    warnings = [line for line in said.splitlines() if "Warning" in line]
    python = run(programs / "python", "--version").strip()
    print(f"{python}, {version}, {file.name}: {len(warnings)} warnings", *warnings, sep="\n  ", flush=True)


def main(torch: str, *pythons: str) -> None:
    if missing := [python for python in pythons if shutil.which(python) is None]:
        sys.exit(f"Not installed: {', '.join(missing)}.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        archive, wheel = build(folder)
        for python in pythons:
            programs = environment(folder / "env", python)
            install(programs, torch)
            install(programs, wheel)
            try_out(programs, wheel, folder / "cat.flowmo")
            if python == pythons[0]:  # the wheel comes from the archive, so the others show nothing more
                install(programs, "--force-reinstall", "--no-deps", archive)
                try_out(programs, archive, folder / "cat.flowmo")
            shutil.rmtree(folder / "env")


if __name__ == "__main__":
    main(*sys.argv[1:])
