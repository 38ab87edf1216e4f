"""Precision, recall, diversity and CMMD against closed forms and directly written sums; CLIP models from folders."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_fixtures import write_clip
from transformers import CLIPModel, CLIPProcessor

from scfm_core.errors import UserError
from scfm_core.train import figures
from scfm_core.train.clip import LocalCLIP
from scfm_core.train.figures import Manifold, cmmd, diversity, precision_recall, seed_distances

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A tiny CLIP model."""
    return write_clip(tmp_path_factory.mktemp("clip") / "clip", tiny / "flux" / "tokenizer")


def normal(count, size, seed=0, dtype=torch.float64):
    return torch.randn(count, size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class TestPrecisionAndRecall:
    def measure(self, generated, reference, k=3):
        return precision_recall(Manifold(generated, k), Manifold(reference, k))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_equal_sets_and_two_sets_far_apart(self, dtype):
        features = normal(40, 8, dtype=dtype)
        assert self.measure(features, features.flip(0)) == (1, 1)
        assert self.measure(features, features + 1000) == (0, 0)

    def test_equal_features_have_distance_zero(self):
        """A collapsed set has balls of radius 0; its only image is inside, whatever its size is."""
        image = 1e4 * normal(1, 64, dtype=torch.float32)
        assert self.measure(image.expand(10, -1), image.expand(20, -1)) == (1, 1)

    def test_a_collapsed_model_has_precision_but_no_recall(self):
        data = normal(400, 4)
        collapsed = data[:1] + 1e-3 * normal(400, 4, seed=1)
        precision, recall = self.measure(collapsed, data)
        assert precision == 1 and recall == 1 / 400
        assert self.measure(data, collapsed) == (recall, precision)

    def test_half_of_two_modes(self):
        modes = torch.cat([normal(100, 3), normal(100, 3, seed=1) + 100])
        precision, recall = self.measure(normal(100, 3), modes)
        assert (precision, recall) == (1, 0.5)

    def test_on_a_line(self):
        """Balls of [0, 1, 2, 10] to the second neighbour have radii 2, 1, 2, 9."""
        reference = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
        assert Manifold(reference, 2).squared_radii.tolist() == [4, 1, 4, 81]
        generated = torch.tensor([[19.0], [19.1], [19.3], [-2.5]])
        assert self.measure(generated, reference, 2) == (0.25, 1)  # the ball of -2.5 has radius 21.6

    def test_chunks_change_nothing(self, monkeypatch):
        generated, reference = normal(50, 5), normal(70, 5, seed=1)
        whole = self.measure(generated, reference)
        monkeypatch.setattr(figures, "_CHUNK", 8)
        assert self.measure(generated, reference) == whole

    def test_too_few_features(self):
        with pytest.raises(ValueError, match="3 features have no neighbour number 3"):
            Manifold(normal(3, 2))


class TestDiversity:
    def test_of_identical_images_is_zero_and_of_the_reference_itself_one(self):
        prompts = ["a", "b", "a", "b", "a"]
        reference = seed_distances(normal(5, 6), prompts)
        assert diversity(reference, reference) == 1
        assert diversity(seed_distances(torch.ones(5, 6), prompts), reference) == 0

    def test_is_the_mean_over_prompts_of_ratios(self):
        """Not the ratio of means: a prompt whose images differ much does not count more."""
        prompts = ["a", "a", "a", "b", "b", "once"]
        reference = seed_distances(torch.tensor([[0.0], [1.0], [2.0], [0.0], [100.0], [7.0]]), prompts)
        assert reference == {"a": pytest.approx(4 / 3), "b": 100}
        own = seed_distances(torch.tensor([[0.0], [0.0], [1.0], [0.0], [25.0], [8.0]]), prompts)
        assert diversity(own, reference) == pytest.approx((1 / 2 + 1 / 4) / 2)

    def test_without_two_images_that_differ_there_is_none(self):
        assert diversity({}, {}) is None
        one = seed_distances(torch.ones(2, 3), ["a", "a"])
        assert diversity(one, one) is None


class TestCMMD:
    def direct(self, first, second):
        """1,000 x Eq. 3 of the paper, pair by pair."""

        def kernel(x, y):
            return math.exp(-float((x - y).square().sum()) / (2 * 10**2))

        m, n = len(first), len(second)
        same = sum(kernel(first[i], first[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
        same += sum(kernel(second[i], second[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        return 1000 * (same - 2 * sum(kernel(x, y) for x in first for y in second) / (m * n))

    def test_of_shifted_gaussians_is_the_double_sum(self, monkeypatch):
        first, second = normal(12, 4), normal(15, 4, seed=1) + 3
        expected = self.direct(first, second)
        assert expected > 50
        assert cmmd(first, second) == pytest.approx(expected, rel=1e-9)
        monkeypatch.setattr(figures, "_CHUNK", 4)
        assert cmmd(first.float(), second.float()) == pytest.approx(expected, rel=1e-5)

    def test_of_one_distribution_is_about_zero(self):
        """Of shifted Gaussians it is 2,000 (1 - exp(-shift^2 / (2 (s^2 + 2)))) (s^2 / (s^2 + 2))^(D / 2) for bandwidth s."""
        sets = [normal(800, 2, seed) for seed in range(3)]
        assert abs(cmmd(sets[0], sets[1])) < 1
        assert cmmd(sets[0], sets[2] + 2**0.5) == pytest.approx(2000 * (1 - math.exp(-4 / 204)) * 100 / 102, rel=0.2)

    def test_one_embedding_is_too_few(self):
        with pytest.raises(ValueError, match="at least two embeddings"):
            cmmd(normal(1, 2), normal(5, 2))


class TestLocalCLIP:
    def load(self, folder, **more):
        return LocalCLIP(str(folder), "evaluate.cmmd_path", CPU, hub_id="owner/clip", **more)

    def test_equals_transformers_own_pass(self, folder):
        images = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8)
        prompts = ["a handwritten digit two", "one", "a " * 50]
        clip = self.load(folder)
        model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
        inputs = processor(
            text=prompts, images=list(images), return_tensors="pt", padding=True, truncation=True, max_length=16
        )
        with torch.no_grad():
            output = model(**inputs)
        torch.testing.assert_close(clip.embed(images).float(), output.image_embeds)
        expected = output.logits_per_image.diagonal().double()  # PickScore: the factor times the cosine
        torch.testing.assert_close(clip.logit_scale * clip.cosines(images, prompts), expected, rtol=1e-5, atol=1e-5)

    def test_weights_in_a_pickle(self, folder, tmp_path):
        """As in openai/clip-vit-large-patch14-336."""
        old = shutil.copytree(folder, tmp_path / "old")
        torch.save(load_file(old / "model.safetensors"), old / "pytorch_model.bin")
        (old / "model.safetensors").unlink()
        images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
        torch.testing.assert_close(self.load(old).embed(images), self.load(folder).embed(images), rtol=0, atol=0)

        class Code:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "ran",))

        torch.save({"weight": Code()}, old / "pytorch_model.bin")
        with pytest.raises(UserError, match="is not a complete CLIP model"):
            self.load(old)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        "fault", ["no folder", "another model", "no weights", "cut weights", "other weights", "no processor"]
    )
    def test_a_folder_that_is_no_clip_model(self, folder, tmp_path, fault):
        bad = shutil.copytree(folder, tmp_path / "bad")
        match fault:
            case "no folder":
                bad, message = "openai/clip-vit-large-patch14", "is not the folder of a model of transformers"
            case "another model":
                (bad / "config.json").write_text(json.dumps({"model_type": "t5"}))
                message = "holds a model of type 't5', not a CLIP model"
            case "no weights":
                (bad / "model.safetensors").unlink()
                message = "is not a complete CLIP model"
            case "cut weights":
                (bad / "model.safetensors").write_bytes((bad / "model.safetensors").read_bytes()[:-8])
                message = "is not a complete CLIP model"
            case "other weights":
                weights = load_file(folder / "model.safetensors")
                save_file(
                    {n: w for n, w in weights.items() if n.startswith("vision")},
                    bad / "model.safetensors",
                    {"format": "pt"},
                )
                message = "lack .* tensors of a CLIP model, such as"
            case "no processor":
                (bad / "preprocessor_config.json").unlink()
                message = "is not a complete CLIP model .* preprocessor_config.json tokenizer_config.json"
        with pytest.raises(UserError, match=rf"(?s)^evaluate.cmmd_path: .*{message}") as caught:
            self.load(bad, processor_id="owner/processor")
        assert f"hf download owner/clip --local-dir {bad}" in str(caught.value)
