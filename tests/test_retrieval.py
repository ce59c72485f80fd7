"""Compare nearest images and binary codes with plain loops and known clusters."""

import torch

from alexnet_repro.page.retrieval import nearest, same_class, train_autoencoder


def test_nearest_images_equal_those_of_a_loop() -> None:
    torch.manual_seed(0)
    queries, images = torch.randn(5, 7), torch.randn(9001, 7)
    found = nearest(queries, images, k=6)
    for query, line in zip(queries, found, strict=True):
        distances = [float((query - image).square().sum()) for image in images]
        assert line.tolist() == sorted(range(len(images)), key=distances.__getitem__)[:6]


def test_nearest_returns_all_images_if_fewer_than_k() -> None:
    assert sorted(nearest(torch.zeros(1, 2), torch.eye(2), k=6)[0].tolist()) == [0, 1]


def test_same_class_share_equals_a_count() -> None:
    places = torch.tensor([[0, 1], [2, 3]])
    assert same_class(places, torch.tensor([4, 5, 5, 4]), torch.tensor([4, 5])) == 50.0


def test_codes_keep_clusters_together() -> None:
    """Codes of 64 bits find the cluster of a query among ten clusters in 200 dimensions, and are reproducible."""
    torch.manual_seed(0)
    centres = torch.randn(10, 200)
    labels = torch.arange(500) % 10
    features = centres[labels] + 0.5 * torch.randn(500, 200)
    queries = centres + 0.5 * torch.randn(10, 200)
    state = torch.get_rng_state()
    coder = train_autoencoder(features, seed=1, steps=200)
    assert torch.equal(torch.get_rng_state(), state)  # the global random state is unchanged
    codes = coder.codes(features)
    assert codes.shape == (500, 64)
    assert set(codes.unique().tolist()) == {0, 1}
    assert same_class(nearest(coder.codes(queries), codes), labels, torch.arange(10)) > 80
    again = train_autoencoder(features, seed=1, steps=200).codes(features)
    assert torch.equal(codes, again)
