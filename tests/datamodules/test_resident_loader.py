from typing import Any

import pytest
import torch

from bioprop.datamodules.loader import ORDER_STREAM, ResidentLoader, epoch_generator

IMAGES = torch.arange(23, dtype=torch.uint8).view(23, 1, 1, 1).expand(23, 1, 4, 4).contiguous()
LABELS = torch.arange(23) % 3


def order(loader, epoch=0):
    loader.sampler.set_epoch(epoch)
    return torch.cat([batch[0][:, 0, 0, 0] for batch in loader]).tolist()


def shuffled(seed=0, **kwargs):
    return ResidentLoader(IMAGES, LABELS, 5, seed=seed, shuffle=True, **kwargs)


def test_unshuffled_batches_keep_the_order_and_the_last_partial_batch():
    loader = ResidentLoader(IMAGES, LABELS, 5)
    batches = list(loader)
    assert not hasattr(loader, "sampler")  # else Lightning advises against shuffled validation
    assert len(loader) == len(batches) == 5
    assert [len(labels) for _, labels in batches] == [5, 5, 5, 5, 3]
    assert torch.equal(torch.cat([images for images, _ in batches]), IMAGES)
    assert torch.equal(torch.cat([labels for _, labels in batches]), LABELS)


def test_shuffled_epoch_has_full_batches_of_distinct_images_with_their_labels():
    loader = shuffled()
    batches = list(loader)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert len(loader) == len(batches) == 4
    assert [len(batch[1]) for batch in batches] == [5, 5, 5, 5]
    assert len(set(images[:, 0, 0, 0].tolist())) == 20
    assert torch.equal(labels, images[:, 0, 0, 0].long() % 3)


def test_images_left_out_of_one_epoch_are_in_others():
    assert {image for epoch in range(5) for image in order(shuffled(), epoch)} == set(range(23))


def test_fewer_images_than_a_batch_are_one_batch():
    (batch,) = ResidentLoader(IMAGES, LABELS, 64, shuffle=True)
    assert sorted(batch[0][:, 0, 0, 0].tolist()) == list(range(23))


def test_order_is_a_function_of_seed_and_epoch():
    assert order(shuffled(), 3) == order(shuffled(), 3)
    assert len({tuple(order(shuffled(seed), epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_order_does_not_depend_on_the_global_generator_or_on_augmentation():
    torch.manual_seed(1)
    first = order(shuffled())
    torch.manual_seed(2)
    assert order(shuffled(horizontal_flip=True, crop_padding=2)) == first


def test_draws_are_in_range_and_a_function_of_seed_and_epoch():
    def draws(seed, epoch):
        loader = ResidentLoader(
            IMAGES.repeat(20, 1, 1, 1),
            LABELS.repeat(20),
            50,
            seed=seed,
            shuffle=True,
            horizontal_flip=True,
            crop_padding=2,
        )
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        assert all(len(batch) == 3 and len(batch[2]) == len(batch[1]) for batch in batches)
        return torch.cat([batch[2] for batch in batches])

    first = draws(0, 0)
    assert set(first[:, 0].tolist()) == set(first[:, 1].tolist()) == set(range(5))
    assert 0.4 < first[:, 2].double().mean() < 0.6
    assert not torch.equal(first[:, 0], first[:, 1])
    assert torch.equal(first, draws(0, 0))
    assert not torch.equal(first, draws(0, 1))
    assert not torch.equal(first, draws(1, 0))


@pytest.mark.parametrize(("kwargs", "column"), [({"horizontal_flip": True}, [0, 1]), ({"crop_padding": 2}, [2])])
def test_only_the_augmentation_asked_for_is_drawn(kwargs, column):
    draws = torch.cat([batch[2] for batch in shuffled(**kwargs)])
    assert (draws[:, column] == 0).all()
    assert draws.sum() > 0


def test_the_epoch_is_read_at_the_first_batch():
    loader = shuffled()
    iterator = iter(loader)  # as Lightning does before it calls set_epoch
    loader.sampler.set_epoch(4)
    assert next(iterator)[0][:, 0, 0, 0].tolist() == order(shuffled(), 4)[:5]


def test_a_saved_position_is_resumed_once_and_in_its_own_epoch_only():
    loader = shuffled(horizontal_flip=True)
    loader.sampler.set_epoch(2)
    whole = list(loader)
    iterator = iter(loader)
    next(iterator)
    next(iterator)
    state = loader.state_dict()
    assert state == {"epoch": 2, "batch": 2}

    resumed = shuffled(horizontal_flip=True)
    resumed.load_state_dict(state)
    resumed.sampler.set_epoch(2)
    rest = list(resumed)
    assert len(rest) == 2
    for batch, expected in zip(rest, whole[2:], strict=True):
        assert all(torch.equal(*pair) for pair in zip(batch, expected, strict=True))
    assert len(list(resumed)) == 4

    resumed.load_state_dict(state)
    resumed.sampler.set_epoch(3)
    assert len(list(resumed)) == 4


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_every_row_of_every_batch(processes: int, augmented: bool) -> None:
    settings: dict[str, Any] = {"seed": 4, "horizontal_flip": augmented, "crop_padding": 2 * augmented}
    whole = list(ResidentLoader(IMAGES, LABELS, 6, **settings))
    shares = [list(ResidentLoader(IMAGES, LABELS, 6, share=(rank, processes), **settings)) for rank in range(processes)]
    assert [len(share) for share in shares] == [
        len(ResidentLoader(IMAGES, LABELS, 6, share=(rank, processes), **settings)) for rank in range(processes)
    ]
    for number, batch in enumerate(whole):
        own = [share[number] for share in shares if number < len(share)]
        for rank, parts in enumerate(own):
            for part, full in zip(parts, batch, strict=True):
                assert torch.equal(part, full[rank::processes])
        assert sum(len(parts[1]) for parts in own) == len(batch[1])


def test_in_training_all_processes_have_the_same_number_of_rows() -> None:
    shares = [
        [len(labels) for _, labels in ResidentLoader(IMAGES, LABELS, 6, share=(rank, 2), equal_shares=True)]
        for rank in range(2)
    ]
    assert shares[0] == shares[1]
    assert sum(shares[0]) == len(LABELS) // 2


def test_the_order_is_torchs_permutation_of_the_epochs_generator():
    loader = ResidentLoader(IMAGES, LABELS, 23, seed=4, shuffle=True)
    assert order(loader, 2) == torch.randperm(23, generator=epoch_generator(4, 2, ORDER_STREAM)).tolist()
