"""The net as an ONNX graph: one LRN node per normalisation and tower, with the mean image and the description inside."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from alexnet_repro.files import written_whole
from alexnet_repro.sharing.nets import METADATA
from alexnet_repro.sharing.steps import ExportedNet, Step

OPSET = 18
INPUT, OUTPUT = "images", "logits"


def write_onnx(net: ExportedNet, side: int, classes: int, description: str, path: Path) -> None:
    """Write the net to ``path``: images (N, 3, side, side), RGB from 0 to 255, to logits (N, classes)."""
    graph = _Graph()
    x = graph.add("Sub", [INPUT, graph.constant("mean", net.mean.numpy())], "subtracted")
    for step in net.steps:
        x = graph.add_step(step, x, net)
    graph.nodes[-1].output[0] = OUTPUT
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "alexnet",
            [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["N", 3, side, side])],
            [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["N", classes])],
            graph.constants,
        ),
        producer_name="alexnet_repro",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=9,
    )
    helper.set_model_props(model, {METADATA: description})
    onnx.checker.check_model(model, full_check=True)
    with written_whole(path) as file:
        file.write(model.SerializeToString())


class _Graph:
    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, name: str, value: NDArray[Any]) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{output}/{kind}", **attributes))
        return output

    def add_step(self, step: Step, x: str, net: ExportedNet) -> str:
        own, name = step.options, step.name
        if step.kind == "conv":
            weights = self._weights(name, net)
            stride = [own["stride"]] * 2
            return self.add("Conv", [x, *weights], name, pads=own["pads"], strides=stride, group=own["groups"])
        if step.kind == "linear":
            weight, bias = (parameter.detach().numpy() for parameter in net.layers[name].parameters())
            if own["groups"] == 1:
                return self.add("Gemm", [x, *self._weights(name, net)], name, transB=1)
            parts = []
            for tower, part in enumerate(self._split(x, own["groups"], name)):
                ends = [
                    self.constant(f"{name}.{tower}.{kind}", np.split(value, own["groups"])[tower])
                    for kind, value in (("weight", weight), ("bias", bias))
                ]
                parts.append(self.add("Gemm", [part, *ends], f"{name}.{tower}", transB=1))
            return self._joined(parts, name)
        if step.kind == "activation":
            function = own["function"]
            if function == "abs_tanh":
                return self.add("Abs", [self.add("Tanh", [x], f"{x}.tanh")], f"{x}.abs")
            return self.add(function.capitalize(), [x], f"{x}.{function}")
        if step.kind == "norm":  # ONNX divides alpha by the size
            constants = {"size": own["size"], "alpha": own["alpha"] * own["size"], "beta": own["beta"], "bias": own["k"]}  # fmt: skip
            if own["groups"] == 1:
                return self.add("LRN", [x], name, **constants)
            parts = self._split(x, own["groups"], name)
            return self._joined([self.add("LRN", [part], f"{name}.{t}", **constants) for t, part in enumerate(parts)], name)  # fmt: skip
        if step.kind == "same_map_norm":
            size, pad = own["size"], own["size"] // 2
            squares = self.add("Mul", [x, x], f"{name}.squares")
            mean = self.add("AveragePool", [squares], f"{name}.mean", kernel_shape=[size] * 2, pads=[pad] * 4, count_include_pad=1)  # fmt: skip
            numbers = {"alpha": own["alpha"] * size**2, "k": own["k"], "beta": own["beta"]}
            alpha, k, beta = (self.constant(f"{name}.{key}", np.float32(n)) for key, n in numbers.items())  # type: ignore[arg-type]
            sums = self.add("Add", [self.add("Mul", [mean, alpha], f"{name}.scaled"), k], f"{name}.sums")
            return self.add("Div", [x, self.add("Pow", [sums, beta], f"{name}.divisor")], name)
        if step.kind == "pool":
            return self.add("MaxPool", [x], name, kernel_shape=[own["size"]] * 2, strides=[2, 2], ceil_mode=int(own["ceil"]))  # fmt: skip
        if step.kind == "flatten":
            return self.add("Flatten", [x], "flat", axis=1)
        return self.add("Mul", [x, self.constant(f"{name}.factor", np.float32(own["factor"]))], name)  # type: ignore[arg-type]

    def _weights(self, name: str, net: ExportedNet) -> list[str]:
        return [self.constant(f"{name}.{kind}", p.detach().numpy()) for kind, p in net.layers[name].named_parameters()]

    def _split(self, x: str, groups: int, name: str) -> list[str]:
        parts = [f"{name}.{tower}.in" for tower in range(groups)]
        self.nodes.append(helper.make_node("Split", [x], parts, name=f"{name}/Split", axis=1, num_outputs=groups))
        return parts

    def _joined(self, parts: list[str], name: str) -> str:
        return self.add("Concat", parts, name, axis=1)
