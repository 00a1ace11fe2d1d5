"""The units and drop-ins against the systemd of JetPack 5, which is 245: a setting that it does not know it leaves out, with a warning."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Dict, Set

import pytest

from latentd.cli.install import SOURCES

SYSTEMD = 245
# From systemd's manual, which tells since when there is a setting (0: it is older than what the manual tells); all are in the table of
# settings of v245, src/core/load-fragment-gperf.gperf.m4.
SINCE: Dict[int, str] = {
    0: "Backlog CapabilityBoundingSet Environment ExecReload ExecStart Group LimitCORE ListenStream OOMScoreAdjust PrivateTmp Restart "
    "RestartSec SupplementaryGroups SyslogIdentifier Type UMask User WatchdogSec",
    187: "KillMode NoNewPrivileges SystemCallFilter",
    188: "TimeoutStartSec TimeoutStopSec",
    201: "After Description Documentation WantedBy",
    209: "SystemCallArchitectures SystemCallErrorNumber",
    211: "CacheDirectory RestrictAddressFamilies StateDirectory",
    213: "CPUQuota",
    214: "ProtectHome ProtectSystem",
    216: "NoDelay",
    229: "AmbientCapabilities StartLimitBurst StartLimitIntervalSec",
    230: "IOWeight",
    231: "MemoryHigh MemoryMax RestrictRealtime",
    232: "CPUWeight ProtectControlGroups ProtectKernelModules ProtectKernelTunables RemoveIPC",
    233: "RestrictNamespaces",
    234: "CacheDirectoryMode StateDirectoryMode",
    235: "IPAddressAllow IPAddressDeny KeyringMode LockPersonality",
    239: "PrivateMounts",
    242: "ProtectHostname RestrictSUIDSGID",
    244: "ProtectKernelLogs",
}
KNOWN = {name for version, names in SINCE.items() if version <= SYSTEMD for name in names.split()}


def settings(text: str) -> Set[str]:
    """The names of all settings of a unit, also of those that wait behind a # for somebody to want them."""
    return set(re.findall(r"^#?([A-Za-z]+)=", text, re.MULTILINE))


UNITS = sorted(path for path in SOURCES.rglob("*") if path.is_file() and path.suffix != ".sysusers")


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_the_systemd_of_jetpack_5_knows_every_setting(path: Path) -> None:
    found = settings(path.read_text(encoding="utf-8"))
    assert found
    assert found - KNOWN == set()


def test_the_list_names_what_is_used_and_nothing_else() -> None:
    assert {name for path in UNITS for name in settings(path.read_text(encoding="utf-8"))} == KNOWN


def test_a_setting_that_came_later_would_be_found() -> None:
    assert settings("[Service]\nProtectProc=invisible\n#  a word=\n#ProcSubset=pid\nUMask=\n") - KNOWN == {"ProtectProc", "ProcSubset"}
