"""`fastidc completion`: a script that completes commands, flags and what flags may be; it starts no Python at a Tab.

tyro's own goes by the printed help, whose second lines it takes for values, and asks Python at every Tab.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from fastidc.commands.flags import Flag, first_sentence, flags_of
from fastidc.errors import FastidcError

Shell = Literal["bash", "zsh", "fish"]
Commands = Mapping[str, Callable | Mapping[str, Callable]]
_HELP = ("--help", "--help-all")


def script(shell: Shell, commands: Commands, about: Mapping[str, str]) -> str:
    """The script for ``shell``. commands: as `fastidc.cli.COMMANDS`. about: a line on each command that is a group."""
    makers = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    if shell not in makers:
        raise FastidcError(f"unknown shell {shell!r}; choose one of {', '.join(makers)}.")
    return makers[shell](commands, about)


def _leaves(commands: Commands) -> Iterator[tuple[str, Callable]]:
    """(command, its function), "cache build" being a command."""
    for name, held in commands.items():
        if isinstance(held, Mapping):
            yield from ((f"{name} {action}", run) for action, run in held.items())
        else:
            yield name, held


def _groups(commands: Commands) -> dict[str, str]:
    return {name: " ".join(held) for name, held in commands.items() if isinstance(held, Mapping)}


def _cases(commands: Commands) -> tuple[str, str]:
    """Two bodies of a ``case`` that bash and zsh both understand: on "command flag" for values, setting ``words`` or ``files``, and on "command"."""
    values, flags = [], []
    for name, run in _leaves(commands):
        known = flags_of(run)
        for flag in known:
            if flag.options and not flag.is_switch:
                what = f'words="{" ".join(flag.choices)}"' if flag.choices else "files=1"
                values.append(f'    "{name} {flag.options[0]}") {what} ;;')
        offered = " ".join(option for flag in known for option in flag.options)
        first = next((f' first="{" ".join(flag.choices)}"' for flag in known if flag.positional and flag.choices), "")
        flags.append(f'    "{name}") flags="{" ".join((offered, *_HELP)).strip()}"{first} ;;')
    return "\n".join(values), "\n".join(flags)


def _head(commands: Commands) -> tuple[str, str, str, str]:
    values, flags = _cases(commands)
    groups = "\n".join(f'    {name}) actions="{actions}" ;;' for name, actions in _groups(commands).items())
    return " ".join(commands), groups, values, flags


_BASH = """\
# Completion of fastidc for bash: source this file, as in  source <(fastidc completion bash)
_fastidc() {
  local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}" command="${COMP_WORDS[1]}"
  local actions="" words="" files="" flags="" first="" place=2
  COMPREPLY=()
  if (( COMP_CWORD == 1 )); then
    COMPREPLY=( $(compgen -W "@COMMANDS@ --help" -- "$cur") )
    return
  fi
  case "$command" in
@GROUPS@
  esac
  if [[ -n "$actions" ]]; then
    if (( COMP_CWORD == 2 )); then
      COMPREPLY=( $(compgen -W "$actions --help" -- "$cur") )
      return
    fi
    command="$command ${COMP_WORDS[2]}"
    place=3
  fi
  if [[ "$cur" == "=" ]]; then  # bash cuts words at =
    cur=""
  elif [[ "$prev" == "=" ]]; then
    prev="${COMP_WORDS[COMP_CWORD-2]}"
  fi
  case "$command ${prev//_/-}" in
@VALUES@
  esac
  if [[ -n "$words" ]]; then
    COMPREPLY=( $(compgen -W "$words" -- "$cur") )
    return
  fi
  [[ -n "$files" ]] && return  # bash's own file names, by -o default
  case "$command" in
@FLAGS@
  esac
  if [[ "$cur" == -* ]]; then
    COMPREPLY=( $(compgen -W "$flags" -- "$cur") )
  elif [[ -n "$first" ]] && (( COMP_CWORD == place )); then
    COMPREPLY=( $(compgen -W "$first" -- "$cur") )
  fi
}
complete -o default -F _fastidc fastidc
"""

_ZSH = """\
#compdef fastidc
# Completion of fastidc for zsh: after compinit, as in  source <(fastidc completion zsh)  or as a file _fastidc in $fpath
_fastidc() {
  local prev="${words[CURRENT-1]}" cur="${words[CURRENT]}" command="${words[2]}"
  local actions="" offered="" files="" flags="" first="" place=3
  if (( CURRENT == 2 )); then
    compadd -- @COMMANDS@ --help
    return
  fi
  case "$command" in
@GROUPS@
  esac
  if [[ -n "$actions" ]]; then
    if (( CURRENT == 3 )); then
      compadd -- ${=actions} --help
      return
    fi
    command="$command ${words[3]}"
    place=4
  fi
  case "$command ${prev//_/-}" in
@VALUES@
  esac
  if [[ -n "$offered" ]]; then
    compadd -- ${=offered}
    return
  fi
  if [[ -n "$files" ]]; then
    _files
    return
  fi
  case "$command" in
@FLAGS@
  esac
  if [[ "$cur" == -* ]]; then
    compadd -- ${=flags}
  elif [[ -n "$first" ]] && (( CURRENT == place )); then
    compadd -- ${=first}
  else
    _files
  fi
}
if [[ "$funcstack[1]" == "_fastidc" ]]; then
  _fastidc "$@"
else
  compdef _fastidc fastidc
fi
"""


def _filled(text: str, commands: Commands) -> str:
    names, groups, values, flags = _head(commands)
    for mark, value in (("@COMMANDS@", names), ("@GROUPS@", groups), ("@VALUES@", values), ("@FLAGS@", flags)):
        text = text.replace(mark, value)
    return text


def _bash(commands: Commands, about: Mapping[str, str]) -> str:
    return _filled(_BASH, commands)


def _zsh(commands: Commands, about: Mapping[str, str]) -> str:
    return re.sub(r'\) words="', ') offered="', _filled(_ZSH, commands))  # `words` is what zsh calls the line


def _fish(commands: Commands, about: Mapping[str, str]) -> str:
    lines = [
        "# Completion of fastidc for fish: fastidc completion fish > ~/.config/fish/completions/fastidc.fish",
        "function __fastidc_at  # whether the line so far begins with these words",
        "    set -l line (commandline -opc)",
        "    set -l last (math 1 + (count $argv))",
        '    test (count $line) -ge $last; and test "$line[2..$last]" = "$argv"',
        "end",
        "function __fastidc_first",
        "    test (count (commandline -opc)) -eq $argv[1]",
        "end",
    ]
    for name, held in commands.items():
        text = about[name] if isinstance(held, Mapping) else first_sentence(held)
        lines.append(f"complete -c fastidc -n '__fastidc_first 1' -f -a {name} -d {_quoted(text)}")
        for action, run in held.items() if isinstance(held, Mapping) else ():
            lines.append(
                f"complete -c fastidc -n '__fastidc_at {name}; and __fastidc_first 2' -f -a {action} -d {_quoted(first_sentence(run))}"
            )
    for name, run in _leaves(commands):
        where = f"complete -c fastidc -n '__fastidc_at {name}'"
        for flag in flags_of(run):
            lines += [f"{where} {rest}" for rest in _fish_rules(flag, len(name.split()) + 1)]
        lines += [f"{where} -f -l {option[2:]}" for option in _HELP]
    return "\n".join(lines) + "\n"


def _fish_rules(flag: Flag, words: int) -> Iterator[str]:
    values = f"-x -a {_quoted(' '.join(flag.choices))}" if flag.choices else "-r -F"
    if flag.positional:
        if flag.choices:
            yield f"-n '__fastidc_first {words}' -x -a {_quoted(' '.join(flag.choices))}"
        return
    for option in flag.options:
        yield f"{'-f' if flag.is_switch else values} -l {option[2:]} -d {_quoted(flag.about)}"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
