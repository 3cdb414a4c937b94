"""Which images a folder, a dataset or a COCO file holds: links, what systems leave, nothing at all, fingerprints."""

import json
import os
import shutil

import pytest

from wsl_d2.duplicates.images import open_images
from wsl_d2.errors import UserError


@pytest.fixture()
def folder(tmp_path, encoded):
    """Makes a folder of files: names of images, or of text."""

    def make(name, *files):
        data = iter(encoded.values())
        for file in files:
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(next(data) if path.suffix.lower() in (".jpg", ".png") else b"text")
        return tmp_path / name

    return make


def keys(images):
    return [key for key, _ in images]


def test_what_systems_and_editors_leave_is_counted(folder):
    left = ["._b.jpg", ".DS_Store", "__MACOSX/b.jpg", "sub/@eaDir/b.jpg", ".ipynb_checkpoints/b.jpg", "Thumbs.db"]
    images = open_images(folder("pre", "b.JPG", "sub/a.jpg", *left, "b.json", "LICENSE"))
    assert keys(images) == ["b.JPG", "sub/a.jpg"]
    assert images.skipped == {
        ".db file": 1,
        ".json file": 1,
        "file without an ending": 1,
        "folder .ipynb_checkpoints": 1,
        "folder @eaDir": 1,
        "folder __MACOSX": 1,
        "hidden file": 2,
    }


@pytest.mark.timeout(60)
def test_a_pipe_is_counted_and_where_it_is_listed_named(folder, tmp_path):
    photos = folder("pre", "a.jpg")
    os.mkfifo(photos / "b.jpg")
    images = open_images(photos)
    assert keys(images) == ["a.jpg"] and images.skipped == {"file that is none": 1}
    (tmp_path / "coco.json").write_text(json.dumps({"images": [{"file_name": "b.jpg"}]}))
    with pytest.raises(OSError, match="not a regular file"):
        keys(open_images(photos, tmp_path / "coco.json"))


def test_links_are_followed_once(folder):
    pre = folder("pre", "sub/a.jpg", "sub/deep/b.jpg")
    linked = folder("linked", "c.jpg")
    (linked / "all").symlink_to(pre)
    (linked / "z").symlink_to(pre / "sub")
    (pre / "loop").symlink_to(linked)
    (pre / "sub" / "up").symlink_to(pre)
    (linked / "d.jpg").symlink_to(pre / "sub" / "a.jpg")
    (linked / "gone.jpg").symlink_to(pre / "nothing.jpg")
    images = open_images(linked)
    assert keys(images) == ["all/sub/a.jpg", "all/sub/deep/b.jpg", "c.jpg", "d.jpg"]
    assert images.skipped == {"broken link": 1, "folder that is linked more than once": 3}
    # a folder's own path names its images, wherever a link to it stands in the alphabet
    assert keys(open_images(pre))[-2:] == ["sub/a.jpg", "sub/deep/b.jpg"]
    (linked / "again").symlink_to(linked)
    assert len(open_images(linked / "again")) == 4


def test_nothing_to_read_is_an_error(folder, tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(UserError, match="b.jpg is no folder"):
        open_images(folder("a", "b.jpg") / "b.jpg")
    with pytest.raises(UserError, match=r"empty holds no image .*skipped: 1 .tar file, 1 hidden file"):
        open_images(folder("empty", ".a.jpg", "shard.tar"))
    (tmp_path / "coco.json").write_text('{"images": []}')
    with pytest.raises(UserError, match="coco.json lists no image"):
        open_images(folder("a"), tmp_path / "coco.json")


def test_another_programs_manifest_makes_no_dataset(folder):
    assert keys(open_images(folder("app", "manifest.json", "a.jpg"))) == ["a.jpg"]


def test_the_fingerprint_is_of_names_and_content(folder, tmp_path):
    images = open_images(folder("pre", "a.jpg", "b.jpg"))
    shutil.copytree(tmp_path / "pre", tmp_path / "moved")
    assert open_images(tmp_path / "moved").fingerprint() == images.fingerprint()
    data = bytearray((tmp_path / "moved" / "a.jpg").read_bytes())
    data[-5] ^= 1
    (tmp_path / "moved" / "a.jpg").write_bytes(data)  # of the same size
    assert open_images(tmp_path / "moved").fingerprint() != images.fingerprint()
    (tmp_path / "pre" / "a.jpg").rename(tmp_path / "pre" / "c.jpg")
    assert open_images(tmp_path / "pre").fingerprint() != images.fingerprint()


def test_a_dataset_is_read_by_number(hashtag_folder):
    images = open_images(hashtag_folder)
    assert len(images) == 48 and images[47][0] == "000047" and images[0][1][:2] == b"\xff\xd8"
    manifest = json.loads((hashtag_folder / "manifest.json").read_text())
    manifest["shards"][1]["sha256"] = "0" * 64
    (hashtag_folder / "manifest.json").write_text(json.dumps(manifest))
    assert open_images(hashtag_folder).fingerprint() != images.fingerprint()


def test_coco(folder, tmp_path):
    annotations, photos = tmp_path / "coco.json", folder("photos", "sub/a.jpg", "b.jpg")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "b.jpg").symlink_to(photos / "b.jpg")
    annotations.write_text(json.dumps({"images": [{"file_name": "b.jpg"}]}))
    assert keys(open_images(tmp_path / "linked", annotations)) == ["b.jpg"]
    for content, message in [
        ({"images": [{"file_name": "sub/../../coco.json"}]}, "file name 'sub/../../coco.json' leads out of"),
        ({"images": [{"file_name": "/etc/passwd"}]}, "leads out of"),
        ({"images": [{"file_name": "b.jpg"}, {"id": 7}]}, "image 2 of the list has no file_name"),
        ({"annotations": []}, "is no COCO annotation file"),
        ([1], "is no COCO annotation file"),
    ]:
        annotations.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            open_images(photos, annotations)
    annotations.write_text("{")
    with pytest.raises(UserError, match="is no COCO annotation file"):
        open_images(photos, annotations)
