import pytest
from toy_data import write_hashtag_folder


@pytest.fixture(scope="module")
def datasets(tmp_path_factory, toy_vocabulary):
    root = tmp_path_factory.mktemp("datasets")
    write_hashtag_folder(root / "toy" / "train", toy_vocabulary, num_images=48)
    write_hashtag_folder(root / "toy" / "val", toy_vocabulary, num_images=20)
    return root
