"""Data modules inside a real Trainer: epochs, resuming, evaluation, checkpoints."""

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from bioprop.datamodules import CIFAR10, Digits, ImageFolder

pytestmark = [
    # Lightning 2.6.6's own use of torch's pytree, under torch 2.15
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    # the resumed runs save no checkpoints, on purpose
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]

OPTIONS = {"batch_size": 16, "limit_train": 86, "limit_val": 20, "horizontal_flip": True, "crop_padding": 2}


class Recorder(LightningModule):
    """Remembers the batches it sees."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(256, 10)
        self.seen = []
        self.evaluated = []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        assert images.dtype == torch.float32
        self.seen.append((self.current_epoch, batch_idx, hash(images.numpy().tobytes()), tuple(labels.tolist())))
        return torch.nn.functional.cross_entropy(self.layer(images.flatten(1)), labels)

    def validation_step(self, batch, batch_idx):
        self.evaluated.append(batch)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return batch[1]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer(tmp_path, checkpoint=None, **kwargs):
    return Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=checkpoint is not None,
        callbacks=[checkpoint] if checkpoint is not None else [],
        **{"max_epochs": 3, "num_sanity_val_steps": 0, **kwargs},
    )


def run(tmp_path, checkpoint=None, ckpt_path=None, **kwargs):
    model = Recorder()
    trainer(tmp_path, checkpoint, **kwargs).fit(model, datamodule=Digits(**OPTIONS), ckpt_path=ckpt_path)
    return model


def test_epochs_differ_and_runs_repeat(tmp_path):
    seen = run(tmp_path).seen
    assert [(epoch, batch) for epoch, batch, *_ in seen] == [(e, b) for e in range(3) for b in range(5)]
    assert [len(labels) for *_, labels in seen[:5]] == [16] * 5  # the other 6 images wait for another epoch
    assert len({pixels for _, _, pixels, _ in seen}) == 15
    assert run(tmp_path, num_sanity_val_steps=2).seen == seen


@pytest.mark.parametrize(
    ("when", "fit"),
    [
        ({"every_n_epochs": 1}, {}),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, {}),
        ({"every_n_train_steps": 3}, {}),
        ({"every_n_train_steps": 5}, {}),
        ({"every_n_train_steps": 1}, {"limit_train_batches": 2}),
        ({"save_on_train_epoch_end": False}, {"val_check_interval": 2}),
    ],
    ids=["validation", "epoch", "mid-epoch", "last-batch", "limited", "mid-epoch-validation"],
)
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(tmp_path, when, fit):
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}-{step}", save_top_k=-1, **when)
    whole = run(tmp_path, checkpoint, **fit)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) >= 3
    for path in paths:
        step = torch.load(path, weights_only=True)["global_step"]
        resumed = run(tmp_path, ckpt_path=path, **fit)
        assert resumed.seen == whole.seen[step:], path.name
        assert torch.equal(resumed.layer.weight, whole.layer.weight), path.name


def test_limit_train_batches(tmp_path):
    full, limited = run(tmp_path).seen, run(tmp_path, limit_train_batches=2).seen
    assert limited == [step for step in full if step[1] < 2]


def test_overfit_batches_repeats_the_same_batches(tmp_path):
    seen = run(tmp_path, overfit_batches=2).seen
    assert len(seen) == 6
    assert len({step[2] for step in seen}) == 2
    assert {step[1:] for step in seen[:2]} == {step[1:] for step in seen[2:4]} == {step[1:] for step in seen[4:]}


def test_validate_and_fit_with_one_data_module(tmp_path):
    data, model = Digits(**OPTIONS), Recorder()
    trainer(tmp_path).validate(model, data, verbose=False)
    trainer(tmp_path).fit(model, data)
    assert model.seen == run(tmp_path).seen


def test_evaluation_and_prediction_count_every_image_once(tmp_path):
    data, model = Digits(batch_size=100), Recorder()
    trainer(tmp_path).validate(model, data, verbose=False)
    assert sum(len(labels) for _, labels in model.evaluated) == 144
    model.evaluated.clear()
    trainer(tmp_path).test(model, data, verbose=False)
    assert [len(labels) for _, labels in model.evaluated] == [100, 100, 100, 59]
    predictions = torch.cat(trainer(tmp_path).predict(model, data))
    assert torch.equal(predictions, data.resident["test"].labels)
    assert len(predictions) == len(data.prediction_names())


def test_checkpoints_hold_the_arguments_as_plain_data(tmp_path, write_images):
    checkpoint = ModelCheckpoint(tmp_path, "model")
    run(tmp_path, checkpoint, max_epochs=1)
    content = torch.load(tmp_path / "model.ckpt", weights_only=True)
    defaults = {"image_size": 16, "val_fraction": 0.1, "normalization": "train", "seed": 0, "limit_test": None}
    assert content["datamodule_hyper_parameters"] == {**OPTIONS, **defaults}
    loaded = Digits.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert dict(loaded.hparams) == {**OPTIONS, **defaults}
    folder = write_images("train", {"a": 2, "b": 2})
    for data in (ImageFolder(folder), CIFAR10(folder)):
        assert data.hparams["data_dir"] == str(folder)
        assert all(value is None or type(value) in (bool, int, float, str) for value in data.hparams.values())
