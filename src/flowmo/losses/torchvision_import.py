"""torchvision beside any torch.

Package indices hold a torchvision that was built for CUDA. Beside a torch without CUDA it does not import, and neither
does what imports it (``lpips``, ``torch-fidelity``, ``transformers`` where torchvision is installed), because two of
its operators are then never registered. Registering their names is enough; nothing here calls them.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from types import ModuleType

import torch

from flowmo.errors import FlowMoError

OPERATORS = ("nms", "qnms")
_registered: list[torch.library.Library] = []  # names last as long as the object that they were defined through


class TorchvisionError(FlowMoError, ImportError):
    """torchvision is not installed, or does not import."""


def import_torchvision() -> ModuleType:
    """torchvision, also one that was built for CUDA beside a torch that was not.

    Raises:
        TorchvisionError: it is not installed, or does not import for another reason.
    """
    try:
        return importlib.import_module("torchvision")
    except ImportError:
        raise TorchvisionError("this needs torchvision: pip install 'flowmo[evaluate]'") from None
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise TorchvisionError(f"torchvision does not import: {' '.join(str(error).split())[:150]}") from None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in OPERATORS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _registered.append(library)
    return importlib.import_module("torchvision")


def before_importing(package: str) -> None:
    """To be called before ``package`` is imported, which imports torchvision where that is installed."""
    if find_spec(package) and find_spec("torchvision"):
        import_torchvision()
