from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from alexnet_repro.configs import CONF, log_run
from alexnet_repro.net.alexnet import AlexNet
from alexnet_repro.training.optim import PaperSGD, parameter_groups
from alexnet_repro.training.schedule import ByHand, DivideWhenErrorStalls


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_update_equals_the_rule_of_section_5_across_rate_changes(momentum: float) -> None:
    rng = np.random.default_rng(0)
    w, v = rng.normal(size=50), np.zeros(50)
    parameter = torch.tensor(w, requires_grad=True)
    optimizer = PaperSGD([parameter], lr=0.01, momentum=momentum, weight_decay=0.0005)
    for step in range(30):
        lr = 0.01 if step < 8 else 0.001 if step < 19 else 0.002
        optimizer.param_groups[0]["lr"] = lr
        g = rng.normal(size=50)
        v = momentum * v - 0.0005 * lr * w - lr * g
        w = w + v
        parameter.grad = torch.tensor(g)
        optimizer.step()
        np.testing.assert_allclose(parameter.detach().numpy(), w, rtol=1e-12, atol=1e-14)


def test_update_differs_from_torch_after_a_rate_change() -> None:
    ours, theirs = (torch.ones(3, requires_grad=True) for _ in range(2))
    optimizers = PaperSGD([ours], 0.1, 0.9, 0.0), torch.optim.SGD([theirs], 0.1, 0.9)
    for lr in (0.1, 0.01):
        for optimizer, p in zip(optimizers, (ours, theirs), strict=True):
            optimizer.param_groups[0]["lr"] = lr
            p.grad = torch.ones(3)
            optimizer.step()
    torch.testing.assert_close(ours.detach(), torch.full((3,), 1 - 0.1 - (0.09 + 0.01)))
    torch.testing.assert_close(theirs.detach(), torch.full((3,), 1 - 0.1 - 0.01 * 1.9))


def test_state_can_be_saved_right_after_a_rate_change() -> None:
    def steps(optimizer: PaperSGD, p: torch.Tensor, rates: list[float]) -> None:
        for lr in rates:
            optimizer.param_groups[0]["lr"] = lr
            p.grad = torch.ones(3)
            optimizer.step()

    whole = torch.ones(3, requires_grad=True)
    steps(PaperSGD([whole], 0.1), whole, [0.1, 0.1, 0.01, 0.01])
    first = torch.ones(3, requires_grad=True)
    before = PaperSGD([first], 0.1)
    steps(before, first, [0.1, 0.1])
    before.param_groups[0]["lr"] = 0.01
    second = first.detach().clone().requires_grad_()
    after = PaperSGD([second], 0.1)
    after.load_state_dict(before.state_dict())
    steps(after, second, [0.01, 0.01])
    assert torch.equal(whole, second)


def test_saved_state_may_have_another_memory_layout() -> None:
    """Load a contiguous momentum buffer for channels-last weights, as in a checkpoint of two devices."""
    torch.manual_seed(0)
    start, gradient = torch.randn(2, 4, 3, 5, 5)
    ends = []
    for again in (False, True):
        p = torch.nn.Parameter(start.clone(memory_format=torch.channels_last))
        optimizer = PaperSGD([p], 0.1)
        for step in range(3):
            p.grad = gradient.clone(memory_format=torch.channels_last)
            optimizer.step()
            if again and step == 0:
                state = optimizer.state_dict()
                state["state"][0]["momentum_buffer"] = state["state"][0]["momentum_buffer"].contiguous()
                optimizer = PaperSGD([p], 0.1)
                optimizer.load_state_dict(state)
        ends.append(p.detach())
    assert torch.equal(*ends)


def test_rate_of_zero_freezes_a_group() -> None:
    frozen, free = (torch.ones(3, requires_grad=True) for _ in range(2))
    optimizer = PaperSGD([{"params": [frozen]}, {"params": [free]}], 0.1)
    for lr in (0.1, 0.0, 0.1):
        optimizer.param_groups[0]["lr"] = lr
        frozen.grad, free.grad = torch.ones(3), torch.ones(3)
        before = frozen.detach().clone()
        optimizer.step()
        assert torch.equal(frozen, before) == (lr == 0)
    two_steps = torch.ones(3, requires_grad=True)
    reference = PaperSGD([two_steps], 0.1)
    for _ in range(2):
        two_steps.grad = torch.ones(3)
        reference.step()
    assert torch.equal(frozen, two_steps)


def rates(errors: list[float], **options: float) -> list[float]:
    optimizer = PaperSGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    schedule = DivideWhenErrorStalls(optimizer, chance=90.0, **options)  # type: ignore[arg-type]
    seen = []
    for error in errors:
        schedule.after_epoch(error)
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


def test_rate_falls_after_patience_epochs_without_improvement() -> None:
    errors = [50, 40, 40, 39.95, 30, 31, 32, 33, 34]
    assert rates(errors, patience=3) == pytest.approx([0.01] * 7 + [0.001] * 2)
    assert rates(errors, patience=2) == pytest.approx([0.01] * 3 + [0.001] * 3 + [0.0001] * 2 + [1e-5])


def test_rate_falls_at_most_three_times() -> None:
    assert rates([20.0] * 40, patience=2)[-1] == pytest.approx(1e-5)
    assert len({round(rate, 9) for rate in rates([20.0] * 40, patience=2)}) == 4
    assert rates([20.0] * 40, patience=2, times=1)[-1] == pytest.approx(1e-3)


def test_rate_does_not_fall_while_the_error_is_at_chance() -> None:
    assert rates([90.0, 89.9, 90.0, 90.1, 90.0, 60, 50, 51, 52], patience=2) == pytest.approx([0.01] * 8 + [0.001])


def test_resumed_schedule_equals_uninterrupted_schedule() -> None:
    errors = [50, 40, 41, 42, 43, 39, 40, 41, 42]
    expected = rates(errors, patience=3)
    for stop in range(1, len(errors)):
        optimizer = PaperSGD([torch.zeros(1, requires_grad=True)], lr=0.01)
        schedule = DivideWhenErrorStalls(optimizer, 90.0, patience=3)
        for error in errors[:stop]:
            schedule.after_epoch(error)
        again = PaperSGD([torch.zeros(1, requires_grad=True)], lr=0.01)
        resumed = DivideWhenErrorStalls(again, 90.0, patience=3)
        resumed.load_state_dict(schedule.state_dict())
        again.load_state_dict(optimizer.state_dict())
        seen = []
        for error in errors[stop:]:
            resumed.after_epoch(error)
            seen.append(again.param_groups[0]["lr"])
        assert seen == pytest.approx(expected[stop:])


# From the 2012 log: the epochs at which the learning rate of weights fell, the epochs at which that of conv1 fell to
# 0.00001 and to 0, whether that of biases fell to 0.002 (with the first drop of the weights), and the number of epochs.
# None: no such step.
LOG = {
    "run_141_fall2009": ((6, 13, 25), 18, 21, False, 28),
    "run_145_2010": ((23, 51, 78), 68, 72, True, 93),
    "run_145_2012": ((25, 51, 79), 67, 72, False, 91),
    "run_145_half": ((20, 48, 79), 66, 72, False, 96),
    "run_147": ((23, 51, 79), None, 79, True, 90),
    "run_148": ((22, 44, 86), 69, 73, False, 97),
    "run_150": ((25, 49, 79), 66, 72, False, 92),
}
FIRST = {"weights": 0.01, "conv1_weights": 0.01, "biases": 0.02, "conv1_biases": 0.02}


def by_hand(run: str, epochs: int) -> list[dict[str, float]]:
    """Return the learning rates of each epoch by parameter group."""
    config: Any = OmegaConf.to_container(OmegaConf.load(Path(CONF) / "schedule" / f"{run}.yaml"))
    parameters = {name: torch.zeros(1, requires_grad=True) for name in FIRST}
    optimizer = PaperSGD([{"name": name, "params": [p], "lr": FIRST[name]} for name, p in parameters.items()])

    def new() -> ByHand:
        return ByHand(optimizer, epochs, config["of_epochs"], config["changes"], lr=0.01)

    schedule, seen = new(), []
    for _ in range(epochs):
        seen.append({group["name"]: group["lr"] for group in optimizer.param_groups})
        again = new()  # as in a resumed run
        again.load_state_dict(schedule.state_dict())
        optimizer.load_state_dict(optimizer.state_dict())
        schedule = again
        schedule.after_epoch(50.0)
    return seen


@pytest.mark.parametrize("run", LOG)
def test_rates_by_hand_equal_the_2012_log(run: str) -> None:
    drops, slowed, frozen, biases_fall, epochs = LOG[run]
    config = OmegaConf.load(Path(CONF) / "schedule" / f"{run}.yaml")
    assert config.of_epochs == epochs
    assert config.colour_noise_epochs == slowed  # both changed at the same epoch
    for epoch, rates in enumerate(by_hand(run, epochs)):
        weights = 0.01 * 0.1 ** sum(epoch >= drop for drop in drops)
        biases = 0.002 if biases_fall and epoch >= drops[0] else 0.02
        conv1 = 0.0 if epoch >= frozen else min(weights, 1e-5) if slowed is not None and epoch >= slowed else weights
        conv1_biases = biases
        if run == "run_145_half" and epoch >= drops[0]:
            conv1_biases = 0.002
        conv1_biases = 0.0 if epoch >= frozen and run != "run_145_half" else conv1_biases  # 0.002 in its final files
        expected = {"weights": weights, "biases": biases, "conv1_weights": conv1, "conv1_biases": conv1_biases}
        assert rates == pytest.approx(expected), epoch


def test_rates_by_hand_scale_with_the_number_of_epochs() -> None:
    long, short = by_hand("run_145_2010", 93), by_hand("run_145_2010", 31)
    for epoch in (0, 7, 9, 16, 18, 25, 30):
        assert short[epoch] == pytest.approx(long[3 * epoch]), epoch


@pytest.mark.parametrize(
    ("data", "ablation", "run"),
    [
        ("ilsvrc2010", {}, "run_145_2010"),
        ("ilsvrc2012", {}, "run_145_2012"),
        ("imagenette", {}, "run_145_2010"),
        ("ilsvrc2010", {"one_gpu": "one_gpu"}, "run_145_half"),
        ("ilsvrc2012", {"non_overlapping_pooling": "x"}, "run_147"),
        ("ilsvrc2012", {"no_lrn": "no_lrn"}, "run_148"),
        ("ilsvrc2012", {"no_communication": None}, "run_150"),
        ("ilsvrc2012", {"no_dropout": "no_dropout"}, "run_145_2012"),
        ("ilsvrc2012", {"no_lrn": "no_lrn", "no_dropout": "no_dropout"}, "run_145_2012"),
    ],
)
def test_data_and_ablation_select_the_run_of_the_log(data: str, ablation: dict[str, Any], run: str) -> None:
    assert log_run(data, ablation) == run
    words = [f"data={data}", "recipe=as_run", f"+ablation=[{','.join(ablation)}]"]
    with initialize_config_dir(CONF, version_base="1.3"):
        chosen = compose("train", words)
        replayed = compose("train", [*words, "schedule=run_148"])
    for cfg, name in ((chosen, run), (replayed, "run_148")):
        wanted = OmegaConf.load(Path(CONF) / "schedule" / f"{name}.yaml")
        assert cfg.schedule.by_hand == wanted
        assert (cfg.epochs, cfg.augment.colour_noise_epochs) == (wanted.of_epochs, wanted.colour_noise_epochs)


def test_2012_biases_have_their_own_rate_and_no_decay() -> None:
    net = AlexNet(2)
    groups = {g["name"]: g for g in parameter_groups(net, 0.01, 0.0005, bias_rate=2, bias_decay=False)}
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "weights": (0.01, 0.0005),
        "biases": (0.02, 0.0),
        "conv1_weights": (0.01, 0.0005),
        "conv1_biases": (0.02, 0.0),
    }
    found = [p for g in groups.values() for p in g["params"]]
    assert sorted(map(id, found)) == sorted(map(id, net.parameters()))
    assert all(p.ndim == (1 if "biases" in name else p.ndim) for name, g in groups.items() for p in g["params"])
    assert [id(p) for p in groups["conv1_weights"]["params"]] == [id(net.conv1.weight)]
    same = parameter_groups(net, 0.01, 0.0005, bias_rate=1, bias_decay=True)
    assert {(g["lr"], g["weight_decay"]) for g in same} == {(0.01, 0.0005)}


def test_group_that_is_added_later_is_updated_by_the_same_rule() -> None:
    whole, parts = [[torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)] for _ in range(2)]
    together = PaperSGD(whole, lr=0.1)
    apart = PaperSGD(parts[:1], lr=0.1)
    apart.add_param_group({"params": parts[1:]})
    for rate in (0.1, 0.1, 0.01):
        for optimizer, tensors in ((together, whole), (apart, parts)):
            for group in optimizer.param_groups:
                group["lr"] = rate
            for tensor in tensors:
                tensor.grad = tensor.detach() ** 2
            optimizer.step()
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_negative_options_are_refused() -> None:
    for options in ({"lr": -1.0}, {"momentum": -0.1}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError, match="Invalid"):
            PaperSGD([torch.zeros(1)], **options)
