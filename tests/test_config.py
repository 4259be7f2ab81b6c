import math
import re
from operator import attrgetter
from typing import get_type_hints

import pytest
from conftest import ROOT

from flowmo import Config, ConfigError, preset
from flowmo.config import FIELDS, PRESETS
from flowmo.config.fields import Duration
from flowmo.model.flow import DISTRIBUTIONS


def test_every_setting_is_documented():
    assert all(field.metadata.get("doc") for field in FIELDS.values())


def test_the_type_of_a_setting_is_that_of_its_default():
    for name, field in FIELDS.items():
        section, _, last = name.rpartition(".")
        assert type(field.default) is get_type_hints(type(attrgetter(section)(Config())))[last], name


def test_the_settings_know_no_networks():
    for file in (ROOT / "src" / "flowmo" / "config").glob("*.py"):
        modules = re.findall(r"^ *from (flowmo\.\w+)", file.read_text(), re.MULTILINE)
        assert set(modules) <= {"flowmo.config", "flowmo.errors"}, file
    assert FIELDS["opt.schedule"].metadata["allowed"].choices == tuple(DISTRIBUTIONS)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_a_round_trip(name):
    config = preset(name)
    assert Config.from_dict(config.to_dict()) == config


def test_the_papers_rates():
    assert preset("lo").bits_per_pixel == pytest.approx(0.0703, abs=1e-4)
    assert preset("hi").bits_per_pixel == pytest.approx(0.2188, abs=1e-4)
    assert preset("nano").bits_per_image == 288 * 8


def test_overrides_convert_where_nothing_is_lost():
    config = preset("lo").override("opt.lr=0.00005", "opt.beta1=.8", "trainer.max_steps=1e3", "opt.lpips_mode='alex'")
    assert (config.opt.lr, config.opt.beta1, config.trainer.duration) == (5e-5, 0.8, "1000 steps")
    assert config.opt.lpips_mode == "alex"
    assert config.override("opt.lr=1e-4").opt.lr == 1e-4
    assert preset("lo").opt.lr == 1e-4, "the original must not change"


def test_the_authors_spellings():
    config = Config().override(
        "model.mup_width=4",
        "model.enc_mup_width=2",
        "eval.sampling.schedule=pow_0.25",
        "eval.sampling.cfg=1.5",
        "eval.sampling.cfg_interval=(.17,1.02)",
    )
    assert (config.model.hidden_size, config.model.enc_hidden_size, config.model.num_heads) == (768, 384, 12)
    assert config.eval.sampling.rho == 4.0
    assert (config.eval.sampling.guidance_low, config.eval.sampling.guidance_high) == pytest.approx(
        (0.1453, 0.505), abs=1e-4
    )
    assert config.eval == Config().eval, "the defaults are the paper's"
    assert Config().override("eval.sampling.schedule=linear").eval.sampling.rho == 1.0
    everywhere = Config().override("eval.sampling.cfg_interval=null").eval.sampling
    assert (everywhere.guidance_low, everywhere.guidance_high) == (0, 1)


def test_the_batch_of_a_process_replaces_the_batch_of_all():
    """The authors' stage 1B, after a checkpoint of ours whose recipe has a batch of 128."""
    recipe = Config().override("data.global_batch_size=128")
    assert recipe.override("data.batch_size=8").data == Config().override("data.batch_size=8").data
    both = recipe.override("data.batch_size=8", "data.global_batch_size=32")
    assert both.data.global_batch_size == 32
    assert Config.from_dict(both.to_dict()) == both, "as saved in a checkpoint"
    assert recipe.override("data.batch_size=0").data.global_batch_size == 128


def test_yaml(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: small\nopt:\n  lr: 3e-4\nmodel:\n  mup_width: 2\n")
    config = Config.from_yaml(file)
    assert (config.opt.lr, config.model.patch_size, config.model.hidden_size) == (3e-4, 8, 384)


REFUSED = {
    "model.paths_size=7": "Did you mean 'model.patch_size'",
    "lr=1": "Did you mean 'opt.lr'",
    "opt.patch_size=4": "Did you mean 'model.patch_size'",
    "opt.lr": "section.name=value",
    "opt.lr=fast": "a finite number",
    "opt.lr=nan": "a finite number",
    "opt.lr=0": "above 0",
    "opt.beta1=1": "at least 0 and below 1",
    "model.dec_depth=2.5": "a whole number",
    "model.dec_depth=true": "a whole number",
    "model.dec_depth=0": "at least 1",
    "model.enable_cfg=3": "true or false",
    "model.hidden_size=1000": "model.hidden_size=1152",
    "model.hidden_size=576": "model.hidden_size=768",
    "model.patch_size=7": "data.image_size=252",
    "model.context_dim=19": "Write model.context_dim=18",
    "model.quantization_type=vqq": "lfq or fsq or bsq or vq or kl or layernorm",
    "model.mup_width=wide": "model.mup_width='wide'",
    "opt.schedule=cosine": "fat_lognormal",
    "eval.sampling.rho=0": "above 0",
    "eval.sampling.guidance_low=0.9": "not an interval",
    "eval.sampling.cfg_interval=(a": "cfg_interval",
    "trainer.seed=-1": "between 0 and",
}


@pytest.mark.parametrize("assignment", REFUSED)
def test_refused_with_advice(assignment):
    with pytest.raises(ConfigError, match=REFUSED[assignment].replace("(", r"\(").replace("^", r"\^")):
        preset("lo").override(assignment)


def test_jitter_fits_into_the_smallest_crop():
    base = preset("lo").override("data.crop_sizes=64x64 256x128")
    assert base.override("opt.lpips_jitter=32").opt.lpips_jitter == 32
    with pytest.raises(ConfigError, match="from 0 to half of the crops' side, 64"):
        base.override("opt.lpips_jitter=33")


def test_advice_for_widths_works():
    for width in (100, 576, 1000, 300):
        with pytest.raises(ConfigError) as error:
            preset("lo").override(f"model.hidden_size={width}")
        for advice in str(error.value).partition("Write ")[2].rstrip(".").split(" or "):
            preset("lo").override(advice)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- a\n- b\n", "contains no settings"),
        ("model: [1", "Cannot read"),
        ("!!python/object/apply:os.system ['true']", "contains no settings"),
        ("model:\n  paths: 1\n", "no setting 'model.paths'"),
        ("modle:\n  patch_size: 4\n", "no section 'modle'"),
        ("preset: huge\n", "no preset 'huge'"),
        ("[" * 5000, "more than 8 deep"),  # to its end, the parser takes ten seconds
        ("x: " + "a" * (1 << 20), "bytes"),
        ("a: &a [x]\nb: [*a, *a]", "alias"),
    ],
)
def test_yaml_refused(tmp_path, text, sentence):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        Config.from_yaml(file)


@pytest.mark.parametrize("value", ["null", "~", "", "''"])
def test_no_value_of_yaml_is_empty_text(tmp_path, value):
    """In a setting that is empty by default. Others have a word of their own, or must have one."""
    file = tmp_path / "settings.yaml"
    file.write_text(f"data:\n  train: {value}\ntrainer:\n  best_metric: {value}\ngenerator:\n  guided_from: null\n")
    assert Config.from_yaml(file) == Config()
    assert Config.from_dict({"data": {"train": None}}).data.train == ""
    assert Config().override(f"data.train={value}").data.train == ""
    file.write_text(f"model:\n  network: {value}\n")
    with pytest.raises(ConfigError, match="must be double_stream or windowed"):
        Config.from_yaml(file)


def test_yaml_missing(tmp_path):
    with pytest.raises(ConfigError, match="Cannot read"):
        Config.from_yaml(tmp_path / "none.yaml")


def test_the_default_sampling_is_finite():
    assert all(math.isfinite(v) for v in vars(Config().eval.sampling).values() if not isinstance(v, str))


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_recipes_are_settings(file):
    """Each loads without naming images, and begins with its purpose and its cost."""
    config = Config.from_yaml(file)
    assert config.trainer.duration.amount > 0
    text = file.read_text()
    assert text.startswith("# ")
    assert re.search("flowmo train|flowmo.train|runs/", text.partition("\npreset:")[0])


def test_nested_dropout_needs_levels_without_0():
    """An odd number has one, which would equal a sub-token that was not sent."""
    native = preset("native")
    assert native.override("model.fsq_levels=4").model.fsq_levels == 4
    with pytest.raises(ConfigError, match=r"model\.fsq_levels=5 has a level 0"):
        native.override("model.fsq_levels=5")


def test_files_of_earlier_versions_are_read():
    former = {
        "model": {"prediction": "picture"},
        "opt": {"loss_space": "picture", "distill_towards": "picture"},
        "eval": {"pictures": 3},
    }
    config = Config.from_dict(former)
    assert (config.model.prediction, config.opt.loss_space, config.opt.distill_towards) == ("image",) * 3
    assert config.eval.images == 3
    assert Config.from_dict(config.to_dict()) == config
    assert Config.from_dict({"data": {"train": "picture"}}).data.train == "picture"


def test_settings_go_through_json_and_yaml_unchanged(tmp_path):
    """Characters beyond 16 bits, which JSON writes as two, names that are not UTF-8, and short periods."""
    words = ("data.train=/data/😀 é/x", "data.val=/data/\udce9", "trainer.log_every=0.00005 epochs")
    config = Config().override(*words)
    (tmp_path / "config.json").write_text(config.to_json())
    assert Config.from_yaml(tmp_path / "config.json") == config
    assert config.trainer.log_every.images(1, 10**6) == 50
    assert Duration("1e+3 steps") == Duration("1000")
    with pytest.raises(ValueError, match="'30s' is not a length"):
        Duration("30s")
