"""What the OpenAPI document says about bodies that FastAPI does not parse itself."""

from __future__ import annotations

from typing import Any, Dict

from latentd.service.bodies import RAW_TYPES

_BINARY = {"schema": {"type": "string", "format": "binary"}}


def image_body(labelled: bool) -> Dict[str, Any]:
    """The three ways to send images, as openapi_extra."""
    label: Dict[str, Any] = {"label": {"type": "string"}} if labelled else {}
    entry = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string", "format": "byte"}, **label}}
    labels: Dict[str, Any] = {"label": {"type": "array", "items": {"type": "string"}}} if labelled else {}
    form = {"image": {"type": "array", "items": {"type": "string", "format": "binary"}}, **labels}
    content: Dict[str, Any] = dict.fromkeys(RAW_TYPES, _BINARY)
    content["multipart/form-data"] = {"schema": {"type": "object", "required": ["image"], "properties": form}}
    content["application/json"] = {
        "schema": {"type": "object", "required": ["images"], "properties": {"images": {"type": "array", "items": entry}}}
    }
    return {"requestBody": {"required": True, "content": content}}


def json_body(model: str, required: bool) -> Dict[str, Any]:
    """A small JSON body of the named schema, as openapi_extra."""
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{model}"}}}}}
