"""The command `raekit completion`: scripts that complete commands and options in a shell, without starting raekit."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from inspect import signature
from typing import Any, Literal, get_args, get_type_hints

from tyro.conf import Positional

Commands = Mapping[str, Callable[..., None]]


def completion(shell: Positional[Literal["bash", "zsh", "fish"]]) -> None:
    """Print a script that completes commands, recipes and options in a shell.

    Example: raekit completion bash

    For bash, add this line to ~/.bashrc: eval "$(raekit completion bash)". For zsh, add the line with zsh instead of
    bash to ~/.zshrc. For fish, run: raekit completion fish | source

    Args:
        shell: Shell that the script is for.
    """
    from raekit.cli import COMMANDS, console

    console.out.out(SCRIPTS[shell](COMMANDS))


def _options(command: Callable[..., None]) -> list[str]:
    """Return the options of a command, such as --out."""
    hints, found = get_type_hints(command, include_extras=True), []
    for name in signature(command).parameters:
        kind = hints[name]
        inner = next((each for each in (kind, *get_args(kind)) if isinstance(each, type) and is_dataclass(each)), None)
        if inner is not None:
            found += [field.name for field in fields(inner)]
        elif get_args(Positional[Any])[1] not in getattr(kind, "__metadata__", ()):
            renamed = [each.name for each in getattr(kind, "__metadata__", ()) if getattr(each, "name", None)]
            found.append(renamed[0] if renamed else name)
    return [f"--{name.replace('_', '-')}" for name in found] + ["--help"]


def _train_words() -> list[str]:
    from raekit.recipes import names

    options = ("--resume", "--run", "--change", "--epochs", "--dry-run", "--device", "--gpus", "--processes", "--help")
    return [*names(), *options]


def _words(commands: Commands) -> dict[str, list[str]]:
    """Return what may follow each command, and under "" what may come first."""
    found: dict[str, list[str]] = {"": list(dict.fromkeys(name.split()[0] for name in commands))}
    for name, command in commands.items():
        family, _, member = name.partition(" ")
        if member:
            found.setdefault(family, []).append(member)
        found[name] = _train_words() if name == "train" else _options(command)
    return found


def bash(commands: Commands) -> str:
    """Return the script for bash. Files are completed where no word fits."""
    cases = "".join(f'    "{name}") words="{" ".join(words)}" ;;\n' for name, words in _words(commands).items())
    return f"""_raekit() {{
  local words="" first="${{COMP_WORDS[1]}}" both="${{COMP_WORDS[1]}} ${{COMP_WORDS[2]}}"
  [ "$COMP_CWORD" -eq 1 ] && first=""
  case "$first" in
{cases}  esac
  [ "$COMP_CWORD" -gt 2 ] && case "$both" in
{cases}  esac
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _raekit raekit"""


def zsh(commands: Commands) -> str:
    """Return the script for zsh, which runs the one for bash."""
    return f"autoload -Uz compinit bashcompinit && compinit && bashcompinit\n{bash(commands)}"


def fish(commands: Commands) -> str:
    """Return the script for fish."""
    lines = []
    for name, words in _words(commands).items():
        seen = "; and ".join(f"__fish_seen_subcommand_from {part}" for part in name.split())
        lines.append(f'complete -c raekit -n "{seen or "__fish_use_subcommand"}" -a "{" ".join(words)}"')
    return "\n".join(lines)


SCRIPTS: dict[str, Callable[[Commands], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
