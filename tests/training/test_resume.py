"""A run that is interrupted anywhere and resumed ends bit for bit like an uninterrupted run."""

import contextlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, make_image_folder
from hypothesis import given
from hypothesis import strategies as st
from kill_and_resume import flags, outcome, same
from processes import free_port, script_in_processes
from test_loop import make_run

import main_act
from training.arguments import parse_args
from training.checkpoints import Checkpoint, load_checkpoint
from training.signals import Interrupted
from utils import UserError

# By accumulation steps: the calls of `asked` that return true. They cover updates and evaluations of both epochs.
MOMENTS = {1: (1, 2, 3, 5, 7, 9, 12, 14), 2: (1, 2, 4, 8, 11, 12)}


@pytest.mark.parametrize("accum_steps", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_run_interrupted_after_any_update_resumes_exactly(tmp_path, accum_steps):
    """2 epochs of 3 batches, with EMA weights, gradient accumulation and a checkpoint after each update."""
    options = {"accum_steps": accum_steps, "keep": 1, "checkpoint_steps": 1}
    whole = tmp_path / "whole"
    whole.mkdir()
    make_run(whole, **options).train()
    for moment in MOMENTS[accum_steps]:
        folder = tmp_path / str(moment)
        folder.mkdir()
        run, calls = make_run(folder, **options), iter(range(1, 100))
        run.stop.signal = "SIGTERM"
        run.stop.asked = lambda calls=calls, moment=moment: next(calls) >= moment
        with pytest.raises(Interrupted):
            run.train()
        resumed = make_run(folder, **options)
        checkpoint = Checkpoint.load(str(folder / "checkpoint.pth"))
        resumed.trainer.model.load_state_dict(checkpoint.content["model"])
        resumed.load_state_dict(checkpoint)
        resumed.train()
        expected, actual = (load_checkpoint(str(f / "checkpoint.pth")) for f in (whole, folder))
        for part in expected.keys() - {"seconds", "data_wait"}:
            assert same(actual[part], expected[part]), (moment, part)
        logs = [[json.loads(line) for line in (f / "log.txt").read_text().splitlines()] for f in (whole, folder)]
        assert [line["epoch"] for line in logs[1]] == [0, 1]
        for name in ("train_loss", "train_depth_mean", "test_loss", "train_layer_scores"):
            assert [line[name] for line in logs[1]] == [line[name] for line in logs[0]]


OTHER_OPTIMIZERS = ("adamw", "sgd", "lookahead_adamw", "adafactor", "lion", "adopt")
SLOW = [pytest.param(name, "cosine", marks=pytest.mark.slow) for name in OTHER_OPTIMIZERS]


@pytest.mark.parametrize(("name", "sched"), [("lamb", "cosine"), ("adamw", "plateau"), *SLOW])
def test_any_optimizer_and_schedule_resumes_exactly(image_folder, tmp_path, name, sched, monkeypatch):
    """Interrupt the run in the third epoch, after the plateau schedule has lowered the rate."""
    options = ("--opt", name, "--sched", sched, "--patience-epochs", 0, "--warmup-epochs", 0, "--drop", 0)
    run(image_folder, tmp_path / "whole", *options)
    calls = iter(range(1, 1000))

    def asked(self):
        self.signal = "SIGTERM" if next(calls) >= 24 else None
        return self.signal is not None

    with monkeypatch.context() as patch:
        patch.setattr("training.signals.StopRequest.asked", asked)
        run(image_folder, tmp_path / "again", *options)
    interrupted = load_checkpoint(str(tmp_path / "again" / "checkpoint.pth"))
    assert (interrupted["epoch"], interrupted["batches"]) == (1, 2)  # completed batches
    assert interrupted["optimizer"]["param_groups"][0]["lr"] < 5e-5, "the rate is that of the start"
    run(image_folder, tmp_path / "again", *options)
    expected, actual = (load_checkpoint(str(tmp_path / n / "checkpoint.pth")) for n in ("whole", "again"))
    for part in ("model", "model_ema", "optimizer", "plateau", "best_acc1"):
        assert same(actual[part], expected[part]), part


@pytest.mark.slow
def test_run_killed_anywhere_resumes_exactly():
    """kill_and_resume.py can kill more runs."""
    command = [sys.executable, str(ROOT / "tests" / "tools" / "kill_and_resume.py"), "--kills", "15"]  # one per place
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "15 of 15 kills survived" in done.stdout or "14 of 14 kills survived" in done.stdout


@pytest.mark.slow
def test_torchrun_restarts_a_job_after_a_kill(tmp_path):
    data = make_image_folder(tmp_path / "data", classes=3, train=24, val=3)
    statuses, _, errors = script_in_processes(2, flags(data, tmp_path / "whole", 0), tmp_path)
    assert statuses == [0, 0], errors
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1", f"--master_port={free_port()}"]
    command = [sys.executable, *launcher, str(ROOT / "main_act.py"), *flags(data, tmp_path / "killed", 0)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    killed = subprocess.Popen(command, env=environment, **pipes)
    while not (tmp_path / "killed" / "log.txt").exists():
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(killed.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(children.split()[-1]), signal.SIGKILL)
    errors = killed.communicate(timeout=200)[1]
    assert killed.returncode == 0, errors
    assert same(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"))


def run(data, out, *more):
    main_act.main([*flags(data, out, 0), "--checkpoint-steps", "0", *map(str, more)])


@pytest.mark.parametrize("mode", ["--eval", "--demo"])
def test_evaluation_without_a_checkpoint_to_resume_raises(tmp_path, mode):
    args = parse_args([mode, "--resume", "auto", "--output-dir", str(tmp_path), "--pretrained-path", "static.pth"])
    with pytest.raises(UserError, match=r"--resume auto: .* has no checkpoint\.pth; pass the weights with --finetune"):
        Checkpoint.from_args(args)


def test_resuming_with_other_flags_warns_once(image_folder, tmp_path, capsys):
    out = tmp_path / "out"
    run(image_folder, out, "--epochs", 1)
    assert "has no checkpoint; starting a new run" in capsys.readouterr().out
    run(image_folder, out, "--epochs", 2, "--lr", 0.02, "--num_workers", 1)
    captured = capsys.readouterr()
    assert f"resuming from {out / 'checkpoint.pth'}" in captured.out
    assert "resuming at epoch 1 (the first is 0), after 0 of its batches" in captured.out
    (warning,) = [line for line in captured.err.splitlines() if "the resumed run has other flags" in line]
    assert "--epochs was 1 and is now 2" in warning
    assert "--lr was 0.01 and is now 0.02" in warning
    assert "num_workers" not in warning
    assert "resume" not in warning.replace("resumed", "")
    assert (out / "checkpoint-0.pth").exists()
    without_gate = [
        flag for flag in flags(image_folder, out, 0) if flag not in ("--gate_scale", "10", "--gate_center", "5")
    ]
    main_act.main([*without_gate, "--checkpoint-steps", "0", "--epochs", "2", "--lr", "0.02"])
    captured = capsys.readouterr()
    assert "gate_center 5, from the checkpoint" in captured.out
    assert "the resumed run has other flags" not in captured.err
    assert "all 2 epochs are done; nothing to train" in captured.out


def error_of(capsys, data, out, *more):
    with pytest.raises(SystemExit) as exit_:
        run(data, out, *more)
    assert exit_.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_resuming_with_another_optimizer_exits_with_2_and_keeps_the_folder(image_folder, tmp_path, capsys):
    out = tmp_path / "out"
    run(image_folder, out, "--epochs", 1)
    before = {path: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}
    error = error_of(capsys, image_folder, out, "--opt", "adafactor")
    assert "--opt adafactor: " in error
    assert "checkpoint.pth holds the state of --opt adamw, which adafactor cannot continue; pass --opt adamw" in error
    assert {path: path.read_bytes() for path in out.iterdir() if path.name != ".lock"} == before


def test_switched_parts_of_a_run_continue_with_one_line(image_folder, tmp_path, capsys):
    """The average starts at the resumed weights. Without weight decay the parameters form other groups."""
    out = tmp_path / "out"
    run(image_folder, out, "--epochs", 1, "--no-model-ema")
    weights = load_checkpoint(str(out / "checkpoint.pth"))["model"]
    capsys.readouterr()
    flags = ("--target-macs", 0.6, "--weight-decay", 0, "--model-ema-decay", 1)
    run(image_folder, out, "--epochs", 2, *flags)
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "has other flags" in line]
    assert "--model-ema was False and is now True (the average starts at the resumed weights)" in warning
    assert "--target-macs was None and is now 0.6 (best.pth starts again)" in warning
    assert "--weight-decay was 0.05 and is now 0.0" in warning
    checkpoint = load_checkpoint(str(out / "checkpoint.pth"))
    assert same(checkpoint["model_ema"], weights)
    assert load_checkpoint(str(out / "best.pth"))["epoch"] == 1
    run(image_folder, out, "--epochs", 3, "--no-model-ema", "--no-halting")
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "has other flags" in line]
    assert "--model-ema was True and is now False (the recorded average is dropped)" in warning
    assert "nothing keeps the budget" in warning
    assert "--no-halting" in warning


def test_resumed_run_keeps_its_gate_and_writes_the_last_epoch(image_folder, tmp_path, capsys):
    out, flags = tmp_path / "out", ("--target-macs", 0.6)
    run(image_folder, out, "--epochs", 1, *flags)
    checkpoint = load_checkpoint(str(out / "checkpoint.pth"))
    torch.save(checkpoint | {"best_acc1": 100.0}, out / "checkpoint.pth")
    capsys.readouterr()
    run(image_folder, out, "--epochs", 2, *flags, "--gate", "fixed")
    output = capsys.readouterr()
    assert "--gate fixed has no effect: a resumed run keeps its gate" in output.err
    assert "--gate was" not in output.err
    best, last = (load_checkpoint(str(out / name)) for name in ("best.pth", "checkpoint.pth"))
    assert same(best["model"], last["model"])
    assert best["epoch"] == last["epoch"] == 1
    assert "best top-1: 100" not in output.out


def test_two_processes_continue_the_epoch_of_one_after_the_same_images(image_folder, tmp_path, monkeypatch):
    """One process has read 2 batches of 4 images. Two processes read the rest of the epoch in batches of 1."""
    images = len(list((image_folder / "train").rglob("*.png")))
    calls = iter(range(1, 100))

    def asked(self):
        self.signal = "SIGTERM" if next(calls) >= 2 else None
        return self.signal is not None

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("training.signals.StopRequest.asked", asked)
        run(image_folder, out, "--epochs", 1)
    left = -(-images // 2) - 4  # the last image of an odd number is repeated
    command = [*flags(image_folder, out, 0), "--checkpoint-steps", "0", "--epochs", "1", "--batch-size", "1"]
    statuses, output, errors = script_in_processes(2, command, tmp_path)
    assert statuses == [0, 0], errors
    assert "resuming at epoch 0 (the first is 0), after 2 of its batches (8 images)" in output
    assert f"Epoch 0 [{2 + left}/{2 + left}]" in output
    assert "cannot continue exactly" not in errors
    assert "the number of processes was 1 and is now 2" in errors


def test_keep_saves_the_last_epochs(image_folder, tmp_path):
    run(image_folder, tmp_path / "out")
    kept = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*.pth"))
    assert kept == ["checkpoint-1.pth", "checkpoint-2.pth"]
    assert load_checkpoint(str(tmp_path / "out" / "checkpoint-1.pth"))["epoch"] == 1


def test_existing_run_in_the_folder_warns(image_folder, tmp_path, capsys):
    run(image_folder, tmp_path / "out", "--epochs", 1)
    run(image_folder, tmp_path / "out", "--epochs", 1, "--resume", "")
    assert "already contains a run. This run overwrites its checkpoints" in capsys.readouterr().err


def test_resume_auto_without_output_dir_exits_with_2(capsys):
    with pytest.raises(SystemExit) as exit_:
        main_act.main(["--data-set", "DIGITS", "--resume", "auto"])
    assert exit_.value.code == 2
    assert "--resume auto requires --output-dir" in capsys.readouterr().err


def test_full_disk_keeps_the_last_checkpoint(image_folder, tmp_path, capsys):
    """A limit of the file size simulates a full disk: writing fails halfway."""
    out = tmp_path / "out"
    run(image_folder, out, "--epochs", 1)
    before = (out / "checkpoint.pth").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(SystemExit) as exit_:
            run(image_folder, out, "--epochs", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert exit_.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{out / 'checkpoint.pth'}: cannot be written: " in error
    assert (out / "checkpoint.pth").read_bytes() == before
    assert not list(out.glob("*.partial"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the checkpoint of a run of one epoch, as bytes."""
    folder = tmp_path_factory.mktemp("saved")
    run = make_run(folder, epochs=1)
    run.trainer.optimizer.param_groups[0]["momentum"] = 0.9
    run.train()
    return (folder / "checkpoint.pth").read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.clear(),
        lambda c: c.update(optimizer=3),
        lambda c: c.pop("batches"),
        lambda c: c.update(epoch="x"),
        lambda c: c.update(epoch=float("inf")),
        lambda c: c.update(optimizer={"state": {}, "param_groups": []}),
        lambda c: c["optimizer"]["state"][0].update(momentum_buffer=torch.ones(3)),
        lambda c: c["optimizer"]["state"].update({7000: {"momentum_buffer": torch.ones(3)}}),
        lambda c: c["optimizer"].update(state={0: 3}),
        lambda c: c.update(averages={"weight": "much", "sums": {}}),
        lambda c: c.update(averages={"weight": 1, "sums": {"loss": 3}}),
        lambda c: c.update(bad_images=3),
        lambda c: c.update(args=3),
        lambda c: c.update(model_ema={}),
        lambda c: c.update(skipped_steps=[]),
        lambda c: c.update(previous_test=3),
        lambda c: c.update(best_acc1=float("nan")),
        lambda c: c.update(epoch=10**30),
        lambda c: c.update(batches=-1),
        lambda c: c.update(data_wait=1.5),
        lambda c: c.update(data_wait=float("nan")),
        lambda c: c.update(data_wait="long"),
        lambda c: c.update(batches=1, averages={"weight": 1, "sums": {"loss": torch.ones(3)}}),
        lambda c: c.update(batches=1, averages={"weight": 1, "sums": {}}),
    ],
)
def test_invalid_training_state_raises(saved, change):
    checkpoint = torch.load(io.BytesIO(saved))
    change(checkpoint)
    with pytest.raises(UserError, match=r"^--resume c\.pth: the training state is missing or does not fit this run"):
        make_run().load_state_dict(Checkpoint(checkpoint, "c.pth"))


def leaves(value, path=()):
    """Yield the path of each entry of a nested structure."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in items:
        yield (*path, key)
        yield from leaves(inside, (*path, key))


HOSTILE = [None, "x", -1, 10**30, 0, 0.5, float("nan"), float("inf"), [], {}, [[]], {"a": 1}, True, b"x"]
HOSTILE += [torch.tensor(float("nan")), torch.ones(3), torch.ones(0), torch.ones(2, 2).to_sparse(), torch.ones(3).int()]


@given(st.data())
def test_changed_training_state_raises_or_trains(saved, data):
    """One entry is replaced. It may not matter, or be refused, or make the loss infinite, but nothing else happens."""
    checkpoint = torch.load(io.BytesIO(saved))
    del checkpoint["model"]  # restored elsewhere
    path = data.draw(st.sampled_from(list(leaves(checkpoint))))
    inside = checkpoint
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = data.draw(st.sampled_from(HOSTILE))
    run = make_run(epochs=2)
    try:
        run.load_state_dict(Checkpoint(checkpoint, "c.pth"))
    except UserError:
        return
    run.options.epochs = min(2, run.epoch.number + 1)
    with contextlib.suppress(FloatingPointError):
        run.train()


def test_plateau_keeps_its_decays_and_follows_the_flags(tmp_path):
    """The rate was decayed by 10; the resumed run has half the rate and another decay rate."""
    before, now = make_run(tmp_path, sched="plateau"), make_run(sched="plateau")
    optimizer, plateau = before.trainer.optimizer, before.schedule.scheduler.lr_scheduler
    optimizer.param_groups[0]["lr"] = 0.01
    plateau.best, plateau.num_bad_epochs = 70.0, 3
    before.schedule.scheduler.restore_lr = [0.012]  # without noise
    before.save("checkpoint.pth")
    now.trainer.optimizer.param_groups[0]["initial_lr"] = 0.05
    now.schedule.scheduler.lr_scheduler.factor = 0.5
    now.load_state_dict(Checkpoint.load(str(tmp_path / "checkpoint.pth")))
    assert now.trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.005)
    assert now.schedule.scheduler.restore_lr == pytest.approx([0.006])
    resumed = now.schedule.scheduler.lr_scheduler
    assert (resumed.best, resumed.num_bad_epochs, resumed.factor) == (70.0, 3, 0.5)


def test_plateau_that_replaces_another_schedule_starts_at_the_rate_of_the_flags(saved):
    run = make_run(sched="plateau")
    rate = run.trainer.optimizer.param_groups[0]["lr"]
    run.load_state_dict(Checkpoint(torch.load(io.BytesIO(saved)), "c.pth"))
    assert run.trainer.optimizer.param_groups[0]["lr"] == rate


def test_averages_of_an_epoch_with_other_halting_start_again(saved):
    checkpoint = torch.load(io.BytesIO(saved))
    assert checkpoint["averages"]["sums"] == {}
    checkpoint |= {"batches": 1, "images": 4, "averages": {"weight": 4.0, "sums": {"loss": torch.tensor(8.0)}}}
    runs = [make_run(), make_run()]
    runs[1].trainer.model.halting = False
    for run in runs:
        run.load_state_dict(Checkpoint(checkpoint, "c.pth"))
    assert [run.epoch.averages.weight for run in runs] == [4.0, 0.0]


def test_checkpoint_without_data_wait_resumes(saved):
    checkpoint = torch.load(io.BytesIO(saved))
    del checkpoint["data_wait"]
    run = make_run()
    run.load_state_dict(Checkpoint(checkpoint, "c.pth"))
    assert run.epoch.number == 1
    assert run.epoch.data_wait() == 0


def test_same_detects_differences(tmp_path):
    """The results of kill_and_resume.py depend on it."""
    a = {"x": torch.ones(3), "y": [1, {"z": 2.0}]}
    assert same(a, {"x": torch.ones(3), "y": [1, {"z": 2.0}]})
    assert not same(a, {"x": torch.ones(3), "y": [1, {"z": 2.5}]})
    assert not same(a, {"x": torch.tensor([1.0, 1.0, 1.0000001]), "y": [1, {"z": 2.0}]})
