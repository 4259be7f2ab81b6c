"""New runs from trained weights: every source, what is kept and refused, and ids that outlive a new decoder."""

import json
import shlex
import shutil

import pytest
import torch
from conftest import ROOT, TINY, TINY_NATIVE, open_gates, run_command
from test_checkpoint import release_file
from test_docs import commands, run_script, write_fonts

import flowmo
from flowmo import Config, FlowMo
from flowmo.codec.file import Codec
from flowmo.config import FIELDS, FINE_TUNING, flatten
from flowmo.errors import FlowMoError
from flowmo.generate.samples import check_pair
from flowmo.losses.perceptual import build_distance
from flowmo.train.cost import training_flops, training_memory

NO_LPIPS = "opt.lpips_weight=0"


@pytest.fixture
def base(tmp_path):
    """A tokenizer whose settings, loss and sampling are not the defaults."""
    own = ("model.prediction=image", "opt.loss_space=image", "opt.anchor=0.5", "eval.sampling.sample_steps=1")
    torch.manual_seed(0)
    tokenizer = open_gates(FlowMo(Config.from_dict(TINY).override(*own, "opt.lpips_weight=0", "opt.lr=0.5"))).eval()
    with torch.no_grad():
        tokenizer.encoder.code_embedding[0] = -0.0  # as `nano` has; an EMA makes it 0.0
    flowmo.save(tokenizer, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


@pytest.fixture
def train(tmp_path, class_folder, capsys):
    """``flowmo train`` in little; gives its status and both outputs."""

    def run(name, *words, settings=()):
        little = ("data.num_workers=0", "trainer.tensorboard=false", "trainer.sample_every=0", NO_LPIPS)
        little += (
            "data.batch_size=2",
            "data.max_microbatch=2",
            "trainer.enable_bfloat16=false",
            "trainer.duration=2 steps",
        )
        place = ("--experiment-name", name, "--results-dir", tmp_path / "results", "--device", "cpu")
        words += (*place, f"data.train={class_folder}", *little, *settings)
        status, out, err = run_command(capsys, "train", *words)
        return status, out + err

    return run


def final_path(tmp_path, name):
    return sorted((tmp_path / "results" / name / "checkpoints").iterdir())[-1]


def final(tmp_path, name):
    """Weights, EMA and metadata of a run's last checkpoint."""
    return torch.load(final_path(tmp_path, name), weights_only=True)


def assert_equal(found, expected, tolerance=0.0):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("form", ["file", "int8", "folder", "authors at step 5"])
def test_a_new_run_starts_from_what_load_gives(form, base, train, tmp_path):
    """With a learning rate of almost 0, weights and EMA stay those of ``flowmo.load``."""
    source = base
    if form == "int8":
        source = tmp_path / "int8.safetensors"
        flowmo.save(flowmo.load(base), source, torch.int8)
    if form == "folder":
        source = tmp_path / "folder"
        flowmo.load(base).save_pretrained(source)
    if form == "authors at step 5":
        source = tmp_path / "flowmo_lo.pth"
        shape = ("model.mup_width=2", "model.enc_mup_width=2", "model.enc_depth=1", "model.dec_depth=2")
        release_file(source, Config().override(*shape), scale=0.02)
    still = ("opt.lr=1e-30", "model.fix_initial_norms=false", "data.image_size=32")
    status, printed = train("run", "--resume-from-ckpt", source, settings=still)
    assert status == 0, printed
    assert f"starts a new run from the weights of {source}" in printed
    assert "from step 0 to step 2" in printed
    loaded, content = flowmo.load(source), final(tmp_path, "run")
    assert content["step"] == 2
    assert_equal(content["model"], loaded.state_dict(), 1e-20)
    assert_equal(content["ema"], loaded.state_dict(), 1e-20)


def test_a_run_without_settings_takes_the_models(base, train, tmp_path):
    """Architecture, loss and sampling are the model's, the rest are for fine-tuning; a stage of its own stays none."""
    assert train("run", "--resume-from-ckpt", base)[0] == 0
    found, model = flatten(flowmo.load(tmp_path / "results" / "run").config), flatten(flowmo.load(base).config)
    own = [name for name in FIELDS if name.startswith(("model.", "eval.sampling.")) and name != "model.base"]
    assert all(found[name] == model[name] for name in (*own, "data.image_size", "opt.loss_space", "opt.anchor"))
    rest = flatten(Config.from_dict(FINE_TUNING))
    assert all(found[name] == rest[name] for name in ("opt.lr", "opt.warmup", "trainer.keep_every"))
    posttrained = tmp_path / "posttrained.safetensors"
    config = Config.from_dict(TINY).override("model.posttrain_sample=true", "opt.lpips_mode=resnet")
    flowmo.save(FlowMo(config), posttrained)
    status, printed = train("second", "--resume-from-ckpt", posttrained)
    assert status == 0
    assert "stage 1A" in printed
    assert flowmo.load(tmp_path / "results" / "second").config.opt.lpips_mode == FINE_TUNING["opt"]["lpips_mode"]


def test_a_run_without_a_model_asks_for_one(train, tmp_path):
    status, printed = train("run")
    assert status == 2
    assert "--preset or --config" in printed
    assert "--resume-from-ckpt" in printed
    assert not (tmp_path / "results").exists()


def test_the_same_command_resumes_exactly_without_the_first_weights(base, train, tmp_path):
    words = ("--resume-from-ckpt", base)
    assert train("whole", *words, settings=("model.train=decoder", "trainer.duration=4 steps"))[0] == 0
    assert train("parts", *words, settings=("model.train=decoder",))[0] == 0
    base.unlink()
    assert train("parts", *words, settings=("trainer.duration=4 steps",))[0] == 0
    whole, parts = final(tmp_path, "whole"), final(tmp_path, "parts")
    assert whole["step"] == parts["step"] == 4
    for part in ("model", "ema", "optimizer"):
        assert_equal(parts[part], whole[part])
    assert whole["config"]["model"]["base"] == parts["config"]["model"]["base"] != ""


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            ("model.enc_depth=3",),
            [
                "model.enc_depth 2 -> 3",
                "encoder.blocks.1.picture.qkv.weight (missing in the file, (96, 32) here)",
                " and 21 more",  # of the 24 of a block
            ],
        ),
        (
            ("model.context_dim=4",),
            ["model.context_dim 8 -> 4", "encoder.code_out.weight ((8, 32) in the file, (4, 32) here)"],
        ),
        (("model.code_length=4",), ["model.code_length 6 -> 4"]),
    ],
)
def test_weights_that_do_not_fit_are_named(settings, expected, base, train):
    status, printed = train("run", "--resume-from-ckpt", base, settings=settings)
    assert status == 2
    assert all(text in printed for text in expected), printed
    assert len(printed) < 1500


def test_tensors_of_a_training_checkpoint_that_do_not_fit_are_named(base, train, tmp_path):
    assert train("run", "--resume-from-ckpt", base)[0] == 0
    for source in ((), ("--resume-from-ckpt", tmp_path / "results" / "run")):
        status, printed = train("other" if source else "run", *source, settings=("model.context_dim=4",))
        assert status == 2
        assert "context_dim 8 -> 4. These tensors do not fit: encoder.code_out.weight ((8, 32) in the file," in printed


def test_a_run_without_settings_reads_and_writes_images_as_its_model_does(tmp_path, train):
    torch.manual_seed(0)
    own = ("data.bit_depth=16", "data.value_range=0,4095", "opt.perceptual_channels=2,1,0", "opt.lpips_weight=0")
    flowmo.save(FlowMo(Config.from_dict(TINY).override(*own)), tmp_path / "deep.safetensors")
    status, printed = train("run", "--resume-from-ckpt", tmp_path / "deep.safetensors")
    assert status == 0, printed
    config = flowmo.load(tmp_path / "results" / "run").config
    assert (config.data.bit_depth, config.data.value_range, config.opt.perceptual_channels) == (16, "0,4095", "2,1,0")
    assert "the model's own" not in printed
    _, printed = train("b", "--resume-from-ckpt", tmp_path / "deep.safetensors", settings=("data.value_range=0,1023",))
    assert "settings that differ from the model's own: data.value_range 0,4095 -> 0,1023\n" in printed


def test_a_model_of_any_size_is_fine_tuned_at_another(native, train, tmp_path):
    """The number of its code tokens follows the image's area, and is no part of the model or of its identity."""
    flowmo.save(native, tmp_path / "native.safetensors")
    larger = ("data.image_size=96", "model.code_length=36", "model.train=decoder")
    status, out = train("larger", "--resume-from-ckpt", tmp_path / "native.safetensors", settings=larger)
    assert status == 0, out
    tuned = flowmo.load(tmp_path / "results" / "larger")
    assert tuned.config.data.image_size == 96
    assert tuned.identity() == flowmo.load(tmp_path / "native.safetensors").identity()


def test_weights_that_are_not_finite_are_named(base, train):
    tokenizer = flowmo.load(base)
    with torch.no_grad():
        tokenizer.decoder.code_in.weight[0, 0] = torch.nan
    flowmo.save(tokenizer, base)
    status, printed = train("run", "--resume-from-ckpt", base)
    assert (status, printed) == (
        2,
        f"flowmo: {base}: decoder.code_in.weight holds NaN or infinite values. Start from other weights.\n",
    )


@pytest.mark.parametrize("trained", ["encoder", "decoder"])
def test_only_what_is_trained_changes(trained, base, train, tmp_path):
    assert train("run", "--resume-from-ckpt", base, settings=(f"model.train={trained}",))[0] == 0
    content, before = final(tmp_path, "run"), flowmo.load(base).state_dict()
    for part in ("model", "ema"):
        changed = {name.split(".")[0] for name, value in content[part].items() if not torch.equal(value, before[name])}
        assert changed == {trained}
    assert {name.split(".")[0] for name in content["optimizer"]} == {trained}, "memory of the frozen network"


def test_frozen_random_networks_are_refused(train):
    for trained, frozen in (("decoder", "encoder"), ("encoder", "decoder")):
        status, printed = train("run", "--preset", "nano", settings=(f"model.train={trained}",))
        assert status == 2
        assert f"model.train={trained} trains with a frozen {frozen}" in printed


def test_ids_outlive_a_new_decoder(base, train, tmp_path, picture):
    """Files, generators and runs of runs: the identity of the ids is the first tokenizer's while its encoder is."""
    assert train("a", "--resume-from-ckpt", base, settings=("model.train=decoder",))[0] == 0
    flowmo.save(flowmo.load(tmp_path / "results" / "a"), tmp_path / "a.safetensors")
    again = ("--resume-from-ckpt", tmp_path / "a.safetensors")
    assert train("b", *again, settings=("model.train=decoder",))[0] == 0
    assert train("c", *again)[0] == 0
    results = tmp_path / "results"
    old, a, b, c = map(flowmo.load, (base, tmp_path / "a.safetensors", results / "b", results / "c"))
    assert old.identity() == old.weights_identity() == a.identity() == b.identity()
    assert len({model.weights_identity() for model in (old, a, b, c)}) == 4
    assert c.identity() == c.weights_identity(), "its encoder has other ids"
    content = Codec(old).pack(old.encode_image(picture))
    assert content == Codec(b).pack(b.encode_image(picture))
    decoded = b.decode_image(Codec(b).unpack(content))
    assert decoded.size == picture.size
    assert decoded.tobytes() != old.decode_image(Codec(old).unpack(content)).tobytes()
    with pytest.raises(FlowMoError, match="written by tokenizer"):
        Codec(c).unpack(content)
    vocabulary = type("Vocabulary", (), {"tokenizer": old.identity(), "model": "base"})
    check_pair(type("Generator", (), {"vocabulary": vocabulary}), b)
    with torch.no_grad():
        b.encoder.code_embedding[0] += 1e-3
    assert b.identity() == b.weights_identity(), "the record holds for its encoder only"


def test_a_forged_base_is_refused():
    for text in ("nano", "df8951806ce4b755", "g" * 16 + "-" + "0" * 16):
        with pytest.raises(FlowMoError, match=r"model\.base"):
            Config().override(f"model.base={text}")


def test_frozen_parameters_cost_less_memory(tiny_config):
    """Weight and EMA of every parameter; gradient and two moments of the trained ones; 4 bytes each."""
    tokenizer = FlowMo(tiny_config)
    encoder, decoder = (sum(p.numel() for p in net.parameters()) for net in tokenizer.networks.values())
    whole, part = (tiny_config.override(f"model.train={trained}", NO_LPIPS) for trained in ("all", "decoder"))
    assert training_memory(whole).state_bytes == 20 * (encoder + decoder)
    assert training_memory(part).state_bytes == 8 * encoder + 20 * decoder
    seek = whole.override("model.posttrain_sample=true", "model.posttrain_sample_k=1")
    assert training_memory(seek).state_bytes == 8 * encoder + 20 * decoder
    assert training_memory(whole, freeze_encoder=True).state_bytes == 20 * (encoder + decoder), "moments stay"
    assert training_memory(whole).activation_bytes > training_memory(part).activation_bytes
    assert training_flops(whole) > training_flops(part)


def test_networks_that_do_not_learn_take_memory(tiny_config):
    """A teacher's and a perceptual network's weights, 4 bytes each, are part of the forecast."""
    plain = tiny_config.override(NO_LPIPS, "trainer.enable_bfloat16=false")  # which makes copies
    student = plain.override("model.mean_velocity=true", "eval.sampling.guidance=1", "opt.teacher=nano")
    teacher, distance = FlowMo(plain), build_distance("alex", pretrained=False)
    weights, weights_of_distance = (4 * sum(p.numel() for p in network.parameters()) for network in (teacher, distance))
    alone = training_memory(plain).fixed_bytes
    assert training_memory(student.override("opt.teacher_steps=2")).fixed_bytes > weights > alone
    seeing = plain.override("opt.lpips_mode=alex", "opt.lpips_weight=1")
    assert training_memory(seeing).fixed_bytes > weights_of_distance > alone


def test_a_training_checkpoint_goes_on(base, train, tmp_path):
    """At its position and with its optimizer, unless other parameters are trained."""
    assert train("a", "--resume-from-ckpt", base)[0] == 0
    run = ("--resume-from-ckpt", tmp_path / "results" / "a")
    status, printed = train("b", *run, settings=("trainer.duration=3 steps",))
    assert status == 0
    assert "from step 2 to step 3" in printed
    assert "fresh EMA" not in printed
    first, second = (json.loads((tmp_path / "results" / name / "config.json").read_text()) for name in "ab")
    assert second["opt"] == first["opt"], "its own recipe, where no settings are named"
    path = final_path(tmp_path, "a")
    content = torch.load(path, weights_only=True)
    content["config"]["trainer"]["start_weights"] = "model"  # as earlier versions wrote by default
    torch.save(content, path)
    still = ("model.train=decoder", "trainer.duration=3 steps")
    status, printed = train("c", *run, settings=still)
    assert status == 0
    assert "the EMA of the weights" in printed
    first, third = (flowmo.load(tmp_path / "results" / name) for name in "ac")
    assert third.identity() == first.identity(), "of what was loaded, the EMA"
    status, printed = train("d", *run, settings=(*still, "trainer.start_weights=model"))
    assert "the raw weights" in printed
    assert flowmo.load(tmp_path / "results" / "d").identity() != first.identity()


def test_a_new_stage_in_the_same_folder_starts_as_in_another(base, train, tmp_path):
    """The EMA starts anew, and the ids stay those of the run's model so far."""
    assert train("run", "--resume-from-ckpt", base, settings=("opt.lr=1e-2",))[0] == 0
    before = flowmo.load(tmp_path / "results" / "run")
    shutil.copytree(tmp_path / "results" / "run", tmp_path / "results" / "same")
    still = ("model.train=decoder", "trainer.duration=4 steps", "opt.lr=1e-2")
    status, printed = train("same", settings=still)
    assert status == 0
    assert "with a fresh EMA" in printed
    assert train("other", "--resume-from-ckpt", tmp_path / "results" / "run", settings=still)[0] == 0
    same, other = (final(tmp_path, name) for name in ("same", "other"))
    for part in ("model", "ema", "norms"):
        assert_equal(same[part], other[part])
    assert flowmo.load(tmp_path / "results" / "same").identity() == before.identity()


def test_weights_of_another_network_are_refused_in_one_line(train, tmp_path):
    """Each kind of network has settings that the other lacks."""
    torch.manual_seed(0)
    for name, ours, theirs in (("a", TINY, TINY_NATIVE), ("b", TINY_NATIVE, TINY)):
        flowmo.save(FlowMo(Config.from_dict(theirs)), tmp_path / f"{name}.safetensors")
        (tmp_path / f"{name}.yaml").write_text(Config.from_dict(ours).to_json())
        words = ("--config", tmp_path / f"{name}.yaml", "--resume-from-ckpt", tmp_path / f"{name}.safetensors")
        status, printed = train(name, *words)
        assert status == 2
        assert "with other settings: model." in printed
        assert "Traceback" not in printed


def test_a_perceptual_network_that_needs_larger_images(train, base, trained_weights, monkeypatch):
    monkeypatch.setenv("FLOWMO_WEIGHTS", str(trained_weights))
    settings = ("opt.lpips_weight=0.1", "opt.lpips_mode=alex", "opt.lpips_jitter=8")
    status, printed = train("run", "--resume-from-ckpt", base, settings=settings)
    assert status == 2
    assert "LPIPS (alex) needs at least 31 pixels a side. These images are 24×24." in printed


def test_the_guide_as_printed(tiny_model, tmp_path, monkeypatch, capsys):
    """With a tiny model for nano, small images in Pillow's own font, and two steps."""
    fonts = write_fonts(tmp_path / "fonts")
    monkeypatch.chdir(tmp_path)
    less = {
        "python": ("--fonts", fonts, "--side", "32", "--train", "4", "--held-out", "2"),
        "flowmo train": (
            "trainer.duration=2 steps",
            "data.num_workers=0",
            "data.max_microbatch=4",
            "opt.lpips_weight=0",
        ),
        "flowmo evaluate": ("--no-lpips",),
    }
    done = []
    for words in map(shlex.split, commands(ROOT / "docs" / "guides" / "fine-tune.md", "")):
        start = "python" if words[0] == "python" else " ".join(words[:2])
        words = [str(tiny_model) if word == "nano" else word for word in words]
        if start == "flowmo evaluate" and "--model" not in words:
            words += ["--model", str(tiny_model)]
        words += less.get(start, ())
        if start == "python":
            run_script(monkeypatch, *words[1:])
        else:
            status, _, err = run_command(capsys, *words[1:])
            assert status == 0, err
        done.append(start)
    assert done == ["python", "flowmo evaluate", "flowmo train", "flowmo evaluate", "flowmo convert", "flowmo train"]
    texts = json.loads((tmp_path / "letters" / "held_out.json").read_text())
    assert sorted(texts) == sorted(path.name for path in (tmp_path / "letters" / "held_out").iterdir())
    whole, decoder = (flowmo.load(tmp_path / "results" / name) for name in ("letters", "letters_decoder"))
    assert flowmo.load(tmp_path / "letters.safetensors").identity() == whole.identity()
    assert decoder.identity() == flowmo.load(tiny_model).identity() != whole.identity()
