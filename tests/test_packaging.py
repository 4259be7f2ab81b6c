"""What is installed: the wheel holds all that it needs, and the names by which other libraries' users look for it."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata

import pytest
import torch
import yaml
from conftest import PICTURES, ROOT
from release import TRIAL

import flowmo


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built from a copy, and its content unpacked."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip("needs setuptools 77")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    leave = shutil.ignore_patterns("*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "src", folder / "src", ignore=leave)
    words = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    built = subprocess.run([*words, "-w", folder, folder], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (file,) = folder.glob("*.whl")
    assert re.fullmatch(r"flowmo-[\d.]+-py3-none-any\.whl", file.name)
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_works_without_the_checkout(wheel, tmp_path):
    """The trial that ``make release`` makes in clean environments: the bundled model is inside, and works."""
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    words = [sys.executable, "-c", TRIAL, PICTURES, tmp_path / "first.flowmo", wheel]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cat.png").is_file()


def test_the_wheel_holds_every_module_and_table(wheel):
    leave = ("__pycache__", "flowmo.egg-info")
    ours = {path.relative_to(ROOT / "src") for path in (ROOT / "src" / "flowmo").rglob("*") if path.is_file()}
    ours = {path for path in ours if not any(part in leave for part in path.parts)}
    assert {path for path in ours if not (wheel / path).is_file()} == set()


def test_extras_by_their_short_names(wheel):
    (info,) = wheel.glob("*.dist-info")
    distribution = metadata.Distribution.at(info)
    extras = set(distribution.metadata.get_all("Provides-Extra"))
    assert {"train", "eval", "demo", "lm", "hub", "codec", "dev"} <= extras
    page = (ROOT / "docs" / "index.md").read_text()
    assert not [name for name in extras - {"demo"} if f"`{name}`" not in page], "extras without a line"
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in re.findall(r"flowmo\[([\w,]+)\]", str(wanted)):
        assert set(name.split(",")) <= extras, "extras that name each other exist"
    (script,) = distribution.entry_points
    assert (script.name, script.value) == ("flowmo", "flowmo.cli:main")


def test_one_version_and_date_in_all_files():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\d.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]  # below "Next"
    assert newest == f"{flowmo.__version__}, {cited['date-released']}"
    assert cited["version"] == flowmo.__version__


def test_torch_hub():
    """As ``torch.hub.load("OWNER/flowmo", "tokenizer", "nano")``, from a checkout."""
    tokenizer = torch.hub.load(str(ROOT), "tokenizer", "nano", "eval.sampling.sample_steps=3", source="local")
    assert type(tokenizer).__name__ == "FlowMo"
    assert tokenizer.config.eval.sampling.sample_steps == 3
