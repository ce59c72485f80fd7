"""Nearest images and short codes, against plain loops and clusters that are known."""

import torch

from alexnet_repro.page.retrieval import nearest, same_class, train_autoencoder


def test_nearest_by_a_loop_over_several_parts() -> None:
    torch.manual_seed(0)
    queries, images = torch.randn(5, 7), torch.randn(9001, 7)
    found = nearest(queries, images, k=6)
    for query, line in zip(queries, found, strict=True):
        distances = [float((query - image).square().sum()) for image in images]
        assert line.tolist() == sorted(range(len(images)), key=distances.__getitem__)[:6]


def test_fewer_images_than_requested() -> None:
    assert sorted(nearest(torch.zeros(1, 2), torch.eye(2), k=6)[0].tolist()) == [0, 1]


def test_share_of_the_same_class_by_counting() -> None:
    places = torch.tensor([[0, 1], [2, 3]])
    assert same_class(places, torch.tensor([4, 5, 5, 4]), torch.tensor([4, 5])) == 50.0


def test_codes_keep_clusters_together() -> None:
    """Ten clusters in 200 dimensions: codes of 64 bits find a query's own far better than guessing, and alike each time."""
    torch.manual_seed(0)
    centres = torch.randn(10, 200)
    labels = torch.arange(500) % 10
    features = centres[labels] + 0.5 * torch.randn(500, 200)
    queries = centres + 0.5 * torch.randn(10, 200)
    state = torch.get_rng_state()
    coder = train_autoencoder(features, seed=1, steps=200)
    assert torch.equal(torch.get_rng_state(), state)  # others' random numbers are left alone
    codes = coder.codes(features)
    assert codes.shape == (500, 64)
    assert set(codes.unique().tolist()) == {0, 1}
    assert same_class(nearest(coder.codes(queries), codes), labels, torch.arange(10)) > 80
    again = train_autoencoder(features, seed=1, steps=200).codes(features)
    assert torch.equal(codes, again)
