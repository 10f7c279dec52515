"""Logits, heat and embedding, which engines ask of a graph, where a foreign one gives logits alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.errors import TrustError
from imaging.vocabulary import Kind
from registry.engines import OUTPUTS, check_answers, open_engine
from registry.graphs import list_inputs, write_graph
from registry.package import Contract

PREPARED = (-1.0, 1.0)  # what `prepare` makes of the ends of a window
PASSING = ("Identity", "Dropout", "Flatten", "Reshape", "Squeeze")  # the same numbers, maybe in another shape
POOLING = ("GlobalAveragePool", "ReduceMean")
LINEAR, WEIGHTED = ("Gemm", "MatMul"), ("Gemm", "MatMul", "Conv", "ConvTranspose")
STRENGTH = "Its heat map shows where its last features are strong, whichever class they speak for."
NEAR = 1e-3  # how far the logits of an image may move when another image is answered beside it


def adapt_graph(model: Any, contract: Contract, value_range: tuple[float, float], folder: Path) -> list[str]:
    """Write model.onnx, which takes prepared images and gives `OUTPUTS`.

    Missing heat is, of a segmenter, 1 - the largest probability; of a detector, its centres; of a classifier,
    what each place adds to the positive classes less the others where a linear layer ends it, and else the
    mean size of its last features. A missing embedding is what its last layer reads, averaged over places. A
    single logit of two classes gets a 0 before it; a last Softmax, or Sigmoid of one, is left out.

    Args:
        model: as `read_graph` returns it.
        contract: what it shall answer.
        value_range: what the network takes for `PREPARED`; linear between.
        folder: where to.

    Returns:
        Sentences about what was derived, for the contract's limits.

    Raises:
        TrustError: its outputs are not logits, or nothing can be derived from them.
    """
    given = [value.name for value in model.graph.output]
    if {*OUTPUTS} <= {*given} and list_inputs(model)[0].name == "image" and value_range == PREPARED:
        write_graph(model, folder)  # one of ours
        return []
    if "logits" not in given and len(given) != 1:
        raise TrustError(f"It answers with {', '.join(given)[:200]}.", "Name one of its outputs `logits`.")
    graph = _Graph(model, contract)
    graph.take_images(value_range)
    graph.end(graph.own("logits" if "logits" in given else given[0]))
    if "embedding" in given:
        graph.add("Identity", graph.own("embedding"), name="embedding")
    else:
        graph.embed()
    notes = []
    if "heat" in given:
        graph.add("Identity", graph.own("heat"), name="heat")
    elif contract.kind is Kind.SEGMENTATION:
        likely = graph.add("ReduceMax", graph.add("Softmax", "logits", axis=1), np.array([1]), keepdims=0)
        graph.add("Sub", np.ones(1, np.float32), likely, name="heat")
    else:
        notes = graph.look()
    graph.write(folder)
    return notes


class _Graph:
    """A foreign graph, its names prefixed, and the nodes that are added before and behind it."""

    def __init__(self, model: Any, contract: Contract) -> None:
        import onnx

        self.contract, self.nodes, self.before = contract, list[Any](), 0
        _free_batch(model)
        self.model = onnx.compose.add_prefix(model, self.own(""))
        told = onnx.shape_inference.infer_shapes(self.model).graph
        self.shapes = {
            value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in (*told.value_info, *told.input, *told.output)
        }
        self.producers = {name: node for node in self.model.graph.node for name in node.output}
        self.weights = {tensor.name: tensor for tensor in self.model.graph.initializer}

    def own(self, name: str) -> str:
        """A foreign name, as it is called here."""
        return f"imported/{name}"

    def add(self, operator: str, *inputs: str | NDArray[Any], name: str = "", **attributes: Any) -> str:
        """A node; arrays become constants. The name of what it gives."""
        import onnx

        name = name or f"derived_{len(self.nodes)}"
        names = [one if isinstance(one, str) else f"{name}_{number}" for number, one in enumerate(inputs)]
        constants = [pair for pair in zip(inputs, names, strict=True) if not isinstance(pair[0], str)]
        self.model.graph.initializer.extend(onnx.numpy_helper.from_array(*pair) for pair in constants)
        self.nodes.append(onnx.helper.make_node(operator, names, [name], name=name, **attributes))
        return name

    def take_images(self, value_range: tuple[float, float]) -> None:
        """Let it take `image`, prepared, in place of its own input."""
        scale, shift = _map_range(value_range)
        (old,) = list_inputs(self.model)
        self.add("Add", self.add("Mul", "image", scale), shift, name=old.name)
        old.name, self.before = "image", len(self.nodes)

    def end(self, logits: str) -> None:
        """Name the logits, and find the layer that gives them."""
        last = self._back(logits, PASSING)
        single = self.shapes.get(logits, [])[1:2] == [1] and self.contract.kind is not Kind.DETECTION
        if last is not None and last.op_type == "Sigmoid" and not single:
            raise TrustError(
                "It ends with a Sigmoid for each of its classes.", "They must exclude each other."
            )
        if last is not None and last.op_type in ("Softmax", "Sigmoid"):
            logits = last.input[0]
        last = self._back(logits, (*PASSING, "Add", "Cast"))
        self.last = last if last is not None and last.op_type in WEIGHTED else None
        self.features, self.single = (self.last.input[0] if self.last else logits), single
        if single:
            self.add("Concat", self.add("Sub", logits, logits), logits, name="logits", axis=1)
        else:
            self.add("Identity", logits, name="logits")

    def _back(self, name: str, passing: tuple[str, ...]) -> Any:
        """The nearest node at or before a value that is not of these kinds; None where there is none."""
        while (node := self.producers.get(name)) is not None and node.op_type in passing:
            made = [one for one in node.input if one in self.producers]
            name = made[0] if made else node.input[0]
        return node

    def embed(self) -> None:
        """What the last layer reads, its mean over places."""
        rank = len(self.shapes.get(self.features, ()))
        if rank < 2:
            raise TrustError(
                "The shape of what its last layer reads is not known.", "Give an output `embedding`."
            )
        axes = np.arange(1, rank - 1) if self.last and self.last.op_type in LINEAR else np.arange(2, rank)
        if len(axes):
            self.add("ReduceMean", self.features, axes, name="embedding", keepdims=0)
        else:
            self.add("Identity", self.features, name="embedding")

    def look(self) -> list[str]:
        """Heat of a detector or a classifier."""
        sizes, notes = np.array(self.contract.spatial), []
        if self.contract.kind is Kind.DETECTION:
            found = self.add("Sigmoid", self.add("Gather", "logits", np.array([0]), axis=1))
        elif (pair := self._contributions()) is not None:
            added = self.add("ReduceSum", self.add("Mul", *pair), np.array([1]), keepdims=1)
            found = self.add("Relu", added)
        else:
            found, notes = (
                self.add("ReduceMean", self.add("Abs", self._last_map()), np.array([1]), keepdims=1),
                [STRENGTH],
            )
        axes = list(range(2, 2 + len(sizes)))
        resized = self.add("Resize", found, "", "", sizes, axes=axes, mode="linear")
        self.add("Squeeze", resized, np.array([1]), name="heat")
        return notes

    def _contributions(self) -> tuple[str, NDArray[np.float32]] | None:
        """A map, and what its values add to the positive classes; None where no linear layer tells."""
        import onnx

        if self.last is None or self.last.op_type not in LINEAR or self.last.input[1] not in self.weights:
            return None
        weight = onnx.numpy_helper.to_array(self.weights[self.last.input[1]])
        turned = any(one.name == "transB" and one.i for one in self.last.attribute)
        rows = weight if turned else weight.T
        rows = np.vstack([np.zeros_like(rows), rows]) if self.single else rows
        labels = np.isin(np.arange(len(self.contract.classes)), self.contract.positive_labels)
        if rows.ndim != 2 or len(rows) != len(labels):
            return None
        added = (np.where(labels, 1 / labels.sum(), -1 / (~labels).sum()) @ rows).astype(np.float32)
        node = self._back(self.features, PASSING)
        pooled = node is not None and node.op_type in POOLING
        name = (node.input[0] if pooled else node.output[0]) if node is not None else ""
        shape = self.shapes.get(name, [])
        read = shape[1:2] if pooled else shape[1:]
        if len(shape) != 2 + len(self.contract.spatial) or np.prod(read) != added.size:
            return None
        return name, added.reshape(1, *read, *(1 for _ in shape[1 + len(read) :]))

    def _last_map(self) -> str:
        """The last value that has places: the one that the logits come from by the fewest steps."""
        names = [self.features]
        for name in names:
            shape = self.shapes.get(name, [])
            node = self.producers.get(name)
            if node is not None and len(shape) == 2 + len(self.contract.spatial) and set(shape[2:]) != {1}:
                return name
            names += [one for one in (node.input if node is not None else ()) if one not in names]
        raise TrustError("No map of places leads to its logits.", "Give an output `heat`.")

    def write(self, folder: Path) -> None:
        """Put the nodes where they belong, and the outputs at the end."""
        import onnx

        graph, contract = self.model.graph, self.contract
        nodes = [*self.nodes[: self.before], *graph.node, *self.nodes[self.before :]]
        del graph.node[:], graph.output[:]
        graph.node.extend(nodes)
        places = [None] * len(contract.spatial)
        maps = [] if contract.kind is Kind.CLASSIFICATION else places
        for name, shape in zip(OUTPUTS, ([None, *maps], places, [None]), strict=True):
            value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", *shape])
            graph.output.append(value)
        write_graph(self.model, folder)


def _map_range(value_range: tuple[float, float]) -> NDArray[np.float32]:
    """Factor and summand, (2, 1), that make `PREPARED` into another range."""
    low, high = value_range
    scale = (high - low) / (PREPARED[1] - PREPARED[0])
    return np.array([[scale], [low - scale * PREPARED[0]]], np.float32)


def scale_images(images: NDArray[np.float32], value_range: tuple[float, float]) -> NDArray[np.float32]:
    """Prepared images as a network takes them that wants another range."""
    scale, shift = _map_range(value_range)
    return np.asarray(images * scale + shift)


def _free_batch(model: Any) -> None:
    """Let it take any number of images; `check_graph` sees whether it does."""
    import onnx

    (taken,) = list_inputs(model)
    fixed = taken.type.tensor_type.shape.dim[0].dim_value
    for value in (taken, *model.graph.output):
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del model.graph.value_info[:]  # of the batch that it was exported with
    sizes = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer
             if tensor.data_type == onnx.TensorProto.INT64 and len(tensor.dims) == 1}  # fmt: skip
    for node in model.graph.node:
        shape = sizes.get(node.input[1], np.array([])) if node.op_type == "Reshape" else np.array([])
        if fixed and len(shape) and shape[0] == fixed and -1 not in shape:
            node.input[1] = f"free_{node.name or node.output[0]}"
            freed = onnx.numpy_helper.from_array(np.array([-1, *shape[1:]]), node.input[1])
            model.graph.initializer.append(freed)


def check_graph(folder: Path, contract: Contract) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Ask model.onnx for two images, together and alone.

    Returns:
        Images (2, channels[, depth], rows, columns) and their logits.

    Raises:
        TrustError: other shapes than promised, no numbers, or an answer that depends on who else is asked.
    """
    engine = open_engine(folder, "onnxruntime", "f32")
    images = np.random.default_rng(0).uniform(-1, 1, (2, *contract.shape)).astype(np.float32)
    answers = engine.run(images)
    check_answers(answers, contract, 2)
    if answers.embedding.ndim != 2:
        raise TrustError(
            f"Its embedding has shape {answers.embedding.shape}.", "It must be (images, features)."
        )
    alone = np.concatenate([engine.run(image[None]).logits for image in images])
    if not np.allclose(alone, answers.logits, rtol=NEAR, atol=NEAR):
        raise TrustError("Its answer to an image depends on the images beside it.",
                         "Export it in evaluation mode, with a dynamic batch.")  # fmt: skip
    return images, answers.logits
