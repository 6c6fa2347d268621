import pytest
import torch
from PIL import Image

from datasets import evaluation_transform
from training.arguments import parse_args
from training.build import build_optimizer, training_and_validation_set


def test_no_aug_takes_training_images_as_in_evaluation(image_folder):
    flags = ["--data-path", str(image_folder), "--input-size", "24", "--reprob", "1", "--aa", "rand-m9"]
    plain, varied = (training_and_validation_set(parse_args([*flags, *more]))[0] for more in (["--no-aug"], []))
    pixels = evaluation_transform((24, 24))(Image.open(plain.samples[3][0]))
    assert all(torch.equal(plain[3][0], pixels) for _ in range(5))
    assert len({varied[3][0].sum().item() for _ in range(5)}) > 1
    assert len(plain) == len(varied) == 15


def test_learning_rate_scales_with_the_joint_batch():
    args = parse_args(["--batch-size", "128", "--accum-steps", "2", "--lr", "0.001"])
    assert build_optimizer(args, torch.nn.Linear(2, 2)).param_groups[0]["lr"] == pytest.approx(0.001 * 128 * 2 / 512)
