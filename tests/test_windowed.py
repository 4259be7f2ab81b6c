"""The windowed network and what native size and nested rates need, against plain computations of the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_NATIVE, run_command
from PIL import Image
from processes import run_program

from flowmo import Config, ConfigError, FlowMo, load, save
from flowmo.config import ModelConfig
from flowmo.losses.noise import Chain, TrainingNoise
from flowmo.losses.stages import one_step, posttrain_loss, pretrain_loss, sample_chain
from flowmo.model import tiling
from flowmo.model.transformer import depth_to_space, space_to_depth
from flowmo.model.windowed import Convolution, WindowedBlock
from flowmo.tokenizer import Codes


@pytest.fixture
def config() -> Config:
    return Config.from_dict(TINY_NATIVE)


@pytest.fixture
def tokenizer(config) -> FlowMo:
    torch.manual_seed(0)
    model = FlowMo(config).eval().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position_bias" in name or "modulation" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


@pytest.fixture
def image() -> Image.Image:
    noise = torch.rand(12, 17, 3, generator=torch.Generator().manual_seed(3))
    return Image.fromarray((noise * 255).byte().numpy()).resize((100, 70), Image.Resampling.BICUBIC)


def test_convolution_is_a_product_of_3_x_3_neighbourhoods():
    torch.manual_seed(0)
    convolution, x = Convolution(5, 7), torch.randn(2, 6, 4, 5)
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    expected = torch.empty(2, 6, 4, 7)
    for row in range(6):
        for column in range(4):
            around = padded[:, row : row + 3, column : column + 3].flatten(1)
            expected[:, row, column] = around @ convolution.weight.T + convolution.bias
    torch.testing.assert_close(convolution(x), expected, rtol=1e-4, atol=1e-5)


def test_depth_and_space():
    x = torch.randn(2, 8, 12, 3)
    deep = space_to_depth(x, 4)
    assert deep.shape == (2, 2, 3, 48)
    torch.testing.assert_close(deep[0, 1, 2].reshape(4, 4, 3), x[0, 4:8, 8:12])
    torch.testing.assert_close(depth_to_space(deep, 4), x)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("size", [(4, 8), (5, 3), (1, 9)])
def test_attention_stays_in_windows_of_the_image(shifted, size):
    """Against one softmax per cell over the cells that share its window."""
    torch.manual_seed(0)
    block = WindowedBlock(ModelConfig(window=4), 16, 2, shifted, modulated=False).requires_grad_(False)
    block.position_bias.normal_()
    rows, columns = size
    x = torch.randn(1, rows, columns, 16)
    windows, outside = block.partition(block.qkv(x))
    got = block.merge(block.attention(windows, outside), rows, columns)[0]
    q, k, v = block.qkv(x)[0].unflatten(-1, (3, 2, 8)).unbind(2)  # r c heads d
    q, k = (F.layer_norm(part, (8,), eps=1e-6) for part in (q, k))
    offset = 2 if shifted else 0
    for row in range(rows):
        for column in range(columns):
            for head in range(2):
                logits, values = [], []
                for r in range(rows):
                    for c in range(columns):
                        same = (r + offset) // 4 == (row + offset) // 4 and (c + offset) // 4 == (column + offset) // 4
                        if same:
                            relative = (row - r + 3) * 7 + column - c + 3
                            bias = block.position_bias[head, relative]
                            logits.append(q[row, column, head] @ k[r, c, head] * 8 / 8**0.5 + bias)
                            values.append(v[r, c, head])
                expected = torch.stack(logits).softmax(0) @ torch.stack(values)
                torch.testing.assert_close(got[row, column, 8 * head : 8 * head + 8], expected, rtol=1e-4, atol=1e-5)


def test_every_parameter_learns(config):
    torch.manual_seed(0)
    model = FlowMo(config)
    images = torch.rand(3, 3, 64, 80) * 2 - 1
    draws = TrainingNoise.of(config, images, range(3))._replace(t=torch.tensor([0.3, 0.7, 1.0]))
    for _ in range(2):  # the modulation's layer starts at zero, and passes no gradient on before its first step
        model.zero_grad()
        pretrain_loss(model, images, draws, model.config.opt, None).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead


def test_an_image_of_any_size_keeps_it(tokenizer, image):
    codes = tokenizer.encode_image(image)
    assert codes.size == (80, 112)
    assert codes.image_size == codes.output_size == (70, 100)
    assert codes.ids.shape == (1, 5 * 7, 4)
    assert codes.bits_per_pixel == pytest.approx(35 * 36 / 7000)
    assert tokenizer.decode_image(codes).size == (100, 70)
    assert tokenizer.decode(codes).shape == (1, 3, 80, 112)


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (16, 16)])
def test_images_of_extreme_shape(tokenizer, size):
    decoded = tokenizer.decode_image(tokenizer.encode_image(Image.new("RGB", size, "red")))
    assert decoded.size == size


def test_ids_do_not_depend_on_the_batch(tokenizer):
    images = torch.rand(3, 3, 48, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    alone = torch.cat([tokenizer.encode(image[None]).ids for image in images])
    assert torch.equal(tokenizer.encode(images).ids, alone)


def test_rates_are_prefixes(tokenizer, image):
    full = tokenizer.encode_image(image)
    rates = tokenizer.rates(70, 100)
    assert rates == pytest.approx([35 * 9 * k / 7000 for k in (1, 2, 3, 4)])
    for k, rate in enumerate(rates, 1):
        codes = tokenizer.encode_image(image, bits_per_pixel=rate)
        assert torch.equal(codes.ids, full.ids[:, :, :k])
        assert codes.bits_per_pixel == pytest.approx(rate)
        assert torch.equal(codes.ids, full.coarser(k).ids)
    assert tokenizer.encode_image(image, bits_per_pixel=rates[2] - 1e-4).ids.shape[2] == 2
    with pytest.raises(ValueError, match=r"below every rate.*0\.0450, 0\.0900"):
        tokenizer.encode_image(image, bits_per_pixel=0.01)
    with pytest.raises(ValueError, match=r"1 to 4\) for \d+×\d+ pixels\. size=\(height, width\)"):
        tokenizer.decode(torch.zeros(1, 16, 5, dtype=torch.int64))


def test_a_tokenizer_of_one_rate_names_it(tiny, images):
    with pytest.raises(ValueError, match=r"no choice of rate\. Its bits per pixel: 0\.0469"):
        tiny.encode(images, bits_per_pixel=0.05)


@pytest.mark.parametrize("rate", ["0.01", "-1"])
def test_the_command_line_lists_the_rates(tokenizer, photo, tmp_path, capsys, rate):
    save(tokenizer, tmp_path / "native.safetensors")
    status, _, error = run_command(capsys, "encode", photo, "--model", tmp_path / "native.safetensors", "--bpp", rate)
    assert status == 2
    assert error.startswith(f"flowmo: {rate} bits per pixel is below every rate at 50×70: 0.0514, 0.1029")
    assert error.count("\n") == 1


def test_what_is_not_sent_is_zero_and_changes_the_image(tokenizer):
    ids = torch.randint(0, 512, (1, 16, 4), generator=torch.Generator().manual_seed(0))
    images = [tokenizer.decode(ids[:, :, :k]) for k in (1, 2, 3, 4)]
    assert len({float(image.sum()) for image in images}) == 4
    other = ids.clone()
    other[:, :, 2:] = 5
    assert torch.equal(tokenizer.decode(other[:, :, :2]), images[1])
    code = tokenizer.quantizer.code_from_ids(ids)
    kept = tokenizer.quantizer.keep_prefix(code, 2)
    assert torch.equal(kept[..., :6], code[..., :6])  # three channels of eight levels make an id
    assert kept[..., 6:].abs().max() == 0


@torch.no_grad()
def test_stage_1b_samples_from_the_prefixes_that_images_keep(config):
    """Each image alone, from the ids that it keeps and no more, has the losses that it has in the batch."""
    tokenizer = FlowMo(config.override("model.posttrain_sample=true", "model.posttrain_sample_k=2"))
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(4)) * 2 - 1
    noise = TrainingNoise.of(tokenizer.config, images, range(3))._replace(num_sub_tokens=torch.tensor([1, 4, 2]))

    def distance(x, y):
        return (x - y).abs().mean(dim=(1, 2, 3))

    opt = tokenizer.config.override("opt.lpips_weight=1").opt
    parts = posttrain_loss(tokenizer, images, noise, opt, distance).parts
    flows, distances = [], []
    for i, kept in enumerate(noise.num_sub_tokens.tolist()):
        code = tokenizer.quantizer.code_from_ids(tokenizer.encode(images[[i]]).ids[:, :, :kept])
        code = F.pad(code, (0, config.model.context_dim - code.shape[-1]))
        one = noise._replace(t=noise.t[[i]], noise=noise.noise[[i]], cfg_keep=noise.cfg_keep[[i]])
        chain = Chain(*(part[[i]] for part in noise.chain))
        distances.append(distance(images[[i]], sample_chain(tokenizer, code, chain)))
        flows.append(one_step(tokenizer, code, images[[i]], one, opt)[0])
    assert float(parts["flow"]) == pytest.approx(float(sum(flows)) / 3, rel=1e-4)
    assert float(parts["sample_distance"]) == pytest.approx(float(sum(distances)) / 3, rel=1e-4)


def test_kept_prefixes_are_uniform_and_of_their_own_stream(config):
    images = torch.zeros(1, 3, 1, 1).expand(4000, -1, -1, -1)
    kept = TrainingNoise.of(config, images, range(4000)).num_sub_tokens
    counts = torch.bincount(kept, minlength=5)[1:]
    assert counts.sum() == 4000
    assert (counts - 1000).abs().max() < 120  # over four standard deviations
    assert torch.equal(kept[100:200], TrainingNoise.of(config, images[:100], range(100, 200)).num_sub_tokens)


def test_blocks_cover_every_cell_once_and_blend_to_one():
    for cells in (1, 47, 48, 49, 64, 95, 130):
        kept = [cell for span in tiling.extents(cells) for cell in range(span.first, span.last)]
        assert kept == list(range(cells))
        assert all(span.stop - span.start <= tiling.LARGEST for span in tiling.extents(cells))
        assert all(span.start % 8 == 0 for span in tiling.extents(cells))  # windows of whole blocks are the image's
        weight = torch.zeros(cells * 16)
        for span in tiling.extents(cells):
            weight[span.start * 16 : span.stop * 16] += tiling.ramp(span, cells, 16)
        assert weight.min() > 0.49
        torch.testing.assert_close(weight, torch.ones_like(weight))


def test_blocks_compute_the_whole_image(tokenizer, monkeypatch):
    """With a halo as wide as the networks reach, blocks give the ids and the pixels of one pass over the image."""
    image = Image.fromarray(
        (torch.rand(4, 110, 3, generator=torch.Generator().manual_seed(5)) * 255).byte().numpy()
    ).resize((110 * 16, 32), Image.Resampling.BICUBIC)
    in_blocks = tokenizer.encode_image(image)
    drawn = tokenizer.decode_image(in_blocks)
    monkeypatch.setattr(tiling, "LARGEST", 1000)
    whole = tokenizer.encode_image(image)
    assert (in_blocks.ids != whole.ids).float().mean() < 1e-3  # a level at a rounding's edge
    expected = tokenizer.decode_image(in_blocks)
    difference = torch.tensor(list(drawn.getdata())).float() - torch.tensor(list(expected.getdata()))
    assert difference.abs().max() <= 1


def test_a_file_keeps_all(tokenizer, tmp_path, image):
    save(tokenizer, tmp_path / "native.safetensors")
    again = load(tmp_path / "native.safetensors")
    assert again.identity() == tokenizer.identity()
    codes = tokenizer.encode_image(image)
    assert torch.equal(again.encode_image(image).ids, codes.ids)
    assert again.decode_image(codes.coarser(2)).tobytes() == tokenizer.decode_image(codes.coarser(2)).tobytes()


def test_bare_ids_need_the_size(tokenizer):
    ids = torch.zeros(1, 6, 4, dtype=torch.int64)
    assert tokenizer.decode(ids, size=(32, 48)).shape == (1, 3, 32, 48)
    with pytest.raises(ValueError, match="16"):
        tokenizer.decode(ids)


def test_coarser_refuses(tokenizer):
    codes = Codes(torch.zeros(1, 6, 4, dtype=torch.int64), (32, 48), 512)
    for count in (0, 5):
        with pytest.raises(ValueError, match="of 4"):
            codes.coarser(count)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.patch_size=8", "patch_size=16"),
        ("model.code_length=20", "code_length=16"),
        ("data.crop_sizes=40x64", "multiple"),
        ("data.crop_sizes=64x80", "must fit"),
        ("data.crop_sizes=64", "list of sizes"),
        ("opt.lpips_crop=65", "opt.lpips_crop"),
        ("model.nested_dropout=2", "between 0 and 1"),
        ("model.quantization_type=noop", "nested_dropout needs"),
        ("model.window=0", "at least 1"),
        ("model.window=3", "does not divide 8. Write 1, 2, 4 or 8"),
    ],
)
def test_what_cannot_work_is_refused(config, setting, message):
    with pytest.raises(ConfigError, match=message):
        config.override(setting)


@pytest.fixture
def training(class_folder) -> list[str]:
    return [
        f"data.train={class_folder}",
        f"data.val={class_folder}",
        "data.crop_sizes=32x48 48x32 64x64",
        "data.global_batch_size=2",
        "data.num_workers=1",
        "opt.optimizer=muon",
        "opt.schedule=uniform",
        "opt.anchor=0.5",
        "trainer.log_every=1000",
        "trainer.sample_every=0",
        "trainer.checkpoint_every=3",
        "trainer.duration=6",
    ]


def test_crops_of_many_sizes_resume_to_the_bit(config, training, tmp_path):
    from flowmo.train.trainer import Trainer

    whole = Trainer(config.override(*training), tmp_path / "whole", report=lambda line: None)
    sizes = set()
    original = whole.task.module.forward
    whole.task.module.forward = lambda images, *rest: (sizes.add(tuple(images.shape[2:])), original(images, *rest))[1]
    whole.train()
    assert len(sizes) > 1
    assert sizes <= {(32, 48), (48, 32), (64, 64)}
    Trainer(config.override(*training, "trainer.duration=3"), tmp_path / "two", report=lambda line: None).train()
    again = Trainer(config.override(*training), tmp_path / "two", report=lambda line: None)
    again.train()
    for name, value in whole.task.model.state_dict().items():
        assert torch.equal(value, again.task.model.state_dict()[name]), name


def test_a_step_has_one_size_wherever_it_begins(config, training, tmp_path):
    """A run may continue with another batch, at a position that is no multiple of it."""
    from flowmo.train.trainer import Trainer

    run = Trainer(config.override(*training), tmp_path / "run", report=lambda line: None)
    batch, found = run.plan.total, set()
    for step in range(8):
        begin = 1 + step * batch
        run.task.advance(begin, run.schedule)
        sizes = {tuple(run.task._crop(torch.zeros(1, 3, 64, 64), begin + i).shape[2:]) for i in range(batch)}
        assert len(sizes) == 1
        found |= sizes
    assert len(found) > 1


def test_a_run_that_fails_ends(config, training, tmp_path):
    """Its workers ignore signals; a run that left them behind would wait for them for ever."""
    program = (
        "import sys; from pathlib import Path; from flowmo import Config; from flowmo.train.trainer import Trainer\n"
        f"run = Trainer(Config.from_dict({TINY_NATIVE!r}).override(*{training!r}), "
        f"Path({str(tmp_path / 'run')!r}))\n"
        "def fail(*_): raise NotImplementedError('a fault of ours')\n"
        "run.task.loss = fail\nrun.train()\n"
    )
    done = run_program(program)
    assert done.returncode == 1
    assert b"a fault of ours" in done.stderr
