"""The page's JavaScript in Node, against Python: noise, tiles and blocks, and .flowmo files in both directions."""

import base64
import json
import shutil
import subprocess

import pytest
import torch

from flowmo.codec.file import Codec, CodecError
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
    sizes = ((20, 32), (33, 300), (50, 71))
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


def codes_of_one_pixel(codec):
    shape = (*codec.shape(1, 1), codec.sub_tokens)
    ids = torch.arange(torch.Size(shape).numel()).reshape(shape) % codec.id_count
    if codec.native:
        return Codes(ids, (codec.cell,) * 2, codec.id_count, image_size=(1, 1))
    return Codes(ids, (codec.tile,) * 2, codec.id_count, Tiling(1, 1, codec.tile))
