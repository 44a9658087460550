"""`infuse serve` with a model that hangs, loses its device, or waits, as soon as a file says so.

python -m tests.failing_server FILE serve …
"""

import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from infuse.server.cli import main

WAITING = "waiting"
"""What the file says once the model waits, until the file is removed."""
_make = LlamaForCausalLM.__init__


def _fail(*_: object) -> None:
    what = _WHAT.read_text() if _WHAT.exists() else ""
    if what == "hangs":
        threading.Event().wait()
    elif what == "dies":
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    elif what == "waits":
        _WHAT.write_text(WAITING)
        while _WHAT.exists():
            time.sleep(0.01)


def _make_failing(model: LlamaForCausalLM, *given: Any, **named: Any) -> None:
    _make(model, *given, **named)
    model.register_forward_pre_hook(_fail)


if __name__ == "__main__":
    _WHAT = Path(sys.argv.pop(1))
    LlamaForCausalLM.__init__ = _make_failing
    main()
