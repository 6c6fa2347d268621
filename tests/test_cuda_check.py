import json

import pytest
import torch
from processes import Script
from test_startup import imports_of
from warm_python import warm_python

import cuda_check
import zipping
from benchmarks import gpu_checks, gpu_speed

SMALL = ["--device", "cpu", "--small"]


def run(*argv, status=0):
    """Run the command in this process and assert its exit status."""
    if status == 0:
        return cuda_check.main([*SMALL, *argv])
    with pytest.raises(SystemExit) as stopped:
        cuda_check.main([*SMALL, *argv])
    assert stopped.value.code == status


def test_every_part_passes_on_cpu(tmp_path):
    file = tmp_path / "results.json"
    with warm_python() as python:
        prepare = f"import sys; sys.executable = {str(python)!r}"
        process = Script("cuda_check.py", *SMALL, "--output", file, log=tmp_path / "log", prepare=prepare)
        assert process.wait() == 0, process.output() + process.errors()
    head, *parts = process.output().split("\n[")
    assert head.startswith("device cpu, torch ")
    assert {part.partition("]")[0]: part.count("\n  ") > 0 for part in parts} == dict.fromkeys(cuda_check.PARTS, True)
    assert " checks passed, 0 failed, in " in parts[-1]
    results = json.loads(file.read_text())
    assert all(check["passed"] for check in results["checks"])
    assert {row["part"] for row in results["checks"] + results["measured"]} == set(cuda_check.PARTS)
    speed = [(row["train"], row["form"]) for row in results["measured"] if row["part"] == "speed"]
    forms = ["static (timm)", "zipped", "zipped, early exit"]
    assert speed == [*((False, form) for form in forms), *((True, form) for form in forms[:2])]


def test_failed_check_is_printed_and_saved(tmp_path, monkeypatch, capsys):
    attention = zipping.ragged_attention
    monkeypatch.setattr(zipping, "ragged_attention", lambda *args: 1.1 * attention(*args))
    file = tmp_path / "results.json"
    run("--only", "attention", "--output", str(file), status=1)
    out = capsys.readouterr().out
    assert "  FAIL  float32, heads of 64: attention 1.0e-01 (at most 5e-05), its gradient 1.0e-01 (at most" in out
    assert "\n0 checks passed, 6 failed, in " in out
    assert out.endswith("\n  FAIL  attention: bf16, heads of 60\n")
    assert not any(check["passed"] for check in json.loads(file.read_text())["checks"])


def test_nan_exceeds_every_limit(monkeypatch, capsys):
    attention = zipping.ragged_attention
    monkeypatch.setattr(zipping, "ragged_attention", lambda *args: attention(*args) * float("nan"))
    run("--only", "attention", status=1)
    assert "attention nan (at most 5e-05)" in capsys.readouterr().out


def test_exception_in_a_part_does_not_stop_the_next(monkeypatch, capsys):
    monkeypatch.setitem(gpu_checks.PARTS, "attention", lambda check: 1 / 0)
    run("--only", "attention", "seqlens", status=1)
    out = capsys.readouterr().out
    assert "  FAIL  part completes: " in out
    assert "ZeroDivisionError" in out
    assert "[seqlens]" in out.partition("ZeroDivisionError")[2]


def test_exception_in_one_precision_does_not_stop_the_others(monkeypatch, capsys):
    gradients = gpu_checks.gradients

    def without_bf16(model, images, amp):
        assert amp != "bf16", "no kernel found to launch!"
        return gradients(model, images, amp)

    monkeypatch.setattr(gpu_checks, "gradients", without_bf16)
    run("--only", "edges", status=1)
    out = capsys.readouterr().out
    assert out.count("AssertionError: no kernel found to launch!") == len(gpu_checks.EDGES)
    assert out.count("  FAIL  edges: ") == len(gpu_checks.EDGES)
    assert "  ok    one image, torch ops, float32: " in out
    assert "  ok    one image, as set up: " in out


def test_failed_training_is_a_failed_check(monkeypatch, capsys):
    monkeypatch.setattr(gpu_checks, "RECIPE", "missing.args")
    run("--only", "command", status=1)
    assert "  FAIL  to epoch 1: status 2" in capsys.readouterr().out


CASES = [gpu_speed.Case("micro", 8, whole=True), gpu_speed.Case("micro", 8, train=True)]


def test_compiled_model_is_an_additional_variant(monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model, **options: compiled.append(options))
    monkeypatch.setattr(gpu_speed, "SMALL_CASES", CASES[:1])
    run("--only", "speed")
    assert "inference 8, static, compiled   " in capsys.readouterr().out
    assert compiled == [{"mode": "reduce-overhead", "dynamic": False}]


def test_measurement_that_exceeds_the_time_is_skipped(monkeypatch, capsys):
    monkeypatch.setattr(gpu_speed, "SMALL_CASES", CASES)
    run("--only", "speed", "--seconds", "10")
    out = capsys.readouterr().out
    assert "micro float32 inference 8, with compiled models: skipped, needs up to 33 s of the 10 s left" in out
    assert "micro float32 training 8, zipped  " in out


def test_out_of_memory_is_reported(monkeypatch, capsys):
    fits = iter([False, False, False, True])  # static and zipped, in two cases

    def training_call(*args, original=gpu_speed.training_call):
        if not next(fits):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*args)

    monkeypatch.setattr(gpu_speed, "SMALL_CASES", CASES[1:] * 2)
    monkeypatch.setattr(gpu_speed, "training_call", training_call)
    run("--only", "speed")
    out = capsys.readouterr().out
    assert out.count("micro float32 training 8, static (timm): out of memory\n") == 2
    assert out.count("micro float32 training 8, zipped: out of memory\n") == 1
    assert out.count("micro float32 training 8, zipped  ") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        pytest.param(
            ["--device", "cuda"],
            "--device cuda: no CUDA device is available here; use --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["--device", "cpx"], "--device: unknown device 'cpx'; expected cuda or cpu"),
        (["--only", "parity", "speeed"], "argument --only: invalid choice: 'speeed'"),
        (["--seconds", "0"], "argument --seconds: must be at least 1, got 0"),
        (["--only", "seqlens", "--output", "/no/such/folder/x.json"], "/no/such/folder/x.json: cannot be written: "),
    ],
)
def test_invalid_flags_exit_with_one_line(argv, message, capsys):
    run(*argv, status=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cuda_check.py: error: {message}")


def test_earlier_part_name_is_accepted():
    assert cuda_check.make_parser().parse_args(["--only", "lengths", "speed"]).only == ["seqlens", "speed"]


def test_default_device_is_cuda():
    assert cuda_check.make_parser().parse_args([]).device == "cuda"


@pytest.mark.parametrize("argv", [["--help"], ["--no-such-flag"]])
def test_help_and_invalid_flags_do_not_import_torch(argv):
    assert not {"torch", "timm"} & imports_of(["cuda_check.py", *argv])
