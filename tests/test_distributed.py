"""Runs of several processes over gloo."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from conftest import AUGMENTATION, ROOT, halting_model, images, make_image_folder, make_shards, save_halting_micro
from processes import free_port, in_processes, script_in_processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import losses
from datasets import build_dataset
from engine_act import EpochState, Trainer, train_one_epoch
from training.arguments import parse_args
from training.build import build_budget, build_trainer

SMALL = ["--model", "avit_micro_patch4_32", "--input-size", "32", "--num_workers", "0", "--batch-size", "2"]


def fork(processes, *argv, log, **options):
    """Run a script in several processes, without a launcher; return what it prints on stdout."""
    statuses, output, errors = script_in_processes(processes, argv, log, **options)
    assert statuses == [0] * processes, errors
    return output


def start(command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    command = [*map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def halting_checkpoint(tmp_path_factory):
    """Save a model whose tokens halt, and 13 validation images, which 2 or 3 processes cannot split evenly."""
    root = tmp_path_factory.mktemp("distributed")
    data = make_image_folder(root / "data", classes=13, train=2, val=1)
    return data, save_halting_micro(root / "c.pth", num_classes=13)


def test_evaluation_is_equal_for_any_number_of_processes(halting_checkpoint, tmp_path):
    data, checkpoint = halting_checkpoint
    results = {}
    for processes in (1, 2, 3):
        out = tmp_path / str(processes)
        flags = ["--data-path", data, "--eval", "--finetune", checkpoint, "--output_dir", out]
        fork(processes, *SMALL, *flags, log=out / "log")
        results[processes] = json.loads((out / "eval.json").read_text())
        assert (out / "predictions.csv").read_bytes() == (tmp_path / "1" / "predictions.csv").read_bytes()
    assert results[1]["depth_mean"] < 12
    for result in results.values():
        assert result["images"] == 13
        for name in ("acc1", "acc5", "loss", "depth_mean", "class_token_depth", "live_share", "gmacs"):
            assert result[name] == pytest.approx(results[1][name], rel=1e-5), name


def test_demo_is_equal_for_two_processes(halting_checkpoint, tmp_path):
    data, checkpoint = halting_checkpoint
    for processes in (1, 2):
        out = tmp_path / str(processes)
        flags = ("--demo", "--demo-images", 2, "--html", "--finetune", checkpoint, "--output_dir", out)
        fork(processes, *SMALL, "--data-path", data, *flags, log=out / "log")
    one, two = (tmp_path / n / "token_act_visualization" for n in "12")
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()


def test_summary_is_equal_for_two_processes(halting_checkpoint, tmp_path):
    data, checkpoint = halting_checkpoint
    flags = ["--summary", "--html", *SMALL[2:], "--data-path", data, "--finetune", checkpoint, "--output-dir"]
    for processes in (1, 2):
        log = tmp_path / f"log{processes}"
        fork(processes, *flags, tmp_path / str(processes), log=log, script="visualize.py")
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()


# The commands of the original repository, except for the data, and for --pretrained in training, which downloads.
LAUNCHER = ("-m", "torch.distributed.launch", "--nproc_per_node=2", "--use_env")
RECIPE = "--batch-size 128 --lr 0.0005 --tensorboard --epochs 1 --gate_scale 10.0 --gate_center 30 --warmup-epochs 5 "
RECIPE += "--ponder_token_scale 0.0005 --distr_prior_alpha 0.001"


@pytest.mark.slow
def test_original_commands_run(tmp_path):
    data = make_image_folder(tmp_path / "data", classes=2, train=8, val=2, size=(300, 260))
    model = "avit_tiny_patch16_224"
    weights = tmp_path / "static.pth"
    torch.save({"model": timm.create_model(model, num_classes=2).state_dict()}, weights)
    out = tmp_path / "results" / "name"
    flags = ("--model", model, "--data-path", data)
    train = ("--output_dir", out, *RECIPE.split(), "--pretrained-path", weights)
    start([sys.executable, *LAUNCHER, f"--master_port={free_port()}", ROOT / "main_act.py", *flags, *train])
    assert (out / "best.pth").exists()
    published = tmp_path / "tiny-10-30.pth"
    torch.save({"model": torch.load(out / "best.pth")["model"]}, published)
    flags = (*flags, "--finetune", published)
    output = fork(1, *flags, "--output_dir", out, *RECIPE.split(), "--pretrained", "--eval", log=tmp_path / "eval")
    assert "Accuracy of the network on the 4 test images" in output
    fork(1, *flags, "--demo", log=tmp_path / "demo", prepare=f"import os; os.chdir({str(tmp_path)!r})")
    assert (tmp_path / "token_act_visualization" / "class1_combined.jpg").exists()


def test_user_error_is_printed_once(tmp_path):
    statuses, _, errors = script_in_processes(2, ["--data-path", str(tmp_path / "missing")], tmp_path)
    assert statuses == [2, 2]
    assert errors.count("main_act.py: error: --data-path") == 1


def test_error_of_one_rank_stops_all(tmp_path):
    """Only the second process reads the broken image. It prints the error, and no process hangs."""
    data = make_image_folder(tmp_path / "data", classes=2, train=2, val=3)
    broken = data / "val" / "class_0" / "1.png"
    broken.write_bytes(b"broken")
    statuses, _, errors = script_in_processes(2, [*SMALL, "--data-path", data, "--eval"], tmp_path)
    assert statuses in ([1, 2], [2, 2])  # the connection of the first process may break first
    assert errors.count(f"main_act.py: error: {broken}: cannot be read as an image") == 1


def _broken_step(rank, path):
    model = halting_model(3.5, 1.5)
    if rank == 1:
        model.head.weight.register_hook(lambda grad: grad * float("nan"))
    try:
        one_step(DistributedDataParallel(model), (images(4), torch.arange(4)))
    except FloatingPointError as error:
        (path / str(rank)).write_text(str(error))


def test_nonfinite_gradient_raises_in_every_process(tmp_path):
    in_processes(_broken_step, tmp_path)
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()
    assert "head.weight is not finite" in (tmp_path / "0").read_text()


@pytest.mark.slow
def test_two_nodes(tmp_path):
    """Two network namespaces stand in for nodes. The weights equal those of two processes on one node."""
    attempt = ["ip", "netns", "add", "avit-test"]
    if shutil.which("ip") is None or subprocess.run(attempt, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not allow network namespaces")
    subprocess.run(["ip", "netns", "delete", "avit-test"], check=True)
    data = make_image_folder(tmp_path / "data", classes=3, train=8, val=3)
    flags = (*SMALL, "--data-path", data, "--epochs", 1, "--gate_scale", 10, "--gate_center", 5, "--output_dir")
    fork(2, *flags, tmp_path / "one", log=tmp_path)
    done = start([ROOT / "tests" / "tools" / "two_nodes.sh", *flags, tmp_path / "two"])
    assert "number of processes: 2" in done.stdout
    one, two = (torch.load(tmp_path / name / "checkpoint.pth")["model"] for name in ("one", "two"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def make_trainer(model):
    criterion = losses.AdaptiveLoss(nn.CrossEntropyLoss(), 8, 0.1, 0.1)
    return Trainer(model, criterion, torch.optim.SGD(model.parameters(), lr=0.1), torch.device("cpu"))


def one_step(model, batch):
    trainer = make_trainer(model)
    train_one_epoch(trainer, [batch], EpochState(0))
    return trainer.model_without_ddp.state_dict()


def _step_of_a_share(rank, path):
    x, targets = images(8)[rank::2], (torch.arange(8) % 7)[rank::2]
    state = one_step(DistributedDataParallel(halting_model(3.5, 1.5)), (x, targets))
    if rank == 0:
        torch.save(state, path)


def test_step_of_two_processes_equals_one_of_the_global_batch(tmp_path):
    """This includes the prior, because its scores are averaged over the processes first."""
    in_processes(_step_of_a_share, tmp_path / "state.pth")
    alone = one_step(halting_model(3.5, 1.5), (images(8), torch.arange(8) % 7))
    together = torch.load(tmp_path / "state.pth")
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


# The prior is off, because it is computed per micro-batch.
BUILT = "--opt sgd --lr 6.4 --clip-grad 0.05 --accum-steps 2 --model-ema-decay 0.5 --mixup 0 --cutmix 0"
BUILT += " --distr_prior_alpha 0 --target-macs 0.4"


def _train_as_built(rank, path, processes=2):
    args = parse_args([*BUILT.split(), "--batch-size", str(4 // processes)])
    model = halting_model(3.5, 1.5)
    trainer = build_trainer(args, model, [*"abcdefg"], torch.device("cpu"))
    trainer.budget = build_budget(args, model, updates_per_epoch=2)
    batches = [(images(4, seed=seed)[rank::processes], torch.arange(4)[rank::processes]) for seed in range(4)]
    for number in range(2):
        train_one_epoch(trainer, batches, EpochState(number))
    if rank == 0:
        bucket_view = getattr(trainer.model, "gradient_as_bucket_view", None)
        torch.save({"bucket_view": bucket_view, **trainer.state_dict()}, path)


def test_training_state_of_two_processes_equals_that_of_one(tmp_path):
    """This covers accumulation, clipping, averaged weights and budget. Gradients are views of DDP's buckets."""
    in_processes(_train_as_built, tmp_path / "2")
    _train_as_built(0, tmp_path / "1", processes=1)
    one, two = (torch.load(tmp_path / name) for name in "12")
    assert two["bucket_view"]
    assert two["budget_controller"] == pytest.approx(one["budget_controller"])
    for part in ("model", "model_ema"):
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def _epoch_with_one_slow_loader(rank, path):
    epoch = EpochState(0, seconds=1000.0, waiting_seconds=900.0 * rank)
    trainer = make_trainer(DistributedDataParallel(halting_model()))
    means = train_one_epoch(trainer, [(images(4), torch.arange(4))], epoch)
    torch.save([means["data_wait"], epoch.state_dict()["data_wait"]], path / str(rank))


def test_data_wait_is_that_of_the_slowest_loader(tmp_path):
    """Every process reports it."""
    in_processes(_epoch_with_one_slow_loader, tmp_path)
    for rank in "01":
        assert torch.load(tmp_path / rank) == pytest.approx([0.9, 0.9], abs=0.05)


def _labels_of_a_share(rank, root, path):
    train, val = (
        build_dataset("wds/", str(root), part, (32, 32), AUGMENTATION, num_classes=16, batch_size=2)
        for part in (True, False)
    )
    found = []
    for stream, epochs in ((train, range(3)), (val, range(1))):
        options = {"persistent_workers": True, "multiprocessing_context": "fork"}  # spawning takes 10 s
        loader = DataLoader(stream, 2, num_workers=stream.prepare_workers(2), **options)
        for epoch in epochs:
            stream.set_epoch(epoch)
            found.append([label for _, targets in loader for label in targets.tolist()])
    torch.save(found, path / str(rank))


def test_two_processes_read_each_image_of_a_stream_once_per_epoch(tmp_path):
    """There are four training shards for two processes with two workers each, and three validation shards."""
    in_processes(_labels_of_a_share, make_shards(tmp_path / "wds"), tmp_path)
    *epochs, val = zip(torch.load(tmp_path / "0"), torch.load(tmp_path / "1"))
    assert len(epochs) == 3
    for first, second in epochs:
        assert len(first) == len(second) == 8
        assert sorted(first + second) == list(range(16))
    assert len({tuple(first) for first, _ in epochs}) > 1
    assert sorted(val[0] + val[1]) == list(range(15))


def test_command_trains_on_shards(tmp_path):
    root = make_shards(tmp_path / "wds")
    data = (*SMALL, "--data-set", "wds/", "--data-path", root, "--num-classes", 16, "--output_dir")
    fork(2, *data, tmp_path / "out", "--epochs", 2, "--num_workers", 2, log=tmp_path)
    results = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        fork(processes, *data, out, "--eval", "--finetune", tmp_path / "out" / "checkpoint.pth", log=out)
        results[processes] = json.loads((out / "eval.json").read_text())
    assert results[1]["images"] == results[2]["images"] == 15
    assert results[2]["loss"] == pytest.approx(results[1]["loss"], rel=1e-5)


def _step_with_uneven_halting(rank, path):
    x = images(4) if rank else images(4) * 0
    model = halting_model(2.0, 0.5)
    with torch.no_grad():  # brighter images halt later
        model.patch_embed.proj.weight[0] = -0.5
        depth = model(x + rank, return_halting=True)[1].depth.max().item()
    one_step(DistributedDataParallel(model), (x + rank, torch.arange(4)))
    torch.save(depth, path / str(rank))


def test_ranks_may_halt_at_different_depths(tmp_path):
    """No find_unused_parameters is needed, because blocks that one process does not reach get zero gradients."""
    in_processes(_step_with_uneven_halting, tmp_path)
    assert torch.load(tmp_path / "0") < torch.load(tmp_path / "1")
