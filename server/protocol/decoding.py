"""Strict decoding of bodies and queries, with a list of all faults and their places. No I/O."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from typing import Annotated, Any, Final, Literal, get_args, get_origin

import msgspec
from msgspec import Struct
from msgspec.structs import FieldInfo, fields

from anynode.server.errors import InvalidFrame, Problem
from anynode.server.protocol.bodies import Body, Content, TextPart
from anynode.server.protocol.frames import NOT_BLANK
from anynode.server.protocol.strict_json import strict_json

PROBLEMS_MAX: Final = 20  # reported for one request; more would not help its sender
ITEMS_MAX: Final = 1000  # items of a list in which faults are looked for
SAID_CHARACTERS_MAX: Final = 200
WHOLE_NUMBER: Final = re.compile(r"-?[0-9]{1,20}")
LONG_BYTES_MIN: Final = 262_144  # of a body that is checked against its kind first, and told of one fault only
_FIELDS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_IDS: Final = ("id", "client_id", "message_id", "tool_call_id")


def decode_body(data: bytes, kinds: Sequence[type[Body]]) -> Any:
    """Decode a JSON body; no bytes count as an empty object. The kind is the first of `kinds` that shares a field with
    it, else the last. Raises InvalidFrame, which tells of a long body only the first fault."""
    if len(data) > LONG_BYTES_MIN:
        _check_fit(data, kinds)
    value = json_object(data)
    return _converted(value, _kind_of(value, kinds), "", is_text=False)


def _kind_of(value: Mapping[str, Any], kinds: Sequence[Any]) -> Any:
    return next((kind for kind in kinds if _names(kind) & value.keys()), kinds[-1])


def _check_fit(data: bytes, kinds: Sequence[type[Body]]) -> None:
    """Check that a long body is of its kind, before strict decoding makes all of its values. A million values of a body
    that is refused anyway would take half a second, and as long again to let go of. Raises InvalidFrame."""
    try:
        msgspec.json.decode(data, type=_kind_of(_FIELDS.decode(data), kinds))
    except msgspec.ValidationError as error:
        said, _, place = str(error).partition(" - at `$")
        raise InvalidFrame(problems=[Problem(place.rstrip("`").lstrip("."), said)]) from None
    except RecursionError:
        raise InvalidFrame("the body is nested too deeply") from None
    except ValueError as error:  # msgspec's, and that of bytes that are not UTF-8
        raise InvalidFrame(f"the body is not JSON: {error}") from None


def json_object(data: bytes) -> dict[str, Any]:
    """Decode a JSON body that is an object; no bytes count as an empty object. Raises InvalidFrame."""
    try:
        value = strict_json(data.decode() if data else "{}", "the body")
    except UnicodeDecodeError:
        raise InvalidFrame("the body is not UTF-8") from None
    if not isinstance(value, dict):
        raise InvalidFrame("the body is not a JSON object")
    return value


def decode_query(parameters: Sequence[tuple[str, str]], kind: type[Body]) -> Any:
    """Decode the parameters of a query. Raises InvalidFrame."""
    value = dict(parameters)
    if len(value) != len(parameters):
        raise InvalidFrame(problems=[Problem("query", "has a duplicate parameter")])
    # msgspec would read 1e1 and 2.0 too.
    wrong = [name for name in value if name in _numbers(kind) and not WHOLE_NUMBER.fullmatch(value[name])]
    if wrong:
        problems = [Problem(f"query.{name}", "Expected `int`, got `str`") for name in wrong]
        rest = {name: text for name, text in value.items() if name not in wrong}
        raise InvalidFrame(problems=[*problems, *_problems(rest, kind, "query.", strict=False)][:PROBLEMS_MAX])
    return _converted(value, kind, "query.", is_text=True)


@cache
def _numbers(kind: type[Body]) -> frozenset[str]:
    return frozenset(name for name, field in _fields(kind).items() if int in _plain(field.type))


@cache
def _names(kind: Any) -> frozenset[str]:
    return frozenset(name for each in _structs_in(kind) for name in _fields(each))


@cache
def _fields(kind: type[Struct]) -> Mapping[str, FieldInfo]:
    """Return the fields of a kind by their names on the wire. Cached, because inspecting types takes longer than
    decoding."""
    return {field.encode_name: field for field in fields(kind)}


def _converted(value: Mapping[str, Any], kind: Any, prefix: str, *, is_text: bool) -> Any:
    try:
        found = msgspec.convert(value, kind, strict=not is_text)
    except msgspec.ValidationError as error:
        problems = list(islice(_problems(value, kind, prefix, strict=not is_text), PROBLEMS_MAX))
        raise InvalidFrame(problems=problems or [Problem(prefix.rstrip("."), str(error))]) from None
    except RecursionError:
        raise InvalidFrame("the body is nested too deeply") from None
    if problems := list(islice(_problems_of_texts(found, prefix), PROBLEMS_MAX)):
        raise InvalidFrame(problems=problems)
    return found


def _problems(value: Any, kind: Any, path: str, *, strict: bool) -> Iterator[Problem]:
    """Yield all faults of a value; msgspec reports only the first. `path` ends in a dot."""
    structs = _structs_in(kind)
    if isinstance(value, dict) and structs:
        chosen = _chosen(structs, value)
        tag = str(structs[0].__struct_config__.tag_field)
        if chosen is not None:
            yield from _problems_of_fields(value, chosen, path, strict=strict)
        elif tag not in value:
            yield Problem(f"{path}{tag}", "is missing")
        else:
            yield Problem(f"{path}{tag}", f"Invalid value {value[tag]!r}"[:SAID_CHARACTERS_MAX])
        return
    if isinstance(value, list) and (item := _item_of(kind)) is not None:
        for number, each in enumerate(value[:ITEMS_MAX]):
            yield from _problems(each, item, f"{path[:-1]}[{number}].", strict=strict)
    try:
        msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as error:
        said, _, place = str(error).partition(" - at `$")
        if isinstance(value, list) and place.startswith("["):
            return  # the faults of its items are reported already
        yield Problem(path[:-1], said)


def _problems_of_fields(value: Mapping[str, Any], kind: type[Struct], path: str, *, strict: bool) -> Iterator[Problem]:
    known = _fields(kind)
    for name in value:
        if name not in known and name != kind.__struct_config__.tag_field:
            yield Problem(f"{path}{name}", "is not known here")
    for name, field in known.items():
        if name in value:
            yield from _problems(value[name], field.type, f"{path}{name}.", strict=strict)
        elif field.required:
            yield Problem(f"{path}{name}", "is missing")


def _chosen(structs: Sequence[type[Struct]], value: Mapping[str, Any]) -> type[Struct] | None:
    """Return the member of a union that the value's tag names, or None if no member has it."""
    if structs[0].__struct_config__.tag_field is None:
        return structs[0]
    for struct in structs:
        if value.get(str(struct.__struct_config__.tag_field)) == struct.__struct_config__.tag:
            return struct
    return None


def _plain(kind: Any) -> list[Any]:
    """Return the members of a union, without their annotations."""
    if get_origin(kind) is Annotated:
        return _plain(get_args(kind)[0])
    if get_origin(kind) in (list, dict, Literal) or not get_args(kind):
        return [kind]
    return [plain for part in get_args(kind) for plain in _plain(part)]


def _structs_in(kind: Any) -> list[type[Struct]]:
    return [part for part in _plain(kind) if isinstance(part, type) and issubclass(part, Struct)]


def _item_of(kind: Any) -> Any:
    """Return the type of a list's items if they are Structs, else None."""
    for part in _plain(kind):
        if get_origin(part) is list and _structs_in(get_args(part)[0]):
            return get_args(part)[0]
    return None


def _problems_of_texts(value: Any, path: str) -> Iterator[Problem]:
    """Yield the faults of ids and contents that msgspec does not check."""
    if isinstance(value, Struct):
        contents = _contents(type(value))
        for name in value.__struct_fields__:
            item = getattr(value, name)
            if name in contents and item is not None and _is_blank(item):
                yield Problem(f"{path}{name}", "is empty")
            elif isinstance(item, Struct | list):
                yield from _problems_of_texts(item, f"{path}{name}.")
            elif not isinstance(item, str):
                continue
            elif name in _IDS and not item.isprintable():
                yield Problem(f"{path}{name}", "has unprintable characters")
    elif isinstance(value, list):
        for number, each in enumerate(value):
            if isinstance(each, Struct):
                yield from _problems_of_texts(each, f"{path[:-1]}[{number}].")


def _is_blank(content: str | list[TextPart]) -> bool:
    texts = [content] if isinstance(content, str) else [part.text for part in content]
    return not any(map(NOT_BLANK.search, texts))


@cache
def _contents(kind: type[Struct]) -> frozenset[str]:
    """Return the names of a kind's fields that hold contents."""
    return frozenset(name for name, field in _fields(kind).items() if Content in _alternatives(field.type))


def _alternatives(kind: Any) -> Sequence[Any]:
    return [kind] if get_origin(kind) is Annotated else get_args(kind) or [kind]
