import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from toy_data import jpeg, random_index

ROOT = Path(__file__).resolve().parents[2]
KEY = "<script>alert(1)"


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(ROOT / "tools"))
    import visualize_data

    yield visualize_data
    sys.path.remove(str(ROOT / "tools"))


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


def run(folder, output, *options):
    config = folder.parent / "config.yaml"
    config.write_text(
        "VERSION: 2\nINPUT:\n  FORMAT: RGB\nDATASETS:\n"
        f"  HASHTAG_FOLDERS: [[visualized, {folder}]]\n  TRAIN: [visualized]\nSOLVER:\n  IMS_PER_BATCH: 28\n"
    )
    command = [
        sys.executable,
        ROOT / "tools" / "visualize_data.py",
        "--config-file",
        config,
        "--output",
        output,
        *options,
    ]
    return subprocess.run(command, capture_output=True, text=True)


def test_one_page_holds_the_batch_the_labels_and_the_failures(folder, tmp_path):
    output = tmp_path / "new" / "page.html"
    done = run(folder, output, "DATALOADER.RESAMPLING.THRESHOLD", "0.9")
    assert done.returncode == 0, done.stderr
    page = output.read_text()
    assert page.count("data:image/jpeg;base64,") == 28
    assert not re.search(r"(src|href)=.(?!data:)", page)
    assert "#cat #bird" in page or "#bird #cat" in page
    assert "1 of 14 images cannot be used" in page and "refused: truncated" in page
    assert "14 labelled images, 4 labels" in page and "1 labels without an image" in page
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page


def test_a_wrong_folder_is_one_line(folder, tmp_path):
    (folder / "manifest.json").unlink()
    done = run(folder, tmp_path / "page.html")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert not (tmp_path / "page.html").exists()


def test_the_distribution_after_resampling_counts_every_label_of_a_repeated_image(tool):
    index = random_index()
    before, after = tool.label_distribution(index, 0.05, "sqrt")
    frequency = before / index.num_images
    expected = np.zeros(index.num_labels)
    for i in range(index.num_images):
        labels = index.labels[index.indptr[i] : index.indptr[i + 1]]
        expected[labels] += max(max(1, (0.05 / frequency[label]) ** 0.5) for label in labels)
    assert np.allclose(after, expected) and (after >= before).all() and (after > before).any()


def test_the_plot_has_both_curves(tool):
    svg = tool.rank_plot(np.array([100.0, 10, 0, 1]), np.array([100.0, 30, 0, 10]))
    curves = re.findall(r'points="([^"]+)"', svg)
    assert [len(curve.split()) for curve in curves] == [3, 3]
    assert curves[0].split()[0] == "60.0,20.0" and curves[0].split()[2].endswith(",280.0")
    assert curves[1].split()[2].endswith(",150.0")
