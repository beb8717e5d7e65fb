"""Moskovitz et al.'s (2018) remedies that concern the forward weights, for any algorithm."""

import torch
from torch import Tensor, nn


class Remedies(nn.Module):
    """Holds the norms of forward weights, and turns gradients into their signs.

    Args:
        network: whose weights (not biases, nor the parameters of normalisation layers) are held.
        constrain_norm: keep each weight's norm at its value now.
        batch_manhattan: take the sign of the gradient, of a batch, as the direction of the update.
    """

    def __init__(self, network: nn.Module, constrain_norm: bool, batch_manhattan: bool) -> None:
        super().__init__()
        self.batch_manhattan = batch_manhattan
        names = [name for name, weight in network.named_parameters() if constrain_norm and weight.dim() > 1]
        self.held = names
        norms = [network.get_parameter(name).detach().norm() for name in names]
        self.register_buffer("norms", torch.stack(norms) if norms else torch.zeros(0))
        self.norms: Tensor

    def direction(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradients, or their signs (Batch Manhattan; Liao et al., 2016)."""
        if not self.batch_manhattan:
            return gradients
        return {name: gradient.sign() for name, gradient in gradients.items()}

    @torch.no_grad()
    def hold_norms(self, network: nn.Module) -> None:
        """Scale the held weights back to their norms, in place: the optimizer keeps its tensors."""
        for name, norm in zip(self.held, self.norms, strict=True):
            weight = network.get_parameter(name)
            weight.mul_(norm / weight.norm())
