"""Random streams: every pair of uses of one seed is independent, and nothing seeds a generator in another way."""

import hashlib
import itertools
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

import flowmo
from flowmo.losses.noise import TrainingNoise, random_crop
from flowmo.model.sampler import image_seed, seeded_noise
from flowmo.streams import Stream, seed_global, stream, stream_seed

SOURCE = Path(flowmo.__file__).parent
COUNT = 2000
BOUND = 6 / COUNT**0.5
"""Six standard deviations of a correlation between independent numbers."""


def largest_correlation(columns):
    """Largest absolute correlation over all pairs of columns, and the names of that pair."""
    table = torch.corrcoef(torch.stack([column.double() for column in columns.values()])).abs().fill_diagonal_(0)
    i, j = divmod(int(table.argmax()), len(columns))
    names = list(columns)
    return float(table.max()), names[i], names[j]


def first_numbers(generator):
    """The first uniform number of a generator, and the size of the first normal number that it would make instead."""
    start = generator.get_state()
    uniform = torch.rand((), generator=generator)
    return uniform, torch.randn(16, generator=generator.set_state(start))[0].abs()


def test_all_pairs_of_streams_are_independent():
    """All purposes, and the noise that ``decode`` makes of the same seed, by their first numbers."""
    columns = {}
    for purpose in Stream:
        uniform, normal = zip(*(first_numbers(stream(0, purpose, i)) for i in range(COUNT)), strict=True)
        columns |= {(purpose, "uniform"): torch.stack(uniform)}
        columns |= {(purpose, "normal"): torch.stack(normal)}
    uniform, normal = zip(*(first_numbers(torch.Generator().manual_seed(i)) for i in range(COUNT)), strict=True)
    columns |= {("decode", "uniform"): torch.stack(uniform), ("decode", "normal"): torch.stack(normal)}
    within = {frozenset(((name, "uniform"), (name, "normal"))) for name in (*Stream, "decode")}
    table = torch.corrcoef(torch.stack([column.double() for column in columns.values()]))
    for (i, first), (j, second) in itertools.combinations(enumerate(columns), 2):
        if frozenset((first, second)) in within:  # the same stream, read in two ways
            assert table[i, j].abs() > 0.5, "two reads of one stream must be noticed"
        else:
            assert table[i, j].abs() < BOUND, (first, second)


def test_no_two_streams_start_alike():
    names = [(seed, purpose, i) for seed in (0, 1, 10) for purpose in Stream for i in (0, 1, 10)]
    starts = {stream(*name).get_state().numpy().tobytes() for name in names}
    starts |= {torch.Generator().manual_seed(seed).get_state().numpy().tobytes() for seed in (0, 1, 10)}
    assert len(starts) == len(names) + 3
    assert stream_seed(0, Stream.TOKENIZED, 1, 11) != stream_seed(0, Stream.TOKENIZED, 11, 1)
    assert stream_seed(0, Stream.TOKENIZED, 1, 11) != stream_seed(0, Stream.TOKENIZED, 111)


def test_the_seed_of_a_stream_by_its_definition():
    digest = hashlib.blake2b(b"7/chain noise 12", digest_size=8).hexdigest()
    assert stream_seed(7, Stream.CHAIN_NOISE, 12) == int(digest, 16) >> 1
    seed_global(7, Stream.CHAIN_NOISE, 12)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=stream(7, Stream.CHAIN_NOISE, 12)))


def test_what_a_seed_decodes_to_stays():
    """Numbers of the releases before: noise of a seed, and seeds of the images of a set."""
    expected = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(5))
    assert torch.equal(seeded_noise([5], 4, 4)[0], expected)
    assert image_seed(0, 3) == int(hashlib.blake2b(b"0/3", digest_size=8).hexdigest(), 16) >> 1


@pytest.mark.parametrize("stage", ["pretrain", "posttrain", "distill"])
def test_training_draws_are_independent(stage, tiny_config):
    """Timesteps, noise, dropped codes, chains, jumps and cuts of a run, and the noise that a tokenizer decodes from."""
    settings = {
        "pretrain": (),
        "posttrain": ("model.posttrain_sample=true", "model.posttrain_sample_enable_cfg=true"),
        "distill": ("opt.teacher=x", "model.mean_velocity=true", "eval.sampling.guidance=1"),
    }
    config = tiny_config.override("opt.lpips_jitter=8", "opt.schedule=uniform", *settings[stage])
    assert config.stage == stage
    draws = TrainingNoise.of(config, torch.zeros(COUNT, 3, 12, 12), range(COUNT))
    decoded = torch.stack([seeded_noise([i], 4, 4)[0].flatten() for i in range(COUNT)])
    columns = {"t": draws.t, "noise": draws.noise[:, 0, 0, 0], "keep": draws.cfg_keep, "decoded": decoded[:, 0]}
    columns |= {"size of noise": draws.noise[:, 0, 0, 0].abs(), "size of decoded": decoded[:, 0].abs()}
    corners = torch.tensor([[rows.start, columns.start] for rows, columns in draws.crops])
    columns |= {"row": corners[:, 0], "column": corners[:, 1]}
    if stage == "posttrain":
        chain = draws.chain
        columns |= {"chain noise": chain.noise[:, 0, 0, 0].abs(), "time": chain.times[:, 1]}
        columns |= {"chain keep": chain.cfg_keep[:, 0]}
    if stage == "distill":
        columns |= {"path noise": draws.jumps.noise[:, 0, 0, 0].abs(), "start": draws.jumps.starts[:, 2]}
    largest, *names = largest_correlation(columns)
    assert largest < BOUND, names


@pytest.mark.parametrize("setting", ["opt.lpips_crop=30", "opt.lpips_jitter=2"])
def test_the_perceptual_crop_reaches_every_position_as_often(tiny_config, setting):
    opt, generator = tiny_config.override(setting).opt, torch.Generator().manual_seed(0)
    crops = [random_crop(opt, torch.zeros(1, 3, 32, 33), generator) for _ in range(900)]
    for axis, (positions, length) in enumerate(((3, 30), (4, 30) if "crop" in setting else (3, 31))):
        counts = Counter((crop[axis].start, crop[axis].stop) for crop in crops)
        assert counts.keys() == {(i, i + length) for i in range(positions)}
        assert min(counts.values()) > 0.8 * 900 / positions


def test_nothing_else_seeds_a_generator():
    """A use of a seed that bypasses the streams would share another use's numbers."""
    seeding = re.compile(r"manual_seed|default_rng|RandomState|\brandom\.seed|torch\.Generator\(")
    found = {
        path.relative_to(SOURCE).as_posix(): len(seeding.findall(path.read_text())) for path in SOURCE.rglob("*.py")
    }
    assert {name for name, count in found.items() if count} == {"streams.py", "model/sampler.py"}
    assert found["model/sampler.py"] == 2, "seeded_noise alone takes a seed as it is"
