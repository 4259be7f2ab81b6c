"""Properties that hold for every input, over examples that hypothesis draws and shrinks."""

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_NATIVE
from hypothesis import given, settings
from hypothesis import strategies as st

from flowmo import Codes, Config, ConfigError, FlowMo
from flowmo.codec.file import Codec
from flowmo.data import evenly_spread
from flowmo.data.bits import pack_ids, packed_size, unpack_ids
from flowmo.data.loader import ResumableSampler
from flowmo.data.sources.base import class_labels
from flowmo.model.tiling import Tiling, extents, ramp

settings.register_profile("flowmo", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("flowmo")
SIZES = st.integers(1, 2000)


@given(st.data(), st.integers(1, 20), st.integers(0, 200))
def test_ids_survive_packing(data, id_bits, count):
    ids = np.array(data.draw(st.lists(st.integers(0, 2**id_bits - 1), min_size=count, max_size=count)), dtype=np.int64)
    content = pack_ids(ids, id_bits)
    assert len(content) == packed_size(count, id_bits) == -(-count * id_bits // 8)
    assert (unpack_ids(content, count, id_bits) == ids).all()


@pytest.fixture(scope="module")
def codecs():
    return [Codec(FlowMo(Config.from_dict(tree)).eval()) for tree in (TINY, TINY_NATIVE)]


@given(seed=st.integers(0, 2**32), height=st.integers(1, 200), width=st.integers(1, 200), planes=st.integers(1, 4))
def test_codes_survive_the_file(codecs, seed, height, width, planes):
    """Of a fixed size in tiles, and of native size in planes."""
    fixed, native = codecs
    generator = torch.Generator().manual_seed(seed)
    tiling = Tiling(height, width, fixed.tile)
    shape = (tiling.count, fixed.tokens, fixed.sub_tokens)
    ids = torch.randint(fixed.id_count, shape, generator=generator)
    again = fixed.unpack(fixed.pack(Codes(ids, (fixed.tile, fixed.tile), fixed.id_count, tiling=tiling)))
    assert torch.equal(again.ids, ids)
    assert again.tiling == tiling
    rows, columns = -(-height // native.cell), -(-width // native.cell)
    ids = torch.randint(native.id_count, (1, rows * columns, planes), generator=generator)
    size = (rows * native.cell, columns * native.cell)
    again = native.unpack(native.pack(Codes(ids, size, native.id_count, image_size=(height, width))))
    assert torch.equal(again.ids, ids)
    assert again.image_size == (height, width)


@given(SIZES, SIZES, st.sampled_from([16, 32, 128]))
def test_tiles_cover_the_image(height, width, tile):
    tiling = Tiling(height, width, tile)
    covered = np.zeros((max(height, tile), max(width, tile)), dtype=bool)
    for y, x in tiling.corners:
        assert 0 <= y <= covered.shape[0] - tile
        assert 0 <= x <= covered.shape[1] - tile
        covered[y : y + tile, x : x + tile] = True
    assert covered[:height, :width].all()


@given(st.integers(1, 400))
def test_blocks_cover_each_cell_and_blend_to_one(cells):
    """Cores partition the axis, and the weights of neighbours add up to 1 wherever they are blended."""
    found = extents(cells)
    assert [cell for span in found for cell in range(span.first, span.last)] == list(range(cells))
    total = torch.zeros(cells * 4)
    for span in found:
        assert 0 <= span.start <= span.first < span.last <= span.stop <= cells
        total[span.start * 4 : span.stop * 4] += ramp(span, cells, 4)
    torch.testing.assert_close(total, torch.ones_like(total))


@given(st.integers(0, 300), st.integers(1, 300))
def test_evenly_spread(count, total):
    indices = evenly_spread(count, total)
    assert len(indices) == min(count, total)
    assert indices == sorted(set(indices))
    assert all(0 <= index < total for index in indices)


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 5), st.integers(0, 100))
def test_ranks_together_read_what_one_rank_reads(size, ranks, per_rank, start):
    """Each global batch of several ranks is the batch of one rank, split in order."""
    steps, batch = 3, ranks * per_rank

    def first(sampler, count):
        iterator = iter(sampler)
        return [next(iterator) for _ in range(count)]

    one = first(ResumableSampler(size, 7, start, batch, batch), steps * batch)
    several = [
        first(ResumableSampler(size, 7, start + rank * per_rank, per_rank, batch), steps * per_rank)
        for rank in range(ranks)
    ]
    joined = [item for step in range(steps) for items in several for item in items[step * per_rank :][:per_rank]]
    assert joined == one
    assert first(ResumableSampler(size, 7, start + batch, batch, batch), batch) == one[batch : 2 * batch]


@given(st.lists(st.one_of(st.none(), st.text(max_size=5)), max_size=30))
def test_labels_follow_the_class_names(names):
    classes, labels = class_labels(names)
    assert sorted(classes) == sorted({name for name in names if name is not None})
    assert [None if label is None else classes[label] for label in labels] == names


@given(st.text(max_size=30))
def test_any_override_is_taken_or_refused_in_one_line(text):
    """A wrong assignment is the project's own error, never another exception."""
    try:
        Config().override(text)
    except ConfigError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message
