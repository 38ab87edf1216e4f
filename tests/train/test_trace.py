"""The traced step against closed forms, and the quick estimate against the traced step."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from recipes.cli import main
from recipes.train import describe
from scfm_core.errors import UserError
from scfm_core.models.families import FAMILIES
from scfm_core.train.activations import activations_of
from scfm_core.train.assemble import build_family
from scfm_core.train.estimate import estimate
from scfm_core.train.parse import load_config
from scfm_core.train.roofline import CARDS, LAUNCH, roofline, seconds
from scfm_core.train.trace_device import as_gpu
from scfm_core.train.trace_memory import reserved_bytes
from scfm_core.train.trace_mode import Recorder
from scfm_core.train.trace_ops import ATTENTION, BASE, COMPILED, ELEMENTWISE, Operation
from scfm_core.train.trace_step import trace_step

MIB = 2**20
FLOW_MAP = "method={teacher_fraction: 0, flow_map_fraction: 1, flow_map: {noise_fraction: 1, difference: central}, step_gain: {gamma: 0.5}}"

MATCHING = "method={teacher_fraction: 0, matching_fraction: 1, matching: {whole_fraction: 1, every: 1, warmup: 5}, step_gain: {gamma: 0.5}}"


@pytest.fixture
def few_blocks(monkeypatch):
    """Three blocks in each list of every known architecture, of their true width."""
    for family in FAMILIES:
        for known in family.known.values():
            for name in ("num_layers", "num_single_layers", "n_layers"):
                if name in known["transformer"]:
                    monkeypatch.setitem(known["transformer"], name, 3)


def recorded(call, **options):
    """The recorder of `call(recorder)`, in the phase of the student's pass."""
    recorder = Recorder(**options)
    with as_gpu(recorder), recorder, recorder.within("student"):
        recorder.is_on = True
        call(recorder)
        recorder.is_on = False
    return recorder


@pytest.mark.parametrize(
    ("recipe", "world", "words"),
    [
        ("flux_dev_lora", 1, ["train.activation_checkpointing=none", "train.compile=false"]),
        ("flux_dev_lora", 1, ["train.activation_checkpointing=full", "model.base=nf4"]),
        ("flux_dev_full", 8, []),
        ("flux_dev_full", 64, ["engine.shard=8", "train.global_batch_size=64"]),
        ("sd35_large_lora", 1, []),
        ("krea2_lora", 1, []),
        ("flux_dev_lora", 1, [MATCHING, "train.micro_batch_size=2"]),
        ("flux_dev_lora", 1, [FLOW_MAP, "train.micro_batch_size=2", "train.activation_checkpointing=full"]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_quick_estimate_is_within_a_tenth_of_the_trace(few_blocks, recipe, world, words):
    config = load_config(f"{recipe}.yaml", words)
    traced = trace_step(config, world=world)
    formula = estimate(config, build_family(config, offline=True), world)
    assert sum(formula.memory.values()) == pytest.approx(traced.peak, rel=0.1)
    samples = traced.micro_batches * traced.micro_batch_size
    # With one row in a micro-batch, full weights run teacher and fast EMA, one of them on a row that does not need it.
    assert formula.step_flops * samples == pytest.approx(traced.flops, rel=0.2 if recipe == "flux_dev_full" else 0.05)
    assert traced.peak == sum(traced.peak_by_part.values()) <= traced.reserved
    assert traced.reads == 1
    assert ("reduce_scatter_base" in traced.collectives) == (world > 1)


@pytest.mark.parametrize("words", [[], [MATCHING]], ids=["lora", "with a fake score"])
def test_what_is_in_memory_before_the_step_is_exact(few_blocks, words):
    config = load_config("flux_dev_lora.yaml", words)
    traced = trace_step(config, micro_batches=1)
    formula = estimate(config, build_family(config, offline=True), traced=traced)
    assert formula.memory["frozen base"] == pytest.approx(traced.peak_by_part["frozen base"], rel=1e-3)
    names = {"Adam": "Adam (fp32)", "student": "student (fp32)", "EMAs": "EMAs, fast and slow (fp32)"}
    names |= {"fake score": "fake score (fp32)"} if words else {}
    for part, name in names.items():
        assert traced.peak_by_part[part] == pytest.approx(formula.memory[name], rel=0.01)
    assert formula.cards[0].settings == () and formula.cards[0].memory == traced.peak
    assert formula.step_flops == traced.flops / traced.micro_batch_size


def test_checkpointing_saves_less(few_blocks):
    config = load_config("flux_dev_lora.yaml")
    family = build_family(config, offline=True)

    def saved(mode):
        train = dataclasses.replace(config.train, activation_checkpointing=mode)
        return activations_of(dataclasses.replace(config, train=train), family).saved

    assert saved("none") > 1.5 * saved("selective") > 6 * saved("full") > 0


def test_operators_have_their_bytes_and_flops():
    def call(_):
        x = torch.empty(32, 64, device="meta", dtype=torch.bfloat16)
        y = F.linear(x, torch.empty(128, 64, device="meta", dtype=torch.bfloat16))
        y.add_(1)
        y.t().sum()

    product, added, total = recorded(call).operators()
    assert product == Operation(
        "student", BASE, "aten::mm", 1, 1, 2 * (32 * 64 + 64 * 128 + 32 * 128), 2 * 32 * 64 * 128
    )
    assert added == Operation("student", ELEMENTWISE, "aten::add_", 1, 1, 2 * 2 * 32 * 128, 0)
    assert (total.op, total.bytes) == ("aten::sum", 2 * 32 * 128 + 2)


def test_an_output_that_is_given_is_only_written():
    packed = torch.empty(32, 64, device="meta", dtype=torch.int8)
    scale, result = (torch.empty(*shape, device="meta", dtype=torch.bfloat16) for shape in ((32, 1), (32, 64)))
    (product,) = recorded(lambda _: torch.mul(packed, scale, out=result)).operators()
    assert product.bytes == (1 + 2) * 32 * 64 + 2 * 32


def test_a_compiled_region_reads_its_inputs_and_writes_what_is_kept_once():
    def call(recorder):
        x = torch.empty(1000, device="meta")
        kept = (x * 2).sin()
        torch.mm(torch.empty(8, 8, device="meta"), torch.empty(8, 8, device="meta"))
        del kept

    region, product = recorded(call, compiled=True).operators()
    assert (region.group, region.launches, region.bytes) == (COMPILED, 1, 4000 + 4000)
    assert product.group == BASE


@pytest.mark.parametrize(("backend", "name"), [("FLASH_ATTENTION", "flash"), ("CUDNN_ATTENTION", "cudnn")])
def test_attention_is_one_kernel_as_on_a_gpu(backend, name):
    def call(_):
        q, k, v = (torch.empty(2, 4, 16, 64, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        with sdpa_kernel(getattr(SDPBackend, backend)):
            F.scaled_dot_product_attention(q, k, v).sum().backward()

    found = [operation for operation in recorded(call).operators() if operation.group == ATTENTION]
    assert [operation.op for operation in found] == [
        f"aten::_scaled_dot_product_{name}_attention",
        f"aten::_scaled_dot_product_{name}_attention_backward",
    ]
    assert [operation.flops for operation in found] == [4 * 2 * 4 * 16 * 16 * 64, 10 * 2 * 4 * 16 * 16 * 64]


def test_autocast_runs_products_in_bf16_and_norms_in_fp32():
    def call(_):
        x, weight = torch.empty(4, 8, device="meta"), torch.empty(8, 8, device="meta", requires_grad=True)
        with torch.autocast("meta", dtype=torch.bfloat16):
            y = F.linear(x, weight)
            assert y.dtype == torch.bfloat16
            assert F.layer_norm(y, (8,)).dtype == torch.float32
        assert F.linear(x, weight).dtype == torch.float32

    recorded(call)


def test_a_trace_leaves_pytorch_as_it_was():
    before = torch.autocast, torch.UntypedStorage.resize_, torch.clear_autocast_cache
    recorded(lambda _: None)
    assert before == (torch.autocast, torch.UntypedStorage.resize_, torch.clear_autocast_cache)
    assert not hasattr(torch, "meta")


def test_the_peak_is_that_of_living_tensors():
    def call(recorder):
        recorder.memory.start()
        recorder.memory.part = "kept"
        kept = torch.empty(MIB, device="meta", dtype=torch.uint8)
        recorder.memory.part = "temporary"
        torch.empty(2 * MIB, device="meta", dtype=torch.uint8)
        torch.empty(3 * MIB, device="meta", dtype=torch.uint8).view(3, -1)
        assert recorder.memory.total == kept.nbytes
        del kept

    memory = recorded(call).memory
    assert (memory.total, memory.peak) == (0, 4 * MIB)
    assert memory.peak_by_part() == {"temporary": 3 * MIB, "kept": MIB}


@pytest.mark.parametrize(
    ("events", "reserved"),
    [
        ([(1, 512, 0)], 2 * MIB),
        ([(1, 3 * MIB, 0)], 20 * MIB),
        ([(1, 11 * MIB + 512, 0)], 12 * MIB),
        ([(1, 3 * MIB, 0), (2, 3 * MIB, 0)], 20 * MIB),
        ([(1, 3 * MIB, 0), (2, 3 * MIB, 1)], 40 * MIB),  # another stream
        ([(1, 12 * MIB, 0), (1, 0, 0), (2, 12 * MIB, 0)], 12 * MIB),  # used again
        ([(1, 6 * MIB, 0), (2, 6 * MIB, 0), (1, 0, 0), (2, 0, 0), (3, 20 * MIB, 0)], 20 * MIB),  # merged again
        ([(1, 12 * MIB, 0), (2, 12 * MIB, 0), (1, 0, 0), (2, 0, 0), (3, 24 * MIB, 0)], 48 * MIB),  # other segments
    ],
)
def test_reserved_memory_is_that_of_the_caching_allocator(events, reserved):
    assert reserved_bytes(events) == reserved


def test_the_roofline_takes_what_lasts_longest():
    card = CARDS["A100 80 GB"]
    operations = {
        LAUNCH: Operation("far", BASE, "aten::mm", 1, 1, 8.0, 8.0),
        1.0: Operation("far", BASE, "aten::mm", 1, 1, 0.5 * card.bandwidth, card.bf16),
        2.0: Operation("far", ELEMENTWISE, "aten::add", 1, 1, 2 * card.bandwidth, 0.0),
    }
    for expected, operation in operations.items():
        assert seconds(operation, card) == pytest.approx(expected)
    traced = dataclasses.make_dataclass("Traced", ["operators"])(list(operations.values()))
    assert roofline(traced, card) == {ELEMENTWISE: pytest.approx(2.0), BASE: pytest.approx(1.0 + LAUNCH)}
    assert roofline(traced, card, at_peak=False)[ELEMENTWISE] == pytest.approx(2.0 / 0.85)


def test_a_run_that_cannot_be_traced_says_so(few_blocks, capsys):
    config = load_config("flux_dev_lora.yaml", ["engine.name=deepspeed", "engine.shard=-1"])
    with pytest.raises(UserError, match="DeepSpeed's step does not run on meta tensors"):
        trace_step(config)
    assert main(["train", "flux_dev_lora", "--dry-run", "engine.name=deepspeed", "engine.shard=-1"]) == 0
    page = capsys.readouterr().out
    assert "not traced, all by formula: DeepSpeed's step" in page and "traced  " not in page


@pytest.mark.parametrize(
    "words", [["model.base=int8"], ["model.offload_blocks=2"], ["kernels.fp8=true"], ["kernels.cuda_graphs=true"]]
)
def test_a_dry_run_refuses_what_two_processes_refuse(words):
    """The launcher has not started them: `--gpus` says how many there will be."""
    config = load_config("flux_dev_lora.yaml", ["engine.shard=-1", *words])
    refused = pytest.raises(UserError, match=rf"^{words[0]} cannot run here: the base is sharded; set engine\.shard=1")
    for run in (
        lambda: describe(config, 2),
        lambda: describe(config, 2, by_formula=True),
        lambda: trace_step(config, world=2),
    ):
        with refused:
            run()


def test_a_dry_run_prints_the_trace(few_blocks, capsys):
    assert main(["train", "flux_dev_lora", "--dry-run"]) == 0
    page = capsys.readouterr().out
    for words in (
        "memory of one GPU at the peak, traced: 2 micro-batches",
        "  saved activations  ",
        "  reserved  ",
        "RTX 4090",
        "the host waits 1 time",
        "kernels     fused Triton kernels (assumed), flash attention (assumed), in the trace",
        "eager, although train.compile=true",
        "without expandable segments",
        "  hours of this run, at these",
    ):
        assert words in page
    assert "this CPU" not in page
    assert main(["train", "flux_dev_lora", "--dry-run", "--estimate"]) == 0
    page = capsys.readouterr().out
    assert "memory of one GPU, by formula" in page and "roofline" not in page
    assert main(["train", "flux_dev_lora", "--estimate"]) != 0
    assert "--estimate works only with --dry-run" in capsys.readouterr().err
