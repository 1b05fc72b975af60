"""With this folder in PYTHONPATH a vLLM server is there in two thirds of the time: its engines and workers, which it
would spawn one after the other, are forked from a process that imports vLLM while the server does."""

import multiprocessing
import multiprocessing.forkserver
import sys

SERVER = "vllm.entrypoints.openai.api_server"

if SERVER in sys.orig_argv or any("multiprocessing.forkserver" in each for each in sys.orig_argv):
    import imported

    forked, original = imported.Imported("vllm.v1.engine.core", SERVER), multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: forked if method == "spawn" else original(method)
    if SERVER in sys.orig_argv:
        multiprocessing.forkserver.ensure_running()
