"""Which network reads which sample when."""

import torch

from fastmerge.data import dataset
from fastmerge.data.dataset import Dataset, SameForAll, StackedBatches, held_out


def numbered(count: int) -> Dataset:
    """Samples that know their number, which is their target too."""
    numbers = torch.arange(count)
    inputs = numbers.float()[:, None] * torch.ones(3)
    return Dataset(inputs, numbers, inputs[:2], numbers[:2])


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_every_network_reads_every_sample_once_in_an_order_of_its_own(monkeypatch):
    monkeypatch.setattr(dataset, "_CHUNK_BYTES", 200)  # several gathers per epoch
    batches = StackedBatches(numbered(23), 5, generators(3))
    epochs = [list(batches) for _ in range(2)]
    for epoch in epochs:
        assert [inputs.shape for inputs, _ in epoch] == [(3, 5, 3)] * 4 + [(3, 3, 3)]
        for inputs, targets in epoch:
            assert torch.equal(inputs[:, :, 0].long(), targets)
        read = torch.cat([targets for _, targets in epoch], 1)
        assert torch.equal(read.sort(1).values, torch.arange(23).expand(3, 23))
    orders = [torch.cat([targets for _, targets in epoch], 1) for epoch in epochs]
    assert len({tuple(row) for found in orders for row in found.tolist()}) == 6


def test_order_is_that_of_randperm_whatever_is_gathered_at_once(monkeypatch):
    expected = torch.randperm(23, generator=torch.Generator().manual_seed(1))
    for size in (1, 200, 10**6):
        monkeypatch.setattr(dataset, "_CHUNK_BYTES", size)
        batches = StackedBatches(numbered(23), 5, generators(2))
        assert torch.equal(torch.cat([targets[1] for _, targets in batches]), expected)


def test_a_batch_is_never_larger_than_the_data():
    small = StackedBatches(numbered(3), 5, generators(1))
    assert [inputs.shape[1] for inputs, _ in small] == [3]


def test_augmentation_comes_before_normalisation():
    images = torch.randint(0, 255, (6, 1, 4, 4), dtype=torch.uint8)
    data = Dataset(images, torch.arange(6), images, torch.arange(6), torch.full((1, 1, 1), 100.0), torch.tensor(2.0))
    seen = []

    def augment(batch, generator):
        seen.append(batch)
        return batch.flip(0)

    batches = StackedBatches(data, 4, generators(2), augment, torch.Generator())
    inputs, targets = next(iter(batches))
    assert seen[0].dtype == torch.uint8
    assert seen[0].shape == (8, 1, 4, 4)
    torch.testing.assert_close(inputs[0, 0], (images[targets[1, 3]].float() - 100) / 2)


def test_a_state_gives_the_same_epochs_again():
    images = torch.rand(12, 1, 2, 2)
    data = Dataset(images, torch.arange(12), images, torch.arange(12))

    def noisy(batch, generator):
        return batch + torch.rand(batch.shape, generator=generator)

    batches = StackedBatches(data, 5, generators(2), noisy, torch.Generator())
    assert len(batches) == len(list(batches)) == 3
    state = batches.state_dict()
    expected = list(batches)
    other = StackedBatches(data, 5, generators(2), noisy, torch.Generator())
    other.load_state_dict(state)
    for (inputs, targets), (x, y) in zip(other, expected, strict=True):
        assert torch.equal(inputs, x)
        assert torch.equal(targets, y)


def test_all_networks_are_tested_on_the_same(monkeypatch):
    monkeypatch.setattr(dataset, "_VALUES_AT_ONCE", 400)
    data = numbered(23)
    tests = SameForAll(Dataset(data.train_inputs, data.train_targets, data.train_inputs, data.train_targets), 2)
    batches = list(tests)
    assert len(tests) == len(batches) == 12
    assert torch.equal(torch.cat([targets for _, targets in batches], 1), torch.arange(23).expand(2, 23))
    assert all(torch.equal(inputs[:, :, 0].long(), targets) for inputs, targets in batches)


def test_what_is_held_out_is_not_trained_on_and_even_over_the_classes():
    labels = torch.arange(40).remainder(4)
    data = Dataset(torch.arange(40.0)[:, None], labels, torch.zeros(2, 1), labels[:2])
    rest, held = held_out(data, 0.2)
    assert torch.bincount(held.test_targets).tolist() == [2] * 4
    assert torch.bincount(rest.train_targets).tolist() == [8] * 4
    assert sorted(torch.cat([rest.train_inputs, held.test_inputs]).flatten().tolist()) == list(range(40))
    assert torch.equal(rest.test_inputs, data.test_inputs)
    points = Dataset(torch.rand(10, 1), torch.rand(10, 1), torch.rand(2, 1), torch.rand(2, 1))
    assert len(held_out(points, 0.01)[1].test_inputs) == 1
