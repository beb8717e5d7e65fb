"""Mirrors: the feedback operator ``G^n`` of each kind of stage, with feedback weights of its own.

A mirror is called as ``mirror(y, switches)`` and maps ``[batch, *stage.output_shape]`` back to
``[batch, *stage.input_shape]``. Its weight has the layout of the forward weight, so that ``mirror.weight ==
stage.weight`` is the symmetric case (``G = F^T`` on a linear stage). Two forms:

- ``paper`` (Ernoult et al., 2022): unpool -> activation -> transposed convolution, as its authors have it.
- ``exact`` (ours): ``G(y) = convT(P^T(phi(y)); V) + bias`` with the true transpose of max-pooling and the matched
  activation ``phi`` (`bioprop.functional.activations`). With ``V = W`` its Jacobian is ``J_F^T`` exactly.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import singledispatch
from math import prod
from operator import attrgetter
from types import MappingProxyType
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bioprop.errors import UserError
from bioprop.functional.activations import MirrorName, find_activation
from bioprop.functional.pooling import Places, Pool, locate, unpool
from bioprop.networks.layers import ConvLayer, FeedbackLayer, FeedbackLayers, LinearLayer, unread_border
from bioprop.networks.stages import ConvStage, LayerStage, LinearStage, Stage, StagePass, Switches


class Mirror(nn.Module, ABC):
    """Feedback operator of one stage. Its parameters are the feedback weights, and biases named ``bias``."""

    #: Name of the forward weight within the stage, by the name of the feedback weight that is its counterpart.
    counterparts: Mapping[str, str]

    def pairs(self, stage: Stage) -> list[tuple[Tensor, Tensor]]:
        """Return each forward weight of the stage with the feedback weight that is its counterpart."""
        return [(attrgetter(forward)(stage), getattr(self, own)) for own, forward in self.counterparts.items()]

    @abstractmethod
    def forward(self, outputs: Tensor, switches: Switches) -> Tensor:
        """Compute ``G(outputs)``, ``[batch, *output_shape]`` to ``[batch, *input_shape]``.

        Args:
            outputs: activations of the stage, or targets for them.
            switches: those of the pass that made the stage's activations.
        """

    @abstractmethod
    def difference(self, outputs: Tensor, step: Tensor, switches: Switches) -> Tensor:
        """Compute ``G(outputs + step) - G(outputs)``."""

    #: Whether the operator is made of several layers, one after another.
    is_composed = False

    def layers(self, stage: Stage, clean: StagePass) -> FeedbackLayers | None:
        """Return the layers of the operator with their counterparts in the stage; None for others than those.

        Args:
            stage: that of the mirror.
            clean: its pass of the batch.
        """
        return None

    def difference_parameters(self) -> dict[str, Tensor]:
        """Return the parameters that a difference of ``G`` depends on, by name: biases cancel."""
        return {name: parameter for name, parameter in self.named_parameters() if name != "bias"}


class LayerMirror(Mirror):
    """Mirror of a stage of one layer, linear in its own weights after the activation ``phi``.

    Attributes:
        weight: feedback weight ``V``, in the layout of the stage's forward weight; drawn independently of it.
        bias: one value per input unit or channel, where the stage has a bias. It cancels in every difference of
            ``G``, so only methods that train by plain reconstruction move it.
        activation: of the stage, with the feedback activation ``phi``.
        pool: that of the stage, or None.
        map_size: height and width before pooling; empty for a linear layer.
    """

    counterparts: Mapping[str, str] = MappingProxyType({"weight": "weight"})
    pool: Pool | None = None
    map_size: tuple[int, ...] = ()

    def __init__(self, stage: LayerStage, form: MirrorName) -> None:
        super().__init__()
        self.form = form
        self.input_shape = stage.input_shape
        self.activation = find_activation(stage.activation, form)
        self.weight = nn.Parameter(torch.empty_like(stage.weight))
        self.bias = nn.Parameter(torch.empty(stage.input_shape[0])) if stage.bias is not None else None

    def _draw(self, paper_fan_in: int) -> None:
        """Draw all parameters uniformly in +-1/sqrt(fan_in).

        ``paper`` takes the fan-in of torch's own transposed layers, as its authors do. ``exact`` takes that of the
        forward weight, so that feedback starts at the size of ``F^T``: linear mirrors of the other kind start
        sqrt(in/out) times larger, which made the first updates of lower stages 7 times the gradient's on LeNet.
        """
        forward_fan_in = self.weight[0].numel()
        bound = (paper_fan_in if self.form == "paper" else forward_fan_in) ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def features(self, outputs: Tensor, switches: Switches) -> Tensor:
        """Compute the features that the feedback weights are applied to, the unpooled ``phi(outputs)``.

        Every ``phi`` is 0 at 0, so that it may be applied before unpooling, to fewer values.
        """
        return self.unpool(self.activation.phi(outputs), self.locate(switches))

    @abstractmethod
    def project(self, features: Tensor, bias: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """Apply the feedback weights, or another ``weight`` of their shape: the part of ``G`` that is linear."""

    def layers(self, stage: Stage, clean: StagePass) -> FeedbackLayers | None:
        """Return the one layer; None in subclasses, which may compute something else, and of a stage without products.

        Args:
            stage: that of the mirror.
            clean: its pass of the batch.
        """
        inputs, affine, output, switches = clean
        if affine is None or type(self) not in (LinearMirror, ConvMirror) or not isinstance(stage, LayerStage):
            return None
        layer = cast(LinearLayer | ConvLayer, stage.get_submodule(stage.layer_name))
        if isinstance(layer, LinearLayer):
            inputs = inputs.flatten(1)
        places, slope = self.locate(switches), self.activation.slope(output)
        if places is not None and places.kept is not None:
            slope = slope * places.kept
        batch = inputs, affine, output, layer.weight.detach(), self.weight, self.activation.phi(output), slope
        pooling = self.pool, places, self.form == "paper"
        found = FeedbackLayer("weight", layer, self.activation, *batch, *pooling)
        return FeedbackLayers([found], [tuple(inputs.shape), tuple(output.shape)])

    def locate(self, switches: Switches) -> Places | None:
        """Say where pooled values go back to, by the rule of the mirror's form; None without pooling."""
        if self.pool is None:
            return None
        if switches is None:
            raise ValueError("the mirror of a pooled stage needs the switches of the pass that made its input")
        return locate(switches, self.pool, self.form == "paper")

    def unpool(self, pooled: Tensor, places: Places | None) -> Tensor:
        """Put pooled values back to their places, ``[batch, out_channels, *map_size]``."""
        return pooled if places is None or self.pool is None else unpool(pooled, places, self.pool, self.map_size)

    def forward(self, outputs: Tensor, switches: Switches) -> Tensor:
        """Compute ``G(outputs)``, ``[batch, *output_shape]`` to ``[batch, *input_shape]``.

        Args:
            outputs: activations of the stage, or targets for them.
            switches: those of the pass that made the stage's activations; None without pooling.
        """
        return self.project(self.features(outputs, switches), self.bias)

    def difference(self, outputs: Tensor, step: Tensor, switches: Switches) -> Tensor:
        """Compute ``G(outputs + step) - G(outputs)`` with the weights applied once, to the difference.

        In float32 this keeps digits that subtracting two projections loses: on LeNet's conv1, symmetric, with beta
        1e-3, the part of the angle to BP that is due to rounding was 0.35 degrees instead of 2.1.
        """
        return self.project(self._features_change(outputs, step, switches))

    def _features_change(self, outputs: Tensor, step: Tensor, switches: Switches) -> Tensor:
        """Compute ``features(outputs + step) - features(outputs)``."""
        if type(self).features is not LayerMirror.features:  # a user's own need not be linear in phi
            return self.features(outputs + step, switches) - self.features(outputs, switches)
        phi = self.activation.phi
        return self.unpool(phi(outputs + step) - phi(outputs), self.locate(switches))


class LinearMirror(LayerMirror):
    """``G(y) = V^T phi(y) + bias``, shaped back like the stage's input; ``V`` is ``[out_features, in_features]``."""

    def __init__(self, stage: LinearStage, form: MirrorName) -> None:
        super().__init__(stage, form)
        features = prod(stage.input_shape)
        if self.bias is not None:
            self.bias = nn.Parameter(torch.empty(features))
        self._draw(paper_fan_in=stage.output_shape[0])

    def project(self, features: Tensor, bias: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """Map ``[batch, out_features]`` to ``[batch, *input_shape]``."""
        weight = self.weight if weight is None else weight
        return F.linear(features, weight.t(), bias).view(-1, *self.input_shape)


class ConvMirror(LayerMirror):
    """Transposed convolution of the unpooled maps; ``V`` is ``[out_channels, in_channels, kernel, kernel]``.

    Raises:
        UserError: if a user's convolution has groups or dilation.
    """

    def __init__(self, stage: ConvStage, form: MirrorName) -> None:
        for name, given in (("groups", stage.conv.groups), ("dilation", max(stage.conv.dilation))):
            if given > 1:
                raise UserError(f"{name} of a conv stage is {given}, which its feedback mirror does not carry: use 1")
        super().__init__(stage, form)
        self.pool, self.map_size = stage.pool, stage.map_size
        (self.stride, _), (self.padding, _) = stage.conv.stride, (int(p) for p in stage.conv.padding)
        self.output_padding = unread_border(stage.conv, stage.input_shape[1:], stage.map_size)
        self._draw(paper_fan_in=self.weight[0].numel())
        self.to(memory_format=torch.channels_last)

    def project(self, features: Tensor, bias: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """Map ``[batch, out_channels, *map_size]`` to ``[batch, *input_shape]``."""
        weight = self.weight if weight is None else weight
        return F.conv_transpose2d(features, weight, bias, self.stride, self.padding, self.output_padding)


@singledispatch
def build_mirror(stage: Stage, form: MirrorName) -> Mirror:
    """Build the mirror of a stage, chosen by the kind of stage; register new kinds with ``@build_mirror.register``.

    Raises:
        UserError: if the kind of stage has no mirror.
    """
    kinds = ", ".join(sorted(kind.__name__ for kind in build_mirror.registry if kind is not object))
    raise UserError(f"a {type(stage).__name__} has no feedback mirror: target propagation needs stages among {kinds}")


@build_mirror.register
def _(stage: LinearStage, form: MirrorName) -> Mirror:
    return LinearMirror(stage, form)


@build_mirror.register
def _(stage: ConvStage, form: MirrorName) -> Mirror:
    return ConvMirror(stage, form)
