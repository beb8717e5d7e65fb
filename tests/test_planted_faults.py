"""The planted faults: each has its place in the source and its tests, and the script can tell killed from survived."""

from pathlib import Path

import pytest

from tests.planted_faults import FAULTS, ROOT, Fault, judge, main, occurrences

#: Tests of the suites of `bioprop.testing`, which a class of tests has without naming them.
INHERITED = ("test_evaluation_trains_nothing", "test_pretraining_and_extra_epochs_train_feedback_alone")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_has_its_place_once_and_its_tests_exist(fault: Fault) -> None:
    """Whoever changes a line that a fault is planted in moves the fault along."""
    assert occurrences(fault, ROOT / "src" / "bioprop") == 1
    assert fault.right != fault.wrong
    for test in fault.tests:
        file, *names = test.split("::")
        if file.endswith(".py"):
            text = (ROOT / file).read_text()
            assert all(name in text or name in INHERITED for name in names)  # inherited


def test_names_and_places_are_not_given_twice() -> None:
    assert len({fault.name for fault in FAULTS}) == len({(fault.file, fault.right) for fault in FAULTS}) == len(FAULTS)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of one function, and a test of it."""
    monkeypatch.setattr("tests.planted_faults.PRELOADED", ["pytest"])
    (tmp_path / "src" / "twice").mkdir(parents=True)
    (tmp_path / "src" / "twice" / "__init__.py").write_text("def twice(x):\n    return 2 * x  # not 3\n")
    (tmp_path / "test_twice.py").write_text("from twice import twice\n\ndef test_it():\n    assert twice(2) == 4\n")
    return tmp_path


def planted(right: str, wrong: str) -> Fault:
    return Fault("name", "__init__.py", right, wrong, ("test_twice.py",))


@pytest.mark.parametrize(
    ("wrong", "verdict"), [("3 * x", "killed"), ("x + x", "survived"), ("2 * x)", "broken")], ids=lambda each: each
)
def test_a_fault_is_killed_by_a_test_that_fails_alone(wrong: str, verdict: str, tiny: Path) -> None:
    """A module that cannot be imported is no kill: any test would notice."""
    assert judge(planted("2 * x", wrong), tiny / "src" / "twice", tiny) == verdict
    assert "2 * x" in (tiny / "src" / "twice" / "__init__.py").read_text()  # planted in a copy


@pytest.mark.parametrize("pattern", ["4 * x", "t"], ids=["gone", "several"])
def test_a_pattern_that_does_not_match_once_is_an_error(pattern: str, tiny: Path) -> None:
    with pytest.raises(ValueError, match="not once: mend the list"):
        judge(planted(pattern, ""), tiny / "src" / "twice", tiny)


def test_a_stale_list_is_said_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.planted_faults.FAULTS", [planted("no such line", "")])
    assert main([]) == 2
    assert "patterns that are not in the source once: name" in capsys.readouterr().out
