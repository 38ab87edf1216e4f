"""The plan on paper: traffic, time and saves by closed forms; docs/scale.md shows its figures."""

import math

import pytest

from recipes import scale_docs
from scfm_core.train.parse import load_config
from scfm_core.train.scale import Cluster, Exchange, Phase, SavePlan, StepPlan, plan_start, plan_step

CLUSTER = Cluster(
    gpus=8, nvlink=200e9, network=25e9, call_latency=0.0, nvlink_latency=0.0, network_latency=0.0, node_hours=1000.0
)


def exchange(kind="all-gather", size=8e9, ranks=8, nodes=1, calls=4):
    return Exchange(what="weights", kind=kind, size=size, ranks=ranks, nodes=nodes, calls=calls)


class TestExchange:
    @pytest.mark.parametrize(("kind", "sent"), [("all-gather", 7e9), ("reduce-scatter", 7e9), ("all-reduce", 14e9)])
    def test_a_ring_sends_all_parts_but_ones_own(self, kind, sent):
        assert exchange(kind).sent == sent
        assert exchange(kind).seconds(CLUSTER) == pytest.approx(sent / 200e9)

    @pytest.mark.parametrize(
        ("ranks", "nodes", "bandwidth"),
        [(64, 8, 200e9), (16, 4, 100e9), (8, 8, 25e9)],
        ids=["all eight cards of a node, as fast as NVLink", "four cards", "one card"],
    )
    def test_the_cards_of_a_node_share_a_ring(self, ranks, nodes, bandwidth):
        each = exchange(ranks=ranks, nodes=nodes)
        assert each.seconds(CLUSTER) == pytest.approx(each.sent / bandwidth)
        assert each.link == "InfiniBand"

    def test_latency_grows_with_calls_and_ranks(self):
        slow = Cluster(call_latency=1.0, nvlink_latency=2.0, network_latency=5.0)
        assert exchange(size=0.0).seconds(slow) == 4 * (1 + 7 * 2)
        assert exchange("all-reduce", size=0.0, ranks=16, nodes=2).seconds(slow) == 4 * (1 + 28 * 2 + 2 * 5)


class TestPhase:
    def phase(self, compute, *exchanges):
        return Phase(what="pass", flops=compute * 156e12, exchanges=exchanges)

    def test_what_computation_does_not_cover_shows(self):
        each = exchange()
        seconds = each.seconds(CLUSTER)
        assert self.phase(0.0, each).shown(CLUSTER) == pytest.approx((seconds, seconds))
        assert self.phase(seconds / 2, each).shown(CLUSTER) == pytest.approx((seconds / 2, seconds))

    def test_the_first_unit_always_shows(self):
        each = exchange()
        seconds = each.seconds(CLUSTER)
        assert self.phase(100.0, each).shown(CLUSTER) == pytest.approx((seconds / 4, seconds))

    def test_links_work_at_the_same_time(self):
        within, between = exchange(), exchange("all-reduce", size=1e9, nodes=8)
        seconds = [each.seconds(CLUSTER) for each in (within, between)]
        least, most = self.phase(0.0, within, between).shown(CLUSTER)
        assert (least, most) == pytest.approx((max(seconds), sum(seconds)))

    def test_a_step_is_the_sum_of_its_passes(self):
        phase = self.phase(1.0, exchange())
        plan = StepPlan((phase, phase, self.phase(2.0)), 8, CLUSTER)
        assert plan.compute == pytest.approx(4.0)
        assert plan.shown == pytest.approx(tuple(2 * bound for bound in phase.shown(CLUSTER)))
        assert len(plan.exchanges) == 2


class TestSaves:
    @pytest.mark.parametrize(("cost", "mtbf"), [(24.0, 450_000.0), (24.0, 57_000.0), (300.0, 20_000.0)])
    def test_interval_loses_the_least(self, cost, mtbf):
        """Of Daly's exact expected time (2006, eq. 20), which `lost` approximates."""
        plan = SavePlan(0.0, cost, mtbf, 600.0)

        def expected(interval):
            return math.exp(600.0 / mtbf) * math.expm1((interval + cost) / mtbf) / interval

        best = min((plan.interval * 1.002**power for power in range(-500, 500)), key=expected)
        assert plan.interval == pytest.approx(best, rel=0.01)
        assert plan.interval == pytest.approx(math.sqrt(2 * cost * mtbf), rel=0.1)  # Young's
        assert 1 - 1 / (mtbf * expected(best)) == pytest.approx(plan.lost(best), rel=0.15)

    def test_a_save_that_takes_longer_than_the_machine_lives(self):
        assert SavePlan(0.0, 100.0, 40.0, 0.0).interval == 40.0


def test_the_page_has_the_tables_that_the_code_computes():
    text = scale_docs.PAGE.read_text(encoding="utf-8")
    assert scale_docs.page(text) == text, "run python -m recipes.scale_docs"


@pytest.mark.parametrize("override", ["engine.name=deepspeed", "method.flow_fraction=0.2"])
def test_what_the_plan_does_not_know(override):
    config = load_config("flux_dev_lora.yaml", ["engine.shard=-1", override])
    with pytest.raises(ValueError, match="the plan knows only"):
        plan_step(config, None, 58)  # type: ignore[arg-type]


def test_a_start_grows_with_the_samples_and_hashes_once_a_node():
    small, large = plan_start(8, 10**6, CLUSTER), plan_start(512, 10**7, CLUSTER)
    assert large.nodes == 64 and large.manifests == pytest.approx(640 * small.manifests)
    assert large.first == pytest.approx(10 * small.first) and large.memory == pytest.approx(10 * small.memory)
    assert small.later < small.first < small.before and small.memory < small.memory_before
