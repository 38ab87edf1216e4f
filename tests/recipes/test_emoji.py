"""The benchmark with rich prompts, on a stand-in for the font: drawn shapes in place of glyphs."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from small_emoji import StandIn, make_small

from recipes import emoji_images
from recipes.cli import main
from recipes.emoji_classifier import EmojiClassifier, accuracy_of, extractor, train_classifier, trained_classifier
from recipes.emoji_images import GLYPHS, GROUNDS, NAMES, PLACE, SIZE, SIZES, Drawn, Font, Pair, draw, pair_of, pairs
from recipes.side_by_side import side_by_side
from scfm_core.errors import UserError
from scfm_core.models.encoders import load_tokenizer
from scfm_core.models.families import open_family
from scfm_core.train.parse import load_config


@pytest.fixture
def stand_in():
    return StandIn()


def test_pairs_and_captions():
    seen, held_out = pairs(held_out=False), pairs(held_out=True)
    assert len(GLYPHS) == len(set(NAMES)) >= 200 and len(GROUNDS) == 10
    assert len(held_out) * 4 == len(seen) and not set(held_out) & set(seen)
    for every, count in ((seen, 8), (held_out, 2)):  # each glyph on `count` grounds, each ground equally often
        assert {sum(pair.glyph == glyph for pair in every) for glyph in range(len(GLYPHS))} == {count}
        assert len({sum(pair.ground == ground for pair in every) for ground in range(len(GROUNDS))}) == 1
    captions = [pair.caption for pair in (*seen, *held_out)]
    assert "red apple on a blue background" in captions and len(set(captions)) == len(captions)
    assert [pair_of(caption) for caption in captions] == [*seen, *held_out]
    for wrong in ("", "red apple", "red apple on a mauve background", "red apples on a blue background"):
        assert pair_of(wrong) is None


def test_images(stand_in):
    wanted = [Pair(3, 0), Pair(4, 9)]
    drawn, again = draw(stand_in, wanted, 40), draw(stand_in, wanted[::-1], 2)
    assert drawn.images.shape == (80, 3, SIZE, SIZE) and drawn.pairs[::2] == [wanted[0]] * 40
    assert torch.equal(drawn.images[2], again.images[3])  # a function of pair and copy
    sides = (drawn.boxes[:, 2] * SIZE).round().int()
    assert sides.unique().tolist() == list(SIZES)
    edges = (drawn.boxes[:, :2] * SIZE).int()
    assert (edges % PLACE == 0).all() and len(edges.unique()) == 4  # 0, 4, 8, 12
    for image, (left, upper, side), pair in zip(
        drawn.images.int(), (drawn.boxes * SIZE).int().tolist(), drawn.pairs, strict=True
    ):
        ground = torch.ones(SIZE, SIZE, dtype=torch.bool)
        ground[upper : upper + side, left : left + side] = False
        colours = image[:, ground].unique(dim=1)
        assert colours.shape[1] == 1  # one shade, and nothing of the glyph outside of its box
        told = torch.tensor(list(GROUNDS.values())[pair.ground])
        assert (colours[:, 0] - told).abs().max() <= emoji_images.SHADE
        assert not torch.equal(image[:, upper + side // 2, left + side // 2], colours[:, 0])
    assert len({tuple(image.flatten().tolist()) for image in drawn.images}) == 80


def test_the_classifier_reads_glyph_ground_and_box(stand_in, tmp_path):
    few = [Pair(glyph, ground) for glyph in range(3) for ground in (0, 4)]
    classifier = train_classifier(draw(stand_in, few, 30), steps=30)
    test = draw(stand_in, few, 36)
    test = Drawn(images=test.images[-36:], pairs=test.pairs[-36:], boxes=test.boxes[-36:])
    found = accuracy_of(classifier, test)
    assert found["both"] > 0.8 and found["pixels"] < 4
    classifier.save(tmp_path)
    measured = extractor(tmp_path, torch.device("cpu"))
    images, captions = test.images / 255, [pair.caption for pair in test.pairs]
    assert measured.accuracy is not None and measured.accuracy(images, captions) == pytest.approx(found["both"])
    other = [Pair(pair.glyph, 4 - pair.ground).caption for pair in test.pairs]  # the right glyph on the other ground
    assert measured.accuracy(images, other) < 0.1 and measured.accuracy(images, ["a dog"] * 36) == 0
    features = measured.features(images)
    assert features.shape == (36, 96) and not features.requires_grad
    large = torch.nn.functional.interpolate(images, scale_factor=2, mode="nearest")
    assert torch.allclose(measured.features(large), features, atol=1e-4)


def test_a_missing_font_or_classifier(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(emoji_images, "_PLACES", ("nowhere",))
    with pytest.raises(UserError, match=r"NotoColorEmoji.ttf is missing .*apt-get install fonts-noto-color-emoji"):
        Font()
    (tmp_path / "font.ttf").write_bytes(b"no font")
    assert main(["data", "emoji", "-o", str(tmp_path / "made"), "--font", str(tmp_path / "font.ttf")]) == 2
    assert "has no colour bitmaps of 109 pixels" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"there is no classifier.safetensors in .*scfm data emoji"):
        trained_classifier(tmp_path)
    EmojiClassifier().save(tmp_path)
    (tmp_path / "classifier.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="does not hold weights of EmojiClassifier"):
        trained_classifier(tmp_path)


def test_the_font_has_every_glyph():
    try:
        font = Font()
    except UserError as error:
        pytest.skip(str(error))
    pictures = [font.picture(glyph, 16) for glyph in range(len(GLYPHS))]
    assert len({picture.tobytes() for picture in pictures}) == len(GLYPHS)


def test_from_images_to_a_teacher(tmp_path, monkeypatch, capsys):
    root = tmp_path / "emoji"
    words = make_small(root, monkeypatch)
    assert main(words) == 0
    assert main(words) == 0, "nothing is left to do"
    monkeypatch.chdir(tmp_path)
    same = load_config(root / "pretrain" / "config.yaml", stored=True).train.lr
    assert main([*[word.replace(str(root), "emoji") for word in words], f"train.lr={same}"]) == 0, "the same folder"
    assert main([*words, "train.lr=0.5"]) == 2  # a setting that would have no effect
    assert re.search(r"trained with other settings:\n  train\.lr: \S+ then, 0\.5 now", capsys.readouterr().err)
    told = [json.loads(line)["text"] for line in (root / "train" / "metadata.jsonl").read_text().splitlines()]
    others = [json.loads(line)["text"] for line in (root / "held_out" / "metadata.jsonl").read_text().splitlines()]
    assert told and others and not set(told) & set(others)
    assert set((root / "held_out.txt").read_text().splitlines()) == set(others)
    assert (root / "emoji.png").read_bytes().startswith(b"\x89PNG")
    tokenizer = load_tokenizer(open_family(str(root / "teacher")))
    longest = max((pair.caption for pair in emoji_images.pairs(held_out=True)), key=lambda text: len(text.split()))
    assert len(tokenizer(longest).input_ids) == 8 and tokenizer.unk_token_id not in tokenizer(longest).input_ids

    small = [f"model.path={root / 'teacher'}", f"data.path={root / 'train_cache'}", f"run.dir={tmp_path / 'run'}"]
    small += [f"evaluate.prompts={root / 'held_out.txt'}", f"evaluate.data={root / 'held_out_cache'}"]
    small += [f"evaluate.features_path={root / 'classifier'}", "evaluate.samples=12", "evaluate.per_prompt=2"]
    small += [
        "train.steps=1",
        "train.warmup_steps=0",
        "train.lr=0.1",
        "evaluate.steps=[1]",
        "evaluate.teacher_steps=2",
        "sample.every=0",
    ]
    assert main(["train", "tiny_emoji_distill.yaml", *small]) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert {"fid_teacher", "fid_data", "diversity", "prompt_following"} <= result["student"]["1"].keys()
    assert (
        result["student"]["1"]["data_samples"] == len(others) == 8
    )  # of `evaluate.data`; the data of the run have more

    picture, word = tmp_path / "arms.png", others[0]
    other = tmp_path / "renamed" / "seed-0"
    other.parent.mkdir()
    other.symlink_to(tmp_path / "run")
    side_by_side([tmp_path / "run", other], picture, [word], per_prompt=3, steps=[1, 2], cell=20)
    assert word in capsys.readouterr().out
    sheet = np.asarray(Image.open(picture))
    blocks = [sheet[24:, -right : -right + 60] for right in (204, 136, 68)]  # undistilled, run, renamed
    assert np.array_equal(blocks[1], blocks[2]) and not np.array_equal(blocks[0], blocks[1])
    teacher = [block[52:72] for block in blocks]  # two rows above, and the gap
    assert np.array_equal(teacher[0], teacher[1]) and teacher[0].std() > 0
    with pytest.raises(UserError, match="two of the runs have the name 'run'"):
        side_by_side([tmp_path / "run"] * 2, picture, [word], steps=[1])

    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path.name != ".lock"}
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
