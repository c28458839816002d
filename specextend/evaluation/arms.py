"""What is compared: arms, each a method with settings of its own, as `specextend:top_k=8`.

An arm is written NAME, or NAME:SETTING=VALUE,SETTING=VALUE. Settings are the fields of the tree and of the retrieval,
and `tree=paper` or `tree=price`, which say where the tree begins. What an arm leaves open is the run's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

from specextend.config import TREES, RetrievalConfig, SpecExtendConfig, TreeConfig, override
from specextend.errors import ConfigError
from specextend.methods import METHODS, find_method

PARTS = {"tree": TreeConfig, "retrieval": RetrievalConfig}
OWNER = {one.name: part for part, kind in PARTS.items() for one in fields(kind) if one.name != "rule"}
KINDS = {name: get_type_hints(PARTS[part])[name] for name, part in OWNER.items()}
WORDS = {int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Arm:
    """A method, and what is different about it.

    Args:
        method: its name in `methods.py`.
        tree: name of the tree that its settings change, None for the run's.
        settings: fields of the tree and of the retrieval.
    """

    method: str
    tree: str | None
    settings: Mapping[str, int | float | bool]

    @property
    def name(self) -> str:
        """As in records and tables, "specextend:top_k=8"."""
        given = ({"tree": self.tree} if self.tree else {}) | self.settings
        shown = ",".join(f"{name}={str(value).lower()}" for name, value in given.items())
        return f"{self.method}:{shown}" if shown else self.method

    def config(self, base: SpecExtendConfig, *, keeps_rule: bool = False) -> SpecExtendConfig:
        """Its setting, where `base` is that of its method in the run; `keeps_rule`: whatever bounds it gives."""
        if self.tree:
            base = replace(base, tree=find_method(self.method).tree(TREES[self.tree]))
        parts: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
        for name, value in self.settings.items():
            parts[OWNER[name]][name] = value
        if self.tree or keeps_rule:
            parts["tree"]["rule"] = base.tree.rule
        try:
            return override(base, parts)
        except ConfigError as error:
            raise ConfigError(f"arm {self.name}: {error}") from None


def read_arms(texts: Sequence[str]) -> list[Arm]:
    """The arms as they are written, each once; ConfigError for the first that is none."""
    arms = [read_arm(text) for text in texts]
    for index, arm in enumerate(arms):
        if arm in arms[:index]:
            raise ConfigError(f"arm {arm.name} is there twice; give each arm once")
    return arms


def read_arm(text: str) -> Arm:
    method, colon, rest = text.strip().partition(":")
    if method not in METHODS:
        raise ConfigError(f"arm {text!r}: method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    given: dict[str, str] = {}
    for setting in rest.split(",") if colon else ():
        name, equals, value = (part.strip() for part in setting.partition("="))
        if not (name and equals and value):
            raise ConfigError(f"arm {text!r}: write NAME:SETTING=VALUE,SETTING=VALUE, as specextend:top_k=8,nodes=20")
        if name not in ("tree", *OWNER):
            raise ConfigError(f"arm {text!r}: setting {name!r} is unknown; there are tree, {', '.join(OWNER)}")
        if name in given:
            raise ConfigError(f"arm {text!r}: {name} is there twice; give each setting once")
        given[name] = value
    _check_use(text, method, given)
    tree = given.pop("tree", None)
    if tree is not None and tree not in TREES:
        raise ConfigError(f"arm {text!r}: tree {tree!r} is unknown; choose one of {', '.join(TREES)}")
    return Arm(method, tree, {name: _value(text, name, value) for name, value in given.items()})


def resolve(
    arms: Sequence[Arm], config_of: Callable[[Arm], SpecExtendConfig], note: Callable[[str], None]
) -> dict[str, SpecExtendConfig]:
    """The setting of each arm by its name; of several that come to the same the first.

    Args:
        config_of: an arm's setting in the run.
        note: told of an arm that is left out, in a line.
    """
    configs: dict[str, SpecExtendConfig] = {}
    for arm in arms:
        config = config_of(arm)
        same = [name for name, other in configs.items() if other == config]
        if same:
            note(f"{arm.name} is left out: with these models it is the setting of {same[0]}")
        else:
            configs[arm.name] = config
    return configs


def _check_use(text: str, method: str, given: Mapping[str, str]) -> None:
    """ConfigError for settings that would change nothing: an arm that is called different must be."""
    found = find_method(method)
    drafting = found.switches.get("drafting", "model")
    parts = {OWNER.get(name, "tree") for name in given}
    if drafting in ("none", "hugging_face") and given:
        raise ConfigError(f"arm {text!r}: {method} drafts nothing and has no settings")
    if "retrieval" in parts and found.switches.get("draft_cache", "full") == "full":
        raise ConfigError(f"arm {text!r}: the draft of {method} attends to everything; it has no settings of retrieval")
    if "tree" in given and found.chain is not None:
        raise ConfigError(f"arm {text!r}: {method} drafts chains of its own length; set max_depth instead of tree")


def _value(text: str, name: str, value: str) -> int | float | bool:
    kind = KINDS[name]
    try:
        return {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    except (ValueError, KeyError):
        raise ConfigError(f"arm {text!r}: {name} is {value!r}; give {WORDS[kind]}") from None
