"""A pass through any network in which every layer has a matrix of its own for the way back.

A layer may multiply by another tensor than its weight: one that is normalised, masked, quantised, parametrised or
adapted by a low rank. What is replaced is the product, its first factor the input and its second the effective weight;
how that follows from parameters is left to autograd. What cannot be replaced is refused: it would be backpropagation.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bioprop.errors import UserError
from bioprop.functional.asymmetric import NODES, REPLACEMENTS, asymmetric_backward, weight_in

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

NAMES = (
    "linear bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d matmul __matmul__ "
    "__rmatmul__ mm bmm mv dot vdot inner outer addmm addbmm baddbmm addmv addr einsum tensordot chain_matmul "
    "multi_dot lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell multi_head_attention_forward"
)
#: Functions of torch that multiply by what they are given.
PRODUCTS = {
    getattr(owner, name)
    for name in NAMES.split()
    for owner in (torch, Tensor, torch.linalg, nn.functional)
    if hasattr(owner, name)
}
#: Nodes of autograd's graph behind which there is data: products that are replaced, and rows that were looked up.
BEHIND_DATA = (*NODES, "EmbeddingBackward0")


class AlignedPass(asymmetric_backward):
    """Context in which every listed layer's product has another matrix for the way back.

    Args:
        network: that the layers belong to.
        layers: by name.
        shapes: shapes of their weights, by name of the layer.
        rule: makes a layer's ``B`` of its name and of what it multiplies by, in the shape of its weight.

    Attributes:
        effective: by name of the layer, what it multiplied by last where that is not its weight.

    Raises:
        UserError: in the pass, naming a layer that forms no product by a tensor in the shape of its weight with
            `torch.nn.functional.linear` or a convolution, or a matrix that is no layer's weight.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Mapping[str, Layer],
        shapes: Mapping[str, torch.Size],
        rule: Callable[[str, Tensor], Tensor],
    ) -> None:
        super().__init__({})
        self._layers, self._shapes, self._rule = layers, shapes, rule
        self._parameters = {id(parameter): name for name, parameter in network.named_parameters()}
        self._own = {id(layer.weight): name for name, layer in layers.items() if "weight" in layer._parameters}
        self._running: list[str] = []
        self._met: set[str] = set()
        self._hooks: list[RemovableHandle] = []
        self.effective: dict[str, Tensor] = {}

    def __enter__(self) -> "AlignedPass":
        """Watch which layer is running."""
        for name, layer in self._layers.items():
            self._hooks.append(layer.register_forward_pre_hook(partial(self._begin, name)))
            self._hooks.append(layer.register_forward_hook(self._end))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Leave the layers as they were."""
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _begin(self, name: str, layer: nn.Module, args: Any) -> None:
        self._running.append(name)
        self._met.discard(name)

    def _end(self, layer: nn.Module, args: Any, output: Any) -> None:
        name = self._running.pop()
        if name not in self._met and any(each.requires_grad for each in tensors_in([output])):
            raise self._unmet(name)

    def _layer_of(self, weight: Tensor) -> str | None:
        """Whose product a product with this for its second factor is."""
        running = self._running[-1] if self._running else None
        if running is not None and id(weight) not in self._own and weight.shape == self._shapes[running]:
            return running
        return self._own.get(id(weight))

    def matrix_for(self, weight: Tensor) -> Tensor | None:
        """Return the ``B`` of a layer's own weight, or of what the running layer multiplies by in its place."""
        name = self._layer_of(weight)
        if name is None:
            return None
        if id(weight) not in self._own:
            self.effective[name] = weight.detach()
        if not torch.is_grad_enabled():  # as within an autograd function, whose way back is its own
            return None
        self._met.add(name)
        return self._rule(name, weight.detach())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in PRODUCTS and torch.is_grad_enabled():
            given = kwargs or {}
            if func not in REPLACEMENTS or self._layer_of(weight_in(args, given)) is None:
                self._refuse_matrices(func, [*tensors_in((*args, *given.values()))])
        return super().__torch_function__(func, types, args, kwargs)

    # -- what is refused -----------------------------------------------------------------------------------------

    def refuse_unmet(self, gradients: Collection[str]) -> None:
        """Refuse layers whose weights were used, since they have a gradient, but in no product that was replaced.

        Args:
            gradients: names of the parameters that have one.

        Raises:
            UserError: naming the first.
        """
        for name in self._layers:
            own = [each for each in gradients if each.startswith(f"{name}.") and each != f"{name}.bias"]
            if own and name not in self._met:
                raise self._unmet(name)

    def _unmet(self, name: str) -> UserError:
        return UserError(
            f"layer {name} ({type(self._layers[name]).__name__}) forms no product in which another matrix can stand in "
            "for its weight in the backward pass: multiply by the weight, or by what is made of it in its shape, with "
            "torch.nn.functional.linear or a convolution"
        )

    def _refuse_matrices(self, func: Callable[..., Any], given: Sequence[Tensor]) -> None:
        """Refuse a product of data that needs an error by a parameter, which the error would go back by."""
        made_of = [self._matrix_in(each) for each in given if each.requires_grad or self._is_own(each)]
        names = [name for name in made_of if name]
        if names and None in made_of:
            name = getattr(func, "__name__", str(func)).strip("_")
            raise UserError(
                f"{names[0]} multiplies the output of other weights ({name}), where no other matrix can stand in for "
                "it in the backward pass: make it the weight of a Linear or Conv layer, and multiply in the layer's "
                "forward with torch.nn.functional.linear or a convolution"
            )

    def _is_own(self, tensor: Tensor) -> bool:
        """Return true if a tensor is a layer's weight, or a view of it: one that is frozen has no graph."""
        return id(tensor) in self._own or id(tensor._base) in self._own

    def _matrix_in(self, tensor: Tensor) -> str | None:
        """Name a parameter of two dimensions or more that a tensor was made of; None if data went into it.

        Empty if it was made of other parameters alone, such as a bias.
        """
        if self._is_own(tensor):
            return self._parameters[id(tensor if tensor._base is None else tensor._base)]
        found, waiting, seen = "", [_node_of(tensor)], set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node.name() in BEHIND_DATA or (hasattr(node, "variable") and id(node.variable) not in self._parameters):
                return None
            if hasattr(node, "variable") and node.variable.dim() > 1:
                found = self._parameters[id(node.variable)]
            waiting += [below for below, _ in node.next_functions]
        return found


def _node_of(tensor: Tensor) -> Any:
    """The node of autograd's graph that a tensor comes from, a leaf's too."""
    if tensor.grad_fn is None and tensor.requires_grad:
        return tensor.view_as(tensor).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    return tensor.grad_fn


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among values, and those in lists and tuples of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
