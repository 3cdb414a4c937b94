"""Datasets in an object store: made, indexed, verified and read as those of a folder; damaged copies in its cache."""

import fsspec
import pytest
from toy_data import TOY_HASHTAGS, jpeg

from wsl_d2.data import HashtagDataset, ShardError, index_shards, make_shards
from wsl_d2.data.write.verify import verify_dataset
from wsl_d2.files import CACHE_VARIABLE


@pytest.fixture
def posts(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr("wsl_d2.data.remote.FIRST_WAIT", 0.0)
    (tmp_path / "photos").mkdir()
    for i in range(6):
        (tmp_path / "photos" / f"p{i}.jpg").write_bytes(jpeg(i, (32, 32)))
    rows = [f'{{"key": "p{i}", "hashtags": ["{TOY_HASHTAGS[0]}"]}}\n' for i in range(7)]
    (tmp_path / "posts.jsonl").write_text("".join(rows))
    return [str(tmp_path / "posts.jsonl")], str(tmp_path / "photos" / "{key}.jpg")


@pytest.fixture
def bucket():
    """A store in the memory of this process."""
    yield "memory://bucket/train"
    fsspec.filesystem("memory").rm("bucket", recursive=True)


def content(files, folder):
    return {name.rpartition("/")[2]: files.cat_file(name) for name in files.ls(folder, detail=False)}


def test_a_store_gets_the_bytes_that_a_folder_gets(posts, bucket, toy_vocabulary, tmp_path):
    files = fsspec.filesystem("memory")
    make_shards(*posts, toy_vocabulary, tmp_path / "d", images_per_shard=3)
    manifest = make_shards(*posts, toy_vocabulary, bucket, images_per_shard=3)
    assert manifest["account"] == {"no image": 1, "rows": 7, "written": 6}
    made = content(files, bucket)
    assert made == {path.name: path.read_bytes() for path in (tmp_path / "d").iterdir() if path.name[0] != "."}
    files.rm_file(f"{bucket}/shard-000001.labels.npz")  # as if the call was interrupted there
    assert make_shards(*posts, toy_vocabulary, bucket, images_per_shard=3) == manifest
    assert content(files, bucket) == made
    with pytest.raises(ShardError, match=f"{bucket} is the place of another dataset"):
        make_shards(*posts, toy_vocabulary, bucket, images_per_shard=2)


def test_tars_of_a_store_are_indexed_and_verified(posts, bucket, toy_vocabulary, tmp_path):
    files = fsspec.filesystem("memory")
    make_shards(*posts, toy_vocabulary, tmp_path / "d", images_per_shard=3)
    for path in (tmp_path / "d").glob("*.tar"):
        files.pipe_file(f"{bucket}/{path.name}", path.read_bytes())
    assert index_shards(bucket, toy_vocabulary)["num_images"] == 6
    assert [report.problem for report in verify_dataset(bucket, tmp_path / "report")] == ["", "", ""]
    altered = bytearray(files.cat_file(f"{bucket}/shard-000001.tar"))
    altered[2000] ^= 1
    files.pipe_file(f"{bucket}/shard-000001.tar", bytes(altered))
    files.rm_file(f"{bucket}/shard-000002.tar")
    found = {report.name: report.problem for report in verify_dataset(bucket, tmp_path / "report")}
    assert found == {"shard-000000.tar": "", "shard-000001.tar": "altered", "shard-000002.tar": "missing"}
    with pytest.raises(ShardError, match=f"1 of 3 shards cannot be used: {bucket}/shard-000002.tar is missing"):
        HashtagDataset(bucket).check_shards()


@pytest.mark.parametrize("name", ["shard-000000.tar", "shard-000000.index.npz", "shard-000000.labels.npz"])
@pytest.mark.parametrize("damage", ["altered", "truncated"])
def test_a_damaged_copy_in_the_cache_is_copied_again(posts, bucket, toy_vocabulary, name, damage):
    make_shards(*posts, toy_vocabulary, bucket, images_per_shard=3)
    dataset = HashtagDataset(bucket)
    whole = [dataset[i]["image"] for i in range(3)]
    path = dataset.folder / name
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data if damage == "altered" else data[:900])
    again = HashtagDataset(bucket)
    assert [again[i]["image"] for i in range(3)] == whole


def test_indexes_and_labels_count_in_the_cache(posts, bucket, toy_vocabulary):
    make_shards(*posts, toy_vocabulary, bucket, images_per_shard=1)
    dataset = HashtagDataset(bucket)
    sizes = [path.stat().st_size for path in dataset.folder.glob("shard-*") if path.suffix in (".tar", ".npz")]
    dataset.store.cache_bytes = limit = sum(sizes) + 1
    for image in range(6):
        dataset[image]
    kept = [path.stat().st_size for path in dataset.folder.glob("shard-*") if path.suffix in (".tar", ".npz")]
    assert sum(kept) <= limit


def test_links_to_tars_that_are_elsewhere_are_noticed(posts, toy_vocabulary, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "shard-000000.tar").symlink_to(tmp_path / "elsewhere.tar")
    with pytest.raises(ShardError, match="taken holds shard-000000.tar, which is of another dataset"):
        make_shards(*posts, toy_vocabulary, tmp_path / "taken")
    with pytest.raises(ShardError, match="1 of 1 tars cannot be used: .*taken/shard-000000.tar"):
        index_shards(tmp_path / "taken", toy_vocabulary)
