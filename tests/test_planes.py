""".flowmo files of native size: planes whose prefix is a coarser image, and the context models that code them."""

import json
import random
import re
import sys
import tracemalloc
import warnings
from binascii import crc_hqx
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_NATIVE, run_command
from PIL import Image
from test_codec import peaked

from flowmo import Config, FlowMo, save
from flowmo.codec import file as codec
from flowmo.codec import range_coder
from flowmo.codec.context import ContextError, ContextModel
from flowmo.codec.file import Codec, CodecError, MissingPlanes
from flowmo.codec.planes import LARGEST_ACTIVATION, PlaneModel, activation, product
from flowmo.data.bits import token_bits
from flowmo.tokenizer import Codes

sys.path.insert(0, str(ROOT / "runs"))
import context_planes as fit_planes
import fit_context
from context_tokens import ideal_code_length

S, D, B = 4, 3, 3
"""Planes, digits of an id and bits of a digit of the tokenizer below."""
ORDER = np.array([[0, 2], [3, 1]])
NEIGHBOURS = tuple((down, right) for down in (-1, 0, 1) for right in (-1, 0, 1))


def random_codes(height: int, width: int, seed: int = 0, planes: int = S) -> Codes:
    rows, columns = -(-height // 16), -(-width // 16)
    ids = torch.randint(0, 512, (1, rows * columns, planes), generator=torch.Generator().manual_seed(seed))
    return Codes(ids, (16 * rows, 16 * columns), 512, image_size=(height, width))


def random_model(tokenizer: FlowMo, seed: int = 0, hidden: int = 5, scale: int = 3000, **changes) -> PlaneModel:
    rng, k, nodes = np.random.default_rng(seed), len(NEIGHBOURS), (1 << B) - 1
    shapes = {"start": (S, hidden), "around": (S, k * S * D, hidden), "middle": (S, hidden, hidden)}
    shapes |= {"middle_start": (S, hidden), "digits": (S, S * D, nodes + 1, hidden)}
    shapes |= {"readout": (S, D, hidden, nodes), "bias": (S, D, nodes)}
    arrays = {name: rng.integers(-scale, scale, shape) for name, shape in shapes.items()}
    return PlaneModel(tokenizer.identity(), NEIGHBOURS, **{"order": ORDER, **arrays, **changes})


def low_model(tokenizer: FlowMo) -> PlaneModel:
    """It expects the digit 0 everywhere."""
    shapes = {"start": (S, 0), "around": (S, 9 * S * D, 0), "middle": (S, 0, 0), "middle_start": (S, 0)}
    shapes |= {"digits": (S, S * D, 8, 0), "readout": (S, D, 0, 7)}
    arrays = {name: np.zeros(shape, np.int64) for name, shape in shapes.items()}
    return PlaneModel(tokenizer.identity(), NEIGHBOURS, ORDER, bias=np.full((S, D, 7), -700), **arrays)


@pytest.fixture(params=["packed", "coded"])
def written(request, native) -> tuple[Codec, bytes, Codes]:
    """A codec, a file that it wrote, and the codes in it."""
    codes = random_codes(40, 70)
    if request.param == "packed":
        return Codec(native), Codec(native).pack(codes), codes
    pytest.importorskip("constriction")
    ours = Codec(native, low_model(native))
    codes = replace(codes, ids=codes.ids * (codes.ids % 10 == 0))
    return ours, ours.pack(codes), codes


def silent(ours: Codec, content: bytes) -> tuple[Codes, list[MissingPlanes]]:
    told: list[MissingPlanes] = []
    return ours.unpack(content, on_missing=told.append), told


def ends_of_planes(ours: Codec, content: bytes) -> list[int]:
    """Where the header and each plane end."""
    coded = content[3] >> 4
    place = 4 + 4 + 2
    planes = content[place]
    place += 1 + 2 * coded + 2
    ends = [place]
    for _ in range(planes):
        length = 17  # 15 cells of 9 bits
        if coded:
            reader = codec.Reader(content, place)
            length, place = reader.varint(), reader.position
        place += length + 2
        ends.append(place)
    assert ends[-1] == len(content)
    return ends


def test_round_trip_keeps_every_id(written):
    ours, content, codes = written
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = ours.unpack(content)
    assert torch.equal(again.ids, codes.ids)
    assert (again.size, again.image_size, again.id_count) == (codes.size, (40, 70), 512)
    assert content[3] & 15 == 3
    packed = 4 + 4 + 2 + 1 + 2 + S * (17 + 2)
    assert len(content) == packed if content[3] >> 4 == codec.PACKED else len(content) < packed - 15


def test_every_prefix_is_a_coarser_image_or_refused(written):
    ours, content, codes = written
    ends = ends_of_planes(ours, content)
    for length in range(len(content)):
        planes = sum(end <= length for end in ends) - 1
        if planes < 1:
            with pytest.raises(CodecError) as refused:
                ours.unpack(content[:length])
            assert "\n" not in str(refused.value)
            continue
        again, (missing,) = silent(ours, content[:length])
        assert torch.equal(again.ids, codes.ids[..., :planes])
        assert (missing.planes, missing.total) == (planes, S)
        assert "\n" not in str(missing)


def test_a_prefix_of_whole_planes_is_what_coarser_codes_hold(written):
    ours, _, codes = written
    for planes in range(1, S + 1):
        coarse, told = silent(ours, ours.pack(codes.coarser(planes)))
        assert not told
        assert torch.equal(coarse.ids, codes.ids[..., :planes])


def test_every_change_of_a_byte_is_noticed(written):
    """It costs the planes from there on; in the header or the first plane it costs the file."""
    ours, content, codes = written
    ends = ends_of_planes(ours, content)
    for place in range(len(content)):
        before = sum(end <= place for end in ends) - 1
        for change in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            damaged = bytearray(content)
            damaged[place] ^= change
            if before < 1:
                with pytest.raises(CodecError) as refused:
                    ours.unpack(bytes(damaged))
                assert "\n" not in str(refused.value)
                continue
            again, (missing,) = silent(ours, bytes(damaged))
            assert missing.planes == before
            assert torch.equal(again.ids, codes.ids[..., :before])


def test_bytes_behind_the_last_plane_are_refused(written):
    ours, content, _ = written
    for tail in (b"\0", b"\xff", content):
        with pytest.raises(CodecError, match="follow its last plane"):
            ours.unpack(content + tail)


def test_planes_cannot_change_places(native):
    """Each checksum continues the one before, so planes of one file do not pass for others."""
    ours = Codec(native)
    content = ours.pack(random_codes(40, 70))
    _, one, two, three, _ = ends_of_planes(ours, content)
    swapped = content[:one] + content[two:three] + content[one:two] + content[three:]
    assert silent(ours, swapped)[1][0].planes == 1


def test_missing_planes_are_a_warning_by_default(native):
    content = Codec(native).pack(random_codes(40, 70))
    with pytest.warns(MissingPlanes, match=r"it ends early\. The image is coarser, from 3 of 4 planes"):
        assert Codec(native).unpack(content[:-1]).ids.shape == (1, 15, 3)


def test_a_model_of_one_rate_needs_all_planes(native):
    one_rate = FlowMo(Config.from_dict(TINY_NATIVE).override("model.nested_dropout=0"))
    content = Codec(one_rate).pack(random_codes(40, 70))
    assert Codec(one_rate).unpack(content).ids.shape == (1, 15, 4)
    with pytest.raises(CodecError, match="ends early"):
        Codec(one_rate).unpack(content[:-1])
    with pytest.raises(CodecError, match="not of one image of this tokenizer"):
        Codec(one_rate).pack(random_codes(40, 70, planes=3))


@pytest.mark.parametrize("seed", range(4))
def test_random_ids_of_random_sizes_under_random_models(native, seed):
    pytest.importorskip("constriction")
    rng = random.Random(seed)
    ours = Codec(native, random_model(native, seed, hidden=seed))
    for i in range(6):
        codes = random_codes(rng.randrange(1, 150), rng.randrange(1, 150), i, rng.randrange(1, S + 1))
        codes = replace(codes, ids=codes.ids & rng.randrange(512))
        again = ours.unpack(ours.pack(codes))
        assert torch.equal(again.ids, codes.ids)
        assert again.image_size == codes.image_size


def test_a_long_thin_image(native):
    """20 000 × 3 pixels: 1 250 cells in a row."""
    pytest.importorskip("constriction")
    picture = Image.effect_noise((20_000, 3), 80).convert("RGB")
    codes = native.encode_image(picture)
    for ours in (Codec(native), Codec(native, low_model(native))):
        again = ours.unpack(ours.pack(codes))
        assert torch.equal(again.ids, codes.ids)
        assert again.image_size == (3, 20_000)


def test_an_image_of_one_pixel(native):
    codes = native.encode_image(Image.new("RGB", (1, 1)))
    content = Codec(native).pack(codes)
    assert torch.equal(Codec(native).unpack(content, max_pixels=1).ids, codes.ids)


def test_unlikely_codes_are_packed(native):
    """Plane by plane, and without a trace of the context model if it never helps."""
    pytest.importorskip("constriction")
    ours, packed = Codec(native, low_model(native)), Codec(native)
    unlikely = random_codes(40, 70)
    assert ours.pack(unlikely) == packed.pack(unlikely)
    unlikely.ids[..., 0] = 0
    content = ours.pack(unlikely)
    assert content[3] >> 4 == codec.CONTEXT
    lengths = np.diff(ends_of_planes(ours, content)) - 3
    assert lengths[0] < 17
    assert lengths[1:].tolist() == [17, 17, 17]
    assert torch.equal(ours.unpack(content).ids, unlikely.ids)


def header(ours: Codec, height: int, width: int, planes: int, name: bytes = b"") -> bytes:
    """With a right checksum."""
    head = codec.MAGIC + bytes([codec.PLANES_VERSION | (codec.CONTEXT if name else codec.PACKED) << 4]) + ours.identity
    head += codec.varint(height - 1) + codec.varint(width - 1) + bytes([planes]) + name
    return head + codec.PLANE_CRC.pack(crc_hqx(head, 0))


@pytest.mark.parametrize("coded", [False, True])
def test_claims_of_a_terabyte_cost_nothing(native, coded, monkeypatch):
    """A header that asks for much, with a right checksum, is refused before anything is decoded or allocated."""
    model = low_model(native)
    ours = Codec(native, model)
    for work in ("range_coder.decode", "unpack_ids"):
        monkeypatch.setattr(f"flowmo.codec.file.{work}", lambda *_: pytest.fail("that is work"))
    name = model.identity[:2] if coded else b""
    tracemalloc.start()
    for height, width, planes in (
        (2**34, 2**34, 4),
        (2**20, 2**20, 4),
        (1, 10**8, 4),
        (10**8, 1, 4),
        (10_000, 10_000, 4),
        (10_000, 10_000, 0),
        (40, 70, 0),
        (40, 70, 5),
        (40, 70, 255),
    ):
        for body in (bytes(9), bytes(500), codec.varint(10**9) + bytes(500), codec.varint(24_000) + bytes(24_002)):
            with pytest.raises(CodecError, match=r"damaged|the limit here"):
                ours.unpack(header(ours, height, width, planes, name) + body)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 5e6
    with pytest.raises(CodecError, match="more than 2,799"):
        ours.unpack(header(ours, 40, 70, 4, name) + bytes(9), max_pixels=2799)


def test_a_string_of_other_cells_is_refused(native):
    """A coded plane has a byte per 16 cells at least, so a short file cannot ask for a long computation."""
    pytest.importorskip("constriction")
    model = low_model(native)
    ours = Codec(native, model)
    head = header(ours, 1600, 1600, 1, model.identity[:2])
    with pytest.raises(CodecError, match="length"):
        ours.unpack(head + codec.varint(10) + bytes(12))


def test_noise_is_refused_or_coarser(written):
    ours, content, _ = written
    noise, ends = random.Random(0), ends_of_planes(*written[:2])
    for _ in range(300):
        start = content[: noise.choice((0, 3, 4, 8, 11, ends[0]))]
        with pytest.raises(CodecError):
            ours.unpack(start + noise.randbytes(noise.randrange(200)))


def test_files_of_another_kind_are_refused(native, tiny, picture):
    fixed = Codec(tiny).pack(tiny.encode_image(picture))
    ours = Codec(native)
    content = ours.pack(random_codes(40, 70))
    for bad in (fixed, content[:4] + tiny_identity(tiny) + content[8:]):
        with pytest.raises(CodecError, match="written by tokenizer"):
            ours.unpack(bad)
    with pytest.raises(CodecError, match="version 2 where this tokenizer writes version 3"):
        ours.unpack(content[:3] + b"\2" + content[4:])
    with pytest.raises(CodecError, match="one image"):
        ours.pack(native.encode(torch.zeros(2, 3, 16, 16)))


def tiny_identity(tokenizer: FlowMo) -> bytes:
    return bytes.fromhex(tokenizer.identity())[:4]


# The commands


@pytest.fixture
def native_file(native, tmp_path) -> Path:
    save(native, tmp_path / "native.safetensors")
    return tmp_path / "native.safetensors"


def test_a_truncated_file_decodes_with_a_line_about_it(native_file, picture, tmp_path, capsys):
    photo, file, out = tmp_path / "photo.png", tmp_path / "photo.flowmo", tmp_path / "out.png"
    picture.resize((70, 40)).save(photo)
    model = ("--model", native_file)
    assert run_command(capsys, "encode", photo, file, *model)[0] == 0
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    status, said, told = run_command(capsys, "decode", file, out, *model, "--json")
    assert status == 0
    assert told.splitlines()[-1].endswith("it ends early. The image is coarser, from 3 of 4 planes.")
    assert json.loads(said)[0]["planes_missing"] == 1
    with Image.open(out) as drawn:
        assert drawn.size == (70, 40)
    file.write_bytes(content[:20])
    status, _, told = run_command(capsys, "decode", file, out, *model, "--force")
    assert status == 2
    assert told.count("\n") == 1


# Context models


def test_context_models_of_another_kind_or_tokenizer_are_refused(native, tiny, tmp_path):
    pytest.importorskip("constriction")
    with pytest.raises(CodecError, match="different kinds"):
        Codec(tiny, random_model(tiny))
    with pytest.raises(CodecError, match="different kinds"):
        Codec(native, peaked(native))
    with pytest.raises(CodecError, match="of tokenizer"):
        Codec(native, random_model(tiny))
    content = Codec(native, low_model(native)).pack(replace(random_codes(40, 70), ids=torch.zeros(1, 15, 4).long()))
    with pytest.raises(CodecError, match="which is not available"):
        Codec(native).unpack(content)
    with pytest.raises(CodecError, match="not the available one"):
        Codec(native, random_model(native)).unpack(content)
    (tmp_path / "a").write_bytes(random_model(native).save())
    with pytest.raises(ContextError, match="for this kind"):
        ContextModel.read(tmp_path / "a")


def test_the_context_model_beside_a_tokenizer_is_found(native, native_file):
    pytest.importorskip("constriction")
    native_file.with_name("native.context.safetensors").write_bytes(random_model(native).save())
    found = codec.find_context(native_file, native)
    assert found.identity == random_model(native).identity


def test_a_model_is_its_file(native, tmp_path):
    model = random_model(native)
    (tmp_path / "a").write_bytes(model.save())
    again = PlaneModel.read(tmp_path / "a")
    assert again.identity == model.identity
    assert again.neighbours == NEIGHBOURS
    for name, array in model.arrays.items():
        assert np.array_equal(again.arrays[name], array)
    assert random_model(native, seed=1).identity != model.identity


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": np.array([0, 1, 2, 3])}, "no rows and columns"),
        ({"order": np.zeros((0, 2), np.int64)}, "is empty"),
        ({"middle": np.zeros((S, 5, 4), np.int64)}, "middle has shape"),
        ({"bias": np.full((S, D, 7), 1 << 15)}, "16 bits"),
        ({"bias": np.zeros((S, D, 6), np.int64)}, "shape"),
    ],
)
def test_models_that_cannot_be(native, changes, message):
    with pytest.raises(ContextError, match=message):
        random_model(native, **changes)


def probabilities(model: PlaneModel, ids: np.ndarray, plane: int) -> np.ndarray:
    """That each bit is set given those before it, cells × bits, for ids rows × columns × planes."""
    rows, columns, _ = ids.shape
    bits = token_bits(ids[..., plane].reshape(1, -1, 1), D * B)
    asked = np.zeros((rows * columns, D * B), np.int64)

    def code(cells, bit, p):
        asked[cells, bit] = p
        return bits[:, cells, bit]

    model.plane(ids[..., :plane])(1, code)
    return asked


def test_probabilities_heed_only_what_is_coded_before(native):
    """Changing a digit changes nothing of earlier steps or digits, nor its own; something behind it changes."""
    model, rng = random_model(native), np.random.default_rng(0)
    ids = rng.integers(0, 512, (5, 6, S))
    step = ORDER[np.arange(5)[:, None] % 2, np.arange(6) % 2]
    for plane, row, column, digit in ((2, 1, 2, 1), (2, 4, 5, 0), (0, 0, 0, 2), (3, 3, 3, 0)):
        before = probabilities(model, ids, plane).reshape(5, 6, D, B)
        changed = ids.copy()
        changed[row, column, plane] ^= 7 << B * digit
        after = probabilities(model, changed, plane).reshape(5, 6, D, B)
        differs = (before != after).any(axis=-1)  # rows columns D
        assert not differs[step < step[row, column]].any()
        assert not differs[(step == step[row, column]) & ~at(row, column)].any()
        assert not differs[row, column, :digit].any()
        assert (before[row, column, digit, -1] == after[row, column, digit, -1]).all(), "the highest bit comes first"
        later = (step > step[row, column])[..., None] & differs
        assert later.any() or step[row, column] == 3
        if plane + 1 < S:
            again = probabilities(model, changed, plane + 1)
            assert (again != probabilities(model, ids, plane + 1)).any()


def at(row: int, column: int) -> np.ndarray:
    where = np.zeros((5, 6), bool)
    where[row, column] = True
    return where


def test_products_are_exact_at_their_bounds():
    """float64 products of the largest numbers equal those of unbounded integers."""
    rng = np.random.default_rng(0)
    x = rng.integers(-(1 << 40), 1 << 40, (3, 512))
    weights = rng.integers(-(1 << 15) + 1, 1 << 15, (512, 4))
    bounded = activation(x)
    assert bounded.min() >= 0
    assert bounded.max() == LARGEST_ACTIVATION
    exact = [
        [sum(int(a) * int(b) for a, b in zip(row, column, strict=True)) >> 12 for column in weights.T]
        for row in bounded
    ]
    assert product(bounded, weights.astype(np.float64), 12).tolist() == exact
    assert product(np.full((1, 1), -1), np.ones((1, 1)), 4).tolist() == [[-1]], "rounded down"


def test_strings_are_as_long_as_their_cost(native):
    pytest.importorskip("constriction")
    model, rng = random_model(native, scale=900), np.random.default_rng(0)
    ids = rng.integers(0, 512, (17, 23, S))
    for plane in range(S):
        bits = token_bits(ids[..., plane].reshape(1, -1, 1), D * B)
        given = model.plane(ids[..., :plane])
        string = range_coder.encode(given, bits)
        assert len(string) <= ideal_code_length(given, bits)[0] / 8 + 8
        assert np.array_equal(range_coder.decode(given, string, 1), bits)


def test_many_cells_at_once_change_nothing(native, monkeypatch):
    model, ids = random_model(native), np.random.default_rng(0).integers(0, 512, (9, 11, S))
    whole = probabilities(model, ids, 2)
    monkeypatch.setattr("flowmo.codec.planes.CELLS_AT_ONCE", 3)
    assert np.array_equal(probabilities(model, ids, 2), whole)


# Fitting


def structured(count: int, seed: int = 0) -> list[np.ndarray]:
    """Ids of images of 2 planes. The lowest digit of plane 0 is that of the cell to the left with probability 0.9, else
    uniform; its other digits are uniform over 0 and 1. Plane 1 is plane 0 of the cell below."""
    rng, images = np.random.default_rng(seed), []
    for _ in range(count):
        rows, columns = rng.integers(3, 7, 2)
        low = rng.integers(0, 8, (rows + 1, columns))
        for column in range(1, columns):
            keep = rng.random(rows + 1) < 0.9
            low[:, column] = np.where(keep, low[:, column - 1], low[:, column])
        first = low + 8 * rng.integers(0, 2, low.shape) + 64 * rng.integers(0, 2, low.shape)
        images.append(np.stack((first[:-1], first[1:]), axis=-1))
    return images


def test_frequencies_cost_the_entropy_of_the_digits(native):
    images = structured(200)
    model = fit_planes.frequencies(images, native)
    spent = sum(fit_planes.plane_code_lengths(model, ids) for ids in images)
    cells = sum(ids[..., 0].size for ids in images)
    for plane in range(2):
        entropy = 0.0
        for digit in range(D):
            values = np.concatenate([(ids[..., plane] >> 3 * digit & 7).ravel() for ids in images])
            p = np.bincount(values, minlength=8) / cells
            entropy -= (p[p > 0] * np.log2(p[p > 0])).sum()
        assert spent[plane] / cells == pytest.approx(entropy, rel=0.005)


def test_what_is_fitted_finds_the_structure(native):
    """Against the entropies of the process that made the ids."""
    model = fit_planes.fit(structured(300), native, hidden=24, steps=200)
    images = structured(60, seed=1)
    spent = sum(fit_planes.plane_code_lengths(model, ids) for ids in images)
    first = sum(len(ids) for ids in images)
    cells, inside = sum(ids[..., 0].size for ids in images), sum(ids[:-1, :, 0].size for ids in images)
    copied = -(0.9 + 0.1 / 8) * np.log2(0.9 + 0.1 / 8) - 7 * 0.1 / 8 * np.log2(0.1 / 8)
    entropy = 2 * cells + 3 * first + copied * (cells - first)
    assert 0.95 * entropy < spent[0] < 1.25 * entropy < 0.9 * 5 * cells  # frequencies alone take 5 bits a cell
    entropy = (2 + copied) * (cells - inside)  # plane 1 is known but for its last row
    assert 0.95 * entropy < spent[1] < 0.55 * 5 * cells


def test_the_integers_are_the_network_rounded(native):
    """The network computes all cells of all planes at once, the integers cell after cell; their costs agree."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    images = [rng.integers(0, 512, (rows, columns, S)) for rows, columns in ((1, 1), (5, 7), (35, 3), (4, 40))]
    net = fit_planes.PlaneNetwork(S, D, B, 12, generator)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model = PlaneModel(native.identity(), fit_planes.NEIGHBOURS, fit_planes.ORDER, **net.rounded())
    for ids in images:
        samples = fit_planes.Samples([ids], D, B)
        with torch.no_grad():
            expected = net(*samples.batch(torch.arange(len(samples)))).sum(dim=0).numpy()
        assert fit_planes.plane_code_lengths(model, ids) == pytest.approx(expected, rel=0.01)


def test_levels_that_are_no_power_of_two_are_refused(native):
    six = FlowMo(Config.from_dict(TINY_NATIVE).override("model.fsq_levels=6"))
    codes = six.encode_image(Image.new("RGB", (40, 70)))
    assert torch.equal(Codec(six).unpack(Codec(six).pack(codes)).ids, codes.ids)
    with pytest.raises(ContextError, match="digits of whole bits"):
        fit_planes.fit([fit_planes.ids_on_lattice(codes, six)], six)


def test_bits_have_digits_of_one_bit(native):
    """LFQ's ids are 9 signs each."""
    lfq = FlowMo(Config.from_dict(TINY_NATIVE).override("model.quantization_type=lfq", "model.context_dim=18"))
    assert fit_planes.id_digits(lfq) == (9, 1)
    codes = lfq.encode_image(Image.effect_noise((40, 70), 90).convert("RGB"))
    ids = fit_planes.ids_on_lattice(codes, lfq)
    for model in (fit_planes.frequencies([ids], lfq), fit_planes.fit([ids], lfq, hidden=4, steps=2)):
        ours = Codec(lfq, model)
        assert torch.equal(ours.unpack(ours.pack(codes)).ids, codes.ids)


@pytest.mark.parametrize("words", [("--limit", "0"), ("--steps", "0"), ("--hidden", "-1"), ("--lim", "4")])
def test_the_command_refuses_wrong_numbers_and_abbreviations(words, capsys):
    with pytest.raises(SystemExit):
        fit_context.main(["images", "--output", "file", *words])
    assert "usage" in capsys.readouterr().err


def test_the_command(native, native_file, class_folder, tmp_path, capsys, picture):
    pytest.importorskip("constriction")
    out, photo, file = native_file.with_name("native.context.safetensors"), tmp_path / "a.png", tmp_path / "a.flowmo"
    words = f"{class_folder} --model {native_file} --output {out} --held-out {class_folder} --limit 4".split()
    assert fit_context.main([*words, "--hidden", "8", "--steps", "20", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["images"] == 4
    assert facts["context"] < facts["packed"]
    assert len(facts["context_planes"]) == S
    picture.resize((160, 200)).save(photo)
    assert run_command(capsys, "encode", photo, file, "--model", native_file)[0] == 0
    content = file.read_bytes()
    assert content[3] >> 4 == codec.CONTEXT
    assert run_command(capsys, "encode", photo, file, "--model", native_file, "--packed", "--force")[0] == 0
    packed = file.read_bytes()
    assert len(content) < len(packed)
    for how, before, after in ((["--packed"], content, packed), ([], packed, content)):
        file.write_bytes(before)
        assert (
            run_command(capsys, "encode", file, "-o", tmp_path / "b.flowmo", "--model", native_file, *how, "--force")[0]
            == 0
        )
        assert (tmp_path / "b.flowmo").read_bytes() == after, "a file is written anew without the image"
    lower = ["--bpp", 0.08, "--model", native_file, "--force"]
    for source in (photo, file):
        assert run_command(capsys, "encode", source, tmp_path / f"{source.suffix[1:]}.flowmo", *lower)[0] == 0
    assert (tmp_path / "png.flowmo").read_bytes() == (tmp_path / "flowmo.flowmo").read_bytes() != content
    status, _, error = run_command(
        capsys, "encode", file, tmp_path / "c.flowmo", "--fit", "crop", "--model", native_file
    )
    assert (status, "takes images" in error) == (2, True)
    again = Codec(native, PlaneModel.read(out)).unpack(content)
    assert torch.equal(again.ids, native.encode_image(picture.resize((160, 200))).ids)
    assert fit_context.main([*words, "--frequencies", "--force"]) == 0
    assert re.search(r"packed [\d.]+, by frequencies [\d.]+ ±", capsys.readouterr().out)
    assert PlaneModel.read(out).neighbours == ()
