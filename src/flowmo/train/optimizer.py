"""What turns gradients into weights: Adam under µP, and norm control.

Every class here works on plain tensors and on the sharded ones of FSDP2 alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flowmo.config import Config, ConfigError
from flowmo.tokenizer import FlowMo
from flowmo.train.finite import step_if

READOUTS = ("picture_out", "code_out")
INPUTS = ("picture_in", "code_in", "time_in", "span_in")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def width_multipliers(config: Config) -> dict[str, float]:
    """Width of each network over µP's base width; 1 where nothing is scaled."""
    base = config.opt.mup_base_width if config.model.enable_mup else 0
    widths = {"encoder": config.model.enc_hidden_size, "decoder": config.model.hidden_size}
    return {net: width / base if base else 1.0 for net, width in widths.items()}


def is_wide(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix that sums over a network's width: every one but the input layers'."""
    return parameter.ndim == 2 and name.split(".")[1] not in INPUTS


@torch.no_grad()
def scale_initial_weights(tokenizer: FlowMo) -> None:
    """Turn PyTorch's fresh weights into µP's (Yang et al. 2022, table 3), which are PyTorch's at the base width.

    A readout's weights shrink by another 1/sqrt(width) and biases stop shrinking with width. With the readout's
    learning rate over width in ``build_optimizer`` this equals the usual multiplier 1/width on its output under Adam,
    but leaves the network's function, and so every checkpoint, alone.
    """
    multipliers = width_multipliers(tokenizer.config)
    for name, module in tokenizer.named_modules():
        net, _, layer = name.partition(".")
        if not isinstance(module, nn.Linear) or layer in INPUTS:
            continue
        if layer in READOUTS:
            module.weight.mul_(multipliers[net] ** -0.5)
        parts = module.bias.view(-1, module.in_features) if layer.endswith("modulation") else module.bias[None]
        parts[torch.arange(len(parts)) % 3 != 2] *= multipliers[net] ** 0.5  # gates start at a value of their own


class Together:
    """Several optimizers of different parameters, used as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.state = {p: state for optimizer in optimizers for p, state in optimizer.state.items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def step_all(optimizer: torch.optim.Optimizer | Together, finite: Tensor) -> None:
    """Step every optimizer where ``finite`` is 1, see ``flowmo.train.finite.step_if``."""
    for one in optimizer.optimizers if isinstance(optimizer, Together) else (optimizer,):
        step_if(one, finite)


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer | Together:
    """Adam with the paper's betas (0.9, 0.95), decoupled weight decay where there is one, µP's learning rates; with
    ``opt.optimizer=muon`` Muon (Jordan 2024) in its place for the matrices that blocks multiply their tokens with.

    Each group's ``scale`` is its share of the learning rate. Adam's is 1 / multiplier of the width for matrices that
    sum over the width, 1 for the rest and for a generator; Muon's is ``opt.muon_lr`` over ``opt.lr``, whatever the
    width. Weight decay is for every weight of a tokenizer, as in the release, and for a generator's linear maps alone,
    as in TiTok. All state exists from the start, so that a checkpoint can be read into it.

    Raises:
        ConfigError: this PyTorch has no Muon.
    """
    opt = model.config.opt
    groups: dict[tuple[float, float], list[Tensor]] = {}
    matrices: list[Tensor] = []
    multipliers = width_multipliers(model.config)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, parameter in model.named_parameters():
        if opt.optimizer == "muon" and "block" in name and parameter.ndim == 2 and "modulation" not in name:
            matrices.append(parameter)
            continue
        multiplier = multipliers.get(name.partition(".")[0], 1.0)
        scale = 1 / multiplier if is_wide(name, parameter) else 1.0
        decay = opt.weight_decay if model.config.stage != "generator" or name in linear else 0.0
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
        return adam
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(f"opt.optimizer=muon needs PyTorch 2.9 or newer, not {torch.__version__}; write adam")
    group = {"params": matrices, "scale": opt.muon_lr / opt.lr}
    muon = torch.optim.Muon([group], lr=opt.muon_lr, weight_decay=opt.weight_decay)
    for parameter in matrices:
        muon.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
    return Together(adam, muon)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def squared_norms(tensors: Iterable[Tensor]) -> Tensor:
    """Squared Frobenius norms as one vector, of whole tensors where they are sharded."""
    tensors = list(tensors)
    squares = torch.stack(torch._foreach_norm([local(t).detach() for t in tensors])).square()
    sharded = next((t for t in tensors if isinstance(t, DTensor)), None)
    if sharded is not None:
        dist.all_reduce(squares, group=sharded.device_mesh.get_group())
    return squares


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], longest: float) -> Tensor:
    """Scale all gradients so that their common norm is at most ``longest`` (0: leave them); the norm as it was."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = squared_norms(gradients).sum().sqrt()
    if longest:
        torch._foreach_mul_([local(g) for g in gradients], (longest / (norm + 1e-6)).clamp(max=1.0))
    return norm


class NormControl:
    """Puts every linear weight of the blocks back to its initial Frobenius norm (section 4.1, after EDM2).

    The target norms follow from the initial weights, which a resumed run no longer has: ``state`` keeps them.

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
        """Take the norms that the weights have now as those to keep."""
        norms = squared_norms(self.weights.values()).sqrt() if self.weights else ()
        self.state = {name: norm.clone() for name, norm in zip(self.weights, norms, strict=True)}

    @torch.no_grad()
    def apply(self, finite: Tensor | None = None) -> None:
        """Reset the norms; where ``finite``, a number on the device, is 0, weights stay as they are, to the bit."""
        weights = {name: weight for name, weight in self.weights.items() if weight.grad is not None}
        if weights:
            targets = torch.stack([self.state[name] for name in weights])
            factors = targets / squared_norms(weights.values()).sqrt()
            if finite is not None:
                factors = torch.where(finite > 0, factors, 1.0)
            torch._foreach_mul_([local(weight) for weight in weights.values()], list(factors.unbind()))
