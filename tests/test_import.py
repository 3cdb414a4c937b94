import re
import subprocess
import sys

import wsl_d2


def test_without_detectron2_the_import_says_how_to_get_it(tmp_path):
    (tmp_path / "detectron2.py").write_text("raise ImportError('no detectron2 here')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import wsl_d2"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "wsl_d2 needs detectron2" in result.stderr
    assert "make setup" in result.stderr and "git+https://github.com/facebookresearch/detectron2" in result.stderr


def test_importing_registers_no_dataset():
    code = (
        "import detectron2.data as d; before = set(d.DatasetCatalog.list()); "
        "import wsl_d2, wsl_d2.data, wsl_d2.engine; "
        "assert set(d.DatasetCatalog.list()) == before; "
        "from detectron2.modeling import BACKBONE_REGISTRY as b, META_ARCH_REGISTRY as m; "
        "assert 'build_resnext101_32x48d_fpn_backbone' in b and 'HashtagClassifier' in m"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", wsl_d2.__version__)


def test_commands_that_make_shards_start_without_torch():
    code = (
        "import sys; sys.argv[0] = 'wsl-d2'; import wsl_d2.data.write.posts, wsl_d2.data.write.verify; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_every_name_of_the_data_package_can_be_had():
    import wsl_d2.data

    assert sorted(wsl_d2.data.__all__) == sorted(wsl_d2.data._MODULE_OF)
    assert all(getattr(wsl_d2.data, name).__name__ == name for name in wsl_d2.data.__all__)
