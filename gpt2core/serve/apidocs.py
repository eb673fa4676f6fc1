"""`/docs`: the API's description as a page, without scripts and without anything from elsewhere."""

import html
import json
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from gpt2core.serve.errors import json_response

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font-family: ui-monospace, monospace; font-size: .875rem; }
pre { padding: .75rem; overflow-x: auto; border: 1px solid #8886; border-radius: .375rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; }
td { border-bottom: 1px solid #8884; }
section { margin-top: 2.5rem; }
"""


def router(describe: Callable[[], dict[str, Any]]) -> APIRouter:
    """The page, its style sheet and the description that both are made from."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/openapi.json")
    async def document() -> Response:
        return json_response(describe())

    @routes.get("/docs")
    async def page() -> Response:
        return Response(render_page(describe()), media_type="text/html")

    @routes.get("/docs/style.css")
    async def style() -> Response:
        return Response(STYLE, media_type="text/css")

    return routes


def render_page(document: dict[str, Any]) -> str:
    """The page."""
    schemas = document["components"]["schemas"]
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<title>gpt2core API</title><link rel="stylesheet" href="/docs/style.css"></head><body>',
        f"<h1>gpt2core {_text(document['info']['version'])}</h1><p>{_text(document['info']['summary'])}. ",
        'For programs: <a href="/openapi.json">openapi.json</a>.</p>',
    ]
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            parts += _route(f"{method.upper()} {path}", route, schemas)
    return "".join([*parts, "</body></html>\n"])


def _route(title: str, route: dict[str, Any], schemas: dict[str, Any]) -> list[str]:
    parts = [f"<section><h2><code>{_text(title)}</code></h2><p>{_text(route['summary'])}. "]
    parts.append(f"{_text(route.get('description', ''))}</p>")
    body = route.get("requestBody", {}).get("content", {}).get("application/json")
    if body:
        schema = schemas[body["schema"]["$ref"].rpartition("/")[2]]
        required = schema.get("required", [])
        parts.append("<table><tr><th>Field</th><th>Meaning</th><th>Default</th></tr>")
        for name, field in schema["properties"].items():
            default = "required" if name in required else json.dumps(field.get("default"))
            parts.append(
                f"<tr><td><code>{_text(name)}</code></td><td>{_text(field.get('description', ''))}</td>"
            )
            parts.append(f"<td><code>{_text(default)}</code></td></tr>")
        parts.append("</table>")
        for example in body.get("examples", {}).values():
            shown = json.dumps(example["value"], indent=2)
            parts.append(f"<h3>{_text(example['summary'])}</h3><pre>{_text(shown)}</pre>")
    parts.append("<table><tr><th>Status</th><th>When</th></tr>")
    for status, answer in route["responses"].items():
        parts.append(f"<tr><td>{_text(status)}</td><td>{_text(answer['description'])}</td></tr>")
    return [*parts, "</table></section>"]


def _text(value: str) -> str:
    return html.escape(value)
