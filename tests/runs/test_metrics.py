"""``metrics.csv``: continued after an interruption, complete after a refused write."""

from pathlib import Path

import pytest

from bioprop.runs.metrics import MetricsFile


def log(folder: Path, *rows: dict[str, float], keep: int | None = None) -> MetricsFile:
    logger = MetricsFile(folder, name="", version="run")
    if keep is not None:
        assert logger.keep(keep)
    for step, row in enumerate(rows):
        logger.log_metrics(row, step)
        logger.save()
    return logger


def text(folder: Path) -> str:
    return (folder / "run" / "metrics.csv").read_text()


def test_rows_after_the_checkpoint_are_dropped_and_others_follow(tmp_path: Path) -> None:
    logger = log(tmp_path, {"a": 0.1}, {"a": 0.2, "b": 1.0}, {"a": 0.3})
    assert logger.rows() == 3
    logger = log(tmp_path, {"c": 5.0}, keep=2)
    assert logger.rows() == 3
    assert text(tmp_path) == "a,b,c,step\n0.1,,,0\n0.2,1.0,,1\n,,5.0,0\n"


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    log(tmp_path, {"a": 0.1, "b": 0.5}, {"a": 0.2, "b": 0.6})
    path = tmp_path / "run" / "metrics.csv"
    path.write_text(path.read_text() + "0.")
    log(tmp_path, {"a": 0.3, "b": 0.7}, keep=2)
    assert text(tmp_path) == "a,b,step\n0.1,0.5,0\n0.2,0.6,1\n0.3,0.7,0\n"


def test_a_new_run_in_the_folder_starts_anew_with_its_first_row(tmp_path: Path) -> None:
    log(tmp_path, {"a": 0.1})
    logger = log(tmp_path)
    assert text(tmp_path) == "a,step\n0.1,0\n"
    logger.log_metrics({"b": 0.2}, 0)
    logger.save()
    assert text(tmp_path) == "b,step\n0.2,0\n"


def test_there_may_be_nothing_to_keep(tmp_path: Path) -> None:
    assert not MetricsFile(tmp_path, name="", version="run").keep(3)


def test_a_refused_row_waits_and_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = log(tmp_path, {"a": 0.1})
    with monkeypatch.context() as patch:
        patch.setattr("csv.DictWriter.writerows", refuse)
        for row in ({"a": 0.2}, {"b": 0.3}):
            logger.log_metrics(row, 1)
            logger.save()
    assert len([record for record in caplog.records if "metrics wait in memory" in record.message]) == 1
    assert text(tmp_path) == "a,step\n0.1,0\n"
    logger.save()
    assert text(tmp_path) == "a,b,step\n0.1,,0\n0.2,,1\n,0.3,1\n"


def refuse(self: object, rows: list[dict[str, float]]) -> None:
    raise OSError(28, "No space left on device")


def test_hyperparameters_are_written_beside_it(tmp_path: Path) -> None:
    logger = MetricsFile(tmp_path, name="", version="run")
    logger.log_hyperparams({"beta": 0.5})
    logger.save()
    assert (tmp_path / "run" / "hparams.yaml").read_text() == "beta: 0.5\n"
