"""Stage 1C: the teacher's paths, the jumps along them, and the command that trains a student."""

import itertools
import json
import shutil

import pytest
import torch

from flowmo import ConfigError, FlowMo, load, save
from flowmo.losses.noise import MAX_STUDENT_STEPS, TrainingNoise, random_jumps
from flowmo.losses.stages import distill_loss, teacher_path
from flowmo.model.sampler import shifted_times
from flowmo.train.cost import training_flops
from flowmo.train.trainer import Trainer, TrainingError

STUDENT = ("model.mean_velocity=true", "eval.sampling.guidance=1", "eval.sampling.sample_steps=1")


def quiet(_):
    pass


def squared_distance(x, y):
    return (x - y).square().mean(dim=(1, 2, 3))


def taken_over(teacher: FlowMo, *settings: str) -> FlowMo:
    student = FlowMo(teacher.config.override(*STUDENT, *settings))
    missing, unknown = student.load_state_dict(teacher.state_dict(), strict=False)
    assert not unknown
    assert {name.split(".")[1] for name in missing} == {"span_in", "span_out"}
    return student


def test_a_fresh_student_is_its_teacher(tiny, images):
    student = taken_over(tiny)
    codes = tiny.encode(images)
    for steps in (1, 3):
        expected = tiny.decode(codes, steps, guidance=1.0)
        torch.testing.assert_close(student.decode(codes, steps), expected)


def test_a_student_heeds_where_a_step_ends(tiny, images):
    student = taken_over(tiny)
    with torch.no_grad():
        student.decoder.span_out.weight.normal_(0, 0.1)
        at, code = torch.tensor([0.8]), student.decoder.embed_code(torch.ones(5, 6, 8))
        seen = [student.decoder(images, code, at, end) for end in (None, at, torch.tensor([0.2]), torch.tensor([0.0]))]
    assert torch.equal(seen[0], seen[1])
    assert not torch.allclose(seen[1], seen[2], atol=1e-3)
    assert not torch.allclose(seen[2], seen[3], atol=1e-3)


def test_a_path_is_the_sampler(tiny, images):
    """It starts at the noise, ends at the guided sample, and is straight between its steps."""
    codes = tiny.encode(images)
    code = tiny.quantizer.code_from_ids(codes.ids)
    noise = torch.stack([torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(5)])
    path = teacher_path(tiny, code, noise, steps=8)
    expected = tiny.decode(codes, 8, seed=range(5))
    torch.testing.assert_close(path.states[-1].clamp(-1, 1), expected, rtol=1e-4, atol=1e-5)
    assert path.times.tolist() == pytest.approx(shifted_times(8, 4.0))
    own = teacher_path(tiny, code, noise)
    assert len(own.times) == tiny.config.eval.sampling.sample_steps + 1
    asked = torch.stack((path.times, path.times.flip(0), *[path.times] * 3))
    states = path.interpolate(asked)
    torch.testing.assert_close(states[0], path.states[:, 0])
    torch.testing.assert_close(states[1], path.states[:, 1].flip(0))
    middle = (path.times[:-1] + path.times[1:]) / 2
    between = path.interpolate(middle.expand(5, -1)).transpose(0, 1)
    torch.testing.assert_close(between, (path.states[:-1] + path.states[1:]) / 2, rtol=1e-4, atol=1e-4)


def test_jumps_are_steps_of_samplers():
    generator = torch.Generator().manual_seed(0)
    later: set[bool] = set()
    lengths, grids = [], {(t, end) for n in range(1, MAX_STUDENT_STEPS + 1) for t, end in pairs(n)}
    for _ in range(300):
        starts, ends = (times.tolist() for times in random_jumps(5, 4.0, generator))
        assert (starts[0], ends[0], ends[1]) == (1.0, 0.0, 0.0)
        assert {(round(t, 5), round(end, 5)) for t, end in zip(starts, ends, strict=True)} <= grids
        lengths += [t - end for t, end in zip(starts[2:], ends[2:], strict=True)]
        later.add(ends[2] > 0)
    assert later == {True, False}, "any step, not the last alone"
    assert min(lengths) < 0.001
    assert max(lengths) == 1.0


def pairs(steps: int) -> list[tuple[float, float]]:
    times = [round(t, 5) for t in shifted_times(steps, 4.0)]
    return list(itertools.pairwise(times))


@pytest.fixture
def distilling(tiny_config):
    return ("opt.teacher=teacher", *STUDENT, "opt.lpips_weight=0.5")


def straight(tokenizer: FlowMo) -> FlowMo:
    """A teacher whose velocity is the same everywhere: all means over its paths are that velocity."""
    with torch.no_grad():
        tokenizer.decoder.picture_out.weight.zero_()
        tokenizer.decoder.picture_out.bias.fill_(0.5)
    return tokenizer


def test_a_perfect_student_has_no_flow_loss(tiny, images, distilling):
    teacher = straight(tiny)
    student = taken_over(teacher, *distilling)
    draws = TrainingNoise.of(student.config, images, range(5))
    loss = distill_loss(student, images, draws, student.config.opt, squared_distance, teacher=teacher)
    assert loss.parts["flow"] < 1e-5  # the shortest step of 25 is 2.6e-6 long, and a difference over it rounds
    assert loss.parts["jump_distance"] < 1e-8
    to_pil = taken_over(teacher, *distilling, "opt.distill_towards=image")
    parts = distill_loss(to_pil, images, draws, to_pil.config.opt, squared_distance, teacher=teacher).parts
    sample = draws.jumps.noise - 0.5
    torch.testing.assert_close(parts["jump_distance"], squared_distance(images, sample).mean())
    crops = [(slice(i, i + 8), slice(2 * i, 2 * i + 8)) for i in range(5)]
    draws = draws._replace(crops=crops)
    parts = distill_loss(to_pil, images, draws, to_pil.config.opt, squared_distance, teacher=teacher).parts
    errors = (images - sample).square()
    seen = torch.stack([error[:, rows, columns] for error, (rows, columns) in zip(errors, crops, strict=True)])
    torch.testing.assert_close(parts["jump_distance"], seen.mean())


@pytest.mark.parametrize("space", ["velocity", "image"])
def test_the_loss_is_that_of_every_jump(tiny, images, distilling, space):
    """Against the formula, one picture and one jump at a time."""
    student = taken_over(tiny, *distilling, f"opt.loss_space={space}", "opt.teacher_steps=3")
    with torch.no_grad():
        student.decoder.span_out.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    draws = TrainingNoise.of(student.config, images, range(5))
    noise, starts, ends = draws.jumps
    loss = distill_loss(student, images, draws, student.config.opt, squared_distance, teacher=tiny)
    flow_errors, distances = [], []
    with torch.no_grad():
        code = tiny.quantizer.quantize(tiny.encoder(images))[0]
        path = teacher_path(tiny, code, noise, 3)
        for i in range(5):
            for jump in range(4):
                t, end = starts[i, jump], ends[i, jump]
                x_t, x_end = path.interpolate(torch.stack((t, end)).expand(5, 2))[i]
                u = student.decoder(x_t[None], student.decoder.embed_code(code[i : i + 1]), t[None], end[None])[0]
                error = u - (x_t - x_end) / (t - end)
                flow_errors.append(((t if space == "image" else 1) * error).square().mean())
                if jump < 2:
                    assert end == 0
                    distances.append((path.states[-1, i] - (x_t - (t - end) * u)).square().mean())
    torch.testing.assert_close(loss.parts["flow"], torch.stack(flow_errors).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.parts["jump_distance"], torch.stack(distances).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.loss.detach(), loss.parts["flow"] + 0.5 * loss.parts["jump_distance"])
    loss.loss.backward()
    assert all(p.grad is None for p in student.encoder.parameters())
    assert all(p.grad is not None for name, p in student.decoder.named_parameters())
    assert student.decoder.span_out.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in tiny.parameters())


@pytest.fixture
def settings(tiny_config, tiny_model, tmp_path, picture_files):
    (tmp_path / "pictures").mkdir()
    for file in picture_files[:4]:
        shutil.copy(file, tmp_path / "pictures")
    return tiny_config.override(
        f"data.train={tmp_path / 'pictures'}",
        f"opt.teacher={tiny_model}",
        "opt.teacher_steps=4",
        *STUDENT,
        "data.global_batch_size=4",
        "data.num_workers=0",
        "opt.lpips_weight=0",
        "opt.lr=3e-3",
        "opt.mup_base_width=0",
        "model.ema_decay=0",
        "trainer.max_steps=40",
        "trainer.log_every=1",
        "trainer.checkpoint_every=20",
        "trainer.sample_every=0",
        "trainer.enable_bfloat16=false",
        "trainer.tensorboard=false",
    )


def test_a_student_learns_and_resumes_exactly(settings, tiny, tmp_path):
    """The loss falls, the encoder stays its teacher's, an interrupted run ends bit for bit as a whole one."""
    whole = Trainer(settings, tmp_path / "whole", report=quiet)
    assert whole.config.stage == "distill"
    whole.train()
    records = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    flow = [record["flow"] for record in records]
    assert sum(flow[-5:]) < 0.8 * sum(flow[:5])
    student = load(whole.checkpoints()[-1])
    assert all(torch.equal(a, b) for a, b in zip(student.encoder.parameters(), tiny.encoder.parameters(), strict=True))
    codes = student.encode(torch.zeros(1, 3, 32, 32))
    assert student.decode(codes).shape == (1, 3, 32, 32)
    assert not torch.equal(student.decode(codes), student.decode(codes, steps=4))
    for refused in ({"guidance": 1.5}, {"solver": "heun"}):
        with pytest.raises(ValueError, match="has guidance folded in and makes Euler steps"):
            student.decode(codes, **refused)
    Trainer(settings.override("trainer.max_steps=20"), tmp_path / "broken", report=quiet).train()
    broken = Trainer(settings, tmp_path / "broken", report=quiet)
    broken.train()
    ours = load(broken.checkpoints()[-1]).state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in student.state_dict().items())
    save(student, tmp_path / "student.safetensors")
    again = load(tmp_path / "student.safetensors")
    assert torch.equal(again.decode(codes, steps=2), student.decode(codes, steps=2))


def test_teachers_that_do_not_fit_are_refused(settings, tmp_path):
    with pytest.raises(TrainingError, match=r"other settings: model\.dec_depth 3 -> 2"):
        Trainer(settings.override("model.dec_depth=2"), tmp_path / "a", report=quiet)
    Trainer(settings.override("trainer.max_steps=1"), tmp_path / "b", report=quiet).train()
    of_a_student = sorted((tmp_path / "b" / "checkpoints").glob("*.pth"))[-1]
    with pytest.raises(TrainingError, match=r"other settings: model\.mean_velocity True -> False"):
        Trainer(settings.override(f"opt.teacher={of_a_student}"), tmp_path / "c", report=quiet)
    with pytest.raises(TrainingError, match=r"other settings: data\.image_size 32 -> 64"):
        Trainer(settings.override("data.image_size=64"), tmp_path / "e", report=quiet)
    with pytest.raises(Exception, match=r"none\.pth"):
        Trainer(settings.override("opt.teacher=none.pth"), tmp_path / "d", report=quiet)


def test_a_student_has_its_teachers_ids(settings, tiny, tmp_path):
    """A generator of the teacher draws for the student, whose encoder is the teacher's."""
    run = Trainer(settings.override("trainer.max_steps=1", "trainer.checkpoint_every=1"), tmp_path / "a", report=quiet)
    run.train()
    student = load(run.checkpoints()[-1])
    assert student.identity() == tiny.identity()
    assert student.weights_identity() != tiny.weights_identity()


def test_a_student_does_not_resume_with_another_encoder(settings, tiny, tmp_path):
    """Its decoder would learn codes of one encoder, and the run would save another."""
    path = tmp_path / "teacher.safetensors"
    save(tiny, path)
    settings = settings.override(f"opt.teacher={path}", "trainer.max_steps=1", "trainer.checkpoint_every=1")
    Trainer(settings, tmp_path / "a", report=quiet).train()
    other = FlowMo(tiny.config)
    save(other, path)
    with pytest.raises(TrainingError, match=rf"of a student of {tiny.identity()}.*is {other.identity()}"):
        Trainer(settings, tmp_path / "a", report=quiet)


def test_a_student_does_not_start_from_another_encoder(settings, tiny, tmp_path):
    save(tiny, tmp_path / "a.safetensors")
    other = FlowMo(tiny.config)
    save(other, tmp_path / "b.safetensors")
    first = settings.override(f"opt.teacher={tmp_path / 'a.safetensors'}", "trainer.max_steps=1")
    run = Trainer(first, tmp_path / "a", report=quiet)
    run.train()
    student = load(run.checkpoints()[-1])
    save(student, tmp_path / "student.safetensors")
    again = Trainer(first, tmp_path / "c", resume_from=tmp_path / "student.safetensors", report=quiet)
    assert again.config.model.base == tiny.as_base()
    second = settings.override(f"opt.teacher={tmp_path / 'b.safetensors'}", "trainer.max_steps=1")
    with pytest.raises(TrainingError, match=r"student\.safetensors has another encoder than opt\.teacher=.*b\.safe"):
        Trainer(second, tmp_path / "b", resume_from=tmp_path / "student.safetensors", report=quiet)


def test_a_teacher_of_another_solver_needs_a_number_of_steps(settings, tiny, tmp_path):
    heun = FlowMo(tiny.config.override("eval.sampling.solver=heun"))
    heun.load_state_dict(tiny.state_dict())
    save(heun, tmp_path / "heun.safetensors")
    settings = settings.override(f"opt.teacher={tmp_path / 'heun.safetensors'}")
    Trainer(settings, tmp_path / "a", report=quiet)
    with pytest.raises(TrainingError, match=r"samples with heun.*Write opt\.teacher_steps=N"):
        Trainer(settings.override("opt.teacher_steps=0"), tmp_path / "b", report=quiet)


def test_settings_that_cannot_work_are_refused(tiny_config):
    with pytest.raises(ConfigError, match=r"Add model\.mean_velocity=true"):
        tiny_config.override("opt.teacher=nano")
    with pytest.raises(ConfigError, match=r"Write eval\.sampling\.guidance=1"):
        tiny_config.override("model.mean_velocity=true")
    with pytest.raises(ConfigError, match="Set one of them"):
        tiny_config.override("opt.teacher=nano", *STUDENT, "model.posttrain_sample=true")
    with pytest.raises(ConfigError, match="at least 2"):
        tiny_config.override("opt.jumps=1")


def test_the_cost_holds_the_teachers_passes(settings):
    """10 passes, 2 of them twice for guidance, and 4 jumps forward and back."""
    config = settings.override("opt.teacher_steps=10")
    whole, jumps = training_flops(config), training_flops(config.override("opt.jumps=6"))
    a_jump = (jumps - whole) / 2
    a_pass = whole - training_flops(config.override("opt.teacher_steps=9"))
    assert a_jump == pytest.approx(3 * a_pass, rel=0.05)
    assert whole == pytest.approx(4 * a_jump + 12 * a_pass, rel=0.1)


def test_a_run_forecasts_its_teachers_own_steps(settings, tiny, tmp_path):
    """The cost is that of ``opt.teacher_steps`` at the number of steps with which the teacher samples."""
    own = settings.override("opt.teacher_steps=0")
    for steps in (2, 3):
        tiny.config = tiny.config.override(f"eval.sampling.sample_steps={steps}")
        save(tiny, tmp_path / "teacher.safetensors")
        run = Trainer(
            own.override(f"opt.teacher={tmp_path / 'teacher.safetensors'}"), tmp_path / str(steps), report=quiet
        )
        expected = training_flops(settings.override(f"opt.teacher_steps={steps}"))
        assert training_flops(*run.task.forecast_arguments()) == expected
