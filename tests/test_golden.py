"""Outputs of the authors' released model, which a FlowMo that loads their checkpoints must reproduce.

Each case is ``NAME.json`` (settings in the authors' names, state-dict keys with shapes, scalars) beside
``NAME.safetensors`` (inputs and outputs). Weights are regenerated from the keys. ``FLOWMO_GOLDEN`` names another
folder of cases.
"""

from __future__ import annotations

import json
import os
import zlib
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowmo import Config
from flowmo.checkpoint.authors import convert_release
from flowmo.config import FIELDS
from flowmo.config.overrides import ALIASES
from flowmo.model import flow
from flowmo.model.quantizers import KL
from flowmo.model.sampler import euler, guided_velocity, shifted_times
from flowmo.model.transformer import timestep_embedding
from flowmo.tokenizer import build

FOLDER = Path(os.environ.get("FLOWMO_GOLDEN") or Path(__file__).parent / "golden")
CASES = sorted(p.stem for p in FOLDER.glob("*.json") if p.with_suffix(".safetensors").is_file())
TRAINING_ONLY = {"fix_norm_mode", "posttrain_sample", "posttrain_sample_enable_cfg", "posttrain_sample_k"}
TOLERANCE = 5e-5


def regenerate(keys: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Make the weights of a golden case, as the recorded cases did.

    Each is drawn from the CRC-32 of its key. A matrix is divided by the root of its second dimension, a ``.scale`` is
    1 + 0.1 times its draw, and any other vector 0.02 times.
    """
    state = {}
    for key, shape in keys.items():
        w = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
        if len(shape) > 1:
            state[key] = w / shape[1] ** 0.5
        else:
            state[key] = 1 + 0.1 * w if key.endswith(".scale") else 0.02 * w
    return state


@lru_cache
def golden(name: str):
    case = json.loads((FOLDER / f"{name}.json").read_text())
    settings = {f"model.{k}": v for k, v in case["model"].items() if k not in TRAINING_ONLY and v is not None}
    assert settings.keys() <= FIELDS.keys() | ALIASES.keys()
    config = Config().updated(settings)
    tokenizer = build(config, convert_release(regenerate(case["keys"]), config))
    return tokenizer, case["scalars"], load_file(FOLDER / f"{name}.safetensors")


def decoder_code(tokenizer, tensors):
    return tokenizer.quantizer.quantize(tensors["code"])[0]


def velocity_at(tokenizer, tensors, keep=None):
    x_t = flow.interpolate(tensors["image"], tensors["noise"], tensors["t"])
    embedded = tokenizer.decoder.embed_code(decoder_code(tokenizer, tensors), keep)
    return tokenizer.decoder(x_t, embedded, tensors["t"])


def sampled(tokenizer, tensors, steps, rho, guidance):
    s, times = tokenizer.config.eval.sampling, shifted_times(steps, rho)
    velocity = guided_velocity(
        tokenizer.decoder, decoder_code(tokenizer, tensors), guidance, s.guidance_low, s.guidance_high
    )
    return euler(velocity, tensors["noise"], times)


def chain(tokenizer, tensors):
    """Stage 1B's sample: every picture has its own timesteps, tensors["chain_t"] is b × (steps + 1)."""
    decoder, x = tokenizer.decoder, tensors["noise"]
    embedded = decoder.embed_code(decoder_code(tokenizer, tensors))
    for t, t_next in zip(tensors["chain_t"].T, tensors["chain_t"].T[1:], strict=False):
        x = x - (t - t_next)[:, None, None, None] * decoder(x, embedded, t)
    return x


def denoised(tokenizer, tensors):
    x_t = flow.interpolate(tensors["image"], tensors["noise"], tensors["t"])
    return flow.denoise(x_t, velocity_at(tokenizer, tensors), tensors["t"])


def flat_moments(tokenizer, tensors, which):
    return KL.moments(tensors["code"])[which].transpose(1, 2).flatten(1)


def sample_from_name(name):
    """("pow", 0.25, 25, 1.5) and the like out of sample_pow_0.25_25_1.5 or sample_linear_4_1.0."""
    *schedule, steps, guidance = name.removeprefix("sample_").split("_")
    rho = 1.0 if schedule[0] == "linear" else 1 / float(schedule[1])
    return int(steps), rho, float(guidance)


OUTPUTS = {
    "code": lambda tok, x: tok.encoder(x["image"]),
    "quantized": decoder_code,
    "indices": lambda tok, x: tok.quantizer.quantize(x["code"])[1].flatten(),
    "kl_mean": lambda tok, x: flat_moments(tok, x, 0),
    "kl_logvar": lambda tok, x: flat_moments(tok, x, 1),
    "velocity": velocity_at,
    "velocity_null": lambda tok, x: velocity_at(tok, x, torch.zeros(len(x["image"]), dtype=torch.bool)),
    "denoised": denoised,
    "chain_sample": chain,
}
INPUTS = {"image", "noise", "t", "chain_t"}


def outputs():
    for name in CASES:
        with (FOLDER / f"{name}.safetensors").open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        yield from ((name, key) for key in sorted(header.keys() - INPUTS - {"__metadata__"}))


def test_there_are_cases():
    assert CASES, f"no golden cases in {FOLDER}"


@pytest.mark.parametrize(("name", "key"), list(outputs()))
@torch.no_grad()
def test_tensor(name, key):
    tokenizer, _, tensors = golden(name)
    if key.startswith("sample_"):
        actual = sampled(tokenizer, tensors, *sample_from_name(key))
    else:
        actual = OUTPUTS[key](tokenizer, tensors)
    assert actual.shape == tensors[key].shape
    if actual.dtype == torch.int64:
        assert torch.equal(actual, tensors[key])
    else:
        assert (actual - tensors[key]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_scalars(name):
    tokenizer, scalars, tensors = golden(name)
    quantized = tokenizer.quantizer(tensors["code"])
    statistics = {
        "per_sample_entropy" if k == "sample_entropy" else k: v.item() for k, v in quantized.statistics.items()
    }
    actual = {
        **statistics,
        "quantizer_loss": sum(v.item() for v in quantized.losses.values()),
        "flow_loss": flow.flow_loss(velocity_at(tokenizer, tensors), tensors["noise"] - tensors["image"]).item(),
    }
    for key, expected in scalars.items():
        assert actual[key] == pytest.approx(expected, rel=1e-5), key


def test_timestep_embedding_has_cosines_first():
    embedding = timestep_embedding(torch.zeros(1))
    assert embedding[0, :128].eq(1).all()
    assert embedding[0, 128:].eq(0).all()
