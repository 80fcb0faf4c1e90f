"""Requests that no client of ours would send, drawn by hypothesis.

Each begins as a sound request and has one to three things done to it, so that most get past the
first check. Two kinds are left out, because this Triton is known to crash on them (SECURITY.md):
chunked bodies, and the registration of shared memory.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

NAMES = st.sampled_from(["image", "image_bytes", "score", "", "embedding", "ïmage", "a" * 3000])
WORDS = st.sampled_from(
    ["policy", "threshold", "timeout", "priority", "sequence_id", "sequence_start", "sequence_end"]
    + ["binary_data_output", "triton_enable_empty_final_response", "treshold", "", "x" * 500]
) | st.text(max_size=20)
TEXTS = st.sampled_from(["auto", "low", "high", "HIGH", "nan", "inf", "-inf", "1e999", "0x10", ""])
TEXTS |= st.text(max_size=30)
LOWEST, HIGHEST = -(2**63), 2**63 - 1
INTEGERS = st.sampled_from([0, 1, -1, 2**31, LOWEST, HIGHEST]) | st.integers(LOWEST, HIGHEST)
DATATYPES = st.sampled_from(
    ["FP32", "FP16", "FP64", "INT8", "INT32", "UINT64", "BOOL", "BYTES", "", "FP99", "fp32"]
)
SIZES = st.sampled_from([0, 1, 2, 3, 32, 33, 64, -1, 2**31, 2**62, HIGHEST])
SHAPES = st.lists(SIZES, max_size=6)
OUTPUTS = ("embedding", "logits", "score", "escalated", "degraded", "image")
VERSIONS = st.sampled_from(["", "1", "2", "0", "-1", "x", "99999999999999999999", "../1"])
FLOATS = st.sampled_from([np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, 0.0])

Draw = Callable[[st.SearchStrategy], Any]


@dataclass
class Draft:
    """A request that both protocols can be made from.

    Attributes:
        model: its name.
        content: the bytes of the one input.
        name, datatype, shape: what is said of that input.
        parameters: of the request.
        outputs: asked for, by name.
        version: of the model, as a string.
        copies: how often the input is listed.
    """

    model: str
    content: bytes
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any]
    outputs: list[str]
    version: str = ""
    copies: int = 1


def sound(model: str, files: list[bytes], images: np.ndarray) -> Draft:
    """A request that would be answered."""
    if model in ("adaptive_tensor", "router"):
        return Draft(model, images.tobytes(), "image", "FP32", list(images.shape), {}, [])
    content = b"".join(struct.pack("<I", len(data)) + data for data in files)
    return Draft(model, content, "image_bytes", "BYTES", [len(files), 1], {}, [])


# --- what is done to it ------------------------------------------------------------------------


def parameters(draft: Draft, draw: Draw) -> None:
    """Add parameters of any name and type."""
    values = st.booleans() | INTEGERS | TEXTS | st.floats()
    draft.parameters |= draw(st.dictionaries(WORDS, values, min_size=1, max_size=3))


def description(draft: Draft, draw: Draw) -> None:
    """Describe the input wrongly."""
    part = draw(st.sampled_from(["name", "datatype", "shape", "copies", "version", "outputs"]))
    kinds = {
        "name": NAMES,
        "datatype": DATATYPES,
        "shape": SHAPES,
        "copies": st.sampled_from([0, 2, 50]),
        "version": VERSIONS,
        "outputs": st.lists(st.sampled_from(OUTPUTS) | st.text(max_size=9), max_size=5),
    }
    setattr(draft, part, draw(kinds[part]))


def batch(draft: Draft, draw: Draw) -> None:
    """Another number of images than there are, or really that many."""
    count = draw(st.sampled_from([0, 1, 2, 33, 64, 1000]))
    if count in (0, 33) and draft.shape and draw(st.booleans()):
        one = draft.content[: len(draft.content) // max(1, draft.shape[0])]
        draft.content = one * count if draft.datatype == "FP32" else b"\1\0\0\0x" * count
    draft.shape = [count, *draft.shape[1:]]


def length(draft: Draft, draw: Draw) -> None:
    """Too few or too many bytes."""
    if draw(st.booleans()):
        draft.content = draft.content[: draw(st.integers(0, len(draft.content)))]
    else:
        draft.content += draw(st.binary(min_size=1, max_size=64))


def flips(draft: Draft, draw: Draw) -> None:
    """Change some bytes; in an image mostly of its header."""
    data = bytearray(draft.content)
    if not data:
        return
    near = draw(st.sampled_from([40, 700, len(data)]))
    for _ in range(draw(st.integers(1, 8))):
        place = draw(st.integers(0, min(near, len(data)) - 1))
        data[place] = draw(st.integers(0, 255))
    draft.content = bytes(data)


def pixels(draft: Draft, draw: Draw) -> None:
    """Numbers that are none, or too large to add up."""
    data = np.frombuffer(draft.content[: len(draft.content) // 4 * 4], np.float32).copy()
    if data.size:
        data[draw(st.integers(0, data.size - 1)) :: draw(st.integers(1, 5000))] = draw(FLOATS)
        draft.content = data.tobytes()


def other_image(draft: Draft, draw: Draw) -> None:
    """One image whose header lies about its size, or that is none at all."""
    side = draw(st.sampled_from([0, 1, 65_535, 2**31 - 1, 2**32 - 1]))
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", side, 1) + b"\x08\x02\0\0\0"
    data = draw(st.just(header) | st.binary(max_size=200))
    draft.content = struct.pack("<I", len(data)) + data
    draft.shape = [1, 1]


COMMON = (parameters, description, batch, length, flips)
HARMS = {
    "router": (*COMMON, pixels),
    "adaptive_tensor": (*COMMON, pixels),
    "preprocess": (*COMMON, other_image),
    "adaptive_vit": (*COMMON, other_image),
}


@st.composite
def drafts(draw: Draw, model: str, files: list[bytes], images: np.ndarray) -> Draft:
    """A malformed request to a model about one to four of these images."""
    first, count = draw(st.integers(0, len(files) - 4)), draw(st.integers(1, 4))
    rows = slice(first, first + count)
    draft = sound(model, files[rows], images[rows])
    harms = st.lists(st.sampled_from(HARMS[model]), min_size=1, max_size=3, unique=True)
    for harm in draw(harms):
        harm(draft, draw)
    return draft


# --- on the wire -------------------------------------------------------------------------------


def as_grpc(draft: Draft, draw: Draw) -> bytes:
    """The draft as a ModelInferRequest, now and then with contents that do not go with it."""
    message = service_pb2.ModelInferRequest(model_name=draft.model, model_version=draft.version)
    for _ in range(draft.copies):
        tensor = message.inputs.add(name=draft.name, datatype=draft.datatype, shape=draft.shape)
    for name in draft.outputs:
        message.outputs.add(name=name)
    for key, value in draft.parameters.items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param"}
        setattr(message.parameters[key], kind.get(type(value), "double_param"), value)
    for _ in range(draw(st.sampled_from([1, 1, 1, 1, 0, 2]))):
        message.raw_input_contents.append(draft.content)
    if draft.copies and draw(st.integers(0, 9)) == 0:
        tensor.contents.fp32_contents.extend([0.5] * draw(st.integers(0, 5)))
    sent = message.SerializeToString()
    if draw(st.integers(0, 19)) == 0:  # not even a message
        return sent[: draw(st.integers(0, len(sent)))] + draw(st.binary(max_size=16))
    return sent


def as_http(draft: Draft, draw: Draw) -> tuple[bytes, dict[str, str]]:
    """Body and headers of the draft, now and then with lengths that lie or a JSON that is none."""
    size = draw(st.sampled_from([len(draft.content)] * 4 + [0, 1, 2**31, 2**63, -1, "many"]))
    tensor = {
        "name": draft.name,
        "datatype": draft.datatype,
        "shape": draft.shape,
        "parameters": {"binary_data_size": size},
    }
    question: Any = {
        "inputs": [tensor] * draft.copies,
        "outputs": [{"name": name} for name in draft.outputs],
        "parameters": {"binary_data_output": True, **draft.parameters},
    }
    if not draft.outputs:
        del question["outputs"]
    nonsense = st.recursive(st.none() | INTEGERS | TEXTS, lambda x: st.lists(x, max_size=3))
    if draw(st.integers(0, 9)) == 0:
        question = draw(nonsense | st.dictionaries(st.sampled_from([*question]), nonsense))
    text = json.dumps(question).encode()
    if draw(st.integers(0, 9)) == 0:
        text = draw(st.binary(max_size=50) | st.just(b"[" * 2000) | st.just(text[:-1]))
    told = draw(st.sampled_from([len(text)] * 8 + [0, -1, len(text) + 7, 2**40, "all"]))
    headers = {"Inference-Header-Content-Length": str(told)}
    if draw(st.integers(0, 29)) == 0:
        headers = {}
    return text + draft.content, headers
