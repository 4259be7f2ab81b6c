"""Every parser over what once broke it, and over changed files: nothing but the project's own errors comes out."""

from pathlib import Path

import fuzz
import pytest

CORPUS = Path(__file__).parent / "corpus"
ROUNDS = {
    "codec": 400,
    "planes": 400,
    "npz": 200,
    "config": 150,
    "tokens": 300,
    "tar": 200,
    "weights": 60,
    "pictures": 400,
}


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_seeds_are_read_and_changed_ones_end_in_one_line(name, tmp_path):
    target = fuzz.TARGETS[name](tmp_path)
    seeds = list(target.seeds())
    found = [(CORPUS / name / file.name).read_bytes() for file in sorted((CORPUS / name).glob("*"))]
    for data in (*seeds, *found, *fuzz.mutations(seeds, ROUNDS[name])):
        wrong = fuzz.attempt(target, data)
        assert wrong is None, (wrong, data[:200])


def test_the_fuzzer_sees_what_is_wrong(tmp_path):
    class Bad(fuzz.Target):
        def __call__(self, data):
            if data:
                raise KeyError("x")

    assert fuzz.attempt(Bad(tmp_path), b"") is None
    assert "KeyError in" in fuzz.attempt(Bad(tmp_path), b"x")
    assert "took" in fuzz.attempt(Bad(tmp_path), b"", most_seconds=-1)
