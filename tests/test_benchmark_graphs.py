"""Rows of benchmark.py and parts of cuda_check.py by CUDA graphs, which a stand-in replays on the CPU."""

import json
from functools import partial

import pytest
import torch
from conftest import halting_model, images

import benchmark
import cuda_check
import models_act
from benchmarks import aims, cases, gpu_checks, gpu_graphs, gpu_speed, graphed, timing
from benchmarks.synthetic import set_synthetic_depths
from zipping.planned.plans import Planner

runner = pytest.importorskip("zipping.planned.runner", reason="Triton is installed with CUDA builds of torch on Linux")

GRAPHED = [f"{kind}, {form}" for form in ("graphed", "compiled, graphed") for kind in ("static", "zipped")]
EARLY_EXIT = [f"zipped, early exit, {form}" for form in ("graphed", "compiled, graphed")]


def small_model(name: str = "", size: tuple[int, int] = (16, 16), **options) -> torch.nn.Module:
    """Build a model of 3 blocks and 17 tokens: Triton's interpreter needs milliseconds for each program."""
    return models_act.avit_micro_patch4_32(img_size=size, depth=3, num_heads=1, embed_dim=16, **options)


@pytest.fixture
def small(graph_standin, monkeypatch) -> list[dict]:
    """Measure small models briefly. Record the options of torch.compile instead of compiling."""
    options = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model, **given: options.append(given))
    monkeypatch.setattr(cases, "MIN_IMAGES", 2)
    monkeypatch.setattr(timing, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(cases, "create_model", small_model)
    monkeypatch.setattr(gpu_speed, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(gpu_speed, "MIN_IMAGES", 2)
    scaled = lambda model, mean, spread: set_synthetic_depths(model, mean / 4, spread / 4)  # noqa: E731
    monkeypatch.setattr(gpu_checks, "set_synthetic_depths", scaled)
    monkeypatch.setattr(gpu_checks, "_supports", lambda device, amp: amp == "none")
    monkeypatch.setattr(runner, "Planner", partial(Planner, start=2))
    monkeypatch.setattr(gpu_graphs, "NUM_BATCHES", 4)
    monkeypatch.setattr(graphed, "WARM_UP_BATCHES", 4)
    monkeypatch.setattr(gpu_checks.timm, "create_model", small_model)
    return options


def ratio_to(rows: dict[str, dict], name: str, baseline: str) -> float:
    return rows[name]["images_per_s"] / rows[baseline]["images_per_s"]


@pytest.mark.parametrize("train", [False, True])
def test_each_form_is_relative_to_static_in_the_same_form(small, train, tmp_path, capsys):
    file = tmp_path / "b.json"
    flags = ["--model", "avit_micro_patch4_32", "--batch-size", "2", "--mean-depth", "2", "--rounds", "1"]
    benchmark.main([*flags, "--input-size", "16", "--json", str(file), *["--train"] * train])
    rows = {row["form"]: row for row in json.loads(file.read_text())}
    added = {"static, compiled", "zipped, planned", *GRAPHED, *(() if train else EARLY_EXIT)}
    assert {name for name in rows if name.endswith(("compiled", "graphed", "planned"))} == added
    for name, row in rows.items():
        assert row["speed_of_same_form"] == pytest.approx(ratio_to(rows, name, graphed.same_form(name)))
        is_replayed = name.startswith("zipped") and name.endswith("graphed")
        assert row["hit_rate"] == (1 if is_replayed else None), name
    assert small == [{"mode": "default" if train else "reduce-overhead", "dynamic": False}, *[{"dynamic": False}] * 3]
    out = capsys.readouterr().out
    assert "same form   hits" in out
    assert "100%" in out


def test_graphed_static_model_equals_the_static_model(graph_standin):
    static = cases.static_twin(halting_model())
    replayed = graphed.GraphedStatic(static.eval(), compiled=False).eval()
    with torch.inference_mode():
        for seed in range(3):
            x = images(2, seed=seed)
            torch.testing.assert_close(replayed(x), static(x))
        torch.testing.assert_close(replayed(images(3)), static(images(3)))


def test_graphed_static_model_has_the_gradients_of_the_static_model(graph_standin):
    static = cases.static_twin(halting_model()).train()
    replayed = graphed.GraphedStatic(static, compiled=False).train()
    for seed in range(2):
        found = []
        for model in (replayed, static):
            model(images(2, seed=seed)).square().sum().backward()
            found.append([p.grad.clone() for p in static.parameters()])
            static.zero_grad()
        torch.testing.assert_close(*found)


def test_same_form():
    assert graphed.same_form("zipped") == graphed.same_form("floor") == "static (timm)"
    assert graphed.same_form("zipped, early exit, graphed") == "static, graphed"
    assert graphed.same_form("zipped, compiled, graphed") == "static, compiled, graphed"
    assert graphed.same_form("static, compiled") == "static, compiled"
    assert graphed.eager_variant("zipped, early exit, compiled, graphed") == "zipped, early exit"
    assert graphed.eager_variant("static, graphed") == graphed.eager_variant("static, compiled") == "static (timm)"


def test_variant_that_fails_is_left_out(small, monkeypatch, capsys):
    def fail(model, **options):
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(graphed.GraphedStatic, "forward", fail)
    benchmark.main(["--model", "avit_micro_patch4_32", "--input-size", "16", "--batch-size", "2", "--rounds", "1"])
    out, err = capsys.readouterr()
    assert "warning: static, graphed is left out: TypeError" in err
    assert "static, graphed  " not in out
    assert "zipped, graphed  " in out


# cuda_check.py -----------------------------------------------------------------------------------


def test_part_graphs_requires_cuda(capsys):
    cuda_check.main(["--device", "cpu", "--small", "--only", "graphs"])
    assert "  not run: CUDA graphs require CUDA and Triton kernels\n" in capsys.readouterr().out


@pytest.mark.slow
def test_part_graphs_passes(small, capsys):
    cuda_check.main(["--device", "cpu", "--small", "--only", "graphs"])
    out = capsys.readouterr().out
    assert "  ok    micro, inference, float32, tokens halt later: depths" in out
    assert "  ok    micro, training, float32, gate offsets: gradients" in out
    assert "attention of 2 images, with dummy sequences" in out


@pytest.mark.slow
def test_speed_covers_every_form(small, monkeypatch, tmp_path):
    cases_of_test = [gpu_speed.Case("micro", 2, train, compiled=True) for train in (False, True)]
    monkeypatch.setattr(gpu_speed, "SMALL_CASES", cases_of_test)
    monkeypatch.setattr(gpu_speed, "profiler_events", lambda call, device: [])  # slow: it records Triton's interpreter
    file = tmp_path / "results.json"
    cuda_check.main(["--device", "cpu", "--small", "--only", "speed", "launches", "--output", str(file)])
    rows = json.loads(file.read_text())["measured"]
    speed = {(row["train"], row["form"]) for row in rows if row["part"] == "speed"}
    assert {form for train, form in speed if train} == {"static (timm)", "zipped", "zipped, planned", *GRAPHED}
    assert {form for train, form in speed if not train} > {"static (timm)", "zipped", "zipped, early exit", *GRAPHED}
    launches = {(row["train"], row["form"]) for row in rows if row["part"] == "launches" and "train" in row}
    assert launches >= {(train, form) for train in (False, True) for form in ("static, graphed", "zipped, graphed")}


def rows_of(speeds: dict[str, float], **case) -> list[dict]:
    case = {"size": "tiny", "batch": 128, "train": False, "amp": "none"} | case
    return [case | {"form": form, "images_per_s": speed} for form, speed in speeds.items()]


def test_aims_are_compared_with_the_measured_speeds(capsys):
    check = gpu_checks.Check(torch.device("cpu"), True, 60)
    forms = {"static (timm)": 100, "static, graphed": 400, "static, compiled": 500}
    forms |= {"zipped": 50, "zipped, graphed": 480, "zipped, early exit, graphed": 600}
    check.measured += rows_of(forms) + rows_of(forms | {"zipped": 1}, amp="fp16") + rows_of(forms, batch=64)
    aims.report_aims(check)
    (row,) = [row for row in check.measured if "aim" in row]
    assert row["aim"] == "tiny inference 128, zipped"
    assert row["speed_up"] == 1.2
    assert row["measured"] == {"eager": 0.5, "graphed": 1.2, "compiled, graphed": None, "fastest": 1.2}
    assert not check.checks
    assert (
        "tiny inference 128, zipped                1.20                0.50                1.20"
        in capsys.readouterr().out
    )


def test_every_aim_has_a_case_with_all_forms():
    measured = {(case.size, case.batch, case.train) for case in gpu_speed.CASES if case.compiled and not case.amp}
    assert {aim[:3] for aim in aims.AIMS} <= measured
    assert gpu_graphs.NUM_BATCHES > 8
