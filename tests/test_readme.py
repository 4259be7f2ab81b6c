"""What the README shows is run as it is printed."""

import re
import shlex
import shutil

import pytest
from conftest import ROOT

from flowmo.cli import main

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("flowmo ")
]
NEEDS_FILES_OF_YOURS = ("PICTURES", "flowmo_lo")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_snippets(checkout, capsys):
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})
    printed = capsys.readouterr().out.strip()
    assert f"# {printed}" in README, "the README says what the snippet prints"
    assert (checkout / "cat.png").is_file()


def test_commands(checkout, capsys):
    runnable = [command for command in COMMANDS if not any(word in command for word in NEEDS_FILES_OF_YOURS)]
    assert len(runnable) >= 7
    for command in runnable:
        assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
    assert (checkout / "reconstructions" / "cat.png").is_file()


def test_training_command_as_printed(checkout):
    """The recipe with its placeholders filled in, for two steps."""
    command = next(command for command in COMMANDS if command.startswith("flowmo train"))
    words = shlex.split(command.replace("PICTURES", "examples/pictures").replace("HELD_OUT", "examples/pictures"))[1:]
    settings = ["trainer.max_steps=2", "data.batch_size=2", "opt.lpips_weight=0", "data.num_workers=0"]
    assert main([*words, *settings]) == 0
    assert (checkout / "results" / "nano" / "checkpoints" / "00000002.pth").is_file()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
