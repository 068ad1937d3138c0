"""What the sections of a run's YAML are made of: strict keys with docstrings, and the numbers that they hold."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field

from surgery.data.strict import Real, Strict

Positive = Annotated[Real, Field(gt=0)]
Unsigned = Annotated[Real, Field(ge=0)]
Share = Annotated[Real, Field(ge=0, lt=1)]
Names = Annotated[tuple[str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else tuple(v))]
Betas = Annotated[tuple[Share, Share], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]


class Section(Strict):
    """Keys whose docstrings are what --explain prints."""

    model_config = ConfigDict(use_attribute_docstrings=True)
