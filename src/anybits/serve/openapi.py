"""Makes the OpenAPI description say what this very server accepts: its model names, its precisions, its key."""

from __future__ import annotations

from typing import Any

from anybits.serve.jobs import Served


def describe(app: Any, served: Served, with_key: bool) -> None:
    """Replace `app.openapi` by one that knows `served`; wrong bodies get 400 here, never 422."""
    generic = app.openapi
    cache: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not cache:
            cache.update(_specialised(generic(), served, with_key))
        return cache

    app.openapi = openapi


def _specialised(description: dict[str, Any], served: Served, with_key: bool) -> dict[str, Any]:
    for path, operations in description["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if with_key and path not in ("/", "/health"):
                operation["security"] = [{"key": []}]
    schemas = description["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    if with_key:
        description["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for name in ("ChatRequest", "CompletionRequest"):
        fields = schemas[name]["properties"]
        _allow(fields["model"], [*served.aliases(), None])
        _allow(fields["precision"], [*served.singles, "auto", None])
        _allow(fields["prefill_precision"], [*served.singles, None])
        _allow(fields["draft_precision"], [*served.singles[:-1], "off", None])
    return description


def _allow(field: dict[str, Any], values: list[Any]) -> None:
    field.pop("anyOf", None)
    field["enum"] = values
