"""Every training command of the README of the authors' repository and its fork, as printed, made tiny.

What is put right in them: two line continuations that are missing, and "..." for a checkpoint's path.
"""

import json
import shlex
import shutil

import pytest
from conftest import TINY, WEIGHTS, write_language_model
from processes import command as flowmo_command
from processes import run_ranks
from test_checkpoint import release_file

from flowmo import Config, load
from flowmo.checkpoint.run_folder import listing
from flowmo.cli import main
from flowmo.data import build_index

LO_PRETRAIN = r"""
torchrun --nproc-per-node=8 -m flowmo.train \
    --experiment-name "flowmo_lo_pretrain" \
    model.context_dim=18 model.codebook_size_for_entropy=9 \
    trainer.max_steps=1300000
"""
LO_POSTTRAIN = r"""
torchrun --nproc-per-node=8 -m flowmo.train \
    --experiment-name "flowmo_lo_posttrain" \
    --resume-from-ckpt ... \
    model.context_dim=18 model.codebook_size_for_entropy=9 \
    trainer.max_steps=1325000 \
    opt.lr=0.00005 \
    data.batch_size=8 \
    opt.n_grad_acc=2 \
    model.posttrain_sample=true \
    opt.lpips_mode='resnet' \
    opt.lpips_weight=0.01 \
    trainer.log_every=100 \
    trainer.checkpoint_every=5000 \
    trainer.keep_every=5000 \

"""
HI_KL_PRETRAIN = r"""
torchrun --nproc-per-node=4 -m flowmo.train \
    --experiment-name "flowmo_hi_kl_pretrain" \
    model.context_dim=768 model.quantization_type=kl model.code_length=128 \
    trainer.max_steps=400000
"""
QWEN_PRETRAIN = r"""
torchrun -m flowmo.train \
    --experiment-name "flowmo_qwen2.5-coder-0.5b_pretrain" \
    --resume-from-ckpt "results/flowmo_qwen2.5-coder-0.5b_pretrain/checkpoints/00040000.pth" \
    model.context_dim=896 model.quantization_type=qwen2.5-coder-0.5b model.code_length=128 \
    trainer.max_steps=400000
"""
HI_PRETRAIN = r"""
torchrun --nproc-per-node=4 -m flowmo.train \
    --experiment-name "flowmo_hi_pretrain" \
    model.context_dim=56 model.codebook_size_for_entropy=14 \
    trainer.max_steps=400000
"""
HI_POSTTRAIN = LO_POSTTRAIN.replace("lo_posttrain", "hi_posttrain").replace("1325000", "825000")
HI_POSTTRAIN = HI_POSTTRAIN.replace("context_dim=18", "context_dim=56").replace("entropy=9", "entropy=14")
EVALUATE_AS_IT_GROWS = r"""
torchrun --nproc-per-node=1 -m flowmo.evaluate \
    --experiment-name flowmo_lo_prettrain_eval \
    eval.eval_dir=results/flowmo_lo_prettrain \
    eval.continuous=true \
    model.context_dim=18 model.codebook_size_for_entropy=9
"""
EVALUATE_LO = r"""
torchrun --nproc-per-node=1 -m flowmo.evaluate \
    --experiment-name "flowmo_lo_posttrain_eval" \
    eval.eval_dir=results/flowmo_lo_posttrain \
    eval.continuous=false \
    eval.force_ckpt_path='flowmo_lo.pth' \
    model.context_dim=18 model.codebook_size_for_entropy=9
"""
EVALUATE_HI = EVALUATE_LO.replace("flowmo_lo", "flowmo_hi").replace("=18", "=56").replace("=9", "=14")
SMALLER_MODEL = LO_PRETRAIN.replace("trainer.max_steps", "model.patch_size=8 model.mup_width=4 trainer.max_steps")


@pytest.fixture
def workspace(tmp_path, picture_files):
    """A working directory with the authors' tar and index, under the names that their settings have."""
    import tarfile

    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as tar:
        for file in picture_files[:4]:
            tar.add(file, f"n01440764_{file.name}")
    (tmp_path / "imagenet_train_index_overall.json").write_text(
        json.dumps(build_index(tmp_path / "ILSVRC2012_img_train.tar")[0])
    )
    return tmp_path


def make_tiny(steps, batch=2):
    """Overrides that leave every setting of a command's own as it is, but the length of the run and the widths."""
    shape = {name: TINY["model"][name] for name in ("enc_depth", "dec_depth")}
    return [
        *(f"model.{name}={value}" for name, value in shape.items()),
        *(f"model.{net}hidden_size=64" for net in ("", "enc_")),
        *(f"model.{net}num_heads=2" for net in ("", "enc_")),
        *("data.image_size=32", "data.num_workers=0"),
        *("trainer.tensorboard=false", "trainer.sample_every=0", f"data.global_batch_size={batch}"),
        "eval.sampling.sample_steps=2",
        f"trainer.max_steps={steps}",
        *([] if WEIGHTS.is_dir() else ["opt.lpips_weight=0"]),
    ]


@pytest.fixture
def run(workspace, monkeypatch, capsys):
    """Function that runs a command as a shell would read it, in this process or as two ranks."""
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("FLOWMO_WEIGHTS", str(WEIGHTS))

    def run(command, *tiny, resume=None, two_processes=False):
        words = shlex.split(command.replace("\\\n", " "))
        module = words.index("-m")
        assert words[0] == "torchrun"
        assert all(word.startswith("--nproc-per-node=") for word in words[1:module])
        rest = [str(resume) if word == "..." else word for word in words[module + 2 :]]
        rest += ["--device", "cpu", *tiny]
        if not two_processes:
            assert main([words[module + 1].removeprefix("flowmo."), *rest]) == 0, capsys.readouterr().err
            return capsys.readouterr().out
        run_ranks(flowmo_command, [words[module + 1].removeprefix("flowmo."), *rest], workspace / "printed")
        return (workspace / "printed").read_text()

    return run


def checkpoints(workspace, name):
    return listing(workspace / "results" / name / "checkpoints")


needs_weights = pytest.mark.skipif(not WEIGHTS.is_dir(), reason="needs trained perceptual networks (FLOWMO_WEIGHTS)")


@needs_weights
@pytest.mark.parametrize(
    ("size", "pretrain", "posttrain", "shares"),
    [
        ("lo", LO_PRETRAIN, LO_POSTTRAIN, "2 processes × 2 × 1"),  # opt.n_grad_acc=2
        ("hi", HI_PRETRAIN, HI_POSTTRAIN, "1 process × 2 × 2"),
    ],
)
def test_pretraining_then_posttraining(workspace, run, size, pretrain, posttrain, shares):
    out = run(pretrain, *make_tiny(2))
    assert "data.train=ILSVRC2012_img_train.tar data.train_index=imagenet_train_index_overall.json" in out
    assert "data.val=" not in out, "there is none"
    first = checkpoints(workspace, f"flowmo_{size}_pretrain")[-1]
    assert first.stem == "00000002"
    out = run(posttrain, *make_tiny(4, batch=4), resume=first, two_processes=size == "lo")
    assert shares in out
    assert "resnet50" in out
    last = checkpoints(workspace, f"flowmo_{size}_posttrain")[-1]
    assert last.stem == "00000004"
    config = load(last).config
    assert config.model.context_dim == (18 if size == "lo" else 56)
    assert (config.opt.lr, config.opt.lpips_weight, config.model.posttrain_sample_k) == (5e-5, 0.01, 8)
    assert config.trainer.keep_every == "5000 steps"


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (HI_KL_PRETRAIN, "flowmo_hi_kl_pretrain"),
        (SMALLER_MODEL, "flowmo_lo_pretrain"),
    ],
)
def test_other_pretraining(workspace, run, command, name):
    run(command, *make_tiny(1))
    tokenizer = load(checkpoints(workspace, name)[-1])
    if "kl" in name:
        assert (tokenizer.config.model.quantization_type, tokenizer.code_length) == ("kl", 128)
        assert tokenizer.config.model.context_dim == 768
    else:
        assert tokenizer.config.model.patch_size == 8


def evaluations(workspace, name):
    return [json.loads(line) for line in (workspace / "results" / name / "evaluations.jsonl").read_text().splitlines()]


@pytest.fixture
def held_out(workspace):
    """The authors' tar and index of held-out images in the working directory."""
    val = workspace / "ILSVRC2012_img_val.tar"
    shutil.copy(workspace / "ILSVRC2012_img_train.tar", val)
    (workspace / "imagenet_val_index_overall.json").write_text(json.dumps(build_index(val)[0]))


@pytest.mark.usefixtures("held_out")
def test_evaluation_of_a_run(workspace, run):
    """Both checkpoints, then the end of the run ends the evaluation."""
    tiny = [*make_tiny(2), "opt.lpips_weight=0"]
    pretrain = LO_PRETRAIN.replace("flowmo_lo_pretrain", "flowmo_lo_prettrain")
    run(pretrain, *tiny, "trainer.checkpoint_every=1")
    out = run(EVALUATE_AS_IT_GROWS, *tiny)
    assert "bits/pixel" in out
    rows = evaluations(workspace, "flowmo_lo_prettrain_eval")
    assert [row["checkpoint"] for row in rows] == ["00000001.pth", "00000002.pth"]
    assert rows == evaluations(workspace, "flowmo_lo_prettrain")
    assert {row["images"] for row in rows} == {4}


@pytest.mark.parametrize(("size", "command", "bits"), [("lo", EVALUATE_LO, 18), ("hi", EVALUATE_HI, 56)])
@pytest.mark.usefixtures("held_out")
def test_evaluation_of_a_named_checkpoint(workspace, run, size, command, bits):
    """A file of the authors' form, and half of the images."""
    widths = [f"model.{net}{name}" for net in ("", "enc_") for name in ("hidden_size=384", "num_heads=12")]
    tiny = [*make_tiny(1), *widths]
    groups = {18: 9, 56: 14}[bits]
    shape = [f"model.context_dim={bits}", f"model.codebook_size_for_entropy={groups}"]
    config = Config().override(*shape, *(word for word in tiny if word.startswith("model.")))
    release_file(workspace / f"flowmo_{size}.pth", config, scale=0.02)
    run(command, *tiny, "eval.subsample_rate=2")
    (row,) = evaluations(workspace, f"flowmo_{size}_posttrain_eval")
    assert row["checkpoint"] == f"flowmo_{size}.pth"
    assert row["images"] == 2
    assert row["bits_per_pixel"] == pytest.approx(256 * bits / 32**2)


def test_infill_pretraining(workspace, run):
    """The checkpoint that the command names is one of its own folder, so it is made first."""
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2}
    write_language_model(workspace / "qwen", hidden_size=896, intermediate_size=64, num_hidden_layers=1, **heads)
    tiny = make_tiny(1, batch=1)
    lines = QWEN_PRETRAIN.splitlines(keepends=True)
    fresh = "".join(line for line in lines if "--resume-from-ckpt" not in line)
    run(fresh, *tiny, "model.language_model=qwen")
    run(QWEN_PRETRAIN, *tiny, "trainer.max_steps=2", "model.language_model=qwen")
    assert checkpoints(workspace, "flowmo_qwen2.5-coder-0.5b_pretrain")[-1].stem == "00000002"


def test_the_authors_settings_are_the_defaults():
    """What the authors' base.yaml sets and ours means by the same names."""
    config = Config().override(
        *("global_seed=0", "model.enable_mup=True", "model.patch_size=4", "model.mup_width=6", "model.enc_mup_width=4"),
        *("model.fix_initial_norms=True", "model.quantization_type=lfq", "model.code_length=256"),
        *("model.context_dim=18", "model.codebook_size_for_entropy=9", "model.entropy_loss_weight=0.0025"),
        *("model.commit_loss_weight=0.000625", "model.enc_depth=8", "model.dec_depth=16", "model.enable_cfg=True"),
        *("model.ema_decay=0.9999", "model.posttrain_sample=False", "model.posttrain_sample_enable_cfg=False"),
        *("model.posttrain_sample_k=8", "opt.lr=1.0e-4", "opt.schedule=fat_lognormal", "opt.freeze_encoder=False"),
        *("opt.weight_decay=0.0", "opt.lpips_weight=0.1", "opt.lpips_mode=vgg", "opt.beta1=.9", "opt.beta2=.95"),
        *("trainer.enable_bfloat16=True", "eval.sampling.sample_steps=25", "eval.sampling.schedule=pow_0.25"),
        *("eval.sampling.cfg=1.5", "eval.sampling.cfg_interval=(.17,1.02)"),
    )
    assert config == Config()
