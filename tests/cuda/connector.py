"""KVBM's connector for vLLM, in an engine on a CPU that counts as one on a GPU (see `pretend.py`)."""

from __future__ import annotations

import multiprocessing
from typing import Any

from kvbm.connect.vllm import connector
from tests.cuda import pretend

if multiprocessing.parent_process() is not None:  # not in a test's process, which has the scheduler's side
    pretend.install()


class KvbmConnector(connector.KvbmConnector):
    """Says when the engine's step begins."""

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        assert pretend.PRETEND is not None
        pretend.PRETEND.heard(lambda: super(KvbmConnector, self).handle_preemptions(kv_connector_metadata))
