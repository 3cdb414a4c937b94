"""The mini-world: words, determinism, resuming, annotations, held-out styles, messages."""

import contextlib
import hashlib
import io
import json
import math
import re
import shutil
import tarfile
from collections import Counter
from dataclasses import replace

import numpy as np
import prepare_miniworld as tool
import pytest
from miniworld_renderer import scene, sprites
from miniworld_renderer.concepts import (
    clean_concepts,
    concept_probabilities,
    detection_concepts,
    hashtag_synsets,
    load_concepts,
    load_popular_tags,
)
from miniworld_renderer.prepare import TINY, LabelError, OptionsError, WorldOptions, prepare_miniworld
from miniworld_renderer.render import Renderer
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from wsl_d2.data import HashtagDataset
from wsl_d2.data.format.manifest import read_manifest
from wsl_d2.data.write.views import make_view
from wsl_d2.hashtags import Vocabulary, load_wordnet, normalize_hashtag, wnid_to_synset
from wsl_d2.hashtags.mapping import HashtagMapping, Mapped

OPTIONS = WorldOptions(seed=5, **TINY)


def all_tags():
    concepts = load_concepts()
    tags = [c.tag for c in concepts] + [c.keyword for c in concepts] + list(load_popular_tags())
    return list(dict.fromkeys(tags))


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".stamps.jsonl"
    }


def test_numbers_of_concepts_labels_and_classes():
    assert len(load_concepts()) == 48 and len(load_popular_tags()) == 8
    assert len(hashtag_synsets()) == len(set(hashtag_synsets())) == 96
    assert len({c.tag.synset for c in load_concepts()}) == 48
    assert not {c.tag.synset for c in load_concepts()} & {c.keyword.synset for c in load_concepts()}
    assert len(clean_concepts()) == 24 and len(detection_concepts()) == 12
    assert len(set(clean_concepts()) & set(detection_concepts())) == 6
    assert all(len(concept.icons) >= 6 for concept in load_concepts())


def test_concept_frequencies_follow_the_shifted_zipf_law():
    probabilities = concept_probabilities()
    assert probabilities.sum() == pytest.approx(1)
    assert probabilities[0] / probabilities[47] == pytest.approx((57 / 10) ** 0.8)
    assert concept_probabilities(4.0)[0] / concept_probabilities(4.0)[47] == pytest.approx((57 / 10) ** 4)


def test_a_skewed_world_shows_the_frequent_concepts_alone_and_an_older_one_is_gone_on_with(tmp_path):
    options = replace(OPTIONS, num_hashtag_images=200, frequency_exponent=4.0)
    prepare_miniworld(tmp_path / "world", options, progress=False)
    shown: Counter[str] = Counter()
    for shard in sorted((tmp_path / "world/hashtags/train").glob("*.tar")):
        with tarfile.open(shard) as tar:
            posts = [json.load(tar.extractfile(member)) for member in tar if member.name.endswith(".json")]
        shown.update(concept for post in posts for concept in post["concepts"])
    names = [concept.name for concept in load_concepts()]
    share = concept_probabilities(4.0)[:8].sum()
    assert sum(shown[name] for name in names[:8]) / shown.total() == pytest.approx(share, abs=0.08) and share > 0.8
    params = tmp_path / "world" / "params.json"
    older = {name: value for name, value in json.loads(params.read_text()).items() if name != "frequency_exponent"}
    params.write_text(json.dumps(older))
    with pytest.raises(OptionsError, match=r"frequency_exponent is 0\.8 there and 4\.0 now"):
        prepare_miniworld(tmp_path / "world", options, progress=False)


def test_every_synonym_is_a_lemma_of_its_synset():
    wordnet = load_wordnet()
    for tag in all_tags():
        lemmas = {lemma.lower() for lemma in wnid_to_synset(wordnet, tag.synset).lemma_names()}
        assert set(tag.synonyms) <= lemmas, tag


def test_vocabulary_gives_every_spelling_of_a_tag_its_label():
    vocabulary = Vocabulary.build("miniworld", load_wordnet(), synsets=hashtag_synsets())
    assert len(vocabulary) == 96
    rng = np.random.default_rng(0)
    for tag in all_tags():
        for hashtag in [*tag.synonyms, *(scene.spell(rng, tag) for _ in range(100))]:
            match = vocabulary.match(hashtag)
            assert match is not None and match.synset == tag.synset, (hashtag, match)
    assert all(vocabulary.match(hashtag) is None for hashtag in scene.OUTSIDE_TAGS)


def test_hashtag_statistics_follow_the_recipe():
    """A name survives with 0.75 * 0.88, a little more among photos that have a tag at all."""
    count, shown, named, popular, num_objects = 6000, 0, 0, Counter(), Counter()
    by_synset = {tag.synset: tag for tag in all_tags()}
    for number in range(count):
        rng = scene.picture_generator(0, "hashtags/train", number)
        placements, hashtags, meant = scene.hashtag_scene(rng, scene.concept_probabilities())
        tags = {by_synset[synset] for synset in meant}
        assert tags and len(hashtags) >= len(tags)
        num_objects[len(placements)] += 1
        for placement in placements:
            shown += 1
            named += load_concepts()[placement.concept].tag in tags
            assert 0.4 <= placement.scale <= 0.95
        popular.update(tag for tag in tags if tag in load_popular_tags())
    # Untagged posts are drawn again, and most of those show one object, so there are fewer of these than 60%.
    assert 0.52 < num_objects[1] / count < 0.60 and num_objects[3] / count == pytest.approx(0.11, abs=0.02)
    assert 0.66 < named / shown < 0.80
    for tag in load_popular_tags():
        rate = 0.03 * 0.88 / 0.87  # kept, among photos that have a tag at all
        assert popular[tag] / count == pytest.approx(rate, abs=5 * math.sqrt(rate / count) + 0.004)


def test_few_posters_post_half_of_the_photos_each_with_two_concepts(tmp_path):
    options = replace(OPTIONS, num_hashtag_images=200, dominance=0.5)
    prepare_miniworld(tmp_path / "world", options, progress=False)
    shown: dict[str, set[str]] = {}
    photos: Counter[str] = Counter()
    for shard in sorted((tmp_path / "world/hashtags/train").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    post = json.load(tar.extractfile(member))
                    photos[post["user"]] += 1
                    shown.setdefault(post["user"], set()).update(post["concepts"])
    few = {f"poster {number}" for number in range(10)}
    assert 70 <= sum(photos[poster] for poster in few) <= 130
    assert all(len(shown[poster]) <= 2 for poster in few & shown.keys())
    assert len(set().union(*shown.values())) > 40
    make_view(tmp_path / "world/hashtags/train", tmp_path / "capped", max_images_per_user=3)
    assert read_manifest(tmp_path / "capped")["num_images"] == sum(min(count, 3) for count in photos.values())


def test_a_share_of_dominant_posters_is_between_0_and_1():
    with pytest.raises(OptionsError, match=r"dominance is 1\.5; it is a share of the photos, 0 to 1"):
        replace(OPTIONS, dominance=1.5)
    with pytest.raises(OptionsError, match="frequency_exponent is -1; it is a number from 0 to 5"):
        replace(OPTIONS, frequency_exponent=-1)


def test_hashtags_are_spelled_as_people_spell_them():
    rng = np.random.default_rng(0)
    dog = next(concept.tag for concept in load_concepts() if concept.name == "dog")
    spelled = {scene.spell(rng, dog) for _ in range(2000)}
    assert {"#dogs", "#Dog", "#DOG", "#cutedog", "#dogofinstagram", "#🐶"} <= spelled
    assert any(re.fullmatch(r"#dog20\d\d", tag) for tag in spelled) and any("ooo" in tag for tag in spelled)
    assert any("ó" in tag for tag in {scene.spell(rng, load_concepts()[1].tag) for _ in range(2000)})  # mushroom


def test_a_world_whose_labels_are_not_what_the_hashtags_mean_is_refused(tmp_path, monkeypatch):
    def spellings_alone(self, hashtag):
        known = {key: label for label, group in enumerate(self.vocabulary.hashtags) for key in group}
        label = known.get(normalize_hashtag(hashtag))
        return Mapped((), "not in the vocabulary", 0) if label is None else Mapped((label,), "", 0)

    monkeypatch.setattr(HashtagMapping, "map", spellings_alone)
    with pytest.raises(LabelError, match="photos are labeled otherwise than their hashtags are meant, the first with"):
        prepare_miniworld(tmp_path / "world", OPTIONS, progress=False)


def test_two_workers_make_the_same_bytes_as_one(tiny_world, tmp_path):
    prepare_miniworld(tmp_path / "world", OPTIONS, num_workers=2, progress=False)
    assert digests(tmp_path / "world") == digests(tiny_world)


def test_another_seed_makes_other_pictures(tiny_world, tmp_path):
    prepare_miniworld(tmp_path / "world", WorldOptions(seed=6, **TINY), progress=False)
    name = "hashtags/train/shard-000000.tar"
    assert (tmp_path / "world" / name).read_bytes() != (tiny_world / name).read_bytes()


def test_a_call_after_a_loss_makes_the_same_bytes_again(tiny_world, tmp_path):
    world = tmp_path / "world"
    shutil.copytree(tiny_world, world)
    for name in (
        "hashtags/train/shard-000001.tar",
        "clean/val/manifest.json",
        "clean/train/shard-000000.index.npz",
        "hashtags/val/vocabulary.json",
        "detection/train/000003.jpg",
        "detection/annotations/instances_val.json",
        "contact_sheet.png",
    ):
        (world / name).unlink()
    prepare_miniworld(world, OPTIONS, progress=False)
    assert digests(world) == digests(tiny_world)


def test_a_call_on_a_finished_world_writes_nothing(tiny_world, tmp_path):
    world = tmp_path / "world"
    shutil.copytree(tiny_world, world)
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*.*") if path.name != "ATTRIBUTION.txt"}
    prepare_miniworld(world, OPTIONS, progress=False)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_an_interrupted_call_leaves_whole_files_and_is_continued(tiny_world, tmp_path, monkeypatch):
    world, calls = tmp_path / "world", []
    render = Renderer.clean_photo

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) > 40:
            raise KeyboardInterrupt
        return render(self, *args)

    monkeypatch.setattr(Renderer, "clean_photo", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_miniworld(world, OPTIONS, progress=False)
    assert (world / "clean/train/shard-000000.tar").is_file()
    assert not (world / "clean/train/shard-000001.tar").exists() and not list(world.rglob("*.partial-*"))
    monkeypatch.undo()
    prepare_miniworld(world, OPTIONS, progress=False)
    assert digests(world) == digests(tiny_world)


def test_shards_hold_labeled_images_of_the_right_size(tiny_world):
    for name, images, labels in (
        ("hashtags/train", 64, 96),
        ("hashtags/val", 16, 96),
        ("clean/train", 48, 24),
    ):
        manifest = read_manifest(tiny_world / name)
        HashtagDataset(tiny_world / name).check_shards()
        assert (manifest["num_images"], manifest["num_labels"], manifest["num_unlabelled"]) == (
            images,
            labels,
            0,
        )
    assert read_manifest(tiny_world / "clean/train")["hashtag_counts"] == [2] * 24
    index = HashtagDataset(tiny_world / "clean/train").index
    assert np.diff(index.indptr).tolist() == [1] * 48


def test_detection_annotations_load_in_pycocotools_and_agree_with_their_masks(tiny_world):
    for split, count in (("train", 12), ("val", 8)):
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(str(tiny_world / f"detection/annotations/instances_{split}.json"))
        assert len(coco.imgs) == count and len(coco.cats) == 12
        assert coco.dataset["info"]["description"] and coco.dataset["licenses"][0]["url"]
        for image in coco.imgs.values():
            picture = Image.open(tiny_world / "detection" / split / image["file_name"])
            assert picture.size == (image["width"], image["height"]) == (128, 128)
            covered = np.zeros((128, 128), int)
            annotations = coco.imgToAnns[image["id"]]
            assert 1 <= len(annotations) <= 4
            for annotation in annotations:
                mask = coco.annToMask(annotation)
                covered += mask
                rows, columns = np.nonzero(mask)
                box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
                assert annotation["bbox"] == box and annotation["iscrowd"] == 0
                assert annotation["area"] == mask.sum() >= 30
                assert annotation["area"] == coco_mask.area(annotation["segmentation"])
            assert covered.max() == 1, "masks are the visible parts, so they do not overlap"


def test_occlusion_shows_the_upper_object_and_cuts_the_lower_mask():
    art = sprites.Sprites(
        np.array([concept.name for concept in load_concepts()]),
        np.array(["noto"] * 48),
        np.broadcast_to(np.array([250, 10, 10, 255], np.uint8), (48, 96, 96, 4)),
    )
    renderer = Renderer(art, ("noto",), seed=1)
    occluded = 0
    for number in range(60):
        jpeg, objects = renderer.detection_photo("detection/train", number, 128)
        assert objects
        pixels = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")).astype(int)
        for item in objects:
            mask = item.mask
            inner = mask.copy()
            inner[1:-1, 1:-1] &= mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
            assert np.median(pixels[inner][:, 0]) > 190 and np.median(pixels[inner][:, 1]) < 60
            rows, columns = np.nonzero(mask)
            occluded += mask.sum() < 0.6 * np.ptp(rows) * np.ptp(columns)
    assert occluded > 3


def test_held_out_styles_are_shown_in_detection_only(tiny_world, tmp_path, monkeypatch):
    assert OPTIONS.styles("clean/train") == OPTIONS.styles("detection/val") == tuple(sprites.ART_STYLES)
    options = WorldOptions(seed=5, held_out_styles=("twemoji", "noto"), **TINY)
    for name in scene.SETS:
        held_out = {"twemoji", "noto"}
        expected = held_out if name.startswith("detection") else sprites.ART_STYLES.keys() - held_out
        assert set(options.styles(name)) == expected
    used: dict[bool, set[str]] = {True: set(), False: set()}
    renderers = []
    start = Renderer.__init__

    def recorded(self, art, styles, seed, *rest):
        start(self, art, styles, seed)
        renderers.append(tuple(styles))
        used[set(styles) <= {"twemoji", "noto"}] |= set(styles)

    monkeypatch.setattr(Renderer, "__init__", recorded)
    prepare_miniworld(tmp_path / "world", options, progress=False)
    assert used[True] == {"twemoji", "noto"} and not used[False] & {"twemoji", "noto"} and len(renderers) == 2
    name = "detection/train/000001.jpg"
    assert (tmp_path / "world" / name).read_bytes() != (tiny_world / name).read_bytes()


def test_other_options_for_a_folder_are_refused_naming_them(tiny_world):
    with pytest.raises(OptionsError, match=r"other options: seed is 5 there and 6 now; num_val is 8 .* 9 now"):
        prepare_miniworld(tiny_world, WorldOptions(seed=6, **{**TINY, "num_val": 9}), progress=False)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(OptionsError, match=r"not empty and no mini-world \(it has thesis.tex"):
        prepare_miniworld(tmp_path, OPTIONS, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"held_out_styles": ("clipart",)}, r"no art style \['clipart'\]; there are emojione, "),
        ({"held_out_styles": tuple(sprites.ART_STYLES)}, "leave no artwork of 'frog' for pretraining"),
        (
            {"held_out_styles": ("emojione-v1",)},
            "have no artwork of the detection class 'umbrella'; hold out one of",
        ),
        ({"num_train": 0}, "num_train is 0; it must be at least 1"),
        ({"image_size": 4}, "image_size is 4; it must be at least 16"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
    ],
)
def test_impossible_options_are_refused(arguments, message):
    with pytest.raises(OptionsError, match=message):
        WorldOptions(**arguments)


def test_without_npm_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("WSL_D2_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(sprites.SpriteError, match=r"no npm is on PATH.*install Node.js.*or copy the file sprites-"):
        sprites.load_sprites()


def test_an_altered_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WSL_D2_CACHE", str(tmp_path))
    (tmp_path / "npm").mkdir()
    (tmp_path / "npm" / "iconify-json-noto-1.2.9.tgz").write_bytes(b"other")
    with pytest.raises(sprites.SpriteError, match=r"SHA-256 is .*, expected 3e918d88.*delete it and run again"):
        sprites.fetch_package("noto")


def test_damaged_sprites_are_refused(tmp_path):
    (tmp_path / "sprites.npz").write_bytes(b"PK")
    with pytest.raises(sprites.SpriteError, match="missing or damaged sprites"):
        sprites.read_sprites(tmp_path / "sprites.npz")


def test_tool_prepares_a_world_and_reports_errors(tmp_path, capsys):
    arguments = ["--tiny", "--num-workers", "1", "--num-val", "3", "--output", str(tmp_path / "world")]
    assert tool.main(arguments) == 0
    assert "detection/val: 3 images" in capsys.readouterr().out
    assert json.loads((tmp_path / "world" / "params.json").read_bytes())["num_hashtag_images"] == 64
    assert tool.main([*arguments, "--seed", "1"]) == 2
    assert "seed is 0 there and 1 now" in capsys.readouterr().err


def test_tool_points_to_the_folder_when_training_would_look_elsewhere(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert tool.parse_arguments([]).output == tmp_path / "miniworld"
    monkeypatch.delenv("DETECTRON2_DATASETS")
    arguments = ["--tiny", "--num-workers", "1", "--output", str(tmp_path / "miniworld")]
    assert tool.main(arguments) == 0
    assert f"export DETECTRON2_DATASETS={tmp_path.resolve()}" in capsys.readouterr().out
