"""What the full model answers is kept on disk, for every recipe that is adapted."""

from __future__ import annotations

import copy
import sqlite3
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from adaptation import teacher as module
from adaptation.request import AdaptationError
from adaptation.teacher import BATCH, Teacher, View, drawn
from bundle.prints import encode
from bundle.recipe import Recipe
from calibration.images import FolderImages
from export.pretrained import load_backbone, pretrained
from export.request import Texts
from imaging import Preprocessing, decode
from tests.unit.adapting import adapt, one_thread, request, write_pictures
from tests.unit.export_tiny import LAYERS, PX, QUIET, WIDTH, save_tiny, save_tokenizer
from tests.unit.image_files import write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), 60)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    names = ("Dinov2Model", "ViTForImageClassification", "Dinov2ForImageClassification")
    return {name: pretrained(str(save_tiny(folder / name, name))) for name in names}


def made(backbone, folder, seed=0, **more):
    return Teacher(backbone, PX, folder, seed, one_thread(), **more)


class Counted:
    """Counts the images that a teacher's model answers for."""

    def __init__(self, monkeypatch):
        self.images = 0
        forward = module.Teacher._keep

        def keep(teacher, reads, number):
            self.images += sum(read.planes is not None for read in reads)
            forward(teacher, reads, number)

        monkeypatch.setattr(module.Teacher, "_keep", keep)


@pytest.mark.parametrize("name", ["Dinov2Model", "ViTForImageClassification"])
def test_answers_are_those_of_the_full_model_for_the_served_tensor(name, models, images, tmp_path):
    backbone, source = models[name], FolderImages(images)
    teacher = made(backbone, tmp_path)
    found = teacher.read_images(source, range(len(source)), QUIET)
    rows = [3, 50, 7]
    batch = teacher.batch([View(found.keys[row], 0) for row in rows])
    served = [backbone.preprocessing(PX)(decode(source[row].data)) for row in rows]
    np.testing.assert_array_equal(batch.image.numpy(), np.stack(served))
    truth = backbone.reference(torch.from_numpy(np.stack(served)), PX)
    torch.testing.assert_close(batch.embedding, truth["embedding"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch.cls_layers, truth["cls_layers"], rtol=2e-3, atol=2e-3)
    assert batch.cls_layers.shape == (3, LAYERS + 1, WIDTH)
    if "logits" in truth:
        torch.testing.assert_close(batch.logits, truth["logits"], rtol=1e-4, atol=1e-4)
    else:
        assert batch.logits is None


def test_a_head_that_reads_more_is_asked_itself(models, images, tmp_path):
    backbone, source = models["Dinov2ForImageClassification"], FolderImages(images)
    teacher = made(backbone, tmp_path)
    keys = teacher.read_images(source, range(20), QUIET).keys
    batch = teacher.batch([View(key, 0) for key in keys])
    truth = backbone.reference(batch.image, PX)
    torch.testing.assert_close(batch.logits, truth["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ((0.3, 0.9, 0.1), (0.003, 4.0, 0.7)),
    ],
)
def test_grey_levels_give_back_the_tensor_to_the_last_bit(mean, std):
    preprocessing = Preprocessing(16, 16, None, "bilinear", mean, std)
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    tensor = preprocessing(Image.fromarray(levels))
    planes = module._planes(tensor, preprocessing)
    np.testing.assert_array_equal(planes, levels.transpose(2, 0, 1))
    again = module._normalised(planes[np.newaxis], preprocessing)[0]
    assert again.dtype == tensor.dtype and again.tobytes() == tensor.tobytes()


def test_a_second_recipe_asks_the_full_model_nothing(models, images, tmp_path, monkeypatch):
    counted = Counted(monkeypatch)
    for number, recipe in enumerate(("px=8", "depth=1", "px=8")):
        asked = request(tmp_path, images, recipe, out=tmp_path / str(number), epochs=1)
        adapt(models["Dinov2Model"], asked)
        assert counted.images == 60 + 50  # as they are, and a crop of each to learn from
    adapt(models["Dinov2Model"], replace(asked, seed=1, out=tmp_path / "seed"))
    assert counted.images == 60 + 50 + 50  # the images themselves have no seed
    assert len(list((tmp_path / "cache").glob("*.sqlite"))) == 1


def test_views_follow_from_the_seed_the_number_and_the_image():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))

    def bytes_of(key, seed, number):
        view = drawn(image, key, seed, number)
        assert 0.5 * 40 <= min(view.picture.size) <= 40 or number == 0
        return view.picture.tobytes(), view.flipped

    key = bytes(range(32))
    assert bytes_of(key, 0, 0) == (image.tobytes(), False)
    views = [bytes_of(k, s, n) for k in (key, key[::-1]) for s in (0, 1) for n in (1, 2)]
    assert len({view for view, _ in views}) == len(views) and len({f for _, f in views}) == 2
    assert views == [bytes_of(k, s, n) for k in (key, key[::-1]) for s in (0, 1) for n in (1, 2)]


def test_kept_views_are_the_same_again_and_flipped_ones_are(models, images, tmp_path):
    source, rows = FolderImages(images), range(20)
    batches = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        teacher = made(models["Dinov2Model"], tmp_path / folder, seed)
        found = teacher.read_images(source, rows, QUIET)
        teacher.answer(source, found, rows, 2, QUIET)
        batches.append(teacher.batch([View(key, 1) for key in found.keys]))
    assert torch.equal(batches[0].image, batches[1].image)
    assert not torch.equal(batches[0].image, batches[2].image)
    row, decoded = next(
        (row, image)
        for row, image in ((row, decode(source[row].data)) for row in rows)
        if drawn(image, found.keys[row], 0, 1).flipped
    )
    picture = drawn(decoded, found.keys[row], 0, 1).picture
    tensor = models["Dinov2Model"].preprocessing(PX)(picture)
    np.testing.assert_array_equal(batches[0].image[row].numpy(), tensor[:, :, ::-1])


def test_full_models_that_answer_otherwise_have_other_files(models, tmp_path):
    folder = tmp_path / "clip"
    save_tokenizer(save_tiny(folder, "CLIPModel"))
    plain = load_backbone(str(folder))
    texts = load_backbone(str(folder), Texts(("cat", "dog")))
    other = replace(plain, model=replace_projection(plain.model))
    backbones = [*models.values(), plain, texts, other]
    found = {made(backbone, tmp_path / "cache").file for backbone in backbones}
    assert len(found) == len(backbones)
    assert Teacher(plain, 2 * PX, tmp_path / "cache", 0, one_thread()).file not in found
    # A head that follows from the embedding is no part of what is kept.
    headed = plain.with_probe(torch.nn.Linear(plain.embedding_dim, 3), ("a", "b", "c"))
    assert made(headed, tmp_path / "cache").file == made(plain, tmp_path / "cache").file


def replace_projection(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.visual_projection.weight.mul_(2)
    return other


def test_what_a_teacher_and_a_student_share_with_the_model_stays_where_it_is(models, tmp_path):
    backbone = models["ViTForImageClassification"]
    teacher = made(backbone, tmp_path)
    student = one_thread().take(backbone.trainable(Recipe(8)))
    own = {id(weight) for weight in backbone.model.parameters()}
    others = [*teacher._module.parameters(), *teacher._head.parameters(), *student.parameters()]
    assert own.isdisjoint(map(id, others))


def test_memory_holds_a_few_images_however_many_there_are(models, images, tmp_path):
    alive: list[weakref.ref] = []
    most = []

    class Watched(FolderImages):
        def __getitem__(self, index):
            image = super().__getitem__(index)
            alive.append(weakref.ref(image))
            most.append(sum(one() is not None for one in alive))
            return image

    source = Watched(write_pictures(tmp_path / "many", 150))
    made(models["Dinov2Model"], tmp_path).read_images(source, range(150), QUIET)
    assert len(most) == 150 and max(most) <= 4 * BATCH


def test_images_that_cannot_be_read_are_left_out_until_they_are_many(models, images, tmp_path):
    write_pictures(tmp_path / "some", 60)
    for name in ("broken.png", "empty.jpg"):
        (tmp_path / "some" / name).write_bytes(b"" if "empty" in name else b"no image")
    source = FolderImages(tmp_path / "some")
    found = made(models["Dinov2Model"], tmp_path).read_images(source, range(62), QUIET)
    assert len(found.keys) == len(found.pictures) == 60
    assert not {"broken.png", "empty.jpg"} & set(found.pictures.names)
    for number in range(3):
        (tmp_path / "some" / f"more{number}.png").write_bytes(b"no image")
    source = FolderImages(tmp_path / "some")
    with pytest.raises(AdaptationError, match="5 of 65 images cannot be read, as ") as caught:
        made(models["Dinov2Model"], tmp_path).read_images(source, range(65), QUIET)
    assert "\n" not in str(caught.value)


def test_an_image_that_changes_meanwhile_is_noticed(models, tmp_path):
    folder = write_images(tmp_path / "images", *(f"{i}.png" for i in range(20)))
    source, teacher = FolderImages(folder), made(models["Dinov2Model"], tmp_path)
    found = teacher.read_images(source, range(20), QUIET)
    (folder / "7.png").write_bytes((folder / "8.png").read_bytes())
    with pytest.raises(AdaptationError, match="images changed while they were read; begin again"):
        teacher.answer(source, found, range(20), 2, QUIET)
    (folder / "7.png").unlink()
    with pytest.raises(AdaptationError, match="images changed while they were read; begin again"):
        teacher.answer(source, found, range(20), 2, QUIET)


def test_a_full_disk_is_one_line_and_what_was_answered_stays(models, images, tmp_path, monkeypatch):
    connect, source = sqlite3.connect, FolderImages(images)
    teacher = made(models["Dinov2Model"], tmp_path, batch=8)

    def small(*arguments, **more):
        database = connect(*arguments, **more)
        database.execute("pragma max_page_count = 14")
        return database

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", small)
        with pytest.raises(AdaptationError, match="database or disk is full; see that") as caught:
            teacher.read_images(source, range(60), QUIET)
    assert "\n" not in str(caught.value) and str(teacher.file) in str(caught.value)
    kept = len(teacher._known(0))
    assert 0 < kept < 60
    counted = Counted(monkeypatch)
    found = made(models["Dinov2Model"], tmp_path).read_images(source, range(60), QUIET)
    assert counted.images == 60 - kept
    whole = made(models["Dinov2Model"], tmp_path / "whole")
    pictures = whole.read_images(source, range(60), QUIET).pictures
    assert encode(found.pictures.hashes, found.pictures.looks) == encode(
        pictures.hashes, pictures.looks
    )


def test_what_an_image_looks_like_is_kept_whoever_asked_first(models, images, tmp_path):
    source = FolderImages(images)

    class Independent:
        title, names = source.title, source.names

        def __len__(self):
            return len(source)

        def __getitem__(self, row):
            return replace(source[row], independent=True)

    looks = [
        made(models["Dinov2Model"], tmp_path).read_images(asked, range(8), QUIET).pictures.looks
        for asked in (Independent(), source, Independent())
    ]
    assert not looks[0].any() and looks[1].any(axis=1).all() and not looks[2].any()


def test_a_damaged_file_or_a_lost_answer_is_one_line(models, images, tmp_path):
    teacher = made(models["Dinov2Model"], tmp_path)
    with pytest.raises(AdaptationError, match="has lost answers; remove it, begin again"):
        teacher.batch([View(bytes(32), 0)])
    teacher.file.write_bytes(b"no database" * 500)
    with pytest.raises(AdaptationError, match="file is not a database; see that"):
        made(models["Dinov2Model"], tmp_path)


def test_an_answer_that_is_no_number_names_its_image(images, models, tmp_path):
    teacher = made(models["Dinov2Model"], tmp_path)
    model = teacher._module

    def answers(image):
        embedding, *others = model(image)
        embedding[5] = torch.nan
        return embedding, *others

    teacher._module = answers
    with pytest.raises(AdaptationError, match=r"answer for 005\.png is no number"):
        teacher.read_images(FolderImages(images), range(60), QUIET)


def test_a_gpu_without_room_for_the_full_model_is_one_line(images, models, tmp_path):
    teacher = made(models["Dinov2Model"], tmp_path)

    def refuse(image):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    teacher._module = refuse
    with pytest.raises(AdaptationError, match="no room for the full model with 16 .*--batch 8"):
        teacher.read_images(FolderImages(images), range(60), QUIET)
