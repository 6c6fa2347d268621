"""Flags that were given and do nothing: each command names them, and ordinary commands have none."""

import json
import re
import shlex

import pytest
import torch
from conftest import ROOT, save_halting_micro
from hypothesis import given
from hypothesis import strategies as st
from test_docs import DOCS, ORIGINAL_COMMANDS, README, RECIPES, arguments_of, code_lines

import benchmark
import cuda_check
import export_onnx
import main_act
import visualize
from training import flag_effects
from training.arguments import make_parser, parse_args

COMMANDS = {
    "main_act.py": (make_parser, flag_effects.MAIN_ACT),
    "visualize.py": (visualize.make_parser, flag_effects.VISUALIZE),
    "benchmark.py": (benchmark.make_parser, flag_effects.BENCHMARK),
    "export_onnx.py": (export_onnx.make_parser, flag_effects.EXPORT_ONNX),
    "cuda_check.py": (cuda_check.make_parser, flag_effects.CUDA_CHECK),
}


def unmet(command: str, flags: str) -> dict[str, str]:
    """Return what the given flags that do nothing need, by flag."""
    make, table = COMMANDS[command]
    parsed = make().parse_args(shlex.split(flags))
    return {flag: need.phrase for flag, need in flag_effects.unmet_conditions(parsed, table).items()}


@pytest.mark.parametrize("command", COMMANDS)
def test_table_has_every_flag_of_the_command(command):
    make, table = COMMANDS[command]
    flags = {action.dest for action in make()._actions if action.option_strings} - {"help"}
    assert set(table) == flags


TRAINING = "training"
INEFFECTIVE = [
    ("main_act.py", "--teacher-path t.pth", {"--teacher-path": "--distillation-type"}),
    ("main_act.py", "--teacher_path=t.pth", {"--teacher-path": "--distillation-type"}),
    (
        "main_act.py",
        "--teacher-model x --distillation-type self",
        {"--teacher-model": "--distillation-type soft or hard"},
    ),
    ("main_act.py", "--class-index c.json --html", {"--class-index": "--demo", "--html": "--demo"}),
    ("main_act.py", "--class-index c.json --eval", {"--class-index": "--demo"}),
    ("main_act.py", "--pretrained --finetune a", {"--pretrained": "no --finetune or --pretrained-path"}),
    ("main_act.py", "--drop-path 0.1 --finetune a", {"--drop-path": "no --finetune, which disables dropout"}),
    ("main_act.py", "--mixup 0 --cutmix 0 --mixup-prob 0.5", {"--mixup-prob": "--mixup or --cutmix above 0"}),
    ("main_act.py", "--cutmix 0 --mixup-switch-prob 0.5", {"--mixup-switch-prob": "--mixup and --cutmix above 0"}),
    ("main_act.py", "--no-aug --aa rand-m9 --reprob 0.5", {"--aa": "no --no-aug", "--reprob": "no --no-aug"}),
    ("main_act.py", "--color-jitter 0.4", {"--color-jitter": "--aa none or 3a"}),
    (
        "main_act.py",
        "--no-halting --gate-center 0 --gate-jitter 1",
        dict.fromkeys(("--gate-center", "--gate-jitter"), "a model that halts"),
    ),
    ("main_act.py", "--target-macs 0.5 --ponder_scale_token 1", {"--ponder-scale-token": "no --target-macs"}),
    ("main_act.py", "--no-model-ema --model-ema-decay 0.9", {"--model-ema-decay": "--model-ema"}),
    ("main_act.py", "--dr 0.2", {"--dr": "--sched step or multistep or plateau or poly"}),
    (
        "main_act.py",
        "--sched step --min-lr 0",
        {"--min-lr": "--sched cosine or tanh or plateau or poly or wsd or rsqrt"},
    ),
    ("main_act.py", "--momentum 0.9", {"--momentum": "an optimizer with momentum"}),
    ("main_act.py", "--opt sgd --opt-betas 0.9 0.99", {"--opt-betas": "an optimizer with betas"}),
    ("main_act.py", "--inat-category genus", {"--inat-category": "--data-set INAT or INAT19"}),
    ("main_act.py", "--data-set DIGITS --data-path x", {"--data-path": "a dataset with files"}),
    ("main_act.py", "--keep 3", {"--keep": "--output-dir"}),
    ("main_act.py", "--use-ema", {"--use-ema": "weights from --finetune or --pretrained-path"}),
    ("main_act.py", "--device cpu --pin-mem", {"--pin-mem": "a CUDA device"}),
    ("main_act.py", "--device cpu --cuda-graphs", {"--cuda-graphs": "a CUDA device"}),
    (
        "main_act.py",
        "--device cuda --cuda_graphs --no-halting --compile",
        dict.fromkeys(("--cuda-graphs", "--compile"), "a model that halts"),
    ),
    ("main_act.py", "--device cuda --cuda-graphs --no-zip-tokens", {"--cuda-graphs": "--zip-tokens"}),
    (
        "main_act.py",
        "--device cuda --cuda-graphs --grad-checkpointing",
        {"--cuda-graphs": "no --grad-checkpointing"},
    ),
    ("main_act.py", "--device cuda --compile", {"--compile": "--cuda-graphs"}),
    ("main_act.py", "--device cuda --cuda-graphs --compile --amp none", {"--compile": "--amp fp16 or bf16"}),
    ("main_act.py", "--eval --finetune a --lr 0.1 --pretrained", dict.fromkeys(("--lr", "--pretrained"), TRAINING)),
    ("main_act.py", "--demo --finetune a --pretrained-path b", {"--pretrained-path": TRAINING}),
    ("main_act.py", "--demo --finetune a --early-exit", {"--early-exit": "--eval"}),
    (
        "visualize.py",
        "x.png --finetune a --data-path d --demo-by wrong",
        dict.fromkeys(("--data-path", "--demo-by"), "--summary"),
    ),
    (
        "visualize.py",
        "--summary --finetune a --animation gif --demo-by std",
        {"--animation": "images", "--demo-by": "--html"},
    ),
    (
        "visualize.py",
        "--curves out --finetune a --cmap hot",
        dict.fromkeys(("--finetune", "--cmap"), "images or --summary"),
    ),
    ("benchmark.py", "--data-path d --data-set DIGITS", dict.fromkeys(("--data-path", "--data-set"), "--finetune")),
    (
        "benchmark.py",
        "--finetune a --mean-depth 7",
        {"--mean-depth": "no --finetune, which measures the depths of images"},
    ),
    ("benchmark.py", "--threads 1", {"--threads": "--onnx"}),
    ("benchmark.py", "--count --runs 3", {"--runs": "no --count-ops"}),
    ("cuda_check.py", "--only parity --seconds 9", {"--seconds": "the part speed"}),
]


@pytest.mark.parametrize(("command", "flags", "needs"), INEFFECTIVE, ids=lambda value: str(value)[:60])
def test_given_flag_without_effect_is_named_with_what_it_needs(command, flags, needs):
    assert unmet(command, flags) == needs


@pytest.mark.parametrize("has_cuda", [True, False])
def test_flag_for_cuda_is_named_on_a_machine_without_cuda(has_cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    assert unmet("main_act.py", "--pin-mem") == ({} if has_cuda else {"--pin-mem": "a CUDA device"})
    assert unmet("main_act.py", "--pin-mem --device cuda") == {}, "a device that does not exist is an error of its own"


EFFECTIVE = [
    "--pretrained --resume auto --output-dir o",  # the same command, resumed
    "--pretrained-path a --resume auto --output-dir o",
    "--no-aug --mixup 0 --cutmix 0 --aa none --reprob 0 --color-jitter 0 --drop 0 --finetune a --drop-path 0",
    "--no-halting --no-early-exit --no-zip-tokens --distr-prior-alpha 0",  # off in any case
    "--distillation-type self --teacher-path a --distillation-type none",
    "--device cuda --cuda-graphs --compile",  # half precision is the default on CUDA
    "--device cpu --no-cuda-graphs",
    "--eval --pretrained --use-ema --resume a",
    "--eval --pretrained-path a --early-exit",
    "--opt sgd --momentum 0.9 --sched step --decay-epochs 3 --decay-rate 0.5 --cutmix-minmax 0.2 0.4 --mixup 0",
    "--demo --finetune a --demo-by wrong --html --class-index c",
]


@pytest.mark.parametrize("flags", EFFECTIVE)
def test_flag_with_effect_is_not_named(flags):
    assert not set(unmet("main_act.py", flags).values()) - {TRAINING}
    if "--eval" not in flags:
        assert unmet("main_act.py", flags) == {}


def commands_of_pages() -> list[tuple[str, str]]:
    """Return the script and the arguments of each command in README, docs, recipes, Makefile and results."""
    makefile = re.sub(r" *\\\n *", " ", (ROOT / "Makefile").read_text()).replace("$(ACT)", "main_act.py")
    lines = [line for page in (README, *DOCS) for line in code_lines(page)] + makefile.splitlines()
    lines += [f"main_act.py @{path}" for path in RECIPES] + list(ORIGINAL_COMMANDS.values())
    lines += [f"{line} --eval --finetune a-vit-weights/tiny-10-30.pth" for line in ORIGINAL_COMMANDS.values()]
    recorded = [json.loads(path.read_text()) for path in (ROOT / "experiments").glob("*/results/*.json")]
    commands = {record["command"] for record in recorded if isinstance(record, dict) and "command" in record}
    lines += [re.sub(r"-m experiments.baselines \S+", "main_act.py", command) for command in commands]
    lines = [re.sub(r"\$\(DIGITS\)|\|\|.*", "", line).replace("[", "").replace("]", "") for line in lines]
    found = [(script, arguments_of(line, script)) for line in lines for script in COMMANDS if f"{script} " in line]
    return sorted({(script, shlex.join(words)) for script, words in found if words and "..." not in words})


@pytest.mark.parametrize(("command", "flags"), commands_of_pages())
def test_commands_of_the_pages_give_no_flag_without_effect(command, flags, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # some pages are about GPUs
    assert not set(unmet(command, flags).values()) - {TRAINING}


FLAGS = [action for action in make_parser()._actions if action.option_strings and action.dest != "help"]


@given(st.lists(st.sampled_from(FLAGS), max_size=6), st.sampled_from(["", "--eval", "--demo"]))
def test_only_given_flags_are_named_and_defaults_never(actions, mode):
    flags = [action.option_strings[-1] for action in actions if action.nargs == 0]
    try:
        args = parse_args([*flags, *filter(None, [mode])])
    except SystemExit:
        return
    assert set(args.given.values()) == {*flags, *filter(None, [mode])}
    assert set(flag_effects.unmet_conditions(args, flag_effects.MAIN_ACT)) <= set(flags)
    assert "given" not in vars(args)


# The printed lines ---------------------------------------------------------------------------------

MODEL = "--model avit_micro_patch4_32 --input-size 32 --num_workers 0 --batch-size 3 --data-path"


def test_lines_of_a_training_command_and_of_its_evaluation(image_folder, tmp_path, capsys):
    start = save_halting_micro(tmp_path / "start.pth", num_classes=3)
    flags = [*MODEL.split(), str(image_folder), "--epochs", "1", "--warmup-epochs", "0", "--resplit"]
    flags += ["--teacher_path", "nowhere.pth"]
    main_act.main([*flags, "--pretrained-path", str(start)])
    printed = capsys.readouterr()
    assert "warning: no effect here: --teacher-path (needs --distillation-type)\n" in printed.err
    assert "note: accepted for existing scripts, without effect: --resplit\n" in printed.out
    main_act.main([*flags, "--eval", "--finetune", str(start)])
    printed = capsys.readouterr()
    assert "no effect" not in printed.err
    assert "note: --eval does not use --epochs, --teacher-path\n" in printed.out


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("--finetune a.pth --pretrained-path b.pth", "starting weights"),
        ("--eval --finetune a.pth --resume b.pth", "weights to evaluate"),
    ],
)
def test_two_files_of_weights_exit_with_2(flags, names, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args(flags.split())
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "a.pth" in message
    assert "b.pth" in message
    assert names in message
