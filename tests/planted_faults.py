"""Faults planted in a copy of the source, one at a time, and the tests that should catch each.

    python -m tests.planted_faults [words]

runs all faults, or those whose names have one of the words, and prints what became of each. The exit status is 0 if
every one was killed, 1 if one survived, 2 if the list itself is wrong: a pattern that is not in its file exactly once,
or tests that fail without a fault.
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
Verdict = Literal["killed", "survived", "broken"]
PRELOADED = ["pytest", "pytorch_lightning", "torchvision"]


class Fault(NamedTuple):
    """A change of one place in the source that makes it wrong.

    Attributes:
        name: what is wrong.
        file: below ``src/bioprop``.
        right: what stands there, once in the file.
        wrong: what stands there instead.
        tests: arguments of pytest: the tests that should fail.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


A, F, N = "tests/algorithms/test_", "tests/functional/test_", "tests/networks/test_"
FAULTS = [
    Fault(
        "sign of the output's target",
        "algorithms/target_algorithm.py",
        "-self.beta * self.output_loss.gradient",
        "self.beta * self.output_loss.gradient",
        (f"{A}output_loss.py::test_the_output_stage_has_the_gradient_of_the_squared_error",),
    ),
    Fault(
        "dropped factor: local gradients not over the batch",
        "algorithms/target_algorithm.py",
        "difference / (-self.beta * len(labels))",
        "difference / -self.beta",
        (f"{A}output_loss.py::test_the_output_stage_has_the_gradient_of_the_squared_error",),
    ),
    Fault(
        "aliased weight: symmetric feedback is no copy",
        "algorithms/target_algorithm.py",
        "feedback.copy_(forward)",
        "feedback.set_(forward)",
        (f"{A}analytic_feedback.py::test_feedback_is_a_copy_that_follows_the_weights_batch_by_batch",),
    ),
    Fault(
        "TP keeps the difference correction",
        "algorithms/target_propagation.py",
        "return target - clean.inputs",
        "return target - mirror(clean.output.detach(), clean.switches)",
        (f"{A}target_propagation.py::test_training_equals_the_plain_implementation",),
    ),
    Fault(
        "wrong switch: L-DRL's noisy output by the other pass's switches",
        "feedback/ldrl.py",
        "Rule(self.second_noise, self.clean_switches, *settings)",
        "Rule(self.second_noise, not self.clean_switches, *settings)",
        (f"{A}whole_steps.py::test_training_equals_the_plain_implementation",),
    ),
    Fault(
        "L-DRL's number of iterations is not read",
        "feedback/training.py",
        "if given is None else given",
        "if given is None else 1",
        (f"{A}whole_steps.py::test_training_equals_the_plain_implementation",),
    ),
    Fault(
        "analytic feedback is never made anew",
        "algorithms/analytic_feedback.py",
        '        """Phase 1: copy the forward weights."""\n        self.symmetrize_feedback()\n',
        '        """Phase 1: copy the forward weights."""\n',
        (f"{A}analytic_feedback.py::test_training_is_that_of_ldrl_with_weights_copied_before_every_batch",),
    ),
    Fault(
        "missing detach: an error flows between stages",
        "algorithms/direct_feedback_alignment.py",
        "stage(inputs.detach())",
        "stage(inputs)",
        (f"{A}direct_feedback_alignment.py::test_no_gradient_flows_between_stages",),
    ),
    Fault(
        "DRTP projects the error",
        "algorithms/direct_random_target_projection.py",
        "F.one_hot(labels, error.shape[1]).to(error) / -len(labels)",
        "error",
        (f"{A}direct_random_target_projection.py::test_gradients_are_those_by_hand_before_and_after_training",),
    ),
    Fault(
        "normalised DFA normalises over the batch",
        "algorithms/normalized_dfa.py",
        "dim=1",
        "dim=0",
        (f"{A}normalized_dfa.py::test_gradients_are_those_by_hand_before_and_after_training",),
    ),
    Fault(
        "direct Kolen-Pollack climbs",
        "algorithms/direct_kolen_pollack.py",
        "(error.t() @ output.flatten(1))",
        "(-error.t() @ output.flatten(1))",
        (f"{A}direct_kolen_pollack.py::test_whole_steps_are_those_by_hand",),
    ),
    Fault(
        "PEPITA's inputs are those of the first pass",
        "algorithms/pepita.py",
        "affine, second = self._run(changed)",
        "(affine, _), second = self._run(images), self._run(changed)[1]",
        (f"{A}pepita.py::test_gradients_are_those_by_hand_before_and_after_training",),
    ),
    Fault(
        "Kolen-Pollack: the backward matrix does not decay",
        "algorithms/feedback_alignment.py",
        "for weight in (layer.weight, matrix):",
        "for weight in (layer.weight,):",
        (f"{A}learned_feedback.py::test_both_sides_get_the_same_increment_and_the_same_decay",),
    ),
    Fault(
        "the stored matrix is not used: backpropagation",
        "algorithms/feedback_alignment.py",
        'if self.rule == "transpose":',
        'if self.rule != "transpose":',
        (f"{A}feedback_alignment.py::test_the_matrix_is_what_is_stored",),
    ),
    Fault(
        "norms are not held",
        "algorithms/remedies.py",
        "weight.mul_(norm / weight.norm())",
        "weight.mul_(1.0)",
        (f"{A}remedies.py::test_constrained_weights_keep_their_norm_and_tensors_and_change_direction",),
    ),
    Fault(
        "an eps for the other side",
        "algorithms/difference_reconstruction.py",
        "lr=self.forward_lr, eps=self.forward_eps",
        "lr=self.forward_lr, eps=self.feedback_eps",
        (f"{A}reconstruction_steps.py::test_each_stage_has_its_own_eps_on_both_sides",),
    ),
    Fault(
        "forward weights learn in the extra epochs of feedback",
        "algorithms/difference_reconstruction.py",
        "since % (1 + self.extra_epochs) == 0",
        "since % (1 + self.extra_epochs) >= 0",
        (f"{A}difference_reconstruction.py::TestDDTPLinear::test_pretraining_and_extra_epochs_train_feedback_alone",),
    ),
    Fault(
        "FW-DTP's targets are not standardised",
        "algorithms/fixed_weight_dtp.py",
        "self._standardized.add(name)",
        "pass",
        (f"{A}fixed_weight_dtp.py::test_training_equals_the_plain_implementation",),
    ),
    Fault(
        "GAIT-prop regularises the other side",
        "algorithms/gait_prop.py",
        "orthogonality_gradient(stage.weight.detach(), self.orthogonal)",
        'orthogonality_gradient(stage.weight.detach(), "columns")',
        (f"{A}gait_prop.py::test_the_step_descends_the_regulariser_too",),
    ),
    Fault(
        "GAIT-prop: the slope is not squared",
        "functional/gait.py",
        "leaky_slope(outputs, negative_slope).square() * difference",
        "leaky_slope(outputs, negative_slope) * difference",
        (f"{F}gait.py::test_a_stage_hands_down_the_papers_target",),
    ),
    Fault(
        "squared error without its half",
        "functional/output_losses.py",
        "0.5 * F.mse_loss",
        "F.mse_loss",
        (f"{F}output_losses.py::test_the_losses_are_what_they_are_called",),
    ),
    Fault(
        "angles ignore the sign",
        "functional/angles.py",
        "(unit_a - unit_b).norm(), (unit_a + unit_b).norm()",
        "(unit_a - unit_b).norm(), (unit_a - unit_b).norm()",
        (f"{F}angles.py::test_known_angles",),
    ),
    Fault(
        "damping is subtracted",
        "functional/gauss_newton.py",
        "+ damping * torch.eye",
        "- damping * torch.eye",
        (f"{F}gauss_newton.py::test_directions_are_those_of_explicit_jacobians",),
    ),
    Fault(
        "unpooling keeps no last window",
        "functional/pooling.py",
        "last &= other != switches",
        "last &= other == switches",
        (f"{F}pooling.py::test_overwriting_keeps_the_last_of_the_competing_values",),
    ),
    Fault(
        "sign-concordant feedback without the sign",
        "functional/backward_matrices.py",
        "magnitude.abs() * weight.sign()",
        "magnitude.abs()",
        (f"{F}backward_matrices.py::test_sign_concordant_has_the_signs_of_one_and_the_magnitudes_of_the_other",),
    ),
    Fault(
        "the error goes back by the forward weight",
        "functional/asymmetric.py",
        "below = (error @ backward).to(ctx.types[0])",
        "below = (error @ (backward * 0 + 1)).to(ctx.types[0])",
        (f"{F}asymmetric.py::test_linear_gradients_are_those_by_hand",),
    ),
    Fault(
        "feedback decays at half its rate",
        "feedback/reconstruction.py",
        "return torch.stack([value.square().sum() for value in parameters.values()]).sum()",
        "return torch.stack([value.square().sum() for value in parameters.values()]).sum() / 2",
        ("tests/feedback/test_reconstruction.py::test_difference_reconstruction_by_hand",),
    ),
    Fault(
        "every batch has the same noise",
        "feedback/noise.py",
        "self.batches += 1",
        "self.batches += 0",
        ("tests/feedback/test_noise.py::test_every_batch_stage_and_iteration_draws_its_own",),
    ),
    Fault(
        "Adam's decay is not handed on",
        "feedback/training.py",
        "weight_decay=self.feedback_decay",
        "weight_decay=0.0",
        (f"{A}parallel_ldrl.py::test_adam_takes_its_first_step_by_hand",),
    ),
    Fault(
        "images are not normalised by their deviation",
        "datamodules/normalization.py",
        "/ std[:, None, None]",
        "* std[:, None, None]",
        ("tests/datamodules/test_digits.py::test_normalised_training_images_have_mean_0_and_std_1",),
    ),
    Fault(
        "an accuracy counts a batch twice",
        "algorithms/evaluation.py",
        "mean.update(total.detach(), images)",
        "mean.update(2 * total.detach(), images)",
        (f"{A}backprop.py::TestBackprop::test_evaluation_trains_nothing",),
    ),
    Fault(
        "a comparison tests the last checkpoint",
        "experiments/worker.py",
        'job.folder / "checkpoints" / "best.ckpt"',
        'job.folder / "checkpoints" / "last.ckpt"',
        ("tests/experiments/test_best_checkpoint.py",),
    ),
]


def occurrences(fault: Fault, source: Path) -> int:
    """Return how often a fault's pattern stands in its file of a source."""
    file = source / fault.file
    return file.read_text().count(fault.right) if file.is_file() else 0


def run_tests(tests: Sequence[str], path: Path, root: Path = ROOT) -> int:
    """Run pytest in a folder that has the tests, with the package of a path; return its exit status.

    In a process of its own, forked from one that has imported what takes long, but not the package.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_pytest, args=(tests, path, root))
    process.start()
    process.join()
    return -1 if process.exitcode is None else process.exitcode


def _pytest(tests: Sequence[str], path: Path, root: Path) -> None:
    os.environ["PYTHONPATH"] = os.pathsep.join([str(path), str(root)])
    sys.path[:0] = [str(path), str(root)]
    sys.dont_write_bytecode = True
    os.chdir(root)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    os._exit(pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]))


def judge(fault: Fault, source: Path, root: Path = ROOT) -> Verdict:
    """Plant one fault in a copy of a package, and say what the tests make of it.

    Args:
        fault: to plant.
        source: the folder of the package.
        root: the folder that the tests lie in.

    Returns:
        ``killed`` if a test failed, ``survived`` if all passed, ``broken`` if no test ran or could be collected.

    Raises:
        ValueError: if the pattern is not in the file exactly once.
    """
    if (found := occurrences(fault, source)) != 1:
        raise ValueError(f"{fault.name}: {fault.right!r} stands {found} times in {fault.file}, not once: mend the list")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / source.name
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        file = copy / fault.file
        file.write_text(file.read_text().replace(fault.right, fault.wrong))
        verdicts: dict[int, Verdict] = {0: "survived", 1: "killed"}
        return verdicts.get(run_tests(fault.tests, Path(folder), root), "broken")


def main(words: Sequence[str]) -> int:
    """Judge the faults with one of the words in their names, or all; return the exit status."""
    source = ROOT / "src" / "bioprop"
    chosen = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    stale = [fault.name for fault in chosen if occurrences(fault, source) != 1]
    if stale or not chosen:
        _say(f"patterns that are not in the source once: {'; '.join(stale)}" if stale else "no fault has such a name")
        return 2
    if run_tests(sorted({test for fault in chosen for test in fault.tests}), source.parent) != 0:
        _say("tests fail without a fault")
        return 2
    verdicts: list[Verdict] = []
    for number, fault in enumerate(chosen, start=1):
        verdicts.append(judge(fault, source))
        _say(f"{number:3} of {len(chosen)}  {verdicts[-1]:8}  {fault.name}")
    _say(f"{verdicts.count('killed')} of {len(chosen)} killed")
    return 2 if "broken" in verdicts else int("survived" in verdicts)


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
