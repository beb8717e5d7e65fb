"""A network: a chain of named stages, usable as a plain module."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, overload

from torch import Tensor, nn

from bioprop.errors import UserError
from bioprop.functional.activations import ActivationName
from bioprop.functional.pooling import Pool
from bioprop.hyperparameters import collect_hyperparameters
from bioprop.networks.stages import ConvStage, Stage

ImageShape = tuple[int, int, int]


if TYPE_CHECKING:
    AnyModule = nn.Module
else:

    class AnyModule(ABC):
        """Any torch module: the type of a network argument that needs no chain of stages.

        On the command line it takes every ``nn.Module`` by dotted path, but lists and knows by their bare names those
        alone that inherit from it, which are the `Network` classes: torch and other libraries have hundreds of modules.
        """

        @abstractmethod
        def forward(self, input: Tensor) -> Tensor:
            """Compute logits ``[batch, classes]`` for images ``[batch, channels, height, width]``."""

    AnyModule.register(nn.Module)


class Network(nn.Sequential, AnyModule):
    """``nn.Sequential`` of stages: ``logits = network(images)``.

    Stages are counted from the input. The constructor arguments of a subclass are kept as plain data, so that a
    checkpoint can build the network again.

    Args:
        stages: the stages by name, from the input to the logits.
        settings: the constructor arguments, where they are not those that the subclass was called with.

    Attributes:
        settings: the constructor arguments by name, as plain data (numbers, strings, lists).

    Raises:
        UserError: if a stage is none, or does not take what the one below it hands out.
    """

    settings: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Keep the arguments as they come."""
        made = super().__new__(cls)
        made.__dict__["_made_with"] = args, kwargs
        return made

    def __init__(self, stages: Mapping[str, Stage], settings: Mapping[str, Any] | None = None) -> None:
        args, kwargs = self.__dict__.pop("_made_with")
        below: tuple[str, Stage] | None = None
        for name, stage in stages.items():
            if not isinstance(stage, Stage):
                raise UserError(
                    f"{name} is a {type(stage).__name__}, but a Network is a chain of stages: make it part of one, or "
                    "subclass bioprop.networks.Stage"
                )
            if below and tuple(below[1].output_shape) != tuple(stage.input_shape):
                raise UserError(
                    f"stage {name} takes inputs of shape {tuple(stage.input_shape)}, but {below[0]} hands out "
                    f"{tuple(below[1].output_shape)}"
                )
            below = (name, stage)
        super().__init__(OrderedDict(stages))
        self._objects: dict[str, Any] = {}
        if settings is None and type(self) is not Network:
            settings, self._objects, _ = collect_hyperparameters(self, args, kwargs, ())
        self.settings = dict(settings or {})

    def stages(self) -> list[tuple[str, Stage]]:
        """Names and stages, from the input to the output."""
        return [(name, stage) for name, stage in self.named_children() if isinstance(stage, Stage)]

    @overload
    def __getitem__(self, idx: slice) -> nn.Sequential: ...
    @overload
    def __getitem__(self, idx: int) -> nn.Module: ...
    def __getitem__(self, idx: slice | int) -> nn.Module:
        """Return a stage, or a plain ``nn.Sequential`` of some of them."""
        if isinstance(idx, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)

    def forward(self, input: Tensor) -> Tensor:
        """Compute logits ``[batch, classes]`` for images ``[batch, channels, height, width]``."""
        logits: Tensor = super().forward(input)  # type: ignore[no-untyped-call]
        return logits

    def description(self) -> dict[str, Any]:
        """Plain data from which `build_network` makes a network of the same architecture.

        Without arguments (None) where some of them are no plain data: only its user can build the network again.
        """
        settings = None if self._objects else self.settings
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": settings}


def build_network(description: Mapping[str, Any]) -> Network:
    """Build the network that `Network.description` describes, with fresh weights.

    Only subclasses of `Network` that are already imported are built: a checkpoint cannot run code of its choice.

    Raises:
        UserError: if the class is not an imported subclass of `Network`.
    """
    path = str(description["class_path"])
    if description["init_args"] is None:
        raise UserError(f"the network of this checkpoint is a {path}, which only you can build: pass network=")
    known: list[type[Network]] = [Network]
    for cls in known:
        known.extend(cls.__subclasses__())
        if f"{cls.__module__}.{cls.__qualname__}" == path:
            return cls(**description["init_args"])
    raise UserError(f"the network class {path} of this checkpoint is not imported: import it or pass network=")


def named_stages(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the units that angles are measured by: a network's stages, or a plain module's children with weights."""
    if isinstance(network, Network):
        return list(network.stages())
    return [(name, child) for name, child in network.named_children() if any(True for _ in child.parameters())]


def describe_network(network: nn.Module) -> dict[str, Any]:
    """Return plain data that says which network this is; only a `Network` can be built again from it."""
    if isinstance(network, Network):
        return network.description()
    return {"class_path": f"{type(network).__module__}.{type(network).__qualname__}", "init_args": None}


def check_sizes(network: str, image_shape: Sequence[int], num_classes: int, **widths: Sequence[int]) -> None:
    """Refuse sizes no network can have.

    Args:
        network: name of the network, for the message.
        image_shape: (channels, height, width), in pixels.
        num_classes: number of classes.
        widths: units or channels of the stages, by the name of the argument.

    Raises:
        UserError: naming the first argument that is not a positive whole number.
    """
    if len(image_shape) != 3:
        raise UserError(f"{network}: image_shape is {tuple(image_shape)}, but needs (channels, height, width)")
    for name, values in {"image_shape": image_shape, **widths}.items():
        for value in values:
            if value < 1 or value != int(value):
                raise UserError(f"{network}: {name} holds {value}, but every size must be a whole number, at least 1")
    if num_classes < 2:
        raise UserError(f"{network}: num_classes is {num_classes}, but a classifier needs at least 2 classes")


def conv_chain(
    network: str,
    image_shape: tuple[int, ...],
    channels: Sequence[int],
    kernel_size: int,
    pool: Pool,
    activation: ActivationName,
    bias: bool,
) -> tuple[dict[str, Stage], tuple[int, ...]]:
    """Conv stages ``conv1``, ``conv2``, ... of the same geometry, each "same"-padded and then pooled.

    Returns:
        The stages by name, and the shape of one output sample of the last.

    Raises:
        UserError: naming the network and the first stage that the image is too small for.
    """
    stages: dict[str, Stage] = {}
    shape = image_shape
    for number, width in enumerate(channels, start=1):
        name = f"conv{number}"
        stages[name] = ConvStage(
            shape,
            width,
            kernel_size,
            padding=kernel_size // 2,
            activation=activation,
            pool=pool,
            bias=bias,
            name=f"{network}'s {name}",
        )
        shape = stages[name].output_shape
    return stages, shape
