"""pytest plugin that makes timm's test suite run on MODELS, zipped or masked depending on ZIP_TOKENS.

timm's tests take their parameters from timm.list_models. Here it lists the models named in MODELS, whatever
group of models is requested. Two of these models are registered here, because no registered one is of timm's Eva.
"""

import json
import os
from functools import partial

import timm
from timm.models import generate_default_cfgs, register_model

import models_act

_list_models = timm.list_models
SIZES = {"patch_size": 16, "embed_dim": 96, "num_heads": 3, "use_rot_pos_emb": True, "global_pool": "token"}
EVA = {
    "avit_rotated": {"rope_type": "dinov3", "num_reg_tokens": 4, "use_abs_pos_emb": False, "swiglu_mlp": True},
    "avit_rotated_per_block": {"rope_type": "mixed", "attn_type": "rope", "init_values": 1e-5},
}
default_cfgs = generate_default_cfgs(dict.fromkeys(EVA, models_act._cfg(fixed_input_size=True)))


def _register(name: str) -> None:
    def create(pretrained=False, **kwargs):
        return models_act._create_avit(name, pretrained, models_act.AdaptiveEva, **SIZES | EVA[name] | kwargs)

    create.__name__ = name
    globals()[name] = register_model(create)


for _name in EVA:
    _register(_name)


def _list_avit(*_, include_tags: bool = False, name_matches_cfg: bool = False, **__) -> list[str]:
    return _list_models(json.loads(os.environ["MODELS"]), include_tags=include_tags, name_matches_cfg=name_matches_cfg)


timm.list_models = _list_avit
timm.create_model = partial(timm.create_model, zip_tokens=json.loads(os.environ["ZIP_TOKENS"]))
