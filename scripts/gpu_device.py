"""Whether there is a GPU, said in one line; and which."""

from __future__ import annotations

import os
import sys

NO_GPU = 2
"""The exit code where there is none."""


def problem() -> str | None:
    """Why nothing can run on a GPU here; None where it can."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported: {error}"
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set, which runs Triton's kernels on the CPU: unset it"
    return None


def need_gpu(program: str) -> None:
    """Leave with one line and exit code 2 where there is no GPU."""
    if (found := problem()) is not None:
        print(f"{program} needs a GPU: {found}", file=sys.stderr)
        raise SystemExit(NO_GPU)


def description() -> str:
    """The card and what runs on it, as text for a table."""
    import platform

    import torch
    import transformers
    import triton

    card = torch.cuda.get_device_properties(0)
    return (f"{card.name} ({card.total_memory / 2**30:.0f} GiB, {card.multi_processor_count} multiprocessors), Python "
            f"{platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}, transformers "
            f"{transformers.__version__}")
