"""One module a resource: parse, one domain call, shape the answer."""
