"""The converter: a child process without a network, bounded in memory and time, opens what is foreign."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from imaging.errors import ConfigError, FormularyError, TrustError
from registry.architectures import build
from registry.backbones import convert_weights
from registry.graphs import export_graphs, read_graph
from registry.imports import ERRORS, MEMORY, SECONDS, Conversion
from registry.outputs import NEAR, PREPARED, adapt_graph, check_graph, scale_images


def _main(scratch: Path) -> None:
    """The child: bound itself, and only then open anything."""
    import resource

    limits = {resource.RLIMIT_AS: MEMORY, resource.RLIMIT_CPU: SECONDS, resource.RLIMIT_CORE: 0}
    for limit, most in limits.items():
        resource.setrlimit(limit, (most, most))
    told: dict[str, Any]
    try:
        asked = Conversion.model_validate_json((scratch / "asked.json").read_bytes())
        told = {"notes": _make(asked, scratch / "made")}
    except FormularyError as error:
        name = type(error).__name__
        told = {"error": name if name in ERRORS else "TrustError", "fact": error.fact, "fix": error.fix}
    except Exception as error:  # whatever it was, the parent says it: no model, and why
        why = (str(error).splitlines() or [""])[0][:300]
        told = {
            "error": "TrustError",
            "fact": f"It cannot be converted: {type(error).__name__}: {why}",
            "fix": "",
        }
    (scratch / "told.json").write_text(json.dumps(told))


def _make(asked: Conversion, folder: Path) -> list[str]:
    contract = asked.contract
    if asked.source.suffix == ".onnx":
        notes = adapt_graph(read_graph(asked.source, contract), contract, asked.value_range, folder)
        check_graph(folder, contract)
        _copy_weights(folder)
        return notes
    network, notes = _load(asked, folder), list[str]()
    if asked.network is None and asked.value_range == PREPARED:
        export_graphs(network, contract, folder)
    else:
        export_graphs(network, contract, folder, ("logits",))
        (folder / "program.pt2").unlink()  # it gives one output; what is derived is derived in ONNX
        notes = adapt_graph(read_graph(folder / "model.onnx", contract), contract, asked.value_range, folder)
    _compare(network, asked, folder)
    return notes


def _load(asked: Conversion, folder: Path) -> Any:
    """The network with its weights, none too many and none too few."""
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    contract, weights = asked.contract, folder / "weights.safetensors"
    convert_weights(asked.source, weights)
    if asked.network is not None:
        import monai.networks.nets

        arguments = dict(asked.network)
        name = arguments.pop("_target_")
        make = getattr(monai.networks.nets, name)
        fetches = "pretrained" in inspect.signature(make).parameters  # some do unless told otherwise
        network = make(**arguments, **({"pretrained": False} if fetches else {}))
    elif asked.architecture is not None:
        name, shape = asked.architecture.name, contract.shape
        network = build(asked.architecture, shape, len(contract.classes), contract.positive_labels)
    else:
        raise ConfigError(
            "It is not said of which network these weights are.", "Name `architecture` or `network`."
        )
    try:
        network.load_state_dict(load_file(weights))
    except RuntimeError as error:
        told = " ".join(str(error).split())[:400]
        raise ConfigError(f"The weights are not of this {name}: {told}", "Mend its arguments.") from error
    return network.eval()


def _compare(network: Any, asked: Conversion, folder: Path) -> None:
    """Hold the ONNX to the network that it was made of."""
    import torch

    images, logits = check_graph(folder, asked.contract)
    with torch.inference_mode():
        answer = network(torch.from_numpy(scale_images(images, asked.value_range)))
    expected = (answer[0] if isinstance(answer, tuple) else answer).numpy()
    if not np.allclose(logits[:, -expected.shape[1] :], expected, rtol=NEAR, atol=NEAR):
        raise TrustError(
            "Its ONNX does not answer as the network does.", "Export it yourself, and import that."
        )


def _copy_weights(folder: Path) -> None:
    """weights.safetensors: what the graph holds."""
    import onnx
    from safetensors.numpy import save_file

    held = {one.name: one for one in onnx.load(folder / "model.onnx").graph.initializer}
    arrays = {name: onnx.numpy_helper.to_array(held[name]).copy() for name in sorted(held)}
    save_file(arrays, folder / "weights.safetensors")


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
