"""What the README and the documentation show: snippets and commands run as printed, those too long to run are
understood, links lead somewhere, and the site builds without a warning."""

import argparse
import gc
import importlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import ImageFont

import flowmo
from flowmo.cli import SETTING, build_parser, main
from flowmo.config import FIELDS, Config, Duration, flatten, preset
from flowmo.data.tokens import Vocabulary
from flowmo.generate.generator import Generator, save_generator
from reproduce import STUDIES
from reproduce.__main__ import build_parser as build_study_parser

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "src" / "flowmo" / "pretrained").glob("*.md")),
]
PAGES = [page for page in PAGES if "_build" not in page.parts]
README = PAGES[0].read_text()
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
NEEDS_FILES_OF_YOURS = ("PICTURES", "IMAGES", "flowmo_lo")


def blocks(page, language):
    """Contents of the fenced blocks of a language, lines that go on joined."""
    # All of them, or the end of one would pass for the start of the next.
    found = re.findall(r"^```([^\n]*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [block.replace("\\\n", " ") for name, block in found if name == language]


def commands(page, language):
    lines = [line.partition(" #")[0].strip() for block in blocks(page, language) for line in block.splitlines()]
    lines = [line.partition(" > ")[0] for line in lines]  # where a shell puts what is printed
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
    metadata = {"tokenizer": tokenizer.identity(), "model": "nano", "image_size": 128, "classes": ("tench", "cat")}
    small = ("generator.depth=1", "generator.hidden_size=64", "generator.num_heads=1", "generator.sample_steps=2")
    config = preset("maskgit_nano").override(*small)
    save_generator(Generator(config, Vocabulary(**shape, **metadata)), path)


def write_fonts(folder):
    """Pillow's own font by the names that examples/letters.py looks for."""
    folder.mkdir()
    for name in ("DejaVuSans", "FreeSans"):
        (folder / f"{name}.ttf").write_bytes(ImageFont.load_default(12).font_bytes)
    return str(folder)


def run_script(monkeypatch, script, *words):
    """A script of this project, as ``python script words``."""
    monkeypatch.setattr(sys, "argv", [script, *words])
    runpy.run_path(str(ROOT / script), run_name="__main__")


def with_snippets(language):
    found = [page for page in PAGES if page not in GUIDES and blocks(page, language)]
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


@pytest.mark.parametrize("page", GUIDES, ids=names(GUIDES))
@pytest.mark.filterwarnings("ignore:unclosed file .*tar:ResourceWarning")  # webdataset
def test_a_guide_from_top_to_bottom(page, checkout, capsys, monkeypatch):
    """Its commands and snippets run in order in one folder, the long ones shortened; the snippets share their names."""
    fonts = write_fonts(checkout / "fonts")
    shorter = {
        "python examples/letters.py": ("--fonts", fonts, "--train", "8", "--held-out", "2"),
        "flowmo train --resume-from-ckpt": (
            "trainer.duration=8 images",
            "data.batch_size=8",
            "data.num_workers=0",
            "opt.lpips_weight=0",
        ),
    }
    shared, text = {}, page.read_text().replace("\\\n", " ")
    for package in re.findall(r"^import (\w+)", text, re.MULTILINE):
        pytest.importorskip(package)
    if "datasets" in sys.modules:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", checkout / "cache")
    for language, block in re.findall(r"^```([^\n]*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language == "python":
            capsys.readouterr()
            exec(compile(block, page.name, "exec"), shared)
            printed = capsys.readouterr().out.strip()
            assert not printed or f"# {printed}" in block, "the page says what the snippet prints"
        for command in block.splitlines() if language == "sh" else ():
            less = [word for start, words in shorter.items() if command.startswith(start) for word in words]
            program, *words = [*shlex.split(command, comments=True), *less]
            if program == "python":
                run_script(monkeypatch, *words)
            else:
                assert main(words) == 0, capsys.readouterr().err
    gc.collect()  # files that webdataset has not closed


def test_training_command_as_printed(checkout):
    """The recipe with its placeholders filled in, for two steps."""
    command = next(command for command in commands(PAGES[0], "sh") if command.startswith("flowmo train"))
    words = shlex.split(command.replace("PICTURES", "examples/pictures").replace("HELD_OUT", "examples/pictures"))[1:]
    settings = ["trainer.max_steps=2", "data.batch_size=2", "opt.lpips_weight=0", "data.num_workers=0"]
    small = ["model.hidden_size=64", "model.num_heads=2", "model.enc_hidden_size=64", "model.enc_num_heads=2"]
    assert main([*words, *settings, *small]) == 0
    assert (checkout / "results" / "nano" / "checkpoints" / "00000002.pth").is_file()


def printed(page, start):
    """The words of the one command of a page that begins so, without the program's name."""
    (command,) = [c for language in ("", "sh") for c in commands(page, language) if c.startswith(start)]
    return shlex.split(command)[1:]


def filled_in(words, **names):
    """What a reader would write for the names in capitals."""
    return [names.get(word, word) for word in words]


def test_more_of_the_readme_as_printed(checkout):
    """With pictures of ours for those of the reader's."""
    words = filled_in(printed(PAGES[0], "flowmo evaluate PICTURES"), PICTURES="examples/pictures")
    assert main([*words, "--no-lpips", "--features", "none", "--limit", "2"]) == 0
    assert (checkout / "out" / "index.html").is_file()
    checkpoint = "results/lo/checkpoints/01301186.pth"
    words = printed(PAGES[0], "flowmo push")
    assert main(["nano" if word == checkpoint else word for word in words] + ["--folder", "hub"]) == 0
    assert flowmo.load(checkout / "hub").identity() == flowmo.load("nano").identity()


@pytest.mark.parametrize("page", [PAGES[0], ROOT / "docs" / "generation.md"], ids=["README", "generation"])
def test_generation_as_printed(page, checkout):
    """From pictures by way of tokens and a generator to pictures, for two steps."""
    for folder in ("n01440764", "n03394916"):
        (checkout / "classes" / folder).mkdir(parents=True)
        shutil.copy(checkout / "examples" / "pictures" / "cat.jpg", checkout / "classes" / folder)
    assert main(filled_in(printed(page, "flowmo tokenize"), PICTURES="classes")) == 0
    small = ("generator.depth=1", "generator.hidden_size=64", "generator.num_heads=1", "trainer.max_steps=2")
    words = printed(page, "flowmo train --config configs/nano_generator.yaml")
    assert main([*words, *small, "data.num_workers=0", "data.batch_size=2"]) == 0
    words = [word.replace("00002000", "00000002") for word in printed(page, "flowmo generate")]
    assert main([*words, "--steps", "2", "--per-class", "1"]) == 0
    assert (checkout / "tench.png").is_file()


def test_other_data_as_printed(checkout):
    """Training, evaluation and files of four channels, for two steps of a smaller model."""
    page = ROOT / "docs" / "guides" / "other-data.md"
    exec(compile(blocks(page, "python")[0], page.name, "exec"), {})
    small = ("model.hidden_size=64", "model.num_heads=2", "model.enc_hidden_size=64", "model.enc_num_heads=2")
    small += ("trainer.max_steps=2", "data.num_workers=0", "data.batch_size=2", "opt.lpips_weight=0")
    assert main([*printed(page, "flowmo train"), *small]) == 0
    assert main([*printed(page, "flowmo evaluate"), "--no-lpips", "--features", "none"]) == 0
    for name in ("encode", "decode"):
        assert main(printed(page, f"flowmo {name}")) == 0
    assert flowmo.read_tensor("cat.tif", channels=4).shape == (4, 96, 96)


def test_a_context_model_as_printed(checkout, capsys, monkeypatch):
    """The file lies where encode looks for it."""
    pytest.importorskip("constriction")
    page = ROOT / "docs" / "codec.md"
    assert main(["convert", "nano", "model.safetensors"]) == 0
    for folder in ("IMAGES", "OTHERS"):
        (checkout / folder).mkdir()
        shutil.copy(checkout / "examples" / "pictures" / "cat.jpg", checkout / folder)
    assert main(printed(page, "flowmo tokenize IMAGES")) == 0
    assert main(printed(page, "flowmo tokenize OTHERS")) == 0
    script, *words = printed(page, "python runs/fit_context.py tokens")
    monkeypatch.syspath_prepend(ROOT / "runs")
    with pytest.raises(SystemExit, match="0"):
        run_script(monkeypatch, script, *words, "--hidden", "8", "--steps", "60")
    assert "1 others: packed 288.0" in capsys.readouterr().out
    words = ("examples/pictures/cat.jpg", "a.flowmo", "--fit", "crop", "--model", "model.safetensors")
    assert main(["encode", *words]) == 0
    assert (checkout / "a.flowmo").read_bytes()[3] >> 4 == 1, "coded"


LONG = [(page, line) for page in PAGES for language in ("", "sh") for line in commands(page, language)]


TOLD = [ROOT / "docs" / name for name in ("paper-map.md", "reproduction.md")]
"""Pages that have their commands in tables."""
IN_TABLES = {
    page: dict.fromkeys(re.findall(r"`((?:flowmo|torchrun|python -m reproduce) [^`]+)`", page.read_text()))
    for page in TOLD
}
LONG += [(page, line) for page, lines in IN_TABLES.items() for line in lines]


@pytest.mark.parametrize(("page", "line"), LONG, ids=[f"{page.name}: {line[:50]}" for page, line in LONG])
def test_every_command_is_understood(page, line, monkeypatch):
    """Its options and settings exist, and so do the files of this project that it names."""
    monkeypatch.chdir(ROOT)
    words = [word for word in shlex.split(line) if word != "..."]
    if words[:3] == ["python", "-m", "reproduce"]:
        build_study_parser().parse_args(words[3:])
        return
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
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    arguments = build_parser().parse_args([word for word in words if word not in settings])
    config = preset(getattr(arguments, "preset", None) or "lo")
    if getattr(arguments, "config", None):
        config = Config.from_yaml(arguments.config, config)
    config.override(*settings)


def find(name):
    """A module, or what lies in one, by its full name."""
    module, _, attribute = name.rpartition(".")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return getattr(find(module), attribute)


def test_the_map_of_the_paper_is_whole_and_leads_somewhere():
    text = TOLD[0].read_text()
    named = set(re.findall(r"`((?:flowmo|reproduce)(?:\.\w+)+)`", text))
    assert len(named) > 40
    for name in named:
        assert find(name) is not None, name
    settings = set(re.findall(r"`((?:data|model|opt|trainer|eval|generator)\.[\w.]+)`", text))
    assert settings - {"data.train"} <= set(FIELDS)
    for path in re.findall(r"`(configs/\S+?)`", text):
        assert (ROOT / path).is_file(), path
    first = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    for kind, numbers in (("table", range(1, 8)), ("figure", range(1, 14))):
        told = {int(n) for cell in first if cell.strip().startswith(kind) for n in re.findall(r"\d+", cell)}
        assert told == set(numbers), kind
    assert {int(n) for cell in first for n in re.findall(r"\((\d+)\)", cell)} == set(range(1, 15)), "equations"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    told = {row[2].strip("`"): row[3] for row in rows if row[2].strip("`") in FIELDS}
    defaults = flatten(Config())

    def shown(value):
        if isinstance(value, Duration):
            return f"{value.amount / 1e6:g}M {value.unit}"
        return f"{value:g}" if isinstance(value, float) else str(value).lower()

    assert len(told) > 15
    wrong = [name for name, text in told.items() if shown(defaults[name]) not in text]
    assert not wrong, "what the map gives as defaults are the defaults"


def test_every_study_is_on_the_reproduction_page():
    text = TOLD[1].read_text()
    for name in STUDIES:
        assert f"`python -m reproduce {name} " in text, name


def anchors(page):
    """Names of a page's headings in links, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line) for line in re.findall(r"^#+ (.+)$", text, re.MULTILINE))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_and_names_lead_somewhere(page):
    text = page.read_text()
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([\w-]+))?\)", text):
        path = page.parent / target if target else page
        assert target.startswith("https://") or path.exists(), target
        assert not anchor or path.suffix != ".md" or anchor in anchors(path), f"{target}#{anchor}"
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
    for page in (tmp_path / "site").rglob("*.html"):
        elsewhere = re.search(r'<(script|link|img|iframe)\b[^>]*(src|href)="(https?:)?//', page.read_text())
        assert elsewhere is None, f"{page.name} needs a network: {elsewhere}"
    shown = (tmp_path / "site" / "command-line.html").read_text()
    for command in ("flowmo encode", "flowmo data index", "flowmo train"):
        assert f"usage: {command}" in shown
