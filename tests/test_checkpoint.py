import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from conftest import release_shapes
from safetensors.torch import save_file

import flowmo
from flowmo import CheckpointError, FlowMo, preset
from flowmo.checkpoint import eight_bit
from flowmo.checkpoint import files as checkpoint
from flowmo.tokenizer import build


class Trap:
    """A pickle that writes a file when it is loaded, as a malicious checkpoint would."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def saved(tiny, tmp_path):
    path = tmp_path / "model.safetensors"
    flowmo.save(tiny, path)
    return path


def test_round_trip(tiny, saved, images):
    again = flowmo.load(saved)
    assert again.config == tiny.config
    assert again.identity() == tiny.identity()
    assert {p.data_ptr() % 64 for p in again.parameters()} == {0}  # or products can differ in the last bit
    assert torch.equal(again.encode(images).ids, tiny.encode(images).ids)
    assert torch.equal(again.decode(again.encode(images), steps=2), tiny.decode(tiny.encode(images), steps=2))
    assert not again.training
    assert all(p.requires_grad for p in again.parameters()), "ready to be trained on"
    assert torch.equal(flowmo.load(saved.parent).encode(images).ids, tiny.encode(images).ids), "a folder"


def test_float16_halves_the_file(tiny, saved, tmp_path):
    small = tmp_path / "half.safetensors"
    flowmo.save(tiny, small, torch.float16)
    assert small.stat().st_size < 0.6 * saved.stat().st_size
    assert next(flowmo.load(small).parameters()).dtype == torch.float32


def test_no_machine_paths_are_shipped(tiny_config, tmp_path):
    config = tiny_config.override("data.train=/home/me/pictures")
    flowmo.save(FlowMo(config), tmp_path / "m.safetensors")
    assert b"/home/me" not in (tmp_path / "m.safetensors").read_bytes()


def test_identity_tells_weights_and_settings_apart(tiny):
    before = tiny.identity()
    with torch.no_grad():
        tiny.encoder.code_out.bias[0] += 1e-3
    assert tiny.identity() != before


def test_overrides(saved):
    assert flowmo.load(saved, "eval.sampling.sample_steps=3").config.eval.sampling.sample_steps == 3
    with pytest.raises(flowmo.ConfigError):
        flowmo.load(saved, "model.nothing=3")
    with pytest.raises(flowmo.ConfigError, match=r"were trained with model\.dec_depth=3, which cannot"):
        flowmo.load(saved, "model.dec_depth=2")


def release_file(path, config, scale=1.0, **extra):
    state = {key: scale * torch.randn(shape) for key, shape in release_shapes(config).items()}
    ema = {key: value + scale for key, value in state.items()}
    torch.save({"total_steps": 5, "model_ema_state_dict": ema, "model_state_dict": state, **extra}, path)
    return state


def test_authors_checkpoint_loads_and_converts(tmp_path):
    config = preset("lo").override(
        "model.mup_width=2", "model.enc_mup_width=2", "model.enc_depth=1", "model.dec_depth=2"
    )
    path = tmp_path / "flowmo_lo.pth"
    state = release_file(path, config)
    tokenizer = flowmo.load(path)
    assert tokenizer.config.model == config.model
    assert torch.equal(tokenizer.decoder.time_in.weight, state["decoder.time_in.in_layer.weight"] + 1), "EMA by default"
    raw = flowmo.load(path, ema=False)
    assert torch.equal(raw.decoder.time_in.weight, state["decoder.time_in.in_layer.weight"])
    assert flowmo.load(path, "model.code_length=64").code_length == 64
    flowmo.save(tokenizer, tmp_path / "lo.safetensors")
    assert flowmo.load(tmp_path / "lo.safetensors").identity() == tokenizer.identity()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: [state.pop(key) for key in [*state] if key.startswith("encoder.double_blocks")], "empty"),
        (lambda state: state.update({"encoder.double_blocks.x.a": torch.zeros(1)}), "invalid literal"),
        (lambda state: state.update({"decoder.txt_in.weight": torch.zeros(4, 1)}), "do not make a FlowMo"),
        (
            lambda state: state.update({"decoder.double_blocks.1.txt_mod.lin.weight": torch.zeros(400, 4)}),
            "has 400 rows, not",
        ),
    ],
)
def test_damaged_checkpoints_of_the_authors_are_refused(tmp_path, change, sentence):
    config = preset("lo").override(
        "model.mup_width=2", "model.enc_mup_width=2", "model.enc_depth=1", "model.dec_depth=2"
    )
    state = {key: torch.randn(shape) for key, shape in release_shapes(config).items()}
    change(state)
    torch.save({"total_steps": 5, "model_ema_state_dict": state, "model_state_dict": state}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=sentence):
        flowmo.load(tmp_path / "a.pth")


def test_a_name_too_long_for_a_file_is_no_model():
    with pytest.raises(CheckpointError, match="No weights found"):
        flowmo.load("a" * 300)


def test_malicious_pickles_are_refused_and_never_run(tmp_path):
    loot = tmp_path / "loot"
    for name, content in (
        ("trap.pth", {"model_state_dict": Trap(loot)}),
        ("trap2.pth", Trap(loot)),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(CheckpointError, match="could run code"):
            flowmo.load(tmp_path / name)
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Trap(loot)))
    with pytest.raises(CheckpointError):
        flowmo.load(tmp_path / "raw.pth")
    (tmp_path / "raw.safetensors").write_bytes(pickle.dumps(Trap(loot)))
    with pytest.raises(CheckpointError):
        flowmo.load(tmp_path / "raw.safetensors")
    assert not loot.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_at_many_lengths(tiny, tmp_path, suffix):
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".pth":
        torch.save({"flowmo": 1, "config": tiny.config.to_dict(), "ema": tiny.state_dict()}, whole)
    else:
        flowmo.save(tiny, whole)
    flowmo.load(whole)
    content = whole.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1):
        cut = tmp_path / f"cut{suffix}"
        cut.write_bytes(content[:length])
        with pytest.raises(CheckpointError) as error:
            flowmo.load(cut)
        assert "\n" not in str(error.value)


def test_files_of_something_else(tiny, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="not written by flowmo"):
        flowmo.load(tmp_path / "foreign.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list"):
        flowmo.load(tmp_path / "list.pth")
    for facts in ({}, {"config": tiny.config.to_dict()}, {"ema": {}, "config": 3}):
        torch.save({"flowmo": 2, **facts}, tmp_path / "part.pth")
        with pytest.raises(CheckpointError, match="without its settings or weights"):
            flowmo.load(tmp_path / "part.pth")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="neither"):
        flowmo.load(tmp_path / "other.pth")
    metadata = {"format": "flowmo-1", "config": json.dumps({"model": {"patch_size": 7}})}
    save_file({"a": torch.zeros(1)}, tmp_path / "odd.safetensors", metadata)
    with pytest.raises(CheckpointError, match="settings that do not work"):
        flowmo.load(tmp_path / "odd.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "none.safetensors", {"format": "flowmo-1"})
    with pytest.raises(CheckpointError, match="holds no settings"):
        flowmo.load(tmp_path / "none.safetensors")


def test_another_architecture_or_nan_weights(tiny, tiny_config, tmp_path):
    state = tiny.state_dict()
    with pytest.raises(CheckpointError, match="another architecture"):
        build(tiny_config.override("model.dec_depth=2"), state)
    with pytest.raises(CheckpointError, match="another architecture"):
        build(tiny_config.override("model.context_dim=12"), state)
    state["encoder.code_out.bias"][0] = torch.nan
    with pytest.raises(CheckpointError, match="NaN"):
        build(tiny_config, state)


def test_names_that_are_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("results/run", "nano"):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(
        CheckpointError,
        match=r"results/run: No weights found under this name.* folder with model\.safetensors or with checkpo",
    ):
        flowmo.load("results/run")  # also a name on the Hub
    assert flowmo.load("nano").config.data.image_size == 128, "an empty folder hides no preset"
    for name in (tmp_path / "none.safetensors", "nanno", "lo"):
        with pytest.raises(CheckpointError, match=rf"{name}: No weights found.*\(nano, native\).*random"):
            flowmo.load(name)


def test_a_failed_write_leaves_nothing(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def fail(name):
        with open(name, "w") as file:
            file.write("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_whole(target, fail)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_files_have_the_permissions_of_new_ones_or_of_those_they_replace(tiny, tmp_path):
    before = os.umask(0o027)
    try:
        checkpoint.write_content(tmp_path / "new", "a")
        (tmp_path / "old").touch()
        (tmp_path / "old").chmod(0o600)
        checkpoint.write_content(tmp_path / "old", "a")
        flowmo.save(tiny, tmp_path / "tiny.safetensors")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"new": 0o640, "old": 0o600, "tiny.safetensors": 0o640}


def test_a_preset_is_not_a_run_of_its_name(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flowmo.save(tiny, "nano/model.safetensors")
    flowmo.save(tiny, "grey/model.safetensors")
    assert flowmo.load("nano").identity() != tiny.identity()
    for run in ("./nano", Path("nano"), "grey"):  # grey has no bundled weights
        assert flowmo.load(run).identity() == tiny.identity()


def test_counters_and_large_values_in_16_bits(tiny_config, tmp_path):
    """float16 ends at 65504."""
    tokenizer = FlowMo(tiny_config.override("model.quantization_type=vq", "model.vq_entries=16")).eval()
    tokenizer.quantizer.steps.fill_(70_000)
    flowmo.save(tokenizer, tmp_path / "a.safetensors", torch.float16)
    assert flowmo.load(tmp_path / "a.safetensors").quantizer.steps == 70_000
    with torch.no_grad():
        tokenizer.decoder.picture_out.weight[0, 0] = 1e6
    with pytest.raises(CheckpointError, match=r"picture_out\.weight has values beyond torch\.float16"):
        flowmo.save(tokenizer, tmp_path / "b.safetensors", torch.float16)
    assert not (tmp_path / "b.safetensors").exists()


def test_weights_are_saved_under_their_own_suffix_only(tiny, tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        flowmo.save(tiny, tmp_path / "model.bin")
    for dtype in (torch.int32, torch.uint8, torch.bool):
        with pytest.raises(CheckpointError, match=f"cannot be saved as {dtype}"):
            flowmo.save(tiny, tmp_path / "model.safetensors", dtype)
    assert not list(tmp_path.iterdir())


def test_eight_bits_round_each_row_to_a_127th_of_its_largest_weight(tmp_path):
    torch.manual_seed(0)
    state = {"a.weight": torch.randn(64, 96) * torch.logspace(-3, 2, 64)[:, None], "a.bias": torch.randn(64)}
    written = eight_bit.stored(state, torch.int8)
    assert written["a.weight"].dtype == torch.int8
    read = eight_bit.expand(written)
    assert read.keys() == state.keys()
    error = (read["a.weight"] - state["a.weight"]).abs()
    assert (error <= state["a.weight"].abs().amax(1, keepdim=True) / 127 / 2 * 1.0001).all()
    assert torch.equal(read["a.bias"], state["a.bias"])
    with pytest.raises(ValueError, match="without a scale"):
        eight_bit.expand({"a.weight": written["a.weight"]})


def test_a_file_of_eight_bits_is_a_quarter(tiny_model, tmp_path, capsys):
    from conftest import run_command

    output = tmp_path / "small.safetensors"
    status, out, _ = run_command(capsys, "convert", tiny_model, output, "--dtype", "int8")
    assert status == 0
    assert output.stat().st_size < 0.4 * tiny_model.stat().st_size
    again = flowmo.load(output)
    assert again.identity() in out  # of the rounded weights, which the file's codes belong to
    for name, value in flowmo.load(tiny_model).state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=float(value.abs().max()) / 200)
