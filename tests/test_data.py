"""The digits: what is in the file, how it is cut, how batches are drawn, and what the shifted domain is."""

from __future__ import annotations

import numpy as np
import pytest

import minipeft
from minipeft.data import digits, make_digits

# --- the file ---------------------------------------------------------------------------------------------------------


def test_there_are_1797_images_of_8_by_8_pixels_between_0_and_1():
    data = digits.load()
    assert data.images.shape == (1797, 64)
    assert data.images.dtype == np.float32
    assert data.images.min() == 0
    assert data.images.max() == 1
    assert np.array_equal(data.images * 16, np.round(data.images * 16))  # counts of 0 to 16 pixels


def test_the_classes_are_the_ten_digits_as_often_as_in_the_uci_file():
    counts = np.bincount(digits.load().labels)
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_images_come_in_the_dtype_asked_for_else_in_the_default():
    assert digits.load("float64").images.dtype == np.float64
    minipeft.set_default_dtype("float64")
    try:
        assert digits.load().train.x.dtype == np.float64
        assert digits.transfer().test.x.dtype == np.float64
    finally:
        minipeft.set_default_dtype("float32")


def test_the_file_holds_numbers_only_and_is_small():
    with np.load(digits.FILE, allow_pickle=False) as file:
        assert {name: (file[name].shape, file[name].dtype.name) for name in file.files} == {
            "images": ((1797, 8, 8), "uint8"),
            "labels": ((1797,), "uint8"),
            "order": ((1797,), "uint16"),
        }
    assert digits.FILE.stat().st_size < 50_000


def test_the_file_is_what_its_command_makes(tmp_path):
    pytest.importorskip("sklearn")
    made = tmp_path / "digits.npz"
    made.write_bytes(make_digits.make())
    with np.load(digits.FILE) as kept, np.load(made) as new:
        assert all(np.array_equal(kept[name], new[name]) for name in kept.files)


# --- the parts --------------------------------------------------------------------------------------------------------


def test_the_parts_are_disjoint_and_cover_everything():
    rows = np.concatenate(list(digits.load().index.values()))
    assert np.array_equal(np.sort(rows), np.arange(1797))


@pytest.mark.parametrize(("part", "size"), digits.PARTS.items())
def test_every_part_has_its_size_and_all_ten_digits(part, size):
    data = digits.load()
    x, y = getattr(data, part)
    assert x.shape == (size, 64)
    assert y.shape == (size,)
    assert set(y) == set(range(10))
    assert np.array_equal(x, data.part(part).x)


def test_an_unknown_part_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match="part: got 'training'; accepted are 'pretrain', 'train', 'valid', 'test'"):
        digits.load().part("training")


# --- batches ----------------------------------------------------------------------------------------------------------

X, Y = np.arange(10.0)[:, None], np.arange(10)


def test_a_batch_is_a_function_of_seed_and_step_alone():
    forwards = digits.batches(X, Y, batch_size=4, seed=3)
    wanted = [forwards[step][1] for step in range(20)]
    afresh = digits.batches(X, Y, batch_size=4, seed=3)
    for step in np.random.default_rng(0).permutation(20):
        assert np.array_equal(afresh[int(step)][1], wanted[step])


def test_inputs_and_targets_of_a_batch_belong_together():
    x, y = digits.batches(X, Y, batch_size=7)[5]
    assert x.shape == (7, 1)
    assert np.array_equal(x[:, 0], y)


@pytest.mark.parametrize("batch_size", [1, 3, 10, 25])
def test_every_epoch_has_each_sample_once_also_where_batches_cross_its_end(batch_size):
    batches = digits.batches(X, Y, batch_size=batch_size)
    stream = np.concatenate([batches[step][1] for step in range(60 // batch_size + 1)])
    for epoch in range(6):
        assert sorted(stream[10 * epoch : 10 * epoch + 10]) == list(range(10))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [digits.batches(X, Y, batch_size=10, seed=seed)[epoch][1] for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_iterating_gives_what_indexing_gives():
    batches = digits.batches(X, Y, batch_size=4)
    for step, (_, y) in zip(range(8), batches, strict=False):
        assert np.array_equal(y, batches[step][1])


def test_batches_of_arrays_on_a_device_stay_there(xp):
    x, y = digits.batches(xp.asarray(X), xp.asarray(Y), batch_size=4)[1]
    assert type(x) is type(y) is type(xp.asarray(X))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, Y[:9], 4), "x, y: got 10 and 9 samples; the same number, at least 1, is accepted"),
        ((X[:0], Y[:0], 4), "x, y: got 0 and 0 samples"),
        ((X, Y, 0), "batch_size: got 0; at least 1 is accepted"),
    ],
)
def test_what_cannot_be_batched_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        digits.batches(*arguments)


def test_there_is_no_batch_before_the_first():
    with pytest.raises(IndexError, match="step: got -1; 0 or more is accepted"):
        digits.batches(X, Y, 4)[-1]


# --- the transfer task ------------------------------------------------------------------------------------------------


def test_the_task_is_the_shifted_train_valid_and_test_parts_with_their_labels():
    data, task = digits.load(), digits.transfer()
    for part in ("train", "valid", "test"):
        upright, shifted = data.part(part), getattr(task, part)
        assert np.array_equal(shifted.y, upright.y)
        assert np.array_equal(shifted.x.reshape(-1, 8, 8), digits.SHIFTS[task.name](upright.x.reshape(-1, 8, 8)))
    assert np.array_equal(task.original_test.x, data.test.x)


def test_rotated_is_a_quarter_turn_counter_clockwise():
    image = np.arange(64.0).reshape(1, 8, 8)
    turned = digits.SHIFTS["rotated"](image)
    assert turned[0, 0, 0] == image[0, 0, 7]  # the upper right corner goes to the upper left
    assert turned[0, 7, 0] == image[0, 0, 0]  # and that one to the lower left


@pytest.mark.parametrize("shift", digits.SHIFTS)
def test_a_shift_loses_nothing(shift):
    times = 4 if shift == "rotated" else 2  # a quarter turn, a mirror or a negative, done again until it is undone
    images = original = digits.load().images.reshape(-1, 8, 8)
    for _ in range(times):
        assert images is original or not np.array_equal(images, original)
        images = digits.SHIFTS[shift](images)
    assert np.array_equal(images, original)


@pytest.mark.parametrize("shift", digits.SHIFTS)
def test_shifted_images_are_rows_of_numbers_between_0_and_1(shift):
    x = digits.transfer(shift).train.x
    assert x.shape == (400, 64)
    assert x.dtype == np.float32
    assert x.flags.c_contiguous
    assert (x.min(), x.max()) == (0, 1)


def test_an_unknown_shift_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match="shift: got 'upside-down'; accepted are 'rotated', 'mirrored', 'inverted'"):
        digits.transfer("upside-down")
