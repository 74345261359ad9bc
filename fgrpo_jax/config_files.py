"""Configurations as files: configs/NAME.py, JSON, and what differs between two of them.

Nothing here imports JAX.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import runpy
from pathlib import Path
from typing import Any

from fgrpo_jax.config import Config, ConfigError, RunConfig, StageConfig

# Module and class of a system's configuration, by its name.
SYSTEMS = {"llm": "fgrpo_jax.config:Config", "ranker": "fgrpo_jax.policies.ranker.config:RankerConfig"}
# What runs were made under before a field was there, where some default is another one.
_BEFORE = {StageConfig: {"metric": ""}}


def load_file(path: str | Path) -> RunConfig:
    """The Config that a configs/NAME.py file's `get_config()` returns; of NAME.py:VARIANT, `get_config("VARIANT")`.

    Raises ConfigError when the file is missing, has no get_config, refuses the variant or returns another type.
    """
    name, _, variant = str(path).partition(".py:")
    path = Path(f"{name}.py") if variant else Path(path)
    if not path.is_file():
        raise ConfigError(f"no config file at {path}: give a path such as configs/synthetic.py")
    names = runpy.run_path(str(path))
    if "get_config" not in names:
        raise ConfigError(f"{path} defines no get_config(); it must return a fgrpo_jax.config.Config")
    try:
        config = names["get_config"](*filter(None, [variant]))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except TypeError as error:  # a field that does not exist, most often; a variant where there are none
        raise ConfigError(f"{path}: get_config() failed: {error}") from error
    if not isinstance(config, RunConfig):
        raise ConfigError(f"{path}: get_config() returned {type(config).__name__}, not a Config")
    return config


def config_of_run(run_dir: Path) -> Path:
    """The file with a run's configuration. Raises ConfigError where there is none."""
    path = run_dir / "config.json"
    if not path.is_file():
        raise ConfigError(f"{run_dir} is not a run directory: it holds no config.json")
    return path


def as_dict(config: RunConfig) -> dict[str, Any]:
    return dataclasses.asdict(config) | {"system": config.SYSTEM}


def to_json(config: RunConfig) -> str:
    return json.dumps(as_dict(config), indent=1, sort_keys=True) + "\n"


def from_json(text: str) -> RunConfig:
    """Inverse of `to_json`. A field that the text lacks (see `absent`) has its default.

    So a new field must come with the default under which earlier runs were made, or with a line in _BEFORE. A text
    whose data set is `synthetic` and that lacks that one's settings is of before that name meant another world.
    Raises ConfigError on what is not JSON, or has fields that do not exist.
    """
    return _read(text)[0]


def absent(text: str) -> list[str]:
    """The fields that `from_json` gives their defaults, as `rl.optim.eps`: of a file of an earlier version."""
    return _read(text)[1]


def _read(text: str) -> tuple[RunConfig, list[str]]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"not JSON: {error}") from None
    lacking: list[str] = []
    unknown: list[str] = []
    # The name is not there in files of an earlier version, when there was one system.
    system = value.pop("system", Config.SYSTEM) if isinstance(value, dict) else Config.SYSTEM
    if isinstance(value, dict) and isinstance(value.get("tensorboard"), bool):  # of an earlier version
        value["trackers"] = ["tensorboard"] if value.pop("tensorboard") else []
    data = value.get("data") if isinstance(value, dict) else None
    if isinstance(data, dict) and data.get("name") == "synthetic" and "synthetic" not in data:
        data["name"] = "next_item"  # what was called so by an earlier version
    ir = data.get("ir") if isinstance(data, dict) else None
    if isinstance(ir, dict) and "document_words" in ir and (words := ir.pop("document_words")):  # 0: nothing was cut
        raise ConfigError(
            f"data.ir.document_words={words} is of an earlier version; prompt.text_tokens cuts texts by tokens now, so "
            "prompts would be others: use the version that wrote it, or train anew"
        )
    config = _build(system_class(system)(), value, "", lacking, unknown)
    if unknown:
        raise ConfigError(
            f"unknown field(s) {', '.join(unknown)}: take them out of it, or use the version that wrote it"
        )
    return config, lacking


def system_class(name: str) -> type[RunConfig]:
    """The class of a system's configurations. Raises ConfigError on a name that SYSTEMS lacks."""
    if name not in SYSTEMS:
        raise ConfigError(f"system: {name!r} is not one of {', '.join(SYSTEMS)}")
    module, _, attribute = SYSTEMS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def _build(default: Any, value: Any, where: str, lacking: list[str], unknown: list[str]) -> Any:
    """`default` with the values of a JSON object; names of fields that only one of them has are noted."""
    if not isinstance(value, dict):
        raise ConfigError(f"{where or 'config'}: expected an object, found {type(value).__name__}")
    known = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    path = {name: f"{where}.{name}" if where else name for name in (*known, *value)}
    unknown += [path[name] for name in value if name not in known]
    lacking += [path[name] for name in known if name not in value]
    built = {name: before for name, before in _BEFORE.get(type(default), {}).items() if name not in value}
    for name in (name for name in known if name in value):
        if dataclasses.is_dataclass(known[name]):
            built[name] = _build(known[name], value[name], path[name], lacking, unknown)
        else:
            built[name] = _tuples(value[name])
    return dataclasses.replace(default, **built)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def differences(old: Any, new: Any, where: str = "") -> dict[str, str]:
    """The fields in which two configs differ: `rl.steps` -> `rl.steps: 100 -> 200`."""
    if dataclasses.is_dataclass(old) and type(old) is type(new):
        found = {}
        for field in dataclasses.fields(old):
            name = f"{where}.{field.name}" if where else field.name
            found |= differences(getattr(old, field.name), getattr(new, field.name), name)
        return found
    return {} if old == new else {where: f"{where}: {old!r} -> {new!r}"}


def fingerprint(value: Any) -> str:
    """16 hex digits of anything JSON can hold; stable across processes."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
