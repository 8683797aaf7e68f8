"""What a person chooses about data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

ObjectiveName = Literal["supervised", "preference", "pretrain", "dpo", "cdpo", "ipo", "simpo", "orpo", "kto"]


def pairs(value: Any) -> Any:
    """`name=value,name=value`, or a JSON object, as a dict; anything else as it is."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        return json.loads(value)
    parts = [part.partition("=") for part in value.split(",") if part]
    for name, found, _ in parts:
        if not found:
            raise ValueError(f"{name!r} has no value: write name=value,name=value")
    return {name.strip(): text for name, _, text in parts}


class Given(BaseModel):
    """Settings as a person gives them: by names that are known, and none of them empty."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    may_be_empty: ClassVar[tuple[str, ...]] = ()

    @field_validator("*", mode="before")
    @classmethod
    def _is_not_empty(cls, value: Any, info: ValidationInfo) -> Any:
        empty = value == "" or (isinstance(value, list) and "" in value)
        if empty and info.field_name not in cls.may_be_empty:
            raise ValueError("is empty (a shell variable that is not set?)")
        return value


class DataOptions(Given):
    """Which rows are read, and how they are understood."""

    data: list[str] = Field(description="Files, folders, globs, - for standard input, hf://owner/name:split.")
    format: str | None = Field(default=None, description="Shape of every row; recognized by its columns.")
    columns: Annotated[dict[str, str], BeforeValidator(pairs)] = Field(
        default_factory=dict, description="Columns under other names, as instruction=question,output=answer."
    )
    objective: ObjectiveName | None = Field(
        default=None,
        description="What the data is for, where a row can be read in two ways; supervised. On preferences: dpo, cdpo, "
        "ipo, simpo, orpo, kto.",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        default="error", description="Bad rows stop before any work, all reported; or are left out and counted."
    )
    rejects: Path | None = Field(default=None, description="JSONL file that takes the rows left out, with the reasons.")
