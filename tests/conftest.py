"""What the tests share: the repository on the path, parity cases, models that really halt."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import models_act  # noqa: E402

torch.set_num_threads(2)
PARITY = sorted((ROOT / "tests" / "parity").glob("*.npz"))


class ParityCase:
    """One of tests/parity: a small model with its inputs, outputs, losses and gradients."""

    def __init__(self, path: Path):
        arrays = dict(np.load(path))
        self.config = json.loads(str(arrays.pop("config")))
        self.values = {name: torch.from_numpy(value) for name, value in arrays.items()}
        self.weights = self._group("weights/")
        self.grads = self._group("grads/")

    def _group(self, prefix: str) -> dict:
        return {k.removeprefix(prefix): v for k, v in self.values.items() if k.startswith(prefix)}

    def model(self, **kwargs) -> torch.nn.Module:
        names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
        names += ("gate_scale", "gate_center", "halt_eps")
        distilled = self.config["distilled"]
        make = models_act.AdaptiveVisionTransformerDistilled if distilled else models_act.AdaptiveVisionTransformer
        model = make(**{name: self.config[name] for name in names}, **kwargs)
        model.load_state_dict(self.weights, strict=True)
        if distilled:
            model.set_distilled_training(True)
        return model


@pytest.fixture(params=PARITY, ids=lambda path: path.stem)
def parity(request) -> ParityCase:
    return ParityCase(request.param)
