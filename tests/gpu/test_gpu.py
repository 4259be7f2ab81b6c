"""What only a GPU can break: compiled blocks, nccl, pinned memory, reduced precision, host synchronisation.

Without CUDA the same tests run on the CPU in little, except those that are skipped with a reason. ``record_property``
keeps what a test measures; ``runs/one_gpu.py`` puts it into ``results.json``.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from flowmo import Config, FlowMo, load, preset
from flowmo.checkpoint.files import BUNDLED
from flowmo.data import ImageDataset, batches, open_source
from flowmo.data.tokens import Vocabulary
from flowmo.distributed import World, join
from flowmo.evaluate.metrics.pairs import psnr
from flowmo.generate.generator import Generator
from flowmo.losses.noise import TrainingNoise
from flowmo.losses.stages import Stage
from flowmo.precision import tf32
from flowmo.train.generator import GeneratorNoise, GeneratorStage
from flowmo.train.parallel import KEPT, prepare
from flowmo.train.trainer import Trainer

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("default")  # the compiler's own warnings differ from version to version
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")

DEPTH = 2 if CUDA else 1  # each kind of block takes seconds to trace on a CPU
SMALL = (
    f"data.image_size=32 model.patch_size=8 model.hidden_size=64 model.num_heads=2 model.dec_depth={DEPTH} "
    f"model.enc_hidden_size=64 model.enc_num_heads=2 model.enc_depth={DEPTH} model.code_length=6 model.context_dim=8 "
    "model.codebook_size_for_entropy=4 opt.mup_base_width=0 opt.lpips_weight=0"
).split()
STAGES = {
    "1A": (),
    "1B": ("model.posttrain_sample=true", "model.posttrain_sample_k=3", "opt.lpips_weight=0.01"),
    "1C": (
        "opt.teacher=teacher",
        "opt.teacher_steps=3",
        "eval.sampling.guidance=1",
        "model.mean_velocity=true",
        "opt.lpips_weight=0.01",
    ),
}
VOCABULARY = Vocabulary(
    tokenizer="0" * 16, model="small", image_size=32, tokens=6, sub_tokens=2, id_bits=4, classes=("one", "two")
)


def quiet(_: str) -> None:
    pass


def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A perceptual distance without trained weights."""
    return (nn.functional.avg_pool2d(x, 4) - nn.functional.avg_pool2d(y, 4)).square().mean(dim=(1, 2, 3))


def settings(*more: str) -> Config:
    return Config().override(*SMALL, *more)


def fresh(config: Config) -> FlowMo:
    """A tokenizer whose gates are open, so that every weight acts."""
    torch.manual_seed(0)
    tokenizer = FlowMo(config)
    with torch.no_grad():
        for name, parameter in tokenizer.named_parameters():
            if "modulation" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return tokenizer


def noise_images(count: int, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(2)) * 2 - 1


def moved(draws, device: torch.device):
    """Random numbers drawn on the CPU, on another device."""
    kind = type(draws)
    moved_value = lambda v: v.to(device) if isinstance(v, torch.Tensor) else moved(v, device)  # noqa: E731
    return kind(*(value if value is None else moved_value(value) for value in draws))


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.cpu() for name, p in module.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], share: float) -> None:
    """Each tensor's error is at most a share of its norm."""
    assert found.keys() == expected.keys()
    assert found
    for name, value in expected.items():
        error = (found[name] - value).norm()
        assert error <= share * value.norm() + 1e-7, f"{name}: error {error:.2e} of norm {value.norm():.2e}"


@pytest.fixture(autouse=True)
def _alone():
    """A fresh compiler, and products in float32: TF32 would differ from the CPU's by a thousandth."""
    torch._dynamo.reset()
    counters.clear()
    with tf32(False):
        yield
    torch._dynamo.reset()


@pytest.fixture
def compiled(monkeypatch):
    """Compile by inductor on a GPU; on a CPU, where that takes a minute, only trace."""
    if not CUDA:
        traced = functools.partialmethod(nn.Module.compile, backend="aot_eager")
        monkeypatch.setattr(nn.Module, "compile", traced)


@pytest.fixture
def folder(tmp_path):
    """Eight images of 40 × 32 pixels."""
    path = tmp_path / "images"
    path.mkdir()
    for i, image in enumerate(noise_images(8, 40)):
        pixels = ((image[:, :32] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(pixels).save(path / f"{i}.png")
    return path


@pytest.fixture
def run_settings(folder):
    lengths = ["trainer.max_steps=4", "trainer.checkpoint_every=2", "trainer.sample_every=0", "trainer.log_every=2"]
    loading = (f"data.train={folder}", "data.global_batch_size=4", "data.num_workers=1", "trainer.tensorboard=false")
    return settings(*lengths, *loading, "trainer.enable_bfloat16=false", "data.random_flip=true")


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    """Whole weights of a run, on the CPU."""
    full = lambda v: v.full_tensor() if hasattr(v, "full_tensor") else v  # noqa: E731
    return {name: full(value).detach().cpu() for name, value in run.task.model.state_dict().items()}


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_of_each_stage_equals_the_cpus(stage):
    config = settings(*STAGES[stage])
    images = noise_images(4)
    draws = TrainingNoise.of(config, images, range(4))
    expected, found = {}, {}
    for device, result in ((torch.device("cpu"), expected), (DEVICE, found)):
        tokenizer = fresh(config).to(device)
        teacher = None
        if stage == "1C":
            teacher = fresh(settings()).to(device).requires_grad_(False)
        loss = Stage(tokenizer, config.opt, distance, teacher)(
            images.to(device), moved(draws, device), freeze_encoder=stage != "1A"
        )
        loss.loss.backward()
        result.update(gradients(tokenizer), loss=loss.loss.detach().cpu())
    assert_close(found, expected, 2e-3)


def test_a_step_of_stage_2_equals_the_cpus():
    config = preset("maskgit_nano").override(
        "generator.depth=2", "generator.hidden_size=64", "generator.num_heads=2", "generator.dropout=0"
    )
    ids = torch.randint(0, 16, (4, 12), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0])
    mask = GeneratorNoise.of(config, 12, range(4), torch.device("cpu")).mask
    results = []
    for device in (torch.device("cpu"), DEVICE):
        torch.manual_seed(0)
        generator = Generator(config, VOCABULARY).to(device)
        loss = GeneratorStage(generator)(ids.to(device), labels.to(device), mask.to(device))
        loss.loss.backward()
        results.append({**gradients(generator), "loss": loss.loss.detach().cpu()})
    assert_close(results[1], results[0], 2e-3)


def test_fsdp_of_one_rank_trains_alike(run_settings, tmp_path):
    results = []
    for name, parallel in (("plain", "ddp"), ("sharded", "fsdp")):
        config = run_settings.override(f"trainer.parallel={parallel}")
        with join(DEVICE.type, group=parallel == "fsdp") as world:
            run = Trainer(config, tmp_path / name, world, report=quiet)
            run.train()
            results.append(weights(run))
            checkpoint = run.checkpoints()[-1]
    assert checkpoint.is_dir(), "FSDP2 writes a folder of shards"
    assert_close(results[1], results[0], 1e-3)


def test_a_resumed_run_ends_with_the_same_weights(run_settings, tmp_path):
    """On a GPU sums may be rounded in another order; on a CPU the bits are equal."""
    whole = Trainer(run_settings, tmp_path / "whole", World(device=DEVICE), report=quiet)
    whole.train()
    Trainer(run_settings.override("trainer.max_steps=2"), tmp_path / "cut", World(device=DEVICE), report=quiet).train()
    resumed = Trainer(run_settings, tmp_path / "cut", World(device=DEVICE), report=quiet)
    assert resumed.step == 2
    resumed.train()
    assert_close(weights(resumed), weights(whole), 1e-3 if CUDA else 0.0)


@needs_cuda
def test_batches_arrive_in_pinned_memory(folder):
    views = ImageDataset(open_source(folder), 32)
    plain = next(batches(views, 4, 0, 0, 2))
    pinned = next(batches(views, 4, 0, 0, 2, pin_memory=True))
    assert pinned.is_pinned()
    torch.testing.assert_close(pinned.to(DEVICE, non_blocking=True).cpu(), plain, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["bfloat16", "tf32"])
def test_reduced_precision_against_float32(precision, record_property):
    """Few ids change, and the images decoded from the same ids stay close."""
    if precision == "tf32" and not CUDA:
        pytest.skip("needs a CUDA device: CPUs have no TF32")
    if (BUNDLED / "nano.safetensors").is_file():
        tokenizer, images = load("nano", device=DEVICE), noise_images(4, 128)
    else:
        tokenizer, images = fresh(settings()).eval().to(DEVICE), noise_images(4)
    images = (3 * nn.functional.avg_pool2d(images, 9, 1, 4)).clamp(-1, 1)  # smoother than noise, as photographs are
    exact = tokenizer.encode(images)
    expected = tokenizer.decode(exact)
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    else:
        tokenizer.set_precision(precision)
    codes = tokenizer.encode(images)
    decoded = tokenizer.decode(exact)
    equal = float((codes.ids == exact.ids).float().mean())
    decibels = float(psnr(expected, decoded).clamp(max=99).mean())
    record_property("equal_ids", round(equal, 4))
    record_property("psnr_between_decodes", round(decibels, 2))
    assert equal > 0.8
    assert decibels > 30


def test_sampling_equals_the_cpus_and_ignores_the_batch():
    tokenizer = fresh(settings("eval.sampling.sample_steps=25")).eval()
    images = noise_images(5)
    expected = tokenizer.encode(images)
    decoded = tokenizer.decode(expected, seed=[0, 1, 2, 3, 4])
    there = copy.deepcopy(tokenizer).to(DEVICE)
    found = there.decode(expected, seed=[0, 1, 2, 3, 4])
    assert float(psnr(found.cpu(), decoded).min()) > 45
    codes = there.encode(images)
    assert float((codes.ids.cpu() == expected.ids).float().mean()) > 0.98
    alone = torch.cat([there.encode(image[None]).ids for image in images])
    assert torch.equal(alone, codes.ids)
    one = there.decode(replace(expected, ids=expected.ids[2:3]), seed=2)
    torch.testing.assert_close(one[0], found[2], rtol=0, atol=1e-5)


@needs_cuda
def test_a_step_waits_for_the_gpu_only_where_it_logs(run_settings, tmp_path):
    """CUDA raises at the first synchronisation between two lines of the log."""
    config = run_settings.override("trainer.max_steps=12", "trainer.log_every=4", "trainer.checkpoint_every=12")
    run = Trainer(config, tmp_path / "run", World(device=DEVICE), report=quiet)
    step = run._step

    def watched(*arguments):
        watch = run.step > 4 and (run.step + 1) % 4
        torch.cuda.set_sync_debug_mode("error" if watch else "default")
        try:
            return step(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    run._step = watched
    run.train()
    assert run.step == 12


# Last: compiling takes the time of all others together


@pytest.mark.parametrize("keeps", ["all", *KEPT])
def test_compiled_blocks_have_the_same_gradients(keeps, compiled):
    policy = ("true", keeps) if keeps != "all" else ("false", "inputs")
    eager = settings(f"trainer.activation_checkpointing={policy[0]}", f"trainer.checkpoint_keeps={policy[1]}")
    images = noise_images(4).to(DEVICE)
    draws = TrainingNoise.of(eager, images, range(4))
    results = []
    for config in (eager, eager.override("trainer.compile=true")):
        tokenizer = fresh(config).to(DEVICE)
        stage = prepare(Stage(tokenizer, config.opt), World(device=DEVICE), config.trainer)
        stage(images, draws).loss.backward()
        results.append(gradients(tokenizer))
    assert counters["stats"]["unique_graphs"] > 0
    assert_close(results[1], results[0], 2e-3)


def test_ddp_of_one_rank_has_the_same_gradients(compiled):
    config = settings("trainer.compile=true")
    images = noise_images(4).to(DEVICE)
    draws = TrainingNoise.of(config, images, range(4))
    results = []
    with join(DEVICE.type, group=True) as world:
        for wrapped in (False, True):
            tokenizer = fresh(config).to(DEVICE)
            stage = prepare(Stage(tokenizer, config.opt), world, config.trainer)
            if wrapped:
                devices = [world.device] if CUDA else None
                stage = DistributedDataParallel(stage, device_ids=devices, gradient_as_bucket_view=True)
            stage(images, draws).loss.backward()
            results.append(gradients(tokenizer))
    assert_close(results[1], results[0], 1e-5)
