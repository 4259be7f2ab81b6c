"""The example's GPT: each id depends on earlier ones alone, and the cache changes nothing."""

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "examples"))
from gpt import GPT, GPTConfig, loss_of

CONFIG = GPTConfig(6, 2, 5, ("a", "b"), "0" * 16, "tiny", depth=2, width=32, heads=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def test_an_id_is_predicted_from_earlier_ones_alone(model):
    ids, labels = torch.randint(5, (1, 11)), torch.tensor([1])
    logits = model(ids, labels)
    for position in range(11):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % 5
        other = model(changed, labels)
        same = (logits == other).all(-1)[0]
        assert same[: position + 1].all()
        assert not same[position + 1]
    assert not torch.allclose(logits[:, 0], model(ids, torch.tensor([0]))[:, 0]), "the class is seen"


def test_the_cache_changes_nothing(model):
    ids, labels, caches = torch.randint(5, (3, 11)), torch.tensor([0, 1, 2]), [[], []]
    whole = model(ids, labels)
    for position in range(12):
        step = model(ids[:, :position], labels, caches)
        torch.testing.assert_close(step[:, -1], whole[:, position], rtol=1e-4, atol=1e-5)


def test_samples_follow_the_model(model):
    """The first id's frequencies are its probabilities, with guidance those of the mixed logits."""
    labels = torch.ones(4000, dtype=torch.int64)
    nothing = torch.empty(2, 0, dtype=torch.int64)
    conditional, free = model(nothing, torch.tensor([1, 2]))[:, 0].detach()
    for guidance in (1.0, 2.0):
        drawn = model.sample(labels, torch.Generator().manual_seed(0), guidance, 1.0)
        assert drawn.shape == (4000, 6, 2)
        expected = (free + guidance * (conditional - free)).softmax(-1)
        found = np.bincount(drawn[:, 0, 0], minlength=5) / 4000
        np.testing.assert_allclose(found, expected.numpy(), atol=4 * np.sqrt(0.25 / 4000))


def test_a_pattern_is_learnt(model):
    """Each id repeats the one before it: the likelihood says so after a few steps."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        ids = torch.randint(5, (32, 1)).expand(32, 12)
        loss = loss_of(model, ids, torch.full((32,), 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(np.log(5) / 12, abs=0.05), "one free id of twelve"
