"""Metrics of image pairs (``pairs``) and image sets (``fid``, ``sets``), and the registry of feature networks.

To add a feature network, derive from ``FeatureNetwork`` and name the class in ``FEATURE_NETWORKS``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from flowmo.errors import FlowMoError
from flowmo.evaluate.metrics.features import FeatureNetwork, FeatureNetworkError, ResNetFeatures
from flowmo.evaluate.metrics.inception import FIDInception

FEATURE_NETWORKS: dict[str, Callable[..., FeatureNetwork]] = {
    "inception": FIDInception,
    "inception-legacy": partial(FIDInception, protocol="legacy"),
    "resnet": ResNetFeatures,
}
KINDS = ("auto", *FEATURE_NETWORKS, "none")


def build_features(kind: str = "auto", weights: str | Path | None = None) -> FeatureNetwork:
    """Build a feature network.

    Args:
        kind: ``inception`` is FID's network, ``inception-legacy`` the same by the release's protocol (see
            ``FIDInception``), ``resnet`` a stand-in. ``auto`` tries ``inception``, then ``resnet``.
        weights: folder to look for weights in, before FLOWMO_WEIGHTS.

    Raises:
        FeatureNetworkError: packages or weights are missing.
    """
    reasons = []
    for name in ("inception", "resnet") if kind == "auto" else (kind,):
        try:
            return FEATURE_NETWORKS[name](*([weights] if weights else []))
        except FlowMoError as error:
            reasons.append(str(error))
    raise FeatureNetworkError(" ".join(reasons))
