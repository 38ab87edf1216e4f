import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from scfm_core.kernels.fp8 import fits, fp8_linear
from scfm_core.models.adapters import ADAPTERS, LoRABank, LoRAConfig, join, linears, merge
from scfm_core.models.families import open_family
from scfm_core.models.quantised import quantise_onto
from scfm_core.train.trace import trace_forward


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 5))

    def forward(self, x):
        return self.block(self.embed(x))


def make_bank(dtype=torch.float32, *, with_fake=False, **config):
    torch.manual_seed(0)
    network = Net().to(dtype)
    bank = LoRABank(network, LoRAConfig(**{"rank": 3, "alpha": 6.0, **config}), seed=1, with_fake=with_fake)
    generator = torch.Generator().manual_seed(2)
    for adapter in bank.adapters:
        for parameter in bank.parameters(adapter).values():
            parameter.data.normal_(generator=generator)
    return bank


def merged_network(bank, adapter, strength):
    network = Net()
    state = {name.replace("base_layer.", ""): p for name, p in bank.network.state_dict().items() if "lora" not in name}
    scale = strength * bank.config.alpha / bank.config.rank
    merged = {
        f"{name}.weight": merge(state[f"{name}.weight"], *bank.layers[name].factors(adapter), scale)
        for name in bank.layers
    }
    network.load_state_dict(state | merged)
    return network


def test_student_starts_as_the_teacher_and_the_emas_as_the_student():
    torch.manual_seed(0)
    network = Net()
    x = torch.randn(4, 6)
    before = network(x)
    bank = LoRABank(network, LoRAConfig(rank=3, alpha=3.0))
    bank.select("student", torch.ones(4))
    assert torch.equal(network(x), before)
    for name, parameter in bank.parameters("student").items():
        assert torch.equal(parameter, bank.parameters("ema_fast")[name])
        assert torch.equal(parameter, bank.parameters("ema_slow")[name])


def test_a_fake_score_is_drawn_like_the_others_and_changes_none_of_them():
    without, with_fake = (LoRABank(Net(), LoRAConfig(rank=3), seed=5, with_fake=fake) for fake in (False, True))
    assert with_fake.adapters == (*without.adapters, "fake")
    for adapter in with_fake.adapters:
        for name, parameter in with_fake.parameters(adapter).items():
            assert torch.equal(parameter, without.parameters("student")[name])
            assert parameter.requires_grad is (adapter in ("student", "fake"))


@pytest.mark.parametrize("shape", [(4, 6), (4, 7, 6)])
def test_each_row_runs_at_its_own_strength(shape):
    bank = make_bank()
    x, strengths = torch.randn(shape), torch.tensor([0.0, 0.3, 1.0, 1.6])
    bank.select("ema_fast", strengths)
    together = bank.network(x)
    for row, strength in enumerate(strengths.tolist()):
        alone = merged_network(bank, "ema_fast", strength)(x[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_strength_zero_is_bitwise_the_base():
    bank = make_bank(torch.bfloat16)
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    bank.select(None)
    base = bank.network(x)
    bank.select("student", torch.zeros(3))
    assert torch.equal(bank.network(x), base)


def test_adapters_do_not_see_each_other():
    bank = make_bank()
    x, ones = torch.randn(2, 6), torch.ones(2)
    bank.select("ema_slow", ones)
    before = bank.network(x)
    for parameter in bank.parameters("student").values():
        parameter.data.add_(1)
    assert torch.equal(bank.network(x), before)
    bank.select("student", ones)
    assert not torch.allclose(bank.network(x), before)


def test_only_the_student_is_trained_and_in_fp32_over_a_bf16_base():
    bank = make_bank(torch.bfloat16)
    bank.select("student", torch.ones(2))
    bank.network(torch.randn(2, 6, dtype=torch.bfloat16)).sum().backward()
    trained = {name for name, p in bank.network.named_parameters() if p.grad is not None}
    assert len(trained) == 2 * len(bank.layers)
    assert all(".student." in name for name in trained)
    assert {p.dtype for a in ADAPTERS for p in bank.parameters(a).values()} == {torch.float32}
    assert all(p.grad.dtype == torch.float32 for p in bank.parameters("student").values())


def test_same_output_and_gradient_as_peft():
    from peft import LoraConfig, get_peft_model

    bank = make_bank()
    torch.manual_seed(0)
    peft = get_peft_model(Net(), LoraConfig(r=3, lora_alpha=6.0, target_modules=["embed", "block.0", "block.2"]))
    names = {name.replace("base_model.model.", "").replace(".default", ""): p for name, p in peft.named_parameters()}
    ours = bank.parameters("student")
    for name, parameter in ours.items():
        names[name].data.copy_(parameter)
    x = torch.randn(5, 6)
    bank.select("student", torch.ones(5))
    mine, theirs = bank.network(x), peft(x)
    torch.testing.assert_close(mine, theirs)
    mine.square().sum().backward()
    theirs.square().sum().backward()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, names[name].grad)


@pytest.mark.parametrize(("init", "of_peft"), [("kaiming", True), ("gaussian", "gaussian")])
def test_initial_factors_are_drawn_as_in_peft(init, of_peft):
    from peft import LoraConfig, get_peft_model

    bank = LoRABank(Net(), LoRAConfig(rank=3, init=init), seed=5)
    peft = get_peft_model(Net(), LoraConfig(r=3, target_modules=["embed", "block.0", "block.2"]))
    torch.manual_seed(5)
    for name, layer in bank.layers.items():  # PEFT's own function, called in our order of layers
        theirs = peft.base_model.model.get_submodule(name)
        theirs.reset_lora_parameters("default", of_peft)
        for adapter in ADAPTERS:
            down, up = layer.factors(adapter)
            torch.testing.assert_close(down, theirs.lora_A["default"].weight)
            assert torch.equal(up, theirs.lora_B["default"].weight)


@pytest.mark.parametrize(
    ("init", "inputs", "std"),
    [("gaussian", 3072, 1 / 64), ("gaussian", 64, 1 / 64), ("kaiming", 3072, (3 * 3072) ** -0.5)],
)
def test_standard_deviation_of_the_initial_factors(init, inputs, std):
    bank = LoRABank(nn.Sequential(nn.Linear(inputs, 4)), LoRAConfig(rank=64, init=init))
    down, _ = bank.layers["0"].factors("student")
    error = std / (2 * down.numel()) ** 0.5  # standard error of a normal sample's deviation; a uniform one's is smaller
    assert abs(down.std().item() - std) < 4 * error
    assert abs(down.mean().item()) < 4 * std / down.numel() ** 0.5


class TestCopies:
    """One set of bf16 factors, cast at the start of each pass."""

    @pytest.fixture
    def bank(self):
        bank = make_bank(torch.bfloat16)
        bank.keep_copies()
        return bank

    def run(self, bank, role, x):
        bank.select(role, torch.tensor([0.3, 1.0]))
        return bank.network(x)

    def test_outputs_and_gradients_are_those_of_casts_in_each_layer(self, bank):
        plain, x = make_bank(torch.bfloat16), torch.randn(2, 7, 6, dtype=torch.bfloat16)
        for role in ADAPTERS:
            assert torch.equal(self.run(bank, role, x), self.run(plain, role, x))
        for one in (bank, plain):
            self.run(one, "student", x).float().square().sum().backward()
        for name, factor in plain.parameters("student").items():
            gradient = bank.parameters("student")[name].grad
            assert gradient.dtype == torch.float32 and torch.equal(gradient, factor.grad)

    def test_a_pass_casts_once_and_sees_every_change_of_the_masters(self, bank):
        class Casts(TorchDispatchMode):
            def __torch_dispatch__(self, op, types, args=(), kwargs=None):
                if op in (torch.ops.aten._foreach_copy_.default, torch.ops.aten._to_copy.default):
                    seen.append(op)
                return op(*args, **(kwargs or {}))

        x = torch.randn(2, 6, dtype=torch.bfloat16)
        for change in (torch.no_grad, torch.inference_mode):
            seen = []
            with change():
                before = self.run(bank, "ema_slow", x)
                for factor in bank.parameters("ema_slow").values():
                    factor.data.mul_(2)  # no version counter sees this
                with Casts():
                    after = self.run(bank, "ema_slow", x)
            assert seen == [torch.ops.aten._foreach_copy_.default]
            assert torch.equal(after, self.run(self.with_factors(bank), "ema_slow", x))
            assert not torch.equal(after, before)

    def with_factors(self, bank):
        """A bank without copies that has the factors of `bank`."""
        plain = make_bank(torch.bfloat16)
        for role in ADAPTERS:
            for name, factor in plain.parameters(role).items():
                factor.data.copy_(bank.parameters(role)[name])
        return plain

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_another_pass_before_the_backward_is_an_error(self, bank, mode):
        x = torch.randn(2, 6, dtype=torch.bfloat16)
        loss = self.run(bank, "student", x).sum()
        with mode():
            self.run(bank, "ema_fast", x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_the_students_own_copies_outlast_other_passes(self, mode):
        bank, plain, x = make_bank(torch.bfloat16), make_bank(torch.bfloat16), torch.randn(2, 6, dtype=torch.bfloat16)
        bank.keep_copies(of_student=True)
        loss = self.run(bank, "student", x).float().square().sum()
        with mode():
            for role in ADAPTERS:
                assert torch.equal(self.run(bank, role, x), self.run(plain, role, x))
        loss.backward()
        self.run(plain, "student", x).float().square().sum().backward()
        for name, factor in plain.parameters("student").items():
            assert torch.equal(bank.parameters("student")[name].grad, factor.grad)

    @pytest.mark.parametrize("of_student", [False, True])
    def test_two_trained_adapters_get_each_its_own_gradients(self, of_student):
        plain, bank = (make_bank(torch.bfloat16, with_fake=True) for _ in range(2))
        bank.keep_copies(of_student=of_student)
        x = torch.randn(2, 6, dtype=torch.bfloat16)
        for one in (plain, bank):
            for role, other in (("student", "fake"), ("fake", "student")):
                before = [parameter.grad for parameter in one.parameters(other).values()]
                self.run(one, role, x).float().square().sum().backward()
                assert all(a is b.grad for a, b in zip(before, one.parameters(other).values(), strict=True))
        for role in ("student", "fake"):
            for name, factor in plain.parameters(role).items():
                assert factor.grad is not None and torch.equal(bank.parameters(role)[name].grad, factor.grad)
        assert not any(parameter.requires_grad for parameter in bank.parameters("ema_fast").values())

    def test_factors_in_the_dtype_of_the_products_are_used_as_they_are(self):
        bank = make_bank()
        bank.keep_copies()
        assert all(layer.copies is None for layer in bank.layers.values())

    def test_neither_names_nor_checkpoints_change(self, bank):
        assert bank.network.state_dict().keys() == make_bank().network.state_dict().keys()


class Projections(nn.Module):
    """Three linears of the same input."""

    def __init__(self, bias=True):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(6, width, bias=bias) for width in (8, 8, 4))

    def forward(self, x):
        return torch.cat(linears(x, (self.query, self.key, self.value)), dim=-1)


class TestJoined:
    """Linears of one input as one operation."""

    def make(self, dtype=torch.float32, *, bias=True, copies=False, targets=".*", base="bfloat16"):
        torch.manual_seed(0)
        network = Projections(bias).to(dtype)
        bank = LoRABank(network, LoRAConfig(rank=3, alpha=6.0, targets=targets), seed=1)
        for adapter in ADAPTERS:
            for parameter in bank.parameters(adapter).values():
                parameter.data.normal_()
        quantise_onto(network, base, "cpu")
        if copies:
            join((network.query, network.key, network.value))
            bank.keep_copies()
        bank.select("student", torch.tensor([0.3, 1.0]))
        return bank

    def run(self, function, bank, dtype):
        x = torch.linspace(-1, 1, 84).view(2, 7, 6).to(dtype).requires_grad_()
        result = function(x)
        bank.network.zero_grad()
        (result * torch.linspace(-1, 1, result.shape[-1])).float().sum().backward()
        return [result, x.grad, *(factor.grad for factor in bank.parameters("student").values())]

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"bias": False},
            {"dtype": torch.bfloat16},
            {"dtype": torch.bfloat16, "copies": True},
            {"targets": "key"},
            {"base": "int8"},
            {"base": "int8", "targets": "key"},
        ],
        ids=[
            "fp32",
            "no bias",
            "bf16",
            "bf16 with copies",
            "not all are adapted",
            "packed",
            "packed, not all are adapted",
        ],
    )
    def test_results_and_gradients_are_those_of_the_layers_one_by_one(self, options):
        bank, dtype = self.make(**options), options.get("dtype", torch.float32)
        layers = list(bank.network.children())
        alone = self.run(lambda x: torch.cat([layer(x) for layer in layers], dim=-1), bank, dtype)
        for one, other in zip(self.run(bank.network, bank, dtype), alone, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(
                one,
                other,
                rtol=1e-2 if dtype == torch.bfloat16 else 1e-5,
                atol=1e-2 if dtype == torch.bfloat16 else 1e-5,
            )

    def test_the_copies_of_joined_layers_are_adjacent(self):
        bank = self.make(torch.bfloat16, copies=True)
        downs = [layer.copies[0] for layer in bank.layers.values()]
        assert [down.data_ptr() for down in downs] == [downs[0].data_ptr() + 2 * n * downs[0].numel() for n in range(3)]
        for layer in bank.layers.values():
            for copy, master in zip(layer.copies, layer.factors("student"), strict=True):
                assert torch.equal(copy, master.bfloat16())


class TestFp8:
    """Passes without gradient over a base in fp8."""

    @pytest.fixture
    def bank(self):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 40))
        bank = LoRABank(network, LoRAConfig(rank=4, alpha=4.0))
        for parameter in bank.parameters("student").values():
            parameter.data.normal_(std=0.1)
        bank.quantise({"0": 7, "2": 7})
        return bank

    @pytest.mark.parametrize("adapter", [None, "student"])
    @torch.no_grad()
    def test_only_the_quantised_linear_changes_and_only_on_request(self, bank, adapter):
        """tests/kernels/test_fp8.py holds the error of `fp8_linear` to that of its roundings."""
        x = torch.randn(3, 7, 32)
        strength = None if adapter is None else torch.tensor([0.0, 0.5, 1.0])
        first, _, second = bank.network
        outputs = []
        for in_fp8 in (False, True, False):
            bank.select(adapter, strength, in_fp8=in_fp8)
            outputs.append(bank.network(x))
        assert torch.equal(outputs[0], outputs[2])
        hidden = fp8_linear(x, first.fp8, first.base_layer.bias)
        if adapter is not None:
            down, up = first.factors(adapter)
            hidden = hidden + strength[:, None, None] * (x @ down.T @ up.T)
        expected = second(nn.functional.gelu(hidden))  # as selected last: not in fp8
        torch.testing.assert_close(outputs[1], expected)
        assert (outputs[1] - outputs[0]).norm() > 0.005 * outputs[0].norm()

    def test_unsupported_shapes_are_not_quantised(self, bank):
        assert bank.layers["0"].fp8 is not None and bank.layers["2"].fp8 is None  # 40 is not a multiple of 16

    def test_modulations_are_not_quantised(self, tiny):
        family = open_family(str(tiny / "flux"))
        bank = LoRABank(family.load_network(torch.float32, "cpu"), LoRAConfig(rank=2))
        bank.quantise(trace_forward(family, family.meta_network(), family.latent_shape(16, 16), 8).rows)
        kept = {name for name, layer in bank.layers.items() if layer.fp8 is None and fits(layer.base_layer.weight)}
        assert kept and all("norm" in name or "time_text_embed" in name for name in kept)
        assert bank.layers["transformer_blocks.0.attn.to_q"].fp8 is not None

    def test_the_state_dict_does_not_contain_it(self, bank):
        assert not any("fp8" in name for name in bank.network.state_dict())


def test_targets_pick_linears_by_full_name():
    network = Net()
    bank = LoRABank(network, LoRAConfig(rank=2, targets=r"block\.\d+"))
    assert list(bank.layers) == ["block.0", "block.2"]
    with pytest.raises(ValueError, match="matches none"):
        LoRABank(Net(), LoRAConfig(targets="attn"))
