"""Files that are replaced whole or not at all."""

import os
import resource
from pathlib import Path

import pytest
import torch

from bioprop.files import WriteError, replacing


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "file"
    with replacing(path, "w") as file:
        file.write("all")
        assert not path.exists()
    assert path.read_text() == "all"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("failed"), SystemExit(3)])
def test_the_previous_file_stays_where_writing_ends_early(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(WriteError if isinstance(error, OSError) else type(error)):
        write_half(path, error)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def write_half(path: Path, error: BaseException) -> None:
    with replacing(path, "w") as file:
        file.write("half")
        raise error


def test_a_refusal_is_reported_with_the_files_own_name_whatever_the_writer_makes_of_it(tmp_path: Path) -> None:
    """torch's writer says no more than that it failed."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(WriteError) as caught:
            save_tensor(tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (caught.value.strerror, caught.value.filename) == ("File too large", str(tmp_path / "file"))
    assert os.listdir(tmp_path) == []


def save_tensor(path: Path) -> None:
    with replacing(path) as file:
        torch.save(torch.zeros(1000), file)


def test_what_a_killed_process_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file.part").write_text("something longer than what comes")
    with replacing(tmp_path / "file", "w") as file:
        file.write("new")
    assert (tmp_path / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_in_the_way_is_reported(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(WriteError, match="taken/file"):
        save_tensor(tmp_path / "taken" / "file")
