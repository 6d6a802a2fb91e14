"""The program with all commands: ``sft COMMAND`` or ``python -m sft COMMAND``."""

from __future__ import annotations

import sys

from sft import process
from sft.cli.commands import COMMANDS, command


def main() -> None:
    """Run the command that the first word names, or list the commands."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help") and rest[:1] and rest[0] in COMMANDS:
        name, rest = rest[0], ["--help", *rest[1:]]
    if name in COMMANDS:
        sys.argv = [f"sft {name}", *rest]
        try:
            command(name)()
        except KeyboardInterrupt:  # during the import; the command itself handles it later
            sys.stderr.write("error: interrupted\n")
            sys.exit(130)
    elif name == "--complete":
        from sft.cli.completion import complete

        complete(*rest)
    elif process.rank() == 0:
        _without_command(name, rest)
    else:
        sys.exit(2)


def _without_command(name: str, rest: list[str]) -> None:
    from sft import __version__

    if name in ("--help", "-h", "help"):
        from sft.cli.helptext import overview

        sys.stdout.write(overview({name: command(name).summary for name in COMMANDS}))
    elif name in ("--version", "-V"):
        sys.stdout.write(f"sft {__version__}\n")
    elif name == "--completion" and rest and rest[0] in ("bash", "zsh", "fish"):
        from sft.cli.completion import script

        sys.stdout.write(script(rest[0]))
    else:
        from sft.cli.command import end

        end(2, _unknown(name, rest), as_json="--json" in (name, *rest))


def _unknown(name: str, rest: list[str]) -> str:
    """Return the message for a word that is not a command, with a suggestion."""
    from sft.config.upstream import did_you_mean

    if name == "--completion":
        return "--completion needs the name of a shell\n    fix: sft --completion bash, zsh or fish"
    fix = did_you_mean(name, COMMANDS)
    if "=" in name or name.endswith((".yaml", ".yml")):
        fix = f"sft train {name}"
    elif name.startswith("-") and rest[:1] and rest[0] in COMMANDS:
        fix = f"write the command first: sft {' '.join([rest[0], name, *rest[1:]])}"
    elif not fix.startswith("did"):
        fix = "sft, which lists the commands"
    what = "option" if name.startswith("-") else "command"
    return f"there is no {what} {name}; the commands are {', '.join(COMMANDS)}\n    fix: {fix}"


if __name__ == "__main__":
    main()
