import pytest
import torch
from sklearn.datasets import load_digits

from bioprop.datamodules import Digits
from bioprop.errors import UserError

CPU = torch.device("cpu")


def ready(stages=("fit", "test"), **kwargs):
    data = Digits(**kwargs)
    for stage in stages:
        data.setup(stage)
    return data


def keys(resident):
    return {image.tobytes() for image in resident.images.numpy()}


@pytest.mark.parametrize("size", [16, 32])
def test_images_are_the_digits_enlarged(size):
    data = Digits(image_size=size)
    assert (data.image_shape, data.num_classes, data.classes) == ((1, size, size), 10, tuple("0123456789"))
    data.setup("test")
    images, labels, _ = data.resident["test"]
    assert images.dtype == torch.uint8
    assert images.shape[1:] == data.image_shape
    assert images.max() == 255
    # averaging the enlarged pixels gives back, up to interpolation and rounding, digits of the set
    small = torch.nn.functional.adaptive_avg_pool2d(images.double(), 8)[:, 0] * (16 / 255)
    originals, targets = load_digits(return_X_y=True)
    distances = torch.cdist(small.flatten(1), torch.from_numpy(originals))
    assert torch.equal(torch.from_numpy(targets)[distances.argmin(1)], labels)
    assert len(set(distances.argmin(1).tolist())) == len(labels)


def test_splits_have_the_documented_sizes_and_are_stratified():
    data = ready()
    sizes = {split: len(resident.labels) for split, resident in data.resident.items()}
    assert sizes == {"train": 1294, "val": 144, "test": 359}
    whole = torch.bincount(torch.from_numpy(load_digits().target)) / 1797
    for resident in data.resident.values():
        assert (torch.bincount(resident.labels) - whole * len(resident.labels)).abs().max() < 1.5


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5])
def test_val_fraction_is_respected(fraction):
    data = ready(("fit",), val_fraction=fraction)
    assert len(data.resident["val"].labels) == round(fraction * 1438)
    assert len(data.resident["train"].labels) == 1438 - round(fraction * 1438)


def test_splits_are_disjoint_and_cover_the_set():
    train, val, test = (keys(ready().resident[split]) for split in ("train", "val", "test"))
    assert len(train | val | test) == len(train) + len(val) + len(test) == 1797


def test_the_seed_changes_the_validation_split_but_not_the_test_images():
    first, same, other = ready(seed=0), ready(seed=0), ready(seed=1)
    assert torch.equal(first.resident["test"].images, other.resident["test"].images)
    assert torch.equal(first.resident["val"].images, same.resident["val"].images)
    assert keys(first.resident["val"]) != keys(other.resident["val"])


def test_the_test_images_influence_nothing():
    changed, plain = Digits(), ready()
    changed._images[changed._places["test"]] = 7.0
    changed.setup("fit")
    for split in ("train", "val"):
        assert all(torch.equal(*pair) for pair in zip(changed.resident[split], plain.resident[split], strict=True))
    assert all(torch.equal(*pair) for pair in zip(changed.statistics(CPU), plain.statistics(CPU), strict=True))


def test_train_and_validation_images_are_not_sorted_by_class():
    data = ready()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert set(next(iter(loader))[1].tolist()) == set(range(10))
    assert set(data.resident["train"].labels[:64].tolist()) == set(range(10))  # what overfit_batches sees


def test_limits_are_stratified_and_independent_of_each_other():
    data = ready(limit_train=100, limit_val=20, limit_test=10)
    for split, size in (("train", 100), ("val", 20), ("test", 10)):
        counts = torch.bincount(data.resident[split].labels, minlength=10)
        assert counts.sum() == size
        assert counts.min() >= size // 10 - 1
        assert counts.min() >= 1
    train_alone = ready(limit_train=100)
    assert torch.equal(train_alone.resident["train"].images, data.resident["train"].images)
    assert keys(data.resident["val"]) < keys(train_alone.resident["val"])


def test_only_what_is_needed_is_decoded_and_only_once(monkeypatch):
    decoded = []
    decode = Digits._decode
    monkeypatch.setattr(Digits, "_decode", lambda *args: decoded.append(len(args[2])) or decode(*args))
    assert ready(("test", "predict"), normalization="none", limit_test=20).resident.keys() == {"test"}
    assert decoded == [20]
    decoded.clear()
    data = ready(("validate",), limit_train=30, limit_val=15)  # "train" statistics need the training images
    assert decoded == [30, 15]
    data.setup("fit")
    data.setup("test")
    assert decoded == [30, 15, 359]


def test_normalised_training_images_have_mean_0_and_std_1():
    data = ready(limit_train=200, batch_size=50)
    images = torch.cat([data.on_after_batch_transfer(batch, 0)[0] for batch in data.train_dataloader()])
    assert images.dtype == torch.float32
    assert images.mean().abs() < 1e-5
    assert (images.std(correction=0) - 1).abs() < 1e-5
    plain = ready(normalization="none")
    images, _ = plain.on_after_batch_transfer(next(iter(plain.val_dataloader())), 0)
    assert (images.min(), images.max()) == (0, 1)


def test_evaluation_batches_hold_every_image_once_and_are_not_augmented():
    data = ready(horizontal_flip=True, crop_padding=2, batch_size=100)
    for loader, split in ((data.val_dataloader(), "val"), (data.test_dataloader(), "test")):
        batches = list(loader)
        assert all(len(batch) == 2 for batch in batches)
        assert torch.equal(torch.cat([images for images, _ in batches]), data.resident[split].images)
    assert [len(labels) for _, labels in data.predict_dataloader()] == [100, 100, 100, 59]


def test_training_batches_are_augmented_by_their_draws():
    data = ready(horizontal_flip=True, normalization="none", batch_size=2000)
    images, labels, draws = next(iter(data.train_dataloader()))
    result, same_labels = data.on_after_batch_transfer((images, labels, draws), 0)
    flipped = draws[:, 2] == 1
    assert 0 < flipped.sum() < len(labels)
    assert torch.equal(result[flipped], images[flipped].flip(3) / 255)
    assert torch.equal(result[~flipped], images[~flipped] / 255)
    assert torch.equal(labels, same_labels)


def test_a_bare_tensor_passes_unchanged():
    example = torch.randn(2, 1, 16, 16)
    assert Digits().on_after_batch_transfer(example, 0) is example


def test_prediction_names_are_indices():
    assert Digits().prediction_names() == [str(index) for index in range(359)]
    names = Digits(limit_test=30).prediction_names()
    assert len(set(names)) == 30
    assert names == sorted(names, key=int)


def test_text_form():
    assert str(Digits(batch_size=7)).startswith("Digits(batch_size=7, ")
    assert str(Digits()).endswith(", image_size=16)")


@pytest.mark.parametrize(
    ("argument", "value", "advice"),
    [
        ("batch_size", 0, "choose 1 or more"),
        ("crop_padding", -1, "choose 0 or more"),
        ("seed", -1, "choose 0 or more"),
        ("limit_train", 0, "choose 1 or more"),
        ("limit_val", 0, "choose 1 or more"),
        ("limit_test", -3, "choose 1 or more"),
        ("val_fraction", 0.0, "between 0 and 1"),
        ("val_fraction", 1.0, "between 0 and 1"),
        ("val_fraction", float("nan"), "between 0 and 1"),
        ("normalization", "mnist", "train, cifar10, imagenet32, none"),
        ("normalization", "cifar10", "'train' or 'none'"),
    ],
)
def test_bad_arguments(argument, value, advice):
    with pytest.raises(UserError) as caught:
        Digits(**{argument: value})
    message = str(caught.value)
    assert argument in message
    assert str(value) in message
    assert advice in message
    assert "\n" not in message


def test_a_fraction_that_leaves_a_class_nothing_to_train_on():
    with pytest.raises(UserError, match=r"val_fraction 0\.999 of 1438 .* choose at most 0\.993"):
        Digits(val_fraction=0.999).setup("fit")
