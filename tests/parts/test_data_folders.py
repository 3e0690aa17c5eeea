"""Images from a tree of files."""

from pathlib import Path

import numpy as np
import pytest

from fastmerge.data.trees import find_trees, load_folder

Image = pytest.importorskip("PIL.Image")


def write(path, colour, size=(9, 6), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def tree(tmp_path):
    write(tmp_path / "train" / "cat" / "1.png", (255, 0, 0))
    write(tmp_path / "train" / "cat" / "deep" / "2.JPEG", (250, 0, 0), (64, 64))
    write(tmp_path / "train" / "ant" / "1.png", 100, mode="L")
    write(tmp_path / "val" / "cat" / "1.png", (0, 255, 0, 128), mode="RGBA")
    write(tmp_path / "val" / "ant" / "1.png", 100, mode="L")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train-notes.tar").write_bytes(b"mine")  # beside the tree, and none of it
    return tmp_path


def test_a_tree_becomes_arrays(tree):
    loaded = load_folder(tree, 4)
    assert loaded.train_images.shape == (3, 4, 4, 3)
    assert loaded.train_labels.tolist() == [0, 1, 1]  # ant before cat
    assert loaded.test_labels.tolist() == [0, 1]
    assert (loaded.train_images[0] == 100).all()
    assert (loaded.train_images[1] == (255, 0, 0)).all()
    assert abs(loaded.train_images[2].astype(int) - (250, 0, 0)).max() <= 3  # JPEG
    assert (loaded.test_images[1] == (0, 255, 0)).all()


def test_resizing_averages_over_all_pixels(tmp_path):
    board = np.indices((64, 64)).sum(0) % 2 * 255
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(board.astype(np.uint8)).save(tmp_path / split / "a" / "1.png")
    assert abs(load_folder(tmp_path, 8).train_images.astype(int) - 127).max() <= 10


def test_images_stay_the_right_way_round(tmp_path):
    corner = np.zeros((8, 8, 3), np.uint8)
    corner[:4, 4:, 2] = 200
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(corner).save(tmp_path / split / "a" / "1.png")
    assert np.array_equal(load_folder(tmp_path, 8).train_images[0], corner)


def test_what_is_missing_is_named(tmp_path, tree):
    with pytest.raises(FileNotFoundError, match=r"no directory .*nowhere"):
        load_folder(tmp_path / "nowhere", 4)
    with pytest.raises(FileNotFoundError, match=r"no .*cat.train"):
        load_folder(tree / "train" / "cat", 4)
    write(tree / "val" / "dog" / "1.png", 0)
    with pytest.raises(ValueError, match=r"the classes of .*train and .*val differ: dog in only one of them"):
        load_folder(tree, 4)


def test_links_are_followed_and_lead_round_no_circle(tree):
    (tree / "train" / "cat" / "back").symlink_to(tree / "train" / "cat")
    (tree / "train" / "cat" / "up").symlink_to(tree / "train")  # whose images are of other classes, too
    (tree / "train" / "ant" / "elsewhere").symlink_to(tree / "val" / "ant")
    (tree / "train" / "cat" / "folder.png").mkdir()  # named as what it is not
    (tree / "train" / "cat" / "._1.png").write_bytes(b"what another system leaves beside a file")
    train, val = find_trees(tree)
    names = [str(Path(file).relative_to(tree / "train")) for file in train.files]
    assert names == ["ant/1.png", "ant/elsewhere/1.png", "cat/1.png", "cat/deep/2.JPEG"]
    assert len(val.files) == 2


def test_empty_folders_are_refused(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match="no class folders"):
        load_folder(tmp_path, 4)
    (tmp_path / "train" / "a").mkdir()
    (tmp_path / "val" / "a").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        load_folder(tmp_path, 4)


def test_a_broken_image_is_named(tree):
    (tree / "train" / "cat" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(ValueError, match=r"3.png can't be read as an image"):
        load_folder(tree, 4)
