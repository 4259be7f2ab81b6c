"""Development dependencies are locked by hashes, and every licence is listed."""

import re
import tomllib

from audit import verdict
from conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def direct():
    """Names of all packages that the project names itself."""
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    names = {re.split(r"[\[<>=;! ]", words)[0].lower() for some in lists for words in some}
    return names - {"flowmo"}


def locked():
    """Name -> (version, hashes) of the lock."""
    text = (ROOT / "requirements-dev.txt").read_text()
    text = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    rows = [line.split() for line in text.splitlines() if line.strip()]
    return {row[0].partition("==")[0]: (row[0].partition("==")[2], row[1:]) for row in rows}


def test_every_dependency_of_development_is_locked():
    optional = {"wandb"}  # in no extra that development installs
    assert {name.replace("_", "-") for name in direct() - optional} <= locked().keys()


def test_every_lock_has_a_version_and_hashes_and_no_host():
    for name, (version, rest) in locked().items():
        assert version, name
        hashes = [word for word in rest if word.startswith("--hash=sha256:")]
        assert hashes, name
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", word) for word in hashes), name
    assert "://" not in (ROOT / "requirements-dev.txt").read_text()


def test_the_locked_torch_is_that_of_the_makefile():
    assert f"TORCH := torch=={locked()['torch'][0]}" in (ROOT / "Makefile").read_text()


def test_every_dependency_has_a_licence_in_the_table():
    table = (ROOT / "docs" / "licences.md").read_text()
    assert not [name for name in direct() if f"`{name}`" not in table]


def test_an_audit_fails_for_what_is_known_and_counts_what_it_could_not_look_up():
    sound = {"name": "a", "version": "1.0", "vulns": []}
    holed = {"name": "b", "version": "2.0", "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"]}]}
    unknown = {"name": "c", "skip_reason": "not found"}
    lines, status = verdict({"dependencies": [sound, holed, unknown]})
    assert lines == ["b 2.0: CVE-1, fixed in 2.1", "2 of 3 packages could be looked up, 1 known vulnerabilities"]
    assert status == 1
    assert verdict({"dependencies": [sound, unknown]})[1] == 0
