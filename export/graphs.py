"""From a loaded model to checked ONNX graphs, their labels and their record."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from bundle import manifest
from bundle.graphs import HIGH, LOW, REFERENCE, Graph, GraphsError, GraphSet
from bundle.placing import folder_beside
from bundle.recipe import Recipe
from export import onnx_graph, parity
from export.backbones import Backbone
from export.errors import ExportError, UsageError
from export.kept_tokens import kept_tokens, nothing_saved
from export.onnx_graph import COUNTS
from export.probe import earlier_probe, fit_probe
from export.recipes.half import to_half
from export.recipes.halting import public_depth
from export.recipes.quantise import quantise
from export.request import GraphsRequest, LearnedImages
from export.shared_weights import share_weights
from report.terminal import Bar, Bars
from routing import WEIGHTS, RungRecord
from routing.provenance import RELEASE

# Mean cosine between the embeddings of a graph in fewer bits and of the same graph in FP32: below
# it something broke. DINOv2 ViT-S in int8 has 0.998, in fp16 0.99999.
LEAST_COSINE = {"fp16": 0.999, "int8": 0.95, "int8=static": 0.95}
FIDELITY_IMAGES = 16
# Share of the checked images whose tokens may be chosen in another way than in torch, because the
# likeness of two, an area's entropy or a gate is within rounding of what decides: one of eight.
# Of 400 images through static-vit and 64 through DINOv2 ViT-S with tome=8 none did, nor of 64
# crops of photographs through DINOv2 ViT-S with apt=5.5.
CHOICES_MAY_DIFFER = 0.125


def export_graphs(backbone: Backbone, request: GraphsRequest, bars: Bars) -> GraphSet:
    """Export every graph that is asked for, check it and write all together with their record.

    Everything is written to a folder beside `out` and moved at the end, so a failure leaves the
    previous files, or none.

    Args:
        backbone: the model.
        request: what to export.
        bars: where to show progress.

    Returns:
        The graphs in `out`.

    Raises:
        UsageError: the request cannot be carried out with this model.
        AdaptedError: no such adapted state, or it is of something else.
        ParityError: a graph differs from the model.
        ExportError: anything else that is not a defect of this code.
        OSError: `out` cannot be written.
    """
    for notice in backbone.notices:
        bars.say(f"note: {notice}")
    if request.head_images is None:
        backbone = _with_task(backbone, request.task, bars)
    backbone, low, high, recipes = _recipes(backbone, request)
    px = high.px or 0
    learned = _fit_images(request, recipes, backbone, px, bars)
    earlier, kept = _earlier(request), dict[str, Graph]()
    if earlier is not None:
        kept = _kept(earlier, px, learned)
        recipes = [recipe for recipe in recipes if recipe.slug(px) not in kept]
        if not recipes:
            return earlier
    own = {"kind": "own"} if backbone.classes else None
    head_prints, head = "", own if backbone.texts is None else dict(backbone.texts)
    if request.head_images is not None:
        if earlier is not None:
            probe = earlier_probe(earlier)
        else:
            probe = fit_probe(backbone, px, request.head_images, bars)
        head_prints, head = probe.prints, probe.record
        backbone = backbone.with_probe(probe.linear, probe.labels)
    with folder_beside(request.out) as folder:
        with bars.stage("export", 2 * len(recipes)) as bar:
            exporter = _Exporter(folder, backbone, px, request, learned, bar)
            graphs, ir_version = exporter.export(recipes, kept)
        for line in filter(None, map(nothing_saved, graphs)):
            bars.say(f"note: {line}")
        made = GraphSet(
            backbone=backbone.name,
            image_shape=(3, px, px),
            embedding_dim=backbone.embedding_dim,
            layers=backbone.layers,
            classes=backbone.classes,
            labels=tuple(backbone.labels) if backbone.labels else None,
            preprocessing=backbone.preprocessing(px).to_dict(),
            graphs={**kept, **{graph.name: graph for graph in graphs}},
            roles={LOW: low.slug(px), HIGH: high.slug(px), REFERENCE: Recipe(px).slug(px)},
            task=backbone.task,
            fitted_on=head_prints,
            layer_dim=(
                None if backbone.layer_dim == backbone.embedding_dim else backbone.layer_dim
            ),
            release=RELEASE,
            about={
                "source": backbone.source,
                "head": head,
                "opset": request.opset,
                "ir_version": ir_version,
                "parity": {
                    "rtol": request.rtol,
                    "atol": request.atol,
                    "batches": list(parity.BATCHES),
                },
            },
        )
        return made.place(request.out)


def _with_task(backbone: Backbone, asked: str | None, bars: Bars) -> Backbone:
    """The backbone with the task that the user gave, or a note where it had to be guessed."""
    if asked is not None:
        return backbone.answering(asked)
    if backbone.task == "value" and backbone.own_task is None:
        bars.say(
            "note: one output and no problem_type in its config: taken as a value; if it is the "
            "logit of a label, give --task labels"
        )
    return backbone


def _recipes(
    backbone: Backbone, request: GraphsRequest
) -> tuple[Backbone, Recipe, Recipe, list[Recipe]]:
    """The cheap rung, the full rung, and all: the reference if that is another, and the rest.

    The backbone knows the adapted states that they name, which have become their keys.
    """
    low_px, high_px = backbone.default_px
    high = (request.high or Recipe()).at(high_px)
    px = high.px or 0
    low = Recipe(low_px, halt=None if backbone.gate is None else 0.0)
    asked = [request.low or low, high, *([Recipe(px)] if high != Recipe(px) else [])]
    recipes: list[Recipe] = []
    for recipe in (*asked, *request.beside):
        backbone, known = backbone.knowing(recipe, px)
        recipes.append(known)
    low, high = recipes[:2]
    recipes = list(dict.fromkeys(recipes)) if request.adds else recipes
    probed = backbone if request.head_images is None else backbone.to_be_probed()
    for recipe in recipes:
        probed.check(recipe, px)
    (recipe, count), *_ = Counter(recipes).most_common()
    if count > 1:
        raise UsageError(f"{recipe} is asked for {count} times; each graph needs another recipe")
    return backbone, low, high, recipes


def _earlier(request: GraphsRequest) -> GraphSet | None:
    """The graphs that are added to; None: there are none."""
    if not request.adds:
        return None
    with contextlib.suppress(GraphsError):
        return GraphSet.load(request.out)
    return None


def _kept(earlier: GraphSet, px: int, learned: LearnedImages | None) -> dict[str, Graph]:
    """The graphs that stay: all but those that learned ranges from other images, and their kin."""
    prints = None if learned is None else learned.prints

    def stale(graph: Graph) -> bool:
        body = earlier.graphs.get(replace(graph.recipe, align=False).slug(px), graph)
        return body.recipe.precision == "int8=static" and prints not in (None, body.fitted_on)

    return {name: graph for name, graph in earlier.graphs.items() if not stale(graph)}


def _fit_images(
    request: GraphsRequest, recipes: list[Recipe], backbone: Backbone, px: int, bars: Bars
) -> LearnedImages | None:
    images = request.fit_images or request.head_images
    if all(recipe.precision != "int8=static" for recipe in recipes):
        return None
    if not isinstance(images, Path):
        return images
    return LearnedImages.read(images, backbone.preprocessing(px), bars.say)


class _Exporter:
    """Writes the graphs of several recipes, then holds each against what it should answer."""

    def __init__(
        self,
        folder: Path,
        backbone: Backbone,
        px: int,
        request: GraphsRequest,
        learned: LearnedImages | None,
        bar: Bar,
    ) -> None:
        self._folder, self._backbone, self._px = folder, backbone, px
        self._request, self._learned, self._bar = request, learned, bar
        # The FP32 graphs, one for each torch module, whatever the precision.
        self._bodies: dict[Recipe, Path] = {}
        self._images = (
            parity.sample_images(FIDELITY_IMAGES, px, seed=1)
            if learned is None
            else learned.tensors[:FIDELITY_IMAGES]
        )

    def export(self, recipes: list[Recipe], kept: Mapping[str, Graph]) -> tuple[list[Graph], int]:
        """Every graph, and the highest IR version; all are tried before a failure is raised.

        Args:
            recipes: of the graphs.
            kept: graphs of before, the full model among them unless its recipe is asked for.

        Raises:
            ParityError: graphs do not answer as their recipes say.
        """
        files = {recipe: self._folder / f"{recipe.slug(self._px)}.onnx" for recipe in recipes}
        ir_version = 0
        for recipe, file in files.items():
            self._bar.describe(f"export {file.stem} ({recipe})")
            model = self._model(recipe)
            file.write_bytes(model.SerializeToString(deterministic=True))
            ir_version = max(ir_version, model.ir_version)
            self._bar.advance()
        refers = dict.fromkeys(files.values(), False)
        if not self._request.adds:
            refers = share_weights(list(files.values()), self._folder / WEIGHTS)
        weights = manifest.sha256_file(self._folder / WEIGHTS) if any(refers.values()) else None
        reference = Recipe(self._px)
        there = files.get(reference) or kept[reference.slug(self._px)].file
        full = self._answers(there)[0]
        graphs: list[Graph] = []
        failures: list[parity.Failure] = []
        for recipe, file in files.items():
            self._bar.describe(f"check {file.stem}")
            try:
                checks = [asdict(check) for check in self._check(recipe, file)]
            except parity.ParityError as error:
                failures += error.failures
                continue
            embedding, *counts = self._answers(file, COUNTS if recipe.varies else ())
            notes = {"checks": checks, "fidelity": self._fidelity(embedding, full)}
            if counts:
                notes["tokens"] = self._tokens(recipe, *counts)
            record = self._record(recipe, file, weights if refers[file] else None)
            learned = self._learned if recipe.precision == "int8=static" else None
            prints = "" if learned is None else learned.prints
            state = self._backbone.adapted.get(recipe.adapted or "")
            adapted = "" if state is None else state.image_prints
            graphs.append(Graph(file.stem, record, file, prints, adapted, notes))
            self._bar.advance()
        for file in self._bodies.values():
            file.unlink()
        if failures:
            raise parity.ParityError(failures)
        return graphs, ir_version

    def _body(self, recipe: Recipe) -> Path:
        """The graph of a recipe in FP32 and without its alignment."""
        key = replace(recipe, precision="fp32", align=False)
        if key not in self._bodies:
            file = self._folder / f".body-{key.slug(0)}.onnx"
            module, names = self._backbone.rung(key), list(self._backbone.output_shapes(key))
            onnx_graph.export_onnx(module, self._px, names, file, self._request.opset)
            self._bodies[key] = file
        return self._bodies[key]

    def _model(self, recipe: Recipe) -> onnx.ModelProto:
        model = onnx.load(self._body(recipe))
        if recipe.precision == "fp16":
            return to_half(model)
        if recipe.precision == "int8":
            return quantise(model)
        if recipe.precision == "int8=static":
            assert self._learned is not None  # `GraphsRequest` has refused
            return quantise(model, self._learned.tensors)
        return model

    def _record(self, recipe: Recipe, file: Path, weights_sha256: str | None) -> RungRecord:
        weights = self._folder / WEIGHTS
        return RungRecord(
            px=recipe.px or 0,
            recipe=str(recipe),
            sha256=manifest.sha256_file(file),
            weights_sha256=weights_sha256,
            layers=self._backbone.layers if recipe.depth is None else recipe.depth,
            size_bytes=file.stat().st_size,
            weights_size_bytes=None if weights_sha256 is None else weights.stat().st_size,
        )

    def _check(self, recipe: Recipe, file: Path) -> list[parity.Check]:
        """Parity with torch in FP32; in fewer bits, the structure and a cosine."""
        shapes, request = self._backbone.output_shapes(recipe), self._request
        chooses = recipe.varies or self._backbone.gate is not None
        if recipe.precision == "fp32":
            return parity.check_parity(
                *(file.stem, file, self._px, shapes, self._truth(recipe)),
                *(request.rtol, request.atol),
                may_differ=CHOICES_MAY_DIFFER if recipe.tome or chooses else 0.0,
                images=self._mixed() if chooses else None,
            )
        model = onnx.load(file, load_external_data=False)
        failures = parity.structure_failures(file.stem, model, self._px, shapes)
        if failures:
            raise parity.ParityError(failures)
        truth = self._answers(self._body(recipe))[0]
        mean = float(_cosines(self._answers(file)[0], truth).mean())
        if not mean >= LEAST_COSINE[recipe.precision]:
            reason = (
                f"{recipe.precision} has a mean cosine of {mean:.3f} to FP32, at least "
                f"{LEAST_COSINE[recipe.precision]} is expected; leave it out of the recipe"
            )
            raise parity.ParityError([parity.Failure(file.stem, "embedding", reason)])
        return []

    def _mixed(self) -> NDArray[np.float32]:
        """What graphs whose images keep tokens of their own are checked on."""
        transform = self._backbone.preprocessing(self._px)
        return parity.mixed_images(
            max(parity.BATCHES), self._px, seed=0, mean=transform.mean, std=transform.std
        )

    def _truth(self, recipe: Recipe) -> parity.Reference:
        """What a graph in FP32 must answer: the library itself where it can run the recipe."""
        backbone = self._backbone
        if recipe == Recipe(recipe.px):
            return lambda image: backbone.reference(image, recipe.px or 0)
        module, names = backbone.rung(recipe).eval(), list(backbone.output_shapes(recipe))

        @torch.inference_mode()
        def truth(image: torch.Tensor) -> Mapping[str, torch.Tensor]:
            return dict(zip(names, module(image), strict=True))

        return truth

    def _fidelity(self, embedding: NDArray[Any], full: NDArray[Any]) -> dict[str, Any]:
        """How near a graph's answers are to the full model's: reported, never asserted."""
        cosines = _cosines(embedding, full)
        kind = "synthetic" if self._learned is None else "fit"
        return {
            "images": f"{len(self._images)} {kind}",
            "cosine_mean": float(cosines.mean()),
            "cosine_min": float(cosines.min()),
        }

    def _tokens(
        self, recipe: Recipe, tokens: NDArray[np.int32], patches: NDArray[np.int32]
    ) -> dict[str, float]:
        """What the images kept; `public_depth` is that of the module in FP32."""
        found = kept_tokens(recipe, tokens, patches)
        if recipe.halt is not None:
            images = torch.from_numpy(self._images)
            found["blocks_per_patch_public"] = public_depth(self._backbone.rung(recipe), images)
        return found

    def _answers(self, file: Path, more: tuple[str, ...] = ()) -> list[NDArray[Any]]:
        """Embeddings, and other outputs, of the images, each asked alone."""
        try:
            session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
            answers = [
                session.run(["embedding", *more], {"image": image[None]}) for image in self._images
            ]
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise ExportError(f"ONNX Runtime does not run {file.name}: {error}") from error
        return [np.concatenate(found) for found in zip(*answers, strict=True)]


def _cosines(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float64]:
    first, second = first.astype(np.float64), second.astype(np.float64)
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return np.asarray((first * second).sum(axis=1) / np.maximum(lengths, 1e-30))
