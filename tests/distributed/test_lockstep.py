"""Full weights at a micro-batch of one row: a near pass runs teacher or fast EMA on each process, and gathers both."""

from typing import Any

from runs import joined_trainer, make_tree, run_distributed, tensors

from scfm_core.models.student import FullModel


def train(tree: dict[str, Any], in_lockstep: bool) -> tuple[list[float], dict[str, int]]:
    """In a rank: the losses of all steps, and how many rows went through each network."""
    with joined_trainer(tree) as trainer:
        model = trainer.model
        assert isinstance(model, FullModel) and model._lockstep is not None
        if not in_lockstep:
            model._lockstep = None
        rows = dict.fromkeys(model.networks, 0)

        def count(role: str, inputs: dict[str, Any]) -> None:
            rows[role] += len(inputs["hidden_states"])

        for role, network in model.networks.items():
            network.register_forward_pre_hook(lambda _, args, kwargs, role=role: count(role, kwargs), with_kwargs=True)
        losses = [row["loss"] for row in trainer.train_steps()]
        # FSDP2 lists the passes of teacher and EMAs, which have no backward that would empty the list.
        assert [len(network._get_fsdp_state()._comm_ctx.post_forward_order) for network in model.networks.values()] == [
            0
        ] * 4
        trainer.state.save()
        trainer.state.wait()
        return losses, rows


def test_each_process_runs_the_network_that_its_row_needs(tiny, tmp_path):
    """Its numbers are bitwise those of both networks one after the other, with flow-matching rows and checkpointing too."""
    trees = {
        name: make_tree(
            tiny, tmp_path / name, train__weights="full", train__micro_batch_size=1, train__steps=3,
            train__activation_checkpointing="full", method__flow_fraction=0.2, method__teacher_fraction=0.4,
        )
        for name in ("lockstep", "both")
    }  # fmt: skip
    results = {name: run_distributed(train, 2, tree, name == "lockstep") for name, tree in trees.items()}
    left, right = (tensors(tmp_path / name) for name in trees)
    assert left.keys() == right.keys() and all(left[key].equal(right[key]) for key in right)
    share = 3 * 8 // 2
    for (losses, rows), (expected, rows_of_both) in zip(results["lockstep"], results["both"], strict=True):
        assert losses == expected
        assert rows_of_both == dict.fromkeys(rows, share)
        assert rows["teacher"] + rows["ema_fast"] == rows["ema_slow"] == rows["student"] == share
    assert len({rows["teacher"] for _, rows in results["lockstep"]}) == 2, (
        "the processes have different numbers of teacher rows"
    )
