"""A planner's surroundings without torch and Triton: tiny graphs, two-coloured images, prices.

An image is one colour on the left and, by a little or a lot, another on the right. The full model
looks at all of it; cheap graphs look at the left half only and see it shifted, which an alignment
can take back. `FakeWorkshop` does what the planner has export and perf do.
"""

import contextlib
import io
from collections import Counter
from functools import cache
from types import SimpleNamespace

import numpy as np
import onnx
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from rich.console import Console
from safetensors.numpy import save_file

from bundle import manifest
from bundle.adapted import Adapted
from bundle.graphs import HIGH, LOW, REFERENCE, Graph, GraphsError, GraphSet
from bundle.prints import encode
from bundle.recipe import Recipe
from calibration.certify import Goal
from calibration.fidelity import Fidelity
from calibration.images import SourceImage
from export.align import align
from export.backbones import Backbone
from export.request import see
from imaging import ImageError, Preprocessing
from planner.plan import choose_rungs, make_plan
from planner.request import Request, recipes
from planner.workshop import Workshop
from report.terminal import Bars
from routing import RungRecord
from tests.unit.plan_content import spread

SIZE, D, LAYERS, CLASSES = 8, 6, 3, 4
PREPROCESSING = Preprocessing(SIZE, SIZE, None, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
QUIET = Bars(Console(quiet=True))
MS = {"full": 80.0, "int8static": 40.0}  # of an image; cheap graphs take CHEAP_MS
CHEAP_MS = 8.0
BUSY = 1.7


@cache
def two_colours(seed, index):
    """The PNG bytes of an image."""
    rng = np.random.default_rng((seed, index))
    left = rng.uniform(0, 255, 3)
    right = left + rng.normal(size=3) * 120 * rng.uniform() ** 3
    pixels = np.empty((SIZE, SIZE, 3), np.uint8)
    pixels[:, : SIZE // 2] = left
    pixels[:, SIZE // 2 :] = np.clip(right, 0, 255)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class TwoColours:
    """`count` images in memory; those in `gone` cannot be read."""

    spec, title = "two colours", "two colours each"

    def __init__(self, count, gone=(), seed=0):
        self.names = tuple(f"{index:04d}.png" for index in range(count))
        self._gone, self._seed = set(gone), seed
        self.read = []

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        self.read.append(index)
        if index in self._gone:
            raise ImageError("cannot be read: No such file or directory")
        name = self.names[index]
        return SourceImage(name, name, None, two_colours(self._seed, index))

    def fingerprint(self):
        return f"{self._seed} {len(self)} {sorted(self._gone)}"


def write_graph(path, seen, shift, head=True):
    """Mean colour of the first `seen` columns -> embedding -> its multiples and its logits."""
    rng = np.random.default_rng(0)
    constants = {
        "starts": np.array([0]),
        "ends": np.array([seen]),
        "axes": np.array([3]),
        "flat": np.array([0, 3]),
        "W": rng.normal(size=(3, D)).astype(np.float32),
        "b": (shift * rng.normal(size=D)).astype(np.float32),
        "axis1": np.array([1]),
        "S": np.linspace(0.5, 1.0, LAYERS + 1, dtype=np.float32).reshape(1, LAYERS + 1, 1),
        "H": rng.normal(size=(D, CLASSES)).astype(np.float32),
        "h": np.zeros(CLASSES, np.float32),
    }
    nodes = [
        helper.make_node("Slice", ["image", "starts", "ends", "axes"], ["columns"]),
        helper.make_node("GlobalAveragePool", ["columns"], ["pooled"]),
        helper.make_node("Reshape", ["pooled", "flat"], ["colour"]),
        helper.make_node("Gemm", ["colour", "W", "b"], ["embedding"]),
        helper.make_node("Unsqueeze", ["embedding", "axis1"], ["row"]),
        helper.make_node("Mul", ["row", "S"], ["cls_layers"]),
    ]
    shapes = {"embedding": [D], "cls_layers": [LAYERS + 1, D]}
    if head:
        nodes.append(helper.make_node("Gemm", ["embedding", "H", "h"], ["logits"]))
        shapes["logits"] = [CLASSES]
    image = ["batch", 3, SIZE, SIZE]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, image)],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])
            for name, shape in shapes.items()
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)


def write_shelf(
    folder, texts, learned="", head=True, task="classes", adds=False, taught="", states=None
):
    """What an export leaves: graphs by their recipes, the full model the last; the first is low.

    With `adds`, graphs of before stay, as the exporter's do: all but those of other int8 ranges.
    Adapted graphs, of these states by their keys, look at more of the image, hardly shifted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    graphs = _of_before(folder, learned) if adds else {}
    for text in (*texts, "fp32"):
        recipe = Recipe.parse(text).at(SIZE)
        name = recipe.slug(SIZE)
        if name in graphs:
            continue
        file = folder / f"{name}.onnx"
        cheap = (
            recipe.px < SIZE and not recipe.adapted
        )  # a graph of merged tokens answers as the full model does
        shift = 1.5 * cheap + 0.05 * (recipe.precision != "fp32") + 0.01 * (recipe.depth or 0)
        shift += 0.001 * recipe.px  # no two graphs are the same file
        seen = SIZE - 3 if recipe.adapted else SIZE // 2 if cheap else SIZE
        write_graph(file, seen, shift, head)
        record = RungRecord(recipe.px, str(recipe), manifest.sha256_file(file), layers=LAYERS)
        ranges = learned if recipe.precision == "int8=static" else ""
        adapted = states[recipe.adapted].image_prints if recipe.adapted else ""
        graphs[name] = Graph(name, record, file, ranges, adapted)
    GraphSet(
        backbone="tiny",
        image_shape=(3, SIZE, SIZE),
        embedding_dim=D,
        layers=LAYERS,
        classes=CLASSES if head else None,
        labels=tuple(f"class {i}" for i in range(CLASSES)) if head else None,
        preprocessing=PREPROCESSING.to_dict(),
        graphs=graphs,
        roles={LOW: next(iter(graphs)), HIGH: "full", REFERENCE: "full"},
        task=task if head else None,
        fitted_on=taught,
    ).save(folder)
    return GraphSet.load(folder)


def _of_before(folder, learned):
    graphs = {}
    with contextlib.suppress(GraphsError):
        graphs = GraphSet.load(folder).graphs

    def stays(graph):
        body = graphs.get(graph.name.removesuffix("_align"), graph)
        return not learned or "int8=static" not in body.record.recipe or body.fitted_on == learned

    return {name: graph for name, graph in graphs.items() if stays(graph)}


def tiny_backbone(class_name="ViTForImageClassification", task=None):
    """A model that `write_shelf`'s graphs could be of; its recipes are held against it."""
    family = next(f for f in ("ViT", "DeiT", "Dinov2") if class_name.startswith(f))
    config = getattr(transformers, f"{family}Config")(
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=1,
        image_size=SIZE,
        patch_size=1,
        num_labels=CLASSES,
    )
    torch.manual_seed(0)  # a state is of these weights
    model = getattr(transformers, class_name)(config)
    return Backbone(
        "tiny", {}, model, None, (SIZE // 2, SIZE), lambda px: PREPROCESSING, own_task=task
    )


def write_state(folder, recipe, source, places, minutes=3.0, backbone=None):
    """What `python -m adaptation distil` leaves, learned from these images of a source."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = np.array([*str(recipe).encode(), minutes, *places])  # others from other images
    save_file({"w": weights}, folder / "adapted.safetensors")
    seen = [see(source[place].data, PREPROCESSING)[1:] for place in places]
    return Adapted(
        folder=folder,
        recipe=recipe,
        teacher=(backbone or tiny_backbone()).weights_sha256,
        image_px=SIZE,
        sha256="",
        image_prints=encode([sha256 for sha256, _ in seen], np.stack([look for _, look in seen])),
        about={"minutes": minutes},
    ).save()


class FakeWorkshop:
    """A workshop without torch and Triton, and how often each of its tools was used.

    `used["export"]` counts graphs, whose names stand in `made`; `exports` is what was asked for,
    and `loaded` for which requests a model was.
    The head has learned from the images of the prints `taught`. The clock of the first `busy`
    pricings shows every graph but the full one `BUSY` times as dear, both times that they are
    measured. `lessons` are the trainings that were asked for; one `helps`, or raises it.
    `varied` is what images cost of those graphs of which it depends on them.
    """

    def __init__(
        self, ms=None, head=True, model=None, task=None, busy=0, taught="", helps=True, varied=None
    ):
        self.used = Counter()
        self.loaded, self.exports, self.made, self.priced = [], [], [], []
        self.priced_on, self._varied = [], varied or {}
        self._taught, self.helps, self.lessons = taught, helps, []
        self._busy, self._ms, self._head, self._task = busy, ms or MS, head, task
        self._model = model or ("ViTForImageClassification" if head else "ViTModel")

    def load(self, request):
        self.used["load"] += 1
        self.loaded.append(request)
        return tiny_backbone(self._model, self._task)

    def export(self, backbone, asked, bars):
        self.exports.append(asked)
        learned = "" if asked.fit_images is None else asked.fit_images.prints
        texts, task = map(str, (asked.low, *asked.beside)), self._task or "classes"
        before = dict(_of_before(asked.out, learned)) if asked.adds else {}
        more = {"adds": asked.adds, "taught": self._taught, "states": backbone.adapted}
        graphs = write_shelf(asked.out, texts, learned, self._head, task, **more)
        self.made += [name for name in graphs.graphs if name not in before]
        self.used["export"] += len(graphs.graphs) - len(before)
        return graphs

    def align(self, graphs, name, alignment):
        self.used["align"] += 1
        return align(graphs, name, alignment)

    def adapt(self, backbone, graphs, lesson, fidelity, bars):
        self.used["adapt"] += 1
        self.lessons.append(lesson)
        if isinstance(self.helps, BaseException):
            raise self.helps
        state = None
        if self.helps:
            more = {"minutes": lesson.minutes, "backbone": backbone}
            state = write_state(lesson.out, lesson.recipe, lesson.source, lesson.rows, **more)
        return SimpleNamespace(adapted=state, lines=lambda: ["on 35 held-out images: …", "next"])

    def share(self, graphs, folder):
        return Workshop().share(graphs, folder)

    def price(self, graphs, names, request, rows, bars):
        self.used["price"] += 1
        self.priced_on.append(rows)
        self.priced.append(sorted(names))
        busy, self._busy = self._busy > 0, self._busy - 1
        return {name: self._price(name, busy) for name in names}

    def _price(self, name, busy):
        ms, full = self._ms.get(name, CHEAP_MS), self._ms["full"]
        clock_ms = BUSY * ms if busy and name != "full" else ms
        return {
            "latency_ms": spread(2 * clock_ms),
            "ms_per_image": spread(clock_ms),
            "cost_ratio": spread(clock_ms / full),
            "cpu_cost_ratio": spread(ms / full),
            "batch": 8,
            "disturbed": clock_ms != ms,
            "per_image": self._varied.get(name),
        }


def make_request(folder, **changes):
    fields = {
        "model": "tiny",
        "source": TwoColours(700),
        "candidates": "px=4,int8=static,align; px=4",
        "highs": "fp32; int8=static",
        "beside": "px=6",
        "px": SIZE,
        "head_images": None,
        "goal": Goal(0.2, 0.9, "ltt"),
        "fidelity": None,
        "settings": {"tolerance": 0.1},
        "group_by": "source",
        "latency_budget_ms": None,
        "instances": 2,
        "threads": 1,
        "seed": 0,
        "cache": folder / "cache",
        "answers": folder.parent / "answers",  # shared by the plans of all tests: it has keys
        "out": folder / "out",
    }
    fields |= changes
    kind, settings = fields["fidelity"], fields.pop("settings")
    fields["fidelity"] = lambda task: Fidelity.asked(task, kind, **settings)
    for option in ("candidates", "highs", "beside"):
        if isinstance(fields[option], str):
            fields[option] = recipes(f"--{option}", fields[option])
    return Request(**fields)


def plan(request, workshop):
    """Make a plan and write the cascade that it chooses."""
    planned = make_plan(request, workshop, QUIET)
    if planned.chosen is not None:
        choose_rungs(planned, workshop, QUIET)
    return planned
