"""For ``torch.hub.load("OWNER/flowmo", "tokenizer", "nano")``."""

import sys
from pathlib import Path

dependencies = ["torch", "numpy", "PIL", "yaml", "safetensors"]
sys.path.insert(0, str(Path(__file__).parent / "src"))


def tokenizer(source: str = "nano", *overrides: str, device: str = "cpu"):
    """A trained tokenizer, as ``flowmo.load`` gives it: a bundled preset, a file, or a Hugging Face Hub id."""
    import flowmo

    return flowmo.load(source, *overrides, device=device)
