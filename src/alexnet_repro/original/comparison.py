"""Compare this package's net with a net built from the layer files of the authors' own 2012 program."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import isclose
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn import functional as F

from alexnet_repro.configs import CONF
from alexnet_repro.data.photos import patches
from alexnet_repro.errors import UserError
from alexnet_repro.files import write_json
from alexnet_repro.net.alexnet import AlexNet
from alexnet_repro.net.dropout import Dropout
from alexnet_repro.original.layer_files import FIRST_RATE, Layer, Log, read_layers
from alexnet_repro.original.mistakes import mistakes_of
from alexnet_repro.original.plain_net import PlainNet
from alexnet_repro.original.translation import in_file_order, names_here, own_net, plain_copy, recipe_of, relative
from alexnet_repro.provenance import machine
from alexnet_repro.training.optim import PaperSGD, parameter_groups
from alexnet_repro.training.schedule import ByHand

# A run of the log: the config files with its difference from recipe=as_run, and its schedule.
RUNS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "145": ((), "run_145_2012"),
    "145-2010": ((), "run_145_2010"),
    "145-half": (("ablation/one_gpu",), "run_145_half"),
    "146-2012-2011": (("pretraining/fine_tuned",), None),  # its schedule begins with copied layers
    "147": (("ablation/non_overlapping_pooling",), "run_147"),
    "148": (("ablation/no_lrn",), "run_148"),
    "150": (("ablation/no_communication",), "run_150"),
}
# The rate of biases with which these runs began: twice that of weights. Some parameter files hold the last one only.
FIRST_BIAS_RATE = 0.02
IMAGES, UPDATES, DROP = 4, 20, 10  # images of a batch; updates; those before the rates are divided by 10
SHARE = 0.1  # rates of these updates, as a share of the log's: with few images, run 148 diverges with the whole rate
TOLERANCE = 1e-9  # of float64 results, relative to their norm
ON_AVERAGE = 4  # standard errors by which the deviation of random weights may differ from the layer file's


@dataclass(frozen=True)
class Row:
    """One comparison: what was compared, with what result, and whether both nets agree."""

    what: str
    found: str
    agrees: bool


def compare_2012(cfg: DictConfig) -> dict[str, Any]:
    """Compare the net of ``recipe=as_run`` with run ``cfg.layers``, print a table, and write it to ``cfg.out``.

    With ``cfg.mistakes``, the folder of a trained run, print instead what usual mistakes would do to its outputs.

    Raises UserError if files or the run are missing or damaged, or if a comparison fails.
    """
    if cfg.source is None:
        raise UserError("source is needed", "set source= to a folder with the released source code of 2012")
    if str(cfg.layers) not in RUNS:
        raise UserError(
            f"layers={cfg.layers}: there is no such run to compare with", f"choose one of {', '.join(RUNS)}"
        )
    files, schedule = RUNS[str(cfg.layers)]
    layers, log = read_layers(Path(str(cfg.source)), str(cfg.layers))
    torch.manual_seed(0)
    if cfg.mistakes:
        lines = mistakes_of(layers, Path(str(cfg.mistakes)))
        for line in lines:
            print(
                f"{line['what']}: top-1 error {line['top1_error']:.1f}%, logits change by {100 * line['change']:.3g}%"
            )
        result: dict[str, Any] = {"run": str(cfg.layers), "trained": str(cfg.mistakes), "mistakes": lines}
    else:
        recipe = recipe_of(*files)
        net = own_net(recipe, layers)
        rows = [*_shapes(net, layers), *_initial(net, layers), *_computed(net, layers, recipe)]
        if schedule:
            rows += _schedule(net, layers, log, recipe, schedule)
        for row in rows:
            print(f"{'equal ' if row.agrees else 'DIFFERS'}  {row.what}: {row.found}")
        result = {"run": str(cfg.layers), "rows": [row.__dict__ for row in rows]}
    if cfg.out:
        write_json(Path(str(cfg.out)), {**result, **machine(torch.device("cpu"))})
    if wrong := [row["what"] for row in result.get("rows", ()) if not row["agrees"]]:
        raise UserError(f"{len(wrong)} of {len(result['rows'])} comparisons differ: {', '.join(wrong)}")
    return result


def _shapes(net: AlexNet, layers: list[Layer]) -> Iterator[Row]:
    plain = PlainNet(layers)
    counted = sum(part.numel() for parts in plain.parameters.values() for part in parts)
    own = sum(p.numel() for p in net.parameters())
    yield Row("parameters", f"{own:,} and {counted:,}", own == counted)
    net.eval()
    with torch.inference_mode():
        outputs = net.activations(torch.zeros(1, 3, 224, 224, dtype=torch.float64))
    sides: dict[str, list[int]] = {}
    for name, (stage, _) in names_here(layers).items():
        found = sides.setdefault(stage, [0, *plain.shapes[name][1:]])
        found[0] += plain.shapes[name][0]
    wrong = [
        f"{name}: {list(outputs[name].shape[1:]) if name in outputs else 'missing'} and {shape}"
        for name, shape in sides.items()
        if name not in outputs or list(outputs[name].shape[1:]) != shape
    ]
    yield Row("sizes of the layers' outputs", "; ".join(wrong) or f"{len(sides)} layers", not wrong)


def _initial(net: AlexNet, layers: list[Layer]) -> Iterator[Row]:
    wrong, seen = [], 0
    for layer, (*weights, bias) in in_file_order(net, layers, lambda name: net.get_parameter(name).detach()):
        for i, weight in enumerate(weights):
            wanted, found = layer.number("initW", place=i), float(weight.std())
            seen += 1
            if abs(found / wanted - 1) > ON_AVERAGE / (2 * weight.numel()) ** 0.5:
                wrong.append(f"{layer.name}: deviation {found:.4f}, not {wanted:g}")
        if not torch.equal(bias, torch.full_like(bias, layer.number("initB", 0.0))):
            wrong.append(f"{layer.name}: bias {float(bias[0]):g}, not {layer.number('initB', 0.0):g}")
    yield Row("initial weights and biases", "; ".join(wrong) or f"{seen} weights", not wrong)


def _computed(net: AlexNet, layers: list[Layer], recipe: Any) -> Iterator[Row]:
    """Compare outputs, gradients and updates, from the same weights, images and dropout masks."""
    try:
        plain = plain_copy(net, layers)
    except ValueError as error:
        yield Row("outputs, gradients and updates", f"not computed: {error}", False)
        return
    images, labels = photographs(IMAGES), torch.arange(IMAGES)
    kept: list[Tensor] = []
    drops = [stage for stage in net if isinstance(stage, Dropout)]
    hooks = [
        stage.register_forward_hook(lambda _, inputs, x: kept.append((x != 0) | (inputs[0] == 0))) for stage in drops
    ]
    net.eval()
    with torch.inference_mode():
        difference = relative(net(images), plain.logits(images))
    yield Row("outputs in testing", f"relative difference {difference:.0e}", difference < TOLERANCE)

    optimizer = _optimizer(net, recipe)
    first_rates = [group["lr"] for group in optimizer.param_groups]
    before = {name: [part.clone() for part in parts] for name, parts in plain.parameters.items()}
    hidden = [layer.name for layer in layers if layer.kind == "hs"]
    net.train()
    for update in range(UPDATES):
        kept.clear()
        net.draw_dropout(0, update)
        loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        towers = [part for mask in kept for part in mask.double().chunk(len(hidden) // 2, 1)]
        gradients = plain.gradients(images, labels, dict(zip(hidden, towers, strict=True)))
        if not update:
            own = in_file_order(net, layers, lambda name: cast(Tensor, net.get_parameter(name).grad))
            yield _worst("gradients", own, gradients, TOLERANCE)
        share = SHARE if update < DROP else SHARE / 10
        for group, first_rate in zip(optimizer.param_groups, first_rates, strict=True):
            group["lr"] = share * first_rate
        optimizer.step()
        plain.update(gradients, share * FIRST_RATE, share * FIRST_BIAS_RATE)
    for hook in hooks:
        hook.remove()
    own = in_file_order(net, layers, lambda name: net.get_parameter(name).detach())
    what = f"changes of the weights after {UPDATES} updates, with lower rates from update {DROP} on"
    yield _worst(what, own, plain.parameters, 1000 * TOLERANCE, before)  # each update amplifies rounding


def _worst(
    what: str,
    own: Iterator[tuple[Layer, list[Tensor]]],
    theirs: dict[str, list[Tensor]],
    tolerance: float,
    before: dict[str, list[Tensor]] | None = None,
) -> Row:
    """Compare tensors layer by layer, or their changes since ``before``, and tell of the layer that differs the most."""
    errors = {}
    for layer, parts in own:
        start: list[Any] = before[layer.name] if before else [0.0] * len(parts)
        pairs = zip(parts, theirs[layer.name], start, strict=True)
        errors[layer.name] = max(relative(mine - at_first, other - at_first) for mine, other, at_first in pairs)
    name = max(errors, key=lambda name: errors[name])
    return Row(what, f"relative difference {errors[name]:.0e}, in {name}", errors[name] < tolerance)


def _optimizer(net: AlexNet, recipe: Any) -> PaperSGD:
    o = recipe.optim
    return PaperSGD(parameter_groups(net, o.lr, o.weight_decay, o.bias_rate, o.bias_decay), momentum=o.momentum)


def _schedule(net: AlexNet, layers: list[Layer], log: Log, recipe: Any, schedule: str) -> Iterator[Row]:
    """Compare the schedule of conf/schedule with the comments of the log, epoch by epoch.

    The comments may lack the last change, to the rates that the parameter file ends with: its epoch is then ours.
    """
    by_hand: Any = OmegaConf.load(Path(CONF) / "schedule" / f"{schedule}.yaml")
    yield Row("number of epochs", f"{by_hand.of_epochs} and {log.epochs}", by_hand.of_epochs == log.epochs)
    optimizer = _optimizer(net, recipe)
    changes: Any = OmegaConf.to_container(by_hand.changes)
    rule = ByHand(optimizer, log.epochs, log.epochs, changes, recipe.optim.lr)
    rates: list[dict[str, float]] = []
    for _ in range(log.epochs):
        rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})
        rule.after_epoch(50.0)
    until = by_hand.colour_noise_epochs
    last = next(layer for layer in reversed(layers) if layer.kind == "fc").number("epsW")
    compared: dict[str, tuple[list[float], list[float]]] = {
        "learning rate of conv1's weights": ([r["conv1_weights"] for r in rates], log.conv1),
        "learning rate of the other weights": ([r["weights"] for r in rates], log.others),
        "colour noise": (
            [float(until is None or e < until) for e in range(log.epochs)],
            [float(on) for on in log.noise],
        ),
    }
    for what, (own, theirs) in compared.items():
        wrong = [e for e in range(log.epochs) if not isclose(own[e], theirs[e])]
        found = (
            f"after epoch {wrong[0]}, {own[wrong[0]]:g} and {theirs[wrong[0]]:g}" if wrong else f"{log.epochs} epochs"
        )
        lacking = bool(wrong) and "other" in what and all(isclose(own[e], last) for e in wrong)
        if lacking:
            found += "; the comments lack this change, but the file ends with it"
        yield Row(f"{what}, epoch by epoch", found, lacking or not wrong)


def photographs(count: int) -> Tensor:
    """Return the centres of patches of different photographs without their mean, (count, 3, 224, 224) float64."""
    pixels = np.stack([read() for _, _, _, read in islice(patches(0, 1, 256), count)])[:, 16:240, 16:240]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).double()
    return images - images.mean(0)
