"""The loaders: augmentation, evaluation batches, the validation split, and the synthetic data set."""

import json

import numpy as np
import pytest
import torch
import torchvision
from conftest import run
from torch import Tensor, nn
from torchvision.transforms import v2

PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}  # a loader with them yields pixels in 0..1
CLASSES = [str(label) for label in range(10)]


@pytest.fixture
def small(ck, monkeypatch):
    """The loaders of a small synthetic data set."""
    monkeypatch.setattr(ck, "SYNTHETIC_COUNTS", (600, 200))
    return lambda **options: ck.get_cifar_data_loaders(dataset_name="synthetic", **{"val_size": 100, **options})


@pytest.fixture(scope="module")
def cifar10(ck, cifar10_dir):
    return ck.get_cifar_data_loaders(dataset_name="cifar10", data_dir=cifar10_dir)


@pytest.fixture(scope="module")
def cifar100(ck, cifar100_dir):
    return ck.get_cifar_data_loaders(dataset_name="cifar100", data_dir=cifar100_dir)


def random_images(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def numbered_images(count: int) -> Tensor:
    """Images of one colour, which says which one it is: also in the middle, where no crop reaches the border."""
    number = torch.arange(count)
    colours = torch.stack([number % 256, number // 256, 255 - number % 256], 1)
    return colours.view(-1, 3, 1, 1).expand(-1, 3, 32, 32).to(torch.uint8)


def pixels(images: Tensor) -> Tensor:
    """The uint8 pixels of a PLAIN loader's batch."""
    return (images * 255).round().to(torch.uint8)


def identities(images: Tensor) -> Tensor:
    """Which of the numbered images they are."""
    centre = pixels(images)[:, :, 16, 16].long()
    assert (centre[:, 0] + centre[:, 2] == 255).all()
    return centre[:, 0] + 256 * centre[:, 1]


def epoch_of(loader, epoch: int) -> tuple[Tensor, Tensor]:
    """All images and labels of one epoch, in their order."""
    loader.set_epoch(epoch)
    return tuple(torch.cat(parts) for parts in zip(*loader))


def as_bytes(images: Tensor) -> list[bytes]:
    return [image.contiguous().numpy().tobytes() for image in images]


def outcomes(image: Tensor) -> dict[bytes, int]:
    """Everything that Pad(4), RandomCrop(32), RandomHorizontalFlip can make of an image, numbered."""
    padded = v2.functional.pad(image, [4])
    assert padded.shape[-2:] == (40, 40)
    crops = [v2.functional.crop(padded, y, x, 32, 32) for y in range(9) for x in range(9)]
    views = torch.stack([*crops, *(v2.functional.horizontal_flip(crop) for crop in crops)])
    numbers = {content: number for number, content in enumerate(as_bytes(views))}
    assert len(numbers) == 162
    return numbers


def chi_square_p(counts: np.ndarray) -> float:
    """The p-value of counts under evenness, by the approximation of Wilson and Hilferty (1931)."""
    freedom, expected = counts.size - 1, counts.sum() / counts.size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    variance = 2 / (9 * freedom)
    z = ((chi_square / freedom) ** (1 / 3) - (1 - variance)) / variance**0.5
    return float(torch.special.erfc(torch.tensor(z / 2**0.5)) / 2)


# ----------------------------------------------------------------------------------------------------------------------
# Augmentation
# ----------------------------------------------------------------------------------------------------------------------


def test_the_chi_square_test_accepts_even_dice_and_refuses_loaded_ones():
    generator = np.random.RandomState(0)
    even = [chi_square_p(np.bincount(generator.randint(0, 162, 32_400), minlength=162)) for _ in range(400)]
    assert 0.02 < np.mean(np.array(even) < 0.05) < 0.09  # the p-values are even themselves
    loaded = np.bincount(generator.randint(0, 162, 32_400) // 2 * 2, minlength=162)
    slightly = np.bincount(np.minimum(generator.randint(0, 165, 32_400), 161), minlength=162)
    assert chi_square_p(loaded) < 1e-9
    assert chi_square_p(slightly) < 1e-9


def test_torchvision_makes_the_outcomes_that_the_loader_is_compared_with():
    (image,) = random_images(1)
    transform = v2.Compose([v2.Pad(4), v2.RandomCrop(32), v2.RandomHorizontalFlip()])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        views = torch.stack([transform(image) for _ in range(2000)])
    assert set(as_bytes(views)) == set(outcomes(image))


def test_every_crop_and_flip_is_one_of_torchvisions_and_all_162_occur_evenly(ck):
    (image,) = random_images(1)
    numbers, count, epochs = outcomes(image), 16_200, 4
    images, labels = image.expand(count, 3, 32, 32), torch.arange(count)
    loader = ck.CifarLoader(images, labels, CLASSES, **PLAIN, augment=True, seed=7)
    seen = np.zeros((epochs, 162), np.int64)
    together = np.zeros((162, 162), np.int64)  # neighbours in the batch, which must not share their draw
    for epoch in range(epochs):
        drawn = [numbers[content] for content in as_bytes(pixels(epoch_of(loader, epoch + 1)[0]))]
        seen[epoch] = np.bincount(drawn, minlength=162)
        np.add.at(together, (drawn[0::2], drawn[1::2]), 1)
    assert all(chi_square_p(counts) > 0.001 for counts in seen)
    assert chi_square_p(seen.sum(0)) > 0.001
    positions = together.reshape(2, 9, 9, 2, 9, 9)
    for axes in ((1, 2, 4, 5), (0, 2, 3, 5), (0, 1, 3, 4)):  # mirrored, top edge, left edge: each against each
        assert chi_square_p(positions.sum(axes)) > 0.001


def test_an_image_is_cropped_otherwise_in_each_epoch(ck):
    count, epochs = 4000, 2
    (image,) = random_images(1)
    numbers = outcomes(image)
    loader = ck.CifarLoader(
        image.expand(count, 3, 32, 32), torch.arange(count), CLASSES, **PLAIN, augment=True, batch_size=500
    )
    drawn = np.zeros((epochs, count), np.int64)
    for epoch in range(epochs):
        images, labels = epoch_of(loader, epoch + 1)
        drawn[epoch, labels] = [numbers[content] for content in as_bytes(pixels(images))]
    same_outcome, same_flip = (drawn[0] == drawn[1]).mean(), (drawn[0] // 81 == drawn[1] // 81).mean()
    assert same_outcome < 0.02  # 1/162 by chance
    assert 0.46 < same_flip < 0.54


def test_padding_is_black_before_normalisation(ck):
    white, mean, std = torch.full((400, 3, 32, 32), 255, dtype=torch.uint8), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    loader = ck.CifarLoader(white, torch.zeros(400, dtype=torch.int64), CLASSES, mean, std, augment=True)
    images, _ = epoch_of(loader, 1)
    for channel in range(3):
        black, light = ((value - mean[channel]) / std[channel] for value in (0, 1))
        is_black = torch.isclose(images[:, channel], torch.tensor(black), atol=1e-5)
        is_light = torch.isclose(images[:, channel], torch.tensor(light), atol=1e-5)
        assert (is_black ^ is_light).all()
        assert is_black.any() and is_light[:, 4:-4, 4:-4].all()


# ----------------------------------------------------------------------------------------------------------------------
# Epochs and batches
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 128, 513, 1023, 1024])
def test_every_image_once_per_epoch_with_its_label(ck, batch_size, augment):
    count = 1030
    loader = ck.CifarLoader(
        numbered_images(count), torch.arange(count), CLASSES, **PLAIN, batch_size=batch_size, augment=augment
    )
    batches = list(loader)
    sizes = [len(labels) for _, labels in batches]
    assert len(loader) == len(batches)
    assert sizes[:-1] == [batch_size] * (len(batches) - 1) and 0 < sizes[-1] <= batch_size
    labels = torch.cat([labels for _, labels in batches])
    assert labels.dtype == torch.int64
    assert torch.equal(labels.sort().values, torch.arange(count))
    assert torch.equal(torch.cat([identities(images) for images, _ in batches]), labels)
    assert augment or torch.equal(labels, torch.arange(count))


def test_batches_are_float32_in_channels_last(ck):
    for augment in (True, False):
        loader = ck.CifarLoader(random_images(20), torch.arange(20), CLASSES, **PLAIN, batch_size=8, augment=augment)
        for images, _ in loader:
            assert images.dtype == torch.float32 and images.shape[1:] == (3, 32, 32)
            assert images.is_contiguous(memory_format=torch.channels_last)


def test_an_epoch_repeats_by_seed_and_number_and_no_other_is_like_it(ck):
    def epoch(seed: int, number: int) -> tuple[Tensor, Tensor]:
        loader = ck.CifarLoader(
            random_images(300), torch.arange(300), CLASSES, **PLAIN, augment=True, seed=seed, batch_size=64
        )
        return epoch_of(loader, number)

    first = epoch(0, 1)
    torch.manual_seed(99)
    np.random.seed(99)
    assert all(torch.equal(a, b) for a, b in zip(first, epoch(0, 1)))
    others = [epoch(seed, number)[1] for seed, number in ((0, 2), (1, 1), (1, 0), (2, 1), (1, 2), (0, 3))]
    for i, order in enumerate([first[1], *others]):
        for other in others[i:]:
            assert (order == other).float().mean() < 0.05


def test_iterating_again_without_a_new_epoch_repeats_it(ck):
    loader = ck.CifarLoader(random_images(100), torch.arange(100), CLASSES, **PLAIN, augment=True)
    first = epoch_of(loader, 5)
    again = (torch.cat(parts) for parts in zip(*loader))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_batch_size_does_not_change_order_and_augmentation(ck):
    whole, parts = (
        ck.CifarLoader(random_images(100), torch.arange(100), CLASSES, **PLAIN, augment=True, batch_size=size)
        for size in (100, 9)
    )
    assert all(torch.equal(a, b) for a, b in zip(epoch_of(whole, 3), epoch_of(parts, 3)))


def test_loading_leaves_the_images_and_the_global_random_state_alone(ck):
    images = random_images(50)
    before, state = images.clone(), torch.get_rng_state()
    loader = ck.CifarLoader(images, torch.arange(50), CLASSES, **PLAIN, augment=True)
    for batch, _ in loader:
        batch.zero_()
    assert torch.equal(images, before) and torch.equal(loader.images, before)
    assert torch.equal(torch.get_rng_state(), state)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------------------


def test_evaluation_batches_are_torchvisions_on_real_cifar10(ck, cifar10, cifar10_dir):
    _, _, mean, std = ck.SOURCES["cifar10"]
    transform = torchvision.transforms.Compose(
        [torchvision.transforms.ToTensor(), torchvision.transforms.Normalize(mean, std)]
    )
    theirs = torchvision.datasets.CIFAR10(cifar10_dir, train=False, transform=transform)
    index = 0
    for images, labels in cifar10[2]:
        expected = [theirs[i] for i in range(index, index + len(labels))]
        torch.testing.assert_close(images, torch.stack([image for image, _ in expected]), atol=2e-6, rtol=2e-6)
        assert labels.tolist() == [label for _, label in expected]
        index += len(labels)
    assert index == 10_000
    assert cifar10[2].classes == theirs.classes


def test_ten_views_are_the_centre_and_the_corners_also_mirrored(ck):
    images = random_images(5)
    loader = ck.CifarLoader(images, torch.arange(5), CLASSES, **PLAIN, batch_size=3)
    ours = [pixels(torch.cat([batch for batch, _ in loader.view(*view)])) for view in ck.TEN_VIEWS]
    theirs = v2.TenCrop(32)(v2.functional.pad(images, [4]))
    assert len(ours) == 10
    assert {as_bytes(view)[0] for view in ours} == {as_bytes(view)[0] for view in theirs}
    assert {tuple(as_bytes(view)) for view in ours} == {tuple(as_bytes(view)) for view in theirs}


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_mean_and_deviation_are_those_of_the_training_images(ck, name, request):
    folder, (reader, _, mean, std) = request.getfixturevalue(f"{name}_dir"), ck.SOURCES[name]
    data = getattr(torchvision.datasets, reader)(folder, train=True).data
    assert data.shape == (50_000, 32, 32, 3)
    for channel in range(3):
        values = np.ascontiguousarray(data[..., channel])
        assert values.mean(dtype=np.float64) / 255 == pytest.approx(mean[channel], abs=0.00005)
        assert values.std(dtype=np.float64) / 255 == pytest.approx(std[channel], abs=0.00005)


def test_channel_statistics_are_numpys(ck):
    images = random_images(40) // torch.tensor([1, 2, 3], dtype=torch.uint8).view(3, 1, 1)
    mean, std = ck.channel_statistics(images)
    values = images.numpy() / 255
    assert mean == pytest.approx(values.mean((0, 2, 3)).tolist())
    assert std == pytest.approx(values.std((0, 2, 3)).tolist())


# ----------------------------------------------------------------------------------------------------------------------
# Validation
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("val_size", [0, 1, 7, 10, 33, 100, 499, 999])
def test_the_split_is_balanced_also_where_the_classes_do_not_divide_it(ck, val_size):
    labels = torch.arange(1000) % 10
    mask = ck.validation_split(labels, val_size)
    per_class = torch.bincount(labels[mask], minlength=10)
    assert mask.dtype == torch.bool and per_class.sum() == val_size
    assert per_class.max() - per_class.min() <= 1


def test_the_split_is_balanced_as_far_as_uneven_classes_allow(ck):
    labels = torch.cat([torch.zeros(3), torch.ones(50), torch.full((50,), 2)]).long()
    assert torch.bincount(labels[ck.validation_split(labels, 43)]).tolist() == [3, 20, 20]


def test_the_split_is_the_same_for_ever(ck):
    mask = ck.validation_split(torch.arange(1000) % 10, 20)
    assert mask.nonzero().flatten().tolist() == [
        16,
        50,
        87,
        113,
        161,
        166,
        237,
        251,
        262,
        304,
        329,
        400,
        474,
        498,
        518,
        595,
        599,
        735,
        763,
        932,
    ]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_real_data_is_split_into_45000_and_5000_and_10000(name, request):
    train, validation, test = request.getfixturevalue(name)
    assert [len(loader.labels) for loader in (train, validation, test)] == [45_000, 5_000, 10_000]
    per_class = torch.bincount(validation.labels)
    assert per_class.tolist() == [5000 // len(train.classes)] * len(train.classes)


def test_validation_images_are_never_trained_on(ck, small):
    train, validation, test = small()
    (all_train, _, _) = small(val_size=0)
    parts = [set(as_bytes(loader.images)) for loader in (train, validation, test)]
    assert [len(part) for part in parts] == [500, 100, 200]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert parts[0] | parts[1] == set(as_bytes(all_train.images))


def test_the_split_does_not_depend_on_the_seed(ck, small):
    (train, validation, _), (other_train, other_validation, _) = small(seed=0), small(seed=1, batch_size=64)
    assert torch.equal(validation.images, other_validation.images)
    assert torch.equal(validation.labels, other_validation.labels)
    assert torch.equal(train.images, other_train.images)
    assert not torch.equal(epoch_of(train, 1)[1], epoch_of(other_train, 1)[1])


def test_validation_and_test_images_are_never_augmented(ck, small):
    for loader in small()[1:]:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (loader.mean, loader.std))
        for epoch in (1, 2):
            images, labels = epoch_of(loader, epoch)
            torch.testing.assert_close(images, (loader.images / 255 - mean) / std, atol=1e-5, rtol=1e-5)
            assert torch.equal(labels, loader.labels)


def test_training_images_are_augmented_with_the_batch_size_and_the_seed_asked_for(ck, small):
    train, _, _ = small(batch_size=77, seed=3)
    assert (train.augment, train.batch_size, train.seed) == (True, 77, 3)


def test_without_validation_all_images_are_trained_on(ck, small):
    train, validation, _ = small(val_size=0)
    assert validation is None
    assert len(train.labels) == 600


@pytest.mark.parametrize("val_size", [600, 601, 50_000])
def test_a_validation_set_that_leaves_nothing_is_refused(ck, small, val_size):
    with pytest.raises(ck.Problem, match=f"--val-size {val_size}"):
        small(val_size=val_size)


def test_a_validation_set_that_leaves_one_image_is_not(ck, small):
    train, validation, _ = small(val_size=599)
    assert (len(train.labels), len(validation.labels)) == (1, 599)


# ----------------------------------------------------------------------------------------------------------------------
# Synthetic
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def synthetic(ck):
    """The training and the test part, with images in 0..1 as rows, less their mean."""
    parts = []
    for seed, count in enumerate(ck.SYNTHETIC_COUNTS, start=1):
        images, labels = ck.draw_shapes(count, seed)
        parts.append((images.flatten(1).float() / 255, labels))
    mean = parts[0][0].mean(0)
    return [(pixels - mean, labels) for pixels, labels in parts]


def test_synthetic_classes_are_even(ck, synthetic):
    for (_, labels), count in zip(synthetic, (50_000, 2_000), strict=True):
        assert torch.bincount(labels).tolist() == [count // 10] * 10
    assert len(set(ck.SHAPE_CLASSES)) == 10


def test_synthetic_is_always_the_same(ck):
    torch.manual_seed(1)
    first = ck.draw_shapes(1500, 1)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(first, ck.draw_shapes(1500, 1)))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first[0], ck.draw_shapes(1500, 2)[0])


def test_synthetic_images_are_all_different(ck, small):
    train, _, test = small(val_size=0)
    assert train.images.dtype == torch.uint8 and train.images.shape[1:] == (3, 32, 32)
    assert len(set(as_bytes(torch.cat([train.images, test.images])))) == 800


def test_a_linear_classifier_cannot_solve_synthetic(synthetic):
    (images, labels), (test_images, test_labels) = synthetic
    best_test, best_train = 0.0, 0.0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classify = nn.Linear(images.size(1), 10)
        optimizer = torch.optim.Adam(classify.parameters(), 1e-3)
        for _ in range(10):
            for index in torch.randperm(len(labels)).split(500):
                optimizer.zero_grad()
                nn.functional.cross_entropy(classify(images[index]), labels[index]).backward()
                optimizer.step()
            with torch.no_grad():
                best_train = max(best_train, (classify(images).argmax(1) == labels).float().mean().item())
                best_test = max(best_test, (classify(test_images).argmax(1) == test_labels).float().mean().item())
    assert best_train > 0.4  # it did learn what a linear classifier can
    assert best_test < 0.6


def test_the_network_passes_90_percent_on_synthetic_within_two_epochs(tmp_path):
    result = run(
        *("--dataset", "synthetic", "--epochs", "2", "--output-dir", "out"),
        cwd=tmp_path,
        small=False,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["test_error"] < 10
