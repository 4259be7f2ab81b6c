"""Optimizers under µP, gradient clipping, norm control, and steps that are skipped because they are not finite.

Whether a step is finite stays a tensor on the device, which the optimizer reads. The host reads counters when it logs.

Everything works on plain tensors and on FSDP2's sharded ones.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from flowmo.config import Config
from flowmo.distributed import World
from flowmo.tokenizer import FlowMo
from flowmo.train.muon import Muon
from flowmo.train.parallel import local

READOUTS = ("picture_out", "code_out")
INPUTS = ("picture_in", "picture_in16", "picture_in8", "picture_in4", "code_in", "time_in", "span_in")
"""Layers whose fan-in does not grow with the network's width."""


def width_multipliers(config: Config) -> dict[str, float]:
    """Return each network's width over µP's base width, or 1 without µP."""
    base = config.opt.mup_base_width if config.model.enable_mup else 0
    widths = {"encoder": config.model.enc_hidden_size, "decoder": config.model.hidden_size}
    return {net: width / base if base else 1.0 for net, width in widths.items()}


@torch.no_grad()
def scale_initial_weights(tokenizer: FlowMo) -> None:
    """Rescale PyTorch's initial weights to µP's (Yang et al. 2022, table 3); at the base width they are equal.

    Readout weights shrink by another 1/√width, and biases no longer shrink with width. With the readout's learning
    rate over width, this equals under Adam the usual output multiplier 1/width, but keeps the network's function, and
    so every checkpoint, as it is.
    """
    multipliers = width_multipliers(tokenizer.config)
    for name, module in tokenizer.named_modules():
        net, _, layer = name.partition(".")
        if not isinstance(module, nn.Linear) or layer in INPUTS:
            continue
        if layer in READOUTS:
            module.weight.mul_(multipliers[net] ** -0.5)
        parts = module.bias.view(-1, module.in_features) if layer.endswith("modulation") else module.bias[None]
        parts[torch.arange(len(parts)) % 3 != 2] *= multipliers[net] ** 0.5  # every third part is a gate: unscaled


def build_optimizers(model: nn.Module) -> list[Optimizer]:
    """Build Adam, and with ``opt.optimizer=muon`` also Muon (Jordan 2024) for the blocks' matrices.

    Muon takes all of them but modulations: linear weights, and a windowed network's tables of position biases.

    Each group's ``scale`` multiplies the learning rate. For Adam it is 1 / width multiplier for matrices that sum over
    a network's width, else 1; for Muon it is ``opt.muon_lr / opt.lr``. Weight decay applies to all weights of a
    tokenizer, as in the release, and to linear layers only in a generator, as in TiTok. Frozen parameters have no
    state. All other state exists at once, so that a checkpoint can be read into it.
    """
    config, opt = model.config, model.config.opt
    multipliers = width_multipliers(config)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    groups: dict[tuple[float, float], list[Tensor]] = {}
    matrices: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if opt.optimizer == "muon" and "block" in name and parameter.ndim == 2 and "modulation" not in name:
            matrices.append(parameter)
            continue
        net, layer = name.split(".")[:2]
        sums_over_width = name in linear and layer not in INPUTS  # a table of positions does not
        scale = 1 / multipliers.get(net, 1.0) if sums_over_width else 1.0
        decay = opt.weight_decay if config.stage != "generator" or name in linear else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    adam = torch.optim.AdamW(
        [{"params": found, "scale": scale, "weight_decay": decay} for (scale, decay), found in groups.items()],
        lr=opt.lr,
        betas=(opt.beta1, opt.beta2),
        fused=True,
    )
    for parameter in (p for parameters in groups.values() for p in parameters):
        adam.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    if not matrices:
        return [adam]
    group = {"params": matrices, "scale": opt.muon_lr / opt.lr}
    half = config.trainer.enable_bfloat16
    return [adam, Muon([group], lr=opt.muon_lr, weight_decay=opt.weight_decay, bfloat16=half)]


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def squared_norms(tensors: Iterable[Tensor]) -> Tensor:
    """Return squared Frobenius norms as one vector, of the full tensors where they are sharded."""
    tensors = list(tensors)
    squares = torch.stack(torch._foreach_norm([local(t).detach() for t in tensors])).square()
    sharded = next((t for t in tensors if isinstance(t, DTensor)), None)
    if sharded is not None:
        dist.all_reduce(squares, group=sharded.device_mesh.get_group())
    return squares


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients to a total norm of at most ``max_norm``; 0 leaves them. Return the norm before."""
    parameters = list(parameters)
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm:
        clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


class NormControl:
    """Resets every linear weight of the blocks to its initial Frobenius norm (section 4.1, after EDM2).

    The paper names the weights of MLP blocks; the release, and this code, take all linear layers of all blocks.

    ``state`` holds the target norms, because a resumed run no longer has the initial weights.

    Args:
        networks: by name, each with ``blocks``.
    """

    def __init__(self, networks: Mapping[str, nn.Module]):
        self.weights = {
            f"{net}.blocks.{name}.weight": module.weight
            for net, network in networks.items()
            for name, module in network.blocks.named_modules()
            if isinstance(module, nn.Linear)
        }
        self.remember()

    def remember(self) -> None:
        """Make the current norms the targets."""
        norms = squared_norms(self.weights.values()).sqrt() if self.weights else ()
        self.state = {name: norm.clone() for name, norm in zip(self.weights, norms, strict=True)}

    @torch.no_grad()
    def apply(self, finite: Tensor) -> None:
        """Reset the norms of the weights that have gradients, unless ``finite``, a scalar on the device, is 0."""
        weights = {name: weight for name, weight in self.weights.items() if weight.grad is not None}
        if weights:
            targets = torch.stack([self.state[name] for name in weights])
            norms = squared_norms(weights.values()).sqrt()
            factors = torch.where((finite > 0) & (norms > 0), targets / norms, 1.0)
            torch._foreach_mul_([local(weight) for weight in weights.values()], list(factors.unbind()))


class StepCounts:
    """Counters of skipped steps, on the device. ``total`` continues a resumed run's count."""

    def __init__(self, world: World, total: int = 0):
        self.world = world
        self.counts = torch.tensor([total, 0, 0], device=world.device)  # total, current streak, longest streak

    def add(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Count a step. Return 1.0 if its loss and gradient norm are finite on every rank, else 0.0."""
        skipped = self.world.sum((~(torch.isfinite(loss) & torch.isfinite(norm))).to(torch.int64)).clamp(max=1)
        total, streak, longest = self.counts.unbind()
        streak = (streak + 1) * skipped
        self.counts = torch.stack((total + skipped, streak, torch.maximum(longest, streak)))
        return (1 - skipped).float()

    def read(self) -> tuple[int, int]:
        """Return the number of skipped steps and the longest streak of them. Waits for the device."""
        total, _, longest = self.counts.tolist()
        return total, longest


@torch.no_grad()
def step_if(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Step the optimizer if ``finite`` is 1; otherwise leave parameters and state unchanged."""
    if isinstance(optimizer, torch.optim.AdamW):  # fused Adam takes the flag itself
        optimizer.grad_scale, optimizer.found_inf = None, 1 - finite
        optimizer.step()
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    state = [value for p in parameters for value in optimizer.state[p].values() if isinstance(value, Tensor)]
    with restored_unless(finite, [*parameters, *state]):
        optimizer.step()


@contextmanager
def restored_unless(finite: Tensor, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Restore the tensors at the end of the context if ``finite`` is 0."""
    before = [tensor.clone() for tensor in tensors]
    yield
    for tensor, value in zip(tensors, before, strict=True):
        tensor.copy_(torch.where(finite > 0, tensor, value))
