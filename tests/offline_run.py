"""Prepare, train, merge and generate with sockets forbidden, and print what was tried.

``socket.connect`` and ``socket.getaddrinfo`` are the audit events that Python raises before any
connection and any look-up of a name; a look-up is what a request to a host begins with.
"""

import ipaddress
import json
import os
import sys
from typing import Any

tried: list[str] = []


def is_here(host: Any) -> bool:
    """Return whether an address is this machine's own."""
    try:
        return host in ("localhost", None, "") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def forbid(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse what would leave this machine."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        if not isinstance(address, tuple) or is_here(address[0]):  # a path: AF_UNIX
            return
        tried.append(f"{event} {address}")
    elif event in ("socket.getaddrinfo", "socket.gethostbyname") and not is_here(arguments[0]):
        tried.append(f"{event} {arguments[0]}")
    else:
        return
    raise OSError("no connection is allowed")


if __name__ == "__main__":
    # TRL reports no run to its hub where CI is set. A notebook may have imported the hub's client.
    os.environ.pop("CI", None)
    import huggingface_hub  # noqa: F401

    sys.addaudithook(forbid)
    from sft.data.__main__ import main as data
    from sft.generate import main as generate
    from sft.merge.__main__ import main as merge
    from sft.train import main as train

    few = ["dataset.max_rows=32", "dataset.max_eval_rows=8", "output_dir=run"]
    data(["preview=1", "html=page.html", *few])
    train(["train.max_steps=2", "train.save_strategy=steps", "train.save_steps=1", *few])
    merge(["run=run"])
    generate(["run=run", "prompt=a", "max_new_tokens=2", "output=adapter.jsonl"])
    generate(["model=run/merged", "prompt=a", "max_new_tokens=2", "output=merged.jsonl"])
    print(json.dumps(tried))
