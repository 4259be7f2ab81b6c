"""Import torchvision next to any build of torch.

Package indices ship a torchvision built for CUDA. Next to a CPU build of torch it cannot be imported, nor can
``lpips``, ``torch-fidelity`` and ``transformers``, because two of its operators are not registered. Registering their
names is enough; nothing here calls them.
"""

import importlib
from importlib.util import find_spec
from types import ModuleType

import torch

from flowmo.errors import FlowMoError, one_line

_registered: list[torch.library.Library] = []  # an operator lives as long as its library object


class TorchvisionError(FlowMoError, ImportError):
    """torchvision is not installed, or its import fails."""


def import_torchvision() -> ModuleType:
    """Import torchvision. Raises ``TorchvisionError`` if it is not installed or fails for a reason of its own."""
    try:
        return importlib.import_module("torchvision")
    except ImportError:
        raise TorchvisionError("This needs torchvision: pip install 'flowmo[evaluate]'.") from None
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise TorchvisionError(f"torchvision cannot be imported: {one_line(error)}.") from None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _registered.append(library)
    return importlib.import_module("torchvision")


def before_importing(package: str) -> None:
    """Import torchvision first if ``package`` is installed and would import it."""
    if find_spec(package) and find_spec("torchvision"):
        import_torchvision()
