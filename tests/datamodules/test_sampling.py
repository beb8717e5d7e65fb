import numpy as np
import pytest
import torch

from bioprop.datamodules.sampling import allocate, complement, stratified_sample


@pytest.mark.parametrize(
    ("counts", "size", "expected"),
    [
        ([100, 100, 100], 30, [10, 10, 10]),
        ([60, 30, 10], 20, [12, 6, 2]),
        ([1000, 1000, 1], 20, [10, 9, 1]),  # the rare class would get 0 of its share 0.01
        ([5, 5, 5], 2, [1, 1, 0]),  # fewer than classes: some class is left out
        ([5, 0, 5], 4, [2, 0, 2]),
        ([3, 4], 7, [3, 4]),
    ],
)
def test_allocate(counts, size, expected):
    assert allocate(np.array(counts), size, np.array(counts)).tolist() == expected


def test_allocate_respects_capacity():
    counts = np.array([2, 2, 96])
    assert allocate(counts, 90, counts - 1).tolist() == [1, 1, 88]


def test_sample_is_distinct_stratified_shuffled_and_a_function_of_the_seed():
    labels = torch.arange(4).repeat_interleave(torch.tensor([400, 300, 200, 100]))
    sample = stratified_sample(labels, 100, np.random.default_rng(1))
    assert len(set(sample.tolist())) == 100
    assert torch.bincount(labels[sample]).tolist() == [40, 30, 20, 10]
    assert len(set(labels[sample[:20]].tolist())) > 2
    assert torch.equal(sample, stratified_sample(labels, 100, np.random.default_rng(1)))
    assert not torch.equal(sample.sort().values, stratified_sample(labels, 100, np.random.default_rng(2)).sort().values)


def test_sample_of_more_than_there_is_is_all():
    labels = torch.tensor([0, 1, 1, 0, 2])
    assert stratified_sample(labels, 99, np.random.default_rng(0)).sort().values.tolist() == [0, 1, 2, 3, 4]


def test_complement():
    assert complement(5, torch.tensor([3, 0])).tolist() == [1, 2, 4]
