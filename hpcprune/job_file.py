"""Reading a job file: YAML and overrides into a validated Job, and what is wrong with them in words.

Every problem is a line of its own: where, what was given, what is allowed, what to do. What is allowed is never written
here: `keys` reads it off the schema in job.py. Reading imports no torch and opens no file but the job file, so that a
mistake is told at once.
"""

from __future__ import annotations

import datetime
import difflib
import json
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import yaml

from hpcprune.errors import JobError, short, show
from hpcprune.job import Job

__all__ = ["Key", "keys", "load_job"]

_TEXT = "a text that is not empty"


def load_job(path: Path, overrides: Sequence[str] = (), out: str | None = None) -> Job:
    """Read and validate a job file.

    overrides: `prune.sparsity=0.98`, the value read as YAML; they win over the file. out: wins over both.
    Raises JobError with one line per problem.
    """
    values = _parse_yaml(_read_text(path), str(path))
    if values is None:
        raise JobError(f"{path}: the file is empty; at least task, train, prune and retrain are needed")
    if not isinstance(values, dict):
        raise JobError(f"{path}: the file is {show(values)}, not a mapping of keys to values (task: task.py, ...)")
    origins = {}
    for override in [*overrides, *([f"out={json.dumps(out)}"] if out is not None else [])]:
        origins[_override(values, override)] = f"override {short(override)}"
    try:
        return Job.model_validate(values, context={"folder": path.parent})
    except pydantic.ValidationError as error:
        problems = [_problem(details, values, origins, str(path)) for details in error.errors()]
        raise JobError("\n".join(dict.fromkeys(problems))) from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        there = sorted(str(file) for file in path.parent.glob("*.y*ml"))[:5]
        hint = f"job files there: {', '.join(there)}" if there else "give the path of a job file"
        raise JobError(f"no such job file: {path} (in {Path.cwd()}); {hint}") from None
    except IsADirectoryError:
        raise JobError(f"{path}: a folder, not a job file; give the file, as in {path / 'job.yaml'}") from None
    except UnicodeDecodeError as error:
        raise JobError(f"{path}: not a text in UTF-8 (byte {error.start}); give a job file in YAML") from None
    except OSError as error:
        raise JobError(f"{path}: cannot be read: {error.strerror}; give a job file that can") from None


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, of which plain YAML silently drops the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in lines:
                text = f'the key "{key.value}" is given twice, first on line {lines[key.value]}; keep one'
                raise yaml.MarkedYAMLError(problem=text, problem_mark=key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        hint = "; put a text that starts with * in quotes" if error.context == "while scanning an alias" else ""
        raise JobError(f"{where}{line}: not valid YAML: {short(error.problem or error)}{hint}") from None
    except yaml.YAMLError as error:
        raise JobError(f"{where}: not valid YAML: {short(error)}") from None
    except (ValueError, RecursionError) as error:  # an impossible date, a number of 5,000 digits, 1,000 brackets
        raise JobError(f"{where}: not valid YAML: {short(error)}; put a text in quotes") from None


def _override(values: dict[str, Any], override: str) -> str:
    """Write one override into `values`; the key it sets."""
    where = f"override {short(override)}"
    name, equals, text = override.partition("=")
    *sections, last = path = name.strip().split(".")
    if not equals or not name.strip():
        raise JobError(f"{where}: write it as key=value, as in prune.sparsity=0.9")
    if name.strip() not in keys():
        raise JobError(f"{where}: {_no_such_key(path)}")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        if not isinstance(values[section], dict):
            raise JobError(
                f"{where}: {section} is {show(values[section])} in the file, not a section; correct the file"
            )
        values = values[section]
    values[last] = _parse_yaml(text, where)
    return ".".join(path)


@dataclass(frozen=True)
class Key:
    """One key of the job file, as the schema has it."""

    name: str
    """Dotted: `prune.sparsity`."""
    allowed: str
    """In words: `a number in [0, 1)`; a section's is `a section (keys: ...)`."""
    default: Any
    """What holds where it is not given (None too where it follows from other keys, as its meaning says)."""
    required: bool
    section: bool
    meaning: str


def keys() -> dict[str, Key]:
    """Every key of the job file by its dotted name, sections before what is in them, in the order of the schema."""
    schema = Job.model_json_schema()
    return {key.name: key for key in _keys(schema, schema["$defs"], "")}


def _keys(section: dict[str, Any], definitions: dict[str, Any], prefix: str) -> Iterator[Key]:
    for name, field in section["properties"].items():
        kind = field["anyOf"][0] if "anyOf" in field else field
        inner = definitions[kind["$ref"].split("/")[-1]] if "$ref" in kind else None
        allowed = _allowed(kind) if inner is None else f"a section (keys: {', '.join(inner['properties'])})"
        if "anyOf" in field and inner is None:
            allowed += ", or null"
        required = name in section.get("required", ())
        meaning = " ".join(field["description"].split())
        yield Key(prefix + name, allowed, field.get("default"), required, inner is not None, meaning)
        if inner is not None:
            yield from _keys(inner, definitions, f"{prefix}{name}.")


def _allowed(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if schema["type"] == "boolean":
        return "true or false"
    if schema["type"] == "array" and "prefixItems" in schema:
        return f"a list of {len(schema['prefixItems'])} items, each {_allowed(schema['prefixItems'][0])}"
    if schema["type"] == "array":
        return f"a list of {schema.get('minItems', 0)} or more items, each {_allowed(schema['items'])}"
    if schema["type"] == "object":
        return f"a mapping of texts, each to {_allowed(schema['additionalProperties'])}"
    if schema["type"] == "string":
        return _TEXT
    word = "a whole number" if schema["type"] == "integer" else "a number"
    bounds = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
    low, above, high, below = (f"{schema[bound]:.15g}" if bound in schema else "" for bound in bounds)
    if not high and not below:
        return f"{word} above {above}" if above else f"{word} of at least {low}"
    return f"{word} in " + (f"({above}, " if above else f"[{low}, ") + (f"{below})" if below else f"{high}]")


def _problem(details: Any, values: Any, origins: Mapping[str, str], file: str) -> str:
    """One line about one error that pydantic found in `values`; `origins`: the overrides, by the key they set."""
    known = keys()
    path = [str(part) for part in details["loc"]]
    if details["type"] in ("extra_forbidden", "invalid_key"):
        return f"{_where(path, origins, file)}{_no_such_key(path)}"
    while path and ".".join(path) not in known:
        path.pop()  # an element of a list: the list is what the message is about
    where = _where(path, origins, file)
    if details["type"] == "job":
        return where + str(details["ctx"]["text"])
    key = known[".".join(path)]
    if details["type"] == "missing" and len(path) == len(details["loc"]):
        return f"{where}missing; give {key.allowed}: {key.meaning}"
    for part in path:
        values = values[part]
    return where + _not_allowed(values, key.allowed)


def _where(path: Sequence[str], origins: Mapping[str, str], file: str) -> str:
    """The beginning of a message: the file and the key, or the override that set it."""
    for end in range(len(path), 0, -1):
        override = origins.get(".".join(path[:end]))
        if override is not None:
            return f"{override}: " if end == len(path) else f"{override}: {'.'.join(path)}: "
    return f"{file}: {'.'.join(path)}: " if path else f"{file}: "


def _not_allowed(value: Any, allowed: str) -> str:
    """`1.2 is not in [0, 1)`: what was given, what is allowed, and where it can be told, what to write."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    text = f"{show(value)} is not {allowed.removeprefix('a number ') if ' in ' in allowed and is_number else allowed}"
    near = difflib.get_close_matches(str(value), allowed.removeprefix("one of ").split(", "), n=1)
    if allowed.startswith("one of") and near:
        return f"{text}; did you mean {near[0]}?"
    if allowed.startswith("a list") and isinstance(value, (str, float, int)):
        return f"{text}; write [{show(value)}]"
    if allowed == _TEXT and isinstance(value, (bool, int, float, datetime.date)):
        return f"{text}; put it in quotes"
    return text


def _no_such_key(path: Sequence[str]) -> str:
    """What to say about the unknown key at `path`: the nearest known one, and all keys of the section it is in."""
    known = keys()
    *sections, last = path
    section = ".".join(sections)
    if section and section not in known:
        section, last = "", path[0]
    beside = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == section}
    if not beside:
        return f"no such key; {section} is no section, it is {known[section].allowed}"
    near = difflib.get_close_matches(last, beside, n=1)
    same_name = [key for key in known if key.rpartition(".")[2] == path[-1]]
    if near:
        question = f"; did you mean {beside[near[0]]}?"
    elif same_name:
        question = f"; did you mean {same_name[0]}?"
    else:
        question = ""
    return f"no such key{question} (keys of {section or 'the job'}: {', '.join(beside)})"
