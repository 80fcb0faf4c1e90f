"""Write the graphs of several recipes, then hold each against what it should answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from bundle import manifest
from bundle.graphs import Graph
from bundle.recipe import Recipe
from export import onnx_graph, parity
from export.backbones import Backbone, RungSpec
from export.errors import ExportError
from export.progress import Steps
from export.recipes.half import to_half
from export.recipes.quantise import quantise_dynamic, quantise_static
from export.shared_weights import share_weights
from routing import WEIGHTS, RungRecord

# Mean cosine between the embeddings of a graph in fewer bits and of the same graph in FP32: below
# it something broke. DINOv2 ViT-S in int8 has 0.998, in fp16 0.99999.
LEAST_COSINE = {"fp16": 0.999, "int8": 0.95, "int8=static": 0.95}
FIDELITY_IMAGES = 16
# Share of the checked images whose tokens may merge in another way than in torch: one of eight.
# Of 400 images through static-vit and 64 through DINOv2 ViT-S with tome=8 none did.
TOME_MAY_DIFFER = 0.125


@dataclass(frozen=True, eq=False)
class Material:
    """What graphs are made from.

    Attributes:
        backbone: the model.
        image_px: H = W of the input `image`.
        opset: 18 to 21.
        fit_images: FP32 (n, 3, H, W) for `int8=static`, or None.
        fit_prints: of those images, see `bundle.prints`.
        rtol: parity tolerance, relative.
        atol: parity tolerance, absolute.
    """

    backbone: Backbone
    image_px: int
    opset: int
    fit_images: NDArray[np.float32] | None
    fit_prints: str
    rtol: float
    atol: float


def write_graphs(
    folder: Path, specs: Sequence[RungSpec], full: str, material: Material, steps: Steps
) -> tuple[list[Graph], int]:
    """Write every graph, share their weights, check each; all are tried before a failure is raised.

    Args:
        folder: where to.
        specs: the graphs.
        full: the name among them of the full model in FP32.
        material: what they are made from.
        steps: two for each graph.

    Returns:
        The graphs, and the highest IR version among them.

    Raises:
        UsageError: a recipe that this model, or this request, does not allow.
        ParityError: a graph does not answer as its recipe says.
    """
    graphs: list[Graph] = []
    ir_version, bodies = 0, _Bodies(folder, material)
    files = {spec.name: folder / f"{spec.name}.onnx" for spec in specs}
    for spec in specs:
        with steps.step(f"export {spec.name} ({spec.recipe})"):
            model = _lowered(bodies.of(spec.recipe), spec.recipe, material)
            onnx_graph.check_versions(model)
            files[spec.name].write_bytes(model.SerializeToString(deterministic=True))
        ir_version = max(ir_version, model.ir_version)
    refers = share_weights(list(files.values()), folder / WEIGHTS)
    weights = manifest.sha256_file(folder / WEIGHTS) if any(refers.values()) else None
    failures: list[parity.Failure] = []
    probe = _Fidelity(files[full], material)
    for spec in specs:
        file = files[spec.name]
        record = _record(spec, file, weights if refers[file] else None, material.backbone)
        truth = "torch" if spec.recipe.precision == "fp32" else "the same graph in FP32"
        try:
            with steps.step(f"compare {spec.name} with {truth}"):
                checks = [check.to_dict() for check in _check(spec, file, bodies, material)]
                notes = {"checks": checks, "fidelity": probe.of(file)}
        except parity.ParityError as error:
            failures += error.failures
            continue
        learned = material.fit_prints if spec.recipe.precision == "int8=static" else ""
        graphs.append(Graph(spec.name, record, file, learned, notes))
    bodies.remove()
    if failures:
        raise parity.ParityError(failures)
    return graphs, ir_version


class _Bodies:
    """The FP32 graphs, one for each resolution, depth and merging, whatever the precision."""

    def __init__(self, folder: Path, material: Material) -> None:
        self._folder, self._material = folder, material
        self._files: dict[Recipe, Path] = {}

    def of(self, recipe: Recipe) -> onnx.ModelProto:
        """The graph of a recipe in FP32, without its alignment."""
        return onnx.load(self.file(recipe))

    def file(self, recipe: Recipe) -> Path:
        """Where that graph lies until `remove`."""
        key = Recipe(recipe.px, recipe.depth, recipe.tome)
        if key not in self._files:
            file = self._folder / f".body-{key.slug(0)}.onnx"
            material = self._material
            names = list(material.backbone.output_shapes(key))
            module = material.backbone.rung(key)
            onnx_graph.export_onnx(module, material.image_px, names, file, material.opset)
            self._files[key] = file
        return self._files[key]

    def remove(self) -> None:
        """Delete the graphs."""
        for file in self._files.values():
            file.unlink()


def _lowered(model: onnx.ModelProto, recipe: Recipe, material: Material) -> onnx.ModelProto:
    """Apply what changes the graph: its precision."""
    if recipe.precision == "fp16":
        model = to_half(model)
    elif recipe.precision == "int8":
        model = quantise_dynamic(model)
    elif recipe.precision == "int8=static":
        assert material.fit_images is not None  # `export_rungs` has refused
        model = quantise_static(model, material.fit_images)
    return model


def _record(
    spec: RungSpec, file: Path, weights_sha256: str | None, backbone: Backbone
) -> RungRecord:
    weights = file.with_name(WEIGHTS)
    return RungRecord(
        px=spec.px,
        recipe=str(spec.recipe),
        sha256=manifest.sha256_file(file),
        weights_sha256=weights_sha256,
        layers=backbone.layers if spec.recipe.depth is None else spec.recipe.depth,
        size_bytes=file.stat().st_size,
        weights_size_bytes=None if weights_sha256 is None else weights.stat().st_size,
    )


def _check(spec: RungSpec, file: Path, bodies: _Bodies, material: Material) -> list[parity.Check]:
    """Parity with torch in FP32; in fewer bits, the structure and a cosine."""
    recipe, backbone = spec.recipe, material.backbone
    shapes = backbone.output_shapes(recipe)
    if recipe.precision == "fp32":
        return parity.check_parity(
            spec.name,
            file,
            material.image_px,
            shapes,
            _truth(recipe, backbone),
            material.rtol,
            material.atol,
            may_differ=TOME_MAY_DIFFER if recipe.tome else 0.0,
        )
    model = onnx.load(file, load_external_data=False)
    failures = parity.structure_failures(spec.name, model, material.image_px, shapes)
    if failures:
        raise parity.ParityError(failures)
    images = _images(material)
    mean = float(
        _cosines(_embeddings(file, images), _embeddings(bodies.file(recipe), images)).mean()
    )
    if not mean >= LEAST_COSINE[recipe.precision]:
        reason = (
            f"{recipe.precision} has a mean cosine of {mean:.3f} to FP32, at least "
            f"{LEAST_COSINE[recipe.precision]} is expected; leave it out of the recipe"
        )
        raise parity.ParityError([parity.Failure(spec.name, "embedding", reason)])
    return []


def _truth(recipe: Recipe, backbone: Backbone) -> parity.Reference:
    """What a graph in FP32 must answer: the library itself where it can run the recipe."""
    if recipe == Recipe(recipe.px):
        return lambda image: backbone.reference(image, recipe.px or 0)
    module, names = backbone.rung(recipe).eval(), list(backbone.output_shapes(recipe))

    @torch.inference_mode()
    def truth(image: torch.Tensor) -> Mapping[str, torch.Tensor]:
        return dict(zip(names, module(image), strict=True))

    return truth


class _Fidelity:
    """How near a graph's answers are to the full model's: reported, never asserted."""

    def __init__(self, full: Path, material: Material) -> None:
        self._images = _images(material)
        self._kind = "synthetic" if material.fit_images is None else "fit"
        self._full = _embeddings(full, self._images)

    def of(self, file: Path) -> dict[str, Any]:
        """Mean and least cosine between embeddings."""
        cosines = _cosines(_embeddings(file, self._images), self._full)
        return {
            "images": f"{len(self._images)} {self._kind}",
            "cosine_mean": float(cosines.mean()),
            "cosine_min": float(cosines.min()),
        }


def _images(material: Material) -> NDArray[np.float32]:
    if material.fit_images is not None:
        return material.fit_images[:FIDELITY_IMAGES]
    return parity.sample_images(FIDELITY_IMAGES, material.image_px, seed=1)


def _embeddings(file: Path, images: NDArray[np.float32]) -> NDArray[np.float64]:
    try:
        session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
        answers = [
            session.run(["embedding"], {"image": images[i : i + 1]})[0] for i in range(len(images))
        ]
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise ExportError(f"ONNX Runtime does not run {file.name}: {error}") from error
    return np.asarray(np.concatenate(answers), dtype=np.float64)


def _cosines(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return np.asarray((first * second).sum(axis=1) / np.maximum(lengths, 1e-30))
