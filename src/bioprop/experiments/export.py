"""``bioprop export``: the trained network of a checkpoint, without the algorithm that trained it."""

import inspect
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from typing import Any

import torch
from torch import Tensor, nn

from bioprop.cli_parser import OneSentenceParser, resolve_homes
from bioprop.errors import UserError
from bioprop.files import read_checkpoint, replacing
from bioprop.networks.network import build_network
from bioprop.runs.folder import run_settings

#: Packages that torch needs to write ONNX.
ONNX = ("onnx", "onnxscript")


def export(ckpt_path: Path, to: Path, network: str = "") -> str:
    """Write the trained network of a checkpoint as a state dict (.pt) or an ONNX graph (.onnx).

    A state dict loads into the same network by torch.load(FILE, weights_only=True) and load_state_dict. An ONNX graph
    takes images [batch, channels, height, width], normalised as in training, and gives logits [batch, classes].

    Args:
        ckpt_path: checkpoint of a run, such as runs/ldrl_lenet_digits/version_0/checkpoints/best.ckpt.
        to: file to write; its ending says what: .pt or .onnx.
        network: dotted path of the class, for ONNX, where the network is not one of bioprop's.

    Returns:
        What was written.

    Raises:
        UserError: if the checkpoint cannot be read, the network not built, or the file is there already.
    """
    if to.suffix not in (".pt", ".pth", ".onnx"):
        raise UserError(f"--to is {to}, but its ending must be .pt (a state dict) or .onnx")
    if to.exists():
        raise UserError(f"{to} is there already: choose another name, or remove it")
    checkpoint = read_checkpoint(ckpt_path)
    prefix = "network."
    weights = {
        name.removeprefix(prefix): value for name, value in checkpoint["state_dict"].items() if name.startswith(prefix)
    }
    if not weights:
        raise UserError(f"{ckpt_path} holds no weights of a network: give a checkpoint that bioprop fit has written")
    if to.suffix == ".onnx":
        if missing := [name for name in ONNX if find_spec(name) is None]:
            raise UserError(f"ONNX needs what is not installed ({', '.join(missing)}): pip install {' '.join(ONNX)}")
        made, image_shape = _rebuilt(checkpoint, ckpt_path, network)
        made.load_state_dict(weights)
        write_onnx(made.eval(), image_shape, to)
    else:
        with replacing(to) as file:
            torch.save(weights, file)
    figures = sum(value.numel() for value in weights.values())
    return f"wrote {figures:,} numbers of {checkpoint.get('algorithm', 'a')}'s network to {to}{_inputs(checkpoint)}"


def write_onnx(network: nn.Module, image_shape: Sequence[int], to: Path) -> None:
    """Write a network as an ONNX graph that takes batches of any size."""
    batch = torch.export.Dim("batch", min=1)
    written = torch.onnx.export(
        network,
        (torch.zeros(2, *image_shape),),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: batch},),
        verbose=False,
    )
    assert written is not None
    with replacing(to) as file:
        file.write(written.model_proto.SerializeToString())


def _rebuilt(checkpoint: Mapping[str, Any], path: Path, dotted: str) -> tuple[nn.Module, list[int]]:
    """Build the network with fresh weights; return it with the shape of the images."""
    described = checkpoint["hyper_parameters"]["network"]
    settings = run_settings(path.parent)
    found: Any = None
    if dotted:
        try:
            found = locate(dotted)
        except ErrorDuringImport as error:
            raise UserError(f"--network is {dotted}, which cannot be imported: {error.value}") from error
        if not (inspect.isclass(found) and issubclass(found, nn.Module)):
            raise UserError(f"--network is {dotted}, which is no torch module found from here")
    if described["init_args"] is not None:
        network: nn.Module = build_network(described)
        return network, list(described["init_args"]["image_shape"])
    if not dotted or settings is None:
        raise UserError(
            f"{path} was trained on a {described['class_path']}, which only you can build: name its class by "
            "--network, and leave the checkpoint in its run's folder; a state dict (.pt) needs neither"
        )
    shape = _image_shape(settings, checkpoint)
    given = dict(settings["model"]["init_args"]["network"].get("init_args") or {})
    of_data = {"image_shape": tuple(shape), "num_classes": len(_data_state(checkpoint)["classes"])}
    taken = inspect.signature(found).parameters
    return found(**given, **{name: value for name, value in of_data.items() if name in taken}), shape


def _image_shape(settings: Any, checkpoint: Mapping[str, Any]) -> list[int]:
    data: Any = locate(settings["data"]["class_path"])
    arguments = settings["data"].get("init_args") or {}
    return list(data(**arguments).image_shape)


def _data_state(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state of the data module, under the name of its class."""
    name = str(checkpoint.get("datamodule_hyper_parameters", {}).get("_class_path", "")).rpartition(".")[2]
    state: Mapping[str, Any] = checkpoint.get(name, {})
    return state


def _inputs(checkpoint: Mapping[str, Any]) -> str:
    """Say how images are prepared, as far as the checkpoint knows."""
    state = _data_state(checkpoint)
    if not {"mean", "std"} <= state.keys():
        return ""
    mean, std = ([round(float(each), 4) for each in _listed(state[name])] for name in ("mean", "std"))
    return f"; it takes (pixels / 255 - mean) / std, with mean {mean} and std {std}"


def _listed(values: Tensor | Sequence[float]) -> list[float]:
    return list(values.tolist() if isinstance(values, Tensor) else values)


def main(words: Sequence[str]) -> int:
    """Run ``bioprop export``.

    Args:
        words: what follows on the command line.

    Returns:
        The exit status.
    """
    parser = OneSentenceParser(prog="bioprop export", usage="bioprop export --ckpt_path FILE --to FILE")
    parser.add_function_arguments(export, as_positional=False)
    given = resolve_homes(parser.parse_args(list(words)))
    sys.stdout.write(f"{export(**given.as_dict())}\n")
    return 0
