"""A pytest plugin: timm's own test-suite sees the avit models alone, in the form that ZIP_TOKENS says.

timm's tests take their parameters from timm.list_models; here it lists our names, whatever group of
timm's models is asked for.
"""

import json
import os
from functools import partial

import timm

import models_act  # noqa: F401 - registers the models

_list_models = timm.list_models


def _list_ours(*_, include_tags: bool = False, name_matches_cfg: bool = False, **__) -> list[str]:
    return _list_models("avit*", include_tags=include_tags, name_matches_cfg=name_matches_cfg)


timm.list_models = _list_ours
timm.create_model = partial(timm.create_model, zip_tokens=json.loads(os.environ["ZIP_TOKENS"]))
