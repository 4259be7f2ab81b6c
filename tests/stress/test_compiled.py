"""Compiled networks: through Inductor, which compiles dozens of C++ files, and traced at many sizes.

Each takes 15 seconds to minutes. ``tests/test_train_plan.py`` compiles blocks without Inductor.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import PICTURES, TINY_NATIVE, open_gates
from test_train_plan import distance

from flowmo import Config, FlowMo
from flowmo.distributed import World
from flowmo.losses.noise import TrainingNoise
from flowmo.losses.stages import Stage
from flowmo.train.parallel import prepare
from flowmo.train.trainer import Trainer


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_compiled_blocks_train_alike(tiny_config: Config, tmp_path):
    """In a process of its own: what the compiler sets up in a process must not reach the other tests."""
    config = tiny_config.override(
        f"data.train={PICTURES}",
        *("data.global_batch_size=4", "data.num_workers=0", "opt.lpips_weight=0", "opt.mup_base_width=0"),
        *("trainer.activation_checkpointing=true", "trainer.checkpoint_keeps=products", "trainer.sample_every=0"),
        *("trainer.max_steps=2", "trainer.log_every=1", "trainer.enable_bfloat16=false", "trainer.tensorboard=false"),
    )
    Trainer(config, tmp_path / "eager", report=lambda line: None).train()
    settings = tmp_path / "settings.yaml"
    settings.write_text(config.override("trainer.compile=true").to_json())
    command = [sys.executable, "-m", "flowmo.train", "--config", settings, "--results-dir", tmp_path]
    command += ["--experiment-name", "compiled", "--device", "cpu"]
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("eager", "compiled")]
    eager, compiled = ([json.loads(line)["loss"] for line in each] for each in lines)
    assert compiled == pytest.approx(eager, rel=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@torch.no_grad()
def test_a_compiled_tokenizer_agrees(tiny_config, images):
    """Without guidance, which would compile the decoder for another batch."""
    torch.manual_seed(0)
    tokenizer = open_gates(FlowMo(tiny_config.override("model.enc_depth=1", "model.dec_depth=1"))).eval()
    ids = torch.randint(tokenizer.quantizer.id_count, (2, tokenizer.code_length, tokenizer.quantizer.sub_tokens))

    def results():
        return tokenizer.encoder(images[:1]), tokenizer.decode(ids, steps=3, guidance=1.0, rho=1.0)

    expected = results()
    tokenizer.compile()
    for found, tensor in zip(results(), expected, strict=True):
        torch.testing.assert_close(found, tensor, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(("network", "checkpointing"), [("double_stream", True), ("windowed", False)])
def test_compiled_blocks_never_fall_back_to_eager(tiny_config, compile_by, network, checkpointing):
    """Over a change of stages, image sizes and a short last batch; and once all is compiled, nothing is again."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_by(backend)
    config = tiny_config if network == "double_stream" else Config.from_dict(TINY_NATIVE)
    on = "trainer.compile=true", f"trainer.activation_checkpointing={str(checkpointing).lower()}"
    config = config.override(
        *on, "opt.lpips_weight=1", "model.posttrain_sample_k=2", "model.enc_depth=1", "model.dec_depth=2"
    )
    tokenizer = FlowMo(config)
    stages = [
        prepare(Stage(tokenizer, config.opt, distance), World(), config.trainer),
        Stage(FlowMo(config.override("model.posttrain_sample=true")), config.opt, distance),
    ]
    stages[1].tokenizer.load_state_dict(tokenizer.state_dict())
    prepare(stages[1], World(), config.trainer)

    def sequence() -> None:
        for stage, frozen in ((stages[0], False), (stages[0], True), (stages[1], True)):
            stage.tokenizer.encoder.requires_grad_(not frozen)
            for batch, height, width in ((4, 64, 64), (3, 64, 64), (4, 32, 64)):
                images = torch.rand(batch, 3, height, width) * 2 - 1
                draws = TrainingNoise.of(stage.tokenizer.config, images, range(batch))
                stage(images, draws, freeze_encoder=frozen).loss.backward()

    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        sequence()
        compiled = len(graphs)
        sequence()
    assert 0 < compiled == len(graphs) <= 30
