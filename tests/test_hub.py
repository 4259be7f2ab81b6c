"""The Hugging Face Hub: its cache without a network, a small server of its protocol, and the other libraries' names."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import PICTURES, ROOT, run_command
from processes import run_program

import flowmo
from flowmo import FlowMo
from flowmo.checkpoint import hub
from flowmo.cli import main

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tiny, tmp_path):
    """A tokenizer in the layout of a repository."""
    tiny.save_pretrained(tmp_path / "repository")
    (tmp_path / "repository" / hub.CONTEXT_FILE).write_bytes(b"a context model")
    return tmp_path / "repository"


def python(code, home, **environment):
    """Run some lines in a process whose Hub library starts with its own settings."""
    settings = {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    settings |= {"HF_HUB_DISABLE_XET": "1", **environment}
    without = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = run_program(code, environment=without | settings)
    return subprocess.CompletedProcess(code, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_a_folder_in_the_hubs_layout(folder, tiny, tmp_path):
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "model.context.safetensors",
        "model.safetensors",
    ]
    again = FlowMo.from_pretrained(folder, "eval.sampling.sample_steps=3")
    assert again.identity() == tiny.identity()
    assert again.config.eval.sampling.sample_steps == 3
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: flowmo\n")
    assert tiny.identity() in card


def test_a_card_holds_the_evaluation_as_the_hub_reads_it(tiny, native):
    library = pytest.importorskip("huggingface_hub")
    metrics = {"psnr": 21.125, "lpips_vgg": 0.377, "ssim": None, "images": 1000, "name": "tiny"}
    content = hub.card(tiny, "someone/tiny", metrics)
    found = {(r.metric_type, r.metric_value) for r in library.ModelCard(content).data.eval_results}
    assert found == {("psnr", 21.125), ("lpips_vgg", 0.377)}
    assert "1000 images" in content
    assert "| PSNR (dB) | 21.12 |" in content
    assert "any height and width" in hub.card(native, "someone/native")
    assert library.ModelCard(hub.card(native, "someone/native")).data.library_name == "flowmo"
    with pytest.raises(flowmo.CheckpointError, match="holds no metric"):
        hub.card(tiny, "someone/tiny", {"psnr": None})


@pytest.mark.parametrize("is_fid", [True, False])
def test_only_features_of_inception_make_an_rfid(tiny, is_fid):
    row = {"frechet_distance": 12.5, "is_fid": is_fid, "feature_network": "a network", "images": 9}
    content = hub.card(tiny, "someone/tiny", row)
    assert ("| rFID | 12.5 |" in content, "| Fréchet distance | 12.5 |" in content) == (is_fid, not is_fid)
    assert "9 images, one sample each. Features: a network." in content


def test_a_card_that_exists_is_kept(tiny, tmp_path):
    card = tmp_path / hub.CARD_FILE
    tiny.save_pretrained(tmp_path, "me/first")
    edited = card.read_text() + "edited"
    card.write_text(edited)
    tiny.save_pretrained(tmp_path, "me/first")
    assert card.read_text() == edited
    with pytest.raises(flowmo.CheckpointError, match="holds no metric"):
        tiny.save_pretrained(tmp_path, "me/first", evaluation={"psnr": None})
    assert card.read_text() == edited
    tiny.save_pretrained(tmp_path, "me/first", evaluation={"psnr": 20.0, "images": 1})
    assert "| PSNR (dB) | 20 |" in card.read_text()


def test_a_card_of_other_weights_is_replaced(tiny, tmp_path):
    tiny.save_pretrained(tmp_path, "me/first")
    other = flowmo.FlowMo(tiny.config)
    other.save_pretrained(tmp_path, "me/second")
    assert "me/second" in (tmp_path / hub.CARD_FILE).read_text()
    assert other.weights_identity() in (tmp_path / hub.CARD_FILE).read_text()
    other.save_pretrained(tmp_path)
    assert "me/second" in (tmp_path / hub.CARD_FILE).read_text(), "no other name was given"
    other.save_pretrained(tmp_path, "me/third")
    assert "me/third" in (tmp_path / hub.CARD_FILE).read_text()


def test_the_cache_without_a_network(folder, tiny, tmp_path):
    """As huggingface_hub lays it out: refs name a commit, snapshots hold its files."""
    pytest.importorskip("huggingface_hub")
    repository = tmp_path / "home" / "hub" / "models--someone--flowmo"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / COMMIT)
    code = (
        "import flowmo; from flowmo.checkpoint import files as checkpoint; "
        "print(flowmo.load('someone/flowmo').identity()); "
        "print(checkpoint.find('someone/flowmo').parent); flowmo.load('someone/other')"
    )
    done = python(code, tmp_path / "home", HF_HUB_OFFLINE="1")
    identity, where = done.stdout.split()
    assert identity == tiny.identity()
    assert (Path(where) / hub.CONTEXT_FILE).is_file()
    last = done.stderr.strip().splitlines()[-1]
    assert "CheckpointError: someone/other is not a folder, and the Hub did not deliver it" in last


class FakeHub(BaseHTTPRequestHandler):
    """As much of the Hub's protocol as an upload of small files and a download need."""

    files: dict[str, bytes]

    def answer(self, content=b"{}", status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create" and json.loads(body)["name"] == "refused":
            self.answer(b'{"error": "no such token"}', 401)
        elif self.path == "/api/repos/create":
            self.answer(json.dumps({"url": f"http://{self.headers['Host']}/someone/flowmo"}).encode())
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.answer(json.dumps({"files": files}).encode())
        elif "/commit/" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            address = f"http://{self.headers['Host']}/someone/flowmo/commit/{COMMIT}"
            self.answer(json.dumps({"commitUrl": address, "commitOid": COMMIT, "success": True}).encode())
        else:
            self.answer(b'{"valid": true}')

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/someone/flowmo/tree/"):
            sizes = {name: len(content) for name, content in self.files.items()}
            rows = [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in sizes.items()]
            self.answer(json.dumps(rows).encode())
        elif path.startswith("/api/models/someone/flowmo"):
            names = [{"rfilename": name} for name in self.files]
            about = {"_id": "1", "id": "someone/flowmo", "sha": COMMIT, "siblings": names, "private": False}
            self.answer(json.dumps(about).encode())
        elif "/resolve/" in path and path.startswith("/someone/flowmo/") and path.rsplit("/", 1)[1] in self.files:
            content = self.files[path.rsplit("/", 1)[1]]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self.answer(content, X_Repo_Commit=COMMIT, ETag=etag, Content_Type="application/octet-stream")
        else:
            self.answer(b'{"error": "Repository not found"}', 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.fixture
def fake_hub():
    pytest.importorskip("huggingface_hub")
    handler = type("Handler", (FakeHub,), {"files": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_push_and_load(fake_hub, tiny, tiny_model, tmp_path):
    """Through the library's own requests, against a server on this machine."""
    address, handler = fake_hub
    there = {"HF_ENDPOINT": address, "HF_TOKEN": "hf_none"}
    code = f"import sys, flowmo; from flowmo.cli import main; name = {str(tiny_model)!r}; "
    code += "print(flowmo.load(name).push_to_hub('someone/flowmo')); sys.exit(main(['push', name, 'someone/refused']))"
    done = python(code, tmp_path / "home", **there)
    assert done.stdout.strip(), done.stderr
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("flowmo: The Hub did not accept someone/refused")
    assert sorted(handler.files) == ["README.md", "model.safetensors"]
    handler.files.clear()
    code = f"from flowmo.cli import main; main(['push', {str(tiny_model)!r}, 'someone/flowmo', '--private'])"
    assert "someone/flowmo exists and is public" in python(code, tmp_path / "home", **there).stderr
    assert not handler.files
    tiny.save_pretrained(tmp_path / "again")
    handler.files |= {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    words = ["train", "--resume-from-ckpt", "someone/flowmo@main", "--results-dir", str(tmp_path), "--device", "cpu"]
    words += [f"data.train={PICTURES}", "data.num_workers=0", "data.batch_size=1", "data.max_microbatch=1"]
    words += ["trainer.duration=1 step", "opt.lpips_weight=0", "model.train=decoder", "trainer.tensorboard=false"]
    code = "import flowmo; from flowmo.cli import main; print(flowmo.load('someone/flowmo').identity()); "
    done = python(f"{code} main({words}); flowmo.load('someone/unknown')", tmp_path / "other", **there)
    assert done.stdout.splitlines()[0] == tiny.identity(), done.stderr
    assert "starts a new run from the weights of" in done.stdout, done.stderr
    assert flowmo.load(tmp_path / "my_experiment").identity() == tiny.identity()
    last = done.stderr.strip().splitlines()[-1]
    assert "CheckpointError: someone/unknown is not a folder, and the Hub did not deliver it" in last


@pytest.mark.parametrize(
    "name", ["../secrets", "a/../b", "a//b", "/etc/passwd", "a/b/c", "a/b@../c", "~/x", "a/b\n", "a b/c"]
)
def test_names_with_path_tricks_are_no_repositories(name, tiny, monkeypatch):
    monkeypatch.setattr(hub, "fetch", lambda name: pytest.fail(f"{name} went to the Hub"))
    with pytest.raises(flowmo.CheckpointError):
        flowmo.load(name)
    with pytest.raises(flowmo.CheckpointError, match="not a name of a repository"):
        hub.push(Path(), name)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(flowmo.CheckpointError, match=r"pip install 'flowmo\[hub\]'"):
        flowmo.load("someone/flowmo")


def test_a_library_that_huggingface_hub_misses_is_named(monkeypatch):
    library = pytest.importorskip("huggingface_hub")

    def download(*_, **__):
        raise ImportError("hf_transfer is not installed")

    monkeypatch.setattr(library, "snapshot_download", download)
    with pytest.raises(flowmo.CheckpointError, match="hf_transfer is not installed"):
        flowmo.load("someone/flowmo")


def test_the_command_writes_a_folder(tiny_model, tmp_path, capsys):
    assert main(["push", str(tiny_model), "someone/flowmo", "--folder", str(tmp_path / "out")]) == 0
    assert "README.md, model.safetensors" in capsys.readouterr().out
    assert "someone/flowmo" in (tmp_path / "out" / "README.md").read_text()


def test_torch_hub(tiny, tiny_model):
    again = torch.hub.load(str(ROOT), "tokenizer", str(tiny_model), source="local")
    assert again.identity() == tiny.identity()


def test_the_command_puts_an_evaluation_into_the_card(tiny_model, tmp_path, capsys):
    metrics, words = tmp_path / "metrics.json", ["push", str(tiny_model), "someone/flowmo", "--evaluation"]
    metrics.write_text('[{"psnr": 20.5, "pictures": 7}]')
    assert main([*words, str(metrics), "--folder", str(tmp_path / "out")]) == 0
    assert "| PSNR (dB) | 20.5 |" in (tmp_path / "out" / "README.md").read_text()
    for content in ("no json", "[]", '{"ssim": null}'):
        metrics.write_text(content)
        assert main([*words, str(metrics), "--folder", str(tmp_path / "other")]) == 2
        assert "flowmo evaluate --json" in capsys.readouterr().err


def test_a_folder_keeps_no_context_model_or_card_of_another(tiny_model, tmp_path, capsys):
    words, folder = ("push", tiny_model, "me/tiny", "--output", tmp_path / "out"), tmp_path / "out"
    folder.mkdir()
    (folder / "model.context.safetensors").write_bytes(b"of another model")
    (folder / "README.md").write_text("of another model")
    (folder / "notes.txt").touch()
    status, _, error = run_command(capsys, *words)
    assert (status, "and 1 more exist already" in error) == (2, True)
    status, out, _ = run_command(capsys, *words, "--force")
    assert (status, out.strip()) == (0, f"{folder}: README.md, model.safetensors")
    assert "me/tiny" in (folder / "README.md").read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.safetensors", "notes.txt"]
    (tmp_path / "deep.json").write_text("[" * 100_000)
    status, _, error = run_command(capsys, *words, "--force", "--evaluation", tmp_path / "deep.json")
    assert (status, "is not the output of flowmo evaluate --json" in error) == (2, True)
