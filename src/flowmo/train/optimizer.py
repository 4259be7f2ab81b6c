"""What turns gradients into weights: Adam and its learning rate, norm control, and the averaged weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowmo.config import Config, OptConfig
from flowmo.tokenizer import FlowMo


def build_optimizer(tokenizer: FlowMo, opt: OptConfig) -> torch.optim.Optimizer:
    """Adam with the paper's betas (0.9, 0.95), decoupled weight decay where there is one."""
    return torch.optim.AdamW(
        tokenizer.parameters(), lr=opt.lr, betas=(opt.beta1, opt.beta2), weight_decay=opt.weight_decay, fused=True
    )


def learning_rate(config: Config, step: int) -> float:
    """Rises over ``warmup_steps``, stays at ``lr``, and falls to 0 over the last ``cooldown`` share of the run."""
    opt, total = config.opt, config.trainer.max_steps
    rise = min(1.0, (step + 1) / max(opt.warmup_steps, 1))
    fall = min(1.0, (total - step) / (opt.cooldown * total)) if opt.cooldown else 1.0
    return opt.lr * rise * max(fall, 0.0)


class NormControl:
    """Puts every linear weight of the blocks back to its initial Frobenius norm (section 4.1, after EDM2).

    The target norms follow from the initial weights, which a resumed run no longer has: ``state`` keeps them.
    """

    def __init__(self, tokenizer: FlowMo):
        self.weights = {
            f"{net}.blocks.{name}.weight": module.weight
            for net in ("encoder", "decoder")
            for name, module in getattr(tokenizer, net).blocks.named_modules()
            if isinstance(module, nn.Linear)
        }
        self.state = {name: weight.detach().norm() for name, weight in self.weights.items()}

    @torch.no_grad()
    def apply(self) -> None:
        weights = [weight for weight in self.weights.values() if weight.requires_grad]
        targets = [self.state[name] for name, weight in self.weights.items() if weight.requires_grad]
        norms = torch._foreach_norm(weights)
        torch._foreach_mul_(weights, torch._foreach_div(targets, norms))


class Average:
    """Exponential moving average of the weights, the ones that are evaluated and shipped.

    ``decay`` counts from one step to the next; early on it is shorter, so that the random start is soon forgotten.
    """

    def __init__(self, tokenizer: FlowMo, decay: float):
        self.decay = decay
        self.state = {name: value.detach().clone() for name, value in tokenizer.state_dict().items()}

    @torch.no_grad()
    def update(self, tokenizer: FlowMo, step: int) -> None:
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        current = tokenizer.state_dict()
        torch._foreach_lerp_(list(self.state.values()), [current[name] for name in self.state], weight)

    def load(self, state: dict[str, Tensor]) -> None:
        for name, value in self.state.items():
            value.copy_(state[name])
