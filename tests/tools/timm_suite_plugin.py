"""pytest plugin that makes timm's test suite run on MODELS, zipped or masked depending on ZIP_TOKENS.

timm's tests take their parameters from timm.list_models. Here it lists the models named in MODELS, whatever
group of models is requested.
"""

import json
import os
from functools import partial

import timm

import models_act  # noqa: F401 - registers the models

_list_models = timm.list_models


def _list_avit(*_, include_tags: bool = False, name_matches_cfg: bool = False, **__) -> list[str]:
    return _list_models(json.loads(os.environ["MODELS"]), include_tags=include_tags, name_matches_cfg=name_matches_cfg)


timm.list_models = _list_avit
timm.create_model = partial(timm.create_model, zip_tokens=json.loads(os.environ["ZIP_TOKENS"]))
