"""Feedback alignment: one backward pass, in which other matrices carry the error."""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn

from bioprop.algorithms.aligned_pass import AlignedPass, Layer
from bioprop.algorithms.base import Algorithm, Gradients
from bioprop.algorithms.remedies import Remedies
from bioprop.distributed import mean_over_processes
from bioprop.errors import UserError
from bioprop.feedback.noise import RandomStreams
from bioprop.functional.angles import angle_degrees
from bioprop.functional.backward_matrices import (
    draw_like,
    mirror_estimate,
    root_mean_square,
    sign_concordant,
    with_norm_of,
)
from bioprop.functional.gradients import backprop_gradients, preserve_buffers, preserve_state
from bioprop.networks.network import AnyModule, Network
from bioprop.networks.stages import LayerStage
from bioprop.ranges import check_range, number

Rule = Literal["fa", "usf", "frsf", "brsf", "kolen_pollack", "weight_mirror", "transpose"]


class FeedbackAlignment(Algorithm):
    """Backpropagation with a backward matrix ``B`` in place of each forward weight ``W``, for the error only.

    ``dW`` is formed with the altered error; the last layer's own error is exact. Works on any torch module: every
    Linear and Conv below the output has a ``B``, all else is left to autograd. ``W`` is what a layer multiplies by: of
    one that normalises, masks, quantises or parametrises its weight, or adapts it by a low rank, the result, whose
    gradient goes on to the parameters. A product of another kind by a weight is refused, naming the layer. ``B``, in
    the layout of ``W``, is by ``rule``:

    - ``fa``: fixed and random (Lillicrap et al., 2016).
    - ``usf``: ``s sign(W)``, ``s`` the size of W's entries at the start (Liao et al., 2016; Moskovitz et al., 2018).
    - ``frsf``: ``|M| o sign(W)``, M drawn once (Moskovitz et al., 2018).
    - ``brsf``: the same, M drawn again for every batch (ibid.).
    - ``kolen_pollack``: learned by the increments of W and the decay of W (Kolen & Pollack, 1994; Akrout et al., 2019);
      of the parameter ``weight``, whatever a layer makes of it.
    - ``weight_mirror``: learned from responses to noise, after Akrout et al. (2019), in a form of ours: a moving
      average of the estimates of single batches, from noise ``N(0, 1)`` through ReLU without bias, held at its first
      norm.
    - ``transpose``: W itself, which is backpropagation: the control.

    Args:
        network: the forward network: any torch module from images to logits.
        rule: rule that ``B`` follows.
        feedback_scale: size of the entries drawn for ``B`` or ``M``, and of ``usf``'s: that of W's at the start
            (``initialisation``), or 1 (``unit``).
        normalize_feedback: scale ``B`` to the norm of ``W`` in every batch (Moskovitz et al., 2018).
        constrain_norm: hold the norm of every ``W`` at its initial value (ibid.).
        batch_manhattan: update by the sign of the gradient (Liao et al., 2016).
        feedback_optimizer: makes the optimizer of ``kolen_pollack``'s ``B``; ``optimizer`` if None: equal steps.
        decay: with ``kolen_pollack``, the fraction by which ``W`` and ``B`` both shrink in every batch, in [0, 1),
            before they get the increment of the batch, so that ``W - B`` shrinks by it.
        mirror_rate: with ``weight_mirror``, the fraction by which ``B`` moves to its new estimate in every batch, in
            (0, 1].
        mirror_samples: with ``weight_mirror``, the number of noise vectors in a batch.
        optimizer: makes the optimizer of the forward weights.
        settings: the other arguments of `Algorithm`.

    Raises:
        UserError: if a hyperparameter is out of its range or the network has no layer with a weight.
    """

    recordable = True

    def __init__(
        self,
        network: AnyModule,
        rule: Rule = "fa",
        feedback_scale: Literal["initialisation", "unit"] = "initialisation",
        normalize_feedback: bool = False,
        constrain_norm: bool = False,
        batch_manhattan: bool = False,
        feedback_optimizer: OptimizerCallable | None = None,
        decay: float = 1e-3,
        mirror_rate: float = 0.1,
        mirror_samples: int = 128,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9, weight_decay=1e-4),
        **settings: Any,
    ) -> None:
        super().__init__(network, optimizer, **settings)
        for name, value, known in (
            ("rule", rule, get_args(Rule)),
            ("feedback_scale", feedback_scale, ("initialisation", "unit")),
        ):
            if value not in known:
                raise UserError(f"{name} {value!r} is not known: choose one of {', '.join(known)}")
        self.rule = rule
        self.normalize_feedback = normalize_feedback
        self.decay = number("decay", decay)
        self.mirror_rate = number("mirror_rate", mirror_rate)
        self.mirror_samples = int(number("mirror_samples", mirror_samples, whole=True))
        check_range("decay", [self.decay], 0.0)
        check_range("mirror_rate", [self.mirror_rate], 0.0, low_allowed=False)
        check_range("mirror_samples", [self.mirror_samples], 1)
        if self.decay >= 1.0 or self.mirror_rate > 1.0:
            raise UserError(
                f"decay is {self.decay:g} and mirror_rate {self.mirror_rate:g}, but these are fractions: decay must be "
                "below 1 and mirror_rate at most 1"
            )
        self._make_feedback_optimizer: OptimizerCallable = feedback_optimizer or optimizer
        self._feedback_optimizer: torch.optim.Optimizer | None = None
        self.remedies = Remedies(network, constrain_norm, batch_manhattan)
        self.streams = RandomStreams()
        # what layers multiplied by last where that is not their weight; None before the first pass
        self._effective: dict[str, Tensor] | None = None
        self._shapes: dict[str, torch.Size] = {}
        # parameters without gradient, not buffers: they keep their identity when they move, as an optimizer needs
        self.backward_weights = nn.ParameterDict()
        for name, layer in self.layers():
            weight = self._weight(name, layer)
            self._shapes[name] = weight.shape
            scale = root_mean_square(weight) if feedback_scale == "initialisation" else torch.tensor(1.0)
            self.backward_weights[_key(name)] = nn.Parameter(self._initial(weight, scale), requires_grad=False)

    def _initial(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Return the tensor stored for a layer: ``B``, the magnitudes ``M``, or ``usf``'s one magnitude ``s``."""
        if self.rule in ("usf", "transpose"):
            return scale.to(weight.dtype)
        return draw_like(weight.detach(), scale)

    def layers(self) -> list[tuple[str, Layer]]:
        """Return name and layer of everything that has a backward matrix.

        That is every Linear and Conv layer, but for a first stage of one layer: no error goes below it. Of layers that
        share a weight the first.

        Raises:
            UserError: if there is no layer, or one whose weight the rule has no matrix for.
        """
        unique: dict[int, tuple[str, Layer]] = {}
        for name, layer in self.network.named_modules():
            if isinstance(layer, Layer):
                own = layer._parameters.get("weight")
                unique.setdefault(id(layer if own is None else own), (name, layer))
        found = list(unique.values())
        for name, layer in found:
            if type(layer).__name__ == "NonDynamicallyQuantizableLinear":
                raise UserError(
                    f"layer {name} belongs to an attention that hides its products, so that no other matrix can stand "
                    "in for its weight in the backward pass: take it out"
                )
            if self.rule == "kolen_pollack" and "weight" not in layer._parameters:
                raise UserError(
                    f"kolen_pollack gives a matrix the steps of its weight, but that of layer {name} "
                    f"({type(layer).__name__}) is made of other parameters: choose another rule"
                )
        if isinstance(self.network, Network):
            first, _ = self.network.stages()[0]
            in_first = [name for name, _ in found if name.startswith(f"{first}.")]
            return found[1:] if len(in_first) == 1 else found
        if not found:
            raise UserError(f"{type(self.network).__name__} has no Linear or Conv layer to align")
        return found

    def _weight(self, name: str, layer: Layer) -> Tensor:
        """Return the tensor a layer multiplied by last; its weight if it multiplies by that, or was not seen yet."""
        with torch.no_grad(), preserve_buffers(layer):  # a spectral norm iterates when it is asked
            return (self._effective or {}).get(name, layer.weight).detach()

    def backward_matrix(self, name: str, weight: Tensor) -> Tensor:
        """Compute the ``B`` that stands in for a layer's ``W`` in this batch, in its shape."""
        stored, weight = self.backward_weights[_key(name)].detach(), weight.detach()
        if self.rule == "transpose":
            return weight
        matrix = sign_concordant(weight, stored) if self.rule in ("usf", "frsf", "brsf") else stored
        return with_norm_of(matrix, weight.norm()) if self.normalize_feedback else matrix

    def _gradients(self, images: Tensor, labels: Tensor) -> Gradients:
        with self._aligned_pass() as aligned:
            gradients, logits = backprop_gradients(self.network, images, labels, self.output_loss.mean)
        aligned.refuse_unmet(gradients)
        self._effective = aligned.effective
        return Gradients(gradients, logits)

    def _may_record(self, images: Tensor) -> bool:
        # what layers multiply by, where that is not their weight, is told apart from batch to batch
        return not self._effective and super()._may_record(images)

    def _aligned_pass(self) -> AlignedPass:
        return AlignedPass(self.network, dict(self.layers()), self._shapes, self.backward_matrix)

    def _see_weights(self, images: Tensor) -> None:
        """Find out what layers multiply by in this batch, if some multiply by other tensors than their weights."""
        if self._effective is None or self._effective:
            with preserve_state(self.network), self._aligned_pass() as aligned:
                weights = next(self.network.parameters()).dtype
                self.network(images.to(weights) if images.is_floating_point() else images)
            seen = aligned.effective
            # each process may have drawn a mask of its own
            self._effective = dict(zip(seen, mean_over_processes(list(seen.values())), strict=True))

    @torch.no_grad()
    def train_feedback(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Phase 1: ``weight_mirror`` learns from fresh noise, ``brsf`` draws its magnitudes; the others do nothing.

        What is stored keeps the norm it was first drawn with: the norm control of the weight mirror.

        Args:
            images: shown to a ``weight_mirror`` whose layers multiply by other tensors than their weights, to see
                those; else not used: noise takes their place.
            labels: not used.
        """
        if self.rule in ("brsf", "weight_mirror"):
            if self.rule == "weight_mirror":
                self._see_weights(images)
            for place, (name, layer) in enumerate(self.layers()):
                stored = self.backward_weights[_key(name)]
                generator = self.streams.generator(place, stored.device)
                norm = stored.norm()
                if self.rule == "brsf":
                    stored.normal_(generator=generator)
                else:
                    estimate = mirror_estimate(self._weight(name, layer), self.mirror_samples, F.relu, generator)
                    stored.lerp_(with_norm_of(estimate, norm), self.mirror_rate)
                stored.mul_(norm / stored.norm())
            self.streams.next_batch()
        return {}

    def _direction(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.remedies.direction(gradients)

    @torch.no_grad()
    def _step_forward_weights(self, gradients: dict[str, Tensor]) -> None:
        """Step; with ``kolen_pollack``, ``W`` and ``B`` shrink alike and get the same increment, which does not."""
        if self.rule == "kolen_pollack":
            for name, layer in self.layers():
                matrix = self.backward_weights[_key(name)]
                matrix.grad = gradients.get(f"{name}.weight")
                if layer.weight.requires_grad:
                    for weight in (layer.weight, matrix):
                        weight.mul_(1.0 - self.decay)
        super()._step_forward_weights(gradients)
        if self._feedback_optimizer is not None:
            self._feedback_optimizer.step()
            self._feedback_optimizer.zero_grad()
        self.remedies.hold_norms(self.network)

    def configure_optimizers(self) -> Any:
        """Add ``kolen_pollack``'s optimizer, and a schedule like the forward one's, behind those of the network."""
        optimizers, schedulers = super().configure_optimizers()
        self._feedback_optimizer = None
        if self.rule == "kolen_pollack" and len(self.backward_weights):
            self._feedback_optimizer = self._make_feedback_optimizer(self.backward_weights.values())
            return self._with_feedback_optimizer(self._feedback_optimizer, optimizers, schedulers)
        return optimizers, schedulers

    @torch.no_grad()
    def symmetrize_feedback(self) -> None:
        """Copy ``W`` into every ``B`` (``|W|`` into the magnitudes); ``usf`` and ``transpose`` have none to set."""
        if self.rule not in ("usf", "transpose"):
            for name, layer in self.layers():
                self.backward_weights[_key(name)].copy_(self._weight(name, layer))

    def feedback_angles(self) -> dict[str, float]:
        """Return degrees between each ``W`` and its ``B``, by name of stage, or of layer where a stage has several."""
        names = {name: name for name, _ in self.layers()}
        if isinstance(self.network, Network):
            single = [stage for stage, module in self.network.stages() if isinstance(module, LayerStage)]
            names |= {name: name.split(".")[0] for name in names if name.split(".")[0] in single}
        weights = {name: self._weight(name, layer) for name, layer in self.layers()}
        return {
            names[name]: float(angle_degrees(weight, self.backward_matrix(name, weight)))
            for name, weight in weights.items()
        }


def _key(name: str) -> str:
    """Name of a layer as a key that registration allows."""
    return name.replace(".", "/")
