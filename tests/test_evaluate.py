"""Ten crops and one view, against the net run patch by patch."""

from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from alexnet_repro.augment import centre_crop
from alexnet_repro.cli import CONF
from alexnet_repro.data import ValBatch
from alexnet_repro.evaluate import errors, table
from alexnet_repro.store import Store
from alexnet_repro.train import new_classifier


def test_prediction_is_the_mean_softmax_of_ten_patches(small_store: Path) -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", ["recipe=as_run"])
    store = Store(small_store)
    torch.manual_seed(0)
    model = new_classifier(cfg, store).eval()
    split = store.split("val")
    count = 18  # more than predict_step takes at once
    images = torch.stack([torch.from_numpy(split[i % 6].copy()) for i in range(count)])
    with torch.no_grad():
        _, centre, ten = model.predict_step(ValBatch(images, torch.zeros(count, dtype=torch.long)), 0)
        mean = torch.from_numpy(store.mean)[16:240, 16:240]
        for n in (0, 5, 16, 17):
            patches = []
            for top, left in ((0, 0), (0, 32), (32, 0), (32, 32), (16, 16)):
                patch = images[n, top : top + 224, left : left + 224].float()
                patches += [patch - mean, patch.flip(1) - mean]
            softmax = torch.stack([model.net(p.permute(2, 0, 1)[None])[0].softmax(0) for p in patches])
            torch.testing.assert_close(ten[n], softmax.mean(0), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(centre[n], softmax[8], atol=1e-5, rtol=1e-4)
        single = model.net(model.views(ValBatch(images[:2], torch.zeros(2)), centre_crop)).softmax(1)
        torch.testing.assert_close(centre[:2], single, atol=1e-5, rtol=1e-4)


def test_errors_by_counting() -> None:
    softmax = torch.eye(10)[torch.tensor([0, 1, 2, 3])] * 0.5 + torch.arange(10) / 100
    labels = torch.tensor([0, 1, 9, 0])  # right, right, second best, worst but one at best
    assert errors(softmax, labels) == {"top1_error": 50.0, "top5_error": 25.0}


def test_table_sets_the_paper_beside_and_says_what_the_data_is() -> None:
    view = {"top1_error": 12.34, "top5_error": 1.0}
    result = {"claim": "no_lrn", "data": "imagenette", "centre": view, "ten_crop": view}
    text = table(result)
    assert "42.1" in text
    assert "Section 3.3" in text
    assert "imagenette is not ImageNet" in text
    assert "not ImageNet" not in table({**result, "data": "ilsvrc2012"})
    assert "40.7" not in table({**result, "claim": None})
