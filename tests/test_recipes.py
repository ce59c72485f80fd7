"""Compose each recipe and ablation as on the command line, and test what it does."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from alexnet_repro.claims.paper import claim_of, read_claims
from alexnet_repro.configs import CONF, leaves
from alexnet_repro.data.batches import TrainBatch, ValBatch
from alexnet_repro.data.module import StoreData
from alexnet_repro.data.store import Store
from alexnet_repro.errors import UserError
from alexnet_repro.training.classifier import Classifier
from alexnet_repro.training.setup import check, new_classifier

RECIPES = ("paper", "as_run")
ABLATIONS = sorted(file.stem for file in Path(CONF, "ablation").glob("*.yaml"))


def composed(store: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("train", ["data=folder", f"data.store={store}", *overrides])


def first_batch(cfg: DictConfig, store: Path) -> TrainBatch:
    patches = {key: cfg.augment[key] for key in ("crop", "random_crops", "mirror", "share")}
    return next(iter(StoreData(Store(store), batch_size=2, seed=0, patches=patches).train_dataloader()))


@pytest.mark.parametrize(
    ("recipe", "ablation"),
    # all ablations with recipe=paper; with recipe=as_run, those that affect what it does differently
    [("paper", ablation) for ablation in ABLATIONS]
    + [("as_run", ablation) for ablation in ("none", "no_lrn")]
    + [
        pytest.param("as_run", name, marks=pytest.mark.slow)
        for name in ("one_gpu", "no_communication", "no_colour_noise")
    ],
)
def test_every_ablation_of_every_recipe_takes_a_step(recipe: str, ablation: str, small_store: Path) -> None:
    cfg = composed(small_store, f"recipe={recipe}", f"+ablation={ablation}")
    check(cfg)
    cfg.optim.lr = min(cfg.optim.lr, 0.001)
    torch.manual_seed(0)
    model = new_classifier(cfg, Store(small_store))
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Optimizer)
    before = [model.net.fc8.weight.detach().clone(), model.net.fc8.bias.detach().clone()]
    loss = model.loss(first_batch(cfg, small_store))
    loss.backward()
    optimizer.step()
    assert math.isfinite(loss.item())
    assert all(p.isfinite().all() for p in model.net.parameters())
    assert not torch.equal(model.net.fc8.weight, before[0])
    assert not torch.equal(model.net.fc8.bias, before[1])
    if claim := claim_of(cfg):
        named = read_claims()[claim].run[0]["ablation"]
        assert set(cfg.ablation or ["none"]) <= set([named] if isinstance(named, str) else named)


def test_an_ablation_changes_only_what_it_says(small_store: Path) -> None:
    """Compare with this list, which was typed from the sentences of the paper."""
    expected = {
        "none": set(),
        "tanh": {"net.activation"}, "abs_tanh": {"net.activation"}, "sigmoid": {"net.activation"},
        "no_lrn": {"net.lrn"}, "non_overlapping_pooling": {"net.pooling"}, "one_gpu": {"net.towers"},
        "no_communication": {"net.communication"}, "no_dropout": {"net.dropout"},
        "no_conv3": {"net.conv3"}, "no_conv4": {"net.conv4"}, "no_conv5": {"net.conv5"},
        "no_colour_noise": {"augment.colour_noise"}, "colour_jitter": {"augment.colour_noise", "augment.jitter"},
        "no_crops": {"augment.random_crops", "augment.mirror"}, "no_weight_decay": {"optim.weight_decay"},
        "zero_biases": {"net.bias_init"},
    }  # fmt: skip
    assert set(expected) == set(ABLATIONS)

    plain = dict(leaves(composed(small_store)))
    for name, changed in expected.items():
        with_it = dict(leaves(composed(small_store, f"+ablation={name}")))
        differing = {key for key in {**plain, **with_it} if plain.get(key) != with_it.get(key)}
        # an ablation with a run in the log also selects its schedule, which this recipe does not follow
        differing = {key for key in differing if not key.startswith(("ablation", "schedule.by_hand"))}
        assert differing == changed, name
        text = Path(CONF, "ablation", f"{name}.yaml").read_text()
        assert name == "none" or f"train data=ilsvrc2012 +ablation={name}\n" in text


def test_conflicting_ablations_and_options_are_refused(small_store: Path) -> None:
    for overrides in (["+ablation=[tanh,sigmoid]"], ["+ablation=no_lrn", "net.lrn=true"]):
        with pytest.raises(UserError, match="is not in effect"):
            check(composed(small_store, *overrides))
    cfg = composed(small_store, "+ablation=[no_lrn,no_conv3,no_conv4]", "recipe=as_run")
    check(cfg)
    assert (cfg.net.lrn, cfg.net.conv3, cfg.net.conv4, cfg.net.conv5) == (False, False, False, True)
    assert claim_of(cfg) is None


def test_option_of_one_recipe_works_in_the_other(small_store: Path) -> None:
    mixed = composed(small_store, "net.init=as_run", "augment.share=32")
    assert (mixed.recipe, mixed.net.init, mixed.augment.share) == ("paper", "as_run", 32)
    assert mixed.net.layer1_order == "relu_norm_pool"


# Typed from the facts about the 2012 program: option, the paper's value, the program's value.
DIFFERENCES = {
    "net.lrn_alpha": (1e-4, 1e-4 / 5),
    "net.layer1_order": ("relu_norm_pool", "norm_pool_relu"),
    "net.same_map_norm": (False, True),
    "net.init": ("paper", "as_run"),
    "optim.bias_rate": (1, 2),
    "optim.bias_decay": (True, False),
    "schedule.rule": ("when_error_stalls", "by_hand"),
    "augment.share": (1, 32),
    "augment.colour_unit": ("eigenvalue", "deviation"),
    "augment.colour_divisor": (1, 1.1),
    "augment.colour_noise_epochs": (None, 68),
    "order": ("reshuffled", "fixed"),
    "epochs": (90, 93),
    "augment.mean": ("patch", "centre"),
}


@pytest.mark.parametrize("column", [0, 1])
def test_recipes_differ_where_the_paper_and_the_2012_program_differ(column: int, small_store: Path) -> None:
    cfg = composed(small_store, f"recipe={RECIPES[column]}")
    assert {key: OmegaConf.select(cfg, key) for key in DIFFERENCES} == {
        key: pytest.approx(values[column]) if isinstance(values[column], float) else values[column]
        for key, values in DIFFERENCES.items()
    }
    same = {"optim.lr": 0.01, "optim.momentum": 0.9, "optim.weight_decay": 0.0005, "batch_size": 128}
    assert {key: OmegaConf.select(cfg, key) for key in same} == same


def test_documentation_lists_every_difference_with_its_values(small_store: Path) -> None:
    page = (Path(CONF).parent / "docs" / "recipes.md").read_text()
    paper, as_run = (composed(small_store, f"recipe={recipe}") for recipe in RECIPES)

    one, other = dict(leaves(paper)), dict(leaves(as_run))
    differing = {key for key in one if one[key] != other[key]} - {"recipe"}
    assert differing == set(DIFFERENCES)

    def written(value: object) -> str:
        return json.dumps(value).strip('"')

    for key in differing:
        assert f"| `{key}` | `{written(one[key])}` | `{written(other[key])}` |" in page, key


def test_training_images_of_both_recipes_equal_plain_numpy(small_store: Path) -> None:
    store = Store(small_store)
    split, mean = store.split("train"), store.mean.astype(np.float64)
    values, vectors = np.linalg.eigh(store.covariance)
    for recipe in RECIPES:
        cfg = composed(small_store, f"recipe={recipe}")
        model = new_classifier(cfg, store)
        batch = first_batch(cfg, small_store)
        got = model.training_images(batch)
        for n in range(2):
            index = next(
                i for i in range(12) if split.labels[i] == batch.labels[n] and _is_cut_from(batch, n, split[i])
            )
            top, left = int(batch.tops[n]), int(batch.lefts[n])
            image = split[index].astype(np.float64)
            # eigenvectors are unique only up to sign, so give NumPy's the signs of torch's
            signs = np.sign((vectors * model_vectors(store)).sum(0))
            alphas = 0.1 * batch.colour[n].double().numpy() * signs
            if recipe == "paper":
                patch = (image - mean)[top : top + 224, left : left + 224]
                patch = patch[:, ::-1] if batch.mirror[n] else patch
                expected = patch + vectors @ (alphas * values / 255**2) * 255
            else:
                patch = image[top : top + 224, left : left + 224]
                patch = patch[:, ::-1] if batch.mirror[n] else patch
                expected = (patch - mean[16:240, 16:240] + vectors @ (alphas * values**0.5)) / 1.1
            np.testing.assert_allclose(got[n].permute(1, 2, 0).numpy(), expected, atol=2e-3)


def model_vectors(store: Store) -> np.ndarray:
    return torch.linalg.eigh(torch.from_numpy(store.covariance))[1].numpy()


def _is_cut_from(batch: TrainBatch, n: int, image: np.ndarray) -> bool:
    top, left = int(batch.tops[n]), int(batch.lefts[n])
    patch = image[top : top + 224, left : left + 224]
    return np.array_equal(batch.patches[n].numpy(), patch[:, ::-1] if batch.mirror[n] else patch)


def test_views_of_both_recipes_subtract_the_right_mean(small_store: Path) -> None:
    from alexnet_repro.data.augment import centre_crop, ten_crop

    store = Store(small_store)
    split, mean = store.split("val"), store.mean.astype(np.float64)
    image = split[0].astype(np.float64)
    batch = ValBatch(torch.from_numpy(split[0].copy())[None], torch.from_numpy(split.labels[:1]))
    for recipe in RECIPES:
        model = new_classifier(composed(small_store, f"recipe={recipe}"), store)
        part = (mean if recipe == "paper" else np.pad(mean[16:240, 16:240], ((0, 32), (0, 32), (0, 0))))[:224, :224]
        views = model.views(batch, ten_crop)[0].permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(views[0], image[:224, :224] - part, atol=1e-3)
        mirrored = (image[:224, :224] - part)[:, ::-1] if recipe == "paper" else image[:224, :224][:, ::-1] - part
        np.testing.assert_allclose(views[5], mirrored, atol=1e-3)
        centre = model.views(batch, centre_crop)[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(centre, (image - mean)[16:240, 16:240], atol=1e-3)


def test_colour_noise_is_turned_off_late_only_in_the_2012_recipe(
    small_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for recipe, epochs, last in (("as_run", 93, 67), ("as_run", 31, 22), ("paper", 93, 92)):
        model = new_classifier(composed(small_store, f"recipe={recipe}", f"epochs={epochs}"), Store(small_store))
        on = []
        for epoch in range(epochs):
            monkeypatch.setattr(Classifier, "current_epoch", epoch)
            on.append(model.colour_noise_is_on())
        assert on == [True] * (last + 1) + [False] * (epochs - last - 1)
        monkeypatch.undo()
    never = composed(small_store, "augment.colour_noise_epochs=0")
    assert not new_classifier(never, Store(small_store)).colour_noise_is_on()
