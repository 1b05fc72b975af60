"""What `kvbm serve` takes for an option that vLLM does not have is one."""

from __future__ import annotations

import pytest

from kvbm.cli import preflight
from kvbm.core.errors import UsageError


def test_all_that_vllm_has_are_known() -> None:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # before 0.32
        from vllm.entrypoints.openai.cli_args import make_arg_parser

    actions = make_arg_parser(FlexibleArgumentParser())._actions
    names = [name for action in actions for name in action.option_strings if name.startswith("--")]
    assert len(names) > 200
    preflight.check_names(names)
    for name in names:  # each one with a letter more is none
        if not any(other.startswith(f"{name}q") for other in names):
            with pytest.raises(UsageError, match="no option"):
                preflight.check_names([f"{name}q"])
