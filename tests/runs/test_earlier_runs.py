"""Which checkpoint ``last``, ``best`` and ``auto`` mean, whatever the files are called and wherever they lie."""

from pathlib import Path

import pytest

from bioprop.errors import UserError
from bioprop.testing.resuming import read_metrics
from tests.runs.test_checkpoint_faults import BATCHES, step_of
from tests.runs.test_folder import LAST, RUN, RUNS, fit, run


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("dirpath", [None, "models"])
@pytest.mark.parametrize("filename", ["mine", "{epoch}-{val/accuracy:.2f}"])
def test_last_and_best_are_found_under_any_name(dirpath: str | None, filename: str) -> None:
    where = [f"--checkpoint.filename={filename}", *([f"--checkpoint.dirpath={dirpath}"] if dirpath else [])]
    trained = fit(*where)
    best = Path(trained.checkpoint_callback.best_model_path)
    assert best.parent.resolve() == (Path(dirpath) if dirpath else LAST.parent).resolve()  # no sub-folder
    assert best.is_file()
    for kind in ("best", "last"):
        run("test", *where, f"--ckpt_path={kind}")
    fit(*where, "--ckpt_path=last", epochs=2)
    assert [path.parent.name for path in RUNS.rglob("checkpoints" if not dirpath else "config.yaml")].count(
        "version_0"
    ) == 1
    assert {row["epoch"] for row in read_metrics(RUN)} >= {"0", "1"}  # in the same folder, wherever the checkpoints are


def test_of_several_the_best_is_the_best(caplog: pytest.LogCaptureFixture) -> None:
    trained = fit("--checkpoint.save_top_k=3", "--checkpoint.filename={epoch}", epochs=3)
    best = trained.checkpoint_callback.best_model_path
    run("test", "--ckpt_path=best")
    assert f"using checkpoint {best}" in caplog.text
    LAST.unlink()
    with pytest.raises(UserError, match=r"holds epoch=0\.ckpt, .* and no last\.ckpt that says which"):
        run("test", "--ckpt_path=best")


def test_a_damaged_last_checkpoint_does_not_hide_the_best() -> None:
    fit("--checkpoint.filename=mine")
    LAST.write_bytes(b"")
    run("test", "--ckpt_path=best")


def test_weights_are_kept_for_their_own_metric_alone() -> None:
    """Three of the best are wanted, of four epochs with two validations."""
    fit("--checkpoint.save_top_k=3", "--checkpoint.filename={epoch}", "--trainer.check_val_every_n_epoch=2", epochs=4)
    assert sorted(path.name for path in LAST.parent.iterdir()) == ["epoch=1.ckpt", "epoch=3.ckpt", "last.ckpt"]


def test_auto_goes_on_if_there_is_something_to_go_on_with() -> None:
    assert fit("--ckpt_path=auto").global_step == BATCHES
    assert fit("--ckpt_path=auto", epochs=2).global_step == 2 * BATCHES
    assert [path.name for path in RUNS.iterdir()] == ["version_0"]
    with pytest.raises(
        UserError, match="--ckpt_path auto: there is no such file; 'last' and 'best' work too, and for fit"
    ):
        run("test", "--ckpt_path=auto")


def test_trials_on_less_are_neither_judged_nor_gone_on_with(caplog: pytest.LogCaptureFixture) -> None:
    smoke = "--trainer.limit_train_batches=2"
    fit(smoke)
    for kind in ("best", "last"):
        with pytest.raises(
            UserError, match=rf"{kind}\.ckpt yet \(passed over .*, a trial with trainer.limit_train_batches 2"
        ):
            run("test", f"--ckpt_path={kind}")
    run("test", smoke, "--ckpt_path=best")
    assert fit("--ckpt_path=auto").global_step == BATCHES
    fit("--data.limit_train=32")
    caplog.clear()
    run("test", "--ckpt_path=best")
    (used,) = (line for line in caplog.messages if line.startswith("using checkpoint"))
    assert "passed over" in used
    assert "data.limit_train 32" in used
    whole = next(path for path in RUNS.glob("*/checkpoints/best.ckpt") if step_of(path) == BATCHES)
    assert used.startswith(f"using checkpoint {whole}")
