"""Settings that recipes start from, at sizes that a CPU or one GPU trains."""

from __future__ import annotations

from flowmo.config import Config, preset

SMALL_BASE = Config.from_dict(
    {
        "data": {"image_size": 64, "global_batch_size": 16, "random_flip": True, "num_workers": 1},
        "model": {
            **{"patch_size": 8, "hidden_size": 256, "num_heads": 4, "dec_depth": 6, "enc_hidden_size": 128},
            **{"enc_num_heads": 2, "enc_depth": 3, "code_length": 64, "context_dim": 9},
            **{"code_layout": "lattice", "prediction": "image"},
            **{"ema_decay": 0.992, "entropy_loss_weight": 0.05, "commit_loss_weight": 0.0025},
        },
        "opt": {
            **{"lr": 1e-3, "mup_base_width": 0, "warmup": "200 steps", "cooldown": 0.4, "max_grad_norm": 1.0},
            **{"lpips_mode": "alex", "lpips_weight": 0.1, "schedule": "uniform", "anchor": 0.2},
            **{"loss_space": "image"},
        },
        "trainer": {"duration": "7000 steps", "log_every": "100 steps", "checkpoint_every": "500 steps"},
        "eval": {"sampling": {"sample_steps": 8, "rho": 2}},
    }
).override("data.max_microbatch=16", "trainer.tensorboard=false", "trainer.sample_every='1000 steps'")
"""15 M parameters, 72 bytes per 64 × 64 image: small enough to train on a CPU, even through the sampling chain."""

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
"""Only shows that a recipe runs."""

PAPERS_SAMPLER = ("opt.schedule=fat_lognormal", "eval.sampling.rho=4")
"""Thick-tailed timesteps and the shifted sampler. Ablations vary them, so that their baseline needs them."""

TINY_BASE = SMALL_BASE.override(
    *PAPERS_SAMPLER,
    *("model.hidden_size=192", "model.num_heads=3", "model.dec_depth=3", "model.enc_depth=2"),
    *("trainer.duration=600 steps", "opt.warmup=100 steps", "trainer.sample_every=0"),
)
"""4.4 M parameters, six minutes of training on one CPU core: for recipes that train dozens."""

SMOKE_ABLATION = SMOKE_BASE.override(*PAPERS_SAMPLER, "eval.sampling.sample_steps=2")
TINY_LONG = TINY_BASE.override("trainer.duration=900 steps")
GPU_SHORT = GPU_BASE.override(*PAPERS_SAMPLER, "trainer.duration=2500 steps", "trainer.sample_every=0")
GPU_LONG = GPU_BASE.override(*PAPERS_SAMPLER, "trainer.duration=6000 steps", "model.code_length=64")
PAPER_SPEED = ("trainer.compile=true", "data.num_workers=8")
PAPER_LO = preset("lo").override("data.global_batch_size=128", *PAPER_SPEED)
PAPER_SMALL = preset("small").override("trainer.duration=40 epochs", "data.global_batch_size=128", *PAPER_SPEED)

NESTED_BASE = preset("native").override(
    *("data.image_size=64", "data.global_batch_size=32", "data.max_microbatch=32", "data.random_flip=true"),
    *("data.num_workers=1", "model.code_length=16", "model.hidden_size=256", "model.num_heads=4", "model.dec_depth=3"),
    *("model.enc_hidden_size=256", "model.enc_num_heads=4", "model.window=4", "model.codebook_size_for_entropy=3"),
    *("model.context_dim=12", "model.ema_decay=0.98", "opt.optimizer=muon", "opt.lr=1e-3", "opt.warmup=3200 images"),
    *("opt.cooldown=0", "opt.max_grad_norm=1", "opt.lpips_mode=alex", "opt.lpips_weight=0.1", "opt.schedule=uniform"),
    *("opt.loss_space=image", "opt.freeze_encoder_after=100M images", "trainer.duration=96k images"),
    *("trainer.log_every=1600 images", "trainer.checkpoint_every=8k images", "trainer.sample_every=0"),
    *("trainer.tensorboard=false", "eval.sampling.rho=2"),
)
"""7.4 M parameters, 64 × 64 pixels, twelve rates from 0.012 to 0.14 bits per pixel."""

ONE_RATE = ("model.nested_dropout=0", "opt.anchor=0.75")
"""Turns a base of several rates into one of its highest rate, with the recipe that is best in one pass."""

GPU_NESTED = NESTED_BASE.override(
    *("data.image_size=128", "model.code_length=64", "data.global_batch_size=64", "data.max_microbatch=64"),
    *(
        "data.num_workers=8",
        "trainer.duration=384k images",
        "trainer.checkpoint_every=32k images",
        "trainer.compile=true",
        "model.ema_decay=0.99",
    ),
)
PAPER_NESTED = GPU_NESTED.override(
    *("data.image_size=256", "model.code_length=256", "model.hidden_size=1152", "model.num_heads=9", "model.window=8"),
    *("model.enc_hidden_size=768", "model.enc_num_heads=6", "model.dec_depth=12", "data.global_batch_size=128"),
    *("data.max_microbatch=32", "model.ema_decay=0.9999", "opt.warmup=640k images"),
    *("trainer.duration=51.2M images", "trainer.checkpoint_every=1.28M images", "opt.lpips_mode=vgg"),
)
SMOKE_NESTED = NESTED_BASE.override(
    *("data.image_size=32", "model.code_length=4", "data.global_batch_size=4", "data.num_workers=0", "opt.warmup=0"),
    *(
        "model.hidden_size=32",
        "model.num_heads=1",
        "model.dec_depth=1",
        "model.enc_hidden_size=32",
        "model.conv_depth=1",
    ),
    *("model.enc_num_heads=1", "trainer.duration=8 images", "trainer.log_every=4 images"),
    "trainer.checkpoint_every=4 images",
)

CPU_GENERATOR = preset("maskgit_nano").override(
    *("trainer.tensorboard=false", "trainer.sample_every=0", "data.num_workers=0", "generator.depth=4"),
    *("trainer.log_every=640 images", "trainer.checkpoint_every=3200 images", "opt.warmup=3200 images"),
)
SMOKE_GENERATOR = CPU_GENERATOR.override(
    *("generator.hidden_size=32", "generator.depth=1", "generator.num_heads=2", "data.global_batch_size=4"),
    *("trainer.duration=2 steps", "trainer.log_every=1 step", "opt.warmup=0"),
)
GPU_GENERATOR = preset("maskgit_nano").override(
    *("generator.hidden_size=512", "generator.num_heads=8", "data.global_batch_size=128"),
    *("opt.lr=5e-4", "trainer.compile=true"),
)
