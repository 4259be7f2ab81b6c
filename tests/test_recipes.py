"""The recipes in configs/ train as the authors' release does, refuse what cannot be meant, and print what is meant."""

import math
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_checkpoint import release_file

from flowmo import Config, FlowMo, load
from flowmo.checkpoint import files as checkpoint
from flowmo.cli import main
from flowmo.data import open_source
from flowmo.generate.tokenize import tokenize
from flowmo.train.ema import EMA
from flowmo.train.optimizer import build_optimizers, scale_initial_weights
from flowmo.train.trainer import Trainer

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
OF_THE_PAPER = ["hi", "hi_posttrain", "lo", "lo_posttrain", "small"]
TINY = (
    *("data.image_size=32", "data.num_workers=0", "data.max_microbatch=0", "data.global_batch_size=2"),
    *("model.patch_size=8", "model.hidden_size=64", "model.num_heads=2", "model.dec_depth=2", "model.code_length=4"),
    *("model.network=double_stream", "model.nested_dropout=0", "data.crop_sizes=", "opt.lpips_crop=0"),
    *("model.channels=3", "data.bit_depth=8", "model.window=8", "model.conv_depth=3"),
    *("model.enc_hidden_size=32", "model.enc_num_heads=1", "model.enc_depth=1", "opt.lpips_weight=0"),
    *("trainer.compile=false", "trainer.enable_bfloat16=false", "trainer.tensorboard=false"),
    *("trainer.best_metric=", "trainer.patience=0"),
)
SHAPE = (
    *("model.context_dim=18", "model.codebook_size_for_entropy=9", "model.code_layout=diagonal"),
    *("model.prediction=velocity", "opt.lpips_jitter=0", "opt.optimizer=adam", "model.quantization_type=lfq"),
)
"""Of FlowMo-Lo, so that one checkpoint serves every recipe."""


def recipe(name: str, *settings: str) -> Config:
    return Config.from_yaml(ROOT / "configs" / f"{name}.yaml").override(*settings)


@pytest.fixture
def pictures(tmp_path, picture_files):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for file in picture_files[:2]:
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def train(pictures, tmp_path, capsys):
    """``flowmo train`` with a recipe, at a tiny size; gives the exit code and all that was printed."""

    def run(name, *words, run=None, source=pictures):
        words = ["--config", ROOT / "configs" / f"{name}.yaml", "--results-dir", tmp_path / "results", *words]
        place = ["--experiment-name", run or name, "--device", "cpu"]
        code = main([str(word) for word in ["train", *words, *place, f"data.train={source}", *TINY]])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


# Learning rates and initial weights are the release's


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_one_learning_rate_for_all(name):
    """The release builds muP's base of the model's own width, so that Adam has one learning rate for every weight."""
    config = recipe(name, *TINY)
    tokenizer = FlowMo(config)
    before = {key: value.clone() for key, value in tokenizer.state_dict().items()}
    scale_initial_weights(tokenizer)
    assert all(torch.equal(value, before[key]) for key, value in tokenizer.state_dict().items())
    groups = build_optimizers(tokenizer)[0].param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(tokenizer.parameters()))
    assert {config.opt.lr * group["scale"] for group in groups} == {5e-5 if "posttrain" in name else 1e-4}


def test_initial_weights_have_the_releases_scale():
    """With every multiplier 1 they are PyTorch's: uniform in ±1/√(inputs), whose deviation is 1/√(3 · inputs); the
    gates of the decoder's residuals are 0. At these widths muP of base 768 would differ."""
    torch.manual_seed(0)
    config = recipe("lo", *TINY, "model.hidden_size=192", "model.num_heads=3")
    tokenizer = FlowMo(config)
    scale_initial_weights(tokenizer)
    checked = 0
    for name, module in tokenizer.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        weight, bias = (p.detach().numpy() for p in (module.weight, module.bias))
        inputs = weight.shape[1]
        if name.endswith("modulation") and "blocks" in name and weight.shape[0] == 6 * inputs:
            parts = [0, 1, 3, 4]  # shifts and scales; the others are gates
            assert not weight.reshape(6, inputs, inputs)[[2, 5]].any()
            assert not bias.reshape(6, inputs)[[2, 5]].any()
            weight, bias = weight.reshape(6, inputs, inputs)[parts], bias.reshape(6, inputs)[parts]
        assert weight.std() == pytest.approx(1 / math.sqrt(3 * inputs), rel=0.08), name
        assert max(np.abs(weight).max(), np.abs(bias).max()) <= 1 / math.sqrt(inputs) + 1e-6, name
        checked += 1
    assert checked > 20
    bias = tokenizer.encoder.code_embedding.detach()
    assert float(bias.abs().max()) <= 1 / math.sqrt(18)


# Stage 1B's EMA


def test_the_ema_of_stage_1b_is_the_releases():
    """0.9999 per step, whatever the batch: after 25 000 steps 0.9999^25000 = 8.2 % of it is still the start."""
    tokenizer = FlowMo(recipe("lo_posttrain", *TINY))
    for settings, steps in (([], range(25_000)), (["model.ema_update=release"], range(1_300_000, 1_325_000))):
        tokenizer.config = recipe("lo_posttrain", *TINY, *settings)
        for batch in (2, 64):
            average = EMA(tokenizer, batch)
            start = math.prod(1 - average.weight(step) for step in steps)
            assert start == pytest.approx(math.exp(25_000 * math.log(0.9999)), rel=1e-6)
            assert round(start, 3) == 0.082


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint of stage 1A whose EMA differs from its weights."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copy(ROOT / "examples" / "pictures" / "cat.jpg", folder)
    settings = (f"data.train={folder}", "trainer.duration=5 steps", "opt.lr=1e-2", "model.ema_decay=0.9")
    Trainer(recipe("lo", *TINY, *settings), folder / "run", report=lambda line: None).train()
    path = folder / "run" / "checkpoints" / "00000005.pth"
    content = checkpoint.read_pth(path)
    name = "decoder.picture_out.weight"
    assert not torch.allclose(content["model"][name], content["ema"][name])
    return path


@pytest.mark.parametrize("start", ["model", "ema"])
def test_stage_1b_starts_from_weights_that_are_said(base, train, tmp_path, start):
    """Its weights and its EMA both are the chosen ones, as numpy computes them from the file."""
    words = (
        *("--resume-from-ckpt", base, "trainer.duration=6 steps", "model.posttrain_sample_k=1"),
        *(f"trainer.start_weights={start}", "opt.lr=1e-30", "model.fix_initial_norms=false"),
    )
    code, printed = train("lo_posttrain", *words)
    assert code == 0
    assert f"trainer.start_weights={start}" in printed
    assert ("the raw weights, as the release" if start == "model" else "the EMA of the weights") in printed
    before = checkpoint.read_pth(base)[start]
    after = checkpoint.read_pth(tmp_path / "results" / "lo_posttrain" / "checkpoints" / "00000006.pth")
    for part in ("model", "ema"):
        for name, value in after[part].items():
            np.testing.assert_allclose(value.numpy(), before[name].numpy(), rtol=0, atol=1e-6, err_msg=name)
    weight = before["decoder.blocks.0.picture.qkv.weight"].numpy()
    norm = after["norms"]["decoder.blocks.0.picture.qkv.weight"]
    assert float(norm) == pytest.approx(float(np.sqrt((weight.astype(np.float64) ** 2).sum())), rel=1e-5)


def test_the_ema_of_a_run_of_stage_1b(base, train, tmp_path):
    """Three steps, against the release's rule computed from the weights of each."""
    words = ("--resume-from-ckpt", base, "model.posttrain_sample_k=1", "opt.lr=1e-3", "model.ema_decay=0.5")
    expected = checkpoint.read_pth(base)["model"]["decoder.picture_out.weight"].double().numpy()
    for step in (6, 7, 8):
        assert train("lo_posttrain", *words, f"trainer.duration={step} steps")[0] == 0
        content = checkpoint.read_pth(tmp_path / "results" / "lo_posttrain" / "checkpoints" / f"{step:08d}.pth")
        expected = 0.5 * expected + 0.5 * content["model"]["decoder.picture_out.weight"].double().numpy()
        ema = content["ema"]["decoder.picture_out.weight"].numpy()
        np.testing.assert_allclose(ema, expected, rtol=1e-5, atol=1e-7)


def test_stage_1b_from_the_authors_checkpoint_starts_with_a_fresh_ema(tmp_path, pictures):
    small = ("model.mup_width=2", "model.enc_mup_width=2", "model.enc_depth=1", "model.dec_depth=2")
    settings = recipe("lo_posttrain", *TINY, *small, "model.patch_size=4", f"data.train={pictures}")
    config = settings.override("trainer.duration=7 steps")
    state = release_file(tmp_path / "flowmo_lo.pth", config)
    run = Trainer(config, tmp_path / "run", resume_from=tmp_path / "flowmo_lo.pth", report=lambda line: None)
    weight = state["decoder.time_in.in_layer.weight"]
    assert torch.equal(run.task.model.decoder.time_in.weight, weight)
    assert torch.equal(run.ema.state["decoder.time_in.weight"], weight), "not the file's EMA"


# Residual gates


@pytest.mark.parametrize("gate", [0.0, 0.7])
def test_the_initial_gate_reaches_the_network(tiny_config, gate):
    decoder = FlowMo(tiny_config.override(f"model.initial_gate={gate}")).decoder
    time = torch.randn(1, decoder.width)
    modulations = [
        m for block in decoder.blocks for stream in (block.code, block.picture) for m in stream.modulate(time)
    ]
    gates = [m.gate for m in modulations if m is not None and m.gate is not None]
    assert len(gates) > len(decoder.blocks)
    for found in gates:
        torch.testing.assert_close(found, torch.full_like(found, gate))


def test_the_bundled_tokenizer_is_the_same():
    """It was trained with gates of 0: no version passed its setting of 1 to the network."""
    assert load("nano").identity() == "df8951806ce4b755"
    assert Config.from_yaml(ROOT / "configs" / "nano.yaml").model.initial_gate == 0


# What cannot be meant is refused; what is meant is printed


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_refuse_what_cannot_be_meant(file, train, base, tmp_path):
    """A stage-1B recipe alone, a length that belongs to another stage or has passed, a source of another kind."""
    config = Config.from_yaml(file)
    assert main(["train", "--config", str(file), "--results-dir", str(tmp_path / "nothing")]) != 0, "no data.train"
    assert not (tmp_path / "nothing").exists()
    if config.stage == "generator":
        code, printed = train(file.stem)
        assert code != 0
        assert "tokens" in printed
        return
    if config.stage == "posttrain":
        code, printed = train(file.stem)
        assert code != 0
        assert "Stage 1B" in printed
        assert "--resume-from-ckpt" in printed
    elif config.stage == "pretrain":
        code, printed = train(file.stem, "opt.freeze_encoder=true")
        assert code != 0
        assert "frozen encoder" in printed
        assert "--resume-from-ckpt" in printed
    assert not list((tmp_path / "results").glob(f"{file.stem}/checkpoints/*"))
    if file.stem in ("lo_posttrain", "hi_posttrain"):
        code, printed = train(file.stem, "--resume-from-ckpt", base, *SHAPE)
        assert code != 0
        assert "the length of stage 1A" in printed
        assert "trainer.duration=" in printed
    code, printed = train(file.stem, "--resume-from-ckpt", base, *SHAPE, "trainer.duration=5 steps")
    assert code != 0
    assert "trainer.duration='25005 steps'" in printed
    assert "done" not in printed


MEANT = {
    "hi": ("stage 1A, mode matching", "learning rate 0.0001", "EMA decay 0.999998 per step"),
    "lo": ("stage 1A, mode matching", "learning rate 0.0001", "encoder learns"),
    "small": ("stage 1A, mode matching", "learning rate 0.0001"),
    "nano": ("stage 1A, mode matching", "learning rate 0.001"),
    "nano_gpu": ("stage 1A, mode matching", "learning rate 0.001"),
    "native": ("stage 1A, mode matching", "learning rate 0.001", "EMA decay 0.999969 per step", "encoder learns"),
    "grey": ("stage 1A, mode matching", "learning rate 0.001", "encoder learns"),
    "multispectral": ("stage 1A, mode matching", "learning rate 0.001", "encoder learns"),
    "hi_posttrain": ("stage 1B, mode seeking", "learning rate 5e-05", "EMA decay 0.9999 per step", "encoder frozen"),
    "lo_posttrain": ("stage 1B, mode seeking", "learning rate 5e-05", "EMA decay 0.9999 per step", "encoder frozen"),
    "nano_posttrain": ("stage 1B, mode seeking", "learning rate 0.0001", "EMA decay 0.98692 per step"),
}


@pytest.mark.parametrize("name", [file.stem for file in RECIPES if "generator" not in file.stem])
def test_recipes_print_what_is_meant(name, train, base):
    steps, words = ("6", ("--resume-from-ckpt", base)) if "posttrain" in name else ("1", ())
    code, printed = train(name, *words, *SHAPE, "model.posttrain_sample_k=1", f"trainer.duration={steps} steps")
    assert code == 0, printed
    line = next(line for line in printed.splitlines() if line.startswith("stage 1"))
    assert all(part in line for part in MEANT[name]), line
    assert f"1 steps from step {int(steps) - 1} to step {steps}" in line


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("lo_generator", ("learning rate 0.0001", "network uvit, visible ids at weight 0.1")),
        ("nano_generator", ("learning rate 0.001", "network maskgit, visible ids at weight 0")),
    ],
)
def test_generators_recipes_print_what_is_meant(name, parts, train, tmp_path, tiny, pictures):
    tokenize(tiny, open_source(pictures), tmp_path / "tokens", model="tiny")
    small = ("generator.hidden_size=32", "generator.depth=2", "generator.num_heads=2", "generator.tokenizer=")
    code, printed = train(name, *small, "trainer.duration=1 step", source=tmp_path / "tokens")
    assert code == 0, printed
    line = next(line for line in printed.splitlines() if line.startswith("stage 2, generation"))
    assert all(part in line for part in parts), line


def test_mup_is_printed_where_it_scales(train):
    line = train("lo", "opt.mup_base_width=16", "trainer.duration=1 step")[1]
    assert "wide matrices of the encoder × 0.5 and the decoder × 0.25" in line


def test_a_run_that_is_resumed_names_the_settings_that_changed(train):
    assert train("lo", "trainer.duration=1 step", run="a")[0] == 0
    code, printed = train("lo", "trainer.duration=2 steps", "opt.mup_base_width=768", run="a")
    assert code == 0
    assert "settings that differ from the checkpoint's: opt.mup_base_width 0 -> 768, trainer.duration" in printed


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *RECIPES]


def test_every_printed_command_of_stage_1b_can_work():
    """Commands that use a stage-1B recipe name a checkpoint and end 25 000 steps after it."""
    found = 0
    for page in PAGES:
        text = re.sub(r"\\\n#?\s*", " ", page.read_text())
        for command in re.findall(r"(?:flowmo|torchrun)[^`\n]*configs/(?:lo|hi)_posttrain\.yaml[^`\n]*", text):
            if "train" not in command.split("--config")[0]:
                continue
            words = shlex.split(command)
            path = words[words.index("--resume-from-ckpt") + 1]
            (length,) = [word for word in words if word.startswith("trainer.duration=")]
            assert length == f"trainer.duration={int(path.rpartition('/')[2].removesuffix('.pth')) + 25_000} steps", (
                page
            )
            found += 1
    assert found >= 8
    stem = {"lo": 130, "hi": 80}
    for name, epochs in stem.items():
        last = math.ceil(epochs * 1_281_167 / 128)
        assert recipe(name).trainer.duration == f"{epochs} epochs"
        assert f"results/{name}/checkpoints/{last:08d}.pth" in (ROOT / "configs" / f"{name}_posttrain.yaml").read_text()
