"""Test the comparison with the 2012 program's layer files, on small files of the same grammar that are written here.

The real files are not part of this project. Each test of a difference changes one number of a file.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from alexnet_repro.errors import UserError
from alexnet_repro.net.alexnet import AlexNet
from alexnet_repro.original.comparison import RUNS
from alexnet_repro.original.layer_files import Layer, read_layers
from alexnet_repro.original.mistakes import with_classes
from alexnet_repro.original.plain_net import MISTAKES, PlainNet
from alexnet_repro.original.translation import recipe_of

Run = Callable[..., tuple[int, str, str]]
LOG = """
# a run like another one
# logs/somewhere.log
# epoch 25: set epsw to 0.001 from 0.01
# epoch 36: paused
# resuming
# epoch 51: set epsw to 0.0001 from 0.001
# epoch 67: set epsw to 0.00001 from 0.0001 on conv1
#           set color noise to 0 from 0.1
# epoch 72: set epsw to 0 on conv1
# epoch 79: set epsw to 0.00001 from 0.0001
# epoch 91: killed
# later:
# epoch 107: set epsw to 5 from 0.001
"""
WIDER = 8**0.5  # an eighth of the maps: the weights have this multiple of the full-size net's deviation


def section(name: str, **options: object) -> str:
    return "\n".join([f"[{name}]", *(f"{key}={value}" for key, value in options.items()), "", ""])


def layer_file(*, towers: str = "ab", norm: bool = True, joined: bool = True) -> str:
    """Return the file of a net with an eighth of the maps of run 145, or of 148 (no norm), 150 (not joined)."""
    text = section("data", type="data", dataIdx=0) + section("labels", type="data", dataIdx=1)
    below = dict.fromkeys(towers, "data")
    conv2, wide = (16, 32) if joined else (20, 32)
    fc6 = 256 if joined and len(towers) == 2 else 512
    fc7 = 256 if len(towers) == 2 else 512
    steps = [
        ("conv1", 6, 11, 4, 0, 0.01, 0, False),
        ("conv2", conv2, 5, 1, 2, 0.01 * WIDER, 1, True),
        ("conv3", 24, 3, 1, 1, 0.03 * WIDER, 0, True),
        ("conv4", 24, 3, 1, 1, 0.03 * WIDER, 1, True),
        ("conv5", wide // len(towers), 3, 1, 1, 0.03 * WIDER, 1, False),
    ]
    maps = dict.fromkeys(towers, 3)
    for name, filters, size, stride, padding, std, bias, relu in steps:
        for tower in towers:
            sources = list(towers) if name == "conv3" and joined else [tower]
            several = ",".join
            text += section(
                name + tower,
                type="conv",
                inputs=several(below[source] for source in sources),
                channels=several(str(maps[source]) for source in sources),
                filters=several([str(filters)] * len(sources)),
                padding=several([str(padding)] * len(sources)),
                stride=several([str(stride)] * len(sources)),
                filterSize=several([str(size)] * len(sources)),
                initW=several([str(std)] * len(sources)),
                **({"initB": bias} if bias else {}),
                **({"neuron": "relu"} if relu else {}),
            )
        below, maps = {tower: name + tower for tower in towers}, dict.fromkeys(towers, filters)
        kinds = [("cmrnorm", "rnorm")] if norm and name in ("conv1", "conv2") else []
        kinds += [("rnorm", "cnorm")] if norm and name == "conv2" else []
        for kind, prefix in kinds:
            for tower in towers:
                text += section(prefix + name[-1] + tower, type=kind, inputs=below[tower], channels=filters, size=5)
            below = {tower: prefix + name[-1] + tower for tower in towers}
        if name in ("conv1", "conv2", "conv5"):
            after = {} if name == "conv2" else {"neuron": "relu"}
            pool = "pool3" if name == "conv5" else f"pool{name[-1]}"
            for tower in towers:
                text += section(
                    pool + tower,
                    type="pool",
                    pool="max",
                    inputs=below[tower],
                    sizeX=3,
                    stride=2,
                    channels=filters,
                    **after,
                )
            below = {tower: pool + tower for tower in towers}
    for number, (name, outputs) in enumerate((("fcx", fc6), ("fcxb", fc7))):
        for tower in towers:
            sources = [*towers] if joined else [tower]
            if tower == "b" and number:  # the second layer names its own tower first
                sources = sources[::-1]
            text += section(
                name + tower,
                type="fc",
                inputs=",".join(below[source] for source in sources),
                outputs=outputs,
                initW=",".join([str(0.01 * WIDER)] * len(sources)),
                initB=1,
                neuron="relu",
            )
        for tower in towers:
            text += section(f"hs{number + 1}{tower}", type="hs", keep=0.5, inputs=name + tower)
        below = {tower: f"hs{number + 1}{tower}" for tower in towers}
    text += section(
        "fc1000",
        type="fc",
        outputs=1000,
        inputs=",".join(below.values()),
        initW=",".join([str(0.01 * WIDER)] * len(towers)),
    )
    return text + section("probs", type="softmax", inputs="fc1000") + section(
        "logprob", type="cost.logreg", inputs="labels,probs"
    )  # fmt: skip


def write_run(folder: Path, name: str = "145", log: str = LOG, **net: object) -> None:
    """Write the two files of a run into a folder of their own."""
    layers = layer_file(**net)  # type: ignore[arg-type]
    params = ""
    for line in layers.splitlines():
        if line.startswith("[") and not line.startswith(("[data", "[labels", "[pool", "[probs", "[logprob")):
            own = line.strip("[]")
            if own.startswith("rnorm"):
                params += section(own, scale=0.0001, pow=0.75, minDiv=2)
            elif own.startswith("cnorm"):
                params += section(own, scale=0.001, pow=0.75)
            elif own.startswith("hs"):
                params += section(own, enable="true")
            else:
                params += section(own, epsW="0.00001,0.00001", epsB=0.02, momW="0.9,0.9", momB=0.9, wc="0.0005,0.0005")
    (folder / "deep").mkdir(parents=True, exist_ok=True)
    (folder / "deep" / f"layers-{name.removesuffix('-2010')}.cfg").write_text(layers)
    (folder / "deep" / f"layer-params-{name}.cfg").write_text(params + section("logprob", coeff=1, topk=5) + log)


NETS: dict[str, dict[str, object]] = {
    "145": {},
    "145-half": {"towers": "a"},
    "148": {"norm": False},
    "150": {"joined": False},
}


@pytest.mark.parametrize("name", ["145", *(pytest.param(name, marks=pytest.mark.slow) for name in list(NETS)[1:])])
def test_net_equals_that_of_the_layer_files(name: str, cwd: Path, run_command: Run) -> None:
    changes = {
        "145-half": LOG.replace("25:", "20:").replace("51:", "48:").replace("67:", "66:").replace("91:", "96:"),
        "148": LOG.replace("25:", "22:").replace("51:", "44:").replace("67:", "69:").replace("72:", "73:")
        .replace("79:", "86:").replace("91:", "97:"),
        "150": LOG.replace("51:", "49:").replace("67:", "66:").replace("91:", "92:"),
    }  # fmt: skip
    write_run(cwd / "source", name, changes.get(name, LOG), **NETS[name])
    status, out, err = run_command("compare_2012", "source=source", f"layers={name}", "out=table.json")
    assert status == 0, out + err
    rows = json.loads(Path("table.json").read_text())["rows"]
    assert len(rows) == 10
    assert out.count("equal ") == 10


@pytest.mark.parametrize(
    ("file", "old", "new", "what"),
    [
        ("layers-145", "size=5", "size=3", "outputs in testing"),
        pytest.param("layers-145", "sizeX=3", "sizeX=2", "sizes of the layers' outputs", marks=pytest.mark.slow),
        pytest.param("layers-145", "filters=16", "filters=24", "parameters", marks=pytest.mark.slow),
        pytest.param("layers-145", "initB=1", "initB=0", "initial weights and biases", marks=pytest.mark.slow),
        pytest.param(
            "layers-145", f"initW={0.01 * WIDER}", "initW=0.03", "initial weights and biases", marks=pytest.mark.slow
        ),
        pytest.param("layers-145", "keep=0.5", "keep=0.6", "outputs in testing", marks=pytest.mark.slow),
        pytest.param("layer-params-145", "minDiv=2", "minDiv=1", "gradients", marks=pytest.mark.slow),
        ("layer-params-145", "momW=0.9,0.9", "momW=0.8,0.9", "changes of the weights"),
        pytest.param(
            "layer-params-145", "wc=0.0005,0.0005", "wc=0,0", "changes of the weights", marks=pytest.mark.slow
        ),
        ("layer-params-145", "epoch 51", "epoch 52", "learning rate of the other weights"),
        pytest.param(
            "layer-params-145", "epoch 72", "epoch 71", "learning rate of conv1's weights", marks=pytest.mark.slow
        ),
        pytest.param(
            "layer-params-145",
            "#           set color noise to 0 from 0.1\n",
            "",
            "colour noise",
            marks=pytest.mark.slow,
        ),
        pytest.param("layer-params-145", "91: killed", "93: killed", "number of epochs", marks=pytest.mark.slow),
    ],
)
def test_difference_is_found(file: str, old: str, new: str, what: str, cwd: Path, run_command: Run) -> None:
    write_run(cwd / "source")
    path = cwd / "source" / "deep" / f"{file}.cfg"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    status, out, err = run_command("compare_2012", "source=source")
    assert status == 2
    assert any(line.startswith("DIFFERS") and what in line for line in out.splitlines()), out
    assert what in err


def test_unusable_files_are_named(cwd: Path, run_command: Run) -> None:
    write_run(cwd / "source", log="# epoch 3: set epsw to 0.001 from 0.01\n")
    (cwd / "cut").mkdir()
    (cwd / "cut" / "layers-145.cfg").write_text("[conv1a]\ntype=conv\ninputs=data\n")
    (cwd / "cut" / "layer-params-145.cfg").write_text("# epoch 9: killed\n")
    (cwd / "odd").mkdir()
    (cwd / "odd" / "layers-145.cfg").write_text("no section\n")
    (cwd / "odd" / "layer-params-145.cfg").write_text("# epoch 9: killed\n")
    (cwd / "bare").mkdir()
    (cwd / "bare" / "layers-145.cfg").write_text(
        "[data]\ntype=data\ndataidx=0\n[conv1a]\ntype=conv\ninputs=data\nfilters=48\n"
    )
    (cwd / "bare" / "layer-params-145.cfg").write_text("# epoch 9: killed\n")
    for options, problem in (
        (("source=source",), "do not say after which epoch"),
        (("source=cut",), "reads data, which is not above it"),
        (("source=odd",), "is not a layer file"),
        (("source=bare",), "no layer with type=fc"),
        (("source=source", "layers=147"), "there is no layer-params-147.cfg"),
        (("source=nowhere",), "there is no folder nowhere"),
    ):
        status, _, err = run_command("compare_2012", *options)
        assert (status, problem in err) == (2, True), err


def test_schedule_that_the_comments_do_not_finish_ends_as_the_file(cwd: Path, run_command: Run) -> None:
    write_run(cwd / "source", log=LOG.replace("# epoch 79: set epsw to 0.00001 from 0.0001\n", ""))
    status, out, err = run_command("compare_2012", "source=source")
    assert status == 0, out + err
    assert "after epoch 79, 1e-05 and 0.0001; the comments lack this change" in out


@pytest.fixture
def layers(tmp_path: Path) -> list[Layer]:
    write_run(tmp_path)
    return read_layers(tmp_path, "145")[0]


def random_net(layers: list[Layer], mistake: str | None = None) -> PlainNet:
    generator = torch.Generator().manual_seed(0)
    net = PlainNet(layers, mistake=mistake)
    for layer in layers:
        if layer.name in net.weights:
            for weight in net.weights[layer.name]:
                weight.normal_(0, 2 / weight[0].numel() ** 0.5, generator=generator)
    return net


def test_every_mistake_changes_the_logits(layers: list[Layer]) -> None:
    images = 60 * torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    right = random_net(layers).logits(images)
    assert torch.equal(random_net(layers).logits(images), right)
    for mistake in MISTAKES:
        wrong = random_net(layers, mistake).logits(images)
        assert wrong.shape == right.shape, mistake
        assert (wrong - right).norm() > 1e-6 * right.norm(), mistake


def test_update_is_the_rule_of_the_program(layers: list[Layer]) -> None:
    """inc <- 0.9 inc - rate gradient - 0.0005 rate w, for biases with their own rate and without decay."""
    net = random_net(layers)
    w, b = net.weights["conv2a"][0].clone(), net.biases["conv2a"].clone()
    gradients = {
        name: [*map(torch.ones_like, net.weights[name]), torch.ones_like(net.biases[name])] for name in net.weights
    }
    first = -0.01 - 0.0005 * 0.01 * w
    net.update(gradients, 0.01, 0.02)
    assert torch.allclose(net.weights["conv2a"][0], w + first, rtol=0, atol=1e-15)
    assert torch.allclose(net.biases["conv2a"], b - 0.02, rtol=0, atol=1e-15)
    second = 0.9 * first - 0.001 - 0.0005 * 0.001 * (w + first)
    net.update(gradients, 0.001, 0.002)
    assert torch.allclose(net.weights["conv2a"][0], w + first + second, rtol=0, atol=1e-15)
    assert torch.allclose(net.biases["conv2a"], b - 0.02 - 0.9 * 0.02 - 0.002, rtol=0, atol=1e-15)


@pytest.mark.slow
def test_mistakes_are_measured_on_a_trained_net(small_store: Path, cwd: Path, run_command: Run) -> None:
    write_run(cwd / "source")
    options = (
        "data=folder",
        f"data.store={small_store}",
        "recipe=as_run",
        "net.width=0.125",
        "batch_size=6",
        "epochs=1",
    )
    assert run_command("train", *options, "trainer=cpu", "run=r", "optim.lr=0.0001")[0] == 0
    status, out, err = run_command("compare_2012", "source=source", "mistakes=r", "out=m.json")
    assert status == 0, out + err
    lines = json.loads(Path("m.json").read_text())["mistakes"]
    assert [line["what"] for line in lines] == ["no mistake", *MISTAKES.values()]
    measured = json.loads(Path("r/result.json").read_text())["centre"]["top1_error"]
    assert (lines[0]["change"], lines[0]["top1_error"]) == (0, pytest.approx(measured))
    assert min(line["change"] for line in lines[1:]) > 0
    write_run(cwd / "source", "148", norm=False)  # the same shapes, but another net
    status, _, err = run_command("compare_2012", "source=source", "layers=148", "mistakes=r")
    assert (status, "its logits differ" in err) == (2, True)
    write_run(cwd / "other", "148", norm=False)
    status, _, err = run_command("compare_2012", "source=other", "layers=148", "mistakes=nowhere")
    assert status == 2
    assert "nowhere" in err


def test_every_run_to_compare_with_has_its_net() -> None:
    counts = {"145": 60_965_224, "145-half": 59_798_312, "146-2012-2011": 61_555_304, "150": 60_714_408}
    for name, (files, _) in RUNS.items():
        options = {key: value for key, value in recipe_of(*files).net.items() if key not in ("name", "image_size")}
        with torch.device("meta"):
            found = sum(p.numel() for p in AlexNet(**options).parameters())
        assert found == counts.get(name, 60_965_224), name


def test_number_of_classes_can_be_another(layers: list[Layer]) -> None:
    plain = PlainNet(with_classes(layers, 7))
    assert plain.biases["fc1000"].shape == (7,)
    with pytest.raises(UserError, match="no number"):
        layers[2].number("inputs")
    assert np.isclose(layers[2].number("initW"), 0.01)
