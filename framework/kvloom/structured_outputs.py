"""What an output must look like: `StructuredOutputsParams`, and the older names for it. Torch-free.

Everything that needs no grammar library is checked here: one kind of grammar, its length, its depth, that JSON is JSON.
"""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn, Self, TypedDict

from kvloom import other_fields
from kvloom.errors import RequestTypeError, RequestValidationError, UnsupportedFeatureError, shown
from kvloom.other_fields import refuses
from kvloom.param_checks import check_bool, is_unicode

MAX_CHARACTERS = 2**18
"""Of a grammar. The longest schemas that people use for generation have some ten thousand."""
MAX_NESTING = 64
"""Of a JSON Schema's own JSON."""
MAX_NODES = 2**17
"""Values in a JSON Schema: an object that is used in many places counts in each."""
DEFAULT_WHITESPACE = r"[ \t\n\r]{1,24}"
"""Between tokens of JSON where nothing else is said: any, but no model loses itself in it. 24 indent 6 levels by 4."""
AUTO = "auto"
OPTIONS: Mapping[str, str] = {"disable-any-whitespace": "disable_any_whitespace",
                              "disable-additional-properties": "disable_additional_properties",
                              "no-additional-properties": "disable_additional_properties", "no-fallback": ""}
"""What may follow a backend's name after a colon. There is never a fallback to another backend, so "no-fallback" changes nothing."""


GrammarKind = Literal["json", "regex", "choice", "grammar"]
"""A JSON Schema; a regular expression for the whole output; a JSON list of texts; a grammar in EBNF."""


class GrammarSpec(NamedTuple):
    """What the output must be, as plain data: it travels to the workers.

    Fields:
        kind: see `GrammarKind`. "Any JSON object" is a schema too.
        text: of that kind. The core has checked its length, and that JSON is JSON of a bounded depth.
        whitespace: for JSON: a regular expression of what may stand between its tokens; empty: nothing.
    """

    kind: GrammarKind
    text: str
    whitespace: str = ""


class BackendChoice(NamedTuple):
    """``"name:option,option"`` taken apart."""

    name: str
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError for an option that does not exist."""
        name, _, rest = text.partition(":")
        given = [option.strip() for option in rest.split(",") if option.strip()]
        unknown = next((option for option in given if option not in OPTIONS), None)
        if unknown is not None:
            raise ValueError(f"{shown(unknown)} is no option of a grammar backend; there are: {', '.join(OPTIONS)}")
        return cls(name or AUTO, **{OPTIONS[option]: True for option in given if OPTIONS[option]})


@refuses(other_fields.STRUCTURE)
@dataclass
class StructuredOutputsParams:
    """What the output must be: exactly one of the first five.

    Args:
        json: a JSON Schema, as text, as a dict, or as a pydantic model class, which becomes its schema.
        regex: a regular expression that the whole output matches.
        choice: a list of texts, one of which is the output.
        grammar: a context-free grammar, in GBNF or Lark notation.
        json_object: True: any JSON object.
        backend: the engine's grammar backend or "auto", and options after a colon: "disable-any-whitespace",
            "disable-additional-properties".
        whitespace_pattern: for JSON: a regular expression of what may stand between its tokens; empty: nothing.
        disable_any_whitespace: for JSON: nothing may stand between its tokens.
        disable_additional_properties: objects have no keys but those that the schema names, unless it says otherwise.
        structural_tag: not supported so far.

    Raises:
        RequestValidationError: none or several of them, or one that is malformed.
        UnsupportedFeatureError: structural_tag.
    """

    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    backend: str | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    structural_tag: Any = None

    _NEEDS_ONE: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.json, type):
            self.json = _as_schema(self.json)
        self.spec()

    @classmethod
    def from_optional(cls, **values: Any) -> Self | None:
        """The same with None for what was not given; None when no kind of grammar was given."""
        own = cls(**values) if any(values.get(kind) is not None for kind in _KINDS) else None
        return own if own is None or own.spec() is not None else None

    def spec(self, engine: BackendChoice | None = None) -> GrammarSpec | None:
        """Checked, and as the grammar library gets it; None when no grammar is asked for.

        Args:
            engine: its options hold for every request.
        """
        kind = self._kind()
        choice, engine = self.backend_choice, engine or BackendChoice(AUTO)
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            check_bool(name, getattr(self, name))
        if kind is None:
            return None
        if kind not in ("json", "json_object"):
            for name in ("whitespace_pattern", "disable_any_whitespace", "disable_additional_properties"):
                if getattr(self, name) not in (None, False):
                    _refuse(f"{name} belongs to json and json_object, not to {kind}", name, getattr(self, name))
            return GrammarSpec(*self._text(kind))
        closed = self.disable_additional_properties or choice.disable_additional_properties or engine.disable_additional_properties
        compact = self.disable_any_whitespace or choice.disable_any_whitespace
        return GrammarSpec("json", self._schema(kind, closed), self._whitespace(compact, compact or engine.disable_any_whitespace))

    @property
    def backend_choice(self) -> BackendChoice:
        """`backend` taken apart."""
        if self.backend is None:
            return BackendChoice(AUTO)
        try:
            return BackendChoice.parse(_check_text("backend", self.backend))
        except ValueError as error:
            raise RequestValidationError(str(error), "backend", self.backend) from error

    def _kind(self) -> str | None:
        if self.structural_tag is not None:
            raise UnsupportedFeatureError("structural_tag", self.structural_tag, "use json, regex, choice or grammar")
        given = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(given) > 1:
            _refuse(f"You can only use one kind of guided decoding but multiple are specified: {', '.join(given)}", given[1],
                    getattr(self, given[1]))
        if not given and self._NEEDS_ONE:
            _refuse(f"one of {', '.join(_KINDS)} must be given", "structured_outputs", None)
        return given[0] if given else None

    def _text(self, kind: str) -> tuple[Any, str]:
        if kind == "choice":
            given = self.choice
            if not isinstance(given, list | tuple) or not given or not all(isinstance(c, str) and c for c in given):
                _refuse(f"choice must be a list of at least one text, none of them empty, got {shown(given)}", "choice", given)
            if sum(map(len, given)) > MAX_CHARACTERS or len(given) > MAX_NODES:
                _refuse(f"choice has more than {MAX_CHARACTERS} characters or {MAX_NODES} texts", "choice", len(given))
            if not all(map(is_unicode, given)):
                _refuse("a choice has a lone surrogate, which no text may have", "choice", given)
            return kind, json_module.dumps(list(given))
        return kind, _check_text(kind, getattr(self, kind))

    def _schema(self, kind: str, closed: bool) -> str:
        if kind == "json_object":
            if self.json_object is not True:
                _refuse("json_object must be True, or left out", "json_object", self.json_object)
            if self.disable_additional_properties:
                _refuse("json_object is any object: it has no additional properties to disable", "disable_additional_properties", True)
            return '{"type":"object"}'
        schema = _as_schema(self.json)
        _check_size(schema)
        if closed:
            schema = _closed(schema)
        try:
            text = json_module.dumps(schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestValidationError(f"json is no JSON Schema: {error}; got {shown(self.json)}", "json", self.json) from error
        if len(text) > MAX_CHARACTERS:
            _refuse(f"json has {len(text)} characters, at most {MAX_CHARACTERS} are taken", "json", len(text))
        return text

    def _whitespace(self, wants_none: bool, has_none: bool) -> str:
        if self.whitespace_pattern is None:
            return "" if has_none else DEFAULT_WHITESPACE
        if wants_none:
            _refuse("whitespace_pattern says which whitespace there is, disable_any_whitespace that there is none; give one of them",
                    "whitespace_pattern", self.whitespace_pattern)
        return _check_text("whitespace_pattern", self.whitespace_pattern, may_be_empty=True)


class GuidedDecodingParams(StructuredOutputsParams):
    """The older name of `StructuredOutputsParams`. None of the kinds means no grammar here."""

    _NEEDS_ONE: ClassVar[bool] = False


_KINDS = tuple(f.name for f in fields(StructuredOutputsParams))[:5]


class LLMGuidedOptions(TypedDict, total=False):
    """What ``guided_options_request`` may be: a dict with one of these."""

    guided_json: Any
    guided_regex: str
    guided_choice: list[str]
    guided_grammar: str
    guided_decoding_backend: str
    guided_whitespace_pattern: str
    guided_json_object: bool


@dataclass
class GuidedDecodingRequest:
    """The oldest form: ``guided_options_request``. See `StructuredOutputsParams`."""

    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_decoding_backend: str | None = None
    guided_whitespace_pattern: str | None = None
    guided_json_object: bool | None = None


def from_legacy(given: object) -> GuidedDecodingParams:
    """What a ``guided_options_request`` asks for.

    Raises:
        RequestValidationError: a dict with more than one key, several kinds, or a key that does not exist.
        RequestTypeError: something else.
    """
    if isinstance(given, GuidedDecodingRequest):
        values = {f.name: getattr(given, f.name) for f in fields(given)}
    elif isinstance(given, dict):
        values = given
        if len(values) > 1:
            _refuse(f"You can only use one guided decoding but multiple are specified: {shown(list(values))}",
                    "guided_options_request", given)
    else:
        raise RequestTypeError("guided_options_request must be a dict with one of guided_json, guided_regex, ..., or a "
                               f"GuidedDecodingRequest; got {type(given).__name__}", "guided_options_request", given)
    known = [f.name for f in fields(GuidedDecodingRequest)]
    unknown = next((key for key in values if key not in known), None)
    if unknown is not None:
        _refuse(f"guided_options_request has no {shown(unknown)}; there are: {', '.join(known)}", "guided_options_request", given)
    names = {"guided_decoding_backend": "backend"}
    return GuidedDecodingParams(**{names.get(k, k.removeprefix("guided_")): v for k, v in values.items() if v is not None})


def _refuse(message: str, parameter: str, value: object) -> NoReturn:
    raise RequestValidationError(message, parameter, value)


def _check_text(name: str, value: object, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str) or not (value or may_be_empty) or len(value) > MAX_CHARACTERS:
        _refuse(f"{name} must be a text of {0 if may_be_empty else 1} to {MAX_CHARACTERS} characters, got {shown(value)}", name, value)
    if "\0" in value or not is_unicode(value):
        _refuse(f"{name} has a NUL or a lone surrogate", name, value)
    return value


def _as_schema(given: object) -> Any:
    """JSON data from text, data, or a pydantic class."""
    if isinstance(given, str):
        try:
            return json_module.loads(_check_text("json", given), parse_constant=_no_constant)
        except RequestValidationError:
            raise
        except (ValueError, RecursionError) as error:
            raise RequestValidationError(f"json is no JSON text: {error}; got {shown(given)}", "json", given) from error
    describe = getattr(given, "model_json_schema", None)
    if isinstance(given, type) and callable(describe):
        try:
            return describe()
        except Exception as error:
            raise RequestValidationError(f"json: {given.__name__} has no JSON Schema: {type(error).__name__}: {error}", "json",
                                         given) from error
    if not isinstance(given, dict | bool):
        _refuse(f"json must be a JSON Schema as text or dict, or a pydantic model class; got {shown(given)}", "json", given)
    return given


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _check_size(schema: object) -> None:
    """Depth and number of values, without recursion: data of Python may refer to itself."""
    if not isinstance(schema, dict | bool):
        _refuse(f"a JSON Schema is an object, true or false; got {shown(schema)}", "json", schema)
    level: list[object] = [schema]
    seen = 0
    for _ in range(MAX_NESTING + 1):
        seen += len(level)
        if seen > MAX_NODES:
            _refuse(f"json has more than {MAX_NODES} values", "json", schema)
        level = [item for value in level for item in (value.values() if isinstance(value, dict) else
                                                      value if isinstance(value, list | tuple) else ())]
        if not level:
            return
    _refuse(f"json is nested more than {MAX_NESTING} deep", "json", schema)


def _closed(schema: Any) -> Any:
    """With ``additionalProperties: false`` in every object schema that says nothing of them."""
    if isinstance(schema, list | tuple):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    own = {key: value if key in ("const", "enum", "default", "examples") else _closed(value) for key, value in schema.items()}
    if ("properties" in own and isinstance(own["properties"], dict)) or own.get("type") == "object":
        own.setdefault("additionalProperties", False)
    return own
