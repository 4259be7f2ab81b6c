"""Tokenizers that studies start from, at sizes that a CPU or one GPU trains."""

from __future__ import annotations

from dataclasses import dataclass

from flowmo.config import Config


@dataclass(frozen=True)
class Scale:
    """How large a study is that trains tokenizers.

    Attributes:
        base: what all of them have in common.
        pictures: held-out ones to judge on.
        cost: what it takes, in words.
    """

    base: Config
    seeds: int
    pictures: int
    cost: str


SMALL_BASE = Config.from_dict(
    {
        "data": {"image_size": 64, "global_batch_size": 16, "random_flip": True, "num_workers": 1},
        "model": {
            **{"patch_size": 8, "hidden_size": 256, "num_heads": 4, "dec_depth": 6, "enc_hidden_size": 128},
            **{"enc_num_heads": 2, "enc_depth": 3, "code_length": 64, "context_dim": 9},
            **{"code_layout": "lattice", "prediction": "picture"},
            **{"ema_decay": 0.992, "entropy_loss_weight": 0.05, "commit_loss_weight": 0.0025},
        },
        "opt": {
            **{"lr": 1e-3, "mup_base_width": 0, "warmup": "200 steps", "cooldown": 0.4, "max_grad_norm": 1.0},
            **{"lpips_mode": "alex", "lpips_weight": 0.1, "schedule": "uniform", "anchor": 0.2},
            **{"loss_space": "picture"},
        },
        "trainer": {"duration": "7000 steps", "log_every": "100 steps", "checkpoint_every": "500 steps"},
        "eval": {"sampling": {"sample_steps": 8, "rho": 2}},
    }
).override("data.max_microbatch=16", "trainer.tensorboard=false", "trainer.sample_every='1000 steps'")
"""15 M parameters, 72 bytes a 64 × 64 picture: small enough to be trained, and trained through its chain, on a CPU."""

GPU_BASE = SMALL_BASE.override(
    *("data.image_size=128", "data.global_batch_size=64", "data.max_microbatch=64", "data.num_workers=8"),
    *("model.hidden_size=512", "model.num_heads=8", "model.dec_depth=8", "model.code_length=128"),
    *("model.enc_hidden_size=256", "model.enc_num_heads=4", "model.enc_depth=4", "model.context_dim=18"),
    *("trainer.duration=12000 steps", "trainer.compile=true", "eval.sampling.sample_steps=25"),
)

SMOKE_BASE = SMALL_BASE.override(
    *("data.image_size=32", "data.global_batch_size=4", "data.num_workers=0", "model.hidden_size=64"),
    *("model.num_heads=2", "model.dec_depth=1", "model.enc_hidden_size=64", "model.enc_depth=1"),
    *("model.code_length=4", "trainer.duration=2 steps", "trainer.log_every=1 step"),
)
"""Proves that a study runs, and nothing else."""

PAPERS_SAMPLER = ("opt.schedule=fat_lognormal", "eval.sampling.rho=4")
"""What ablations vary must be in their baseline: the thick-tailed timesteps and the shifted sampler."""

TINY_BASE = SMALL_BASE.override(
    *PAPERS_SAMPLER,
    *("model.hidden_size=192", "model.num_heads=3", "model.dec_depth=3", "model.enc_depth=2"),
    *("trainer.duration=600 steps", "opt.warmup=100 steps", "trainer.sample_every=0"),
)
"""4.4 M parameters, six minutes of training on one CPU core: for studies that train dozens."""
