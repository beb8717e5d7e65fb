"""The promises of every data module, as a test suite to inherit."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer

from bioprop.datamodules.base import ImageDataModule, Split
from bioprop.errors import UserError

CPU = torch.device("cpu")


class _Probe(LightningModule):
    """Keeps the batches that it is given, and has a weight to train."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.batches.append(batch)
        loss: torch.Tensor = self.weight * batch[0].mean()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Does nothing: Lightning asks for such a step where there are validation images."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class DataModuleContract(ABC):
    """Promises of every data module: a test class inherits them all, names the class and overrides `write`.

    The files that it writes need two classes or more, with 20 images to train on, 7 to validate on and 5 to test on at
    least, as the class splits them.

    Attributes:
        cls: The data module.
    """

    pytestmark: ClassVar = [
        pytest.mark.filterwarnings(f"ignore:{message}")
        for message in (
            ".*LeafSpec.* is deprecated:FutureWarning",
            "The '.*_dataloader' does not have many workers",
            "The number of training batches .* is smaller than the logging interval",
        )
    ]
    cls: ClassVar[Callable[..., ImageDataModule]]

    @abstractmethod
    def write(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        """Writes small files of the exact format and returns the arguments to read them with."""

    @pytest.fixture
    def arguments(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        return self.write(tmp_path, monkeypatch)

    def ready(self, arguments: dict[str, Any], *stages: str, **kwargs: Any) -> ImageDataModule:
        data = self.cls(**{**arguments, "batch_size": 16, **kwargs})
        data.prepare_data()
        for stage in stages:
            data.setup(stage)
        return data

    def test_shape_and_classes_are_known_before_setup(self, arguments: dict[str, Any]) -> None:
        data = self.cls(**arguments)
        channels, height, width = data.image_shape
        assert channels in (1, 3)
        assert min(height, width) > 0
        assert data.num_classes == len(data.classes) == len(set(data.classes)) >= 2

    def test_train_and_validation_images_are_disjoint_and_of_all_classes(self, arguments: dict[str, Any]) -> None:
        data = self.ready(arguments, "fit")
        train, val = data.resident["train"], data.resident["val"]
        assert not set(train.indices.tolist()) & set(val.indices.tolist())
        for split in (train, val):
            assert len(split.images) == len(split.labels) == len(split.indices)
            assert set(split.labels.tolist()) == set(range(data.num_classes))
        assert not torch.equal(val.labels, val.labels.sort().values)

    def test_the_seed_decides_the_validation_images_and_not_the_test_images(self, arguments: dict[str, Any]) -> None:
        first, same, other = (self.ready(arguments, "fit", "test", seed=seed) for seed in (0, 0, 1))
        assert torch.equal(first.resident["val"].indices, same.resident["val"].indices)
        assert set(first.resident["val"].indices.tolist()) != set(other.resident["val"].indices.tolist())
        assert torch.equal(first.resident["test"].indices, other.resident["test"].indices)

    def test_batches_are_images_and_labels_normalised(self, arguments: dict[str, Any]) -> None:
        data = self.ready(arguments, "fit", horizontal_flip=True, crop_padding=2)
        images, labels, draws = next(iter(data.train_dataloader()))
        assert images.dtype == torch.uint8
        assert images.shape == (16, *data.image_shape)
        assert draws.shape == (16, 3)
        images, labels = data.on_after_batch_transfer((images, labels, draws), 0)
        assert images.dtype == torch.float32
        assert images.shape == (16, *data.image_shape)
        assert labels.dtype == torch.int64

    def test_training_images_have_mean_0_and_std_1_by_their_own_statistics(self, arguments: dict[str, Any]) -> None:
        data = self.ready(arguments, "fit", normalization="train", batch_size=10_000)
        batch = next(iter(data.train_dataloader()))
        images, _ = data.on_after_batch_transfer(batch[:2], 0)
        assert images.mean((0, 2, 3)).abs().max() < 1e-4
        assert (images.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-4

    def test_evaluation_sees_every_image_once_without_augmentation(self, arguments: dict[str, Any]) -> None:
        data = self.ready(arguments, "fit", "test", horizontal_flip=True, crop_padding=2)
        for batches, resident in (
            (list(data.val_dataloader()), data.resident["val"]),
            (list(data.test_dataloader()), data.resident["test"]),
        ):
            assert all(len(batch) == 2 for batch in batches)
            assert torch.equal(torch.cat([batch[1] for batch in batches]), resident.labels)
        assert torch.equal(data.resident["test"].indices, data.resident["test"].indices.sort().values)
        assert len(set(data.prediction_names())) == len(data.resident["test"].labels)

    def test_limits(self, arguments: dict[str, Any]) -> None:
        data = self.ready(arguments, "fit", "test", limit_train=20, limit_val=7, limit_test=5)
        assert [len(data.resident[split].labels) for split in get_args(Split)] == [20, 7, 5]
        whole = self.ready(arguments, "fit")
        assert set(data.resident["val"].indices.tolist()) <= set(whole.resident["val"].indices.tolist())
        assert set(data.resident["train"].indices.tolist()) <= set(whole.resident["train"].indices.tolist())

    def test_more_than_there_is_is_all_of_it(self, arguments: dict[str, Any]) -> None:
        data = self.ready(arguments, "fit", batch_size=10**12, limit_train=10**9)
        assert [len(batch[1]) for batch in data.train_dataloader()] == [len(data.resident["train"].labels)]

    def test_runs_repeat_and_epochs_differ(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        def run() -> list[bytes]:
            model = _Probe()
            Trainer(
                default_root_dir=tmp_path,
                accelerator="cpu",
                max_epochs=2,
                limit_train_batches=2,
                limit_val_batches=0,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            ).fit(model, datamodule=self.cls(**arguments, batch_size=8))
            return [images.numpy().tobytes() for images, _ in model.batches]

        first = run()
        assert run() == first
        assert len(set(first)) == 4

    def test_checkpoints_hold_the_arguments_as_plain_data(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        data = self.ready({**arguments, **{key: Path(v) for key, v in arguments.items() if key == "data_dir"}}, "fit")
        torch.save({"hyper": dict(data.hparams), "state": data.state_dict()}, tmp_path / "saved")
        content = torch.load(tmp_path / "saved", weights_only=True)
        assert content["hyper"].items() >= arguments.items()
        again = self.cls(**content["hyper"])
        again.load_state_dict(content["state"])
        for mine, theirs in zip(again.statistics(CPU), data.statistics(CPU), strict=True):
            assert torch.equal(mine, theirs)
        with pytest.raises(
            UserError, match=r"trained on the classes a, b, but these images have .*same classes"
        ) as caught:
            again.load_state_dict({**content["state"], "classes": ["a", "b"]})
        assert len(str(caught.value)) < 700

    @pytest.mark.parametrize(
        ("argument", "value"),
        [("batch_size", 0), ("crop_padding", -1), ("seed", -1), ("limit_train", 0), ("normalization", "mnist")],
    )
    def test_bad_arguments_are_named(self, arguments: dict[str, Any], argument: str, value: object) -> None:
        with pytest.raises(UserError, match=argument) as caught:
            self.cls(**{**arguments, argument: value})
        assert str(value) in str(caught.value)
        assert "\n" not in str(caught.value)
