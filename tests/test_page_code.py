"""The page's JavaScript in Node, against Python: noise, tiles and blocks, and .flowmo files in both directions."""

import base64
import binascii
import json
import shutil
import subprocess
import zlib

import pytest
import torch

from flowmo.codec.file import Codec, CodecError, varint
from flowmo.model import sampler, tiling
from flowmo.model.tiling import Tiling
from flowmo.tokenizer import Codes
from flowmo.web.export import PAGE, describe

HARNESS = """
import * as codec from "./codec.js";
import * as layout from "./layout.js";
import * as noise from "./noise.js";
const functions = { ...codec, ...layout, ...noise };
let text = "";
for await (const chunk of process.stdin) text += chunk;
const plain = (key, value) => {
  if (value instanceof Uint8Array) return Buffer.from(value).toString("base64");
  return ArrayBuffer.isView(value) ? [...value] : value;
};
const revived = (key, value) => {
  if (value?.bytes) return Uint8Array.from(Buffer.from(value.bytes, "base64"));
  return value?.ints ? Int32Array.from(value.ints) : value;
};
const results = JSON.parse(text, revived).map(([name, ...args]) => {
  try {
    return { result: functions[name](...args) };
  } catch (error) {
    return { error: error.message };
  }
});
console.log(JSON.stringify(results, plain));
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Calls functions of the page: [(name, arguments …), …] -> [{"result": …} or {"error": …}, …]."""
    if shutil.which("node") is None:
        pytest.skip("needs node")
    folder = tmp_path_factory.mktemp("page")
    for file in PAGE.glob("*.js"):
        shutil.copy(file, folder)
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "harness.js").write_text(HARNESS)

    def call(calls):
        done = subprocess.run(
            ["node", "harness.js"], cwd=folder, input=json.dumps(calls), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return call


def as_bytes(content):
    return {"bytes": base64.b64encode(content).decode()}


def test_noise_is_the_samplers(run):
    cases = ((0, 16), (7, 3 * 7 * 5), (2**40 + 5, 3 * 70 * 50))
    for (seed, count), found in zip(cases, run([["seededNoise", *case] for case in cases]), strict=True):
        if count == 105:
            expected = sampler.seeded_noise([seed], 7, 5).flatten()
        else:
            expected = torch.randn(count, generator=torch.Generator().manual_seed(seed))
        assert torch.allclose(torch.tensor(found["result"]), expected, atol=3e-6)


def test_parts_are_those_of_tiles_and_blocks(run):
    fixed, native = {"native": False, "tile": 32, "cell": 8}, {"native": True, "cell": 16, "tile": 64}
    sizes = ((20, 32), (33, 300), (50, 71), (69, 69))  # 18.5 rounds to 18
    for (height, width), found in zip(sizes, run([["parts", fixed, *size] for size in sizes]), strict=True):
        corners = [(part["down"]["start"], part["across"]["start"]) for part in found["result"]]
        assert corners == Tiling(height, width, 32).corners
    found = run([["parts", native, 16 * 97 - 3, 16 * 48]])[0]["result"]
    expected = [(down, across) for down in tiling.extents(97) for across in tiling.extents(48)]
    for part, spans in zip(found, expected, strict=True):
        for axis, span, cells in zip(("down", "across"), spans, (97, 48), strict=True):
            ours = part[axis]
            assert (ours["start"], ours["stop"]) == (16 * span.start, 16 * span.stop)
            assert (ours["first"], ours["last"]) == (span.first, span.last)
            assert torch.allclose(
                torch.tensor(ours["weight"], dtype=torch.float32), tiling.ramp(span, cells, 16), atol=1e-6
            )


@pytest.mark.parametrize("name", ["tiny", "native"])
def test_files_in_both_directions(run, name, request):
    """The same bytes as Python's; every damaged byte and every cut as Python takes it."""
    tokenizer = request.getfixturevalue(name)
    codec, model = Codec(tokenizer), describe(tokenizer, name)
    generator = torch.Generator().manual_seed(3)
    for height, width in ((1, 1), (70, 50), (130, 200)):
        tiles, tokens = codec.shape(height, width)
        ids = torch.randint(codec.id_count, (tiles, tokens, codec.sub_tokens), generator=generator)
        if codec.native:
            cells = -(-height // 16) * 16, -(-width // 16) * 16
            codes = Codes(ids, cells, codec.id_count, image_size=(height, width)).coarser(3)
        else:
            codes = Codes(ids, (codec.tile,) * 2, codec.id_count, Tiling(height, width, codec.tile))
        planes, content = codes.ids.shape[2], codec.pack(codes)
        ours = {"height": height, "width": width, "planes": planes, "ids": {"ints": codes.ids.flatten().tolist()}}
        packed, size, read = run(
            [["pack", model, ours], ["fileSize", model, ours], ["unpack", model, as_bytes(content)]]
        )
        assert base64.b64decode(packed["result"]) == content
        assert size["result"] == len(content)
        assert read["result"] == {**ours, "missing": 0, "ids": codes.ids.flatten().tolist()}
    # of a small file: 1 × 1 pixel
    small = codec.pack(codes_of_one_pixel(codec))
    wrong = [small[:i] for i in range(len(small))] + [small + b"\0", b"FLM" + bytes(30)]
    wrong += [small[:i] + bytes([small[i] ^ bit]) + small[i + 1 :] for i in range(len(small)) for bit in (1, 16, 128)]
    for bad, found in zip(wrong, run([["unpack", model, as_bytes(bad)] for bad in wrong]), strict=True):
        missing = []
        try:
            expected = codec.unpack(bad, on_missing=missing.append).ids.flatten().tolist()
        except CodecError:
            assert "error" in found, bad
        else:
            assert found["result"]["ids"] == expected
            assert found["result"]["missing"] == sum(m.total - m.planes for m in missing)


@pytest.mark.parametrize("name", ["tiny", "native"])
def test_files_that_break_one_rule(run, name, request):
    """Each with right checksums, so that no other rule refuses it."""
    tokenizer = request.getfixturevalue(name)
    codec, model = Codec(tokenizer), describe(tokenizer, name)
    own = {"version": 3 if codec.native else 2, "coding": 0, "identity": bytes.fromhex(model["identity"])}
    own |= {"height": b"\0", "width": b"\0", "tile": model["tile"], "planes": model["subTokens"]}
    wide = varint(15_999_999)
    cases = [
        ({}, None),
        ({"identity": b"abcd"}, "Tokenizer 61626364 wrote this file"),
        ({"coding": 1}, "entropy-coded"),
        ({"coding": 2}, "A later version"),
        ({"version": 1}, "A later version"),
        ({"version": 5 - own["version"]}, "its version is not this tokenizer's"),
        ({"width": varint(16_000_000)}, "16000001 × 1 pixels"),
        ({"width": wide}, "16000000 × 1 pixels"),
        ({"width": b"\x80\0"}, "longer than necessary"),
        ({"width": b"\xff" * 5 + b"\1"}, "does not end"),
    ]
    if codec.native:
        cases.append(({"planes": model["subTokens"] + 1}, "its planes are not this tokenizer's"))
    else:
        cases.append(({"tile": 2 * model["tile"]}, "its tiles are not this tokenizer's"))
    files = [file_of_one_pixel(model, **own | change) for change, _ in cases]
    few = model | {"idCount": 2}  # ids of the file are 3 in each plane but the first
    found = run([["unpack", model, as_bytes(content)] for content in files] + [["unpack", few, as_bytes(files[0])]])
    for (change, message), result in zip(cases, found, strict=False):
        assert message in result.get("error", "") if message else result["result"]["missing"] == 0, change
    for content, (_, message) in zip(files[1:], cases[1:], strict=True):
        if message != "entropy-coded":
            with pytest.raises(CodecError):
                codec.unpack(content)
    if codec.native:  # as in Python, later planes that are damaged are left out
        assert (found[-1]["result"]["planes"], found[-1]["result"]["missing"]) == (1, model["subTokens"] - 1)
    else:
        assert "an id is too large" in found[-1]["error"]


def file_of_one_pixel(model, version, coding, identity, height, width, tile, planes):
    """A packed file by docs/codec.md, whose ids are all 3 but those of the first plane, 0."""
    header = b"FLM" + bytes([version | coding << 4]) + identity + height + width
    if not model["native"]:
        header += varint(tile - 1)
        count = model["tokens"] * model["subTokens"]
        packed = bits_of([3] * count, model["bits"])
        return header + packed + zlib.crc32(header + packed).to_bytes(4, "little")
    content = header + bytes([planes])
    check = binascii.crc_hqx(content, 0)
    content += check.to_bytes(2, "little")
    for plane in range(planes):
        packed = bits_of([3 * (plane > 0)], model["bits"])
        check = binascii.crc_hqx(packed, check)
        content += packed + check.to_bytes(2, "little")
    return content


def bits_of(ids, bits):
    number = sum(value << index * bits for index, value in enumerate(ids))
    return number.to_bytes(-(-len(ids) * bits // 8), "little")


def codes_of_one_pixel(codec):
    shape = (*codec.shape(1, 1), codec.sub_tokens)
    ids = torch.arange(torch.Size(shape).numel()).reshape(shape) % codec.id_count
    if codec.native:
        return Codes(ids, (codec.cell,) * 2, codec.id_count, image_size=(1, 1))
    return Codes(ids, (codec.tile,) * 2, codec.id_count, Tiling(1, 1, codec.tile))
