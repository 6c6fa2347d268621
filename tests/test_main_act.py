"""The command line end to end, in this process."""

import argparse
import csv
import json
import shutil

import pytest
import timm
import torch
from conftest import halting_model, make_image_folder, save_halting_micro
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_act
import visualize
from datasets import build_dataset
from training import arguments
from training.checkpoints import Checkpoint, load_checkpoint

SMALL = ["--model", "avit_micro_patch4_32", "--input-size", "32", "--num_workers", "0", "--batch-size", "4"]


def run(*argv):
    main_act.main([*SMALL, *map(str, argv)])


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


@pytest.fixture
def trained(image_folder, tmp_path):
    """Train one epoch with the default flags and a gate by which tokens halt. Returns data and output folders."""
    out = tmp_path / "out"
    gate = ("--gate_scale", 10, "--gate_center", 5)
    run("--data-path", image_folder, "--output_dir", out, "--epochs", 1, *gate, "--tensorboard")
    return image_folder, out


# TensorBoard tags that scripts read.
POINTS = """
train/loss train/lr train/cnt_token_mean train/cnt_token_max train/cnt_token_min train/ponder_loss_token
train/distr_prior_loss train/expected_depth_ratio test/acc_top1 test/acc_top5 test/loss train/live_share/block_01
train/layer_scores/block_12 train/class_token_depth train/classification_loss train/data_wait
"""


def test_train_evaluate_resume_demo(trained, tmp_path, capsys):
    data, out = trained
    assert {"checkpoint.pth", "best.pth", "log.txt"} <= {p.name for p in out.iterdir()}
    checkpoint = load_checkpoint(str(out / "checkpoint.pth"))
    assert checkpoint["gate"] == {"gate_scale": 10.0, "gate_center": 5.0, "halt_eps": 0.01}
    assert checkpoint["args"]["epochs"] == 1
    assert {"model", "model_ema", "optimizer", "scaler", "epoch", "batches"} <= checkpoint.keys()
    (line,) = log_of(out)
    expected = {"epoch", "n_parameters", "train_loss", "train_lr", "test_loss", "test_acc1", "test_acc5"}
    assert expected | {"test_depth_mean", "test_ema_acc1", "train_ponder_loss_token"} <= line.keys()
    assert 0 < line["train_data_wait"] < 1
    assert set(POINTS.split()) <= set(EventAccumulator(str(out)).Reload().Tags()["scalars"])

    run("--data-path", data, "--output_dir", out, "--epochs", 3, "--resume", out / "checkpoint.pth")
    assert [line["epoch"] for line in log_of(out)] == [0, 1, 2]

    capsys.readouterr()
    evaluation = tmp_path / "evaluation"
    run("--data-path", data, "--eval", "--finetune", out / "best.pth", "--output_dir", evaluation)
    printed = capsys.readouterr().out
    assert "gate_center 5, from the checkpoint" in printed
    assert "Accuracy of the network on the 9 test images:" in printed
    result = json.loads((evaluation / "eval.json").read_text())
    assert result["images"] == 9
    assert result["depth_mean"] < 12, "the network does not halt"
    assert result["gmacs"] < result["gmacs_static"]
    assert result["images_per_s_zipped"] > 0
    assert result["images_per_s_masked"] > 0

    run("--data-path", data, "--demo", "--finetune", out / "best.pth", "--output_dir", evaluation)
    images = {p.name for p in (evaluation / "token_act_visualization").iterdir()}
    assert "class2_combined.jpg" in images
    assert len(images) == 3 * 3 + 1


def test_fine_tuning_from_static_weights_replaces_the_head(image_folder, tmp_path, capsys):
    static, adaptive = tmp_path / "static", tmp_path / "adaptive"
    run("--data-path", image_folder, "--output_dir", static, "--epochs", 1, "--no-halting")
    assert load_checkpoint(str(static / "checkpoint.pth"))["gate"] is None
    assert "train_ponder_loss_token" not in log_of(static)[0]
    other = make_image_folder(tmp_path / "other", classes=2)
    for part in ("train", "val"):
        (other / part / "class_0").rename(other / part / "another")
    flags = ("--data-path", other, "--pretrained-path", static / "checkpoint.pth", "--output_dir", adaptive)
    run(*flags, "--epochs", 1, "--gate_scale", 10, "--gate_center", 5)
    assert "no head for these classes; training starts with a new head of 2" in capsys.readouterr().err
    assert load_checkpoint(str(adaptive / "checkpoint.pth"))["model"]["head.weight"].shape[0] == 2


def test_classes_are_matched_by_name(trained, tmp_path, capsys):
    """The dataset has fewer classes or another order, in evaluation and in further training of the same head."""
    data, out = trained
    expected = evaluated(data, out / "best.pth", tmp_path / "all")
    renamed = {"class_0": "z", "class_1": "y", "class_2": "x"}  # another alphabetical order
    checkpoint = load_checkpoint(str(out / "best.pth"))
    torch.save(checkpoint | {"classes": [renamed[name] for name in checkpoint["classes"]]}, tmp_path / "renamed.pth")
    for part in ("train", "val"):
        for old, new in renamed.items():
            (data / part / old).rename(data / part / new)
    found = evaluated(data, tmp_path / "renamed.pth", tmp_path / "renamed")
    assert found["acc1"] == expected["acc1"]
    assert found["loss"] == pytest.approx(expected["loss"])
    assert "classes are matched by name: the dataset has x, y, z; the checkpoint has z, y, x" in capsys.readouterr().out

    in_order = evaluated(data, out / "best.pth", tmp_path / "in order")
    assert in_order["loss"] != pytest.approx(expected["loss"])
    message = (
        "no class name matches: the dataset has x, y, z; the checkpoint has class_0, class_1, class_2. "
        "Classes are matched by position instead."
    )
    assert message in capsys.readouterr().err
    flags = ("--data-path", data, "--epochs", 2, "--output_dir", tmp_path / "more")
    assert "requires the same classes in the same order" in mistake(
        capsys, *SMALL, *flags, "--resume", tmp_path / "renamed.pth"
    )

    run(*flags, "--epochs", 1, "--finetune", tmp_path / "renamed.pth", "--lr", 0)
    head = load_checkpoint(str(tmp_path / "more" / "checkpoint.pth"))["model"]["head.weight"]
    assert torch.allclose(head, checkpoint["model"]["head.weight"].flip(0), atol=1e-4)
    assert not torch.allclose(head, checkpoint["model"]["head.weight"], atol=1e-2)

    (data / "val" / "x").rename(data / "val" / "unknown")
    arguments = ("--data-path", data, "--eval", "--finetune", tmp_path / "renamed.pth")
    assert "renamed.pth cannot predict unknown: the dataset has " in mistake(capsys, *SMALL, *arguments)


def evaluated(data, checkpoint, out):
    run("--data-path", data, "--eval", "--finetune", checkpoint, "--output_dir", out)
    return json.loads((out / "eval.json").read_text())


def test_finetune_disables_dropout_and_stochastic_depth(trained, monkeypatch):
    data, out = trained
    made = []
    create = timm.create_model

    def recorded_create(*args, **options):
        made.append(options)
        return create(*args, **options)

    monkeypatch.setattr(timm, "create_model", recorded_create)
    rest = ("--data-path", data, "--epochs", 1, "--drop", 0.1)
    run(*rest, "--finetune", out / "best.pth")
    run(*rest, "--pretrained-path", out / "best.pth")
    rates = [(k["pos_drop_rate"], k["proj_drop_rate"], k["drop_path_rate"]) for k in made if "pos_drop_rate" in k]
    assert rates == [(0, 0, 0), (0.1, 0.1, 0.1)]


@pytest.mark.parametrize(
    "flags",
    [
        "--amp bf16 --clip-grad 1 --accum-steps 2 --grad-checkpointing",
        "--no-repeated-aug --no-model-ema --mixup 0 --cutmix 0 --smoothing 0 --aa none --drop 0.1",
        "--mixup-mode elem --cutmix-minmax 0.2 0.8 --model-ema-force-cpu --opt lamb --opt-betas 0.9 0.99",
        "--sched plateau --patience-epochs 1 --opt sgd --momentum 0.8 --no-zip-tokens",
        "--sched step --decay-epochs 1 --lr-noise 0.2 0.9 --no-halting --remode const --recount 2",
        "--batch-size 32 --train-interpolation random --color-jitter 0.2 --aa none",
        "--batch-size 1 --epochs 1",
        "--act_mode 4 --warmup_epoch 5 --dist-eval --ponder_scale_token 0.1 --num_workers 1",
    ],
)
def test_flags_are_accepted_in_training(image_folder, flags):
    run("--data-path", image_folder, "--epochs", 2, "--warmup-epochs", 1, *flags.split())


def test_cuda_graphs_on_a_cpu_warn_and_change_nothing(image_folder, tmp_path, capsys):
    flags = ("--data-path", image_folder, "--epochs", 1, "--warmup-epochs", 0, "--device", "cpu", "--output_dir")
    run(*flags, tmp_path / "without")
    warnings = capsys.readouterr().err
    run(*flags, tmp_path / "with", "--cuda-graphs", "--compile")
    line = "warning: no effect here: --cuda-graphs (needs a CUDA device), --compile (needs a CUDA device)\n"
    assert capsys.readouterr().err == line + warnings
    logs = [log_of(tmp_path / name)[0].keys() for name in ("without", "with")]
    assert logs[0] == logs[1]
    weights = [load_checkpoint(str(tmp_path / name / "checkpoint.pth"))["model"] for name in ("without", "with")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_graph_hits_are_logged_and_printed(image_folder, tmp_path, capsys, every_second_call_replays):
    """Of 3 training batches of 4 images each, 1 is replayed; of the 3 test batches of 4, 4 and 1 images, too."""
    out, flags = tmp_path / "out", ("--data-path", image_folder, "--cuda-graphs", "--output_dir", tmp_path / "out")
    run(*flags, "--epochs", 1, "--tensorboard", "--gate_scale", 10, "--gate_center", 5)
    (line,) = log_of(out)
    assert line["train_graph_hits"] == pytest.approx(1 / 3)
    tags = EventAccumulator(str(out)).Reload().Tags()["scalars"]
    assert {"train/graph_hits", "test/graph_hits"} <= set(tags)
    capsys.readouterr()
    run(*flags, "--eval", "--finetune", out / "checkpoint.pth")
    assert json.loads((out / "eval.json").read_text())["graph_hits"] == pytest.approx(4 / 9)
    assert "replayed from CUDA graphs    44.4% of the images\n" in capsys.readouterr().out


def test_without_output_dir_nothing_is_written(image_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    run("--data-path", image_folder, "--epochs", 1)
    run("--data-path", image_folder, "--eval")
    assert "no weights given" in capsys.readouterr().err
    assert not list((tmp_path / "cwd").iterdir())


def test_use_ema_evaluates_the_ema_weights(image_folder, tmp_path, capsys):
    model = timm.create_model("avit_micro_patch4_32", num_classes=3)
    average = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    torch.save({"model": model.state_dict(), "model_ema": average}, tmp_path / "c.pth")
    run("--data-path", image_folder, "--eval", "--finetune", tmp_path / "c.pth", "--use-ema")
    assert "33.3%" in capsys.readouterr().out  # always the first class


@pytest.mark.parametrize("name", ["tiny-10-30.pth", "visualization-tiny.pth"])
def test_published_checkpoint_runs_demo_with_its_gate(tmp_path, name, capsys):
    """The file has the structure of the published ones: weights under `model`, flags in a Namespace."""
    data = make_image_folder(tmp_path / "data", classes=2, val=1)
    model = timm.create_model("avit_tiny_patch16_224", num_classes=2)
    args = argparse.Namespace(gate_scale=10.0, gate_center=30.0, lr=1e-3)
    torch.save({"model": model.state_dict(), "optimizer": {}, "epoch": 99, "args": args}, tmp_path / name)
    flags = ["--data-path", data, "--finetune", tmp_path / name, "--demo", "--output_dir", tmp_path, "--num_workers", 0]
    main_act.main([str(f) for f in flags])
    printed = capsys.readouterr()
    gate = "5" if name.startswith("vis") else "10"
    assert f"gate_scale {gate}, from the file name" in printed.out
    assert ("warning" in printed.err) == name.startswith("vis")
    assert (tmp_path / "token_act_visualization" / "class1_combined.jpg").exists()


def test_rectangular_images_train_evaluate_and_draw(image_folder, tmp_path, monkeypatch):
    """Train, evaluate at another size, and draw: the depth map has the image's shape."""
    out = tmp_path / "out"
    gate = ("--gate_scale", 10, "--gate_center", 5)
    run("--data-path", image_folder, "--output_dir", out, "--epochs", 1, "--input-size", 16, 40, *gate)
    for size in ((16, 40), (24, 24)):
        flags = ("--data-path", image_folder, "--input-size", *size, "--finetune", out / "checkpoint.pth")
        run(*flags, "--demo", "--output_dir", tmp_path / "demo")
        reference = Image.open(tmp_path / "demo" / "token_act_visualization" / "class0_ref.jpg")
        assert reference.width * size[0] == reference.height * size[1]
        run(*flags, "--eval")


def test_soft_distillation_trains(image_folder, tmp_path):
    teacher = timm.create_model("resnet10t", num_classes=3)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
    flags = ("--model", "avit_tiny_distilled_patch16_224", "--data-path", image_folder, "--epochs", 1)
    teacher = ("--teacher-model", "resnet10t", "--teacher-path", tmp_path / "teacher.pth")
    run(*flags, *teacher, "--distillation-type", "soft")


# Invalid input -----------------------------------------------------------------------------------


def mistake(capsys, *argv):
    """Run, check for exit status 2 and one line on stderr, and return the line."""
    with pytest.raises(SystemExit) as stopped:
        run(*argv)
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert line.startswith("main_act.py: error: ")
    return line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data-path /no/such/folder", "no such folder"),
        ("--data-set IMNET", "needs --data-path"),
        ("--model avit_tinny_patch16_224", "did you mean avit_tiny_patch16_224"),
        ("--model resnet50", "--model resnet50: not a plain vision transformer"),
        ("--model vit_base_patch16_siglip_224", "global_pool is 'map'"),
        (
            "--model vit_base_patch16_rpn_224",
            "this model cannot be made adaptive: blocks.0 is a ResPostBlock (did you mean vit_base_patch16_",
        ),
        ("--model vit_small_patch14_dinov3", "did you mean vit_small_patch16_dinov3"),
        ("--model deit_tiny_patch16_224.fb_in1", "with this tag (did you mean fb_in1k?)"),
        ("--data-set CIFAR100", "did you mean CIFAR10"),
        ("--batch-size 0", "must be at least 1"),
        ("--batch 4", "unrecognized arguments"),
        ("--data-set DIGITS --input-size 30", "--input-size 30 30 is not a multiple of the patch size 4 x 4"),
        ("--input-size 0", "must be at least 1"),
        ("--input-size 1 2 3", "one number, or height and width"),
        ("--data-set DIGITS --device nonsense", "unknown device"),
        ("--drop-path 2", "must be from 0 to 1"),
        ("--lr nan", "must be at least 0"),
        ("--gate_scale inf", "between -1e+06 and 1e+06"),
        ("--eval --demo", "cannot be combined"),
        ("--amp fp16 --device cpu", "needs CUDA"),
        ("--tensorboard", "--output-dir"),
        ("--data-set DIGITS --opt nonsense", "--opt nonsense"),
        ("--data-set DIGITS --sched nonsense", "--sched nonsense"),
        ("--data-set DIGITS --sched none", "--sched constant"),
        ("--data-set DIGITS --aa nonsense", "not a policy"),
        ("--sched step --decay-epochs 0", "must be above 0"),
        ("--opt-betas 0.9", "expected 2 arguments"),
        ("--remode nonsense", "invalid choice"),
        ("--cutmix-minmax 0.8 0.2", "--cutmix-minmax 0.8 0.2: the smaller number must come first"),
        ("--seed 5000000000", "below 2147483648, got 5000000000"),
        ("--device meta", "expected cuda or cpu"),
        ("--world_size 4 --device cpu", "torchrun"),
        (
            "--data-set DIGITS --distillation-type hard",
            "requires a distilled model, got --model avit_micro_patch4_32",
        ),
        ("--data-set DIGITS --eval --finetune missing.pth", "no such file"),
        ("--data-set DIGITS --resume http://a.b/c.pth", "no such file"),
        ("--data-set DIGITS --pretrained", "No pretrained weights exist"),
    ],
)
def test_invalid_flags_exit_with_one_line(flags, message, capsys):
    assert message in mistake(capsys, *flags.split())


def test_class_alone_has_its_recall_in_every_command(trained, tmp_path, capsys):
    """Evaluation, charts and galleries of one class predict among all classes of the network, as for the whole set."""
    data, out = trained
    checkpoint, wanted = out / "best.pth", "class_1"
    evaluated(data, checkpoint, tmp_path / "all")
    capsys.readouterr()
    for other in ("class_0", "class_2"):
        shutil.rmtree(data / "val" / other)
    result = evaluated(data, checkpoint, tmp_path / "one")
    warnings = capsys.readouterr().err
    assert warnings.count("the dataset has 1 of the network's 3 classes") == 1
    tables = [list(csv.DictReader((tmp_path / name / "predictions.csv").open(newline=""))) for name in ("all", "one")]
    found = [{row["image"]: row["prediction_name"] for row in rows if row["target_name"] == wanted} for rows in tables]
    assert found[0] == found[1]
    recall = 100 * sum(name == wanted for name in found[0].values()) / len(found[0])
    assert result["acc1"] == pytest.approx(recall)
    assert result["dataset_acc1"] == 100
    visualize.main(
        ["--summary", "--data-path", str(data), "--finetune", str(checkpoint), "--output-dir", str(tmp_path / "s")]
    )
    assert f"<dd>{recall:.2f}%</dd>" in (tmp_path / "s" / "summary.html").read_text()


def test_folders_named_by_number_are_matched_by_number(tmp_path, capsys):
    """A network of shards has placeholders as names, and its classes lie in folders, which are sorted as text."""
    data = make_image_folder(tmp_path / "data", classes=12, train=1, val=2)
    for part in ("train", "val"):
        for number in range(12):
            (data / part / f"class_{number}").rename(data / part / str(number))
    save_halting_micro(tmp_path / "shards.pth", 12, classes=[f"class {number}" for number in range(12)])
    capsys.readouterr()
    evaluated(data, tmp_path / "shards.pth", tmp_path / "out")
    assert capsys.readouterr().err.count("matched by number") == 1
    model = Checkpoint.load(str(tmp_path / "shards.pth")).build_model().eval()
    images = build_dataset("IMNET", str(data), False, (32, 32))
    with torch.no_grad():
        expected = [int(model(image[None]).argmax()) for image, _ in images]
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open(newline="")))
    assert [int(row["prediction_name"]) for row in rows] == expected
    assert len(set(expected)) > 1
    assert all(row["image"].startswith(f"{row['target_name']}/") for row in rows)


def test_unwritable_output_dir_exits_with_2(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot write to this folder" in mistake(
        capsys, "--data-set", "DIGITS", "--output_dir", tmp_path / "file" / "out"
    )


@pytest.mark.parametrize("mode", ["--eval", "--demo"])
def test_evaluating_another_class_count_exits_with_2(mode, image_folder, tmp_path, capsys):
    torch.save({"model": timm.create_model("avit_micro_patch4_32").state_dict()}, tmp_path / "c.pth")
    out = tmp_path / "out"
    rest = ("--data-path", image_folder, "--finetune", tmp_path / "c.pth", "--output_dir", out)
    assert "predicts 10 classes but the dataset has 3" in mistake(capsys, mode, *rest)
    assert not out.exists()


@pytest.mark.parametrize(
    ("mode", "make", "message"),
    [
        (["--resume"], lambda: timm.create_model("avit_micro_patch4_32", num_classes=3), "training state is missing"),
        (["--eval", "--finetune"], halting_model, "does not fit the model: blocks.8.norm1.weight is missing"),
    ],
)
def test_unsuitable_weights_exit_with_2(image_folder, tmp_path, capsys, mode, make, message):
    torch.save({"model": make().state_dict()}, tmp_path / "c.pth")
    assert message in mistake(capsys, "--data-path", image_folder, *mode, tmp_path / "c.pth")


def test_differing_training_and_validation_classes_exit_with_2(image_folder, capsys):
    (image_folder / "val" / "class_0").rename(image_folder / "val" / "other")
    assert "differ in class_0, other" in mistake(capsys, "--data-path", image_folder)


def test_diverging_training_exits_with_1(image_folder, capsys, monkeypatch):
    def diverge(*args, **kwargs):
        raise FloatingPointError("Epoch 0: the loss is not finite")

    monkeypatch.setattr("training.loop.train_one_epoch", diverge)
    with pytest.raises(SystemExit) as exit_:
        run("--data-path", image_folder)
    assert exit_.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == "main_act.py: error: Epoch 0: the loss is not finite"


# Flags -------------------------------------------------------------------------------------------

# Every flag with its default; users of the original rely on them. Model and image size: see training/network.py.
DEFAULTS = """
model=None input_size=None drop=0.0 drop_path=0.1 model_ema=True model_ema_decay=0.99996
model_ema_force_cpu=False use_ema=False grad_checkpointing=False opt=adamw opt_eps=1e-08 opt_betas=None clip_grad=None
momentum=0.9 weight_decay=0.05 accum_steps=1 epochs=300 batch_size=64 lr=0.0005 sched=cosine lr_noise=None
lr_noise_pct=0.67 lr_noise_std=1.0 warmup_lr=1e-06 min_lr=1e-05 decay_epochs=30 warmup_epochs=5 cooldown_epochs=10
patience_epochs=10 decay_rate=0.1 no_aug=False color_jitter=0.4 aa=rand-m9-mstd0.5-inc1 smoothing=0.1
train_interpolation=bicubic repeated_aug=True reprob=0.25 remode=pixel recount=1 resplit=False mixup=0.8 cutmix=1.0
cutmix_minmax=None mixup_prob=1.0 mixup_switch_prob=0.5 mixup_mode=batch teacher_model=regnety_160 teacher_path=None
distillation_type=none distillation_alpha=0.5 distillation_tau=1.0 data_path=None data_set=IMNET inat_category=name
num_workers=10 pin_mem=True output_dir=None seed=0 resume=None start_epoch=None eval=False dist_eval=False
finetune=None tensorboard=False world_size=None dist_url=env:// amp=None pretrained=False pretrained_path=None
halting=True ponder_token_scale=0.001 gate_scale=None gate_center=None distr_prior_alpha=0.01 demo=False
zip_tokens=True early_exit=True act_mode=None warmup_epoch=None train_split=None val_split=None num_classes=None
device=None checkpoint_steps=0 keep=0 max_bad_images=100 demo_images=1 demo_by=std demo_dir=None html=False
class_index=None target_macs=None budget=None gate=None gate_jitter=0.0 cuda_graphs=False compile=False
"""


def test_defaults_are_unchanged():
    expected = dict(pair.split("=", 1) for pair in DEFAULTS.split())
    actual = {name: str(value) for name, value in vars(arguments.parse_args([])).items()}
    assert actual == expected


@pytest.mark.parametrize("spelling", ["--output_dir", "--output-dir"])
def test_flag_accepts_dashes_and_underscores(spelling):
    assert arguments.parse_args([spelling, "a_b-c"]).output_dir == "a_b-c"
    assert arguments.parse_args([f"{spelling}=a_b-c"]).output_dir == "a_b-c"


def test_help_lists_every_group(capsys):
    with pytest.raises(SystemExit) as stopped:
        arguments.parse_args(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for group in ("model", "optimizer", "schedule", "augmentation", "distillation", "data", "run", "A-ViT", "demo"):
        assert f"\n{group}:" in text


def test_flags_are_read_from_a_file(tmp_path):
    (tmp_path / "a.args").write_text(
        "# a recipe\n--batch_size 7  # of them\n\n--output-dir 'a b#1'\n--opt_betas 0.8 0.9\n"
    )
    args = arguments.parse_args(["--lr", "0.1", f"@{tmp_path / 'a.args'}", "--batch-size", "8"])
    assert (args.lr, args.batch_size, args.output_dir, args.opt_betas) == (0.1, 8, "a b#1", [0.8, 0.9])


@pytest.mark.parametrize("content", [None, b"--no-such-flag\n", b"@a.args\n", b"--lr 'x\n", b"\xff\xfe"])
def test_invalid_file_of_flags_exits_with_2(tmp_path, content, capsys):
    if content is not None:
        (tmp_path / "a.args").write_bytes(content)
    mistake(capsys, f"@{tmp_path / 'a.args'}")
