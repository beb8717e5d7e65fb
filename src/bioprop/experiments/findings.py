"""The properties of an algorithm on a network that `bioprop check` looks at, each with a verdict."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bioprop.algorithms import LDRL, Algorithm, Backprop, FeedbackAlignment, GAITProp
from bioprop.functional.angles import angle_degrees, flatten_all, norm_ratio
from bioprop.functional.gradients import backprop_gradients, preserve_state
from bioprop.networks.network import named_stages

#: Batches that feedback weights see.
FEEDBACK_BATCHES = 20
#: Images of a batch in float64.
IMAGES = 16
#: Step of the output target with which targets are taken for derivatives.
SMALL_BETA = 1e-6
#: Degrees up to which two gradients in float64 are the same: by definition, and by a small step.
SAME, NEARLY_SAME = 1e-5, 0.05
#: Norms of updates over BP's: none at all, one that vanishes beside the other stages', and one out of reason.
DEAD, SMALL, LARGE = 1e-12, 1e-4, 1e3
#: Growth of feedback weights within reason.
GROWTH = 100.0
#: Degrees by which feedback that learns the forward weights has to come closer to them.
LEARNS = 1.0

Verdict = Literal["right", "wrong", "note"]


class Finding(NamedTuple):
    """A result of a check.

    Attributes:
        what: property that was looked at.
        verdict: whether it holds; ``note`` where nothing says how it should be.
        found: figures.
        advice: what to change, where it is wrong.
    """

    what: str
    verdict: Verdict
    found: str
    advice: str = ""


class StageRow(NamedTuple):
    """A unit of the network and its learning.

    Attributes:
        name: name of the stage, or of a plain module's child.
        kind: its class.
        parameters: number of trainable parameters.
        feedback: the feedback that brings its error to what lies below.
        course: degrees between its forward and feedback weights, at the start and after feedback learning.
        angle: degrees between its update and the BP gradient, at the start.
        ratio: norm of the update over that of the BP gradient.
    """

    name: str
    kind: str
    parameters: int
    feedback: str
    course: tuple[float, ...]
    angle: float
    ratio: float


class Checked(NamedTuple):
    """All that was found."""

    stages: list[StageRow]
    findings: list[Finding]

    @property
    def is_right(self) -> bool:
        """Return whether nothing is wrong."""
        return all(finding.verdict != "wrong" for finding in self.findings)


def check_algorithm(algorithm: Algorithm, images: Tensor, labels: Tensor) -> Checked:
    """Check a freshly made algorithm, on copies of it, but for what the trainer and the optimizer do.

    Args:
        algorithm: the algorithm with its network; stays as it is.
        images: ``[batch, channels, height, width]``, normalised as in training.
        labels: ``[batch]``.
    """
    precise = copy.deepcopy(algorithm).double()
    few = images[:IMAGES].double(), labels[:IMAGES]
    updates, reference = precise.forward_gradients(*few), _reference(precise, *few)
    rows = [
        _row(algorithm, name, stage, _of(name, updates), _of(name, reference))
        for name, stage in named_stages(algorithm.network)
    ]
    findings = [*_check_updates(rows, updates, precise, few), *_check_theory(precise, rows, few)]
    learned, courses = _check_feedback_learning(algorithm, images, labels)
    findings += learned
    rows = [row._replace(course=tuple(each for each in _course(row.name, courses))) for row in rows]
    return Checked(rows, [*findings, _cost(algorithm, images, labels)])


# -- updates ---------------------------------------------------------------------------------------------------------


def _reference(algorithm: Algorithm, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The BP gradient, with the algorithm's own remedies applied to it."""
    with preserve_state(algorithm):
        gradients, _ = backprop_gradients(algorithm.network, images, labels, algorithm.output_loss.mean)
        return algorithm._direction(gradients)


def _of(unit: str, values: Mapping[str, Tensor]) -> list[Tensor]:
    """Tensors of a unit, by the names of parameters."""
    return [value for name, value in sorted(values.items()) if name == unit or name.startswith(f"{unit}.")]


def _row(algorithm: Algorithm, name: str, unit: nn.Module, update: list[Tensor], reference: list[Tensor]) -> StageRow:
    trainable = sum(each.numel() for each in unit.parameters() if each.requires_grad)
    angle, ratio = math.nan, math.nan
    if update and len(update) == len(reference):
        ours, bp = flatten_all(update), flatten_all(reference)
        angle, ratio = float(angle_degrees(ours, bp)), float(norm_ratio(ours, bp))
    elif reference:
        ratio = 0.0
    return StageRow(name, type(unit).__name__, trainable, _feedback_of(algorithm, name), (), angle, ratio)


def _feedback_of(algorithm: Algorithm, unit: str) -> str:
    """Name the feedback of a unit."""
    operators = getattr(algorithm, "feedback", {})
    if unit in operators:
        return type(operators[unit]).__name__
    matrices = [name for name in algorithm.feedback_angles() if name == unit or name.startswith(f"{unit}.")]
    return f"{len(matrices)} matri{'x' if len(matrices) == 1 else 'ces'}" if matrices else "none of its own"


def feedback_tensors(algorithm: Algorithm) -> dict[str, Tensor]:
    """Return copies of all numbers of an algorithm that are neither its network nor its bookkeeping."""
    others = ("network.", "means.", "streams.")
    state = {name: value for name, value in algorithm.state_dict().items() if not name.startswith(others)}
    return {name: value.detach().clone() for name, value in state.items() if value.is_floating_point()}


def _check_updates(
    rows: Sequence[StageRow], updates: Mapping[str, Tensor], precise: Algorithm, batch: tuple[Tensor, Tensor]
) -> Iterator[Finding]:
    broken = sorted(name for name, value in updates.items() if not value.isfinite().all())
    yield judged(
        "updates are finite",
        not broken,
        ", ".join(broken) or f"{len(updates)} tensors",
        "look for a division by zero, or a feedback weight that is infinite",
    )
    dead = [row.name for row in rows if row.parameters and not row.ratio > DEAD]
    yield judged(
        "every stage gets an update",
        not dead,
        ", ".join(dead) or f"{sum(bool(row.parameters) for row in rows)} stages",
        "dead feedback: its weights are zero, or a stage above passes nothing down; draw the feedback weights anew",
    )
    sizes = {row.name: row.ratio for row in rows if math.isfinite(row.ratio)}
    large = ", ".join(name for name, size in sizes.items() if size > LARGE)
    small = ", ".join(name for name, size in sizes.items() if DEAD < size < SMALL)
    advice = f"exploding norms in {large}: scale the feedback weights down"
    if small and not large:
        advice = f"norms vanish in {small}: take Adam, which does not mind them, or scale the feedback weights up"
    verdict: Verdict = "wrong" if large else "note" if small else "right"
    found = f"{min(sizes.values(), default=0.0):.2g} to {max(sizes.values(), default=0.0):.2g} times its norm"
    yield Finding("updates are as large as BP's, within reason", verdict, found, advice if large or small else "")
    before = {name: value.clone() for name, value in precise.state_dict().items()}
    again = precise.forward_gradients(*batch)
    same = all(torch.equal(value, again[name]) for name, value in updates.items())
    still = all(torch.equal(value, before[name]) for name, value in precise.state_dict().items())
    yield judged(
        "forward_gradients leaves no trace",
        same and still,
        "the same twice" if same and still else "a second call differs" if still else "it moves weights",
        "_gradients must only compute: learn feedback in train_feedback",
    )


def _check_theory(algorithm: Algorithm, rows: Sequence[StageRow], batch: tuple[Tensor, Tensor]) -> Iterator[Finding]:
    """Compare with BP where theory says equal, and make sure that it is not BP where feedback is another."""
    hidden = [row for row in rows[:-1] if math.isfinite(row.angle)]
    always = isinstance(algorithm, Backprop) or getattr(algorithm, "rule", "") == "transpose"
    if always:
        worst = max((row.angle for row in rows if math.isfinite(row.angle)), default=0.0)
        yield judged(
            "updates are BP's", worst < SAME, f"{worst:.2g}° at most, in float64", "the backward pass is another one"
        )
        return
    if hidden:
        silent = all(row.angle < SAME for row in hidden) and not isinstance(algorithm, GAITProp)
        yield judged(
            "updates are not BP's while feedback is random",
            not silent,
            f"{min(row.angle for row in hidden):.3g}° to {max(row.angle for row in hidden):.3g}° below the output",
            "silent BP: the error comes down through the forward weights; send it through the feedback weights",
        )
    own = feedback_tensors(algorithm)
    if own and hidden:
        other = copy.deepcopy(algorithm)
        with torch.no_grad():
            for name, value in other.state_dict().items():
                if name in own:
                    value.copy_(torch.randn_like(value) * value.square().mean().sqrt().clamp_min(1e-3) * 1.5)
        now, before = other.forward_gradients(*batch), algorithm.forward_gradients(*batch)
        moved = [name for name, value in now.items() if not torch.equal(value, before[name])]
        yield judged(
            "updates depend on the feedback weights",
            bool(moved),
            f"{len(moved)} of {len(now)} tensors change with other feedback weights",
            "the feedback weights are not used: silent BP, or dead feedback",
        )
    symmetric: Any = copy.deepcopy(algorithm)
    symmetric.symmetrize_feedback()
    if hasattr(symmetric, "beta"):
        symmetric.beta = SMALL_BETA
    update, reference = symmetric.forward_gradients(*batch), _reference(symmetric, *batch)
    angles = {row.name: _angle(_of(row.name, update), _of(row.name, reference)) for row in rows if row.parameters}
    worst_name, worst = max(angles.items(), key=lambda item: item[1], default=("", 0.0))
    found = f"{worst:.2g}° at most ({worst_name}), in float64"
    equal = isinstance(algorithm, FeedbackAlignment) and algorithm.rule != "usf"
    equal = equal or (isinstance(algorithm, LDRL) and getattr(algorithm, "mirror", "exact") == "exact")
    if equal:
        advice = "the feedback path is not the transposed Jacobian of its stage"
        yield judged("with symmetric feedback, updates are BP's", worst < NEARLY_SAME, found, advice)
    else:
        yield Finding("with symmetric feedback, angle to BP", "note", f"{found}; theory does not ask for 0")


def _angle(first: list[Tensor], second: list[Tensor]) -> float:
    if len(first) != len(second) or not first:
        return 90.0
    angle = float(angle_degrees(flatten_all(first), flatten_all(second)))
    return 90.0 if math.isnan(angle) else angle


# -- feedback learning -----------------------------------------------------------------------------------------------


def _check_feedback_learning(
    algorithm: Algorithm, images: Tensor, labels: Tensor
) -> tuple[list[Finding], dict[str, list[float]]]:
    """Let feedback weights learn alone, on the images and on white noise; the course of the former is returned."""
    findings: list[Finding] = []
    course: dict[str, list[float]] = {}
    for kind, shown in (("white noise", torch.randn_like(images)), ("these images", images)):
        learner = copy.deepcopy(algorithm)
        before, course = feedback_tensors(learner), {}
        losses: list[dict[str, Tensor]] = []
        for batch in range(FEEDBACK_BATCHES + 1):
            if batch in (0, 1, FEEDBACK_BATCHES // 4, FEEDBACK_BATCHES):
                for name, angle in learner.feedback_angles().items():
                    course.setdefault(name, []).append(angle)
            if batch < FEEDBACK_BATCHES:
                losses.append(learner.train_feedback(shown, labels))
        after = feedback_tensors(learner)
        moved = [name for name, value in after.items() if not torch.equal(value, before[name])]
        if not moved:
            if getattr(learner, "trains_feedback", False):
                findings.append(
                    Finding(f"feedback learns on {kind}", "wrong", "no feedback weight moves", "is feedback_lr 0?")
                )
            elif kind == "white noise" and before:
                findings.append(Finding("feedback", "note", "is fixed, or moves with the forward weights alone"))
            continue
        findings += _judge_learning(learner, kind, losses, course, before, after)
    return findings, course


def _judge_learning(
    algorithm: Algorithm,
    kind: str,
    losses: Sequence[Mapping[str, Tensor]],
    course: Mapping[str, Sequence[float]],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
) -> Iterator[Finding]:
    # biases start at zero, from which nothing grows by a factor
    growth = {name: float(value.norm() / before[name].norm()) for name, value in after.items() if before[name].any()}
    largest = max(growth, key=lambda name: growth[name] if math.isfinite(growth[name]) else math.inf, default="")
    if largest:
        yield judged(
            f"feedback weights keep their size on {kind}",
            growth[largest] < GROWTH,  # false for NaN
            f"{growth[largest]:.3g} times at most ({largest})",
            "exploding norms: lower feedback_lr",
        )
    finite = all(value.isfinite() for each in losses for value in each.values())
    first, last = (sum(float(value) for value in each.values()) for each in (losses[0], losses[-1]))
    rises = bool(losses[0]) and not (finite and last <= 1.5 * abs(first) + 1e-12) and last > 0.0
    aims = isinstance(algorithm, LDRL) or getattr(algorithm, "rule", "") == "weight_mirror"
    angles = "; ".join(f"{name} {'→'.join(f'{angle:.0f}' for angle in angles)}°" for name, angles in course.items())
    if aims:
        stuck = [name for name, angles in course.items() if not angles[-1] < angles[0] - LEARNS and angles[-1] > LEARNS]
        advice = f"{', '.join(stuck)} does not turn to the forward weights: raise iterations or feedback_lr"
        yield judged(f"feedback turns to the forward weights on {kind}", not stuck, angles, advice)
    else:
        found = f"loss {first:.3g} → {last:.3g}" + (f"; angles {angles}" if angles else "")
        yield judged(f"feedback learns on {kind}", not rises, found, "its loss rises: lower feedback_lr")


def _course(unit: str, courses: Mapping[str, Sequence[float]]) -> list[float]:
    own = [angles for name, angles in courses.items() if name == unit or name.startswith(f"{unit}.")]
    return [] if not own else [max(angles[at] for angles in own) for at in (0, -1)]


def judged(what: str, holds: bool, found: str, advice: str) -> Finding:
    """Return the finding that a property holds, or that it does not and what to change."""
    return Finding(what, "right" if holds else "wrong", found, "" if holds else advice)


def _cost(algorithm: Algorithm, images: Tensor, labels: Tensor) -> Finding:
    """Time both phases beside the gradient of BP, in turns."""
    learner = copy.deepcopy(algorithm)
    learner._learn(images, labels)  # what is done once only

    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    own, bp = [], []
    for _ in range(5):
        own.append(seconds(lambda: learner._learn(images, labels)))
        bp.append(seconds(lambda: backprop_gradients(learner.network, images, labels)))
    return Finding("cost of a batch", "note", f"{median(own) / median(bp):.2f} BP steps, {len(labels)} images")
