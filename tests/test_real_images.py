"""Test real archives in the folder that ALEXNET_REPRO_DATA names."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from alexnet_repro.data.store import Store

Run = Callable[..., tuple[int, str, str]]
DATA = Path(os.environ.get("ALEXNET_REPRO_DATA", "/nonexistent"))


@pytest.mark.skipif(not (DATA / "ilsvrc-samples.tar").exists(), reason="ALEXNET_REPRO_DATA has no ilsvrc-samples.tar")
def test_original_imagenet_images_are_prepared(cwd: Path, run_command: Run) -> None:
    status, out, err = run_command("prepare", "data=folder", f"source={DATA / 'ilsvrc-samples.tar'}")
    assert status == 0, err
    assert "64 train images of 64 classes" in out
    train = Store("stores/folder").split("train")
    assert len(train) == 64
    grey = [i for i in range(64) if (np.ptp(train[i].astype(int), axis=2) == 0).all()]
    assert grey  # some images are greyscale


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "imagenette.tar").exists(), reason="ALEXNET_REPRO_DATA has no imagenette.tar")
def test_imagenette_has_the_expected_size_and_colour_covariance(cwd: Path, run_command: Run) -> None:
    status, out, err = run_command("prepare", "data=imagenette", f"source={DATA / 'imagenette.tar'}")
    assert status == 0, err
    assert "9469 train, 3925 val images of 10 classes" in out
    deviations = np.linalg.eigvalsh(Store("stores/imagenette").covariance) ** 0.5
    # cuda-convnet2's values for all of ILSVRC-2012 are 19.7, 37.1 and 121.8; these ten classes have similar values
    np.testing.assert_allclose(deviations, [19.7, 37.1, 121.8], rtol=0.25)
