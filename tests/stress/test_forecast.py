"""Forecasts of memory at the paper's size."""

from conftest import ROOT

from flowmo import Config
from flowmo.train.cost import training_memory
from flowmo.train.schedule import BatchPlan


def test_stage_1b_of_lo_fits_its_cards():
    """8 processes share a batch of 64: the plan takes micro-batches of 8 on 80 GiB, of 2 on 40 GiB."""
    config = Config.from_yaml(ROOT / "configs" / "lo_posttrain.yaml")
    memory = training_memory(config, freeze_encoder=True)
    for card, microbatch in ((80, 8), (40, 2)):
        plan = BatchPlan.of(config, 8, memory.max_images(card * 2**30))
        assert plan.microbatch == microbatch
        assert memory.peak_bytes(plan.microbatch) < 0.9 * card * 2**30
