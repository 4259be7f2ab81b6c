"""Named configurations, by section."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "nano": {
        "data": {"image_size": 128},
        "model": {
            "patch_size": 8,
            "hidden_size": 256,
            "num_heads": 4,
            "dec_depth": 6,
            "enc_hidden_size": 256,
            "enc_num_heads": 4,
            "enc_depth": 3,
            "code_length": 64,
            "context_dim": 36,
            "code_layout": "lattice",
            "prediction": "picture",
        },
        "eval": {"sampling": {"sample_steps": 1}},
    },
    "native": {
        "data": {"image_size": 224},
        "model": {
            "network": "windowed",
            "patch_size": 16,
            "hidden_size": 384,
            "num_heads": 3,
            "dec_depth": 5,
            "enc_hidden_size": 384,
            "enc_num_heads": 3,
            "enc_depth": 2,
            "code_length": 196,
            "context_dim": 24,
            "quantization_type": "fsq",
            "prediction": "picture",
            "nested_dropout": 1.0,
            "enable_cfg": False,
        },
        "eval": {"sampling": {"sample_steps": 1, "guidance": 1.0}},
    },
    "small": {"model": {"patch_size": 8, "hidden_size": 768}},
    "lo": {},
    "hi": {"model": {"context_dim": 56, "codebook_size_for_entropy": 14}},
}
"""``small``, ``lo`` and ``hi`` are the paper's (table 6); ``nano`` is sized to train and decode on a CPU: 288 bytes a
128 × 128 picture. Its decoder predicts the picture, is trained mostly at t = 1, and decodes in one pass."""

GENERATOR_PRESETS: dict[str, dict[str, Any]] = {
    "uvit": {
        "generator": {
            "train": True,
            "network": "uvit",
            "dropout": 0.0,
            "visible_weight": 0.1,
            "guided_from": "class",
            "drawing": "gumbel",
        },
        "data": {"global_batch_size": 128},
        "opt": {
            "lr": 1e-4,
            "beta2": 0.96,
            "weight_decay": 0.03,
            "max_grad_norm": 1.0,
            "warmup": "1.28M images",
            "cooldown": 1.0,
            "cooldown_shape": "cosine",
            "final_lr": 1e-5,
        },
        "trainer": {"duration": "300 epochs"},
    },
    "maskgit": {
        "generator": {"train": True},
        "data": {"global_batch_size": 128},
        "opt": {"lr": 1e-4, "mup_base_width": 0, "max_grad_norm": 1.0, "warmup": "640k images"},
        "trainer": {"duration": "300 epochs"},
    },
    "maskgit_nano": {
        "generator": {"train": True, "hidden_size": 256, "depth": 8, "num_heads": 4},
        "data": {"global_batch_size": 32},
        "model": {"ema_decay": 0.99},
        "opt": {"lr": 1e-3, "mup_base_width": 0, "max_grad_norm": 1.0, "warmup": "6400 images", "cooldown": 0.5},
        "trainer": {"duration": "40 epochs"},
    },
}
"""``uvit`` is the paper's: TiTok's UViTBert, its sampling and training, at the paper's width, depth, batch, rate and
length. ``maskgit`` is our network at the same size and length; ``maskgit_nano`` trains on a CPU."""
