"""The Frechet distance against closed forms and scipy; the two feature extractors."""

import os
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor

from recipes.tiny import caption
from scfm_core.errors import UserError
from scfm_core.train.config import EvaluateConfig
from scfm_core.train.features import DigitClassifier, extract, frechet_distance, load_extractor

CPU = torch.device("cpu")


def gaussian(mean: Tensor, root: Tensor, count: int = 200, seed: int = 0) -> Tensor:
    """`count` features whose sample mean is `mean` and whose sample covariance is `root @ root.T`, to rounding."""
    draws = torch.randn(count, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    centred = draws - draws.mean(0)
    white = torch.linalg.qr(centred).Q * (count - 1) ** 0.5
    return white @ root.T + mean


def random_root(size: int, seed: int) -> Tensor:
    return torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class TestFrechetDistance:
    def test_the_fixture_has_exactly_the_requested_moments(self):
        mean, root = torch.arange(5.0, dtype=torch.float64), random_root(5, 1)
        features = gaussian(mean, root)
        torch.testing.assert_close(features.mean(0), mean)
        torch.testing.assert_close(torch.cov(features.T), root @ root.T)

    def test_equal_sets_have_distance_zero(self):
        features = gaussian(torch.zeros(6), random_root(6, 1))
        assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
        assert frechet_distance(features, features.flip(0)) == pytest.approx(0, abs=1e-9)

    def test_is_never_negative(self):
        """Through rounding the sum may be below zero."""
        for seed in range(20):
            features = 1e3 * torch.randn(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            assert frechet_distance(features, features.flip(0)) >= 0

    def test_a_shift_of_the_mean_counts_with_its_squared_length(self):
        features, shift = gaussian(torch.zeros(4), random_root(4, 1)), torch.tensor([1.0, -2.0, 0.0, 0.5])
        assert frechet_distance(features, features + shift) == pytest.approx(1 + 4 + 0.25)

    def test_diagonal_gaussians(self):
        """|m1 - m2|^2 + sum (s1 - s2)^2."""
        first, second = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 2.0, 0.0]).double()
        mean = torch.tensor([0.0, 1.0, 0.0])
        one = gaussian(torch.zeros(3), first.diag(), seed=1)
        two = gaussian(mean, second.diag(), count=300, seed=2)
        assert frechet_distance(one, two) == pytest.approx(1 + 4 + 0 + 0.25)

    def test_agrees_with_a_general_matrix_square_root(self):
        from scipy.linalg import sqrtm

        first = gaussian(torch.ones(6), random_root(6, 1), seed=1)
        second = gaussian(torch.zeros(6), random_root(6, 2), count=90, seed=2)
        cov1, cov2 = (torch.cov(features.T).numpy() for features in (first, second))
        expected = 6 + (cov1 + cov2 - 2 * sqrtm(cov1 @ cov2).real).trace()
        assert frechet_distance(first, second) == pytest.approx(expected)

    def test_fewer_samples_than_dimensions(self):
        """tr (C1^1/2 C2 C1^1/2)^1/2 is the nuclear norm of X1 X2^T, centred and scaled, for any ranks."""
        first, second = (gaussian(torch.zeros(40), random_root(40, seed), seed=seed)[:12] for seed in (1, 2))
        one, two = ((features - features.mean(0)) / 11**0.5 for features in (first, second))
        nuclear = torch.linalg.svdvals(one @ two.T).sum()
        mean = (first.mean(0) - second.mean(0)).square().sum()
        expected = mean + one.square().sum() + two.square().sum() - 2 * nuclear
        assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-6)

    def test_is_symmetric(self):
        first, second = (
            gaussian(torch.ones(5), random_root(5, 1)),
            gaussian(torch.zeros(5), random_root(5, 2), count=50),
        )
        assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first))

    def test_scales_as_a_square_and_ignores_rotations(self):
        first, second = gaussian(torch.ones(5), random_root(5, 1)), gaussian(torch.zeros(5), random_root(5, 2))
        rotation = torch.linalg.qr(random_root(5, 3)).Q
        distance = frechet_distance(first, second)
        assert frechet_distance(3 * first @ rotation, 3 * second @ rotation) == pytest.approx(9 * distance)

    @pytest.mark.parametrize(("one", "two"), [(1, 5), (5, 1), (0, 5)])
    def test_needs_two_samples_in_each_set(self, one, two):
        with pytest.raises(ValueError, match="at least two samples"):
            frechet_distance(torch.zeros(one, 3), torch.zeros(two, 3))


class TestExtract:
    @pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
    def test_batches_do_not_matter(self, batch_size):
        images = torch.rand(8, 3, 4, 4)
        features = extract(lambda part: part.flatten(1), images, CPU, batch_size)
        assert torch.equal(features, images.flatten(1).double())

    def test_is_double_precision_without_a_graph(self):
        classifier = DigitClassifier()
        features = extract(classifier.features, torch.rand(2, 3, 8, 8), CPU, 2)
        assert features.dtype == torch.float64
        assert not features.requires_grad


class TestClassifier:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        DigitClassifier().save(tmp_path / "deep" / "classifier")
        return tmp_path / "deep" / "classifier"

    def config(self, path: object) -> EvaluateConfig:
        return EvaluateConfig(features="classifier", features_path=None if path is None else str(path))

    def test_is_saved_and_loaded(self, tmp_path):
        classifier, images = DigitClassifier(), torch.rand(5, 3, 16, 16)
        classifier.save(tmp_path)
        features = load_extractor(self.config(tmp_path), CPU).features
        assert torch.equal(features(images), classifier.features(images))
        assert features(images).shape == (5, 64)
        assert classifier(images).shape == (5, 10)

    def test_home_is_expanded(self, folder, monkeypatch):
        monkeypatch.setenv("HOME", str(folder.parent))
        load_extractor(self.config("~/classifier"), CPU)

    def test_sees_grey_at_eight_by_eight(self):
        """Only the means over the channels and over each patch matter."""
        classifier, images = DigitClassifier(), torch.rand(3, 3, 16, 16)
        features = classifier.features(images)
        torch.testing.assert_close(classifier.features(F.avg_pool2d(images, 2)), features)
        torch.testing.assert_close(classifier.features(images.flip(1)), features)
        assert not torch.allclose(classifier.features(images.flip(3)), features)

    def test_logits_come_from_the_features(self):
        classifier, images = DigitClassifier(), torch.rand(3, 3, 8, 8)
        assert torch.equal(classifier(images), classifier.head(classifier.features(images)))

    def test_reads_the_digit_that_the_prompt_names(self, tiny):
        """The last word of a prompt is its digit; a prompt that names none is not followed."""
        accuracy = load_extractor(self.config(tiny / "classifier"), CPU).accuracy
        scans = load_digits()
        images = torch.from_numpy(scans.images / 16).float()[:, None].expand(-1, 3, -1, -1)
        assert accuracy(images, [caption(digit) for digit in scans.target]) > 0.8
        assert accuracy(images, [caption((digit + 1) % 10) for digit in scans.target]) < 0.1
        assert accuracy(images[:3], ["a dog", "", caption(scans.target[2])]) in (0, pytest.approx(1 / 3))

    def test_a_folder_without_a_classifier(self, tmp_path):
        with pytest.raises(
            UserError, match=rf"evaluate\.features_path: there is no classifier\.safetensors in '{tmp_path}'"
        ):
            load_extractor(self.config(tmp_path), CPU)

    def test_no_path(self):
        with pytest.raises(UserError, match=r"evaluate\.features_path"):
            load_extractor(self.config(None), CPU)

    @pytest.mark.parametrize("damage", ["not safetensors", "cut", "other names", "other shapes"])
    def test_damaged(self, folder, damage):
        file = folder / "classifier.safetensors"
        match damage:
            case "not safetensors":
                file.write_bytes(b"<html>404 not found</html>")
            case "cut":
                file.write_bytes(file.read_bytes()[:-8])
            case "other names":
                save_file({"weight": torch.zeros(2)}, file)
            case "other shapes":
                save_file({name: tensor[:1] for name, tensor in DigitClassifier().state_dict().items()}, file)
        with pytest.raises(UserError, match=rf"evaluate\.features_path.*{folder}"):
            load_extractor(self.config(folder), CPU)


class Bomb:
    """Unpickling it creates a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the layout of the published file, scaled so that a signal passes through the network."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    pytest.importorskip("torchmetrics.image.fid")
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        state = module.FeatureExtractorInceptionV3("x", ["2048"], str(path)).state_dict()
    generator = torch.Generator().manual_seed(0)
    for tensor in state.values():
        if tensor.ndim == 4:
            tensor.normal_(std=(2 / tensor[0].numel()) ** 0.5, generator=generator)
    torch.save(state, path)
    return path


class TestInception:
    def config(self, path: object) -> EvaluateConfig:
        return EvaluateConfig(features="inception", features_path=None if path is None else str(path))

    def test_features_of_images(self, weights):
        features = load_extractor(self.config(weights), CPU).features
        images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        images[3] = images[0]
        found = extract(features, images, CPU, batch_size=2)
        assert found.shape == (4, 2048)
        assert found.isfinite().all()
        torch.testing.assert_close(found[3], found[0])
        assert F.mse_loss(found[1], found[0]) > 1e-3 * found[0].var()

    def test_images_are_rounded_to_the_nearest_of_256_levels(self, weights):
        features = load_extractor(self.config(weights), CPU).features
        levels = torch.randint(1, 255, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0)).float()
        exact = features(levels / 255)
        assert torch.equal(features((levels + 0.4) / 255), exact)
        assert torch.equal(features((levels - 0.4) / 255), exact)
        assert not torch.equal(features((levels + 0.6) / 255), exact)

    @pytest.mark.parametrize("path", [None, "nowhere.pth"])
    def test_missing_weights(self, path):
        pytest.importorskip("torchmetrics")
        with pytest.raises(UserError, match=r"evaluate\.features_path must name Inception's weights.*=classifier"):
            load_extractor(self.config(path), CPU)

    def test_the_message_names_the_weights_that_the_package_loads(self):
        pytest.importorskip("torchmetrics")
        module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
        with pytest.raises(UserError, match=re.escape(module.URL_INCEPTION_V3)):
            load_extractor(self.config(None), CPU)

    def test_missing_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
        with pytest.raises(UserError, match=r"pip install 'scfm\[evaluate\]'"):
            load_extractor(self.config(None), CPU)

    def test_missing_second_package(self, weights, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch_fidelity", None)
        monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
        with pytest.raises(UserError, match=r"pip install 'scfm\[evaluate\]'"):
            load_extractor(self.config(weights), CPU)

    @pytest.mark.parametrize("content", ["html", "another network"])
    def test_a_file_with_other_content(self, weights, tmp_path, content):
        path = tmp_path / "weights.pth"
        if content == "html":
            path.write_bytes(b"<html>404 not found</html>")
        else:
            torch.save({"weight": torch.zeros(2)}, path)
        with pytest.raises(UserError, match=rf"evaluate\.features_path.*{path}"):
            load_extractor(self.config(path), CPU)

    @pytest.mark.parametrize("write", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb, protocol=2))])
    def test_code_in_a_weights_file_is_not_executed(self, weights, tmp_path, write):
        write(Bomb(tmp_path / "executed"), tmp_path / "weights.pth")
        with pytest.raises(UserError, match=r"evaluate\.features_path"):
            load_extractor(self.config(tmp_path / "weights.pth"), CPU)
        assert not (tmp_path / "executed").exists()
