"""The file that predict leaves behind."""

import csv
import os
from pathlib import Path

import pytest
from PIL import Image
from pytorch_lightning import Trainer

from bioprop.algorithms import Backprop
from bioprop.callbacks import PredictionsFile
from bioprop.datamodules import ImageFolder
from bioprop.networks import MLP

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")


def predict(folder: Path, data: ImageFolder) -> None:
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[PredictionsFile()],
    )
    trainer.predict(Backprop(MLP(data.image_shape, data.num_classes, hidden=(4,))), data, return_predictions=False)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Images of two classes, one of which has a name that is not UTF-8, as has one image of each."""
    for split in (b"train", b"test"):
        for name in (b"cat", b"\xe9l\xe9phant"):
            folder = os.path.join(os.fsencode(tmp_path / "images"), split, name)
            os.makedirs(folder)
            for number, file in enumerate((b"1.png", b"caf\xe9.png", "caf\u00e9.png".encode())):
                with open(os.path.join(folder, file), "wb") as target:
                    colour = 50 * number + 10 * len(name) + len(split)
                    Image.new("L", (4, 4), colour).save(target, format="png")
    return tmp_path / "images"


def test_names_that_are_not_utf_8_are_written_readably(tmp_path: Path, images: Path) -> None:
    predict(tmp_path, ImageFolder(str(images)))
    with (tmp_path / "predictions.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [
        "test/cat/1.png",
        "test/cat/caf\u00e9.png",
        r"test/cat/caf\xe9.png",
        r"test/\xe9l\xe9phant/1.png",
        "test/\\xe9l\\xe9phant/caf\u00e9.png",
        r"test/\xe9l\xe9phant/caf\xe9.png",
    ]
    assert {row["prediction"] for row in rows} <= {"cat", r"\xe9l\xe9phant"}
    assert [row["label"] for row in rows] == ["cat"] * 3 + [r"\xe9l\xe9phant"] * 3


def test_a_file_that_cannot_be_finished_replaces_none(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "predictions.csv").write_text("before")
    data = ImageFolder(str(images))
    names = ["one", *([None] * 5)]  # the second is no name, and ends the writing
    monkeypatch.setattr(data, "prediction_names", lambda: names)
    with pytest.raises(TypeError):
        predict(tmp_path, data)
    assert (tmp_path / "predictions.csv").read_text() == "before"
    assert not list(tmp_path.glob("*.part"))


def test_unlabelled_images_are_predicted(tmp_path: Path, images: Path) -> None:
    for number in range(3):
        Image.new("L", (4, 4), number).save(images / f"{number}.png")
    for folder in (images / "test").iterdir():
        for file in folder.iterdir():
            file.unlink()
    for number in range(3):
        (images / f"{number}.png").rename(images / "test" / f"{number}.png")
    predict(tmp_path, ImageFolder(str(images)))
    with (tmp_path / "predictions.csv").open() as file:
        rows = [(row["image"], row["label"]) for row in csv.DictReader(file)]
    assert rows == [(f"test/{number}.png", "") for number in range(3)]
