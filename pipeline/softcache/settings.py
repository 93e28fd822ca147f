"""The strict, frozen base of every config table; each component owns its own subclass."""

from pydantic import BaseModel, ConfigDict

__all__ = ["Settings"]


class Settings(BaseModel):
    """A config table: unknown keys, wrong types and out-of-range values are rejected; values never change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
