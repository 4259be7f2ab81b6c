"""Stage 2: tokens, the schedules of masking and unmasking, the network, sampling, likelihood, training."""

import dataclasses
import itertools
import json
import math
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import CLASSES, TINY_NATIVE, open_gates, run_command
from PIL import Image
from processes import command as flowmo_command
from processes import run_ranks
from safetensors import safe_open
from safetensors.torch import save_file
from several_runs import train_all
from test_train import HostReads

from flowmo import Config, FlowMo, load, save
from flowmo.checkpoint import CheckpointError
from flowmo.cli import main
from flowmo.config import ConfigError, preset
from flowmo.config.sections import MASK_SCHEDULES
from flowmo.data import DataError, open_source
from flowmo.data.bits import pack_ids, unpack_ids
from flowmo.data.tokens import TokenDataset, Vocabulary
from flowmo.generate.classes import class_titles, find_class, imagenet_names
from flowmo.generate.generator import (
    GenerationError,
    Generator,
    build_generator,
    load_generator,
    save_generator,
)
from flowmo.generate.samples import parse_positions, sample_images, write_samples
from flowmo.generate.schedules import expected_masked, halton_order, mask_ratio, masked_counts, random_mask
from flowmo.generate.tokenize import tokenize
from flowmo.images import resize_and_crop, to_tensor
from flowmo.train.cost import training_memory
from flowmo.train.generator import GeneratorNoise, GeneratorStage
from flowmo.train.trainer import Trainer, TrainingError

VOCABULARY = Vocabulary(
    tokenizer="00" * 8, model="tiny", image_size=32, tokens=6, sub_tokens=2, id_bits=4, classes=CLASSES
)
SMALL = (
    "generator.train=true",
    "generator.hidden_size=32",
    "generator.depth=2",
    "generator.num_heads=2",
    "generator.sample_steps=4",
)


def quiet(_):
    pass


@pytest.fixture
def tokenizer(tiny_config):
    torch.manual_seed(0)
    return open_gates(FlowMo(tiny_config)).eval()


@pytest.fixture
def generator():
    """Random weights large enough that logits, guidance and classes matter."""
    torch.manual_seed(0)
    fresh = Generator(Config().override(*SMALL), VOCABULARY)
    for parameter in fresh.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return fresh.eval()


# Tokens


@pytest.mark.parametrize("bits", [1, 4, 9, 14, 18])
def test_packed_ids_come_back(bits):
    ids = torch.randint(2**bits, (37,), generator=torch.Generator().manual_seed(bits)).numpy()
    packed = pack_ids(ids, bits)
    assert len(packed) == math.ceil(37 * bits / 8)
    assert (unpack_ids(packed, 37, bits) == ids).all()


def test_tokens_are_what_the_tokenizer_says(tokenizer, class_folder, tmp_path):
    """Ids and labels of every picture, plain and mirrored, in shards of four, the last one short."""
    source = open_source(class_folder)
    facts = tokenize(tokenizer, source, tmp_path / "out", flip=True, shard_size=5, batch_size=2)
    tokens = TokenDataset(tmp_path / "out", tokenizer.identity())
    assert (facts.count, facts.shards, len(tokens)) == (12, 3, 12)
    assert tokens.classes == CLASSES
    for index in range(12):
        image = to_tensor(resize_and_crop(source.read(index % 6), 32))[None]
        expected = tokenizer.encode(image if index < 6 else image.flip(-1)).ids[0]
        assert torch.equal(tokens.ids(index), expected)
        assert tokens.labels[index] == source.label(index % 6)
    record = math.ceil(12 * 4 / 8)
    assert (tmp_path / "out" / "tokens-00002.bin").stat().st_size == 34 + 2 * (record + 4) + 4


def test_random_crops_differ_and_repeat(tokenizer, class_folder, tmp_path):
    source = open_source(class_folder)
    for name in ("one", "two"):
        tokenize(tokenizer, source, tmp_path / name, crops=3, shard_size=100)
    one, two = TokenDataset(tmp_path / "one"), TokenDataset(tmp_path / "two")
    assert len(one) == 18
    assert all(torch.equal(one.ids(i), two.ids(i)) for i in range(18))
    assert any(not torch.equal(one.ids(i), one.ids(i + 6)) for i in range(6))


def test_an_interrupted_pass_goes_on(tokenizer, class_folder, tmp_path, monkeypatch):
    source, out = open_source(class_folder), tmp_path / "out"
    whole = tokenize(tokenizer, source, tmp_path / "whole", shard_size=2)
    encode, encoded = FlowMo.encode, []

    def failing(self, images):
        encoded.append(len(images))
        if len(encoded) == 2:
            raise KeyboardInterrupt
        return encode(self, images)

    monkeypatch.setattr(FlowMo, "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        tokenize(tokenizer, source, out, shard_size=2)
    with pytest.raises(DataError, match="not finished"):
        TokenDataset(out)
    assert tokenize(tokenizer, source, out, shard_size=2) == whole
    assert sum(encoded) == 2 + 2 + 4, "the finished shard is not made again"
    for number in range(3):
        name = whole.shard(number)[0]
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    damaged = out / whole.shard(1)[0]
    damaged.write_bytes(b"\0" * damaged.stat().st_size)
    tokenize(tokenizer, source, out, shard_size=2)
    assert damaged.read_bytes() == (tmp_path / "whole" / damaged.name).read_bytes()


def test_unreadable_pictures_are_passed_over(tokenizer, class_folder, tmp_path):
    (class_folder / CLASSES[0] / "000.jpg").write_bytes(b"no picture")
    tokenize(tokenizer, open_source(class_folder), tmp_path / "out")
    tokens = TokenDataset(tmp_path / "out")
    assert (tokens.metadata.count, len(tokens)) == (7, 6)
    assert tokens.labels.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("damage", ["byte", "truncated", "missing", "other tokenizer", "manifest", "another folder's"])
def test_damaged_tokens_are_refused(tokenizer, class_folder, tmp_path, damage):
    out = tmp_path / "out"
    tokenize(tokenizer, open_source(class_folder), out, shard_size=4)
    shard = out / "tokens-00001.bin"
    content = shard.read_bytes()
    wanted = None
    if damage == "byte":
        shard.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    elif damage == "truncated":
        shard.write_bytes(content[:-3])
    elif damage == "missing":
        shard.unlink()
    elif damage == "other tokenizer":
        wanted = "12" * 8
    elif damage == "manifest":
        (out / "tokens.json").write_text('{"flowmo_tokens": 1, "tokens": -3}')
    else:
        shutil.copy(out / "tokens-00000.bin", out / "keep")
        facts = json.loads((out / "tokens.json").read_text())
        facts["count"], facts["shard_size"] = 8, 4
        (out / "tokens.json").write_text(json.dumps(facts))
        (out / "keep").rename(shard)
    message = {
        "byte": "checksum",
        "truncated": r"has .* bytes instead of",
        "missing": "missing",
        "other tokenizer": "Each tokenizer needs its own tokens",
        "manifest": "not written by `flowmo tokenize`",
        "another folder's": "belongs to another tokenizer or folder",
    }[damage]
    with pytest.raises(DataError, match=message) as error:
        TokenDataset(out, wanted)
    assert "\n" not in str(error.value)


def test_a_folder_of_other_tokens_is_refused(tokenizer, class_folder, tmp_path):
    source = open_source(class_folder)
    tokenize(tokenizer, source, tmp_path / "out")
    with pytest.raises(DataError, match=r"holds other tokens .*crops 1, not 2"):
        tokenize(tokenizer, source, tmp_path / "out", crops=2)
    with pytest.raises(DataError, match="holds something else"):
        tokenize(tokenizer, source, class_folder)
    with pytest.raises(DataError, match=r"contains no tokens\.json"):
        TokenDataset(class_folder)


# Schedules


@pytest.mark.parametrize("schedule", MASK_SCHEDULES)
def test_the_mask_ratio_falls_from_one_to_nothing(schedule):
    share = mask_ratio(torch.linspace(0, 1, 101), schedule)
    assert share[0] == 1
    assert share[-1] == pytest.approx(0, abs=1e-6)
    assert (share.diff() < 0).all()


@pytest.mark.parametrize("schedule", MASK_SCHEDULES)
@pytest.mark.parametrize(("ids", "steps"), [(512, 64), (256, 1), (12, 12), (7, 20), (1, 3), (256, 255)])
def test_every_step_unmasks_until_nothing_is_masked(schedule, ids, steps):
    counts = [ids, *masked_counts(ids, steps, schedule)]
    assert counts[-1] == 0
    for before, after in itertools.pairwise(counts):
        assert after < before or before == 0
    with pytest.raises(ValueError, match="at least 1"):
        masked_counts(ids, 0, schedule)


def test_halton_order_spreads_any_first_part():
    order = halton_order(64, 4)
    assert sorted(order.tolist()) == list(range(256))
    quarters = Counter((order[:64] // 64).tolist())
    assert max(quarters.values()) - min(quarters.values()) <= 1
    assert set((order[:12] % 4).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("schedule", MASK_SCHEDULES)
def test_training_masks_as_the_schedule_says(schedule):
    """The mean share is the schedule's integral and half an id, which is rounded up; no position is preferred."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.stack([random_mask(64, generator, schedule) for _ in range(4000)]).double()
    integral = {"arccos": 2 / math.pi, "cosine": 2 / math.pi, "linear": 0.5}[schedule]
    assert mask_ratio(torch.linspace(0, 1, 10001), schedule).mean() == pytest.approx(integral, abs=1e-3)
    assert expected_masked(64, schedule) / 64 == pytest.approx(integral + 0.5 / 64, abs=1e-3)
    assert mask.mean() == pytest.approx(expected_masked(64, schedule) / 64, abs=0.015)
    assert mask.sum(dim=1).min() >= 1
    assert mask.mean(dim=0).std() < 0.02


@pytest.mark.parametrize("schedule", MASK_SCHEDULES)
@pytest.mark.parametrize("ids", [1, 2, 7])
def test_the_expected_number_of_masked_ids(ids, schedule):
    """Against every progress of a fine grid, of which ``random_mask`` draws one."""
    ratios = mask_ratio((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000, schedule)
    counts = (ratios * ids).ceil().clamp(min=1)
    assert expected_masked(ids, schedule) == pytest.approx(counts.mean().item(), abs=1e-3)


def test_masks_depend_on_the_position_alone():
    config = Config().override(*SMALL)
    whole = GeneratorNoise.of(config, 12, range(10), torch.device("cpu"))
    part = GeneratorNoise.of(config, 12, range(4, 7), torch.device("cpu"))
    assert torch.equal(part.mask, whole.mask[4:7])
    assert torch.equal(part.keep, whole.keep[4:7])
    many = GeneratorNoise.of(config, 2, range(3000), torch.device("cpu"))
    assert (~many.keep).double().mean() == pytest.approx(0.1, abs=0.02)


# Network


@pytest.mark.parametrize("bit_tokens", [False, True])
def test_masked_ids_are_not_seen(bit_tokens):
    torch.manual_seed(0)
    network = Generator(Config().override(*SMALL, f"generator.bit_tokens={bit_tokens}"), VOCABULARY).eval().network
    assert hasattr(network, "id_table") != bit_tokens
    ids = torch.randint(16, (2, 12))
    mask = torch.rand(2, 12) < 0.5
    labels = torch.tensor([0, 3])
    logits = network(ids, mask, labels)
    assert logits.shape == (2, 12, 16)
    assert torch.equal(network(torch.where(mask, 15 - ids, ids), mask, labels), logits)
    assert not torch.equal(network(torch.where(mask, ids, 15 - ids), mask, labels), logits)
    assert not torch.equal(network(ids, mask, labels.flip(0)), logits)


def test_the_papers_size():
    """Ours has the paper's width and depth: 28 blocks of 12 widths squared are 352 M. The paper's is in test_uvit."""
    with torch.device("meta"):
        vocabulary = Vocabulary(
            tokenizer="", model="", image_size=256, tokens=256, sub_tokens=2, id_bits=9, classes=("",) * 1000
        )
        generator = Generator(preset("maskgit"), vocabulary)
    assert 350e6 < sum(p.numel() for p in generator.parameters()) < 400e6


# Sampling


def test_guidance_of_one_is_none(generator):
    ids, mask = torch.randint(16, (2, 12)), torch.rand(2, 12) < 0.5
    labels = torch.tensor([0, 1])
    plain = generator.guided_logits(ids, mask, labels)
    null = generator.guided_logits(ids, mask, torch.tensor([3, 3]))
    torch.testing.assert_close(generator.guided_logits(ids, mask, labels, 1 + 1e-9), plain)
    torch.testing.assert_close(generator.guided_logits(ids, mask, labels, 3.0), null + 3 * (plain - null))
    one, other = (generator.sample([0, 1], guidance=value) for value in (1.0, 1 + 1e-9))
    assert torch.equal(one, other)


@pytest.mark.parametrize("order", ["confidence", "halton", "random"])
@pytest.mark.parametrize("steps", [1, 3, 12, 30])
def test_every_place_is_filled_once(generator, order, steps, monkeypatch):
    seen = []
    guided_logits = Generator.guided_logits

    def watched(self, ids, mask, *rest):
        seen.append((ids, mask))
        return guided_logits(self, ids, mask, *rest)

    monkeypatch.setattr(Generator, "guided_logits", watched)
    ids = generator.sample([0, 1, 2, -1], steps=steps, order=order)
    assert len(seen) == min(steps, 12), "no pass after the last id"
    assert seen[0][1].all()
    seen.append((ids.flatten(1), torch.zeros(4, 12, dtype=torch.bool)))
    for (before, masked), (after, still_masked) in itertools.pairwise(seen):
        assert not (still_masked & ~masked).any(), "nothing is masked again"
        assert torch.equal(after[~masked], before[~masked]), "nothing unmasked is changed"
    assert ids.shape == (4, 6, 2)
    assert ids.min() >= 0
    assert ids.max() < 16


def test_a_picture_depends_on_its_label_and_seed_alone(generator):
    ids = generator.sample([0, 1, 2, 0, 1], seeds=[5, 6, 7, 8, 9])
    assert torch.equal(generator.sample([2], seeds=[7])[0], ids[2])
    assert torch.equal(generator.sample([0, 1, 2, 0, 1], seeds=5), ids)
    assert torch.equal(generator.sample([1, 0, 1], seeds=[9, 8, 6]), ids[[4, 3, 1]])
    assert not torch.equal(ids[0], ids[3]), "another seed"
    strong = [generator.sample([label], seeds=[5], guidance=20.0) for label in (0, 1)]
    assert not torch.equal(*strong), "another class"


def test_sampling_follows_the_networks_probabilities(generator):
    """One step without guidance draws every id independently from its softmax."""
    mask = torch.ones(1, 12, dtype=torch.bool)
    shares = generator.guided_logits(torch.zeros(1, 12, dtype=torch.int64), mask, torch.tensor([1])).softmax(-1)[0, 3]
    settings = {"steps": 1, "guidance": 1.0, "temperature": 1.0, "last_temperature": 1.0}
    drawn = generator.sample([1] * 3000, seeds=0, **settings).flatten(1)[:, 3]
    counts = torch.bincount(drawn, minlength=16) / 3000
    assert (counts - shares).abs().max() < 4 * 0.5 / 3000**0.5


def test_temperature(generator):
    """Near zero every draw is the likeliest."""
    settings = {"steps": 1, "temperature": 1e-3, "last_temperature": 1e-3, "guidance": 1.0}
    ids = generator.sample([1] * 8, **settings).flatten(1)
    assert (ids == ids[0]).all()
    mask = torch.ones(1, 12, dtype=torch.bool)
    logits = generator.guided_logits(torch.zeros(1, 12, dtype=torch.int64), mask, torch.tensor([1]))
    assert torch.equal(ids[0], logits[0].argmax(dim=-1))


def test_kept_ids_stay(generator):
    start = generator.sample([0, 1], seeds=1)
    keep = torch.zeros(6, 2, dtype=torch.bool)
    keep[:3] = True
    edited = generator.sample([0, 1], seeds=50, ids=start, keep=keep)
    assert torch.equal(edited[:, :3], start[:, :3])
    assert not torch.equal(edited[:, 3:], start[:, 3:])
    assert torch.equal(generator.sample([0, 1], ids=start, keep=torch.ones(2, 6, 2, dtype=torch.bool)), start)


def test_progress(generator):
    seen = []
    generator.chunk_size = 2
    generator.sample([0, 1, 2], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 8) for i in range(1, 9)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: g.sample([7]), "Labels run from 0 to 2"),
        (lambda g: g.sample([]), "at least one"),
        (lambda g: g.sample([0], steps=0), "sample_steps=0 must be"),
        (lambda g: g.sample([0], temperature=0), "temperature=0.0 must be above 0"),
        (lambda g: g.sample([0], order="backwards"), "order='backwards' must be confidence"),
        (lambda g: g.sample([0, 1], seeds=[1]), "1 seeds for 2 images"),
        (lambda g: g.sample([0], ids=torch.zeros(1, 6, 2, dtype=torch.int64)), "together"),
        (lambda g: g.log_prob(torch.full((1, 6, 2), 16)), "from 0 to 15 as ids"),
        (lambda g: g.log_prob(torch.zeros(1, 6, 3, dtype=torch.int64)), "integers b × 6 × 2"),
    ],
)
def test_bad_arguments(generator, call, message):
    with pytest.raises((GenerationError, ConfigError), match=message):
        call(generator)


# Likelihood


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_probabilities_of_all_ids_add_up_to_one(steps):
    torch.manual_seed(0)
    small = Vocabulary(tokenizer="", model="", image_size=8, tokens=2, sub_tokens=2, id_bits=2, classes=("a",))
    generator = Generator(Config().override(*SMALL), small)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    every = torch.tensor(list(itertools.product(range(4), repeat=4))).view(-1, 2, 2)
    generator.eval().chunk_size = 64
    assert generator.log_prob(every, [0] * 256, steps).exp().sum() == pytest.approx(1, abs=1e-5)


def test_likelihood_step_by_step(generator):
    """As many steps as ids: the chain rule, one id at a time, in the order of the plan."""
    ids = torch.randint(16, (1, 6, 2))
    mask, total = torch.ones(1, 12, dtype=torch.bool), 0.0
    generator.requires_grad_(False)
    for place in halton_order(6, 2).tolist():
        logits = generator.guided_logits(ids.flatten(1), mask, torch.tensor([2]))
        total += float(logits[0, place].log_softmax(-1)[ids.flatten()[place]])
        mask[0, place] = False
    assert float(generator.log_prob(ids, [2], steps=12)) == pytest.approx(total, abs=1e-4)


# Classes


def test_classes_by_number_name_and_wordnet_id():
    assert len(imagenet_names()) == 1000
    assert list(imagenet_names()) == sorted(imagenet_names())
    for wanted in (0, "0", "n01440764", "tench", "Tinca tinca", "TENCH"):
        assert find_class(wanted, CLASSES) == 0
    assert find_class("parachute", CLASSES) == 2
    assert find_class("-1", CLASSES) == -1
    with pytest.raises(GenerationError, match=r"no class 'tensh'\. The nearest are tench"):
        find_class("tensh", CLASSES)
    with pytest.raises(GenerationError, match=r"no class 3\. Give an index from 0 to 2"):
        find_class(3, CLASSES)
    with pytest.raises(GenerationError, match=r"no class 'xqzv'\. The first are tench, English springer, parachute\.$"):
        find_class("xqzv", CLASSES)


@pytest.mark.parametrize("wanted", ["dog", "0", 0, 1, "-2"])
def test_a_generator_without_classes(wanted):
    generator = Generator(Config().override(*SMALL), dataclasses.replace(VOCABULARY, classes=()))
    assert generator.label(-1) == generator.label("-1") == -1
    with pytest.raises(GenerationError, match=r"has no classes\. Give -1, or leave out --class\.$"):
        generator.label(wanted)
    with pytest.raises(GenerationError, match="has no classes, so the only label is −1"):
        generator.sample([1])


@pytest.mark.parametrize("text", ["5-3", "²", "1²", "0-²", "", "-", "1-", "0,,1", "6", "0-6", "9" * 5000])
def test_positions_that_name_no_tokens(text):
    with pytest.raises(GenerationError, match="names no tokens"):
        parse_positions(text, 6)


def test_positions():
    assert parse_positions("0-2, 5,1,3-3", 6).tolist() == [True, True, True, True, False, True]


def test_a_set_keeps_the_sampling_settings_of_its_models(tokenizer, tmp_path):
    vocabulary = dataclasses.replace(VOCABULARY, tokenizer=tokenizer.identity())
    generator, other = (
        Generator(Config().override(*SMALL, *more), vocabulary) for more in ((), ("generator.guidance=9",))
    )
    other.load_state_dict(generator.state_dict())
    assert generator.identity() == other.identity()
    write_samples(generator, tokenizer, [0, 1], tmp_path / "set", {"seed": 0, "decode_steps": 1})
    with pytest.raises(GenerationError, match="holds other images"):
        write_samples(other, tokenizer, [0, 1], tmp_path / "set", {"seed": 0, "decode_steps": 1})


def test_an_interrupted_set_keeps_its_decoder(tokenizer, tiny_config, tmp_path):
    """Another decoder for the same ids has the same identity."""
    generator = Generator(Config().override(*SMALL), dataclasses.replace(VOCABULARY, tokenizer=tokenizer.identity()))
    other = FlowMo(tiny_config.override(f"model.base={tokenizer.as_base()}"))
    other.load_state_dict(tokenizer.state_dict())
    next(other.decoder.parameters()).data.add_(1)
    assert other.identity() == tokenizer.identity()
    settings = {"seed": 0, "decode_steps": 1}
    write_samples(generator, tokenizer, [0, 1], tmp_path / "set", settings)
    content = (tmp_path / "set" / "000001.png").read_bytes()
    (tmp_path / "set" / "000001.png").unlink()
    with pytest.raises(GenerationError, match="holds other images"):
        write_samples(generator, other, [0, 1], tmp_path / "set", settings)
    write_samples(generator, tokenizer, [0, 1], tmp_path / "set", settings)
    assert (tmp_path / "set" / "000001.png").read_bytes() == content


@pytest.mark.parametrize(
    ("wanted", "index"), [("10", 2), ("2", 1), ("1", 0), ("0", 0), (10, None), (0, 0), (2, 2), ("007", 3), ("7", None)]
)
def test_digits_are_a_name_if_there_is_one_else_an_index(wanted, index):
    names = ("1", "2", "10", "007")
    if index is None:
        with pytest.raises(GenerationError, match="no class"):
            find_class(wanted, names)
    else:
        assert find_class(wanted, names) == index


def test_titles_say_which_class_a_number_is():
    names = ("1", "2", "10", "cat", "n01440764")
    titles = class_titles(names)
    assert titles == ("1 (class 0)", "2 (class 1)", "10 (class 2)", "cat", "tench")
    assert [find_class(title, names) for title in titles] == [0, 1, 2, 3, 4]


def test_odd_digits_are_no_index():
    for text in ("²", "1" * 5000, "", "-", "1.0", "٣"):
        with pytest.raises(GenerationError, match="no class"):
            find_class(text, CLASSES)


def names_of_several():
    """Independent of our code: every name that the file gives to two classes, case aside."""
    owners = {}
    for wordnet, names in imagenet_names().items():
        for name in names.split(", "):
            owners.setdefault(name.lower(), set()).add(wordnet)
    return {name: ids for name, ids in owners.items() if len(ids) > 1}


def test_a_name_of_several_classes_is_asked_back():
    shared = names_of_several()
    assert {"crane", "cardigan", "panda", "horn", "harp", "maillot", "missile"} <= shared.keys()
    everything = tuple(imagenet_names())
    for name, ids in shared.items():
        for spelling in (name, name.title(), name.upper()):
            with pytest.raises(GenerationError, match="several classes") as error:
                find_class(spelling, everything)
            assert all(wordnet in str(error.value) for wordnet in ids), name
    for name in {n for names in imagenet_names().values() for n in names.split(", ")} - shared.keys():
        if name.lower() not in shared:
            assert name in imagenet_names()[everything[find_class(name, everything)]].split(", ")


def test_every_title_means_its_own_class():
    everything = tuple(imagenet_names())
    titles = class_titles(everything)
    assert len(set(titles)) == 1000
    assert {"crane (n02012849)", "crane (n03126707)", "harp (n03495258)", "tench"} <= set(titles)
    assert [find_class(title, everything) for title in titles] == list(range(1000))
    assert [find_class(name, everything) for name in everything] == list(range(1000))


@pytest.mark.parametrize(
    ("wanted", "present", "answer"),
    [
        ("harp", ("n03494278", "n01440764"), r"several classes: .*n03495258 \(harp\)\. The generator knows n03494278"),
        ("horn", ("n03394916",), r"n03394916 \(French horn\)"),
        ("panda", ("n02509815",), r"n02510455 \(giant panda\)"),
        ("French horn", ("n03394916",), 0),
        ("crane", ("n01440764", "n02012849"), 1),  # the only one, and called so
        ("crane", ("crane", "n02012849"), 0),  # a class's own name
        ("Crane", ("crane", "n02012849"), r"several classes: crane \(crane\), n02012849 \(crane\)"),
        ("CAT", ("cat", "Cat"), "The generator knows cat, Cat"),
        ("Cat", ("cat", "Cat"), 1),
        ("dog, big", ("dog, small", "dog, big"), 1),
        ("crane (n02012849)", ("n01440764", "n02012849"), 1),
        ("giant panda (n02510455)", ("n02510455", "n02509815"), 0),
        ("crane (n01440764)", ("n01440764", "n02012849"), "no class 'crane"),
        ("7", ("cat",), "from 0 to 0, or -1 for none"),
    ],
)
def test_names_in_a_generator_of_few_classes(wanted, present, answer):
    if isinstance(answer, int):
        assert find_class(wanted, present) == answer
    else:
        with pytest.raises(GenerationError, match=answer):
            find_class(wanted, present)


def test_generate_says_which_class_a_number_was(generator_of_numbers, tiny_model, tmp_path, capsys):
    words = ["generate", generator_of_numbers, "--model", tiny_model, "--per-class", "1", "--steps", "1"]
    status, out, err = run_command(capsys, *words, "--class", "10", "0", "--out", tmp_path / "a.png")
    assert (status, err) == (0, "")
    assert out.strip().endswith("10 (class 2), 1 (class 0)")
    status, out, _ = run_command(capsys, *words[:-4], "--count", "1", "--steps", "1", "--out", tmp_path / "c.png")
    assert out.strip().endswith("1 images, rows of 1: 1 (class 0)")
    status, out, _ = run_command(capsys, *words, "--out", tmp_path / "b.png", "--json")
    assert json.loads(out)["indices"] == [0, 1, 2]
    assert json.loads(out)["classes"] == ["1 (class 0)", "2 (class 1)", "10 (class 2)"]
    status, out, _ = run_command(capsys, *words, "--class", "10", "--out", tmp_path / "folder")
    assert out.strip().endswith("1 images of 1 classes: 10 (class 2)")


def test_generate_refuses_options_that_it_would_ignore(generator_of_numbers, tiny_model, tmp_path, capsys):
    words = ("generate", generator_of_numbers, "--model", tiny_model, "--output", tmp_path / "x.png", "--steps", 1)
    for more, message in ((("--keep", "0-1"), "--edit"), (("--count", 2, "--per-class", 3), "Write one of them")):
        status, _, error = run_command(capsys, *words, *more)
        assert (status, message in error) == (2, True)
    for more, message in (
        (("--order", "halton", "--choice-temperature", 2), "nothing in the order halton"),
        (("generator.order=random", "--choice-temperature", 2), "nothing in the order random"),
    ):
        status, _, error = run_command(capsys, *words, *more)
        assert (status, message in error) == (2, True), error


def test_a_generator_without_classes_takes_no_guidance(tiny_model, tiny, tmp_path, capsys):
    code = tiny.quantizer
    shape = {"image_size": 32, "tokens": tiny.code_length, "sub_tokens": code.sub_tokens}
    vocabulary = Vocabulary(
        tokenizer=tiny.identity(), model="", id_bits=(code.id_count - 1).bit_length(), classes=(), **shape
    )
    generator = Generator(Config().override(*SMALL), vocabulary).eval()
    sizes = []
    generator.network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    generator.sample([-1], 0, steps=2, guidance=3.0)
    assert set(sizes) == {4}, "one pass of a batch, none for the null class"
    save_generator(generator, tmp_path / "g.safetensors")
    words = ("generate", tmp_path / "g.safetensors", "--model", tiny_model, "--output", tmp_path / "x.png")
    status, _, error = run_command(capsys, *words, "--guidance", 2)
    assert (status, "--guidance changes nothing: this generator has no classes" in error) == (2, True), error


def test_no_pass_follows_the_last_id(generator):
    """Of more steps than ids, each sets one until none is left."""
    passes = []
    handle = generator.network.register_forward_pre_hook(lambda *_: passes.append(1))
    generator.sample([0], 0, steps=40)
    handle.remove()
    assert len(passes) == 12, "12 ids"


@pytest.mark.parametrize("steps", [0, 10**9])
def test_likelihood_takes_the_steps_that_sampling_takes(generator, steps):
    with pytest.raises(ConfigError, match=r"generator\.sample_steps"):
        generator.log_prob(torch.zeros(1, 6, 2, dtype=torch.int64), steps=steps)


def test_generate_passes_settings_on(generator_of_numbers, tiny_model, tmp_path, capsys):
    """The sampler's settings are of the tokenizer, those of the generator its own."""
    words = ("generate", generator_of_numbers, "--model", tiny_model, "--steps", 1, "--class", "1", "--force")
    images = []
    for setting in ("eval.sampling.sample_steps=1", "eval.sampling.sample_steps=3", "generator.guidance=9"):
        assert run_command(capsys, *words, "--output", tmp_path / "x.png", setting)[0] == 0
        images.append((tmp_path / "x.png").read_bytes())
    assert images[0] != images[1]


@pytest.fixture
def generator_of_numbers(tokenizer, tmp_path):
    vocabulary = dataclasses.replace(VOCABULARY, tokenizer=tokenizer.identity(), classes=("1", "2", "10"))
    save_generator(Generator(Config().override(*SMALL), vocabulary), tmp_path / "numbers.safetensors")
    return tmp_path / "numbers.safetensors"


# Training and the commands


@pytest.fixture
def tokens(tokenizer, class_folder, tmp_path):
    tokenize(tokenizer, open_source(class_folder), tmp_path / "tokens", model="tiny")
    return tmp_path / "tokens"


@pytest.fixture
def config(tokens):
    return preset("maskgit_nano").override(
        *SMALL,
        f"data.train={tokens}",
        "data.global_batch_size=6",
        "data.num_workers=0",
        "generator.dropout=0.1",
        "opt.warmup=0",
        "opt.cooldown=0",
        "trainer.duration=6 steps",
        "trainer.log_every=2 steps",
        "trainer.sample_every=0",
        "trainer.checkpoint_every=3 steps",
        "trainer.enable_bfloat16=false",
        "trainer.tensorboard=false",
    )


@pytest.fixture
def trained(config, tmp_path):
    """A generator that has learnt six pictures by heart, and their tokenizer, as files."""
    run = Trainer(
        config.override(
            "trainer.duration=250 steps",
            "trainer.checkpoint_every=250 steps",
            "trainer.log_every=50 steps",
            "generator.hidden_size=64",
            "generator.dropout=0",
            "generator.label_smoothing=0",
            "model.ema_decay=0.1",
            "opt.lr=3e-3",
        ),
        tmp_path / "learnt",
        report=quiet,
    )
    run.train()
    return run.checkpoints()[-1]


def final_weights(run):
    content = torch.load(run.checkpoints()[-1], weights_only=True)
    return {**content["model"], **{f"ema.{name}": value for name, value in content["ema"].items()}}


def test_a_generator_learns_its_pictures(trained, tokens):
    """Of two pictures a class it draws one or the other, and finds them likelier than those of another
    class, and far likelier than any ids."""
    generator = load_generator(trained)
    data = TokenDataset(tokens)
    known = torch.stack([data.ids(i) for i in range(6)])
    labels = data.labels.tolist()
    own = generator.log_prob(known, labels)
    assert own.mean() > generator.log_prob(known, [(label + 1) % 3 for label in labels]).mean() + 1
    assert (own > generator.log_prob(torch.randint(16, known.shape), labels) + 20).all()
    drawn = generator.sample(labels, guidance=2.0, temperature=0.5, last_temperature=0.3, choice_temperature=0.5)
    right = [
        max((ids == known[k]).double().mean() for k in (label * 2, label * 2 + 1))
        for ids, label in zip(drawn, labels, strict=True)
    ]
    assert sum(right) / 6 > 0.9, right


def test_the_loss_is_that_of_the_masked_ids(config):
    """By a plain loop in NumPy. Label smoothing shares a part of the target over all ids (Szegedy et al. 2016)."""
    config = config.override("generator.label_smoothing=0.2", "generator.dropout=0")
    stage = GeneratorStage(Generator(config, VOCABULARY))
    ids = torch.randint(2**VOCABULARY.id_bits, (3, VOCABULARY.ids))
    mask, labels = torch.rand(3, VOCABULARY.ids) < 0.4, torch.zeros(3, dtype=torch.int64)
    mask[0] = False
    loss = stage(ids, labels, mask)
    logits = stage.generator.network(ids, mask, labels).detach().double().numpy()
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    total = plain = right = 0.0
    for b, i in mask.nonzero().tolist():
        true = log_p[b, i, int(ids[b, i])]
        plain -= true
        total -= 0.8 * true + 0.2 * log_p[b, i].mean()
        right += int(logits[b, i].argmax()) == int(ids[b, i])
    expected = len(ids) * expected_masked(ids.shape[1], config.generator.schedule)
    assert float(loss.loss.detach()) == pytest.approx(total / expected, rel=1e-5)
    assert float(loss.parts["cross_entropy"]) == pytest.approx(plain / expected, rel=1e-5)
    assert float(loss.parts["accuracy"]) == pytest.approx(right / expected, rel=1e-5)


def test_a_step_asks_the_host_for_nothing(config, tmp_path, monkeypatch):
    run = Trainer(config, tmp_path / "run", report=quiet)
    batch = torch.stack([run.task.source.load(index, 0)[0] for index in range(run.plan.total)])
    draws = GeneratorNoise.of(config, VOCABULARY.ids, range(len(batch)), batch.device)
    monkeypatch.setattr(GeneratorNoise, "of", lambda *_: draws)
    run._step(batch, run.module)
    with HostReads() as reads:
        run._step(batch, run.module)
    assert not reads.found


def losses(run):
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([row["loss"] for row in rows if "loss" in row])


def test_passes_give_the_same_losses(config, tmp_path):
    """Dropout, whose numbers follow the cut, aside."""
    curves = []
    for most in (6, 3, 1):
        run = Trainer(
            config.override(f"data.max_microbatch={most}", "generator.dropout=0"), tmp_path / f"{most}", report=quiet
        )
        run.train()
        curves.append(losses(run))
    assert len(curves[0]) == 3
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(curves[2], curves[0], rtol=1e-4, atol=1e-5)


def test_two_processes_give_the_same_losses(config, tmp_path):
    """By DDP and by FSDP, and their checkpoints open."""
    config = config.override("generator.dropout=0")
    one = Trainer(config, tmp_path / "one", report=quiet)
    one.train()
    (tmp_path / "base.yaml").write_text(config.to_json())
    parallels = ("ddp", "fsdp")
    (tmp_path / "runs.json").write_text(json.dumps([(name, [f"trainer.parallel={name}"]) for name in parallels]))
    run_ranks(train_all, tmp_path / "base.yaml", tmp_path / "runs.json", tmp_path)
    ids = torch.zeros(1, 6, 2, dtype=torch.int64)
    expected = load_generator(one.checkpoints()[-1]).log_prob(ids)
    for name in parallels:
        two = Trainer(config, tmp_path / name, report=quiet)
        assert two.step == 6
        torch.testing.assert_close(losses(two), losses(one), rtol=2e-4, atol=2e-5)
        theirs = load_generator(two.checkpoints()[-1]).log_prob(ids)
        torch.testing.assert_close(theirs, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("change", [(), ("generator.bit_tokens=true", "data.max_microbatch=2")])
def test_resumed_run_ends_like_an_unbroken_one(config, tmp_path, change):
    config = config.override(*change)
    whole = Trainer(config, tmp_path / "whole", report=quiet)
    whole.train()
    Trainer(config.override("trainer.duration=3 steps"), tmp_path / "broken", report=quiet).train()
    rest = Trainer(config, tmp_path / "broken", report=quiet)
    assert rest.step == 3
    rest.train()
    expected = final_weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in final_weights(rest).items())


def test_held_out_tokens_judge_and_samples_are_shown(config, tokens, tokenizer, tmp_path, forecasts):
    save(tokenizer, tmp_path / "tiny.safetensors")
    lines = []
    named = [
        f"data.val={tokens}",
        "trainer.best_metric=cross_entropy",
        f"generator.tokenizer={tmp_path / 'tiny.safetensors'}",
    ]
    run = Trainer(config.override(*named, "trainer.sample_every=6 steps"), tmp_path / "run", report=lines.append)
    run.train()
    assert any("held-out cross_entropy" in line for line in lines)
    assert (run.folder / "samples" / "00000006.png").is_file()
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "cross_entropy", "accuracy", "flop_utilisation"} <= set().union(*rows)
    with pytest.raises(CheckpointError, match="holds a generator"):
        load(run.checkpoints()[-1])


def test_a_run_refuses_other_tokens(config, class_folder, tiny_config, tmp_path):
    run = Trainer(config.override("trainer.duration=1 steps"), tmp_path / "run", report=quiet)
    run.train()
    torch.manual_seed(1)
    other = FlowMo(tiny_config).eval()
    tokenize(other, open_source(class_folder), tmp_path / "others")
    with pytest.raises(TrainingError, match="was trained on ids of tokenizer"):
        Trainer(config.override(f"data.train={tmp_path / 'others'}"), tmp_path / "run", report=quiet)
    with pytest.raises(DataError, match="Each tokenizer needs its own tokens"):
        Trainer(config.override(f"data.val={tmp_path / 'others'}"), tmp_path / "another", report=quiet)
    save(other, tmp_path / "other.safetensors")
    with pytest.raises(TrainingError, match=r"generator\.tokenizer"):
        Trainer(
            config.override(f"generator.tokenizer={tmp_path / 'other.safetensors'}"), tmp_path / "third", report=quiet
        )
    with pytest.raises(TrainingError, match=r"generator\.depth 2 -> 3"):
        Trainer(config.override("generator.depth=3"), tmp_path / "run", report=quiet)


def other_classes(change, class_folder, tmp_path):
    """The class folder with a change to its classes, and how a message names it."""
    folder = tmp_path / "changed"
    shutil.copytree(class_folder, folder)
    if change == "renamed":
        (folder / CLASSES[1]).rename(folder / "n02102041")
        return folder, "class 1 is 'n02102041', not 'n02102040'"
    if change == "missing":
        shutil.rmtree(folder / CLASSES[2])
        return folder, "class 2, 'n03888257', is missing"
    if change == "first missing":
        shutil.rmtree(folder / CLASSES[0])
        return folder, "class 0 is 'n02102040', not 'n01440764'"
    if change == "new":
        shutil.copytree(folder / CLASSES[0], folder / "n09999999")
        return folder, "class 3, 'n09999999', is new"
    for path in folder.glob("*/*.jpg"):
        path.rename(folder / f"{path.parent.name} {path.name}")
    return folder, "class 0, 'n01440764', is missing"


@pytest.mark.parametrize("change", ["renamed", "missing", "first missing", "new", "none"])
def test_tokens_of_other_classes_are_refused(change, config, class_folder, tokenizer, tmp_path):
    """As held-out tokens, and where a run or its tokens go on."""
    folder, difference = other_classes(change, class_folder, tmp_path)
    tokenize(tokenizer, open_source(folder), tmp_path / "others", model="tiny")
    Trainer(config.override("trainer.duration=1 steps"), tmp_path / "run", report=quiet).train()
    for setting, run in ((f"data.val={tmp_path / 'others'}", "another"), (f"data.train={tmp_path / 'others'}", "run")):
        with pytest.raises(TrainingError, match="has other classes than") as error:
            Trainer(config.override(setting), tmp_path / run, report=quiet)
        assert difference in str(error.value)
    checkpoint = tmp_path / "run" / "checkpoints" / "00000001.pth"
    with pytest.raises(TrainingError, match="was trained on: class"):
        Trainer(
            config.override(f"data.train={tmp_path / 'others'}"),
            tmp_path / "fresh",
            resume_from=checkpoint,
            report=quiet,
        )
    with pytest.raises(DataError, match="holds other tokens") as error:
        tokenize(tokenizer, open_source(folder), tmp_path / "tokens", model="tiny")
    assert f"({difference[:7]}" in str(error.value)


def test_fine_tuning_a_generators_file(config, tokenizer, tmp_path, capsys):
    """A run from bare weights begins at step 0 with them as its EMA. Files that do not fit are refused."""
    first = Trainer(config.override("trainer.duration=2 steps"), tmp_path / "first", report=quiet)
    first.train()
    path, generator = tmp_path / "generator.safetensors", load_generator(first.checkpoints()[-1])
    save_generator(generator, path)
    lines, short = [], config.override("trainer.duration=1 steps")
    run = Trainer(short, tmp_path / "run", resume_from=path, report=lines.append)
    assert run.step == 0
    assert any(f"starts a new run from the weights of {path}" in line for line in lines)
    for name, value in generator.state_dict().items():
        assert torch.equal(run.task.model.state_dict()[name], value)
        assert torch.equal(run.ema.state[name], value)
    run.train()
    assert load_generator(run.checkpoints()[-1]).vocabulary == generator.vocabulary
    words = ["--resume-from-ckpt", path, "--results-dir", tmp_path, "--experiment-name", "typed", "--device", "cpu"]
    assert run_command(capsys, "train", *words, f"data.train={config.data.train}", "trainer.duration=1 step")[0] == 0
    assert load_generator(tmp_path / "typed").config.generator == generator.config.generator
    damaged = tmp_path / "damaged.safetensors"
    with safe_open(path, "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "config"}
    save_file(generator.state_dict(), damaged, metadata)
    status, _, error = run_command(capsys, "train", "--resume-from-ckpt", damaged, "data.train=x")
    assert (status, "damaged or no generator" in error) == (2, True)
    with pytest.raises(TrainingError, match=r"generator\.hidden_size \d+ -> 64"):
        Trainer(short.override("generator.hidden_size=64"), tmp_path / "wide", resume_from=path, report=quiet)
    save_generator(Generator(generator.config, dataclasses.replace(generator.vocabulary, tokenizer="other")), path)
    with pytest.raises(TrainingError, match="was trained on ids of tokenizer other"):
        Trainer(short, tmp_path / "other", resume_from=path, report=quiet)
    save(tokenizer, path)
    with pytest.raises(CheckpointError, match="holds no generator"):
        Trainer(short, tmp_path / "tokenizer", resume_from=path, report=quiet)


def test_files_of_generators(generator, tokenizer, tmp_path):
    path = tmp_path / "generator.safetensors"
    save_generator(generator, path)
    again = load_generator(path, "generator.sample_steps=3")
    assert again.vocabulary == VOCABULARY
    assert again.config.generator.sample_steps == 3
    assert torch.equal(again.sample([1], steps=4), generator.sample([1]))
    with pytest.raises(CheckpointError, match="no such generator"):
        load_generator(tmp_path / "none.safetensors")
    save(tokenizer, tmp_path / "tokenizer.safetensors")
    with pytest.raises(CheckpointError, match=r"tokenizer\.safetensors: The file holds no generator\."):
        load_generator(tmp_path / "tokenizer.safetensors")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="damaged"):
        load_generator(path)
    with pytest.raises(CheckpointError, match="another architecture"):
        build_generator(generator.config.override("generator.depth=3"), VOCABULARY, generator.state_dict())


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("generator.order=first", "halton"),
        ("generator.num_heads=3", "not divisible"),
        ("generator.label_drop=1", "below 1"),
        ("generator.temperature=0", "above 0"),
        ("trainer.best_metric=cross_entropy", "not a metric of a tokenizer"),
    ],
)
def test_settings_that_cannot_work(assignment, message):
    with pytest.raises(ConfigError, match=message):
        Config().override("data.val=x", assignment)


def command(*words):
    return main([str(word) for word in words])


def test_the_commands(class_folder, tokenizer, trained, tmp_path, capsys):
    """Tokenize, convert, then draw: a grid, a folder in two goes, an .npz, and an edited picture."""
    model = tmp_path / "tiny.safetensors"
    save(tokenizer, model)
    assert command("tokenize", class_folder, "--out", tmp_path / "cli", "--model", model, "--flip") == 0
    assert "12 samples, 3 classes, 12 ids of 4 bits" in capsys.readouterr().out
    generator = tmp_path / "generator.safetensors"
    assert command("convert", trained, generator) == 0
    base = ["generate", generator, "--model", model, "--seed", 3]
    out = tmp_path / "grid.png"
    assert command(*base, "--class", "tench", "2", "--per-class", 3, "--out", out) == 0
    assert "rows of 3: tench, parachute" in capsys.readouterr().out
    with Image.open(out) as picture:
        assert picture.size == (3 * 32 + 2 * 2, 2 * 32 + 2)
    folder, npz = tmp_path / "pictures", tmp_path / "pictures.npz"
    assert command(*base, "--count", 5, "--out", folder) == 0
    assert json.loads((folder / "samples.json").read_text())["labels"] == [0, 1, 2, 0, 1], "every class's turn"
    files = sorted(folder.glob("*.png"))
    contents = [file.read_bytes() for file in files]
    files[2].unlink()
    assert command(*base, "--count", 5, "--out", folder) == 0
    assert [file.read_bytes() for file in files] == contents, "the one that was missing, and the same"
    assert command(*base, "--count", 5, "--out", npz) == 0
    pictures = np.load(npz)["arr_0"]
    assert pictures.shape == (5, 32, 32, 3)
    with Image.open(files[2]) as picture:
        assert (pictures[2] == np.asarray(picture)).all()
    assert command(*base, "--count", 6, "--out", folder) == 2
    assert "holds other images" in capsys.readouterr().err
    picture = next(class_folder.rglob("*.jpg"))
    assert (
        command(*base, "--class", 0, "--count", 2, "--edit", picture, "--keep", "0-3,5", "--out", out, "--force") == 0
    )
    for words, message in (
        (["--class", "tensh"], "The nearest are tench"),
        (["--edit", picture, "--keep", "4-9"], "names no tokens"),
        (["--count", 5000], "too many for one"),
    ):
        assert command(*base, "--out", out, *words, "--force") == 2
        assert message in capsys.readouterr().err
    words = [*base, "--count", 5, "--out", tmp_path / "by_two.npz"]
    run_ranks(flowmo_command, [str(word) for word in words], tmp_path / "printed")
    assert (np.load(tmp_path / "by_two.npz")["arr_0"] == pictures).all(), "the same pictures from two processes"
    assert command("generate", generator, "--model", "nano") == 2
    assert "Name the right one with --model" in capsys.readouterr().err
    assert command("info", "maskgit", "--json") == 0
    assert json.loads(capsys.readouterr().out)["blocks"] == 28
    assert command("info", generator, "--json", "generator.sample_steps=3") == 0
    told, trained = json.loads(capsys.readouterr().out), load_generator(generator)
    assert told["parameters"] == sum(p.numel() for p in trained.parameters())
    assert (told["tokenizer"], told["sampling_steps"]) == (trained.vocabulary.tokenizer, 3)
    assert command("info", generator, "generator.hidden_size=12") == 2
    assert "holds weights of another architecture" in capsys.readouterr().err


def test_a_tokenizer_of_native_size_decodes_at_the_size_of_the_tokens(class_folder, tmp_path):
    """Its identity is the same at every size: the ids of another size are refused, and images have the tokens' size."""
    torch.manual_seed(0)
    tokenizer = open_gates(FlowMo(Config.from_dict(TINY_NATIVE))).eval()
    other = load_resized(tokenizer, 32)
    assert other.identity() == tokenizer.identity()
    for name, model in (("small", other), ("large", tokenizer)):
        tokenize(model, open_source(class_folder), tmp_path / name, model="native")
    save(tokenizer, tmp_path / "native.safetensors")
    config = preset("maskgit_nano").override(*SMALL, f"data.train={tmp_path / 'small'}", "data.global_batch_size=2")
    config = config.override("data.num_workers=0", "trainer.duration=2 steps", "trainer.sample_every=1 step")
    config = config.override(f"generator.tokenizer={tmp_path / 'native.safetensors'}", "trainer.tensorboard=false")
    run = Trainer(config, tmp_path / "run", report=quiet)
    run.train()
    assert list((tmp_path / "run" / "samples").glob("*.png"))
    generator = load_generator(run.checkpoints()[-1])
    assert sample_images(generator, tokenizer, [0, 1], [0, 1], decode_steps=1).shape == (2, 3, 32, 32)
    with pytest.raises(TrainingError, match=r"ids an image of 64 pixels, .*ids an image of 32 pixels"):
        Trainer(config.override(f"data.val={tmp_path / 'large'}"), tmp_path / "other", report=quiet)
    with pytest.raises(TrainingError, match=r"was trained on .* of 32 pixels, .* of 64 pixels"):
        Trainer(config.override(f"data.train={tmp_path / 'large'}"), tmp_path / "run", report=quiet)


def load_resized(tokenizer, side):
    resized = FlowMo(tokenizer.config.override(f"data.image_size={side}", f"model.code_length={(side // 16) ** 2}"))
    resized.load_state_dict(tokenizer.state_dict())
    return resized.eval()


def test_the_loss_leaves_out_ids_that_do_not_exist():
    """Of 11 ids, which take 4 bits, the network's other five logits count neither in the loss nor in its metric."""
    torch.manual_seed(0)
    generator = Generator(Config().override(*SMALL), dataclasses.replace(VOCABULARY, id_count=11)).eval()
    ids, mask = torch.randint(11, (3, 12)), torch.rand(3, 12) < 0.5
    labels = torch.zeros(3, dtype=torch.int64)
    loss = GeneratorStage(generator)(ids, labels, mask)
    logits = generator.network(ids, mask, labels)[..., :11]
    masked = 3 * expected_masked(12, generator.config.generator.schedule)
    smoothing = generator.config.generator.label_smoothing
    log_p = logits.log_softmax(-1)
    own = log_p.gather(-1, ids[..., None])[..., 0]
    expected = -((1 - smoothing) * own + smoothing * log_p.mean(-1))[mask].sum() / masked
    assert smoothing > 0
    assert loss.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_memory_forecast_counts_the_loss():
    """Logits of 2^12 ids outweigh a network of width 32."""
    config = preset("maskgit_nano").override(*SMALL, "trainer.enable_bfloat16=false")
    many = dataclasses.replace(VOCABULARY, id_bits=12)
    logits = many.ids * 4096 * 4  # bytes of float32
    assert training_memory(config, vocabulary=many).activation_bytes > 3 * logits


def test_editing_at_the_size_of_the_tokens(class_folder, tmp_path, capsys):
    torch.manual_seed(0)
    tokenizer = FlowMo(Config.from_dict(TINY_NATIVE)).eval()
    save(tokenizer, tmp_path / "native.safetensors")
    vocabulary = Vocabulary(
        tokenizer=tokenizer.identity(),
        model="native",
        image_size=32,
        tokens=4,
        sub_tokens=4,
        id_bits=9,
        classes=CLASSES,
    )
    save_generator(Generator(Config().override(*SMALL), vocabulary), tmp_path / "generator.safetensors")
    image = next((class_folder / CLASSES[0]).iterdir())
    words = ["generate", tmp_path / "generator.safetensors", "--model", tmp_path / "native.safetensors", "--class", "0"]
    words += ["--per-class", 1, "--edit", image, "--keep", "0-1", "--output", tmp_path / "edited.PNG"]
    status, _, error = run_command(capsys, *words)
    assert (status, error) == (0, "")
    with Image.open(tmp_path / "edited.PNG") as edited:
        assert edited.size == (32, 32)


def test_arguments_of_sampling(generator):
    """Settings that change nothing are refused; NumPy's numbers are numbers."""
    for words in ({"hidden_size": 64}, {"dropout": 0.9}, {"sample_steps": 3}):
        with pytest.raises(GenerationError, match=f"no setting '{next(iter(words))}'"):
            generator.sample([0], **words)
    assert torch.equal(generator.sample([0, 1], np.int64(5)), generator.sample([0, 1], [5, 6]))
    assert generator.label(np.int64(1)) == 1
    with pytest.raises(GenerationError, match=r"1\.0 is no class"):
        generator.label(1.0)


def test_the_papers_length_does_not_grow_with_mirrored_images():
    for name in ("uvit", "maskgit"):
        assert preset(name).trainer.duration.images(128, 2 * 1_281_167) == 384_000_000
