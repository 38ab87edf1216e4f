"""The day on a GPU: limits, results that are kept, sections of RESULTS.md. What its parts measure is in test_benchmarks.py."""

import json
from pathlib import Path

import goals
import gpu_day
import pytest
import tables
from gpu_day import Day, Part

TABLE = {"title": "a table", "machine": "here", "columns": {"arm": "", "milliseconds": ".1f"}, "rows": []}


def a_table(*milliseconds, **more):
    return TABLE | {"rows": [{"arm": "ours", "milliseconds": value} for value in milliseconds]} | more


def day(tmp_path, *parts, **options):
    """Its parts are commands of sh, which starts at once."""
    options = {"seconds": 60.0, "shortest": 0.1} | options
    return Day("A GPU 80GB", parts, work=tmp_path / "work", to=tmp_path / "to", launcher=("sh",), **options)


@pytest.mark.processes
def test_parts_have_limits_and_results_are_kept(tmp_path):
    tables.save(tmp_path / "table.json", a_table(12.5))
    written = f"cp {tmp_path / 'table.json'} {{json}}"
    # `slow` writes its table, starts a child and never ends.
    slow = f"{written}; sleep 1000 & echo $! > {tmp_path / 'child'}; wait"
    parts = [
        Part(name="beside", command=("-c", slow.replace("child", "other")), limit=1.5, on_cpu=True),
        Part(name="slow", command=("-c", slow), limit=1.0),
        Part(name="broken", command=("-c", "echo no such kernel; exit 3"), limit=50),
        Part(name="quick", command=("-c", written), limit=50),
    ]
    running = day(tmp_path, *parts)
    running.run()
    content = json.loads((tmp_path / "to" / "gpu" / "A_GPU_80GB.json").read_text())
    states = {part["name"]: part["state"].partition(" after")[0] for part in content["parts"]}
    assert states == {"beside": "stopped", "slow": "stopped", "broken": "failed (exit 3)", "quick": "done"}
    seconds = {part["name"]: part["seconds"] for part in content["parts"]}
    assert seconds["slow"] >= 1.0 and seconds["beside"] >= 1.5
    assert {part["name"] for part in content["parts"] if part["tables"]} == {"beside", "slow", "quick"}
    assert next(part["log"] for part in content["parts"] if part["name"] == "broken") == ["no such kernel"]
    text = (tmp_path / "to" / "RESULTS.md").read_text()
    assert f"## {running.date}: a day on one A GPU 80GB" in text
    assert text.count("12.5") == 3 and "no such kernel" in text
    for name in ("child", "other"):
        pid = int((tmp_path / name).read_text())
        state = Path(f"/proc/{pid}/stat")
        assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"  # not reaped yet


@pytest.mark.processes
def test_without_time_no_part_starts(tmp_path):
    late = day(tmp_path, Part(name="late", command=("-c", "exit 1"), limit=60), seconds=5.0, shortest=10.0)
    late.run()
    assert late.outcomes[0].state == "not run: no time was left"


def test_what_a_running_part_has_written_is_published(tmp_path):
    """Whenever the script is killed, the rows of before are in both files."""
    running = day(tmp_path, Part(name="update", command=(), limit=60))
    running.outcomes[0].state = "running"
    for value in (7.25, 4.25):
        tables.save(tmp_path / "work" / "update.json", a_table(value))
        running.publish()
        text = (tmp_path / "to" / "RESULTS.md").read_text()
        assert f"{value:.1f}" in text and text.count("## ") == 1
        content = json.loads((tmp_path / "to" / "gpu" / "A_GPU_80GB.json").read_text())
        assert content["parts"][0]["tables"][0]["rows"][0]["milliseconds"] == value
        [goal] = [row for row in content["goals"] if row["goal"] == "7"]
        assert goal["reached"] == ("yes" if value <= 5 else "no")
    assert not [path for path in (tmp_path / "to").iterdir() if path.name.endswith(".part")]


def test_sections_are_replaced_and_the_newest_comes_first(tmp_path):
    path = tmp_path / "RESULTS.md"
    path.write_text("# Results\n\nAbout them.\n\n## old\n\nkept\n")
    for heading, text in (("## one", "first"), ("## two", "second"), ("## one", "again")):
        gpu_day.insert(path, heading, text)
    assert path.read_text() == "# Results\n\nAbout them.\n\n## one\n\nagain\n\n## two\n\nsecond\n\n## old\n\nkept\n"


def test_goals_and_predictions():
    step = {
        "ours": {"x_reference": 2.3, "x_tuned": 1.1, "of_peak": 0.52, "milliseconds": 900.0},
        "reference": {"x_reference": 1.0, "milliseconds": 2070.0},
    }
    rows = [{"arm": arm, "batch": 4} | row for arm, row in step.items()]
    predicted = [
        {"card": card, "arm": "ours", "batch": batch, "total": total, "peak_GiB": 62.0, "x_tuned": 1.2}
        for card, batch, total in (("H100", 4, 700.0), ("H100", 8, 1400.0), ("A100 80 GB", 4, 1600.0))
    ]
    found = {
        "step": {"step": TABLE | {"columns": {"milliseconds": ".1f", "peak_GiB": ".1f"}, "rows": rows}},
        "predict": {"predict": TABLE | {"rows": predicted}, "predict_peak": None},
        "kernels": {
            "kernels": TABLE
            | {
                "rows": [
                    {"kernel": kernel, "pass": "forward", "arm": arm, "microseconds": time, "of_copy": 0.9, "x_reference": 6.0}
                    for kernel, arm, time in (
                        ("a", "ours", 10.0), ("a", "reference: compiled", 12.0), ("b", "ours", 10.0), ("b", "reference: compiled", 9.0),
                    )
                ]
            }
        },
    }  # fmt: skip
    goals.add_predictions(found, "NVIDIA H100 80GB HBM3")
    assert rows[0]["predicted_ms"] == 700.0 and rows[1]["predicted_ms"] is None
    assert list(found["step"]["step"]["columns"]) == ["milliseconds", "predicted_ms", "peak_GiB", "traced_GiB"]
    reached = {(row["goal"], row["figure"].partition(",")[0]): row["reached"] for row in goals.reached(found)}
    assert reached["1", "step against the authors' step"] == "yes"
    assert reached["2", "step against the tuned one"] == "no"
    assert reached["13", "predicted: step against the tuned one"] == "yes"
    assert reached["9", "FSDP2 on one process"] is None
    compiled = next(row for row in goals.reached(found) if row["figure"] == "fused operations, against compiled")
    assert compiled["measured"] == "0.90" and compiled["reached"] == "no"


@pytest.mark.parametrize("null", [False, True])
def test_each_part_is_there(null):
    """Each part's script exists, its placeholders are known, and its limits leave time for the others."""
    parts = gpu_day.parts(null)
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        words = [word.format(json="out.json", seconds="60") for word in part.command]
        assert (gpu_day.ROOT / words[0]).is_file(), words
        assert not any("{" in word for word in words)
    assert all((gpu_day.ROOT / name).exists() for name in gpu_day.CUDA_TESTS)


def test_predicted_step():
    """FLOPs of attention, in forwards: a backward counts as two of them. `automodel` has no pairs, and its own batch."""
    import predict
    from setting import Setting

    from scfm_core.train.trace import trace_forward

    setting = Setting(2, tiny=True)
    forward = trace_forward(
        setting.family, setting.family.meta_network(), setting.latents.shape[1:], setting.text_length
    )
    passes = {}
    for name in ("reference: automodel", "ours"):
        traced = predict.trace(name, 2, tiny=True)
        assert traced.batch == (6 if name == "reference: automodel" else 2)
        attention = sum(operation.flops for operation in traced.operators if operation.group == "attention")
        passes[name] = attention / (traced.batch * forward.attention)
        for row in predict.rows_of(name, traced, ["A100 80 GB", "H100"]):
            assert row["total"] == pytest.approx(sum(row[part] for part in predict.PARTS))
            assert 0 < row["total"] <= row["70/85"]  # a tiny kernel takes as long as its launch
            assert row["samples_per_s"] == pytest.approx(1e3 * traced.batch / row["70/85"])
    assert passes == pytest.approx({"reference: automodel": 1 + 2, "ours": 3 + 2})


def test_predicted_ratios():
    import predict

    rates = {"reference": 2.0, "reference: tuned": 3.0, "ours": 4.5, "reference: automodel": 9.0}
    rows = [
        {"card": "A100 80 GB", "arm": arm, "batch": 6 if arm.endswith("automodel") else 4, "samples_per_s": rate}
        for arm, rate in rates.items()
    ]
    ratios = {row["arm"]: (row["x_reference"], row["x_tuned"]) for row in predict.with_ratios(rows)}
    assert ratios["ours"] == (2.25, 1.5) and ratios["reference: tuned"] == (1.5, 1.0)
    assert ratios["reference: automodel"] == (None, None)  # of another batch
