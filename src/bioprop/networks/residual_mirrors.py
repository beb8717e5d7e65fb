"""Mirrors of the stages of residual networks.

The mirror of a block follows its residual path back, here without batch norm:

- ``exact`` (ours): ``G(y) = S^T phi(y) + V1^T (slope o V2^T phi(y)) + bias``, with the matched outer activation ``phi``
  (`bioprop.functional.activations`), transposed convolutions ``V1^T``, ``V2^T``, the transposed shortcut ``S^T`` (the
  identity, or a convolution with feedback weights of its own), and ``slope`` the derivative of the inner activation in
  the clean pass, which the pass hands out as a value. With the forward weights for ``V`` it is ``J_G = J_F^T`` exactly.
- ``paper`` (the program of Ernoult et al., 2022): ``G(y) = S^T u + V1^T rho(V2^T u) + bias`` with ``u = rho(y)``. It
  knows nothing of the clean pass's inner activations. Here it deviates from theirs in three points: their unit of
  credit assignment is a group of blocks; without batch norm, neither their block and stem convolutions nor their
  feedback layers between the two ends of a block have biases, while our forward convolutions do; and batch norm (below)
  has parameters and statistics of its own there.

**Batch norm.** In training mode its mean and variance are functions of the batch, so a stage maps the whole batch to
the whole batch, and the theory holds for that map: a mirror passes differences back through the transpose of batch
norm's own Jacobian, which takes out what the statistics absorb (`bioprop.functional.batch_norm`), with the scale and
the normalised activations of the clean pass as values. Then ``J_G = J_F^T`` for the batch as one input, and the update
tends to the BP gradient of the very network that is trained. In evaluation mode the statistics are constants, batch
norm is a factor for each channel, and everything holds for each sample on its own. Holding the statistics fixed in
training mode too would be another method: below the output of a ResNet-14 with ELU, on CIFAR-10, its update was 24 to
66 degrees from BP's at each stage.
The running statistics belong to the clean pass: feedback training leaves them as they are.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bioprop.functional.activations import ACTIVATIONS, Activation, MirrorName, find_activation
from bioprop.functional.batch_norm import NormPass, transposed_norm
from bioprop.networks.layers import ConvLayer, FeedbackLayer, FeedbackLayers, LinearLayer, unread_border
from bioprop.networks.mirrors import Mirror, build_mirror
from bioprop.networks.resnet import BasicBlockStage, BlockPass, PooledLinearStage, StemPass, StemStage
from bioprop.networks.stages import Stage, StagePass, Switches


class BlockMirror(Mirror):
    """Mirror of a `BasicBlockStage`; each weight ``[out_channels, in_channels, kernel, kernel]``, as its counterpart.

    Args:
        stage: the block.
        form: ``exact`` or ``paper``.
    """

    is_composed = True
    counterparts: dict[str, str]

    def __init__(self, stage: BasicBlockStage, form: MirrorName) -> None:
        super().__init__()
        self.form = form
        self.activation = find_activation(stage.activation, form)
        self.stride = stage.conv1.stride
        # the shortcut's 1x1 kernel without padding leaves as many rows and columns unread as the 3x3 one with it
        self.unread = unread_border(stage.conv1, stage.input_shape[1:], stage.output_shape[1:])
        self.conv1_weight, self.conv2_weight = _draw(stage.conv1.weight), _draw(stage.conv2.weight)
        shortcut = stage.shortcut_conv
        self.shortcut_weight = None if shortcut is None else _draw(shortcut.weight)
        self.bias = _draw_bias(stage.conv1.weight)
        self.counterparts = {"conv1_weight": "conv1.weight", "conv2_weight": "conv2.weight"}
        if shortcut is not None:
            self.counterparts["shortcut_weight"] = "shortcut.0.weight"

    def forward(self, outputs: Tensor, switches: Switches) -> Tensor:
        """Compute ``G(outputs)``; ``switches`` is the `BlockPass` of the pass that made the stage's activations."""
        return self._back(self.activation.phi(outputs), switches) + self.bias.view(-1, 1, 1)

    def difference(self, outputs: Tensor, step: Tensor, switches: Switches) -> Tensor:
        """Compute ``G(outputs + step) - G(outputs)``: nothing but differences is led back."""
        before = self.activation.phi(outputs)
        change = self.activation.phi(outputs + step) - before
        branch = self._inner(change, switches)
        if self.form == "paper":
            around = self._inner(before, switches)
            branch = self.activation.rho(around + branch) - self.activation.rho(around)
        return self._outer(change, branch, switches)

    def _back(self, features: Tensor, clean: BlockPass) -> Tensor:
        branch = self._inner(features, clean)
        return self._outer(features, branch if self.form == "exact" else self.activation.rho(branch), clean)

    def _inner(self, features: Tensor, clean: BlockPass) -> Tensor:
        """Lead back to between the convolutions; ``exact`` through the slope there. Linear in the features."""
        branch = F.conv_transpose2d(transposed_norm(features, clean.norm2), self.conv2_weight, padding=1)
        return clean.slope * branch if self.form == "exact" else branch

    def _outer(self, features: Tensor, branch: Tensor, clean: BlockPass) -> Tensor:
        """Lead back from there, and across the shortcut. Linear in the features and the branch."""
        branch = transposed_norm(branch, clean.norm1)
        branch = F.conv_transpose2d(branch, self.conv1_weight, None, self.stride, 1, self.unread)
        if self.shortcut_weight is None:
            return features + branch
        across = transposed_norm(features, clean.norm_shortcut)
        return branch + F.conv_transpose2d(across, self.shortcut_weight, None, self.stride, 0, self.unread)

    def layers(self, stage: Stage, clean: StagePass) -> FeedbackLayers:
        """Return the convolutions: noise enters at the block's input, between its convolutions, and at its output."""
        block, values = cast(BasicBlockStage, stage), cast(BlockPass, clean.switches)
        inner, linear = self.activation.rho(values.affine), _linear(clean.output)
        around = self.activation, values.affine
        layers = [
            _feedback_layer(
                "conv1_weight", block.conv1, self.conv1_weight, clean.inputs, values.norm1, (0, 1), *around
            ),
            _feedback_layer("conv2_weight", block.conv2, self.conv2_weight, inner, values.norm2, (1, 2), *linear),
        ]
        if block.shortcut_conv is not None and self.shortcut_weight is not None:
            shortcut, weight, norm = block.shortcut_conv, self.shortcut_weight, values.norm_shortcut
            layers.append(_feedback_layer("shortcut_weight", shortcut, weight, clean.inputs, norm, (0, 2), *linear))
        return FeedbackLayers(layers, [tuple(clean.inputs.shape), tuple(inner.shape), tuple(clean.output.shape)])


class PooledLinearMirror(Mirror):
    """``G(y) = V^T y / positions + bias`` at every position: the transposed mean over positions spreads evenly.

    Both forms are this; the authors of ``paper`` spread without dividing.

    Args:
        stage: the output stage; ``V`` is ``[out_features, channels]``.
        form: ``exact`` or ``paper``.
    """

    counterparts: Mapping[str, str] = MappingProxyType({"weight": "linear.weight"})

    def __init__(self, stage: PooledLinearStage, form: MirrorName) -> None:
        super().__init__()
        find_activation("identity", form)  # refuses what is neither
        self.size = stage.input_shape[1:]
        self.weight = _draw(stage.linear.weight)
        self.bias = _draw_bias(stage.linear.weight)

    def forward(self, outputs: Tensor, switches: Switches) -> Tensor:
        """Compute ``G(outputs)``, ``[batch, out_features]`` to ``[batch, channels, height, width]``."""
        return self._spread(outputs) + self.bias.view(-1, 1, 1)

    def difference(self, outputs: Tensor, step: Tensor, switches: Switches) -> Tensor:
        """Compute ``G(outputs + step) - G(outputs)``, whatever the outputs."""
        return self._spread(step)

    def _spread(self, outputs: Tensor) -> Tensor:
        back = F.linear(outputs, self.weight.t()) / (self.size[0] * self.size[1])
        return back[:, :, None, None].expand(-1, -1, *self.size)

    def layers(self, stage: Stage, clean: StagePass) -> FeedbackLayers:
        """Return the linear layer.

        Noise of size ``sigma`` at every position has a mean of size ``sigma / sqrt(positions)``; drawing that mean
        times the root, at size ``sigma``, and dividing the loss by the number of positions is the same.
        """
        linear, share = cast(PooledLinearStage, stage).linear, 1.0 / (self.size[0] * self.size[1])
        inputs = clean.inputs.mean((2, 3))
        layer = _feedback_layer("weight", linear, self.weight, inputs, None, (0, 1), *_linear(clean.output), share)
        return FeedbackLayers([layer], [tuple(clean.inputs.shape[:2]), tuple(clean.output.shape)])


class StemMirror(Mirror):
    """``G(y) = V^T phi(y) + bias`` through the transposed batch norm, for stems that are not the first stage.

    Args:
        stage: convolution, batch norm, activation; ``V`` is ``[out_channels, in_channels, 3, 3]``.
        form: ``exact`` or ``paper``.
    """

    counterparts: Mapping[str, str] = MappingProxyType({"weight": "conv.weight"})

    def __init__(self, stage: StemStage, form: MirrorName) -> None:
        super().__init__()
        self.activation = find_activation(stage.activation, form)
        self.weight = _draw(stage.conv.weight)
        self.bias = _draw_bias(stage.conv.weight)

    def forward(self, outputs: Tensor, switches: Switches) -> Tensor:
        """Compute ``G(outputs)``; ``switches`` is the `StemPass` of the pass that made the stage's activations."""
        return self._back(self.activation.phi(outputs), switches) + self.bias.view(-1, 1, 1)

    def difference(self, outputs: Tensor, step: Tensor, switches: Switches) -> Tensor:
        """Compute ``G(outputs + step) - G(outputs)``."""
        return self._back(self.activation.phi(outputs + step) - self.activation.phi(outputs), switches)

    def _back(self, features: Tensor, clean: StemPass) -> Tensor:
        return F.conv_transpose2d(transposed_norm(features, clean.norm), self.weight, padding=1)

    def layers(self, stage: Stage, clean: StagePass) -> FeedbackLayers:
        """Return the convolution."""
        stem, values = cast(StemStage, stage), cast(StemPass, clean.switches)
        around = self.activation, values.affine
        layer = _feedback_layer("weight", stem.conv, self.weight, clean.inputs, values.norm, (0, 1), *around)
        return FeedbackLayers([layer], [tuple(clean.inputs.shape), tuple(clean.output.shape)])


def _linear(affine: Tensor) -> tuple[Activation, Tensor]:
    """Of a layer without activation, in which changes are the same around zero: no pass is needed."""
    return ACTIVATIONS["identity"], affine.new_zeros(()).expand(affine.shape)


def _feedback_layer(
    name: str,
    layer: nn.Module,
    feedback: Tensor,
    inputs: Tensor,
    norm: NormPass | None,
    noise: tuple[int, int],
    activation: Activation,
    affine: Tensor,
    share: float = 1.0,
) -> FeedbackLayer:
    """Around the clean pass, batch norm is a factor for each channel: the minimiser ``V = W`` is the same."""
    layer = cast(LinearLayer | ConvLayer, layer)
    scale = None if norm is None else norm.scale
    forward = layer.weight.detach()
    forward = forward if scale is None else forward * scale.view(-1, 1, 1, 1)
    output = activation.rho(affine)
    batch = inputs, affine, output, forward, feedback, activation.phi(output), activation.slope(output)
    given = {"scale": scale, "share": share, "input_noise": noise[0], "output_noise": noise[1]}
    return FeedbackLayer(name, layer, activation, *batch, **given)  # type: ignore[arg-type]


def _draw(weight: Tensor) -> nn.Parameter:
    """Draw a feedback weight uniformly in +-1/sqrt(fan_in) of its forward weight, whose size it then starts at."""
    bound = weight[0].numel() ** -0.5
    return nn.Parameter(nn.init.uniform_(torch.empty_like(weight), -bound, bound))


def _draw_bias(weight: Tensor) -> nn.Parameter:
    """Draw a bias for each channel of the inputs, in the same bounds."""
    bound = weight[0].numel() ** -0.5
    return nn.Parameter(torch.empty(weight.shape[1], dtype=weight.dtype).uniform_(-bound, bound))


@build_mirror.register
def _(stage: BasicBlockStage, form: MirrorName) -> Mirror:
    return BlockMirror(stage, form)


@build_mirror.register
def _(stage: PooledLinearStage, form: MirrorName) -> Mirror:
    return PooledLinearMirror(stage, form)


@build_mirror.register
def _(stage: StemStage, form: MirrorName) -> Mirror:
    return StemMirror(stage, form)
