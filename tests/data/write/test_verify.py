"""1,000 damaged images and 50 damaged shards of a dozen kinds: every one is found, named and counted."""

import json
import shutil
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from toy_data import TOY_HASHTAGS, jpeg, write_hashtag_folder

from wsl_d2.data import HashtagDataset, ShardError, finish_dataset, index_shard, write_shard
from wsl_d2.data.format.index import index_path, read_index
from wsl_d2.data.format.labels import labels_path, read_labels, write_labels
from wsl_d2.data.read.mapper import HashtagMapper
from wsl_d2.data.write.verify import summarize, verify_dataset
from wsl_d2.hashtags import Vocabulary, load_wordnet

ROOT = Path(__file__).resolve().parents[3]
HEADER = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
PNG_BOMB = b"\x89PNG\r\n\x1a\n\0\0\0\r" + HEADER + zlib.crc32(HEADER).to_bytes(4, "big") + b"\0\0\0\0IDAT"
GOOD = jpeg(0, (64, 64))

IMAGE_DAMAGE = {  # -> bytes, reason
    "empty": (b"", "empty"),
    "page": (b"<!doctype html><title>404</title>", "unknown format"),
    "gif": (b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", "unknown format"),
    "zeros": (bytes(500), "unknown format"),
    "half": (GOOD[: len(GOOD) // 2], "truncated"),
    "header": (GOOD[:30], "truncated"),
    "tail": (GOOD[:-30], "truncated"),
    "bomb": (PNG_BOMB, "too large"),
}


def write(folder, vocabulary, samples_per_shard):
    folder.mkdir()
    vocabulary.save(folder / "vocabulary.json")
    for number, samples in enumerate(samples_per_shard):
        path = folder / f"shard-{number:06d}.tar"
        write_shard(path, [(key, data, {"hashtags": TOY_HASHTAGS[:1]}) for key, data in samples])
        index_shard(path, vocabulary)
    finish_dataset(folder, vocabulary)
    return folder


def verify(folder, *flags):
    command = [sys.executable, "-m", "wsl_d2", "data", "verify", str(folder), "--workers", "2", *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_a_thousand_damaged_images_are_counted_by_kind_and_never_replaced_in_silence(tmp_path, toy_vocabulary):
    kinds = list(IMAGE_DAMAGE)
    samples, expected = [], Counter()
    for i in range(2000):
        data = GOOD
        if i % 2:
            data, reason = IMAGE_DAMAGE[kinds[i // 2 % len(kinds)]]
            expected[reason] += 1
        samples.append((f"{i:06d}", data))
    folder = write(tmp_path / "d", toy_vocabulary, [samples[:700], samples[700:]])
    assert expected.total() == 1000
    done = verify(folder, "--report", str(tmp_path / "report"))
    assert done.returncode == 2
    for reason, count in expected.items():
        assert f"images, {reason}: {count:,}" in done.stdout

    dataset = HashtagDataset(folder, HashtagMapper(True, size=16))
    skipped: Counter = Counter()
    for i in range(2000):
        sample = dataset[i]
        replaced = i % 2 == 1
        assert sample["key"] == f"{(i + replaced) % 2000:06d}"
        assert [key for key, _ in sample["skipped"]] == ([f"{i:06d}"] if replaced else [])
        skipped.update(reason.partition(":")[0] for _, reason in sample["skipped"])
    assert skipped == expected


def flip(path, where):
    data = bytearray(path.read_bytes())
    data[where if where >= 0 else len(data) + where] ^= 1
    path.write_bytes(data)


def other_vocabulary(path, vocabulary):
    labels = read_labels(path)
    labels.vocabulary_checksum = "0" * 64
    write_labels(path, labels)


def other_labels(path, vocabulary):
    labels = read_labels(path)
    labels.labels = (labels.labels + 1) % 4
    write_labels(path, labels)


def payload(path):
    return int(read_index(path).offsets[1]) + 40


SHARD_DAMAGE = {  # what happens to a shard -> the problem, and how many of its images are reported
    "deleted": (lambda tar, _: tar.unlink(), "missing", 0),
    "emptied": (lambda tar, _: tar.write_bytes(b""), "empty", 4),
    "truncated": (lambda tar, _: tar.write_bytes(tar.read_bytes()[:3000]), "truncated", None),
    "lengthened": (lambda tar, _: tar.write_bytes(tar.read_bytes() + bytes(512)), "too long", 0),
    "a bit of an image": (lambda tar, _: flip(tar, payload(tar)), "altered", 1),
    "a bit of a header": (lambda tar, _: flip(tar, 5), "altered", 0),
    "a bit of the padding": (lambda tar, _: flip(tar, -1), "altered", 0),
    "a block of zeros": (
        lambda tar, _: tar.write_bytes((d := tar.read_bytes())[: (p := payload(tar))] + bytes(64) + d[p + 64 :]),
        "altered",
        1,
    ),
    "index deleted": (lambda tar, _: index_path(tar).unlink(), "no index", 0),
    "truncated index": (
        lambda tar, _: index_path(tar).write_bytes(index_path(tar).read_bytes()[:200]),
        "damaged index",
        0,
    ),
    "index bit": (lambda tar, _: flip(index_path(tar), 150), "damaged index", 0),
    "labels of another vocabulary": (other_vocabulary, "labels of another vocabulary", 0),
    "other labels": (other_labels, "other labels", 0),
    "labels deleted": (lambda tar, _: labels_path(tar).unlink(), "no labels", 0),
    "truncated labels": (
        lambda tar, _: labels_path(tar).write_bytes(labels_path(tar).read_bytes()[:200]),
        "damaged labels",
        0,
    ),
    "index of another shard": (
        lambda tar, _: shutil.copy(index_path(tar.with_name("shard-000000.tar")), index_path(tar)),
        "index of other images",
        0,
    ),
}


def test_fifty_damaged_shards_of_a_dozen_kinds_are_all_found(tmp_path, toy_vocabulary):
    samples = [[(f"{s:02d}{i}", jpeg(10 * s + i)) for i in range(4)] for s in range(60)]
    folder = write(tmp_path / "d", toy_vocabulary, samples)
    report = tmp_path / "report"
    assert verify(folder, "--report", str(report)).returncode == 0
    expected = {}
    for number in range(50):
        kind = list(SHARD_DAMAGE)[number % len(SHARD_DAMAGE)]
        path = folder / f"shard-{number + 1:06d}.tar"
        SHARD_DAMAGE[kind][0](path, toy_vocabulary)
        expected[path.name] = SHARD_DAMAGE[kind][1:]
    shutil.copy(folder / "shard-000000.tar", folder / "stray.tar")
    expected["stray.tar"] = ("not in the manifest", 0)
    reports = list(verify_dataset(folder, report, workers=2))
    assert len(reports) == 61
    assert {r.name: r.problem for r in reports if r.problem} == {name: e[0] for name, e in expected.items()}
    for found in reports:
        if found.name in expected and expected[found.name][1] is not None:
            assert len(found.damaged) == expected[found.name][1], (found, expected[found.name])
    assert summarize(reports)["problems"] == dict(sorted(Counter(e[0] for e in expected.values()).items()))

    # Reading in training finds what verification found in files and images, and names the shard.
    dataset = HashtagDataset(folder)
    for number in range(50):
        name = f"shard-{number + 1:06d}.tar"
        problem, damaged = expected[name]
        if problem in ("altered", "too long") and damaged == 0 and problem == "altered":
            continue  # no byte of an image or of the index is touched
        with pytest.raises(ShardError, match=name[:-4]):
            for image in range(4 * number + 4, 4 * number + 8):
                dataset[image]


def test_a_repeated_call_reads_changed_shards_alone(tmp_path, toy_vocabulary, hashtag_folder):
    report = tmp_path / "report"
    list(verify_dataset(hashtag_folder, report))
    lines = report.read_text().splitlines()
    report.write_text("\n".join(lines[:2]) + '\n{"facts": [')  # as if it had been killed
    with open(report, "a") as file:
        file.write("\n")
    flip(hashtag_folder / "shard-000001.tar", -1)
    reports = list(verify_dataset(hashtag_folder, report))
    assert [r.problem for r in reports if r.problem] == ["altered"] and len(reports) == 3
    written = [json.loads(line)["name"] for line in report.read_text().splitlines()[3:]]
    assert written == ["shard-000001.tar", "shard-000002.tar"]


def test_a_shard_name_that_leaves_the_folder_is_refused(hashtag_folder):
    path = hashtag_folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["name"] = "../../shard-000000.tar"
    path.write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match="is not a plain name; refused"):
        HashtagDataset(hashtag_folder)


def test_few_shards_stay_open_and_many_are_read(tmp_path, toy_vocabulary, monkeypatch):
    monkeypatch.setattr("wsl_d2.data.read.dataset._MAX_OPEN_SHARDS", 3)
    folder = write_hashtag_folder(tmp_path / "d", toy_vocabulary, num_images=40, images_per_shard=4)
    dataset = HashtagDataset(folder)
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    for image in np.random.default_rng(0).integers(0, 40, 300).tolist():
        assert dataset[image]["image"] == jpeg(image)
    assert (
        len(dataset._open) == 3 and len(list(descriptors.iterdir())) <= before + 9
    )  # a tar, its index, its labels each


def test_the_vocabulary_of_the_check_is_the_datasets(tmp_path, hashtag_folder):
    Vocabulary.build("other", load_wordnet(), synsets=["n02084071"]).save(hashtag_folder / "vocabulary.json")
    done = verify(hashtag_folder, "--report", str(tmp_path / "r"))
    assert done.returncode == 2 and "is vocabulary 'other'" in done.stderr
