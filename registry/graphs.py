"""Networks as files: written as ONNX and torch.export programs, and ONNX of others read and completed."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imaging.errors import ConfigError, DataError, TrustError
from registry.engines import OUTPUTS
from registry.package import Contract

OPSET = 18  # where reductions and resizing got the form that is written here
MOST_BYTES = 2**30  # of an ONNX file and of what it keeps beside it


def export_graphs(network: Any, contract: Contract, folder: Path, outputs: tuple[str, ...] = OUTPUTS) -> None:
    """Write program.pt2 and model.onnx, the same bytes every time, for any batch that is promised.

    Args:
        network: a torch module in evaluation mode.
        contract: says the shape of an image and the largest batch.
        folder: where to.
        outputs: names of what it answers.

    Raises:
        DataError: it cannot be exported.
    """
    import torch

    for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    batch = torch.export.Dim("batch", min=1, max=contract.max_batch)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        example = (torch.zeros(2, *contract.shape),)
        program = torch.export.export(network, example, dynamic_shapes=({0: batch},))
        _strip(program)
        torch.export.save(program, folder / "program.pt2")
        made = torch.onnx.export(
            program, (), input_names=["image"], output_names=list(outputs), external_data=False, verbose=False
        )
    if made is None:
        raise DataError("The network cannot be exported to ONNX.", "See the exporter's message above.")
    write_graph(made.model_proto, folder)


def _strip(program: Any) -> None:
    """Take out what differs from run to run: stack traces, the order of ranges, the example's pixels."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if hasattr(module, "graph") else ():
            node.meta.pop("stack_trace", None)
            node.meta.pop("nn_module_stack", None)
            node.meta.pop("source_fn_stack", None)
    ranges = sorted(program._range_constraints.items(), key=lambda item: str(item[0]))
    program._range_constraints = dict(ranges)
    program._example_inputs = None


def write_graph(model: Any, folder: Path) -> None:
    """model.onnx without what only its exporter can read, and what differs from run to run."""
    graph = model.graph
    for node in graph.node:
        node.doc_string = ""
    for part in (
        model,
        graph,
        *graph.node,
        *graph.value_info,
        *graph.input,
        *graph.output,
        *graph.initializer,
    ):
        del part.metadata_props[:]
    (folder / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))


def read_graph(path: Path, contract: Contract) -> Any:
    """Read an ONNX file of somebody else; nothing is run.

    Returns:
        The model, complete in itself, of standard operators, with one float32 input of the contract's shape.

    Raises:
        DataError: it is no ONNX, or larger than `MOST_BYTES`.
        TrustError: data outside its folder, other operators, another input than the contract promises.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from onnx.inliner import inline_local_functions

    if path.stat().st_size > MOST_BYTES:
        raise DataError(f"{path.name} is larger than {MOST_BYTES >> 20} MiB.", "Give a smaller model.")
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise DataError(f"{path.name} is no ONNX file.", "Export the model again.") from error
    if model.functions:
        model = inline_local_functions(model)
    del model.functions[:], model.training_info[:]
    _load_data(model, path.parent)
    for graph in _graphs(model.graph):
        for node in graph.node:
            if node.domain not in ("", "ai.onnx"):
                raise TrustError(f"The operator {node.op_type} is of the domain {node.domain[:60]!r}.",
                                 "Export with ONNX's own operators: others run somebody's code.")  # fmt: skip
    _check_input(model, contract)
    return _raise_opset(model)


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph and those that its nodes hold."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _graphs(inner)


def _load_data(model: Any, folder: Path) -> None:
    """Bring in tensors that lie beside the file: in its own folder, and nowhere else."""
    import onnx

    names = set()
    for graph in _graphs(model.graph):
        if graph.sparse_initializer:
            raise TrustError("It holds sparse tensors.", "Export with dense weights.")
        held = [one for node in graph.node for a in node.attribute for one in (a.t, *a.tensors)]
        for tensor in (*graph.initializer, *held):
            names |= {item.value for item in tensor.external_data if item.key == "location"}
    for name in names:
        path = folder / name
        if Path(name).name != name or path.is_symlink() or not path.is_file():
            raise TrustError(f"Its data lie in {name[:200]!r}, which is no file of its own folder.",
                             "Export with `external_data=False`.")  # fmt: skip
        if path.stat().st_size > MOST_BYTES:
            raise DataError(f"{name} is larger than {MOST_BYTES >> 20} MiB.", "Give a smaller model.")
    if names:
        onnx.external_data_helper.load_external_data_for_model(model, str(folder))


def list_inputs(model: Any) -> list[Any]:
    """What must be given to a model; older files list weights among the inputs, too."""
    known = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in known]


def _check_input(model: Any, contract: Contract) -> None:
    import onnx

    inputs = list_inputs(model)
    kinds = [value.type.tensor_type.elem_type for value in inputs]
    if kinds != [onnx.TensorProto.FLOAT]:
        raise TrustError(f"It has {len(inputs)} inputs of types {kinds}.", "It must take one float32 tensor.")
    shape = [dim.dim_value or None for dim in inputs[0].type.tensor_type.shape.dim]
    fits = len(shape) == 1 + len(contract.shape) and all(
        one in (None, other) for one, other in zip(shape[1:], contract.shape, strict=True)
    )
    if not fits:
        told = " x ".join("any" if side is None else str(side) for side in shape)
        raise TrustError(
            f"It takes {told}, and the contract promises images of {' x '.join(map(str, contract.shape))}.",
            "Mend channels, depth, rows and columns of the contract, or export with these sizes.",
        )


def _raise_opset(model: Any) -> Any:
    from onnx.version_converter import convert_version

    now = {one.domain: one.version for one in model.opset_import}.get("", 0)
    if now >= OPSET:
        return model
    try:
        return convert_version(model, OPSET)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"Its operators are of opset {now}, which cannot be brought to {OPSET}.",
            f"Export with opset {OPSET} or later.",
        ) from error
