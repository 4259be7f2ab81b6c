"""What people do to a command line: wrong words, wrong files, missing packages, a busy machine."""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
from operator import attrgetter
from pathlib import Path

import pytest
from conftest import run_command as run
from PIL import Image

import flowmo
from flowmo import ConfigError, cli
from flowmo.cli import build_parser, main, output, parse, threads
from flowmo.cli.commands import COMMANDS, DATA_COMMANDS, KINDS, WRITERS


def test_help_and_the_public_names_import_no_torch():
    code = (
        "import sys, flowmo\n"
        "from flowmo.cli import build_parser\n"
        "build_parser().format_help()\n"
        "assert {'load', 'Codes'} <= {*dir(flowmo)}\n"
        "assert not {'torch', 'numpy', 'PIL'} & {*sys.modules}, 'help waits for torch'\n"
        "from flowmo import *\n"
        "assert load is flowmo.load is flowmo.tokenizer.load and read_image is flowmo.images.read_image\n"
        "assert not hasattr(flowmo, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_choices_are_those_of_the_library():
    from flowmo.cli.models import DTYPES
    from flowmo.data import export
    from flowmo.evaluate import metrics
    from flowmo.precision import PRECISIONS

    options = [each for command in COMMANDS for each in command.options]
    choices = {flag: each.settings.get("choices") for each in options for flag in each.flags}
    assert (metrics.KINDS, (*export.WRITERS,)) == (KINDS, WRITERS)
    assert (choices["--precision"], choices["--dtype"]) == (PRECISIONS, (*DTYPES,))


def test_an_option_has_one_name_and_one_form_in_all_commands():
    """What a command writes is --output, and a flag takes the same kind of value everywhere."""
    kinds: dict[str, set] = {}
    for command in (*COMMANDS, *DATA_COMMANDS):
        flags = [flag for each in command.options for flag in each.flags]
        assert not {"--out", "--folder", "--count"} & {*flags} - ({"--count"} if command.name == "generate" else set())
        for each in command.options:
            for flag in each.flags:
                kinds.setdefault(flag, set()).add((each.settings.get("action"), each.settings.get("dest")))
    assert {flag: kind for flag, kind in kinds.items() if len(kind) > 1} == {}


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["encode", "a.jpg", "--out-dir", "d"], "output", "d/"),
        (["decode", "a.flowmo", "--out-dir=d"], "output", "d/"),
        (["reconstruct", "a.jpg", "--out=d"], "output", Path("d")),
        (["tokenize", "d", "--out", "t"], "output", Path("t")),
        (["generate", "g.pth", "--out", "t.png"], "output", Path("t.png")),
        (["push", "nano", "a/b", "--folder", "f"], "output", Path("f")),
        (["info", "--model", "lo"], "model", "lo"),
    ],
)
def test_former_names_still_work_but_are_not_shown(words, name, value, capsys):
    assert getattr(parse(words), name) == value
    former = next(word for word in words if word.startswith("--"))
    with pytest.raises(SystemExit):
        main([words[0], "--help"])
    assert f"{former} " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "flowmo: The following arguments are required: COMMAND. See flowmo --help."),
        (("decod",), "flowmo: There is no command 'decod'. Did you mean decode? See flowmo --help."),
        (("data", "shw", "x"), "Did you mean show? See flowmo data --help."),
        (("decode",), "flowmo decode: The following arguments are required: FILE. See flowmo decode --help."),
        (
            ("decode", "a.flowmo", "--steps", "1", "--sed", "2"),
            "no option '--sed' here. Did you mean --seed? See flowmo dec",
        ),
        (("encode", "a.jpg", "--pack"), "no option '--pack' here. Did you mean --packed? See flowmo encode --help."),
        (("encode", "a.jpg", "--out-d=b"), "no option '--out-d' here. Did you mean --output?"),
        (("info", "nano", "lo"), "no argument 'lo' here. See flowmo info --help."),
        (("decode", "a.flowmo", "--seed", "x"), "--seed: 'x' is not a whole number from 0 to "),
        (("decode", "a.flowmo", "--seed", "-1"), "'-1' is not a whole number from 0 to "),
        (("decode", "a.flowmo", "--steps", "1" * 400 + "x"), "is not a whole number from 1. See"),
        (("decode", "a.flowmo", "--guidance", "inf"), "--guidance: 'inf' is not a number. See"),
        (("decode", "a.flowmo", "--device", "abacus"), "this machine has no device 'abacus'"),
        (("demo", "--port", "99999"), "'99999' is not a whole number from 1 to 65535. See flowmo demo --help."),
        (("encode", "a.jpg", "--fit", "hole"), "--fit cannot be 'hole'. Did you mean whole?"),
    ],
)
def test_wrong_words_are_answered_by_one_line(words, sentence, capsys):
    with pytest.raises(SystemExit) as status:
        main(list(words))
    error = capsys.readouterr().err
    assert (status.value.code, error.count("\n")) == (2, 1)
    assert sentence in error


def test_a_whole_number_has_no_upper_limit_of_its_own():
    assert parse(["encode", "a.jpg"]).images == [Path("a.jpg")]
    assert parse(["decode", "a.flowmo", "--steps", "9" * 400]).steps == int("9" * 400)


@pytest.fixture
def code(tiny_model, photo):
    """The photograph as a .flowmo file."""
    assert main(["encode", str(photo), "--model", str(tiny_model)]) == 0
    return photo.with_suffix(".flowmo")


def test_the_second_name_after_a_code_is_its_image(capsys, tiny_model, code):
    """In any format, also one that cannot be written."""
    model = ("--model", tiny_model, "--steps", "1")
    if ".avif" in output.image_suffixes():
        assert run(capsys, "decode", code, code.with_suffix(".AVIF"), *model)[0] == 0
        with Image.open(code.with_suffix(".AVIF")) as image:
            assert (image.format, image.size) == ("AVIF", (70, 50))
    for name in ("x.heic", "x.bmp", "x"):
        status, _, error = run(capsys, "decode", code, code.parent / name, *model)
        assert (status, error.count("\n")) == (2, 1)
        assert f"Cannot write {code.parent / name}: its format is unknown" in error
    status, _, error = run(capsys, "decode", code, code, code.parent / "x.png", *model)
    assert "x.png names one file, for one input." in error


def test_both_pipes_can_be_named(capsysbinary, monkeypatch, tiny_model, photo):
    def through(content, *words):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert main([*words, "--model", str(tiny_model)]) == 0
        return capsysbinary.readouterr().out

    content = through(photo.read_bytes(), "encode", "-", "-")
    with Image.open(io.BytesIO(through(content, "decode", "-", "-", "--steps", "1"))) as image:
        assert image.size == (70, 50)


def test_nothing_is_overwritten_unless_forced(capsys, monkeypatch, tmp_path, tiny_model, photo, code):
    before = code.read_bytes()
    (tmp_path / "taken").mkdir()
    for name in ("photo.png", "README.md", "a.safetensors", "a.index.json"):
        (tmp_path / "taken" / name).write_text("mine")
    taken = tmp_path / "taken"
    monkeypatch.setattr(flowmo, "load", lambda *_, **__: pytest.fail("the model is loaded before the check"))
    for words in (
        ("encode", photo, "--packed"),
        ("encode", photo, "-o", taken / "README.md"),
        ("encode", photo, photo.parent / "missing.jpg"),
        ("decode", code, taken / "photo.png"),
        ("reconstruct", photo, "-o", taken),
        ("convert", tiny_model, taken / "a.safetensors"),
        ("generate", "g.pth", "-o", taken / "photo.png"),
        ("push", tiny_model, "someone/flowmo", "-o", taken),
        ("data", "index", taken / "a.tar"),
    ):
        status, _, error = run(capsys, *words)
        assert (status, error.count("\n")) == (2, 1), words
        assert "already. Add --force to overwrite" in error, words
    assert {path.read_text() for path in taken.iterdir()} == {"mine"}
    for words in (("encode", photo, "-o", photo), ("reconstruct", photo, "--fit", "crop", "--grid", photo)):
        assert run(capsys, *words, "--force")[::2] == (2, f"flowmo: {photo} is an input. Name another output.\n")
    monkeypatch.undo()
    assert run(capsys, "encode", photo, "--packed", "--force", "--model", tiny_model)[0] == 0
    assert code.read_bytes()[3] >> 4 != before[3] >> 4 or code.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--torch", "--dtype", "int8"], "--torch writes float32"),
        (["--examples", "a.png"], "Add --page"),
        (["--torch", "--runtime", "."], "Add --page"),
    ],
)
def test_an_export_refuses_options_that_it_would_ignore(options, message, tmp_path, capsys):
    status, _, error = run(capsys, "export", "nano", tmp_path / "out", *options)
    assert (status, message in error) == (2, True), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["export", "report", "push"])
def test_missing_packages_are_named_before_the_work(capsys, monkeypatch, tmp_path, command):
    words, package = {
        "export": (["export", "nano", str(tmp_path / "out")], "onnxscript"),
        "report": (["evaluate", str(tmp_path), "--report", "out"], "matplotlib"),
        "push": (["push", "nano", "someone/flowmo"], "huggingface_hub"),
    }[command]
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(flowmo, "load", lambda *_, **__: pytest.fail("the model is loaded before the check"))
    status, _, error = run(capsys, *words)
    assert (status, error.count("\n")) == (2, 1)
    assert f"needs {package}. Install it: pip install 'flowmo[" in error


def test_push_without_a_network_is_one_sentence(capsys, monkeypatch, tiny_model):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    status, _, error = run(capsys, "push", tiny_model, "someone/flowmo")
    assert (status, error.count("\n")) == (2, 1)
    assert error.startswith("flowmo: The Hub did not accept someone/flowmo (")


@pytest.mark.parametrize("what", [("eval.eval_dir=run",), ("pictures", "--reference", "others")])
def test_evaluate_refuses_options_that_it_would_not_use(capsys, what):
    """Those of reconstructions, for a run and for generated images."""
    words = ("--limit", "3", "--steps", "2", "--seed", "1", "--guidance", "2", "--size", "32", "--fit", "whole")
    words += ("--bpp", "1", "--peers", "jpeg", "--report", "out", "--enlarge")
    status, _, error = run(capsys, "evaluate", *what, *words)
    assert (status, error.count("\n")) == (2, 1)
    assert "only for reconstructions of PICTURES" in error
    assert all(word in error for word in words if word.startswith("--"))
    assert "--seed: only" in run(capsys, "evaluate", *what, "--seed", "1")[2]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("pictures", "--reference", "others", "--model", "a", "--no-lpips"), "--model, --no-lpips: not with --ref"),
        (("pictures", "--reference", "others", "no.such_setting=1"), "no.such_setting=1: not with --reference"),
        (("eval.eval_dir=run", "--model", "a"), "--model: a run has its own model"),
        (("pictures", "--experiment-name", "a"), "--experiment-name: only for runs"),
    ],
)
def test_evaluate_refuses_options_of_another_use(capsys, words, named):
    status, _, error = run(capsys, "evaluate", *words)
    assert (status, error.count("\n")) == (2, 1)
    assert named in error


def test_pictures_are_not_measured_with_the_settings_of_a_run(capsys):
    """They would be ignored, and another model measured."""
    for setting in ("eval.eval_dir=run", "eval.force_ckpt_path=a.pth", "eval.subsample_rate=10"):
        status, _, error = run(capsys, "evaluate", "pictures", setting)
        assert (status, error.count("\n")) == (2, 1)
        assert f"{setting} is for runs" in error


def test_a_report_replaces_no_other_page(capsys, tmp_path):
    """A folder that ``--report`` made may be written again; the index of a site may not."""
    (tmp_path / "index.html").write_text("a site")
    status, _, error = run(capsys, "evaluate", "pictures", "--report", tmp_path)
    assert (status, error.count("\n")) == (2, 1)
    assert "index.html is not of a report" in error
    (tmp_path / "report.json").write_text("[]")
    assert "index.html is not of a report" in run(capsys, "evaluate", "pictures", "--report", tmp_path)[2]
    (tmp_path / "report.json").write_text('{"header": {}, "rows": [], "published": []}')
    assert "no such folder" in run(capsys, "evaluate", tmp_path / "none", "--report", tmp_path)[2]
    (tmp_path / "report.json").unlink()
    (tmp_path / "measured").mkdir()
    assert "no such folder" in run(capsys, "evaluate", tmp_path / "none", "--report", tmp_path)[2]
    assert "is a file" in run(capsys, "evaluate", "pictures", "--report", tmp_path / "index.html" / "out")[2]


def test_no_network_is_looked_for_before_model_and_peers_are_checked(capsys, monkeypatch, tiny_model, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    monkeypatch.setattr("flowmo.evaluate.reconstruction.Evaluators.find", lambda *_: pytest.fail("too early"))
    for words, message in ((("--model", "nothere"), "nothere"), (("--peers", "jpeg=90"), "jpeg takes no value")):
        status, _, error = run(capsys, "evaluate", tmp_path, "--model", tiny_model, *words)
        assert (status, error.count("\n"), message in error) == (2, 1, True), error


def test_words_out_of_order_are_explained(capsys):
    def rejection(*words):
        with pytest.raises(SystemExit):
            main([*words])
        return capsys.readouterr().err

    assert "before the options" in rejection("encode", "cat.jpg", "--model", "native", "out.flowmo")
    assert "before the options" not in rejection("info", "nano", "extra", "--json")
    unset = rejection("train", "data.train=pictures", "opt.lr", "3", "--results-dir", "out")
    assert "There is no argument 'opt.lr' here. A setting is one word: opt.lr=VALUE." in unset
    assert "Write PICTURES before --peers" in run(capsys, "evaluate", "--peers", "jpeg", "webp", "pictures")[2]


def test_evaluate_asks_for_images_before_it_looks_for_networks(capsys, monkeypatch):
    monkeypatch.setattr("flowmo.evaluate.reconstruction.Evaluators.find", lambda *_: pytest.fail("too early"))
    status, _, error = run(capsys, "evaluate")
    assert (status, error.count("\n")) == (2, 1)
    assert "Name images, or a run" in error


def test_no_input_is_overwritten(capsys, tmp_path, tiny_model, photo, code):
    before = code.read_bytes()
    named = code.rename(code.with_suffix(".png"))
    tar = tmp_path / "images.tar"
    with tarfile.open(tar, "w") as archive:
        archive.add(photo, photo.name)
    content = tar.read_bytes()
    for words in (("decode", named, named, "--model", tiny_model), ("data", "index", tar, "-o", tar)):
        status, _, error = run(capsys, *words, "--force")
        assert (status, "is an input. Name another output." in error) == (2, True)
    assert (named.read_bytes(), tar.read_bytes()) == (before, content)
    status, _, error = run(capsys, "encode", photo, "--output", tmp_path / "x.png", "--model", tiny_model)
    assert (status, "encode writes no image" in error) == (2, True)


@pytest.mark.parametrize("words", [("data", "show", "pictures"), ("completion", "bash")])
def test_commands_without_settings_refuse_them(capsys, words):
    with pytest.raises(SystemExit):
        main([*words, "data.value_range=junk"])
    assert "It takes no settings such as 'data.value_range=junk'" in capsys.readouterr().err


def test_weights_keep_the_settings_that_they_were_trained_for(tiny_model):
    own = flowmo.load(tiny_model).config
    for name, value in (("data.image_size", 64), ("model.code_length", 4), ("model.quantization_type", "bsq")):
        for read in (flowmo.load, lambda source, *settings: cli.run(["info", str(source), *settings])):
            with pytest.raises(ConfigError, match=f"were trained with {name}={attrgetter(name)(own)}, which"):
                read(tiny_model, "eval.sampling.sample_steps=2", f"{name}={value}")
    assert flowmo.load(tiny_model, "eval.sampling.sample_steps=2").config.eval.sampling.sample_steps == 2


def test_evaluate_leaves_broken_and_small_images_out_and_says_so(capsys, tmp_path, tiny_model, picture):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "empty.JPG").touch()
    picture.resize((40, 31)).save(folder / "small.png")
    for name in ("a.PNG", "b.png"):
        picture.save(folder / name)
    words = ("evaluate", folder, "--model", tiny_model, "--no-lpips", "--features", "none", "--steps", "1")
    status, out, error = run(capsys, *words)
    assert status == 0
    assert "2 images; " in out
    assert "2 images left out: unreadable or too small" in out
    assert f"left out: {folder}/empty.JPG: cannot be read (the file is empty)." in error
    assert "40×31, smaller than the crop of 32×32" in error


def test_names_of_all_kinds(capsys, tmp_path, tiny_model, photo):
    """Capitals, spaces, other scripts and line breaks, and a folder that does not exist yet."""
    for name in ("A B.JPG", "猫.jpeg", "two\nlines.jpg"):
        source = tmp_path / name
        source.write_bytes(photo.read_bytes())
        target = tmp_path / "new" / name / "x.FLOWMO"
        assert run(capsys, "encode", source, target, "--model", tiny_model)[0] == 0
        assert run(capsys, "decode", target, "--model", tiny_model, "--steps", "1")[0] == 0
        assert target.with_name("x.flowmo.png").is_file()
        status, _, error = run(capsys, "encode", source.with_suffix(".gone"), "--model", tiny_model)
        assert (status, error.count("\n")) == (2, 1)
    found = run(capsys, "encode", tmp_path / "A B.JPG", photo, "-o", tmp_path / "many", "--model", tiny_model)
    assert found[0] == 0
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == ["A B.flowmo", "photo.flowmo"]


@pytest.mark.parametrize(
    ("source", "target", "sentence"),
    [
        ("missing.jpg", "a.flowmo", "missing.jpg: no such file."),
        ("empty.jpg", "a.flowmo", "empty.jpg: cannot be read (the file is empty)."),
        ("folder", "a.flowmo", "folder: cannot be read ([Errno 21] Is a directory:"),
        ("photo.jpg", "photo.jpg/a.flowmo", "photo.jpg is a file, not a folder."),
        ("photo.jpg", "locked/a.flowmo", "You may not write to the folder"),
    ],
)
def test_files_that_cannot_be_read_or_written(
    capsys, monkeypatch, tmp_path, tiny_model, photo, source, target, sentence
):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(output.os, "access", lambda path, mode: Path(path).name != "locked")  # root may write anywhere
    status, _, error = run(capsys, "encode", tmp_path / source, "-o", tmp_path / target, "--model", tiny_model)
    assert (status, error.count("\n")) == (2, 1)
    assert sentence in error
    assert not (tmp_path / target).exists()


def test_a_device_is_written_to_and_not_replaced(capsys, tiny_model, photo):
    assert run(capsys, "encode", photo, "-o", "/dev/null", "--model", tiny_model)[0] == 0
    assert Path("/dev/null").is_char_device()


def test_ctrl_c_ends_without_a_traceback(capsys, monkeypatch):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("flowmo.cli.models.info", interrupt)
    assert run(capsys, "info") == (130, "", "flowmo: interrupted\n")


def test_progress_tells_the_time_left(capsys, monkeypatch):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(output.time, "monotonic", lambda: next(clock))
    progress = output.Progress("files")
    for done in range(1, 5):
        progress(done, 4)
    assert capsys.readouterr().err == "flowmo: files 2 of 4, 0:00:40 left\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    progress = output.Progress("a\nb")
    progress(3, 4)
    assert capsys.readouterr().err == "\ra b 3 of 4, 0:00:07 left\033[K"
    progress(4, 4)
    assert capsys.readouterr().err.endswith("\r\033[K")


STAT = "cpu  9 9 9 9\ncpu0 {} 0 50 900 7 0 0 0 0 0\ncpu1 100 {} 0 800 0 1 1 1 0 0\ncpu2 999 0 0 0 0 0 0 0 0 0\nintr 5\n"


def test_load_is_that_of_others_on_the_own_cpus(monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "STAT", tmp_path / "stat")
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(threads.time, "process_time", lambda: 1.0)
    assert threads.Load.now() is None
    threads.STAT.write_text(STAT.format(100, 0))
    assert threads.Load.now().others == (100 + 50 + 100 + 3) / threads.os.sysconf("SC_CLK_TCK") - 1


def test_a_quota_counts_as_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "QUOTA", tmp_path / "cpu.max")
    assert threads.quota() == float("inf")
    for text, cores in (("max 100000\n", float("inf")), ("150000 100000\n", 1.5)):
        threads.QUOTA.write_text(text)
        assert threads.quota() == cores


@pytest.mark.parametrize(
    ("command", "busy", "chosen"),
    [
        ("encode", 3.1, 1),
        ("encode", 9, 1),
        ("encode", 1.2, 3),
        ("encode", 0, None),
        ("train", 3.1, None),
        ("info", 3, None),
    ],
)
def test_threads_follow_the_load_only_where_bits_may(monkeypatch, capsys, command, busy, chosen):
    """Short commands take the free cores. Long ones keep theirs, so that a run resumes to the same bits, and say so."""
    import torch

    named = []
    for name in threads.NAMED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", named.append)
    monkeypatch.setattr(threads.Load, "now", lambda: threads.Load(12.0, 50.0 + 2 * busy))
    monkeypatch.setattr(threads, "quota", lambda: float("inf"))
    threads.choose(command, threads.Load(10.0, 50.0))
    assert named == ([chosen] if chosen else [])
    advice = "flowmo: Other processes keep 3 of 4 cores busy. OMP_NUM_THREADS=1 may be faster.\n"
    assert capsys.readouterr().err == (advice if command == "train" else "")
    named.clear()
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    threads.choose(command, threads.Load(10.0, 50.0))
    assert named == [], "a choice of one's own stands"


def test_the_parser_of_every_command_is_one_that_answers_in_one_line():
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert {type(parser).__name__ for parser in commands.choices.values()} == {"Parser"}
