"""Images to test and predict where there is no folder `train`: classes and form come from the checkpoint."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from bioprop.cli import main
from bioprop.errors import UserError
from tests.datamodules.folders import bad, held, make, pixels

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(folder, tmp_path):
    """A checkpoint of training on the folder, whose test images remain."""
    state = make(["fit"], data_dir=str(folder), cache=False).state_dict()
    shutil.rmtree(folder / "train")
    torch.save({"state_dict": {}, "ImageFolder": state}, tmp_path / "x.ckpt")
    return str(tmp_path / "x.ckpt")


def test_a_folder_with_test_alone_has_labels(folder, checkpoint):
    data = make(["test", "predict"], data_dir=str(folder), trained_on=checkpoint)
    assert (data.image_shape, data.classes) == ((3, 5, 6), ("ant", "cat"))
    assert held(data, "test").labels.tolist() == [0] * 3 + [1] * 4
    assert torch.equal(held(data, "test").images[0], pixels(folder / "test" / "ant" / "000.png"))
    saved = torch.load(checkpoint)["ImageFolder"]
    assert [each.tolist() for each in data.statistics(CPU)] == [saved["mean"], saved["std"]]
    assert data.prediction_names()[0] == "test/ant/000.png"
    assert not (folder / ".bioprop-cache").exists()


def test_a_flat_folder_and_a_file_are_predicted_at_the_size_that_was_trained_on(folder, checkpoint, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("L", (60, 50), 77).save(photos / "large.png")
    shutil.copy(folder / "test" / "cat" / "001.png", photos / "same.png")
    (photos / "notes.txt").write_text("")
    data = make(["predict"], data_dir=str(photos), trained_on=checkpoint)
    assert data.prediction_names() == ["large.png", "same.png"]
    images, labels, _ = held(data, "test")
    assert labels.tolist() == [2, 2]
    assert bool((images[0] == 77).all())
    assert torch.equal(images[1], pixels(photos / "same.png"))
    data = make(["predict"], data_dir=str(photos / "large.png"), trained_on=checkpoint)
    assert data.prediction_names() == ["large.png"]
    bad("2 test image.* have no label to test on", "test", data_dir=str(photos), trained_on=checkpoint)


def test_what_cannot_be_done_without_training_images(folder, checkpoint, tmp_path):
    bad("test' has no class folders in a folder train", data_dir=str(folder / "test"))
    bad("train' does not exist", "fit", data_dir=str(folder), trained_on=checkpoint)
    bad("nowhere' is not a folder: name that, or an image", data_dir=str(tmp_path / "nowhere"), trained_on=checkpoint)
    (tmp_path / "empty").mkdir()
    bad("empty' has no images: name a folder that has some", data_dir=str(tmp_path / "empty"), trained_on=checkpoint)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    bad("does not say which classes", data_dir=str(folder), trained_on=str(tmp_path / "other.ckpt"))


def test_older_checkpoints_have_the_shape_with_the_network_or_leave_it_to_the_first_image(folder, checkpoint):
    content = torch.load(checkpoint)
    del content["ImageFolder"]["image_shape"]
    Image.new("L", (8, 7)).save(folder / "test" / "ant" / "000.png")
    for network, shape in (({"init_args": {"image_shape": [3, 5, 6]}}, (3, 5, 6)), ({"init_args": None}, (3, 7, 8))):
        torch.save({**content, "hyper_parameters": {"network": network}}, checkpoint)
        data = make(["predict"], data_dir=str(folder), trained_on=checkpoint)
        assert data.image_shape == held(data, "test").images.shape[1:] == shape


def test_the_commands_name_the_checkpoint(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--model=Backprop", "--model.network=MLP", "--data=ImageFolder", "--trainer.enable_progress_bar=false"]
    main(["fit", *words, f"--data.data_dir={folder}", "--trainer.max_epochs=1", "--data.batch_size=8"])
    for name, labels in (("test", ["ant"] * 3 + ["cat"] * 4), ("test/cat", [""] * 4), ("test/ant/001.png", [""])):
        predicted = main(["predict", *words, f"--data.data_dir={folder / name}", "--ckpt_path=best"])
        with Path(predicted.trainer.loggers[0].log_dir, "predictions.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["label"] for row in rows] == labels
        assert {row["prediction"] for row in rows} <= {"ant", "cat"}
    with pytest.raises(UserError, match="predict needs --ckpt_path"):
        main(["predict", *words, f"--data.data_dir={folder / 'test'}"])
