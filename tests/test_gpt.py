"""The example's GPT: its probabilities, its cache, its samples, its files and its training."""

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from flowmo import Codes
from flowmo.codec import range_coder
from flowmo.data.bits import token_bits
from flowmo.data.token_files import TokenMetadata, Vocabulary, manifest, pack_shard

sys.path += [str(ROOT / "examples"), str(ROOT / "runs")]
import gpt
from context_tokens import ideal_code_length

IDS = 5
VOCABULARY = Vocabulary(
    **{"tokenizer": "0" * 16, "model": "tiny", "image_size": 32, "tokens": 6, "sub_tokens": 2, "id_bits": 3},
    **{"classes": ("a", "b"), "id_count": IDS},
)
NO_CLASS = 2


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = gpt.GPT(VOCABULARY, depth=2, width=32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def test_an_id_is_predicted_from_its_class_and_earlier_ids_alone(model):
    ids, label = torch.randint(IDS, (1, 11)), torch.tensor([1])
    logits = model(model.sequence(label, ids))
    assert logits.shape == (1, 12, IDS)
    for position in range(11):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % IDS
        same = (logits == model(model.sequence(label, changed))).all(dim=-1)[0]
        assert same[: position + 1].all()
        assert not same[position + 1 :].any(), "every later prediction depends on it"
    others = [model(model.sequence(torch.tensor([c]), ids)) for c in (0, NO_CLASS)]
    assert not any(torch.allclose(logits[:, 0], other[:, 0]) for other in others), "the class matters"


def test_a_sub_token_has_ids_of_its_own(model):
    """The same id is another element in each sub-token, as in ``Codes.to_sequence``, and none of them is a class."""
    sequence = model.sequence(torch.tensor([0, NO_CLASS]), torch.full((2, 3), 4))
    assert sequence.tolist() == [[10, 4, 9, 4], [12, 4, 9, 4]]
    codes = Codes(torch.randint(IDS, (2, 6, 2)), (32, 32), IDS)
    assert torch.equal(
        model.sequence(torch.tensor([0, 1]), codes.ids.flatten(1))[:, 1:], codes.to_sequence(distinct=True)
    )


def test_positions_are_rotary():
    """The product of a query and a key depends on their distance, and their norms stay."""
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    at = lambda x, position: gpt.rotate(x, torch.tensor([position]))[0, 0, 0]  # noqa: E731
    assert at(q, 9) @ at(k, 4) == pytest.approx(float(at(q, 105) @ at(k, 100)))
    assert at(q, 9) @ at(k, 4) != pytest.approx(float(at(q, 9) @ at(k, 5)))
    assert at(q, 7).norm() == pytest.approx(float(q.norm()))


@pytest.mark.parametrize("lengths", [[1] * 12, [5, 1, 4, 2]])
def test_the_cache_changes_nothing(model, lengths):
    """One element after another, or several at once."""
    sequence, cache = model.sequence(torch.arange(3), torch.randint(IDS, (3, 11))), []
    with torch.no_grad():
        whole = model(sequence)
        steps = torch.cat([model(part, cache) for part in sequence.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-5)


def test_probabilities_add_up_to_one(model):
    """Over all codes of a smaller vocabulary, by enumeration."""
    small = Vocabulary(tokenizer="0" * 16, model="", image_size=8, tokens=2, sub_tokens=2, id_bits=1, classes=("a",))
    network = gpt.GPT(small, depth=1, width=32)
    torch.nn.init.normal_(network.readout)
    codes = torch.cartesian_prod(*[torch.arange(2)] * 4).view(16, 2, 2)
    assert network.log_prob(codes, torch.zeros(16, dtype=torch.int64)).sum(dim=1).exp().sum().item() == pytest.approx(1)


@pytest.mark.parametrize("options", [{}, {"guidance": 2.0}, {"temperature": 0.5}, {"top_k": 2}])
def test_samples_follow_the_model(model, options):
    """Frequencies of the first two ids are the probabilities of the mixed, sharpened or cut logits."""
    drawn = model.sample(torch.ones(4000, dtype=torch.int64), torch.Generator().manual_seed(0), **options)
    assert drawn.shape == (4000, 6, 2)
    first = int(drawn[:, 0, 0].mode().values)
    after = drawn[drawn[:, 0, 0] == first]
    for known, found in (([], drawn[:, 0, 0]), ([first], after[:, 0, 1])):
        known = torch.tensor([known] * 2, dtype=torch.int64)
        given, free = model(model.sequence(torch.tensor([1, NO_CLASS]), known))[:, -1].detach().double().numpy()
        logits = (free + options.get("guidance", 1) * (given - free)) / options.get("temperature", 1)
        weights = np.exp(logits) * (logits >= np.sort(logits)[-options.get("top_k", 0)])
        frequencies = np.bincount(found, minlength=IDS) / len(found)
        np.testing.assert_allclose(frequencies, weights / weights.sum(), atol=2 / np.sqrt(len(found)))


def test_it_codes_files(model):
    """Strings are as long as the likelihood says, and the ids of several tiles come back."""
    pytest.importorskip("constriction")
    ids = model.sample(torch.full((4,), NO_CLASS), torch.Generator().manual_seed(1))
    coder, bits = gpt.GPTCoder(model), token_bits(ids.numpy(), 3)
    expected = -model.log_prob(ids, torch.full((4,), NO_CLASS)).sum(dim=1).detach().numpy() / np.log(2)
    assert ideal_code_length(coder.run, bits) == pytest.approx(expected, rel=0.01)
    string = range_coder.encode(coder.run, bits)
    assert len(string) <= expected.sum() / 8 + 8
    assert np.array_equal(range_coder.decode(coder.run, string, 4), bits)


def test_training_learns_and_resumes_to_the_same_weights(tmp_path, monkeypatch):
    """All ids of an image are equal: one free id of twelve. A run that is killed after a checkpoint loses nothing."""
    count = 40
    rows = torch.arange(count)[:, None].expand(-1, 12).reshape(-1, 6, 2)
    own = vars(VOCABULARY) | {"id_count": count, "id_bits": 6}
    metadata = TokenMetadata(**own, source="", count=count, shard_size=count)
    (tmp_path / "tokens-00000.bin").write_bytes(pack_shard(metadata, 0, rows.numpy(), [i % 2 for i in range(count)]))
    (tmp_path / "tokens.json").write_text(manifest(metadata, complete=True))
    monkeypatch.setattr(gpt, "SAVE_EVERY", 40)
    monkeypatch.setattr(gpt, "WARMUP", 5)

    def train(name, lr="0.02"):
        options = ["--depth", "1", "--width", "32", "--steps", "80", "--lr", lr]
        monkeypatch.setattr(sys, "argv", ["gpt.py", "train", str(tmp_path), str(tmp_path / name), *options])
        return gpt.main() or gpt.load_gpt(tmp_path / name)

    whole = train("whole.pt")
    bits = -whole.log_prob(rows, torch.arange(count) % 2).mean(dim=1).detach() / np.log(2)
    assert bits.max() < 1.3 * np.log2(count) / 12, "no image is left out"

    save, saved = torch.save, []

    def killed(content, path):
        if saved:
            raise KeyboardInterrupt
        saved.append(save(content, path))

    monkeypatch.setattr(torch, "save", killed)
    assert train("parts.pt") == 130
    monkeypatch.setattr(torch, "save", save)
    resumed = train("parts.pt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(SystemExit, match="other tokens or settings"):
        train("parts.pt", lr="0.01")
