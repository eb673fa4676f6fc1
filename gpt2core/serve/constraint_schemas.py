"""How a request says what its text must match: by this library's names, and by OpenAI's and vLLM's."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from gpt2core.serve.errors import invalid
from gpt2core.serve.settings import Settings

Schema = dict[str, Any] | Annotated[str, Field(min_length=2, max_length=2**16)]
Pattern = Annotated[str, Field(min_length=1, max_length=2**14)]
Choice = Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(max_length=1024)]

REGEX = "a regular expression that the whole text matches, without look-around and back references"
JSON_SCHEMA = "a JSON schema, an object or its text, that the text is an instance of"
CHOICE = "texts of which the text is one"
GRAMMAR = "a context-free grammar that the text follows, in Lark's syntax or GBNF"
ANY_OBJECT = {"type": "object"}


Asked = tuple[str, str, Any]
"""A field of the request, the field of `SamplingParams` that it means, and its value."""


class _OneConstraint(BaseModel):
    """What asks for one constraint at most, within the server's limit."""

    def _asked(self) -> list[Asked]:
        """Every way of asking, with None where it is not used."""
        raise NotImplementedError

    def constraint(self) -> dict[str, Any]:
        """What is asked for, as `SamplingParams` names it."""
        return {kind: value for _, kind, value in self._asked() if value is not None}

    @model_validator(mode="after")
    def _constrains_once(self, info: ValidationInfo) -> Self:
        settings: Settings | None = info.context
        given = [asked for asked in self._asked() if asked[2] is not None]
        if len(given) > 1:
            names = " and ".join(dict.fromkeys(name for name, _, _ in given))
            message = f"{names} ask for more than one constraint; leave all but one out"
            raise invalid(message, param=given[-1][0])
        for name, _, value in given:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            if settings is not None and len(text.encode()) > settings.max_constraint_nbytes:
                message = f"{name} has more than {settings.max_constraint_nbytes} bytes, this server's limit"
                raise invalid(f"{message}; shorten it", param=name)
        return self


class Constrained(_OneConstraint):
    """Of `/generate`: the names of `SamplingParams`."""

    regex: Pattern | None = Field(default=None, description=REGEX)
    json_schema: Schema | None = Field(default=None, description=JSON_SCHEMA)
    choice: Choice | None = Field(default=None, description=CHOICE)
    grammar: Pattern | None = Field(default=None, description=GRAMMAR)

    def _asked(self) -> list[Asked]:
        return [(name, name, getattr(self, name)) for name in ("regex", "json_schema", "choice", "grammar")]


class NamedSchema(BaseModel):
    """`json_schema` of `response_format`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(max_length=256)] | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """`response_format` of OpenAI's API."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class StructuredOutputs(BaseModel):
    """`structured_outputs` of vLLM."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    json_: Schema | None = Field(default=None, alias="json")
    regex: Pattern | None = None
    choice: Choice | None = None
    grammar: Pattern | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None  # there is none anyway


class OpenAIConstrained(_OneConstraint):
    """Of the routes below `/v1`: OpenAI's names, and vLLM's, the old ones too."""

    response_format: ResponseFormat | None = Field(
        default=None,
        description="an object whose type is text, json_object, or json_schema with json_schema.schema",
    )
    structured_outputs: StructuredOutputs | None = Field(
        default=None, description="an object with json, regex, choice, grammar or json_object: true"
    )
    guided_json: Schema | None = Field(default=None, description=JSON_SCHEMA)
    guided_regex: Pattern | None = Field(default=None, description=REGEX)
    guided_choice: Choice | None = Field(default=None, description=CHOICE)
    guided_grammar: Pattern | None = Field(default=None, description=GRAMMAR)

    def _asked(self) -> list[Asked]:
        outputs = self.structured_outputs or StructuredOutputs()
        return [
            ("response_format", "json_schema", self._of_format()),
            ("structured_outputs", "json_schema", outputs.json_),
            ("structured_outputs", "regex", outputs.regex),
            ("structured_outputs", "choice", outputs.choice),
            ("structured_outputs", "grammar", outputs.grammar),
            ("structured_outputs", "json_schema", ANY_OBJECT if outputs.json_object else None),
            ("guided_json", "json_schema", self.guided_json),
            ("guided_regex", "regex", self.guided_regex),
            ("guided_choice", "choice", self.guided_choice),
            ("guided_grammar", "grammar", self.guided_grammar),
        ]

    def _of_format(self) -> dict[str, Any] | None:
        asked = self.response_format
        if asked is None:
            return None
        if (asked.type == "json_schema") != (asked.json_schema is not None):
            message = 'response_format has json_schema with "type": "json_schema", and with no other type'
            raise invalid(message, param="response_format")
        if asked.json_schema is not None:
            return asked.json_schema.schema_
        return ANY_OBJECT if asked.type == "json_object" else None
