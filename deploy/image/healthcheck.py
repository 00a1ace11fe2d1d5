"""Ends with 0 when the daemon of this container is ready. Only the standard library, no proxy, no shell."""

from __future__ import annotations

import http.client
import os
import sys

host, _, port = os.environ.get("LATENTD_HTTP__BIND", "127.0.0.1:8420").rpartition(":")
connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=8)
connection.request("GET", "/readyz")
answer = connection.getresponse()
sys.stdout.write(answer.read(2000).decode("utf-8", "replace"))
sys.exit(answer.status != 200)
