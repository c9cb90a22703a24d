"""The data: loaders and augmentation, the validation split, cifar10-mini, folders of pictures."""

import functools
import hashlib
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, SCRIPT, call, one_line_error, quick_flags
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

PLAIN = ((0.0,) * 3, (1.0,) * 3)  # mean and std of a loader that yields pixels in 0..1
CLASSES = [str(label) for label in range(10)]
SPLITS = {  # SHA-256 of the mask, a bit an image: every published run held out these
    "cifar10": "172c16ef80548067d533630581ff7b2381c0c1a979bf2e5e977ee0ac2e7de58b",
    "cifar100": "5a4fe5c83ce0577abc5d9ae15ddab88f3f0271470ce01bb538acacd9b5dbe781",
}


@pytest.fixture(scope="module")
def real(ck, request):
    """The real data sets by name, read once; a test is skipped where they are not there."""

    @functools.cache
    def read(name: str):
        return ck.read_dataset(name, request.getfixturevalue(f"{name}_dir"))

    return read


def random_images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


def pixels(images: Tensor) -> Tensor:
    """The uint8 pixels of a PLAIN loader's batch."""
    return (images * 255).round().to(torch.uint8)


def epoch_of(loader, epoch: int) -> tuple[Tensor, Tensor]:
    """All images and labels of one epoch, in their order."""
    loader.set_epoch(epoch)
    images, labels = zip(*loader)
    return torch.cat(images), torch.cat(labels)


def as_bytes(images: Tensor) -> list[bytes]:
    return [image.contiguous().numpy().tobytes() for image in images]


# ---- Loaders -------------------------------------------------------------------------------------


def test_the_162_crops_and_flips_are_torchvisions_and_come_evenly(ck):
    (image,) = random_images(1)
    padded = v2.functional.pad(image, [4])
    crops = [v2.functional.crop(padded, y, x, 32, 32) for y in range(9) for x in range(9)]
    views = as_bytes(torch.stack([*crops, *(crop.flip(2) for crop in crops)]))
    transform = v2.Compose([v2.Pad(4), v2.RandomCrop(32), v2.RandomHorizontalFlip()])
    torch.manual_seed(0)
    theirs = as_bytes(torch.stack([transform(image) for _ in range(2000)]))
    assert len(set(views)) == 162 and set(theirs) == set(views)

    many = image.expand(16_200, 3, 32, 32)
    loader = ck.CifarLoader(
        many, torch.arange(16_200), CLASSES, *PLAIN, 500, shuffle=True, augment="crop-flip"
    )
    number = {content: n for n, content in enumerate(views)}
    counts = Counter(number[view] for view in as_bytes(pixels(epoch_of(loader, 1)[0])))
    assert len(counts) == 162 and min(counts.values()) > 55 and max(counts.values()) < 150


def test_padding_is_black_before_normalization(ck):
    white = torch.full((300, 3, 32, 32), 255, dtype=torch.uint8)
    constants = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    loader = ck.CifarLoader(
        white, torch.zeros(300).long(), CLASSES, *constants, shuffle=True, augment="crop-flip"
    )
    images, _ = epoch_of(loader, 1)
    mean, std = torch.tensor(constants).view(2, 3, 1, 1)
    black, light = (torch.isclose(images, (v - mean) / std, atol=1e-5) for v in (0, 1))
    assert (black ^ light).all() and black.any() and light[:, :, 4:-4, 4:-4].all()


@pytest.mark.parametrize("shuffle", [True, False], ids=["training", "evaluation"])
def test_every_image_comes_once_per_epoch_with_its_label(ck, shuffle):
    augment = "crop-flip" if shuffle else "none"
    labels = torch.arange(1030)
    colors = torch.stack([labels % 256, labels // 256, 255 - labels % 256], 1)
    images = colors.to(torch.uint8).view(-1, 3, 1, 1).expand(-1, 3, 32, 32)  # tell which one it is
    for batch_size in (1, 7, 128, 1029, 2000):
        loader = ck.CifarLoader(images, labels, CLASSES, *PLAIN, batch_size, shuffle, augment)
        batches = list(loader)
        assert len(batches) == len(loader) == -(-1030 // batch_size)
        assert all(len(found) == batch_size for _, found in batches[:-1])
        found = torch.cat([labels for _, labels in batches])
        assert torch.equal(found.sort().values, labels)
        assert torch.equal(found, labels) is not shuffle
        for batch, of_batch in batches:
            assert batch.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(pixels(batch[:, :, 16, 16]), colors[of_batch].to(torch.uint8))


def test_an_epoch_repeats_by_seed_and_number_and_no_other_is_like_it(ck):
    images, labels = random_images(300), torch.arange(300)

    def epoch(seed: int, number: int, batch_size: int = 64) -> tuple[Tensor, Tensor]:
        loader = ck.CifarLoader(
            images,
            labels,
            CLASSES,
            *PLAIN,
            batch_size,
            shuffle=True,
            augment="crop-flip",
            seed=seed,
        )
        return epoch_of(loader, number)

    first, state = epoch(0, 1), torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(first, epoch(0, 1, batch_size=7)))
    assert torch.equal(torch.get_rng_state(), state)
    others = [epoch(*key) for key in ((0, 2), (1, 1), (1, 0), (2, 1), (1, 2), (0, 3))]
    for i, (_, order) in enumerate([first, *others]):
        for _, other in others[i:]:
            assert (order == other).float().mean() < 0.05
    back = [found[order.argsort()] for found, order in (first, others[0])]  # the crops differ too
    assert (back[0] == back[1]).flatten(1).all(1).float().mean() < 0.05


def test_each_iteration_is_the_next_epoch_unless_one_is_chosen(ck):
    def loader():
        return ck.CifarLoader(
            random_images(50), torch.arange(50), CLASSES, *PLAIN, shuffle=True, augment="crop-flip"
        )

    chosen = [epoch_of(loader(), epoch) for epoch in (1, 2, 3)]
    mine = loader()
    for _ in range(2):
        for images, labels in chosen:
            ((found, of_found),) = mine  # one batch
            assert torch.equal(found, images) and torch.equal(of_found, labels)
        mine.set_epoch(1)


def test_evaluation_batches_equal_torchvisions(ck, real, cifar10_dir):
    data = real("cifar10")
    to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    transform = v2.Compose([*to_float, v2.Normalize(data.mean, data.std)])
    theirs = torchvision.datasets.CIFAR10(cifar10_dir, train=False, transform=transform)
    assert data.classes == theirs.classes
    start = 0
    for images, labels in ck.CifarLoader(*data[2:7], batch_size=300):
        numbers = range(start, start := start + len(labels))
        assert labels.tolist() == [theirs.targets[i] for i in numbers]
        for i in numbers[::20]:
            torch.testing.assert_close(images[i - numbers[0]], theirs[i][0], atol=2e-6, rtol=2e-6)
    assert start == 10_000


def test_the_ten_views_are_torchvisions(ck):
    images = random_images(5)
    loader = ck.CifarLoader(images, torch.arange(5), CLASSES, *PLAIN, batch_size=3)
    ours = [torch.cat([batch for batch, _ in loader.view(*view)]) for view in ck.TEN_VIEWS]
    theirs = v2.TenCrop(32)(v2.functional.pad(images, [4]))
    ours, theirs = (sorted(map(as_bytes, views)) for views in (map(pixels, ours), theirs))
    assert ours == theirs


@pytest.mark.parametrize("name", SPLITS)
def test_mean_and_std_are_those_of_the_training_images(ck, real, name):
    data = real(name)
    assert data.images.shape == (50_000, 3, 32, 32)
    mean, std = ck.channel_statistics(data.images)
    assert data.mean == pytest.approx(mean, abs=5e-5) and data.std == pytest.approx(std, abs=5e-5)


def test_channel_statistics_are_numpys(ck):
    images = random_images(40) // torch.tensor([1, 2, 3], dtype=torch.uint8).view(3, 1, 1)
    values = images.numpy() / 255
    mean, std = ck.channel_statistics(images)
    assert mean == pytest.approx(values.mean((0, 2, 3)).tolist())
    assert std == pytest.approx(values.std((0, 2, 3)).tolist())
    assert min(ck.channel_statistics(torch.zeros_like(images))[1]) > 0  # it is divided by


# ---- Validation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPLITS)
def test_the_images_held_out_of_cifar_are_those_of_every_published_run(ck, real, name):
    labels = real(name).labels
    mask = ck.validation_split(labels)
    assert labels[mask].bincount().unique().tolist() == [5000 // len(labels.unique())]
    assert hashlib.sha256(np.packbits(mask.numpy()).tobytes()).hexdigest() == SPLITS[name]


def test_each_class_is_held_out_in_proportion_and_keeps_a_training_image(ck):
    def shares(sizes: list[int], val_size: int | None = None) -> list[int]:
        labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        return labels[ck.validation_split(labels, val_size)].bincount(minlength=len(sizes)).tolist()

    assert shares([500, 200, 40, 15, 5], 76) == [50, 20, 4, 2, 0]
    assert shares([500, 200, 40, 15, 5]) == [50, 20, 4, 2, 0]  # a tenth
    assert shares([1, 2, 30], 30) == [0, 1, 29]
    assert shares([1, 1, 1]) == shares([3, 4, 5], 0) == [0, 0, 0]
    for val_size in (31, 50_000, -1):
        with pytest.raises(ck.UserError, match=f"--val-size {val_size}") as error:
            shares([1, 2, 30], val_size)
        assert error.value.exit_code == 2 and "30" in str(error.value)


def test_validation_images_are_the_same_for_every_seed_never_trained_on_nor_augmented(ck, small):
    loaders = [ck.get_cifar_data_loaders(64, small, seed=seed) for seed in (0, 1)]
    (train, validation, test), (other_train, other_validation, _) = loaders
    for one, other in ((validation, other_validation), (train, other_train)):
        assert torch.equal(one.images, other.images)
    assert not torch.equal(epoch_of(train, 1)[1], epoch_of(other_train, 1)[1])
    parts = [set(as_bytes(loader.images)) for loader in (train, validation, test)]
    assert [len(part) for part in parts] == [180, 20, 50]
    assert not parts[0] & parts[1] and not parts[2] & (parts[0] | parts[1])
    whole, nothing, _ = ck.get_cifar_data_loaders(64, small, val_size=0)
    assert nothing is None and parts[0] | parts[1] == set(as_bytes(whole.images))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ck.channel_statistics(whole.images))
    for loader, epoch in ((validation, 1), (validation, 2), (test, 1)):
        images, labels = epoch_of(loader, epoch)
        expected = (loader.images / 255 - mean) / std
        torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(labels, loader.labels)


def test_inputs_0_255_are_pixels_minus_their_mean(ck, small):
    loader = ck.get_cifar_data_loaders(64, small, inputs="0-255")[2]
    images, _ = epoch_of(loader, 1)
    mean = torch.tensor(ck.read_dataset(small).mean).view(3, 1, 1)
    torch.testing.assert_close(images, loader.images - 255 * mean, atol=1e-4, rtol=0)


# ---- cifar10-mini --------------------------------------------------------------------------------


def test_cifar10_mini_is_the_first_500_and_100_images_of_each_class(ck, real):
    data, mini = real("cifar10"), ck.read_dataset("cifar10-mini")
    assert mini.classes == data.classes
    assert (list(mini.mean), list(mini.std)) == (list(data.mean), list(data.std))
    for ours, theirs, count in ((mini[:2], data[:2], 500), (mini[2:4], data[2:4], 100)):
        first = torch.cat([(theirs[1] == label).nonzero()[:count, 0] for label in range(10)])
        assert torch.equal(ours[0], theirs[0][first]) and torch.equal(ours[1], theirs[1][first])


def test_cifar10_mini_is_found_from_anywhere_and_in_data_dir_by_a_notebook(
    ck, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert len(ck.read_dataset("cifar10-mini", "nowhere").labels) == 5000
    pasted = {"__name__": "pasted"}  # and no __file__
    exec(compile(SCRIPT.read_text(), "<cell>", "exec"), pasted)
    flags = ["--dataset", "cifar10-mini", "--data-dir=~/x"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pasted["main"](flags) == 1
    assert re.fullmatch(r"error: .*x/mini.* clone .*\n", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []
    shutil.copytree(ROOT / "data" / "mini", tmp_path / "x" / "mini")
    config, _ = pasted["parse_arguments"](flags)
    assert len(pasted["read_dataset"](config.dataset, config.data_dir).labels) == 5000


# ---- Folders of pictures -------------------------------------------------------------------------


@pytest.fixture
def pictures(small, tmp_path, monkeypatch) -> Path:
    """A folder of two classes with 20 training and 5 test pictures each, found as ~/pictures."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            shutil.copytree(small / part / name, tmp_path / "pictures" / part / name)
    return tmp_path / "pictures"


def test_hidden_files_and_folders_are_no_data_and_other_files_one_note(ck, pictures, capsys):
    def counts() -> tuple[list[int], list[int]]:
        data = ck.read_dataset("~/pictures")
        assert data.classes == ["cat", "dog"]
        return data.labels.bincount().tolist(), data.test_labels.bincount().tolist()

    assert counts() == ([20, 20], [5, 5]) and capsys.readouterr().err == ""
    cat = pictures / "train" / "cat"
    for hidden in (".ipynb_checkpoints/a.png", "._a.png", "__MACOSX/._a.png", ".DS_Store"):
        for folder in (cat, cat.parent):
            (folder / hidden).parent.mkdir(exist_ok=True)
            (folder / hidden).write_bytes(b"no picture")
    assert counts() == ([20, 20], [5, 5]) and capsys.readouterr().err == ""
    for place in (cat, cat.with_name("dog"), cat.parent):
        (place / "Thumbs.db").write_bytes(b"no picture")
    assert counts() == ([20, 20], [5, 5])
    (note,) = re.findall("(?m)^note: .*", "".join(capsys.readouterr()))
    assert note.startswith("note: 3 files")


def test_linked_folders_count_and_pictures_beside_the_classes_are_noted(ck, pictures, capsys):
    cat = pictures / "train" / "cat"
    (cat.rename(pictures / "cats"), cat.symlink_to(pictures / "cats"))
    for part in ("train", "test"):
        shutil.copytree(pictures / part / "dog", pictures / part / "__background__")
    shutil.copy(pictures / "train" / "dog" / "00.png", pictures / "train" / "stray.png")
    data = ck.read_dataset(str(pictures))
    assert data.classes == ["__background__", "cat", "dog"]
    assert data.labels.bincount().tolist() == [20, 20, 20]
    (note,) = re.findall("(?m)^note: .*", "".join(capsys.readouterr()))
    assert note.startswith("note: 1 pictures in") and "train" in note


def test_every_format_that_pillow_opens_counts_in_folders_of_folders_too(ck, pictures):
    folder = pictures / "train" / "cat" / "more"
    folder.mkdir()
    for suffix in ("JPG", "webp", "tga", "ppm", "bmp", "tiff", "gif", "jp2"):
        Image.new("RGB", (50, 40), "red").save(folder / f"a.{suffix}")
    data = ck.read_dataset(str(pictures))
    assert data.labels.bincount().tolist() == [28, 20]
    red, green, blue = data.images.long().unbind(1)
    is_red = ((red > 245) & (green < 10) & (blue < 10)).all(2).all(1)
    assert is_red.sum() == 8 and (data.labels[is_red] == 0).all()


def test_all_unreadable_pictures_are_named_at_once(pictures, tmp_path):
    folders = (pictures / "train" / "cat", pictures / "test" / "dog")
    broken = [folder / f"broken{i}.png" for folder in folders for i in range(2)]
    for path in broken:
        path.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    error = one_line_error(call(*quick_flags(pictures), cwd=tmp_path), 1)
    assert "4 broken" in error and all(str(path) in error for path in broken)
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_is_no_data_set_is_refused_by_name(pictures, tmp_path):
    def error(dataset: Path) -> str:
        return one_line_error(call(*quick_flags(dataset), cwd=tmp_path))

    for empty in (pictures / "train" / "cow", pictures / "test" / "cow" / "more"):
        empty.mkdir(parents=True)  # pictures of cows are to come, or in a format unknown here
    assert "train/cow holds no pictures" in error(pictures)
    (pictures / "train" / "cow").rmdir()
    assert "test/cow holds no pictures" in error(pictures)
    shutil.rmtree(pictures / "test" / "cow")
    for lost in (pictures / "train" / "cow", pictures / "val"):
        lost.symlink_to(tmp_path / "not mounted")
        assert str(lost) in error(pictures)
        lost.unlink()
    more = pictures / "train" / "cat" / "more"
    more.symlink_to(pictures / "test" / "cat")
    assert str(more) in error(pictures)
    more.unlink()
    (pictures / "test" / "dog").rename(pictures / "test" / "fox")
    assert "dog" in error(pictures) and "fox" in error(pictures)
    shutil.rmtree(pictures / "test")
    assert str(pictures / "test") in error(pictures)
    assert "cifar10-mini" in error(tmp_path / "cifar11")


def test_a_rare_class_of_an_uneven_folder_is_trained_on_and_named(ck, pictures, monkeypatch):
    monkeypatch.setattr(ck, "save_plot", lambda *_: True)
    for picture in sorted((pictures / "train" / "dog").iterdir())[1:]:
        picture.unlink()
    train, validation, _ = ck.get_cifar_data_loaders(dataset_name=str(pictures))
    assert train.labels.bincount().tolist() == [18, 1] and validation.labels.tolist() == [0, 0]
    flags = ("--epochs", 1, "--batch-size", 8, "--no-test")
    result = call(*quick_flags(pictures), *flags, cwd=pictures.parent)
    notes = [line for line in result.out.splitlines() if line.startswith("note: no validation")]
    assert result.code == 0 and len(notes) == 1 and "dog" in notes[0] and "cat" not in notes[0]


def test_a_terminal_shows_progress(ck, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    loader = ck.CifarLoader(random_images(20), torch.arange(20), CLASSES, *PLAIN, batch_size=1)
    assert len([*ck.with_progress(loader, "epoch 1/2")]) == 20
    assert [*ck.in_threads(str, [*range(25)], "reading picture")] == [*map(str, range(25))]
    out = capsys.readouterr().out
    assert "epoch 1/2  batch 10/20  " in out and "reading picture 10/25" in out
