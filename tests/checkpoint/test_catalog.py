import functools
import hashlib
import http.server
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import types

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet, resnext50_32x4d

from wsl_d2.checkpoint import IncompleteLoadError, WeightFile, catalog, convert_state_dict, load_backbone
from wsl_d2.checkpoint.download import DownloadError
from wsl_d2.modeling import ResNeXtArchitecture, make_resnext
from wsl_d2.modeling.resnext import RESNEXT_ARCHITECTURES, Trunk
from wsl_d2.version import __version__

WSL = "wsl://resnext101_32x8d"
TOY = "torchvision://ResNet50_Weights.IMAGENET1K_V1"
TOY_FILE = "resnet50-0676ba61.pth"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, no mirror, and no proxy between a test and its server."""
    monkeypatch.setenv("WSL_D2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("WSL_D2_WEIGHTS_MIRROR", raising=False)
    catalog._warn_of_license.cache_clear()
    return tmp_path / "cache" / "weights"


@pytest.fixture()
def mirror(tmp_path, monkeypatch):
    folder = tmp_path / "mirror"
    folder.mkdir()
    monkeypatch.setenv("WSL_D2_WEIGHTS_MIRROR", str(folder))
    return folder


@pytest.fixture()
def toy(monkeypatch):
    """Lets torchvision's ResNet-50 be a network of 11 MB; returns such a state dict."""
    monkeypatch.setitem(catalog.TRUNKS, 50, Trunk((1, 1, 1, 1), 64, 256))
    monkeypatch.setitem(catalog.TORCHVISION_WEIGHTS, "ResNet50_Weights", ResNeXtArchitecture(50, 1, 2))
    return toy_network().state_dict()


def toy_network(cls=ResNet, **kwargs):
    torch.manual_seed(0)
    return randomise(cls(Bottleneck, [1, 1, 1, 1], groups=1, width_per_group=2, num_classes=3, **kwargs))


def randomise(model):
    """Every batch norm gets values of its own, so that a mix-up cannot go unseen."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def public_state_dict(architecture):
    """All the names and shapes of a public WSL file, of zeros that take no memory."""
    _, groups, width = RESNEXT_ARCHITECTURES[architecture]
    with torch.device("meta"):
        model = ResNet(Bottleneck, [3, 4, 23, 3], groups=groups, width_per_group=width)
    return {name: torch.zeros((), dtype=t.dtype).expand(t.shape) for name, t in model.state_dict().items()}


def put(folder, name, state_dict, sums=True):
    torch.save(state_dict, folder / name)
    if sums:
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        (folder / "SHA256SUMS").write_text(f"{'0' * 64}  other.pth\n{digest} *{name}\n")


@pytest.fixture()
def sparse_writes(monkeypatch):
    """Written tensors keep their one element of storage: 828M parameters take no place on the disk."""

    def write(path, tensors, record):
        torch.save({"model": dict(tensors), "matching_heuristics": True, "wsl_d2": dict(record)}, path)

    monkeypatch.setattr(catalog, "write_weights", write)


@pytest.fixture()
def warnings(monkeypatch):
    messages = []
    monkeypatch.setattr(catalog.logger, "warning", messages.append)
    return messages


def files(folder):
    return sorted(name for name in os.listdir(folder) if not name.endswith(".lock"))


@pytest.mark.parametrize("name", ["resnext101_32x8d", "resnext101_32x16d", "resnext101_32x32d", "resnext101_32x48d"])
def test_every_public_file_in_its_true_shapes(name, cache, mirror, sparse_writes):
    state_dict = public_state_dict(name)
    assert "fc.weight" in state_dict and "bn1.num_batches_tracked" in state_dict
    put(mirror, catalog.WSL_WEIGHTS[name], state_dict)
    digest = hashlib.sha256((mirror / catalog.WSL_WEIGHTS[name]).read_bytes()).hexdigest()

    path = PathManager.get_local_path(f"wsl://{name}/")
    assert path == str(cache / f"wsl-{name}-{digest[:8]}.pth")
    file = WeightFile.read(path)
    with torch.device("meta"):
        backbone = make_resnext(name).state_dict()
    assert {k: v.shape for k, v in file.backbone().tensors.items()} == {
        k: v.shape for k, v in backbone.items() if not k.endswith("num_batches_tracked")
    }
    assert file.provenance == {
        "input_format": "RGB",
        "pixel_mean": [123.675, 116.28, 103.53],
        "pixel_std": [58.395, 57.12, 57.375],
        "architecture": name,
        "num_groups": 32,
        "width_per_group": RESNEXT_ARCHITECTURES[name].width_per_group,
        "stride_in_1x1": False,
        "version": __version__,
        "license": "CC-BY-NC-4.0",
        "source": str(mirror / catalog.WSL_WEIGHTS[name]),
        "source_sha256": digest,
    }
    assert (mirror / catalog.WSL_WEIGHTS[name]).exists()  # the mirror's file is not ours to remove


def test_the_digests_of_the_public_files():
    starts = {name: file[-12:-4] for name, file in catalog.WSL_WEIGHTS.items()}
    assert starts == {
        "resnext101_32x8d": "c38310e5",
        "resnext101_32x16d": "c6f796b0",
        "resnext101_32x32d": "e4b90b00",
        "resnext101_32x48d": "3e41cc8a",
    }
    assert catalog.BASE_URL + catalog.WSL_WEIGHTS["resnext101_32x8d"] == (
        "https://download.pytorch.org/models/ig_resnext101_32x8-c38310e5.pth"
    )


def test_without_sums_the_name_of_the_file_is_verified(cache, mirror, toy):
    put(mirror, TOY_FILE, toy, sums=False)
    with pytest.raises(DownloadError, match="should start with 0676ba61 and is .*Copy it to the mirror again"):
        PathManager.get_local_path(TOY)
    (mirror / "SHA256SUMS").write_text(f"{'0' * 64}  another.pth\n")
    with pytest.raises(DownloadError, match="should start with 0676ba61"):
        PathManager.get_local_path(TOY)
    assert files(cache) == []


def test_a_file_other_than_the_public_one_is_told(mirror, toy, warnings):
    put(mirror, TOY_FILE, toy)
    PathManager.get_local_path(TOY)
    assert len(warnings) == 1 and "it is not the public file of that name" in warnings[0]


def test_a_truncated_file_is_refused(cache, mirror, toy):
    put(mirror, TOY_FILE, toy)
    content = (mirror / TOY_FILE).read_bytes()
    (mirror / TOY_FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(DownloadError, match=rf"is not the expected file: .*\({len(content) // 2} bytes\)"):
        PathManager.get_local_path(TOY)
    (mirror / TOY_FILE).write_bytes(b"<html>404")
    with pytest.raises(DownloadError, match="it is a web page"):
        PathManager.get_local_path(TOY)
    (mirror / TOY_FILE).unlink()
    with pytest.raises(DownloadError, match=f"no file {TOY_FILE} in that folder"):
        PathManager.get_local_path(TOY)
    assert files(cache) == []


def test_another_width_under_the_name_is_refused(cache, mirror, sparse_writes):
    put(mirror, catalog.WSL_WEIGHTS["resnext101_32x8d"], public_state_dict("resnext101_32x16d"))
    with pytest.raises(IncompleteLoadError, match="a ResNet-101 of 32 groups of width 8") as error:
        PathManager.get_local_path(WSL)
    assert error.value.mismatched["res2.0.conv2.weight"] == ("(512, 16, 3, 3)", "(256, 8, 3, 3)")
    assert files(cache) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda sd: sd.pop("layer3.0.bn2.running_var"), "missing in the file: res4.0.conv2.norm.running_var"),
        (
            lambda sd: sd.update({"layer3.1.conv1.weight": torch.zeros(1)}),
            "left over in the file: layer3.1.conv1.weight",
        ),
        (lambda sd: sd.update({"layer1.0.se.fc1.weight": torch.zeros(1)}), "layer1.0.se.fc1.weight"),
        (lambda sd: sd.clear(), "not the state dict of a ResNet"),
    ],
)
def test_a_verified_file_of_something_else_is_refused(cache, mirror, toy, damage, message):
    damage(toy)
    put(mirror, TOY_FILE, toy)
    with pytest.raises(IncompleteLoadError, match=message):
        PathManager.get_local_path(TOY)
    assert files(cache) == []


def test_a_second_call_needs_no_mirror(mirror, toy):
    put(mirror, TOY_FILE, toy)
    first = PathManager.get_local_path(TOY)
    shutil.rmtree(mirror)
    assert PathManager.get_local_path(TOY) == first
    with pytest.raises(DownloadError):
        PathManager.get_local_path(TOY, force=True)


def test_what_a_mirror_calls_by_a_public_name_is_not_taken_for_the_public_file(mirror, toy, monkeypatch, tmp_path):
    put(mirror, TOY_FILE, toy)
    PathManager.get_local_path(TOY)
    asked = []

    def fail(url, destination, sha256):
        asked.append((url, sha256))
        raise DownloadError("no network")

    monkeypatch.setattr(catalog, "download", fail)
    monkeypatch.delenv("WSL_D2_WEIGHTS_MIRROR")
    with pytest.raises(DownloadError, match="no network"):
        PathManager.get_local_path(TOY)
    assert asked == [(catalog.BASE_URL + TOY_FILE, "0676ba61")]
    monkeypatch.setenv("WSL_D2_WEIGHTS_MIRROR", str(tmp_path / "other"))
    with pytest.raises(DownloadError, match="no file"):
        PathManager.get_local_path(TOY)


@pytest.mark.parametrize(
    "path",
    [
        "wsl://resnext101_32x64d",
        "wsl://ResNeXt101_32x8d",
        "wsl://",
        "wsl://resnext101_32x8d?a=1",
        "wsl://../resnext101_32x8d",
        "torchvision://ResNet18_Weights.IMAGENET1K_V1",
        "torchvision://Wide_ResNet50_2_Weights.DEFAULT",
        "torchvision://ResNeXt101_32X8D_Weights",
        "torchvision://resnext101_32x8d",
        "timm://",
        "timm://../../secret",
        "timm://hf-hub:someone/model",
    ],
)
def test_unknown_names(path, cache):
    with pytest.raises(FileNotFoundError) as error:
        PathManager.get_local_path(path)
    assert path in str(error.value)
    if not path.startswith("timm"):
        assert not PathManager.exists(path) and not PathManager.isfile(path)
        known = "resnext101_32x48d" if path.startswith("wsl") else "ResNeXt101_64X4D_Weights.IMAGENET1K_V1"
        assert known in str(error.value)
    assert not cache.exists()


@pytest.mark.parametrize("name", ["resnext50_32x4d", "resnext101_32x4d"])
def test_names_that_were_never_released(name):
    with pytest.raises(FileNotFoundError, match="never released"):
        PathManager.get_local_path(f"wsl://{name}")


def test_known_names_exist_without_a_download(cache):
    assert PathManager.exists(WSL) and PathManager.isfile(WSL + "/") and not PathManager.isdir(WSL)
    assert PathManager.exists("torchvision://ResNeXt50_32X4D_Weights.DEFAULT")
    assert not cache.exists()
    with pytest.raises(OSError, match="can only be read"):
        PathManager.open(WSL, "wb")


def test_the_license_is_told_once(mirror, sparse_writes, warnings):
    put(mirror, catalog.WSL_WEIGHTS["resnext101_32x8d"], public_state_dict("resnext101_32x8d"))
    for _ in range(2):
        PathManager.get_local_path(WSL)
    assert len([message for message in warnings if "CC-BY-NC 4.0" in message]) == 1


def test_registering_twice_is_harmless():
    for handler in (catalog.WSLHandler, catalog.TorchvisionHandler, catalog.TimmHandler):
        PathManager.register_handler(handler())
    assert PathManager.exists(WSL)


def test_plain_detectron2_loads_every_tensor(mirror):
    torch.manual_seed(0)
    state_dict = randomise(resnext50_32x4d()).state_dict()
    put(mirror, "resnext50_32x4d-7cdf4587.pth", state_dict)
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    cfg.MODEL.BACKBONE.NAME = "build_resnext50_32x4d_fpn_backbone"
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    model = build_model(cfg)

    DetectionCheckpointer(model).load("torchvision://ResNeXt50_32X4D_Weights.IMAGENET1K_V1")
    expected = convert_state_dict(state_dict, "d2")
    bottom_up = model.backbone.bottom_up.state_dict()
    assert len(bottom_up) == 53 * 5
    assert all(torch.equal(tensor, expected[name]) for name, tensor in bottom_up.items())

    other = make_resnext("resnext50_32x4d")
    load_backbone(other, "torchvision://ResNeXt50_32X4D_Weights.IMAGENET1K_V1")
    assert torch.equal(other.stem.conv1.weight, state_dict["conv1.weight"])


def test_default_is_the_same_file(mirror, toy):
    put(mirror, "resnet50-11ad3fa6.pth", toy)
    paths = [
        PathManager.get_local_path(f"torchvision://ResNet50_Weights.{name}") for name in ("DEFAULT", "IMAGENET1K_V2")
    ]
    assert paths[0] == paths[1]
    with PathManager.open("torchvision://ResNet50_Weights.DEFAULT", "rb") as file:
        assert file.read(2) == b"PK"


# ---- Mirrors behind a URL


@pytest.fixture()
def url_mirror(tmp_path, monkeypatch):
    """A folder, served; the paths that were asked for are kept."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setenv("WSL_D2_WEIGHTS_MIRROR", f"http://127.0.0.1:{server.server_port}")
    yield types.SimpleNamespace(folder=folder, asked=asked, server=server)
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_mirror_behind_a_url(cache, url_mirror, toy):
    put(url_mirror.folder, TOY_FILE, toy)
    path = PathManager.get_local_path(TOY)
    assert [os.path.basename(path)] == files(cache)  # the download is removed
    assert torch.equal(WeightFile.read(path).backbone().tensors["stem.conv1.weight"], toy["conv1.weight"])
    url_mirror.asked.clear()
    assert PathManager.get_local_path(TOY) == path
    assert url_mirror.asked == []


def test_a_download_that_another_process_left(cache, url_mirror, toy):
    put(url_mirror.folder, TOY_FILE, toy)
    cache.mkdir(parents=True)
    shutil.copy(url_mirror.folder / TOY_FILE, cache / TOY_FILE)
    PathManager.get_local_path(TOY)
    assert f"/{TOY_FILE}" not in url_mirror.asked
    assert TOY_FILE not in files(cache)


def test_a_wrong_file_behind_a_url(cache, url_mirror, toy):
    put(url_mirror.folder, TOY_FILE, toy, sums=False)
    with pytest.raises(DownloadError, match="should start with 0676ba61"):
        PathManager.get_local_path(TOY)
    put(url_mirror.folder, TOY_FILE, {name: tensor for name, tensor in toy.items() if name != "conv1.weight"})
    with pytest.raises(IncompleteLoadError, match="missing in the file: stem.conv1.weight"):
        PathManager.get_local_path(TOY)
    assert files(cache) == []


@pytest.mark.parametrize(
    "mirror", ["ftp://example.com/models", "file:///models", "https://user:secret@example.com/models"]
)
def test_other_mirrors_are_refused(mirror, monkeypatch):
    monkeypatch.setenv("WSL_D2_WEIGHTS_MIRROR", mirror)
    with pytest.raises(DownloadError, match="WSL_D2_WEIGHTS_MIRROR must be a folder") as refused:
        PathManager.get_local_path(TOY)
    assert "secret" not in str(refused.value)


def test_two_processes_download_once(cache, url_mirror, toy):
    put(url_mirror.folder, TOY_FILE, toy)
    code = f"""
        import sys, wsl_d2
        from detectron2.utils.file_io import PathManager
        from wsl_d2.checkpoint import catalog
        from wsl_d2.modeling.resnext import ResNeXtArchitecture, Trunk
        catalog.TRUNKS[50] = Trunk((1, 1, 1, 1), 64, 256)
        catalog.TORCHVISION_WEIGHTS["ResNet50_Weights"] = ResNeXtArchitecture(50, 1, 2)
        print("ready", flush=True)
        sys.stdin.readline()
        print(PathManager.get_local_path({TOY!r}))
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    paths = {process.communicate()[0].strip() for process in processes}
    assert paths == {str(cache / name) for name in files(cache)} and len(paths) == 1
    assert url_mirror.asked.count(f"/{TOY_FILE}") == 1


# ---- timm


class TimmNetwork(ResNet):
    """What timm's ResNet has, in torchvision's."""

    pretrained_cfg = {
        "mean": (0.5, 0.25, 0.4),
        "std": (0.5, 0.5, 0.2),
        "hf_hub_id": "timm/toy.in1k",
        "license": "mit",
    }

    def forward_features(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class BlurredNetwork(TimmNetwork):
    def forward_features(self, x):
        return super().forward_features(nn.functional.avg_pool2d(x, 3, 1, 1))


@pytest.fixture()
def timm(monkeypatch):
    """In place of the package: knows one model, or what a test puts there."""
    calls = []

    def create_model(name, pretrained=False):
        calls.append((name, pretrained))
        if name not in models:
            raise RuntimeError(f"Unknown model ({name})")
        return models[name]

    models = {"toy.in1k": toy_network(TimmNetwork)}
    names = ["resnet18.a1_in1k", "resnext50_32x4d.a1_in1k", "seresnext50_32x4d.racm_in1k", "vit_tiny.in1k"]
    module = types.SimpleNamespace(create_model=create_model, list_pretrained=lambda: names, calls=calls, models=models)
    monkeypatch.setitem(sys.modules, "timm", module)
    return module


def test_a_model_of_timm(timm, cache, monkeypatch):
    path = PathManager.get_local_path("timm://toy.in1k")
    assert timm.calls == [("toy.in1k", True)]
    assert path == str(cache / "timm-toy.in1k.pth")
    file = WeightFile.read(path)
    expected = convert_state_dict(timm.models["toy.in1k"].state_dict(), "d2")
    assert len(file.backbone().tensors) == 17 * 5
    assert all(torch.equal(tensor, expected[name]) for name, tensor in file.backbone().tensors.items())
    record = file.provenance
    assert record["pixel_mean"] == [127.5, 63.75, 102.0] and record["pixel_std"] == [127.5, 127.5, 51.0]
    assert (record["input_format"], record["num_groups"], record["width_per_group"]) == ("RGB", 1, 2)
    assert record["source"] == "https://huggingface.co/timm/toy.in1k"

    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    assert PathManager.get_local_path("timm://toy.in1k") == path
    assert PathManager.exists("timm://toy.in1k")
    with pytest.raises(ImportError, match="pip install timm"):
        PathManager.get_local_path("timm://resnext50_32x4d.a1_in1k")


def test_models_that_timm_does_not_have(timm):
    with pytest.raises(FileNotFoundError, match=r"Unknown model.*known: resnext50_32x4d\.a1_in1k$"):
        PathManager.get_local_path("timm://resnext50_32x5d")
    assert PathManager.exists("timm://resnext50_32x4d") and PathManager.exists("timm://resnext50_32x4d.a1_in1k")
    assert not PathManager.exists("timm://resnext50_32x4d.a1") and not PathManager.exists("timm://vit_tiny.in1k")


def test_a_model_of_timm_is_described_without_a_download(timm, cache):
    timm.get_pretrained_cfg = lambda name: types.SimpleNamespace(**TimmNetwork.pretrained_cfg)
    architecture, statistics = catalog.describe_public("timm://resnext50_32x4d.a1_in1k")
    assert architecture == "resnext50_32x4d" and statistics["pixel_mean"] == [127.5, 63.75, 102.0]
    assert timm.calls == [] and not cache.exists()
    assert catalog.describe_public("timm://vit_tiny.in1k") is None and catalog.describe_public("out/a.pth") is None


def test_timm_without_a_network(timm, monkeypatch):
    def fails(name, pretrained):
        raise OSError("An error happened while trying to locate the file on the Hub")

    monkeypatch.setattr(timm, "create_model", fails)
    with pytest.raises(
        DownloadError, match="timm://toy.in1k could not be downloaded: .*on the Hub.*without one .*path"
    ):
        PathManager.get_local_path("timm://toy.in1k")


def test_a_mirror_that_does_not_answer(cache, monkeypatch):
    monkeypatch.setenv("WSL_D2_WEIGHTS_MIRROR", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=f"^http://127.0.0.1:9/{TOY_FILE} could .*SHA256SUMS: .*{cache / TOY_FILE}"):
        PathManager.get_local_path(TOY)


def test_an_address_that_does_not_answer():
    with pytest.raises(DownloadError, match="http://127.0.0.1:9/a.pth could not be downloaded: .*without one .*path"):
        WeightFile.read("http://127.0.0.1:9/a.pth")


def test_models_of_timm_that_are_no_plain_resnets(timm, cache):
    timm.models["blurred"] = toy_network(BlurredNetwork)
    with pytest.raises(IncompleteLoadError, match="computes something else"):
        PathManager.get_local_path("timm://blurred")
    from torchvision.models.resnet import BasicBlock

    timm.models["basic"] = TimmNetwork(BasicBlock, [1, 1, 1, 1])
    with pytest.raises(IncompleteLoadError, match="no bottleneck blocks"):
        PathManager.get_local_path("timm://basic")
    timm.models["group_norm"] = toy_network(TimmNetwork, norm_layer=functools.partial(nn.GroupNorm, 1))
    with pytest.raises(IncompleteLoadError, match="not a plain ResNet or ResNeXt; .*running_mean"):
        PathManager.get_local_path("timm://group_norm")
    timm.models["linear"] = nn.Linear(2, 2)
    with pytest.raises(IncompleteLoadError, match="not the state dict of a ResNet"):
        PathManager.get_local_path("timm://linear")
    assert files(cache) == []
