"""Run a module of sft, and send a real signal to its process at a given call.

    python benchmarks/inject.py SIGNAL:TARGET:WHEN:NTH:RANK sft.train SETTING=VALUE ...

``TARGET`` is ``module.function`` or ``module.Class.method``. This process sends itself the signal
``before`` or ``after`` the NTH call of the target (counted from 1), on one rank or on ``all``. It
does not repeat the signal after torchrun restarted it.
"""

import functools
import importlib
import os
import signal
import sys


def arm(fault: str) -> None:
    """Wrap the target function."""
    name, target, when, nth, rank = fault.split(":")
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if restarted or rank not in ("all", os.environ.get("RANK", "0")):
        return
    path, _, attribute = target.rpartition(".")
    try:
        owner = importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, owner_name = path.rpartition(".")
        owner = getattr(importlib.import_module(module), owner_name)
    original = getattr(owner, attribute)
    calls = 0

    @functools.wraps(original)
    def wrapped(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == int(nth) and when == "before":
            os.kill(os.getpid(), getattr(signal, name))
        result = original(*args, **kwargs)
        if calls == int(nth) and when == "after":
            os.kill(os.getpid(), getattr(signal, name))
        return result

    setattr(owner, attribute, wrapped)


if __name__ == "__main__":
    from sft import environment

    environment.prepare(distributed=any(word.startswith("zero=stage") for word in sys.argv))
    given, module = sys.argv[1:3]
    arm(given)
    sys.argv = [module, *sys.argv[3:]]
    run = importlib.import_module(module)
    if hasattr(run, "__path__"):
        run = importlib.import_module(f"{module}.__main__")
    run.main()
