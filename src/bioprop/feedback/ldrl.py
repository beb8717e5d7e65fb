"""How L-DRL trains the feedback weights of a stage, by closed forms where there are any.

With ``G(y) = V^T features(y) + bias`` every difference of two ``G`` is ``V^T`` of a difference of features, and
``<x, V^T d> = <V, weight_gradient(x, d)>``: weight gradients are all that is needed, no pass through ``G`` for the
loss, no graph. For L-DRL as published that is four products of the layer's size an iteration, where autograd takes
seven; for its other two second noises (`bioprop.feedback.losses` derives them) three and two.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from bioprop.errors import UserError
from bioprop.feedback.by_autograd import objective_by_autograd
from bioprop.feedback.losses import FeedbackGradient, FeedbackObjective
from bioprop.feedback.noise import ECHO_ITERATIONS, NoiseStream, Rule, SecondNoise, expected_iterations
from bioprop.feedback.training import FeedbackTraining
from bioprop.networks.layers import Block, FeedbackLayer, unit_square_sums
from bioprop.networks.mirrors import Mirror
from bioprop.networks.stages import Stage, StagePass

SwitchesOf = Literal["noisy", "clean"]
NoiseAt = Literal["layer", "stage"]


class LDRLTraining(FeedbackTraining):
    """Feedback training by the L-DRL loss; `bioprop.algorithms.LDRL` describes the settings.

    Args:
        second_noise: ``echo``, ``expected`` or ``independent``.
        switches: whose max-pool switches unpool the noisy output, ``clean`` or ``noisy``.
        noise_at: how stages of several layers are trained, by ``layer`` or as a whole (``stage``).
        settings: the other arguments of `FeedbackTraining`.

    Raises:
        UserError: if a setting is out of its range, or two have no meaning together.
    """

    def __init__(self, second_noise: SecondNoise, switches: SwitchesOf, noise_at: NoiseAt, **settings: Any) -> None:
        for option, value, known in (
            ("second_noise", second_noise, get_args(SecondNoise)),
            ("switches", switches, get_args(SwitchesOf)),
            ("noise_at", noise_at, get_args(NoiseAt)),
        ):
            if value not in known:
                raise UserError(f"{option} {value!r} is not known: choose one of {', '.join(known)}")
        super().__init__(finds_settings=True, **settings)
        self.second_noise, self.clean_switches, self.by_layers = second_noise, switches == "clean", noise_at == "layer"
        self._check_combinations()
        self.whole_batch = {name: given is not None for name, given in self.iterations.items()}
        if second_noise == "echo":
            self.iterations = {name: ECHO_ITERATIONS if it is None else it for name, it in self.iterations.items()}

    def find_iterations(self, mirror: Mirror, clean: StagePass) -> int:
        """Number of iterations that ``auto`` stands for where the second noise is integrated out."""
        fan_in = max(weight[0].numel() for each, weight in mirror.named_parameters() if each != "bias")
        samples = len(clean.inputs) * self.peers.size * clean.output[0, 0].numel()
        return expected_iterations(fan_in / samples)

    def objective(
        self, name: str, stage: Stage, mirror: Mirror, clean: StagePass, noise: NoiseStream
    ) -> FeedbackObjective:
        """Prepare the L-DRL loss of one stage and batch: noise at the stage's input, the second noise at its output."""
        settings = self.noise[name], self.whole_batch[name], self.by_layers, self.samples, self.peers
        return ldrl_objective(Rule(self.second_noise, self.clean_switches, *settings), stage, mirror, clean, noise)

    def _check_combinations(self) -> None:
        """Refuse what has no meaning together.

        Raises:
            UserError: naming the setting and what works.
        """
        settings = {"noise": self.noise, "feedback_lr": self.feedback_lr, "iterations": self.iterations}
        left = [name for name, values in settings.items() if None in values.values()]
        if self.second_noise == "independent" and left:
            raise UserError(
                f"{', '.join(left)}: auto follows from the sizes for second_noise echo and expected; independent noise "
                "needs numbers, such as noise: 0.1, feedback_lr: 0.05, iterations: 20"
            )
        if self.second_noise != "independent" and not self.clean_switches:
            raise UserError(
                f"switches noisy: a switch that noise flips moves a whole activation, and the few samples of "
                f"second_noise {self.second_noise} do not average that out: use switches: clean, or second_noise: "
                "independent"
            )
        if self.feedback_step != "normalized" and "feedback_lr" in left:
            raise UserError(
                f"feedback_lr: auto is a normalized step: with feedback_step {self.feedback_step} give a number, such "
                "as 0.01"
            )
        for name, mirror in self.feedback.items():
            assert isinstance(mirror, Mirror)
            if self.feedback_step == "normalized" and not has_curvature(mirror, self.by_layers):
                raise UserError(
                    f"noise_at stage has no curvature for each of {name}'s several feedback weights, which the "
                    "normalized step divides by: use feedback_step: sgd, or noise_at: layer"
                )
            if self.second_noise == "expected" and not has_curvature(mirror, self.by_layers):
                raise UserError(
                    f"second_noise expected is not known for the feedback of {name} as a whole: use echo, or "
                    "noise_at: layer"
                )


class LayerGradient(NamedTuple):
    """Gradient of one layer's feedback loss, in effective weights.

    Attributes:
        weight: in the shape of ``V``.
        loss: a scalar.
        curvature: see `bioprop.feedback.losses.FeedbackGradient`, ``[units]``.
    """

    weight: Tensor
    loss: Tensor
    curvature: Tensor


def has_curvature(mirror: Mirror, by_layers: bool) -> bool:
    """Return whether a mirror's loss has a curvature for each of its weights, which the normalized step divides by."""
    return type(mirror).layers is not Mirror.layers and (by_layers or not mirror.is_composed)


def ldrl_objective(rule: Rule, stage: Stage, mirror: Mirror, clean: StagePass, noise: NoiseStream) -> FeedbackObjective:
    """Prepare the L-DRL loss of one stage and batch, by closed forms where there are any, else by autograd.

    Args:
        rule: how the stage is trained.
        stage: ``F^n``; its passes may move running statistics.
        mirror: ``G^n``.
        clean: pass of the batch through the stage.
        noise: where noise is drawn from.

    Returns:
        A function from the number of a draw of noise to the gradient.
    """
    found = mirror.layers(stage, clean) if has_curvature(mirror, rule.by_layers) else None
    if found is None:
        return objective_by_autograd(rule, stage, mirror, clean, noise)
    if rule.second_noise == "independent":
        return _independent(rule, found.layers, found.noise_shapes, noise)
    return _probed(rule, found.layers, noise)


def _independent(
    rule: Rule, layers: Sequence[FeedbackLayer], shapes: Sequence[tuple[int, ...]], noise: NoiseStream
) -> FeedbackObjective:
    """The published rule in closed form."""

    def gradient_at(draw: int) -> FeedbackGradient:
        drawn, found = noise.draw(rule.sigma, *shapes), []
        for layer in layers:
            eps, eta = drawn[layer.input_noise], drawn[layer.output_noise]
            found.append(independent_gradient(layer, eps, eta, rule.sigma, rule.clean_switches))
        return _summed(layers, found)

    return gradient_at


def _probed(rule: Rule, layers: Sequence[FeedbackLayer], noise: NoiseStream) -> FeedbackObjective:
    """An echo, or the second noise integrated out, in closed form."""
    echo, probes = rule.second_noise == "echo", []
    for layer in layers:
        probing = rule.probing(layer.inputs, layer.weight, layer.output, layer.affine[0, 0].numel(), layer.pool)
        variance = probing.sigma**2
        curvature = curvature_of_units(layer, variance, probing.images) if echo else curvature_of_taps(layer, variance)
        probes.append((layer.blocks(probing.images), probing, curvature))

    def gradient_at(draw: int) -> FeedbackGradient:
        found = []
        for blocks, probing, curvature in probes:
            eps, divisor = probing.step(noise, draw, curvature)
            gradient, loss = echo_gradient(blocks, eps) if echo else expected_gradient(blocks, eps, curvature)
            found.append(LayerGradient(gradient, loss, divisor))
        return _summed(layers, found)

    return gradient_at


def _summed(layers: Sequence[FeedbackLayer], gradients: Sequence[LayerGradient]) -> FeedbackGradient:
    """The gradient of the sum of the layers' losses, out of those in effective weights."""
    weights, curvatures, losses = {}, {}, []
    for layer, found in zip(layers, gradients, strict=True):
        weight, loss, curvature = (layer.share * each for each in found)
        if layer.scale is not None:
            weight, curvature = layer.scaled(weight), layer.scaled(layer.scaled(curvature))
        weights[layer.name], curvatures[layer.name] = weight, curvature
        losses.append(loss)
    return FeedbackGradient(weights, torch.stack(losses).sum(), curvatures)


@torch.no_grad()
def independent_gradient(
    layer: FeedbackLayer, input_noise: Tensor, output_noise: Tensor, sigma: float, clean_switches: bool
) -> LayerGradient:
    """Gradient of the L-DRL loss (Ernoult et al., 2022), as `losses.ldrl_gradient` defines it.

    ``D1 = U_n phi(y_n) - U_c phi(y)`` and ``D2 = U_c (phi(y + eta) - phi(y))`` with the unpoolings ``U`` of the noisy
    and the clean pass; gradient ``2/batch (wgrad(V^T D2, D2) - wgrad(eps, D1))``.

    Args:
        layer: on a batch.
        input_noise: ``eps``, like the layer's inputs.
        output_noise: ``eta``, like its output.
        sigma: standard deviation of both.
        clean_switches: whether the noisy output is unpooled by the clean pass's switches, instead of by its own.
    """
    batch, sums = len(input_noise), list[Tensor]()  # over the blocks: gradient, second term of the loss, curvature
    for samples, part in layer.blocks():
        wgrad, noise = part.layer.weight_gradient, input_noise[samples]
        first = _features_change(part, noise, clean_switches)
        step = part.activation.phi(part.output + output_noise[samples]).sub_(part.phi)
        second = part.unpool(step)
        back = part.project(second)
        found = [wgrad(back, second).sub_(wgrad(noise, first)), _square_sum(back)]
        if not part.activation.is_linear:
            found.append(unit_square_sums(step).mul_(len(step)))
        sums = _added(sums, found)
    gradient, second_term, *squares = sums
    # <V, wgrad(V^T D2, D2)> = |V^T D2|^2 is the second term of the loss, -2 <V, wgrad(eps, D1)> the first
    loss = (2.0 * _inner(layer.effective, gradient) - second_term) / batch
    known = layer.weight.new_full((len(layer.weight),), 2.0 * sigma**2 * layer.output[0, 0].numel())
    curvature = squares[0].mul_(2.0 / batch) if squares else known
    return LayerGradient(gradient.mul_(2.0 / batch), loss, curvature)


@torch.no_grad()
def echo_gradient(blocks: Sequence[Block], input_noise: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the L-DRL loss with the second noise an echo of the first: `losses.echo_gradient`.

    With ``echo = phi'(y) o U^T conv(eps; V)`` and ``D2 = U (phi(y + echo) - phi(y))``: ``2/batch wgrad(eps, D2 - D1)``,
    ``D2 - D1 = U (phi(y + echo) - phi(y_n))``, since both are unpooled by the clean pass's switches.

    Args:
        blocks: the layer on the samples that the noise is for.
        input_noise: ``eps``, like the layer's inputs.

    Returns:
        Gradient in the shape of ``V``, and loss.
    """
    batch, sums = len(input_noise), list[Tensor]()  # over the blocks: gradient, half the first term and the second
    for samples, part in blocks:
        noise, phi = input_noise[samples], part.activation.phi
        answer, output = part.probe(noise)
        echo = part.slope * answer
        noisy, after = phi(output), phi(part.output + echo)
        first = _inner(answer, noisy - part.phi)
        sums = _added(sums, [part.weight_gradient(noise, after - noisy), first, _square_sum(echo)])
    gradient, first, second = sums
    return gradient.mul_(2.0 / batch), (second - 2.0 * first) / batch


@torch.no_grad()
def expected_gradient(blocks: Sequence[Block], input_noise: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the L-DRL loss with its second noise integrated out: `losses.expected_gradient`.

    ``V o decay - 2/batch wgrad(eps, D1)``: Hebb's product of noise and response, and a decay by what the unit knows.

    Args:
        blocks: the layer on the samples that the noise is for.
        input_noise: ``eps``, like the layer's inputs.
        decay: by `curvature_of_taps`.

    Returns:
        Gradient in the shape of ``V``, and loss.
    """
    sums = list[Tensor]()
    for samples, part in blocks:
        noise = input_noise[samples]
        sums = _added(sums, [part.layer.weight_gradient(noise, _features_change(part, noise, clean_switches=True))])
    feedback = blocks[0].layer.effective
    decayed, hebb = feedback * decay, sums[0].mul_(2.0 / len(input_noise))
    return decayed - hebb, _inner(feedback, 0.5 * decayed - hebb)


def curvature_of_units(layer: FeedbackLayer, variance: float | Tensor, images: int | None = None) -> Tensor:
    """``D_o = 2 sigma^2 mean_batch sum_windows phi'(y)^2``: curvature of ``sigma^2 |J_G|^2`` along a unit's weights.

    Args:
        layer: on a batch.
        variance: ``sigma^2`` of the noise.
        images: of the batch that the noise is for, the first ones; None for all.

    Returns:
        ``[units]``.
    """
    return 2.0 * variance * unit_square_sums(layer.slope[:images])


def curvature_of_taps(layer: FeedbackLayer, variance: float | Tensor) -> Tensor:
    """`curvature_of_units` for each tap of the kernel, which counts where it meets the image: ``V o`` it is a gradient.

    ``|J_G|^2`` is a sum over windows and taps of ``phi'(y)^2 V^2``, where the tap falls on a position of the input.

    Returns:
        ``[units, 1, kernel, kernel]`` or ``[units, 1]``.
    """
    return layer.tap_sums(layer.unpool(layer.slope.square())).mul_(2.0 * variance / len(layer.output))


def _features_change(layer: FeedbackLayer, noise: Tensor, clean_switches: bool) -> Tensor:
    """``U_n phi(y_n) - U_c phi(y)`` of a pass with noise at the inputs."""
    output, switches = layer.respond(noise)
    phi = layer.activation.phi(output)
    if clean_switches:
        return layer.unpool(phi.sub_(layer.phi))
    return layer.unpool(phi, switches).sub_(layer.unpool(layer.phi))


def _added(sums: list[Tensor], found: list[Tensor]) -> list[Tensor]:
    return [total.add_(term) for total, term in zip(sums, found, strict=True)] if sums else found


def _square_sum(values: Tensor) -> Tensor:
    """``sum x^2``."""
    return _inner(values, values)


def _inner(first: Tensor, second: Tensor) -> Tensor:
    """``<a, b>``, without a copy where the two share the layout of convolutions."""
    flat = [each.movedim(1, -1).reshape(-1) for each in (first, second)]
    return torch.dot(*flat)
