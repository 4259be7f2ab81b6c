"""What the README and the documentation show: snippets and commands run as printed, those too long to run are
understood, links lead somewhere, and the site builds without a warning."""

import argparse
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import flowmo
from flowmo.cli import SETTING, build_parser, main
from flowmo.config import Config, preset
from flowmo.data.tokens import Vocabulary
from flowmo.generate.generator import Generator, save_generator

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "src" / "flowmo" / "pretrained" / "nano.md"]
PAGES = [page for page in PAGES if "_build" not in page.parts]
README = PAGES[0].read_text()
NEEDS_FILES_OF_YOURS = ("PICTURES", "flowmo_lo")


def blocks(page, language):
    """Contents of the fenced blocks of a language, lines that go on joined."""
    found = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [block.replace("\\\n", " ") for block in found]


def commands(page, language):
    lines = [line.partition(" #")[0].strip() for block in blocks(page, language) for line in block.splitlines()]
    return [line for line in lines if re.match(r"(flowmo|torchrun|python) ", line)]


def names(pages):
    return [str(page.relative_to(ROOT)) for page in pages]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    write_generator(tmp_path / "generator.safetensors")
    return tmp_path


def write_generator(path):
    """One of random weights for the ids of nano, which a snippet loads."""
    tokenizer = flowmo.load("nano")
    shape = {"tokens": tokenizer.code_length, "sub_tokens": tokenizer.quantizer.sub_tokens, "id_bits": 9}
    facts = {"tokenizer": tokenizer.identity(), "model": "nano", "image_size": 128, "classes": ("tench", "cat")}
    small = ("generator.depth=1", "generator.hidden_size=64", "generator.num_heads=1", "generator.sample_steps=2")
    config = preset("maskgit_nano").override(*small)
    save_generator(Generator(config, Vocabulary(**shape, **facts)), path)


def with_snippets(language):
    found = [page for page in PAGES if blocks(page, language)]
    return pytest.mark.parametrize("page", found, ids=names(found))


@with_snippets("python")
def test_python_snippets(page, checkout, capsys):
    for snippet in blocks(page, "python"):
        exec(compile(snippet, page.name, "exec"), {})
    printed = capsys.readouterr().out.strip()
    assert not printed or f"# {printed}" in page.read_text(), "the page says what the snippet prints"


@with_snippets("sh")
def test_commands(page, checkout, capsys):
    runnable = [line for line in commands(page, "sh") if not any(word in line for word in NEEDS_FILES_OF_YOURS)]
    for command in runnable:
        assert command.startswith("flowmo ")
        assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err


def test_training_command_as_printed(checkout):
    """The recipe with its placeholders filled in, for two steps."""
    command = next(command for command in commands(PAGES[0], "sh") if command.startswith("flowmo train"))
    words = shlex.split(command.replace("PICTURES", "examples/pictures").replace("HELD_OUT", "examples/pictures"))[1:]
    settings = ["trainer.max_steps=2", "data.batch_size=2", "opt.lpips_weight=0", "data.num_workers=0"]
    assert main([*words, *settings]) == 0
    assert (checkout / "results" / "nano" / "checkpoints" / "00000002.pth").is_file()


LONG = [(page, line) for page in PAGES for language in ("", "sh") for line in commands(page, language)]


@pytest.mark.parametrize(("page", "line"), LONG, ids=[f"{page.name}: {line[:50]}" for page, line in LONG])
def test_every_command_is_understood(page, line, monkeypatch):
    """Its options and settings exist, and so do the files of this project that it names."""
    monkeypatch.chdir(ROOT)
    words = [word for word in shlex.split(line) if word != "..."]
    if words[0] == "python":
        script = (ROOT / words[1]).read_text()
        for option in (word for word in words if word.startswith("--")):
            assert f'"{option}"' in script, option
        return
    if words[0] == "torchrun":
        module = words.index("-m")
        words = [*words[module + 1].split(".")[1:], *words[module + 2 :]]
    else:
        words = words[1:]
    settings = [word for word in words if SETTING.fullmatch(word)]
    monkeypatch.setattr(argparse.ArgumentParser, "error", lambda self, message: pytest.fail(f"{line}: {message}"))
    monkeypatch.setattr("flowmo.cli.shared.torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("flowmo.cli.shared.torch.cuda.device_count", lambda: 1)
    arguments = build_parser().parse_args([word for word in words if word not in settings])
    config = preset(getattr(arguments, "preset", None) or "lo")
    if getattr(arguments, "config", None):
        config = Config.from_yaml(arguments.config, config)
    config.override(*settings)


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_and_names_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    known = {action.dest: action for action in build_parser()._actions}
    for command in re.findall(r"`flowmo (\w+)", text):
        assert command in next(a.choices for a in known.values() if a.choices), command


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    pytest.importorskip("furo")
    words = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", tmp_path / "trees"]
    built = subprocess.run([*words, ROOT / "docs", tmp_path / "site"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    for page in ("index", "concepts", "api", "command-line", "studies/README"):
        assert (tmp_path / "site" / f"{page}.html").is_file()
    shown = (tmp_path / "site" / "command-line.html").read_text()
    for command in ("flowmo encode", "flowmo data index", "flowmo train"):
        assert f"usage: {command}" in shown
