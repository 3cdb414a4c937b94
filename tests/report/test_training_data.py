import re

import numpy as np
import pytest
from command_line import wsl_d2
from toy_data import jpeg

KEY = "<script>alert(1)"


@pytest.fixture()
def folder(tmp_path, toy_vocabulary):
    from wsl_d2.data import finish_dataset, index_shard, write_shard

    folder = tmp_path / "hostile"
    folder.mkdir()
    toy_vocabulary.save(folder / "vocabulary.json")
    samples = [
        (f"{i:03d}", jpeg(i, (40 + i, 32)), {"hashtags": ["#dog"] if i % 4 else ["#cat", "#bird"]}) for i in range(12)
    ]
    samples.append((KEY, jpeg(99), {"hashtags": ["#dog"]}))
    samples.append(("cut", jpeg(5)[:-30], {"hashtags": ["#dog"]}))
    write_shard(folder / "shard-000000.tar", samples)
    index_shard(folder / "shard-000000.tar", toy_vocabulary)
    finish_dataset(folder, toy_vocabulary)
    return folder


def run(folder, output, *options, code=0):
    config = folder.parent / "config.yaml"
    config.write_text(
        "VERSION: 2\nINPUT:\n  FORMAT: RGB\nDATASETS:\n"
        f"  HASHTAG_FOLDERS: [[visualized, {folder}]]\n  TRAIN: [visualized]\nSOLVER:\n  IMS_PER_BATCH: 28\n"
    )
    return wsl_d2("data", "show", "--config-file", config, "--output", output, *options, code=code)


def test_one_page_holds_the_batch_the_labels_and_the_failures(folder, tmp_path):
    output = tmp_path / "new" / "page.html"
    run(folder, output, "DATALOADER.RESAMPLING.THRESHOLD", "0.9")
    page = output.read_text()
    assert page.count("data:image/jpeg;base64,") == 28
    assert not re.search(r"(src|href)=.(?!data:|#)", page)
    assert "#cat #bird" in page or "#bird #cat" in page
    assert "1 of 14 images cannot be used" in page and "refused: truncated" in page
    assert "14 labeled images, 4 labels" in page and "1 labels without an image" in page
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page


def test_a_wrong_folder_is_one_line(folder, tmp_path):
    (folder / "manifest.json").unlink()
    printed = run(folder, tmp_path / "page.html", code=2)
    assert printed.startswith("wsl-d2 data show: ") and printed.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("mode", ["natural", "sqrt", "uniform"])
def test_the_page_shows_the_draws_that_the_sampler_makes(folder, tmp_path, mode):
    from wsl_d2.data import HashtagDataset, HashtagSampler

    dataset = HashtagDataset(folder)
    sampler = HashtagSampler(dataset.sharded_index, seed=0, mode=mode, threshold=0.9, batch_size=1)
    epochs = 400
    images = sampler.images_at(np.arange(epochs * sampler.epoch_length))
    drawn = np.bincount([label for image in images for label in dataset[int(image)]["labels"]], minlength=4) / epochs
    page_path = tmp_path / "page.html"
    run(folder, page_path, "DATALOADER.RESAMPLING.MODE", mode, "DATALOADER.RESAMPLING.THRESHOLD", "0.9")
    rows = re.findall(r"<td>#(\w+) \((n\d+)\)</td>(?:<td>[^<]*</td>){2}<td>([\d,]+)</td>", page_path.read_text())
    shown = {synset: int(count) for _, synset, count in rows}
    synsets = __import__("json").loads((folder / "vocabulary.json").read_text())["synsets"]
    expected = {synset: drawn[label] for label, synset in enumerate(synsets) if drawn[label]}
    assert shown.keys() == expected.keys()
    for synset, count in expected.items():
        assert abs(shown[synset] - count) <= 0.6


def test_the_plot_has_both_curves():
    from wsl_d2.report.training_data import rank_plot

    svg = rank_plot(np.array([100.0, 10, 0, 1]), np.array([100.0, 30, 0, 10]))
    before, after = (
        np.array(re.findall(r"[ML] (\S+) (\S+)", re.search(rf'id="curve{number}">\s*<path d="([^"]*)"', svg)[1]), float)
        for number in (0, 1)
    )
    assert before.shape == after.shape == (3, 2) and (before[:, 0] == after[:, 0]).all()
    assert before[0, 1] == after[0, 1]
    assert after[2, 1] == pytest.approx(before[1, 1], abs=0.1)  # 10 and 10, of a logarithmic axis
    assert before[2, 1] - before[1, 1] == pytest.approx(before[1, 1] - before[0, 1], abs=0.1)  # 100, 10, 1
    widths = [float(width) for width in re.findall(r'id="curve.">\s*<path [^>]*stroke-width: ([\d.]+)', svg)]
    assert widths[0] > 3 * widths[1]  # the curve below shows where they are the same
