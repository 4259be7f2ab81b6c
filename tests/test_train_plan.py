"""Lengths of training, the cut of a batch, µP, and what a step is said to cost."""

import pytest
import torch
from conftest import TINY_NATIVE, lfq, open_gates
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.mup_check import coordinate_check
from flowmo import Config, ConfigError, FlowMo, preset
from flowmo.config import Duration
from flowmo.distributed import World
from flowmo.evaluate.speed import UNCOUNTED, peak_flops
from flowmo.losses.noise import TrainingNoise
from flowmo.losses.perceptual import build_distance
from flowmo.losses.stages import Stage, pretrain_loss
from flowmo.train import cost
from flowmo.train.cost import Memory, PeakMemory, run_flops, training_flops, training_memory
from flowmo.train.failures import plain_errors, plain_evaluation_errors
from flowmo.train.optimizer import build_optimizers, clip_gradients, scale_initial_weights
from flowmo.train.parallel import KEPT, prepare
from flowmo.train.schedule import BatchPlan, Position, Schedule
from flowmo.train.start_checks import describe
from flowmo.train.task import TrainingError


def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x - y).square().mean(dim=(1, 2, 3))


@pytest.mark.parametrize(
    ("text", "canonical", "images"),
    [
        ("25.6M images", "25600000 images", 25_600_000),
        (1300000, "1300000 steps", 1_300_000 * 128),
        ("1_300_000", "1300000 steps", 1_300_000 * 128),
        ("1e3", "1000 steps", 128_000),
        ("40 epochs", "40 epochs", 40 * 1000),
        ("0.5 epoch", "0.5 epochs", 500),
        ("12.8k images", "12800 images", 12_800),
        (0, "0 steps", 0),
        ("0.001 steps", "0.001 steps", 1),
    ],
)
def test_lengths_of_training(text, canonical, images):
    assert Duration(text) == canonical
    assert Duration(Duration(text)) == canonical
    assert Duration(text).images(batch=128, epoch=1000) == images


@pytest.mark.parametrize("text", ["", "many", "-3", "5 pictures", "1e400 steps", "nan", "3 steps images"])
def test_what_is_no_length(text):
    with pytest.raises(ConfigError, match=r"trainer\.log_every=.* does not work"):
        Config.from_dict({"trainer": {"log_every": text}})


def test_the_authors_steps_are_converted():
    config = preset("lo").override("trainer.max_steps=1300000", "opt.freeze_encoder_after=200000", "global_seed=3")
    times = Schedule.of(config, 128, 1_281_167)
    assert times.duration == Schedule.of(preset("lo"), 128, 1_281_167).duration == 166_400_000
    assert times.freeze_encoder_after == Schedule.of(preset("lo"), 128, 1_281_167).freeze_encoder_after
    assert config.trainer.seed == 3


def test_steps_after_a_checkpoint_of_another_batch():
    """The release's post-training: 25 000 steps of 64 after 1 300 000 of 128."""
    config = preset("lo").override("trainer.max_steps=1325000")
    times = Schedule.of(config, 64, 1_281_167, Position(1_300_000, 166_400_000))
    assert times.duration == 166_400_000 + 25_000 * 64


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_warm_up_and_cool_down_are_parts_of_the_stage(shape):
    """Stage 1B after 1 M images has the rates of a run of its own length."""
    config = Config().override("opt.warmup=1k images", "opt.cooldown=0.5", f"opt.cooldown_shape={shape}")
    own, after = (
        Schedule.of(config.override(f"trainer.duration={begin + 10_000} images"), 100, 1000, begin=begin)
        for begin in (0, 1_000_000)
    )
    rates = [own.learning_rate(config.opt, images) for images in range(0, 10_000, 100)]
    assert [after.learning_rate(config.opt, 1_000_000 + images) for images in range(0, 10_000, 100)] == rates
    assert rates[0] == pytest.approx(config.opt.lr / 10)
    assert max(rates) == config.opt.lr


def test_what_is_due():
    times = Schedule.of(Config().override("trainer.log_every=100 images", "trainer.sample_every=0"), 48, 1000)
    assert [images for images in range(48, 500, 48) if times.is_due(times.log, images)] == [144, 240, 336, 432]
    assert not any(times.is_due(times.sample, images) for images in range(48, 500, 48))


@pytest.mark.parametrize(
    ("settings", "processes", "most", "expected"),
    [
        ([], 8, None, (8, 1, 16)),
        ([], 1, None, (1, 1, 128)),
        ([], 1, 50, (1, 4, 32)),
        (["data.batch_size=16"], 4, None, (4, 1, 16)),
        (["data.batch_size=16", "data.global_batch_size=32"], 4, None, (4, 1, 8)),
        (["data.batch_size=8", "opt.n_grad_acc=2"], 8, None, (8, 2, 4)),
        (["data.max_microbatch=5"], 4, 100, (4, 8, 4)),
        ([], 4, 0.1, (4, 32, 1)),
    ],
)
def test_the_cut_of_a_batch(settings, processes, most, expected):
    plan = BatchPlan.of(Config().override(*settings), processes, most)
    assert (plan.world_size, plan.accumulation_steps, plan.microbatch) == expected
    assert plan.total == expected[0] * expected[1] * expected[2]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["data.global_batch_size=100"], r"100 cannot be split over 8 .* data.global_batch_size=96 or .*=104"),
        (["data.global_batch_size=4"], r"4 cannot be split over 8 .* Write data.global_batch_size=8\.$"),
        (["opt.n_grad_acc=3"], r"opt.n_grad_acc=3 does not divide the 16 .* \[1, 2, 4, 8, 16\]"),
    ],
)
def test_batches_that_cannot_be_cut(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        BatchPlan.of(Config().override(*settings), 8)


def test_draws_belong_to_places(tiny_config, images):
    whole = TrainingNoise.of(tiny_config, images, range(10, 15))
    parts = [TrainingNoise.of(tiny_config, images[i : i + 1], [10 + i]) for i in range(5)]
    for one, many in zip(whole[:3], list(zip(*parts, strict=True))[:3], strict=True):
        assert torch.equal(one, torch.cat(many))
    other = TrainingNoise.of(tiny_config.override("trainer.seed=1"), images, range(10, 15))
    assert not torch.equal(whole.noise, other.noise)
    many = TrainingNoise.of(tiny_config, images[:1].expand(4000, 3, 32, 32)[:, :, :1, :1], range(4000))
    assert abs(float(many.cfg_keep.float().mean()) - 0.9) < 0.02
    assert abs(float(many.t.mean()) - 0.5) < 0.02
    assert abs(float(many.noise.std()) - 1) < 0.02


def test_parts_of_a_batch_add_up_to_its_gradient():
    """LFQ's entropy of the mean distribution is not linear in the batch; ``whole_batch`` makes its gradient so."""
    quantizer = lfq(8, 4, entropy_weight=1.0)
    code = (torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0)) * 0.05).requires_grad_()

    def loss(part, whole_batch):
        return sum(quantizer(part, whole_batch).losses.values())

    seen = []
    whole = loss(code, lambda mean: seen.append(mean) or mean)
    expected = torch.autograd.grad(whole, code)[0]
    parts = [loss(part, lambda mean: seen[0]) for part in code.split(2)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)
    torch.testing.assert_close(torch.autograd.grad(sum(parts) / 3, code)[0], expected)
    alone = sum(sum(quantizer(part).losses.values()) for part in code.split(2)) / 3
    assert not torch.allclose(torch.autograd.grad(alone, code)[0], expected, rtol=0.1)


def test_gradients_are_clipped_to_a_length():
    weights = [torch.zeros(3, requires_grad=True), torch.zeros(2, 2, requires_grad=True)]
    for longest, scale in ((0.0, 1.0), (100.0, 1.0), (1.0, 1 / 5)):
        weights[0].grad = torch.tensor([3.0, 0, 0])
        weights[1].grad = torch.tensor([[0.0, 4], [0, 0]])
        torch.testing.assert_close(clip_gradients(weights, longest), torch.tensor(5.0))
        torch.testing.assert_close(weights[0].grad[0], torch.tensor(3.0 * scale))
        torch.testing.assert_close(weights[1].grad[0, 1], torch.tensor(4.0 * scale))


# µP


@pytest.fixture
def wide_config(tiny_config):
    return tiny_config.override(
        "model.enc_num_heads=2", "model.enc_hidden_size=64", "model.initial_gate=1", "opt.lpips_weight=0", "opt.lr=3e-3"
    )


def test_activations_keep_their_scale_over_widths(wide_config, images):
    widths = (64, 128, 256, 512)
    ours = coordinate_check(wide_config.override("opt.mup_base_width=128"), widths, images, seeds=(0, 1))
    release = coordinate_check(wide_config.override("opt.mup_base_width=0"), widths, images, seeds=(0,))
    assert set(ours.size) >= {"encoder code_out", "decoder picture_out", "decoder block 3"}
    assert max(map(abs, ours.slopes(ours.size).values())) < 0.3, ours.slopes(ours.size)
    # Where nothing scales with the width, the same steps move a wide network much further.
    assert release.slopes(release.size)["encoder block 2"] > 0.4


def test_learning_rates_follow_the_width(tiny_config):
    def scales(*settings):
        tokenizer = FlowMo(tiny_config.override(*settings))
        scale = {
            id(p): group["scale"] for group in build_optimizers(tokenizer)[0].param_groups for p in group["params"]
        }
        return {name: scale[id(p)] for name, p in tokenizer.named_parameters()}

    ours = scales("opt.mup_base_width=768")  # decoder 64 wide, encoder 32
    assert ours["decoder.blocks.0.picture.qkv.weight"] == ours["decoder.picture_out.weight"] == 12
    assert ours["encoder.blocks.0.picture.qkv.weight"] == ours["encoder.code_out.weight"] == 24
    for name in ("decoder.picture_in.weight", "decoder.blocks.0.picture.qkv.bias", "encoder.code_embedding"):
        assert ours[name] == 1, name
    for settings in ([], ["opt.mup_base_width=768", "model.enable_mup=false"]):
        assert set(scales(*settings).values()) == {1}


def test_the_log_names_muons_rate(native):
    """A lower ``opt.lr`` leaves it as it is."""
    muon = native.config.override("opt.optimizer=muon", "opt.lr=1e-4")
    line = describe(muon, Position(), Schedule.of(muon, 4, 10))
    assert "learning rate 0.0001, of Muon's matrices 0.02;" in line
    adam = muon.override("opt.optimizer=adam")
    assert "learning rate 0.0001;" in describe(adam, Position(), Schedule.of(adam, 4, 10))


def test_the_log_warns_of_guidance_by_an_untrained_null_code():
    def warns(*settings):
        config = preset("nano").override("eval.sampling.guidance=1.5", "model.enable_cfg=false", *settings)
        return "the null code does not learn" in describe(config, Position(), Schedule.of(config, 4, 10))

    assert warns()
    for setting in ("model.enable_cfg=true", "eval.sampling.guidance=1", "model.posttrain_sample=true"):
        assert not warns(setting), setting


def test_inputs_of_the_windowed_decoder_keep_their_rate(native):
    config = native.config.override("opt.mup_base_width=8")
    tokenizer = FlowMo(config)
    found = {
        name: group["scale"]
        for group in build_optimizers(tokenizer)[0].param_groups
        for name, p in tokenizer.named_parameters()
        if any(p is one for one in group["params"])
    }
    for patch in (4, 8, 16):
        assert found[f"decoder.picture_in{patch}.weight"] == 1
    for table in ("modulation", "position_bias"):
        assert [scale for name, scale in found.items() if name.endswith(f".{table}")].count(1) > 0
        assert {scale for name, scale in found.items() if name.endswith(f".{table}")} == {1}, table
    assert found["decoder.blocks.0.qkv.weight"] == 8 / config.model.hidden_size


def test_initial_weights_at_the_base_width_are_pytorchs(tiny_config):
    config = tiny_config.override("model.enc_num_heads=2", "model.enc_hidden_size=64")
    tokenizer = FlowMo(config.override("opt.mup_base_width=64"))
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    scale_initial_weights(tokenizer)
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.state_dict().items())
    before["decoder.blocks.0.picture.modulation.bias"].view(2, 3, 64)[:, 2] = 0.5
    quarter = FlowMo(config.override("opt.mup_base_width=16"))
    quarter.load_state_dict(before)
    scale_initial_weights(quarter)
    after = quarter.state_dict()
    torch.testing.assert_close(after["decoder.picture_out.weight"], before["decoder.picture_out.weight"] / 2)
    torch.testing.assert_close(after["decoder.picture_out.bias"], before["decoder.picture_out.bias"] * 2)
    parts = {
        name: weights["decoder.blocks.0.picture.modulation.bias"].view(2, 3, 64)
        for name, weights in (("before", before), ("after", after))
    }  # of attention and MLP: shift, scale, gate
    torch.testing.assert_close(parts["after"][:, :2], parts["before"][:, :2] * 2)
    assert torch.equal(parts["after"][:, 2], parts["before"][:, 2])
    torch.testing.assert_close(after["decoder.picture_in.weight"], before["decoder.picture_in.weight"])
    torch.testing.assert_close(after["decoder.blocks.0.code.qkv.weight"], before["decoder.blocks.0.code.qkv.weight"])


# Cost


def test_flops_are_those_of_the_real_step(tiny_config, images):
    config = tiny_config.override("opt.lpips_weight=0")
    tokenizer = FlowMo(config)
    draws = TrainingNoise.of(config, images, range(5))
    counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
    with counter, torch.autocast("cpu", torch.bfloat16):
        pretrain_loss(tokenizer, images, draws, tokenizer.config.opt, None).loss.backward()
    assert training_flops(config) == pytest.approx(counter.get_total_flops() / 5, rel=0.02)


def test_cost_of_lo():
    """By hand: 3 × 2 FLOPs a weight and token, and attention over 4352 tokens in 24 blocks."""
    assert 12e12 < training_flops(preset("lo")) < 16e12


def test_flops_are_fewer_with_a_frozen_encoder_and_more_with_lpips(tiny_config):
    config = tiny_config.override("opt.lpips_weight=0")
    early, late = training_flops(config), training_flops(config, freeze_encoder=True)
    assert late < early
    run = config.override("trainer.duration=100 images", "opt.freeze_encoder_after=25 images")
    assert run_flops(run, 10) == (100, 25 * early + 75 * late)
    assert run_flops(run.override("opt.freeze_encoder_after=1k images"), 10) == (100, 100 * early)
    assert training_flops(tiny_config.override("opt.lpips_weight=1")) > 2 * training_flops(config)


def test_a_forecast_knows_the_precision_of_lpips(tiny_config):
    config, halved = tiny_config.override("opt.lpips_weight=1", "opt.lpips_mode=alex"), "opt.lpips_bfloat16=true"
    for settings, dtype in (((), torch.float32), ((halved,), torch.bfloat16)):
        _, (_, perceptual) = cost._step(config.override(*settings), False, None, 1, (32, 32), 1)
        assert perceptual.dtype == dtype
    _, (_, resnet) = cost._step(config.override(halved, "opt.lpips_mode=resnet"), False, None, 1, (32, 32), 1)
    assert {parameter.dtype for parameter in resnet.parameters()} == {torch.float32}


def test_checkpointing_of_blocks_in_a_chain(tiny_config):
    """Stage 1B computes the steps of its chain again as it is; what blocks keep would come on top."""
    on = "trainer.activation_checkpointing=true"
    config = tiny_config.override("model.posttrain_sample=true", "model.posttrain_sample_k=3", "opt.lpips_mode=alex")
    config = config.override("model.enc_depth=1", "model.dec_depth=1")  # a forecast takes its time for each block
    assert 0 < training_memory(config.override(on)).activation_bytes < training_memory(config).activation_bytes
    with pytest.raises(ConfigError, match="In stage 1B the chain recomputes its steps"):
        config.override(on, "trainer.checkpoint_keeps=products")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("keeps", KEPT)
def test_blocks_compile_whatever_checkpointing_keeps(tiny_config, images, compile_by, keeps):
    """Forward and backward through AOTAutograd. ``stress/test_compiled.py`` goes through Inductor."""
    settings = "trainer.compile=true", "trainer.activation_checkpointing=true", f"trainer.checkpoint_keeps={keeps}"
    config = tiny_config.override(*settings, "model.enc_depth=1", "opt.lpips_weight=0")
    tokenizer = FlowMo(config)

    def code_and_gradient():
        code = tokenizer.encoder(images[:2])
        return code, *torch.autograd.grad(code.square().sum(), [tokenizer.encoder.code_embedding])

    expected = code_and_gradient()
    compile_by("aot_eager")
    counters.clear()
    prepare(Stage(tokenizer, config.opt), World(), config.trainer)
    torch.testing.assert_close(code_and_gradient(), expected, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("bfloat16", [False, True])
def test_what_checkpointing_keeps(tiny_config, images, bfloat16):
    """The same gradients whatever is kept; the more is kept, the more memory and the fewer products."""
    config = tiny_config.override("opt.lpips_weight=0", "model.enc_depth=1", "model.dec_depth=2")
    on = "trainer.activation_checkpointing=true"
    policies = {"all": config} | {keeps: config.override(on, f"trainer.checkpoint_keeps={keeps}") for keeps in KEPT}
    gradients, products = {}, {}
    for name, policy in policies.items():
        torch.manual_seed(0)
        tokenizer = open_gates(FlowMo(policy))
        stage = prepare(Stage(tokenizer, config.opt), World(), policy.trainer)
        with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = stage(images, TrainingNoise.of(policy, images, range(5))).loss
            loss.backward()
        products[name] = counter.get_total_flops()
        gradients[name] = [p.grad.clone() for p in tokenizer.parameters() if p.grad is not None]
    for name in KEPT:
        assert all(torch.equal(ours, all_) for ours, all_ in zip(gradients[name], gradients["all"], strict=True)), name
    cost = {name: training_memory(policy).activation_bytes for name, policy in policies.items()}
    assert cost["inputs"] < cost["attention"] < cost["products"] < cost["all"]
    assert products["all"] <= products["products"] <= products["attention"] <= products["inputs"]
    if not bfloat16:
        assert products["all"] == products["products"] < products["attention"] < products["inputs"]


def test_peak_memory_counts_what_is_alive_at_once():
    memory = PeakMemory()
    with memory:
        a = torch.zeros(1000)  # 4 000 bytes
        b = a + 1
        view = b[10:]
        del b
        assert memory.now == 8000  # the view keeps all of b
        del view
        c = a * 2
        assert memory.now == 8000
        del a, c
    assert (memory.now, memory.peak) == (0, 8000)


@pytest.mark.parametrize("steps", [2, 5])
def test_forecast_of_stage_1b_equals_a_step_with_contents(tiny_config, steps):
    """The forecast runs on tensors without contents, and on two steps of the chain; here all is real."""
    config = tiny_config.override(
        "model.posttrain_sample=true", f"model.posttrain_sample_k={steps}", "opt.lpips_mode=alex", "opt.lpips_weight=1"
    )
    forecast, peaks = training_memory(config), []
    for batch in (2, 6):
        tokenizer = FlowMo(config)
        tokenizer.encoder.requires_grad_(False)
        stage = Stage(tokenizer, config.opt, build_distance("alex", pretrained=False))
        images = torch.rand(batch, 3, 64, 64)[..., :32, :32].contiguous()
        draws, memory = TrainingNoise.of(config, images, range(batch)), PeakMemory()
        for parameter in tokenizer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with memory:
            with torch.autocast("cpu", torch.bfloat16):
                loss = stage(images, draws).loss
            loss.backward()
        peaks.append(memory.peak)
    assert (peaks[1] - peaks[0]) / 4 == pytest.approx(forecast.activation_bytes, rel=0.1)


@pytest.mark.parametrize(
    ("error", "taken"), [(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 5), (MemoryError(), 2)]
)
def test_exhausted_memory_names_the_setting_to_lower(error, taken):
    plan = BatchPlan(world_size=2, accumulation_steps=1, microbatch=12)
    value = {5: 4, 2: 2}[taken]
    with (
        pytest.raises(TrainingError, match=rf"12 images ran out.*max_microbatch={value}; .*allows up to {taken}\."),
        plain_errors(plan, lambda: taken),
    ):
        raise error


def test_an_evaluation_that_does_not_fit():
    with (
        pytest.raises(TrainingError, match=r"Measuring held-out images ran out of memory\. Write eval\.batch_size=1"),
        plain_errors(BatchPlan(1, 1, 12), lambda: 5),
        plain_evaluation_errors(),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(RuntimeError, match="another matter"), plain_evaluation_errors():
        raise RuntimeError("another matter")


def test_one_image_that_does_not_fit():
    with (
        pytest.raises(TrainingError, match=r"1 image ran out.*activation_checkpointing=true"),
        plain_errors(BatchPlan(1, 4, 1), lambda: 1),
    ):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")


def test_pictures_that_fit():
    memory = Memory(state_bytes=10 * 2**30, activation_bytes=2**30)
    assert memory.max_images(40 * 2**30) == 26
    assert memory.max_images(20 * 2**30, shards=4) == 15
    assert memory.max_images(2**30) == 1


def test_peak_is_measured_where_no_sheet_is():
    flops, source = peak_flops(torch.device("cpu"), False)
    assert source == "measured"
    assert flops > 1e9


def test_cost_of_mixed_crop_sizes_is_their_mean():
    """A windowed network costs the same per pixel at any size, so FLOPs follow the mean area; memory, the largest."""
    base = Config.from_dict(TINY_NATIVE).override("data.image_size=128", "model.code_length=64")
    small, large, mixed = (base.override(f"data.crop_sizes={sizes}") for sizes in ("64x64", "128x128", "64x64 128x128"))
    assert training_flops(mixed) == pytest.approx((training_flops(small) + training_flops(large)) / 2)
    assert training_flops(mixed) == pytest.approx(2.5 * training_flops(small), rel=0.02)
    memory = [training_memory(config).activation_bytes for config in (small, large, mixed)]
    assert memory[2] == memory[1] > memory[0]
